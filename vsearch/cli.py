"""The `vsearch` command."""

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from vsearch.config import (
    GRACE_HOURS,
    KEPT_SNAPSHOTS,
    MIN_CONFIDENCE,
    MIN_RECALL,
    UserError,
    encoder_names,
)
from vsearch.show import (
    STATUS_ROWS,
    IngestView,
    announce,
    clip_line,
    clip_name,
    console,
    coverage_line,
    draw_recall,
    drift_line,
    emit,
    emit_parts,
    figures_table,
    index_line,
    index_summary_line,
    judged_table,
    plan_table,
    print_dry_run,
    print_videos,
    progress_bar,
    recall_table,
    results_table,
    snapshots_table,
)

if TYPE_CHECKING:
    from vsearch.evaluate import Judged, Query
    from vsearch.search import Engine, Results
    from vsearch.submit import Cluster

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
KindOption = Annotated[
    str, typer.Option("--kind", help="auto (by the number of rows), flat (exact) or ivfpq.")
]
RowsOption = Annotated[
    str | None,
    typer.Option(
        "--rows",
        help="moments (neighbouring frames that are alike share one) or frames. By default those of the "
        "index in use, else moments.",
    ),
]
MinRecallOption = Annotated[
    float,
    typer.Option(
        "--min-recall", help="Mean recall@200 on text queries; below it nothing is published."
    ),
]
SpaceOption = Annotated[
    str | None,
    typer.Option(
        "--space",
        help="projected (DINO through the projector), clip, or fused of both. By default that of the index "
        "in use, else fused, or projected where CLIP did not see all frames.",
    ),
]
AlphaOption = Annotated[
    float | None,
    typer.Option(
        "--alpha",
        help="The projected share of the fused space, 0 to 1; tuned without labels, without it.",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Training workers; one a GPU, or one, without it."),
]
GpusOption = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        min=0,
        envvar="VSEARCH_GPUS",
        help="GPUs to use, also such as the cluster has yet to start; all that are up, without it.",
    ),
]
DecodersOption = Annotated[
    int | None,
    typer.Option(
        "--decoders", min=1, help="Decode at most so many files at once; one a core, without it."
    ),
]
BatchOption = Annotated[
    int | None,
    typer.Option("--batch", min=1, help="Frames an encoder takes at once; by its GPU, without it."),
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
OWN_ADDRESSES = ("127.0.0.1", "localhost", "::1")
FORMATS = ("table", "json", "csv", "edl", "otio")
JOBS = {"ingest": "ingest", "train": "train", "index": "index", "pipeline": "build"}
"""The commands that run as jobs, by the jobs' names."""

LISTED_FILES = 20


def main() -> None:
    """Runs the command line. A user's mistake is one sentence on stderr and exit code 2; 3 is for an
    index that does not reach its recall, and for a projector that forgot too much.
    """
    try:
        code = app(standalone_mode=False)  # of a typer.Exit, which it keeps to itself
    except UserError as error:
        console.print(
            f"[bold red]vsearch:[/] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(error.exit_code)
    except PermissionError as error:
        console.print(
            f"[bold red]vsearch:[/] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # a usage error of click
            error.show()
            sys.exit(error.exit_code)
        raise
    if code:
        sys.exit(code)


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
    gpus: GpusOption = None,
    decoders: DecodersOption = None,
    batch: BatchOption = None,
    as_json: JsonOption = False,
) -> None:
    """Embed the frames of videos; a repeated command does only what is missing.

    Examples:

    [bold]vsearch ingest ~/Videos --corpus ./corpus --fps 4[/]

    [bold]vsearch ingest s3://archive/2026 s3://archive/list.csv --corpus s3://archive/corpus --sync[/]

    [bold]vsearch ingest /cameras --max-change 2 --time-pattern %Y%m%d_%H%M%S --dry-run[/]
    """
    from vsearch.corpus import Corpus
    from vsearch.coverage import json_parts
    from vsearch.drift import told as projector_told
    from vsearch.ingest import ingest as run
    from vsearch.placement import Limits
    from vsearch.snapshots import Snapshots

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
            limits=Limits(gpus, decoders, batch),
            report=view.report,
            announce=announce,
        )
    found = ", ".join(f"{number} {kind}" for kind, number in sorted(summary.found.items()))
    if dry_run:
        print_dry_run(summary, as_json)
        console.print(f"{summary.videos} videos at the sources: {found}. Nothing was changed.")
        return
    stored = Corpus(corpus)
    if as_json:
        emit_parts(
            json_parts(stored.each_state(), Snapshots(stored).indexed(), projector_told(stored))
        )
    told = stored.overview(None, True, STATUS_ROWS)
    if not as_json:
        console.print(coverage_line(told), highlight=False)
        print_videos(console, told)
    console.print(f"{summary.videos} videos at the sources: {found or 'nothing new'}.")
    seconds = time.monotonic() - began
    saved = summary.frames - summary.embedded
    console.print(
        f"{summary.frames} frames of {summary.spans} spans ({summary.video_s / 3600:.2f} hours of video) "
        f"stored now, in {seconds:.1f} s"
        + (f"; {saved} of them share the vectors of the frame before." if saved else ".")
    )
    if summary.drift and (projector := projector_told(stored)):
        console.print(drift_line(projector), highlight=False)
    if summary.unread:
        console.print("[yellow]A part could not be read now[/]; run the same command again:")
        for line in summary.unread[:10]:
            console.print(f"  {escape(line)}", highlight=False)
    if strict and (told.videos["failed"] or told.videos["partial"]):
        raise typer.Exit(1)


@app.command()
def plan(
    sources: SourcesArgument,
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="How many; cores embed without.")] = 0,
    gpu_type: Annotated[
        str | None, typer.Option("--gpu-type", help="a10g, l4, rtx4090, a100, l40s, h100, h200.")
    ] = None,
    cores: Annotated[int, typer.Option("--cores", min=1, help="Cores of all machines.")] = 16,
    models: ModelsOption = "base",
    fps: FpsOption = None,
    pairs: PairsOption = 1.0,
    sample: Annotated[
        int, typer.Option("--sample", min=1, help="About how many files to look into.")
    ] = 200,
    price_gpu_hour: Annotated[
        float | None, typer.Option("--price-gpu-hour", help="Of one GPU, in any currency.")
    ] = None,
    price_core_hour: Annotated[
        float | None, typer.Option("--price-core-hour", help="Of one core.")
    ] = None,
    price_gb_month: Annotated[
        float | None, typer.Option("--price-gb-month", help="Of a gigabyte on storage.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what an ingest would take: hours, frames, machines, storage and money; nothing is stored.

    Examples:

    [bold]vsearch plan s3://archive/2026 --gpus 8 --gpu-type l4 --cores 128[/]

    [bold]vsearch plan ~/Videos --fps 2 --cores 8 --price-core-hour 0.04 --price-gb-month 0.02[/]
    """
    from vsearch.plan import Machines, Prices
    from vsearch.plan import plan as run

    with progress_bar() as bar:
        task = bar.add_task("listing", total=None, note="")
        made = run(
            sources,
            Machines(gpus, gpu_type, cores),
            encoder_names(models),
            fps,
            pairs,
            Prices(price_gpu_hour, price_core_hour, price_gb_month),
            sample,
            report=lambda done, total: bar.update(
                task, description="looking into a sample", completed=done, total=total
            ),
        )
    if as_json:
        emit(asdict(made))
        return
    out = Console()
    out.print(plan_table(made))
    out.print(f"[bold]The bottleneck is {made.bottleneck}.[/]")
    for note in made.notes:
        out.print(note, highlight=False)


@app.command()
def train(
    corpus: CorpusOption = DEFAULT_CORPUS,
    workers: WorkersOption = None,
    gpus: GpusOption = None,
    from_newest: Annotated[
        bool,
        typer.Option(
            "--from-newest",
            help="Start from the newest projector: sooner done, and it must not forget.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train the projector DINO → CLIP on the corpus' frames.

    With --from-newest the videos that the newest projector was validated on stay unseen. Where the outcome
    is no better, or has forgotten too much of them, nothing is published and the exit code is 3.

    Examples:

    [bold]vsearch train --corpus ./corpus[/]

    [bold]vsearch train --corpus ./corpus --from-newest[/]
    """
    from vsearch.train import train as run

    with console.status("training the projector"):
        summary = run(corpus, None, workers, gpus, announce, from_newest)
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
    space: SpaceOption = None,
    rows: RowsOption = None,
    queries: Annotated[
        str | None,
        typer.Option("--queries", help="Sentences, one a line, to measure recall on."),
    ] = None,
    min_recall: MinRecallOption = MIN_RECALL,
    retrain: Annotated[
        bool,
        typer.Option(
            "--retrain", help="Fit the quantizer, and a tuned α, anew to all that is there now."
        ),
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Make all of it anew, as when a part is damaged.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Show the recall at each setting, and draw it (PNG).")
    ] = False,
    gpus: GpusOption = None,
    alpha: AlphaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Build the index of all embedded frames and publish it; only what is new is done.

    Ends with exit code 3, and publishes nothing, where no setting reaches --min-recall.

    Examples:

    [bold]vsearch index --corpus ./corpus --report[/]

    [bold]vsearch index --corpus s3://archive/corpus --queries ours.txt --min-recall 0.99[/]

    [bold]vsearch index --corpus ./corpus --space fused[/]
    """
    from vsearch.build_index import build_index
    from vsearch.corpus import Corpus
    from vsearch.snapshots import Snapshots

    words = {
        "rows": "making rows of the frames",
        "codes": "coding shards, measuring recall",
        "confidence": "asking what nothing shows",
    }
    with progress_bar() as bar:
        task = bar.add_task("reading what is there", total=None, note="")
        summary = build_index(
            corpus,
            kind,
            space,
            rows,
            queries,
            min_recall,
            retrain,
            rebuild,
            gpus=gpus,
            announce=announce,
            report=lambda stage, done, total: bar.update(
                task, description=words[stage], completed=done, total=total
            ),
            alpha=alpha,
        )
    console.print(index_summary_line(summary), highlight=False)
    for warning in summary.warnings:
        console.print(f"[yellow]{escape(warning)}[/]", highlight=False)
    manifest = Snapshots(Corpus(corpus)).manifest(summary.snapshot) if report else None
    if manifest and manifest["tuning"] is None:
        console.print("Every row is compared with the query: recall is 1, there is no curve.")
    elif manifest:
        Console().print(recall_table(manifest["tuning"]))
        console.print(f"The curve is drawn in [bold]{draw_recall(manifest, Path.cwd())}[/].")
    if as_json:
        emit(asdict(summary))


@app.command()
def snapshots(corpus: CorpusOption = DEFAULT_CORPUS, as_json: JsonOption = False) -> None:
    """List the published versions of the index.

    Example: [bold]vsearch snapshots --corpus ./corpus[/]
    """
    from vsearch.corpus import Corpus
    from vsearch.snapshots import Snapshots

    found = Snapshots(Corpus(corpus))
    current = found.require_current()
    manifests = []
    for version in found.versions():
        try:
            manifests.append(found.manifest(version))
        except UserError as error:
            console.print(f"[red]{escape(str(error))}[/]", highlight=False)
    if as_json:
        names = ("version", "parent", "created_at", "kind", "space", "alpha", "rows", "frames")
        listed = [{name: m.get(name) for name in names} for m in manifests]
        emit({"current": current, "snapshots": listed})
    else:
        Console().print(snapshots_table(manifests, current))


@app.command()
def rollback(
    version: Annotated[
        str | None, typer.Argument(help="A version; without it the one before the current.")
    ] = None,
    corpus: CorpusOption = DEFAULT_CORPUS,
) -> None:
    """Go back to an earlier version of the index.

    Example: [bold]vsearch rollback --corpus ./corpus[/]
    """
    from vsearch.corpus import Corpus
    from vsearch.snapshots import Snapshots

    now = Snapshots(Corpus(corpus)).roll_back(version)
    console.print(f"Snapshot {now} is in use.", highlight=False)


@app.command()
def gc(
    corpus: CorpusOption = DEFAULT_CORPUS,
    keep: Annotated[
        int, typer.Option("--keep", min=1, help="How many snapshots to keep, the current one last.")
    ] = KEPT_SNAPSHOTS,
    grace_hours: Annotated[
        float, typer.Option("--grace-hours", min=0, help="What is younger stays.")
    ] = GRACE_HOURS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Take away index files that no kept snapshot needs. Frames and videos are never touched.

    Example: [bold]vsearch gc --corpus ./corpus --keep 2 --dry-run[/]
    """
    from vsearch.corpus import Corpus
    from vsearch.snapshots import Snapshots

    gone = Snapshots(Corpus(corpus)).collect(keep, grace_hours * 3600, dry_run)
    for name in gone[:LISTED_FILES]:
        console.print(f"  {escape(name)}", highlight=False)
    more = " (--json lists all)" if len(gone) > LISTED_FILES else ""
    console.print(f"{len(gone)} files {'would go' if dry_run else 'are gone'}{more}.")
    if as_json:
        emit({"removed": [] if dry_run else gone, "would_remove": gone if dry_run else []})


@app.command()
def verify(corpus: CorpusOption = DEFAULT_CORPUS, as_json: JsonOption = False) -> None:
    """Check every file of a corpus, and that they fit together; exit code 1 if something is damaged.

    Example: [bold]vsearch verify --corpus ./corpus[/]
    """
    from vsearch.verify import verify as run

    with console.status("checking") as line:
        found = run(corpus, lambda name: line.update(f"checking {escape(name)}"))
    counts = ", ".join(f"{number} {kind}" for kind, number in found.checked.items())
    console.print(f"Checked: {counts}.", highlight=False)
    for name, reason in found.damaged:
        console.print(f"[red]damaged[/] {escape(name)}: {escape(reason)}", highlight=False)
    for name in found.orphans:
        console.print(f"[dim]not needed[/] {escape(name)}", highlight=False)
    if not found.damaged:
        console.print("[green]Nothing is damaged.[/]")
    if as_json:
        emit(asdict(found))
    if found.damaged:
        raise typer.Exit(1)


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
    space: SpaceOption = None,
    alpha: AlphaOption = None,
    workers: WorkersOption = None,
    gpus: GpusOption = None,
    decoders: DecodersOption = None,
    batch: BatchOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ingest, train and index in one go; what is up to date is left alone.

    Example: [bold]vsearch build ~/Videos --corpus ./corpus[/]
    """
    ingest(
        sources, corpus, models, dino, clip, fps, max_change, pairs, sync, time_pattern,
        gpus=gpus, decoders=decoders, batch=batch, as_json=as_json,
    )  # fmt: skip
    train(corpus, workers, gpus)
    index(corpus, kind, space, gpus=gpus, alpha=alpha)


@app.command(context_settings={"allow_interspersed_args": False})  # the job's options are its own
def submit(
    job: Annotated[str, typer.Argument(help="ingest, train, index, or pipeline: all three.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="ARGS", help="Those of the command; of 'build' for pipeline."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="Of the cluster's dashboard; RAY_API_SERVER_ADDRESS or RAY_ADDRESS without it, else "
            "http://127.0.0.1:8265.",
        ),
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Only start the job, and print its id.")
    ] = False,
) -> None:
    """Run a command as a job on a Ray cluster, and follow it to its end.

    The job's log comes on stdout, all else on stderr. A lost connection is not a lost job: following goes
    on when the cluster answers again. The same command with the same arguments follows the job that is
    still running; one that has ended is run again, as the next attempt: ID-1, ID-2, … Ctrl-C ends the
    following, not the job.

    Only this package's code is sent: the cluster's machines have its dependencies, and the models of the
    demo if those are asked for. AWS_ENDPOINT_URL, AWS_ENDPOINT_URL_S3, AWS_REGION and AWS_DEFAULT_REGION
    go along; secrets do not, since all who see the dashboard see them: the machines have their own.
    RAY_AUTH_MODE=token and RAY_AUTH_TOKEN let you in where Ray's authentication is on.

    Exit codes: 0 the job succeeded; 2 a mistake in what was asked for; 3 the index does not reach its
    recall, or a fine-tuned projector forgot too much; 1 or another one, the job's own, for what else it
    failed at; 4 somebody stopped it; 5 its end is not known, as the cluster did not answer for half an
    hour or lost the job; 130 Ctrl-C.

    Examples:

    [bold]vsearch submit ingest s3://bucket/videos --corpus s3://bucket/corpus --fps 4[/]

    [bold]vsearch submit --address http://10.0.0.7:8265 index --corpus s3://bucket/corpus[/]

    [bold]vsearch submit --no-wait pipeline s3://bucket/videos --corpus s3://bucket/corpus[/]
    """
    command, words = JOBS.get(job), arguments or []
    if command is None:
        raise UserError(f"There is no job {job!r}; choose one of {', '.join(JOBS)}.")
    given = _parsed(job, command, words)

    from vsearch import submit as jobs

    shared = jobs.check(given)
    environment = jobs.environment()
    cluster = jobs.connect(address)
    if shared:
        console.print(
            f"[yellow]All machines of the cluster must have the same storage at[/] "
            f"{escape(', '.join(shared))}.",
            highlight=False,
        )
    entrypoint = shlex.join(["python", "-P", "-m", "vsearch.cli", command, *words])
    job_id, new = jobs.start(cluster, jobs.job_name(job, given), entrypoint, environment)
    forwarded = " ".join(f"{name}={value}" for name, value in environment["env_vars"].items())
    console.print(
        f"The job is [bold]{escape(job_id)}[/]"
        + (f", with {escape(forwarded)}." if new and forwarded else ".")
        + ("" if new else " It was running already."),
        highlight=False,
    )
    if no_wait:
        print(job_id)
        return
    raise typer.Exit(_followed(cluster, job_id))


def _parsed(job: str, command: str, words: list[str]) -> dict[str, Any]:
    """The values of a command's arguments, from its words, as the command itself would get them."""
    known: Any = typer.main.get_command(app)
    try:
        with known.commands[command].make_context(f"vsearch submit {job}", list(words)) as context:
            return dict(context.params)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of click
            said = error.format_message().rstrip(".")
            raise UserError(f"{said}: see 'vsearch {command} --help'.") from error
        raise


def _followed(cluster: "Cluster", job_id: str) -> int:
    """Follows a job to its end, and says how that was; gives the exit code."""
    from vsearch.submit import exit_code, follow

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    stop = f"ray job stop --address {cluster.get_address()} {job_id}"
    try:
        ended = follow(
            cluster, job_id, show, lambda text: console.print(escape(text), highlight=False)
        )
    except KeyboardInterrupt:
        console.print(
            f"\nThe job goes on. The same command follows it again; [bold]{escape(stop)}[/] ends it.",
            highlight=False,
            soft_wrap=True,
        )
        return 130
    code = exit_code(ended)
    words = {"SUCCEEDED": "succeeded", "STOPPED": "was stopped"}
    said = words.get(ended["status"], f"failed with exit code {ended['driver_exit_code']}")
    if ended["status"] == "FAILED" and ended["driver_exit_code"] is None:
        said = f"failed: {ended['message']}"
    console.print(escape(f"The job {job_id} {said.strip().rstrip('.')}."), highlight=False)
    return code


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="What the moment should show.")],
    corpus: CorpusOption = DEFAULT_CORPUS,
    limit: LimitOption = 10,
    max_gap: GapOption = 1.0,
    video: Annotated[
        list[str] | None, typer.Option("--video", help="Only in this video: URI or id; repeatable.")
    ] = None,
    path: Annotated[
        list[str] | None, typer.Option("--path", help="Only URIs like this glob; repeatable.")
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", help="Only videos with NAME=VALUE; repeatable.")
    ] = None,
    from_s: Annotated[
        float | None, typer.Option("--from", help="Not before this second of a video.")
    ] = None,
    to_s: Annotated[
        float | None, typer.Option("--to", help="Not after this second of a video.")
    ] = None,
    after: Annotated[
        datetime | None, typer.Option("--after", help="Recorded after this time (UTC).")
    ] = None,
    before: Annotated[
        datetime | None, typer.Option("--before", help="Recorded before this time (UTC).")
    ] = None,
    min_confidence: Annotated[
        float,
        typer.Option(
            "--min-confidence", min=0, max=1, help="Hide matches that are less sure; 0 shows all."
        ),
    ] = MIN_CONFIDENCE,
    clips: Annotated[
        Path | None,
        typer.Option("--clips", help="Cut the segments out into this folder, as MP4 files."),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="table, or on stdout: json, csv, edl (CMX 3600), otio.")
    ] = "table",
    as_json: Annotated[bool, typer.Option("--json", help="Short for --format json.")] = False,
) -> None:
    """Find the moments that answer a sentence.

    What follows "without", "but no" or "and not" counts against a moment; a query that is in quotes
    itself is taken word by word. Weak matches are hidden and counted.

    Clips are copied with their sound, so each begins at a keyframe; what an MP4 file cannot hold is
    encoded anew.

    Examples:

    [bold]vsearch search "a red car on the beach" --limit 5[/]

    [bold]vsearch search "a red car on the beach" --clips ./cars[/]

    [bold]vsearch search "a red car on the beach" --format otio > cars.otio[/]

    [bold]vsearch search "someone at the door" --path '*/yard/*' --after 2026-05-01 --tag site=north[/]
    """
    import vsearch
    from vsearch.filters import Filter

    form = "json" if as_json else form
    if form not in FORMATS:
        raise UserError(f"There is no format {form!r}: choose {', '.join(FORMATS)}.")
    pairs = [text.partition("=") for text in tag or []]
    if any(not equals for _, equals, _ in pairs):
        raise UserError(f"--tag takes NAME=VALUE, not {' '.join(tag or [])!r}.")
    where = Filter(
        tuple(video or ()), tuple(path or ()), {name: value for name, _, value in pairs},
        from_s, to_s, after, before,
    )  # fmt: skip
    engine = vsearch.open(corpus)
    results = engine.search(
        query,
        limit,
        max_gap,
        where if where != Filter() else None,
        min_confidence=min_confidence,
    )
    if form == "json":
        emit(results.to_dict())
    elif form == "table":
        Console().print(results_table(results))
    else:
        sys.stdout.write(_exported(results, form, engine))
    if results.hidden:
        console.print(f"{results.hidden_note} Show all: --min-confidence 0.", highlight=False)
    elif not results and where != Filter():
        console.print("No moment of the index satisfies the filters.")
    if clips is not None:
        _cut_out(results, engine, clips)


