"""Judged answers as a page of HTML that needs nothing else: the figures with their intervals, and the
queries that were answered worst, with pictures of what is true and of what was found.
"""

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from vsearch.evaluate import FIGURES, Judged, Moment, Query, answers_of, claims, precisions
from vsearch.moments import clock

WORST = 12
UNANSWERABLE = 4
"""So many queries are shown that have true moments, and that have none."""
SHOWN_MOMENTS = 4
SHOWN_ANSWERS = 4
PICTURE_WIDTH_PX = 160

Picture = Callable[[str, float, int], bytes]
"""A JPEG of what a video (its URI) shows at a second of stream time, at most so many pixels wide."""

MEANINGS = {
    "R1@0.5": "Share of queries whose first answer reaches a true moment at IoU 0.5",
    "R1@0.7": "The same at IoU 0.7",
    "R5@0.5": "Share of queries with a right answer among the first five at IoU 0.5",
    "R5@0.7": "The same at IoU 0.7",
    "mAP@0.5": "Mean average precision at IoU 0.5",
    "mAP@0.75": "Mean average precision at IoU 0.75",
    "mAP": "Mean average precision, the mean over IoU 0.5 to 0.95 by 0.05",
    "NDCG@10": "Normalised discounted cumulative gain of the first ten answers at IoU 0.5",
    "boundary-error-s": "Mean distance in seconds of start and of end, where the first answer is right",
    "FPR": "Share of queries without true moments that got an answer which is not hidden as weak (less "
    "is better)",
    "negation": "Share of pairs in which each sentence has its own moments first",
    "AUROC": "How well the best answer's strength separates queries with true moments from others",
}

HEADS = {"boundary-error-s": "boundary error, s"}

STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1b1c22, #ecedf2); --soft: light-dark(#5b5f6d, #a4a8b6);
  --paper: light-dark(#f7f7f9, #131419); --card: light-dark(#fff, #1c1e25);
  --line: light-dark(#e0e1e8, #30333e);
  --accent: light-dark(#3a52d6, #8fa2ff); --wash: light-dark(#b9c4f8, #3d4a8a);
  --right: light-dark(#147a4b, #62d6a0); --wrong: light-dark(#a8324a, #ff9aac); }
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  color: var(--ink); background: var(--paper); }
main { max-width: 84rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { margin: 0 0 .25rem; font-size: 1.7rem; } h2 { margin: 2.5rem 0 .75rem; font-size: 1.2rem; }
h3 { margin: 0; font-size: 1.05rem; } p { margin: 0 0 .5rem; }
.soft { color: var(--soft); font-size: .875rem; }
.scroll, article { background: var(--card); border: 1px solid var(--line); border-radius: 14px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .5rem; text-align: right; vertical-align: top; }
td, tbody th { white-space: nowrap; }
th { color: var(--soft); font-size: .8rem; font-weight: 600; vertical-align: bottom; }
th:first-child { position: sticky; left: 0; background: var(--card); text-align: left; }
tbody th { color: var(--ink); font-size: .9rem; font-weight: 500; vertical-align: top; }
tbody { border-top: 1px solid var(--line); } .group th { padding-top: .8rem; color: var(--soft); }
td small { display: block; color: var(--soft); font-size: .72rem; }
.range { display: block; position: relative; height: 4px; margin-top: .2rem; border-radius: 2px;
  background: var(--line); min-width: 4rem; }
.range i, .range b { position: absolute; top: 0; height: 4px; border-radius: 2px; }
.range i { background: var(--wash); left: var(--low); right: calc(100% - var(--high)); }
.range b { width: 4px; margin-left: -2px; background: var(--accent); left: var(--at); }
article { margin: 0 0 1rem; padding: 1rem 1.1rem; }
article header { display: flex; flex-wrap: wrap; gap: .25rem 1rem; align-items: baseline; }
.row { display: grid; grid-template-columns: 6.5rem 1fr; gap: .75rem; margin-top: .8rem;
  align-items: start; }
.row > span { color: var(--soft); font-size: .85rem; padding-top: .2rem; }
.strip { display: flex; flex-wrap: wrap; gap: .6rem; }
figure { width: 160px; margin: 0; font-size: .75rem; line-height: 1.35; overflow-wrap: anywhere; }
figure img, .none { display: block; width: 160px; height: 90px; object-fit: contain; border-radius: 8px;
  background: light-dark(#ecedf3, #0c0d11); border: 2px solid transparent; }
.none { padding: .5rem; overflow: hidden; color: var(--soft); }
.right img, .right .none { border-color: var(--right); } .right b { color: var(--right); }
.wrong img, .wrong .none { border-color: var(--line); } .wrong b { color: var(--wrong); }
figcaption { margin-top: .25rem; } figcaption span { color: var(--soft); }
@media (max-width: 40rem) { .row { grid-template-columns: 1fr; gap: .3rem; } }
"""


class Report:
    """The page of the spaces that were asked `queries`; the worst of these are those of the first space.
    `videos` are the rows `uri`, `video_id` and `zero_s` of what was searched.
    """

    def __init__(
        self,
        queries: Sequence[Query],
        judged: Sequence[Judged],
        videos: Sequence[Mapping[str, Any]],
        picture: Picture,
    ) -> None:
        self._queries, self._judged, self._picture = queries, judged, picture
        self._by_name = {Path(video["uri"]).name: video for video in videos}
        self._by_id = {video["video_id"]: video for video in videos}
        self._first = judged[0]
        self._shown: dict[tuple[str, float], str] = {}

    def html(self, corpus: str) -> str:
        """The whole page, with `corpus` as what was asked."""
        cases, nothing = self._worst()
        parts = [
            "<!doctype html>",
            '<html lang="en"><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Retrieval in {html.escape(corpus)}</title><style>{STYLE}</style><main>",
            f"<h1>Retrieval in {html.escape(corpus)}</h1>",
            f'<p class="soft">{len(self._queries)} queries, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. '
            f"{html.escape(self._intervals())}</p>",
            self._table(),
        ]
        if cases:
            first = html.escape(self._first.name)
            parts.append(f"<h2>The queries answered worst, by mAP in the space “{first}”</h2>")
            parts += [self._case(row) for row in cases]
        if nothing:
            parts.append("<h2>Nothing matches these, and yet they were answered most strongly</h2>")
            parts += [self._case(row) for row in nothing]
        return "\n".join([*parts, "</main></html>\n"])

    def _worst(self) -> tuple[list[int], list[int]]:
        """(queries with true moments, without), the worst first."""
        found = [answers_of(segments) for segments in self._first.found]
        worth = precisions(self._queries, found)
        top = np.array([max((score for _, score in a), default=-np.inf) for a in found])
        worst = [int(row) for row in np.argsort(worth, kind="stable") if worth[row] < 1]
        nothing = [int(row) for row in np.argsort(-top, kind="stable") if np.isnan(worth[row])]
        return worst[:WORST], [row for row in nothing if found[row]][:UNANSWERABLE]

    # ── figures ──────────────────────────────────────────────────────────────────────────────────

    def _intervals(self) -> str:
        made = self._first.figures["bootstrap"]
        return (
            f"Below each figure: its {made['level']:.0%} interval by bootstrap over {made['over']} "
            f"({made['resamples']:,} resamples, seed {made['seed']})."
        )

    def _table(self) -> str:
        """All spaces by all figures that there are, of all queries and of each group."""
        spaces = {judged.name: judged.figures for judged in self._judged}
        sections = {"all queries": spaces} | {
            group: {name: figures["groups"][group] for name, figures in spaces.items()}
            for group in self._first.figures.get("groups", {})
        }
        names = [name for name in FIGURES if any(name in f for f in spaces.values())]
        heads = "".join(
            f'<th scope="col" title="{html.escape(MEANINGS[name])}">{HEADS.get(name, name)}</th>'
            for name in names
        )
        bodies = []
        for title, of_group in sections.items():
            queries = of_group[self._first.name]["queries"]
            rows = "".join(
                f'<tr><th scope="row">{html.escape(space)}</th>'
                + "".join(_cell(name, figures) for name in names)
                + "</tr>"
                for space, figures in of_group.items()
            )
            bodies.append(
                f'<tbody><tr class="group"><th scope="rowgroup">{html.escape(title)} ({queries})</th>'
                f'<td colspan="{len(names)}"></td></tr>{rows}</tbody>'
            )
        head = f'<thead><tr><th scope="col">space</th>{heads}</tr></thead>'
        return f'<div class="scroll"><table>{head}{"".join(bodies)}</table></div>'

    # ── cases ────────────────────────────────────────────────────────────────────────────────────

    def _case(self, row: int) -> str:
        query = self._queries[row]
        group = f"<span class=soft>{html.escape(query.group)}</span>" if query.group else ""
        asked = f"<p class=soft>asked as: {html.escape(', '.join(map(str, query.terms)))}</p>"
        lines = [f"<article><header><h3>{html.escape(query.text)}</h3>{group}</header>"]
        lines += [asked] if query.terms else []
        if query.moments:
            more = len(query.moments) - SHOWN_MOMENTS
            figures = "".join(self._moment(m) for m in query.moments[:SHOWN_MOMENTS])
            lines.append(_strip("true" + (f", and {more} more" if more > 0 else ""), figures))
        for judged in self._judged:
            found = judged.found[row]
            answers = answers_of(found)
            right = claims([moment for moment, _ in answers], query.moments, [0.5])[0]
            figures = "".join(
                self._answer(place, segment, bool(right[place]))
                for place, segment in enumerate(found[:SHOWN_ANSWERS])
            )
            worth = precisions([query], [answers])[0]
            note = "" if np.isnan(worth) else f"<br>mAP {worth:.2f}"
            lines.append(_strip(judged.name, figures or "<p class=soft>no answer</p>", note))
        return "".join([*lines, "</article>"])

    def _moment(self, moment: Moment) -> str:
        video = self._by_name.get(moment.video)
        image = _missing("this video is not in the corpus")
        if video:
            at_s = (moment.start_s + moment.end_s) / 2 + video["zero_s"]
            image = self._image(video["uri"], at_s)
        return _figure("", image, _caption(moment.video, moment.start_s, moment.end_s))

    def _answer(self, place: int, segment: Any, right: bool) -> str:
        video = self._by_id[segment.video_id]
        image = self._image(video["uri"], segment.best_s + video["zero_s"])
        caption = _caption(Path(segment.video).name, segment.start_s, segment.end_s)
        mark = f"<b>{place + 1}. {'right' if right else 'wrong'}</b> {segment.score:.3f}<br>"
        return _figure("right" if right else "wrong", image, mark + caption)

    def _image(self, uri: str, pts_s: float) -> str:
        key = (uri, round(pts_s, 3))
        if key not in self._shown:
            try:
                data = base64.b64encode(self._picture(uri, pts_s, PICTURE_WIDTH_PX)).decode()
                self._shown[key] = f'<img alt="" src="data:image/jpeg;base64,{data}">'
            except Exception as error:  # each storage has errors of its own; the page says which
                self._shown[key] = _missing(str(error))
        return self._shown[key]


def _cell(name: str, figures: Mapping[str, Any]) -> str:
    """A figure, and below it its interval in numbers and drawn."""
    if name not in figures:
        return "<td></td>"
    value, bounds = figures[name], figures["intervals"].get(name)
    text = f"<td>{value:.3f}"
    if bounds:
        low, high = bounds
        text += f"<small>{low:.3f} … {high:.3f}</small>"
        if not name.endswith("-s"):
            places = f"--low:{low:.2%};--high:{high:.2%};--at:{value:.2%}"
            text += f'<span class="range" style="{places}"><i></i><b></b></span>'
    return text + "</td>"


def _strip(title: str, figures: str, note: str = "") -> str:
    return (
        f'<div class="row"><span>{html.escape(title)}{note}</span>'
        f'<div class="strip">{figures}</div></div>'
    )


def _figure(kind: str, image: str, caption: str) -> str:
    return f'<figure class="{kind}">{image}<figcaption>{caption}</figcaption></figure>'


def _caption(video: str, start_s: float, end_s: float) -> str:
    return f"{clock(start_s)} – {clock(end_s)} <span>{html.escape(video)}</span>"


def _missing(reason: str) -> str:
    return f'<div class="none">no picture: {html.escape(reason)}</div>'
