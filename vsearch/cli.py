"""The `vsearch` command."""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from vsearch.config import TrainConfig, UserError, encoder_names
from vsearch.show import (
    STATUS_ROWS,
    IngestView,
    console,
    coverage_line,
    emit,
    figures_table,
    index_line,
    print_dry_run,
    print_videos,
    progress_bar,
    results_table,
)

app = typer.Typer(
    help="Type a sentence, get the moments in your video archive.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)

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
MaxChangeOption = Annotated[
    float | None,
    typer.Option(
        "--max-change",
        help="Frames within so many gray levels (of 255) of the last embedded one share its vectors.",
    ),
]
PairsOption = Annotated[
    float,
    typer.Option(
        "--pairs", help="Share of the spans that CLIP sees too; the projector learns from those."
    ),
]
SyncOption = Annotated[
    bool, typer.Option("--sync", help="Also remove what is no longer at the sources.")
]
TimePatternOption = Annotated[
    str | None,
    typer.Option(
        "--time-pattern", help="Recording time in file names, as for strptime: %Y%m%d_%H%M%S (UTC)."
    ),
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
    list[str],
    typer.Argument(
        help="Folders, globs, files or lists (CSV, JSONL, Parquet with a column uri), local or at any "
        "fsspec URL."
    ),
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
    max_change: MaxChangeOption = None,
    pairs: PairsOption = 1.0,
    sync: SyncOption = False,
    time_pattern: TimePatternOption = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try failed videos and damaged spans again.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would happen, and change nothing.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 when a video failed or is partial.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Embed the frames of videos; a repeated command does only what is missing.

    Examples:

    [bold]vsearch ingest ~/Videos --corpus ./corpus --fps 4[/]

    [bold]vsearch ingest s3://archive/2026 s3://archive/list.csv --corpus s3://archive/corpus --sync[/]

    [bold]vsearch ingest /cameras --max-change 2 --time-pattern %Y%m%d_%H%M%S --dry-run[/]
    """
    from vsearch.corpus import Corpus
    from vsearch.coverage import as_dict
    from vsearch.ingest import ingest as run

    names = encoder_names(models, dino, clip)
    began = time.monotonic()
    with IngestView() as view:
        summary = run(
            corpus,
            sources,
            names,
            fps=fps,
            max_change=max_change,
            pairs=pairs,
            sync=sync,
            retry_failed=retry_failed,
            time_pattern=time_pattern,
            dry_run=dry_run,
            report=view.report,
        )
    found = ", ".join(f"{number} {kind}" for kind, number in sorted(summary.found.items()))
    if dry_run:
        print_dry_run(summary, as_json)
        console.print(f"{summary.videos} videos at the sources: {found}. Nothing was changed.")
        return
    stored = Corpus(corpus)
    states = stored.states()
    if as_json:
        emit(as_dict(states, stored.indexed()))
    else:
        console.print(coverage_line(states), highlight=False)
        print_videos(console, states, only_flawed=True)
    console.print(f"{summary.videos} videos at the sources: {found or 'nothing new'}.")
    seconds = time.monotonic() - began
    saved = summary.frames - summary.embedded
    console.print(
        f"{summary.frames} frames of {summary.spans} spans ({summary.video_s / 3600:.2f} hours of video) "
        f"stored now, in {seconds:.1f} s"
        + (f"; {saved} of them share the vectors of the frame before." if saved else ".")
    )
    if summary.unread:
        console.print("[yellow]A part could not be read now[/]; run the same command again:")
        for line in summary.unread[:10]:
            console.print(f"  {escape(line)}", highlight=False)
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
        emit(asdict(summary))


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

    with progress_bar() as bar:
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
        emit(asdict(summary))


@app.command()
def build(
    sources: SourcesArgument,
    corpus: CorpusOption = DEFAULT_CORPUS,
    models: ModelsOption = "base",
    dino: DinoOption = None,
    clip: ClipOption = None,
    fps: FpsOption = None,
    max_change: MaxChangeOption = None,
    pairs: PairsOption = 1.0,
    sync: SyncOption = False,
    time_pattern: TimePatternOption = None,
    kind: KindOption = "auto",
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ingest, train and index in one go; what is up to date is left alone.

    Example: [bold]vsearch build ~/Videos --corpus ./corpus[/]
    """
    ingest(
        sources, corpus, models, dino, clip, fps, max_change, pairs, sync, time_pattern,
        as_json=as_json,
    )  # fmt: skip
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
        emit(results.to_dict())
    else:
        Console().print(results_table(results))


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
        emit(figures)
    else:
        Console().print(figures_table({str(engine.manifest["space"]): figures}))


@app.command()
def status(
    corpus: CorpusOption = DEFAULT_CORPUS,
    failed: Annotated[
        bool, typer.Option("--failed", help="Only what is not indexed in full, all of it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what of the corpus is embedded and indexed, what is not, and why.

    Example: [bold]vsearch status --corpus ./corpus --failed[/]
    """
    from vsearch.corpus import Corpus
    from vsearch.coverage import as_dict

    stored = Corpus(corpus)
    states, indexed = stored.states(), stored.indexed()
    if as_json:
        emit(as_dict(states, indexed))
        return
    out = Console()
    out.print(coverage_line(states), highlight=False)
    out.print(index_line(states, indexed), highlight=False)
    print_videos(out, states, only_flawed=failed, most=None if failed else STATUS_ROWS)


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
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.print("Stopped.")
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
        with progress_bar() as bar:
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
        out.print(results_table(engine.search(query.text, limit=3), world))
    out.print(figures_table(figures))
    if as_json:
        emit({"evaluation": {**figures["projected DINO"], "plain_clip": figures["plain CLIP"]}})
    if with_page:
        serve(corpus, port=port)
    else:
        console.print(f"The page: [bold]vsearch serve --corpus {corpus}[/]")


if __name__ == "__main__":
    main()
