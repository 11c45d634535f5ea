"""The `vsearch` command."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from vsearch.config import TrainConfig, UserError, encoder_names

app = typer.Typer(
    help="Type a sentence, get the moments in your video archive.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)
console = Console(stderr=True)

CorpusOption = Annotated[
    str,
    typer.Option("--corpus", help="Where the corpus lives: a folder or an fsspec URL (s3://…)."),
]
ModelsOption = Annotated[
    str, typer.Option("--models", help="Preset of encoders: demo, base (the article's) or open.")
]
DinoOption = Annotated[
    str | None,
    typer.Option("--dino", help="A DINO model instead: transformers or timm name, folder."),
]
ClipOption = Annotated[
    str | None,
    typer.Option("--clip", help="A CLIP model instead: ARCHITECTURE:PRETRAINED, hf-hub:…, folder."),
]
FpsOption = Annotated[
    float | None, typer.Option("--fps", help="At most so many frames a second; all without it.")
]
KindOption = Annotated[str, typer.Option("--kind", help="auto, flat or ivfpq.")]
SpaceOption = Annotated[
    str, typer.Option("--space", help="projected (DINO through the projector) or clip.")
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Training workers; one a GPU, or one, without it."),
]
LimitOption = Annotated[int, typer.Option("--limit", min=1, help="How many segments.")]
GapOption = Annotated[
    float,
    typer.Option("--max-gap", min=0.0, help="Seconds between frames of one segment, at most."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Machine output on stdout; all else goes to stderr.")
]
SourcesArgument = Annotated[
    list[str], typer.Argument(help="Folders, globs or files, local or at any fsspec URL.")
]
DEFAULT_CORPUS = "corpus"


def main() -> None:
    """Runs the command line. A user's mistake is one sentence on stderr and exit code 2."""
    try:
        app(standalone_mode=False)
    except UserError as error:
        console.print(
            f"[bold red]vsearch:[/] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(2)
    except PermissionError as error:
        console.print(
            f"[bold red]vsearch:[/] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(2)
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # a usage error of click
            error.show()
            sys.exit(error.exit_code)
        raise


def run_job(command: Callable[..., None]) -> None:
    """Runs one command as a program of its own, as the scripts in jobs/ do."""
    global app
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command()(command)
    main()


@app.command()
def ingest(
    sources: SourcesArgument,
    corpus: CorpusOption = DEFAULT_CORPUS,
    models: ModelsOption = "base",
    dino: DinoOption = None,
    clip: ClipOption = None,
    fps: FpsOption = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 when a video failed or is partial.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Embed the frames of videos; a repeated command does only what is missing.

    Example: [bold]vsearch ingest ~/Videos --corpus ./corpus --fps 4[/]
    """
    from vsearch.ingest import ingest as run

    names = encoder_names(models, dino, clip)
    began = time.monotonic()
    with _bar() as bar:
        task = bar.add_task("starting", total=None, note="")

        def report(progress: Any) -> None:
            words = {"probe": "reading headers", "embed": "decoding and embedding spans"}
            rate = progress.frames / max(1e-9, time.monotonic() - began)
            note = f"{progress.frames} frames, {rate:.0f} a second" if progress.frames else ""
            bar.update(
                task,
                description=words[progress.stage],
                total=progress.total,
                completed=progress.done,
                note=note,
            )

        summary = run(corpus, sources, names, fps, report)
    states = _print_status(corpus, as_json)
    console.print(
        f"{summary.frames} frames of {summary.spans} spans embedded now, from {summary.videos} videos "
        f"at the sources, in {time.monotonic() - began:.1f} s."
    )
    if strict and any(state.status in ("failed", "partial") for state in states):
        raise typer.Exit(1)


@app.command()
def train(
    corpus: CorpusOption = DEFAULT_CORPUS,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the projector DINO → CLIP on the corpus' frames.

    Example: [bold]vsearch train --corpus ./corpus[/]
    """
    from vsearch.train import train as run

    with console.status("training the projector"):
        summary = run(corpus, TrainConfig(), workers)
    facts = "  ".join(f"{name} {value}" for name, value in summary.metrics.items())
    console.print(
        f"projector {summary.version} ({'new' if summary.new else 'up to date'}): {facts}"
    )
    if as_json:
        _emit(asdict(summary))


@app.command()
def index(
    corpus: CorpusOption = DEFAULT_CORPUS,
    kind: KindOption = "auto",
    space: SpaceOption = "projected",
    as_json: JsonOption = False,
) -> None:
    """Build the index of all embedded frames and publish it.

    Example: [bold]vsearch index --corpus ./corpus --kind ivfpq[/]
    """
    from vsearch.build_index import build_index

    with _bar() as bar:
        task = bar.add_task("building shards", total=None, note="")
        summary = build_index(
            corpus,
            kind,
            space,
            report=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(
        f"snapshot {summary.snapshot} ({'new' if summary.new else 'up to date'}): {summary.kind}, "
        f"{summary.rows} rows in {summary.shards} shards, {summary.space} space"
    )
    if as_json:
        _emit(asdict(summary))


@app.command()
def build(
    sources: SourcesArgument,
    corpus: CorpusOption = DEFAULT_CORPUS,
    models: ModelsOption = "base",
    dino: DinoOption = None,
    clip: ClipOption = None,
    fps: FpsOption = None,
    kind: KindOption = "auto",
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ingest, train and index in one go; what is up to date is left alone.

    Example: [bold]vsearch build ~/Videos --corpus ./corpus[/]
    """
    ingest(sources, corpus, models, dino, clip, fps, as_json=as_json)
    train(corpus, workers)
    index(corpus, kind)


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="What the moment should show.")],
    corpus: CorpusOption = DEFAULT_CORPUS,
    limit: LimitOption = 10,
    max_gap: GapOption = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Find the moments that answer a sentence.

    Example: [bold]vsearch search "a red car on the beach" --limit 5[/]
    """
    import vsearch

    results = vsearch.open(corpus).search(query, limit, max_gap)
    if as_json:
        _emit(results.to_dict())
    else:
        Console().print(_results_table(results))


@app.command()
def evaluate(
    queries: Annotated[
        str,
        typer.Option(
            "--queries", help='JSONL: {"query", "moments": [{"video", "start_s", "end_s"}]}.'
        ),
    ],
    corpus: CorpusOption = DEFAULT_CORPUS,
    snapshot: Annotated[
        str | None,
        typer.Option("--snapshot", help="A version of the index; the current one without."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure retrieval on sentences whose true moments are known.

    Example: [bold]vsearch evaluate --queries truth.jsonl --corpus ./corpus[/]
    """
    import vsearch
    from vsearch.evaluate import evaluate as run
    from vsearch.evaluate import read_queries

    asked = read_queries(queries)
    engine = vsearch.open(corpus, snapshot)
    figures = run(engine.search, asked)
    if as_json:
        _emit(figures)
    else:
        Console().print(_figures_table({str(engine.manifest["space"]): figures}))


@app.command()
def status(corpus: CorpusOption = DEFAULT_CORPUS, as_json: JsonOption = False) -> None:
    """Show what of the corpus is embedded, what failed and why.

    Example: [bold]vsearch status --corpus ./corpus[/]
    """
    _print_status(corpus, as_json, to_stdout=True)


@app.command()
def serve(
    corpus: CorpusOption = DEFAULT_CORPUS,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
) -> None:
    """Serve the page and the HTTP API until Ctrl-C.

    Example: [bold]vsearch serve --corpus ./corpus --port 8000[/]
    """
    from vsearch.serve import start, stop

    with console.status("starting the service"):
        address = start(corpus, host, port)
    console.print(f"The page is at [bold]{address}[/] (Ctrl-C ends it).")
    try:
        _wait()
    finally:
        stop()


@app.command()
def demo(
    corpus: CorpusOption = "demo-archive",
    seed: Annotated[int, typer.Option("--seed", help="Which world.")] = 7,
    videos: Annotated[int, typer.Option("--videos", min=2, help="Videos of six scenes each.")] = 20,
    with_page: Annotated[
        bool, typer.Option("--serve/--no-serve", help="Serve the page at the end.")
    ] = True,
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    as_json: JsonOption = False,
) -> None:
    """See all of it at work, offline: make a small archive, build it, ask it, judge it, serve it.

    Example: [bold]vsearch demo --no-serve --json[/]
    """
    import vsearch
    from vsearch.build_index import build_index
    from vsearch.demo.world import make_world
    from vsearch.evaluate import evaluate as run
    from vsearch.evaluate import read_queries

    world = Path(corpus) / f"world-{seed}-{videos}"
    others = [path for path in Path(corpus).glob("world-*") if path != world]
    if others:
        raise UserError(
            f"{corpus} holds another world ({others[0].name}), whose sentences would have more answers "
            f"with this one beside it: choose another --corpus."
        )
    if not (world / "truth.jsonl").exists():
        with _bar() as bar:
            task = bar.add_task("drawing the videos of a tiny world", total=videos, note="")
            make_world(world, seed, videos, report=lambda n, _: bar.update(task, completed=n))
    ingest([str(world)], corpus, models="demo")
    train(corpus)
    with console.status(
        "indexing, first CLIP's own vectors to compare with, then the projected ones"
    ):
        plain = build_index(corpus, space="clip")
        projected = build_index(corpus, space="projected")
    queries = read_queries(str(world / "truth.jsonl"))
    figures = {
        name: run(vsearch.open(corpus, summary.snapshot).search, queries)
        for name, summary in (("projected DINO", projected), ("plain CLIP", plain))
    }
    engine = vsearch.open(corpus)
    out = console if as_json else Console()
    shown = [q for q in queries if q.group in ("seen", "unseen")][:: max(1, len(queries) // 6)]
    for query in shown:
        out.print(_results_table(engine.search(query.text, limit=3), world))
    out.print(_figures_table(figures))
    if as_json:
        _emit({"evaluation": {**figures["projected DINO"], "plain_clip": figures["plain CLIP"]}})
    if with_page:
        serve(corpus, port=port)
    else:
        console.print(f"The page: [bold]vsearch serve --corpus {corpus}[/]")


# ── what people see ──────────────────────────────────────────────────────────────────────────────


def _bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def _emit(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _wait() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.print("Stopped.")


def _print_status(corpus: str, as_json: bool, to_stdout: bool = False) -> list[Any]:
    from vsearch.corpus import Corpus

    states = Corpus(corpus).states()
    count = {
        name: sum(state.status == name for state in states)
        for name in ("indexed", "partial", "failed", "pending")
    }
    if as_json:
        _emit(
            {
                "videos": {"total": len(states), **count},
                "frames": sum(state.frames for state in states),
                "failed": [
                    {"video": s.uri, "reason": s.reason} for s in states if s.status == "failed"
                ],
                "partial": [
                    {"video": s.uri, "reason": s.reason} for s in states if s.status == "partial"
                ],
            }
        )
        return states
    table = Table(
        title=f"{len(states)} videos, {sum(s.frames for s in states)} frames", title_justify="left"
    )
    for heading in ("video", "status", "frames", "reason"):
        table.add_column(
            heading, justify="right" if heading == "frames" else "left", overflow="fold"
        )
    colours = {"partial": "yellow", "failed": "red", "pending": "cyan"}
    for state in states:
        if state.status != "indexed":
            status = f"[{colours[state.status]}]{state.status}[/]"
            name, reason = escape(Path(state.uri).name), escape(state.reason or "")
            table.add_row(name, status, str(state.frames), reason)
    out = Console() if to_stdout else console
    out.print(", ".join(f"{number} {name}" for name, number in count.items() if number))
    if table.row_count:
        out.print(table)
    return states


def _results_table(results: Any, folder: Path | None = None) -> Table:
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


def _figures_table(figures: dict[str, dict[str, Any]]) -> Table:
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


if __name__ == "__main__":
    main()
