"""What people see at a terminal: bars, lines and tables. Those of results go to stdout, all else to
stderr.
"""

import json
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
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

from vsearch.config import space_name

if TYPE_CHECKING:
    from vsearch import build_index, ingest
    from vsearch.clips import Cut
    from vsearch.coverage import Overview, VideoState
    from vsearch.plan import Plan
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


def announce(line: str) -> None:
    """Says what a stage runs on."""
    console.print(line, highlight=False, soft_wrap=True)


def emit_parts(parts: Iterable[str]) -> None:
    """Writes one line of JSON that comes in parts to stdout."""
    sys.stdout.writelines(parts)
    sys.stdout.write("\n")
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


def coverage_line(told: "Overview") -> str:
    """How many videos there are, how many of them are embedded in full, and what that is in sum."""
    from vsearch.moments import clock

    sums = told.sums
    parts = [f"{n} {name}" for name, n in told.videos.items() if n and name != "total"]
    return (
        f"[bold]{told.videos['total']} videos[/]: {', '.join(parts) or 'none'}. "
        f"[bold]{sums['frames']} frames[/] of "
        f"{clock(sums['indexed_s'])} out of {clock(sums['expected_s'])}; encoders worked "
        f"{clock(sums['encode_s'])}, decoders {clock(sums['decode_s'])}."
    )


def index_line(told: "Overview", projector: str | None = None) -> str:
    """What the index holds, and whether it is behind: lacks videos, or is of another projector than the
    newest.
    """
    indexed = told.indexed
    if indexed is None:
        return "[yellow]There is no index yet[/]: run vsearch train and vsearch index."
    line = (
        f"Snapshot {indexed['snapshot']} answers from {indexed['rows']} rows, which stand "
        f"for {indexed['frames']} frames of {len(indexed['videos'])} videos."
    )
    if told.not_in_index or told.sums["frames"] != indexed["frames"]:
        line += (
            f" [yellow]It is behind[/]: {told.not_in_index} embedded videos are not in it; run "
            f"vsearch index."
        )
    elif indexed["projector"] not in (None, projector):
        line += " [yellow]It is behind[/]: there is a newer projector; run vsearch index."
    return line


def drift_line(projector: dict[str, Any]) -> str:
    """How the projector fares on what came after its training, as `drift.told` tells it, and whether to
    train again.
    """
    line = (
        f"Projector {projector['version']} has a cosine of {projector['cosine']:.3f} in validation"
    )
    if not projector["new_frames"]:
        return f"{line}; nothing was ingested since."
    line += f"; on the {projector['new_frames']} frames ingested since, "
    if projector["new_cosine"] is not None:
        line += f"{projector['new_cosine']:.3f}, and "
    line += f"they lie {projector['new_distance']:.2f} times as far out as those it was trained on."
    if projector["training_due"]:
        line += " [yellow]A training is due[/]: run vsearch train (--from-newest is sooner done)."
    return line


def print_videos(out: Console, told: "Overview") -> None:
    """Prints a table of the videos to show; where there are more it says how many."""
    shown = told.shown()
    if shown:
        out.print(_videos_table(shown))
    if left := told.listable - len(shown):
        out.print(f"… and {left} more (--failed, or --json, lists all)")


def _videos_table(states: "list[VideoState]") -> Table:
    from vsearch.moments import clock

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
    from vsearch.moments import clock

    table = Table(
        title=f"“{escape(results.query)}”  ({results.took_ms:.0f} ms)", title_justify="left"
    )
    for heading in ("", "from", "to", "score", "confidence", "video"):
        table.add_column(
            heading, justify="left" if heading == "video" else "right", overflow="fold"
        )
    for place, s in enumerate(results, 1):
        name = Path(s.video).name if folder else s.video
        told = "–" if s.confidence is None else f"{s.confidence:.2f}"
        times = (clock(s.start_s), clock(s.end_s))
        table.add_row(str(place), *times, f"{s.score:.3f}", told, escape(name))
    return table


def clip_name(place: int, uri: str, start_s: float) -> str:
    """The name of the file into which a segment is cut out."""
    plain = re.sub(r"[^\w.-]+", "_", PurePosixPath(uri).stem)[:80]
    return f"{place:02d}-{plain}-{start_s:06.1f}s.mp4"


