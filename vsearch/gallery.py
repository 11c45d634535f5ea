"""Segments as HTML with a picture of each, for notebooks."""

import base64
import html
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

from vsearch.moments import clock

WIDTH_PX = 160
STYLES = {
    "strip": "display:flex;flex-wrap:wrap;gap:12px;margin:8px 0",
    "figure": f"width:{WIDTH_PX}px;margin:0;font-size:12px;line-height:1.4;overflow-wrap:anywhere",
    "image": f"width:{WIDTH_PX}px;border-radius:6px;display:block;margin:0 0 4px",
}


def gallery(
    title: str,
    segments: Sequence[Any],
    picture: Callable[[Any], bytes] | None = None,
    note: str = "",
) -> str:
    """Segments (see `search.Segment`) side by side, the strongest first. `picture` gives a JPEG of one;
    where it fails its reason is shown instead.
    """
    figures = "".join(_figure(place, s, picture) for place, s in enumerate(segments, 1))
    strip = f'<div style="{STYLES["strip"]}">{figures}</div>'
    return f"<div><b>{html.escape(title)}</b>{strip}{html.escape(note)}</div>"


def _figure(place: int, segment: Any, picture: Callable[[Any], bytes] | None) -> str:
    sure = "" if segment.confidence is None else f", confidence {segment.confidence:.2f}"
    lines = (
        f"<b>{place}.</b> {clock(segment.start_s)} – {clock(segment.end_s)}",
        f"score {segment.score:.3f}{sure}",
        html.escape(PurePosixPath(segment.video).name),
    )
    image = _image(segment, picture) if picture else ""
    caption = "<br>".join(lines)
    return (
        f'<figure style="{STYLES["figure"]}" title="{html.escape(segment.video)}">{image}'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _image(segment: Any, picture: Callable[[Any], bytes]) -> str:
    try:
        data = base64.b64encode(picture(segment)).decode()
    except Exception as error:  # each storage has errors of its own; the page says which
        return f"<p><i>no picture: {html.escape(str(error))}</i></p>"
    return f'<img alt="" style="{STYLES["image"]}" src="data:image/jpeg;base64,{data}">'
