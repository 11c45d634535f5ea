"""What people see at a terminal: bars, lines and tables. Those of results go to stdout, all else to
stderr.
"""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

if TYPE_CHECKING:
    from vsearch import ingest
    from vsearch.coverage import VideoState
    from vsearch.search import Results

console = Console(stderr=True)
STATUS_ROWS = 40
"""So many videos a table of them shows."""


def progress_bar() -> Bar:
    """A bar on stderr; its tasks have a `note`."""
    return Bar(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def emit(value: object) -> None:
    """Writes a value as one line of JSON to stdout."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


class IngestView:
    """Shows an ingest's progress: a bar at a terminal, a line now and then elsewhere."""

    LINE_EVERY_S = 10.0

    def __init__(self) -> None:
        self._bar = progress_bar()
        self._task = self._bar.add_task("starting", total=None, note="")
        self._began: float | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> "IngestView":
        if console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if console.is_terminal:
            self._bar.stop()

    def report(self, progress: "ingest.Progress") -> None:
        words = {"probe": "reading headers", "embed": "decoding and embedding spans"}
        note = self._note(progress) if progress.stage == "embed" and progress.total else ""
        if console.is_terminal:
            self._bar.update(
                self._task,
                description=words[progress.stage],
                total=progress.total,
                completed=progress.done,
                note=note,
            )
        elif time.monotonic() - self._last_line > self.LINE_EVERY_S:
            self._last_line = time.monotonic()
            line = f"{words[progress.stage]}: {progress.done} of {progress.total}"
            console.print(f"{line}, {note}" if note else line, highlight=False, soft_wrap=True)

    def _note(self, progress: "ingest.Progress") -> str:
        self._began = self._began or time.monotonic()
        took_s = time.monotonic() - self._began
        parts = [f"{progress.videos} of {progress.videos_total} videos"]
        if progress.done and took_s > 1:
            left_s = took_s * (progress.total - progress.done) / progress.done
            parts += [
                f"{progress.video_s / 3600:.2f} h of video",
                f"{progress.frames / took_s:.0f} frames/s",
                f"{progress.bottleneck} is the bottleneck",
                f"{int(left_s) // 60}:{int(left_s) % 60:02d} left",
            ]
        return ", ".join(parts)


def print_dry_run(summary: "ingest.IngestSummary", as_json: bool) -> None:
    """Prints what an ingest would do."""
    if as_json:
        listing = [{"video": uri, "change": kind} for uri, kind in summary.listing]
        emit({"videos": summary.videos, "found": summary.found, "changes": listing})
        return
    table = Table(title="What would happen", title_justify="left")
    table.add_column("change")
    table.add_column("video", overflow="fold")
    for uri, kind in summary.listing:
        if kind != "unchanged":
            table.add_row(kind, escape(uri))
    if table.row_count:
        Console().print(table)


def coverage_line(states: "list[VideoState]") -> str:
    """How many videos there are, how many of them are embedded in full, and what that is in sum."""
    from vsearch.coverage import totals
    from vsearch.search import clock

    sums = totals(states)
    parts = [f"{n} {name}" for name, n in sums["videos"].items() if n and name != "total"]
    return (
        f"[bold]{len(states)} videos[/]: {', '.join(parts) or 'none'}. "
        f"[bold]{sums['frames']} frames[/] of "
        f"{clock(sums['indexed_s'])} out of {clock(sums['expected_s'])}; encoders worked "
        f"{clock(sums['encode_s'])}, decoders {clock(sums['decode_s'])}."
    )


def index_line(states: "list[VideoState]", indexed: dict[str, Any] | None) -> str:
    """What the index holds (see `Corpus.indexed`), and whether it is behind."""
    if indexed is None:
        return "[yellow]There is no index yet[/]: run vsearch train and vsearch index."
    line = (
        f"Snapshot {indexed['snapshot']} answers from {indexed['rows']} rows of "
        f"{len(indexed['videos'])} videos."
    )
    lacking = sum(bool(s.frames) and s.video_id not in indexed["videos"] for s in states)
    frames = sum(state.frames for state in states)
    if lacking or frames != indexed["rows"]:
        line += (
            f" [yellow]It is behind[/]: {lacking} embedded videos are not in it; run vsearch index."
        )
    return line


def print_videos(
    out: Console, states: "list[VideoState]", only_flawed: bool, most: int | None = STATUS_ROWS
) -> None:
    """Prints a table of videos, those first (or only) that are not indexed in full; of more than
    `most` it says how many there are.
    """
    listed = [state for state in states if state.status != "indexed"]
    if not only_flawed:
        listed += [state for state in states if state.status == "indexed"]
    shown = listed[:most]
    if shown:
        out.print(_videos_table(shown))
    if left := len(listed) - len(shown):
        out.print(f"… and {left} more (--failed, or --json, lists all)")


def _videos_table(states: "list[VideoState]") -> Table:
    from vsearch.search import clock

    table = Table()
    for heading in ("video", "status", "indexed", "expected", "frames", "tries", "reason"):
        right = heading in ("indexed", "expected", "frames", "tries")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    colours = {"partial": "yellow", "failed": "red", "pending": "cyan", "indexed": "green"}
    for state in states:
        table.add_row(
            escape(Path(state.uri).name),
            f"[{colours[state.status]}]{state.status}[/]" + (" ⛔" if state.quarantined else ""),
            clock(state.indexed_s) if state.frames else "",
            clock(state.expected_s) if state.expected_s else "",
            str(state.frames),
            str(state.attempts),
            escape(state.reason or ""),
        )
    return table


def results_table(results: "Results", folder: Path | None = None) -> Table:
    """The segments that answer a query; videos by their bare names if they lie in a `folder`."""
    from vsearch.search import clock

    table = Table(
        title=f"“{escape(results.query)}”  ({results.took_ms:.0f} ms)", title_justify="left"
    )
    for heading in ("", "from", "to", "score", "video"):
        table.add_column(
            heading, justify="left" if heading == "video" else "right", overflow="fold"
        )
    for place, s in enumerate(results, 1):
        name = Path(s.video).name if folder else s.video
        table.add_row(str(place), clock(s.start_s), clock(s.end_s), f"{s.score:.3f}", escape(name))
    return table


def figures_table(figures: dict[str, dict[str, Any]]) -> Table:
    """The metrics of `evaluate`, by space and by group of sentences."""
    names = ["queries", "R1@0.5", "R1@0.7", "R5@0.5", "mAP", "AUROC"]
    table = Table(title="Retrieval against the known truth", title_justify="left")
    for heading in ("space", "sentences", *names):
        table.add_column(heading, justify="left" if heading in ("space", "sentences") else "right")
    for space, figure in figures.items():
        rows = {"all": figure, **figure.get("groups", {})}
        for group, values in rows.items():
            if group != "nothing":
                cells = [f"{values[n]:g}" if n in values else "" for n in names]
                table.add_row(space if group == "all" else "", group, *cells)
    return table