def _exported(results: "Results", form: str, engine: "Engine") -> str:
    from vsearch.exports import to_csv, to_edl, to_otio

    if form == "csv":
        return to_csv(results)
    return {"edl": to_edl, "otio": to_otio}[form](results, engine.corpus.videos())


def _cut_out(results: "Results", engine: "Engine", folder: Path) -> None:
    """Writes each segment to a file, and a line about it; exit code 1 if one could not be."""
    from vsearch.video import VideoError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be a folder for clips: {error.strerror}.") from error
    failed = 0
    for place, segment in enumerate(results, 1):
        target = folder / clip_name(place, segment.video, segment.start_s)
        try:
            done = engine.cut(segment, target)
        except (VideoError, OSError) as error:
            failed += 1
            line = f"[red]not cut out[/] {escape(segment.video)}: {escape(str(error))}"
        else:
            line = f"{escape(str(target))}  {clip_line(done)}"
        console.print(line, highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@app.command()
def evaluate(
    queries: Annotated[
        str | None,
        typer.Option(
            "--queries", help='JSONL: {"query", "moments": [{"video", "start_s", "end_s"}]}.'
        ),
    ] = None,
    corpus: CorpusOption = DEFAULT_CORPUS,
    snapshot: Annotated[
        str | None,
        typer.Option("--snapshot", help="A version of the index; the current one without."),
    ] = None,
    spaces: Annotated[
        str | None,
        typer.Option(
            "--spaces",
            help="Instead of an index, all frames in these spaces side by side: projected, clip, fused, "
            "random, with commas between them.",
        ),
    ] = None,
    alpha: AlphaOption = None,
    page: Annotated[
        Path | None,
        typer.Option(
            "--html", help="Write a page with the figures and the worst queries to a file."
        ),
    ] = None,
    predictions: Annotated[
        str | None,
        typer.Option(
            "--predictions",
            help="Another system's answers, JSONL with qid and pred_relevant_windows, each of start, "
            "end and score.",
        ),
    ] = None,
    truth: Annotated[
        str | None,
        typer.Option(
            "--truth",
            help="Their truth, JSONL with qid and relevant_windows, each of start and end.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure retrieval on sentences whose true moments are known, with 95 % intervals.

    With --queries a corpus is asked: the index in use, or with --spaces all its frames in each of several
    spaces, indexed or not; random is a projector that has learnt nothing, the floor. With --predictions
    and --truth the answers of any system are judged by the rules of QVHighlights, in its formats; no
    corpus is needed.

    Examples:

    [bold]vsearch evaluate --queries truth.jsonl --corpus ./corpus --html report.html[/]

    [bold]vsearch evaluate --queries truth.jsonl --corpus ./corpus --spaces projected,clip,fused,random[/]

    [bold]vsearch evaluate --predictions submission.jsonl --truth highlight_val_release.jsonl --json[/]
    """
    if predictions is not None and truth is not None and queries is None:
        from vsearch.qvhighlights import judge, read_cases

        report = judge(read_cases(predictions, truth))
        if as_json:
            emit(report)
        else:
            Console().print(judged_table(report))
        return
    if queries is None or predictions is not None or truth is not None:
        raise UserError("Give either --queries, or both of --predictions and --truth.")
    if spaces is not None and snapshot is not None:
        raise UserError("--spaces looks at all frames, --snapshot at an index: give one of them.")
    if alpha is not None and spaces is None:
        raise UserError("--alpha is for --spaces with fused.")
    if page is not None and not page.parent.is_dir():  # said before the work, not after it
        raise UserError(f"{page} cannot be written: there is no folder {page.parent}.")

    import vsearch
    from vsearch import evaluate as judging

    asked = judging.read_queries(queries)
    if spaces is None:
        engine = vsearch.open(corpus, snapshot)
        judged = [judging.Judged.of(engine.search, asked, **_space_of(engine))]
    else:
        names = [name.strip() for name in spaces.split(",")]
        judged, engine = _side_by_side(corpus, names, alpha, asked)
    if page is not None:
        _write_page(page, corpus, asked, judged, engine)
    if as_json:
        figures = [one.figures for one in judged]
        emit(figures[0] if spaces is None else {"spaces": {f["space"]: f for f in figures}})
    else:
        Console().print(figures_table([one.figures for one in judged]))


def _side_by_side(
    corpus: str, names: Sequence[str], alpha: float | None, queries: "list[Query]"
) -> "tuple[list[Judged], Engine]":
    """What each space answers, and the engine of the last."""
    from vsearch.evaluate import Judged
    from vsearch.spaces import Comparison, check_spaces

    check_spaces(names, alpha)
    compared = Comparison(corpus, alpha)
    for space in names:
        compared.recipe(space)  # says at once if one of them cannot be had, not after the others
    judged = []
    for space in names:
        with console.status(f"asking the {space} space"), compared.engine(space) as engine:
            judged.append(Judged.of(engine.search, queries, **_space_of(engine)))
    return judged, engine


def _space_of(engine: "Engine") -> dict[str, Any]:
    return {name: engine.manifest.get(name) for name in ("space", "alpha")}


def _write_page(
    path: Path, corpus: str, queries: "list[Query]", judged: "list[Judged]", engine: "Engine"
) -> None:
    from vsearch.decoder import Decoders
    from vsearch.report import Report

    decoders = Decoders(1)
    try:
        with console.status("drawing the page"):
            page = Report(queries, judged, engine.videos, decoders.picture).html(corpus)
            path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        decoders.close()
    console.print(f"The page is in [bold]{escape(str(path))}[/].", highlight=False)


@app.command()
def status(
    corpus: CorpusOption = DEFAULT_CORPUS,
    failed: Annotated[
        bool, typer.Option("--failed", help="Only what is not indexed in full, all of it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what of the corpus is embedded and indexed, what is not, and why; and how the projector fares
    on what was ingested since its training.

    Example: [bold]vsearch status --corpus ./corpus --failed[/]
    """
    from vsearch.corpus import Corpus
    from vsearch.coverage import json_parts
    from vsearch.drift import told as projector_told
    from vsearch.snapshots import Snapshots

    stored = Corpus(corpus)
    indexed, projector = Snapshots(stored).indexed(), projector_told(stored)
    if as_json:
        emit_parts(json_parts(stored.each_state(), indexed, projector))
        return
    told = stored.overview(indexed, failed, None if failed else STATUS_ROWS)
    out = Console()
    out.print(coverage_line(told), highlight=False)
    newest = projector["version"] if projector else None
    out.print(index_line(told, newest), highlight=False)
    if projector:
        out.print(drift_line(projector), highlight=False)
    print_videos(out, told)


@app.command()
def serve(
    corpus: CorpusOption = DEFAULT_CORPUS,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    keys: Annotated[
        str | None, typer.Option("--keys", help="File of API keys, as 'vsearch key' makes it.")
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let everybody in who can reach the address.")
    ] = False,
    parts: Annotated[
        int | None,
        typer.Option("--parts", min=1, help="Processes for the index; by its size without it."),
    ] = None,
) -> None:
    """Serve the page and the HTTP API until Ctrl-C; new snapshots are taken up as they come.

    Elsewhere than on this machine's own address it needs --keys, or an explicit --no-auth.

    Examples:

    [bold]vsearch serve --corpus ./corpus --port 8000[/]

    [bold]vsearch key anna --keys keys.json && vsearch serve --host 0.0.0.0 --keys keys.json[/]
    """
    from vsearch.serve import ServeArgs, start, stop

    if keys and no_auth:
        raise UserError("--keys and --no-auth contradict each other: give one of them.")
    if host not in OWN_ADDRESSES and not keys and not no_auth:
        raise UserError(
            f"Listening on {host} lets others in: give --keys FILE ('vsearch key' makes one), or "
            f"--no-auth to let everybody in."
        )
    with console.status("starting the service"):
        address = start(
            ServeArgs(corpus=corpus, parts=parts, keys=keys, no_auth=no_auth), host, port
        )
    console.print(f"The page is at [bold]{address}[/] (Ctrl-C ends it).")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.print("Stopped.")
    finally:
        stop()


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    keys: Annotated[
        Path, typer.Option("--keys", help="The file of names and SHA-256 of keys; made if missing.")
    ],
    replace: Annotated[
        bool, typer.Option("--replace", help="Make a new key for a name that has one.")
    ] = False,
    remove: Annotated[
        bool, typer.Option("--remove", help="Take the key away instead of making one.")
    ] = False,
) -> None:
    """Make a key for the query service, and print it: only its SHA-256 is kept.

    Examples:

    [bold]vsearch key newsroom --keys keys.json[/]

    [bold]vsearch key newsroom --keys keys.json --remove[/]
    """
    from vsearch.keys import add_key, remove_key

    if replace and remove:
        raise UserError("Choose one of --replace and --remove.")
    if remove:
        remove_key(keys, name)
        console.print(f"The key {name} is no longer in {escape(str(keys))}.", highlight=False)
        return
    made = add_key(keys, name, replace)
    console.print(f"The key {name}, which cannot be shown again:", highlight=False)
    print(made)


@app.command()
def demo(
    corpus: CorpusOption = "demo-archive",
    seed: Annotated[int, typer.Option("--seed", help="Which world.")] = 7,
    videos: Annotated[int, typer.Option("--videos", min=2, help="Videos of six scenes each.")] = 20,
    difficulty: Annotated[str, typer.Option("--difficulty", help="easy or hard.")] = "easy",
    with_page: Annotated[
        bool, typer.Option("--serve/--no-serve", help="Serve the page at the end.")
    ] = True,
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    as_json: JsonOption = False,
) -> None:
    """See all of it at work, offline: make a small archive, build it, ask it, judge it, serve it.

    Examples:

    [bold]vsearch demo --no-serve --json[/]

    [bold]vsearch demo --difficulty hard --corpus ./hard-archive --no-serve[/]
    """
    import vsearch
    from vsearch.build_index import build_index
    from vsearch.demo.world import world_beside
    from vsearch.evaluate import read_queries
    from vsearch.spaces import SPACES

    with progress_bar() as bar:
        task = bar.add_task(
            "drawing the videos of a tiny world", total=videos, visible=False, note=""
        )
        world = world_beside(
            corpus,
            seed,
            videos,
            difficulty,
            lambda n, _: bar.update(task, completed=n, visible=True),
        )
    ingest([str(world)], corpus, models="demo")
    train(corpus)
    with console.status("indexing"):
        build_index(corpus)
    queries = read_queries(str(world / "truth.jsonl"))
    judged, _ = _side_by_side(corpus, SPACES, None, queries)
    engine = vsearch.open(corpus)
    out = console if as_json else Console()
    shown = [q for q in queries if q.group in ("seen", "unseen")][:: max(1, len(queries) // 6)]
    for query in shown:
        out.print(results_table(engine.search(query.text, limit=3), world))
    figures = [space.figures for space in judged]
    out.print(figures_table(figures))
    if as_json:
        projected, plain, *rest = figures
        emit(
            {
                "evaluation": {
                    **projected,
                    "plain_clip": plain,
                    **{found["space"]: found for found in rest},
                }
            }
        )
    if with_page:
        serve(corpus, port=port)
    else:
        console.print(f"The page: [bold]vsearch serve --corpus {corpus}[/]")


if __name__ == "__main__":
    main()
