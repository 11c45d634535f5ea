"""The answer to a query for other programs: a table (CSV), or a cut list that an editing program opens
(OpenTimelineIO, CMX 3600 EDL), one clip a segment.

>>> print(to_csv(results))
>>> Path("moments.otio").write_text(to_otio(results, corpus.videos()))
"""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from posixpath import basename, splitext
from typing import Any

import opentimelineio as otio
from opentimelineio.opentime import RationalTime, TimeRange

from vsearch.config import UserError
from vsearch.search import Results, Segment

COLUMNS = (
    *("place", "video", "start_s", "end_s", "best_s", "score", "recorded_at", "video_id"),
    *("query", "snapshot", "confidence"),
)
"""Of the CSV, in this order; a later version may add some at the end."""

ASSUMED_RATE = 25.0
"""Frames a second of a video that does not say."""

SLOWEST_RATE = 20.0
"""Below it there is no time code near."""

EDL_EVENTS = 999
"""Their numbers have three digits."""

REEL_LETTERS = 8

Rows = Iterable[Mapping[str, Any]]


def to_csv(results: Results) -> str:
    """A table with a header and a row for each segment, the strongest first; times in seconds as a player
    shows them.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for place, segment in enumerate(results, 1):
        of_all = {"place": place, "query": results.query, "snapshot": results.snapshot}
        values = segment.to_dict() | of_all
        table.writerow([values[column] for column in COLUMNS])
    return text.getvalue()


def to_otio(results: Results, videos: Rows) -> str:
    """A timeline in OpenTimelineIO's JSON: the segments one after the other, each in its video's frame
    rate. `videos` are the rows of the corpus (see `Corpus.videos`). What a clip answers, and how well,
    stands in its metadata under `vsearch`, and in a marker on its best frame.
    """
    return str(otio.adapters.write_to_string(_timeline(results, _by_id(videos)), "otio_json"))


def to_edl(results: Results, videos: Rows) -> str:
    """As `to_otio`, as a CMX 3600 edit decision list. It has one rate: that of most of the segments, as
    far as there is a time code for it. A reel is named by eight letters of a video's file. Raises
    `UserError` for more segments than it can number.
    """
    if len(results) > EDL_EVENTS:
        raise UserError(
            f"An EDL holds {EDL_EVENTS} segments, not {len(results)}: use --format otio."
        )
    rows = _by_id(videos)
    known = Counter(_time_code_rate(_rate(rows.get(s.video_id))) for s in results)
    rate = known.most_common(1)[0][0] if known else ASSUMED_RATE
    timeline = _timeline(results, rows, rate)
    reels = _reels(segment.video for segment in results)
    for clip, segment in zip(timeline.find_clips(), results, strict=True):
        notes = [f"SCORE: {segment.score:g}"]
        clip.metadata["cmx_3600"] = {"reel": reels[segment.video], "comments": notes}
    # Without a name the adapter writes no title, so that the kind of time code can follow ours.
    title, timeline.name = timeline.name, ""
    dropping = ";" in RationalTime(0, rate).to_timecode()
    head = f"TITLE: {title}\nFCM: {'DROP' if dropping else 'NON-DROP'} FRAME\n\n"
    return head + (
        otio.adapters.write_to_string(timeline, "cmx_3600", rate=rate) if results else ""
    )


def _timeline(
    results: Results, rows: dict[str, Mapping[str, Any]], rate: float | None = None
) -> Any:
    track = otio.schema.Track("moments", kind=otio.schema.TrackKind.Video)
    track.extend([_clip(results, segment, rows.get(segment.video_id), rate) for segment in results])
    timeline = otio.schema.Timeline(_line(results.query))
    timeline.metadata["vsearch"] = {"query": results.query, "snapshot": results.snapshot}
    timeline.tracks.append(track)
    return timeline


def _clip(
    results: Results, segment: Segment, row: Mapping[str, Any] | None, one_rate: float | None
) -> Any:
    own_rate = _rate(row)
    rate = one_rate or own_rate or ASSUMED_RATE
    answer = {"query": results.query, "score": segment.score}
    source = _range(segment.start_s, segment.end_s, rate)
    best = TimeRange(RationalTime(round(segment.best_s * rate), rate), RationalTime(1, rate))
    marker = otio.schema.Marker(
        _line(results.query), best, otio.schema.MarkerColor.GREEN, {"vsearch": answer}
    )
    end_s = _end_s(row)
    media = otio.schema.ExternalReference(
        _line(segment.video),
        available_range=None if end_s is None else _range(0, max(end_s, segment.end_s), rate),
    )
    told = {"rate": "assumed" if own_rate is None else "of the video", **segment.to_dict()}
    return otio.schema.Clip(
        _line(basename(segment.video)),
        media,
        source,
        markers=[marker],
        metadata={"vsearch": answer | told},
    )


def _range(start_s: float, end_s: float, rate: float) -> TimeRange:
    """A stretch in whole frames, at least one."""
    first, stop = round(start_s * rate), round(end_s * rate)
    return TimeRange(RationalTime(first, rate), RationalTime(max(1, stop - first), rate))


def _by_id(videos: Rows) -> dict[str, Mapping[str, Any]]:
    return {row["video_id"]: row for row in videos}


def _rate(row: Mapping[str, Any] | None) -> float | None:
    fps = None if row is None else row.get("fps")
    return float(fps) if fps and math.isfinite(fps) and fps > 0 else None


def _end_s(row: Mapping[str, Any] | None) -> float | None:
    """When a video ends, as a player shows it."""
    if row is None or row.get("duration_s") is None:
        return None
    return float(row["duration_s"] + (row.get("start_s") or 0) - (row.get("zero_s") or 0))


def _time_code_rate(rate: float | None) -> float:
    """The rate of a time code for a frame rate: the nearest, or for slow ones, which have none, one in
    which their frames lie at whole numbers.
    """
    if rate is None:
        return ASSUMED_RATE
    if rate < SLOWEST_RATE:
        return next((code for code in (25.0, 30.0, 24.0) if code % rate == 0), ASSUMED_RATE)
    return float(RationalTime.nearest_smpte_timecode_rate(rate))


def _reels(uris: Iterable[str]) -> dict[str, str]:
    """A name of at most eight letters and digits for each video, no two alike."""
    reels: dict[str, str] = {}
    for uri in dict.fromkeys(uris):
        plain = re.sub("[^A-Z0-9]", "", splitext(basename(uri))[0].upper()) or "REEL"
        reel, number = plain[:REEL_LETTERS], 2
        while reel in reels.values():
            reel = f"{plain[: REEL_LETTERS - len(str(number))]}{number}"
            number += 1
        reels[uri] = reel
    return reels


def _line(text: str) -> str:
    """A text without control characters: a line break would begin another statement of an EDL."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