def clip_line(done: "Cut") -> str:
    """How a segment was cut out."""
    early = f", from the keyframe {done.early_s:.1f} s earlier" if done.early_s >= 0.05 else ""
    kinds = [f"video {done.video}{early}", f"sound {done.audio}" if done.audio else "no sound"]
    return "; ".join(kinds)


OF_GROUPS = ("R1@0.5", "R5@0.5", "mAP", "FPR", "negation")
"""What is shown of a group of sentences."""


def figures_table(spaces: list[dict[str, Any]]) -> Table:
    """The figures of `evaluate.Judged` side by side, with their intervals; some also by group of
    sentences.
    """
    from vsearch.evaluate import FIGURES

    table = Table(title="Retrieval against the known truth", title_justify="left")
    table.add_column("sentences")
    table.add_column("figure")
    for figures in spaces:
        table.add_column(space_name(figures["space"], figures["alpha"]), justify="right")
    first = spaces[0]
    for group in (None, *first.get("groups", {})):
        of_group = [f if group is None else f["groups"][group] for f in spaces]
        title = f"{'all' if group is None else escape(group)}\n[dim]{of_group[0]['queries']}[/]"
        table.add_section()
        for name in FIGURES if group is None else OF_GROUPS:
            if any(name in values for values in of_group):
                cells = [_short_cell(values, name) for values in of_group]
                table.add_row(title, name, *cells)
                title = ""
    table.caption = _bootstrap_line(first["bootstrap"])
    return table


def judged_table(report: dict[str, Any]) -> Table:
    """The metrics of another system's answers, by the length of the true windows."""
    shown = {
        "queries": ("queries",), "mAP": ("MR-mAP", "average"), "mAP@0.5": ("MR-mAP", "0.5"),
        "mAP@0.75": ("MR-mAP", "0.75"), "R1@0.5": ("MR-R1", "0.5"), "R1@0.7": ("MR-R1", "0.7"),
        "R5@0.5": ("MR-R5", "0.5"), "NDCG@10": ("MR-NDCG@10", "0.5"),
        "error (s)": ("MR-boundary-error-s",),
    }  # fmt: skip
    table = Table(title="Moments by the rules of QVHighlights (%)", title_justify="left")
    for heading in ("windows", *shown):
        table.add_column(heading, justify="left" if heading == "windows" else "right")
    for name in ("full", "long", "middle", "short"):
        figures, bounds = report[name], report["intervals"][name]
        table.add_row(
            name, *(_figure_cell(_at(figures, p), _at(bounds, p)) for p in shown.values())
        )
    table.caption = _bootstrap_line(report["bootstrap"])
    return table


def _at(figures: dict[str, Any], path: tuple[str, ...]) -> Any:
    """What stands at a path of names, None if nothing does."""
    found: Any = figures
    for name in path:
        found = found.get(name) if found else None
    return found


def _short_cell(figures: dict[str, Any], name: str) -> str:
    """A figure of `evaluate` with three digits, and below it its interval."""
    bounds = figures["intervals"].get(name)
    value = round(figures[name], 3) if name in figures else None
    return _figure_cell(value, [round(bound, 3) for bound in bounds] if bounds else None)


def _figure_cell(value: float | None, bounds: list[float] | None) -> str:
    """A figure, and below it its interval."""
    if value is None:
        return ""
    return f"{value:g}" + (f"\n[dim]{bounds[0]:g} … {bounds[1]:g}[/]" if bounds else "")


def _bootstrap_line(bootstrap: dict[str, Any]) -> str:
    """How the intervals came about."""
    return (
        f"Below each figure: its {bootstrap['level']:.0%} interval by bootstrap over "
        f"{bootstrap['over']} ({bootstrap['resamples']:,} resamples, seed {bootstrap['seed']})."
    )


def index_summary_line(summary: "build_index.IndexSummary") -> str:
    """What an index build left."""
    made = (
        f"{summary.shards_new} of {summary.shards} shards made now" if summary.new else "up to date"
    )
    return (
        f"snapshot [bold]{summary.snapshot}[/] ({made}): {summary.kind}, {summary.rows} rows for "
        f"{summary.frames} frames, {space_name(summary.space, summary.alpha)} space"
    )


def plan_table(made: "Plan") -> Table:
    """What an ingest would cost, and on what each figure rests."""
    table = Table(
        title=f"What it takes ({made.files:,} files, {made.sampled:,} of them looked into)",
        title_justify="left",
    )
    for heading in ("", "value", "95 %", "rests on", "law"):
        table.add_column(heading, justify="right" if heading in ("value", "95 %") else "left")
    colours = {"derived": "yellow", "measured": "green"}
    for figure in made.figures:
        exact = figure.low == figure.high
        value, low, high = (
            quantity(v, figure.unit) for v in (figure.value, figure.low, figure.high)
        )
        colour = colours.get(figure.basis, "default")
        table.add_row(
            figure.label,
            f"[bold]{value}[/]",
            "" if exact else f"{low} … {high}",
            f"[{colour}]{figure.basis}[/]",
            figure.law,
        )
    return table


def quantity(value: float, unit: str) -> str:
    """A figure for people: three digits and its unit."""
    if unit.startswith("B"):
        for prefix in ("", "k", "M", "G", "T", "P"):
            if value < 1000 or prefix == "P":
                break
            value /= 1000
        unit = prefix + unit
    digits = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{digits} {unit}".rstrip()


def snapshots_table(manifests: list[dict[str, Any]], current: str) -> Table:
    """The versions of an index, the oldest first."""
    table = Table()
    table.add_column("")
    table.add_column("version", no_wrap=True)
    for heading in ("kind", "space", "rows", "frames", "shards", "recall"):
        table.add_column(heading, justify="left" if heading in ("kind", "space") else "right")
    for manifest in manifests:
        tuning = manifest["tuning"]
        table.add_row(
            "▶" if manifest["version"] == current else "",
            manifest["version"],
            manifest["kind"],
            space_name(manifest["space"], manifest.get("alpha")),
            str(manifest["rows"]),
            str(manifest["frames"]),
            str(len(manifest["shards"])),
            f"{_chosen(tuning)['recall_200_text']:.3f}" if tuning else "exact",
        )
    return table


def _chosen(tuning: dict[str, Any]) -> dict[str, Any]:
    """The point of the curve that is in use."""
    setting = tuning["setting"]
    found: dict[str, Any] = next(
        p for p in tuning["curve"] if all(p[name] == value for name, value in setting.items())
    )
    return found


def recall_table(tuning: dict[str, Any]) -> Table:
    """The recall at each setting, and which one is in use."""
    table = Table(
        title=f"Recall on {tuning['text_queries']} sentences and {tuning['frame_queries']} frames, "
        f"asked for {tuning['min_recall']:g}",
        title_justify="left",
    )
    headings = {
        "nprobe": "cells", "per_hit": "candidates/hit", "recall_200_text": "text @200",
        "worst_text": "worst 5 %", "recall_10_text": "text @10",
        "recall_200_frames": "frames @200", "p50_ms": "p50 ms",
    }  # fmt: skip
    table.add_column("")
    for heading in headings.values():
        table.add_column(heading, justify="right")
    chosen = _chosen(tuning)
    for point in tuning["curve"]:
        table.add_row("▶" if point is chosen else "", *(f"{point[name]:g}" for name in headings))
    return table


def draw_recall(manifest: dict[str, Any], folder: Path) -> Path:
    """Draws recall over time for the settings of a snapshot; gives the PNG's path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tuning = manifest["tuning"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for per_hit in sorted({point["per_hit"] for point in tuning["curve"]}):
        points = [point for point in tuning["curve"] if point["per_hit"] == per_hit]
        times = [point["p50_ms"] for point in points]
        (line,) = axes.plot(
            times, [p["recall_200_text"] for p in points], "o-", label=f"{per_hit} candidates a hit"
        )
        axes.plot(times, [p["worst_text"] for p in points], ":", color=line.get_color())
    chosen = _chosen(tuning)
    axes.plot(chosen["p50_ms"], chosen["recall_200_text"], "k*", markersize=14, label="in use")
    axes.axhline(tuning["min_recall"], color="grey", linewidth=0.8, label="asked for")
    axes.set(
        xscale="log",
        xlabel="median of a search, one thread (ms)",
        ylabel="recall@200 on text (dotted: worst 5 %)",
        title=f"{manifest['rows']:,} rows, {manifest['quantizer']['nlist']} cells",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    path = folder / f"recall-{manifest['version']}.png"
    FigureCanvasAgg(figure).print_png(str(path))
    return path
