"""Frames to a snapshot of the index, as Ray tasks: project → moments → quantise → measure → publish.

What is built is the difference between the snapshot in use and what the corpus holds now. Each part
(the rows of a shard, its codes, what they recall) is stored when it is finished and found again by a
build that follows, so a killed build goes on where it was, and an update costs what is new.
"""

import math
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import distributions
from typing import Any

import numpy as np
import ray

import vsearch
from vsearch import parts, recall, runtime
from vsearch.config import MIN_RECALL, UserError, check_index_options
from vsearch.corpus import Corpus
from vsearch.coverage import VideoState
from vsearch.moments import ALIKE, CUT, Gaps
from vsearch.placement import index_words, plan_index, prefer
from vsearch.sizing import FLAT_ROWS, ROWS_PER_CELL, Setting, cells_for
from vsearch.snapshots import (
    FORMAT_VERSION,
    Content,
    Snapshots,
    Spans,
    StoredShard,
    UnreadableSnapshotError,
    content_of,
    deal,
    gaps_of,
    key_of,
    spans_by_video,
    videos_table,
)

SHARD_FRAMES = 5_000_000
FRAME_QUERIES = 100
FEWEST_CODED = 256
"""Fewer rows cannot train a quantizer: they are flat whatever is asked for."""

RETRIES = 10
"""So many nodes may go away under a task. What it had finished is not done again."""

GROWTH = 4
"""A quantizer that was trained on so much fewer rows than there are now has too few cells."""


@dataclass(frozen=True)
class IndexSummary:
    """The snapshot in use afterwards; `new` tells whether it was built now, `shards_new` how many of
    its shards were; `alpha` is the projected share where the space is fused. `warnings` say when the
    quantizer no longer fits, and what to do.
    """

    snapshot: str
    new: bool
    kind: str
    space: str
    rows: int
    frames: int
    shards: int
    shards_new: int = 0
    alpha: float | None = None
    warnings: list[str] = field(default_factory=list)


Report = Callable[[str, int, int], None]


def build_index(
    corpus_url: str,
    kind: str = "auto",
    space: str | None = None,
    rows: str | None = None,
    queries: str | None = None,
    min_recall: float = MIN_RECALL,
    retrain: bool = False,
    rebuild: bool = False,
    shard_frames: int = SHARD_FRAMES,
    gpus: int | None = None,
    report: Report = lambda stage, done, total: None,
    announce: Callable[[str], None] = lambda line: None,
    alpha: float | None = None,
) -> IndexSummary:
    """Publishes a snapshot of all embedded frames, unless the current one is that already.

    `space` is 'projected' (DINO through the newest projector), 'clip' (CLIP's image vectors) or 'fused':
    `alpha` parts of the projected vector and 1 − `alpha` of CLIP's. Without it `alpha` is that of the
    snapshot in use, or tuned where that has none of the same projector. `rows` is 'moments' or
    'frames'. Both are by default those of the snapshot in use; where there is none, 'moments', and
    'fused' if CLIP saw every frame, else 'projected'. `queries` is a file with a sentence a line, on
    which recall is measured instead of general ones. Raises `recall.RecallError` when an index with
    codes cannot reach `min_recall`. `retrain` trains the quantizer and tunes `alpha` anew; `rebuild`
    makes everything anew, also what is finished, as is
    needed when a part is damaged. `gpus` are those that may be used (0: none), by default those of the
    nodes for the index. `announce` gets a line about what the build runs on, when it begins.
    """
    check_index_options(kind, space, rows, min_recall, alpha)
    sentences = parts.read_sentences(queries)
    corpus = Corpus(corpus_url)
    snapshots = Snapshots(corpus)
    current, parent = snapshots.current, None
    with suppress(UnreadableSnapshotError):  # then this build takes its place
        parent = snapshots.current_manifest()
    space = space or (parent["space"] if parent else _best_space(corpus))
    rows = rows or ("frames" if parent and parent["alike"] is None else "moments")
    check_index_options(kind, space, rows, min_recall, alpha)
    projector = parts.projector_for(corpus, space)
    spans = spans_by_video(corpus)
    states = [state for state in corpus.states() if state.video_id in spans]
    if not states:
        raise UserError(f"The corpus at {corpus_url} holds no frames yet: ingest videos first.")
    contents = [content_of(state.video_id, spans) for state in states]
    gaps: dict[str, Gaps] = {state.video_id: gaps_of(state) for state in states}
    tasks = fusion = None
    if projector is not None and space == "fused":
        fusion = {"alpha": alpha} if alpha is not None else _known_alpha(parent, projector, retrain)
        if fusion is None:
            tasks = _Tasks(gpus, announce)
            pieces = parts.validation_pieces(corpus, projector, contents, spans)
            fusion = _tune_alpha(tasks, corpus, projector, pieces, sentences)
    recipe = parts.Recipe(
        projector, ALIKE if rows == "moments" else None, CUT, fusion["alpha"] if fusion else None
    )
    asked = [kind, asdict(recipe), space, shard_frames, sentences, min_recall]
    built_from = key_of(asked, [asdict(c) for c in contents], [_facts(state) for state in states])
    if parent and parent["built_from"] == built_from and not (retrain or rebuild):
        return _summary(parent, 0, published=False)

    tasks = tasks or _Tasks(gpus, announce)
    base = parent if parent and _continues(parent, recipe, shard_frames) and not rebuild else None
    salt = uuid.uuid4().hex if rebuild else ""  # other keys than those of the parts that there are
    kept, groups = deal(contents, _stored(snapshots, base) if base else [], shard_frames)
    with runtime.user_errors():
        shards = [base["shards"][shard.number] for shard in kept] if base else []
        shards += _make_rows(tasks, corpus, groups, spans, gaps, recipe, salt, report)
        total = sum(shard["rows"] for shard in shards)
        coded = total > {"flat": math.inf, "auto": FLAT_ROWS, "ivfpq": FEWEST_CODED}[kind]
        former = quantizer = asked_queries = tuning = None
        if coded:
            former = base if base and base["quantizer"] and not retrain else None
            quantizer = (
                former["quantizer"] if former else _make_quantizer(tasks, corpus, shards, total)
            )
            asked_queries = _make_queries(tasks, corpus, shards, sentences, former)
            # What an update adds stays flat while it is small: exact, and made anew with the next.
            least = 0 if kind == "ivfpq" or not former else FLAT_ROWS
            shards = _make_codes(tasks, corpus, shards, quantizer, asked_queries, least, report)
            tuning = _tune(tasks, corpus, shards, asked_queries, min_recall)
            if not former:
                quantizer |= {"imbalance": tuning["imbalance"]}
        else:
            shards = [shard | parts.FLAT for shard in shards]
        made_up, shards = _make_best_scores(tasks, corpus, shards, report)
    places = {c: n for n, shard in enumerate(kept) for c in shard.contents & set(contents)}
    places |= {c: n for n, group in enumerate(groups, len(kept)) for c in group}
    manifest = {
        "format_version": FORMAT_VERSION,
        "faiss_version": _faiss_version(),
        "vsearch_version": vsearch.__version__,
        "parent": current,
        "created_at": datetime.now(UTC).isoformat(),
        "kind": "ivfpq" if any(shard["codes_file"] for shard in shards) else "flat",
        "space": space,
        "encoders": {"dino": asdict(corpus.config.dino), "clip": asdict(corpus.config.clip)},
        **asdict(recipe),
        "fusion": fusion,
        "shard_frames": shard_frames,
        "dim": corpus.config.clip.dim,
        "rows": total,
        "frames": sum(content.frames for content in contents),
        "dead_frames": sum(s["frames"] for s in shards) - sum(c.frames for c in contents),
        "mean": np.average(
            [s["mean"] for s in shards], axis=0, weights=[s["frames"] for s in shards]
        ).tolist(),
        "quantizer": quantizer,
        "queries": asked_queries,
        "tuning": tuning,
        "made_up": made_up,
        "calibration": parts.calibration(made_up, [shard["best"] for shard in shards]),
        "shards": shards,
        "built_from": built_from,
    }
    manifest["warnings"] = _warnings(manifest, former, len(groups)) if coded else []
    version = snapshots.publish(manifest, videos_table(states, contents, places))
    return _summary(manifest | {"version": version}, len(groups), published=True)


# ── what to build ────────────────────────────────────────────────────────────────────────────────


def _best_space(corpus: Corpus) -> str:
    """The best of those that a corpus can have, by `benchmarks/quality.py`."""
    return "fused" if corpus.config.pairs == 1 else "projected"


def _known_alpha(
    parent: dict[str, Any] | None, projector: str, retrain: bool
) -> dict[str, Any] | None:
    """What the snapshot in use says of its α, if that holds for the next one."""
    if parent is None or parent["projector"] != projector or retrain:
        return None
    found: dict[str, Any] | None = parent.get("fusion")
    return found


def _tune_alpha(
    tasks: "_Tasks",
    corpus: Corpus,
    projector: str,
    pieces: list[parts.Piece],
    sentences: list[str],
) -> dict[str, Any]:
    tune = tasks.of(parts.tune_alpha, on_gpu=True)
    with runtime.user_errors():
        found: dict[str, Any] = ray.get(tune(corpus.url, projector, pieces, sentences))
    return found


def _facts(state: VideoState) -> list[Any]:
    """What a snapshot tells of a video beside its rows."""
    recorded = [state.recorded_at.isoformat(), state.recorded_at_source]
    return [state.uri, state.copies, sorted(state.tags.items()), state.zero_s, *recorded]


def _continues(parent: dict[str, Any], recipe: parts.Recipe, shard_frames: int) -> bool:
    """Whether shards of a snapshot can be part of the next."""
    asked = asdict(recipe) | {"shard_frames": shard_frames}
    return all(parent.get(name) == value for name, value in asked.items())


def _stored(snapshots: Snapshots, base: dict[str, Any]) -> list[StoredShard]:
    """The shards of a snapshot, with the videos that counted in them."""
    contents: dict[int, set[Content]] = {}
    table = snapshots.videos(base).select(["video_id", "generation", "frames", "shard"])
    for row in table.to_pylist():
        shard = row.pop("shard")
        contents.setdefault(shard, set()).add(Content(**row))
    return [
        StoredShard(n, shard["frames"], not shard["codes_file"], frozenset(contents.get(n, ())))
        for n, shard in enumerate(base["shards"])
    ]


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────


class _Tasks:
    """Makes functions into Ray tasks that run where the index belongs."""

    def __init__(self, gpus: int | None, announce: Callable[[str], None]) -> None:
        runtime.connect()
        nodes = runtime.nodes()
        self.plan = plan_index(nodes, gpus)
        self._where = prefer("index", nodes)
        announce(index_words(nodes, self.plan))

    def of(
        self,
        function: Callable[..., Any],
        on_gpu: bool = False,
        cpus: int = 1,
        memory: int | None = None,
    ) -> Callable[..., Any]:
        """The function as a task. It gets a GPU if that is of use and there are some, and so many cores
        and bytes.
        """
        submit: Callable[..., Any] = ray.remote(
            num_cpus=cpus,
            num_gpus=1 if on_gpu and self.plan.gpus else 0,
            memory=memory or self.plan.memory,
            max_retries=RETRIES,
            **self._where,
        )(function).remote
        return submit


def _make_rows(
    tasks: _Tasks,
    corpus: Corpus,
    groups: list[list[Content]],
    spans: Spans,
    gaps: dict[str, Gaps],
    recipe: parts.Recipe,
    salt: str,
    report: Report,
) -> list[dict[str, Any]]:
    """Makes the rows of new shards, in parallel; gives their entries."""
    shard_rows = tasks.of(parts.shard_rows, on_gpu=recipe.projector is not None)
    jobs = [
        shard_rows(
            corpus.url,
            key_of("rows", salt, asdict(recipe), [[c.video_id, c.generation] for c in group]),
            parts.pieces_of(group, spans),
            {content.video_id: gaps[content.video_id] for content in group},
            recipe,
        )
        for group in groups
    ]
    return _finished(jobs, "rows", report)


def _finished(jobs: list[Any], stage: str, report: Report) -> list[Any]:
    """The results of tasks, reported as they come."""
    report(stage, 0, len(jobs))
    waiting = list(jobs)
    while waiting:
        _, waiting = ray.wait(waiting)
        report(stage, len(jobs) - len(waiting), len(jobs))
    return list(ray.get(jobs))


# ── quantizer, queries, codes ────────────────────────────────────────────────────────────────────


def _sample(tasks: _Tasks, corpus: Corpus, shards: list[dict[str, Any]], wanted: int) -> list[Any]:
    """References to what `parts.shard_sample` gives, about `wanted` vectors of all shards, evenly drawn."""
    total = sum(shard["rows"] for shard in shards)
    counts = [math.ceil(wanted * shard["rows"] / total) for shard in shards]
    shard_sample = tasks.of(parts.shard_sample)
    return [
        shard_sample(corpus.url, shard, count) for shard, count in zip(shards, counts, strict=True)
    ]


def _make_quantizer(
    tasks: _Tasks, corpus: Corpus, shards: list[dict[str, Any]], total: int
) -> dict[str, Any]:
    nlist = cells_for(total)
    key = key_of("quantizer", nlist, [shard["key"] for shard in shards])
    sample = _sample(tasks, corpus, shards, ROWS_PER_CELL * nlist)
    # The sample as it comes, and in one piece.
    memory = tasks.plan.memory + 2 * ROWS_PER_CELL * nlist * corpus.config.clip.dim * 4
    train = tasks.of(
        parts.train,
        on_gpu=True,
        cpus=tasks.plan.cpus,
        memory=min(memory, tasks.plan.most_memory),
    )
    made: dict[str, Any] = ray.get(train(corpus.url, key, nlist, total, *sample))
    return made


def _make_queries(
    tasks: _Tasks,
    corpus: Corpus,
    shards: list[dict[str, Any]],
    sentences: list[str],
    former: dict[str, Any] | None,
) -> dict[str, Any]:
    """The queries on which recall is measured: the sentences, and frames of the index; those of the
    former snapshot as long as the sentences are the same, so that its shards need not be asked again.
    """
    asked = key_of(sentences, asdict(corpus.config.clip))
    if former and former["queries"]["asked"] == asked:
        return dict(former["queries"])
    key = key_of("queries", asked, [shard["key"] for shard in shards])
    made: dict[str, Any] = ray.get(
        tasks.of(parts.encode_queries)(
            corpus.url, key, asked, sentences, *_sample(tasks, corpus, shards, FRAME_QUERIES)
        )
    )
    return made


def _make_codes(
    tasks: _Tasks,
    corpus: Corpus,
    shards: list[dict[str, Any]],
    quantizer: dict[str, Any],
    queries: dict[str, Any],
    least: int,
    report: Report,
) -> list[dict[str, Any]]:
    """Codes the shards of more than `least` rows that are not yet, and asks each the queries; gives the
    entries of all.
    """
    made_with = [quantizer["key"], queries["key"]]
    todo = [n for n, shard in enumerate(shards) if shard.get("made_with") != made_with]
    shard_codes = tasks.of(parts.shard_codes, on_gpu=True)
    jobs = [
        shard_codes(corpus.url, shards[n], quantizer, queries, shards[n]["rows"] > least)
        for n in todo
    ]
    made = dict(zip(todo, _finished(jobs, "codes", report), strict=True))
    return [made.get(n, shard) | {"made_with": made_with} for n, shard in enumerate(shards)]


# ── how sure answers are ─────────────────────────────────────────────────────────────────────────


def _make_best_scores(
    tasks: _Tasks, corpus: Corpus, shards: list[dict[str, Any]], report: Report
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The made-up sentences, and the entries of the shards with what these score there. They are made of
    the general sentences, whatever recall is measured on: one's own may all be answered.
    """
    sentences = parts.read_sentences()
    key = key_of("made up", sentences, asdict(corpus.config.clip))
    made_up = Snapshots(corpus).part(key) or ray.get(
        tasks.of(parts.made_up_sentences)(corpus.url, key, sentences)
    )
    todo = [n for n, shard in enumerate(shards) if shard.get("best_of") != key]
    best_scores = tasks.of(parts.best_scores)
    jobs = [best_scores(corpus.url, shards[n], made_up) for n in todo]
    made = dict(zip(todo, _finished(jobs, "confidence", report), strict=True))
    return made_up, [
        shard | {"best_of": key, "best": made[n]} if n in made else shard
        for n, shard in enumerate(shards)
    ]


# ── what a snapshot tells ────────────────────────────────────────────────────────────────────────


def _tune(
    tasks: _Tasks,
    corpus: Corpus,
    shards: list[dict[str, Any]],
    queries: dict[str, Any],
    min_recall: float,
) -> dict[str, Any]:
    """The cheapest setting that reaches `min_recall`, and the curve that it was chosen from."""
    points, imbalance = ray.get(tasks.of(parts.measure)(corpus.url, shards, queries["text"]))
    return {
        "min_recall": min_recall,
        "text_queries": queries["text"],
        "frame_queries": queries["frames"],
        "setting": asdict(recall.cheapest(points, min_recall)),
        "curve": recall.as_json(points),
        "imbalance": imbalance,
    }


def _faiss_version() -> str | None:
    """Of the FAISS that is installed: it is loaded by the tasks alone."""
    names = ("faiss-gpu", "faiss-cpu", "faiss")
    return next((found.version for name in names for found in distributions(name=name)), None)


def _warnings(manifest: dict[str, Any], former: dict[str, Any] | None, new: int) -> list[str]:
    """Where the quantizer of the former snapshots no longer fits what was added."""
    if former is None:
        return []
    quantizer, tuning, found = manifest["quantizer"], manifest["tuning"], []
    lowest = min((shard["mean_cosine"] for shard in manifest["shards"][-new:] if new), default=1.0)
    if lowest < quantizer["mean_cosine"] - 0.05:
        found.append(
            f"What was added is unlike what the quantizer was trained on (mean cosine to its "
            f"centroids {lowest:.2f}, {quantizer['mean_cosine']:.2f} before)."
        )
    if tuning["imbalance"] > max(3.0, 1.5 * quantizer["imbalance"]):
        found.append(
            f"The cells are filled unevenly (imbalance {tuning['imbalance']:.1f}, "
            f"{quantizer['imbalance']:.1f} when the quantizer was trained)."
        )
    lost = _recall_at(former, former) - _recall_at(manifest, former)
    if lost > 0.02:
        found.append(f"Recall on the same queries at the same setting fell by {lost:.3f}.")
    if manifest["rows"] > GROWTH * quantizer["rows"]:
        found.append(
            f"There are {manifest['rows'] / quantizer['rows']:.0f} times the rows that the quantizer "
            f"was trained on."
        )
    return [f"{text} Run 'vsearch index --retrain'." for text in found]


def _recall_at(manifest: dict[str, Any], chosen: dict[str, Any]) -> float:
    """Recall@200 on text in one snapshot, at the setting of another."""
    setting = chosen["tuning"]["setting"]
    curve: list[dict[str, Any]] = manifest["tuning"]["curve"]
    found = (p for p in curve if Setting(p["nprobe"], p["per_hit"]) == Setting(**setting))
    return float(next(found)["recall_200_text"])


def _summary(manifest: dict[str, Any], shards_new: int, published: bool) -> IndexSummary:
    return IndexSummary(
        snapshot=manifest["version"],
        new=published,
        **{name: manifest[name] for name in ("kind", "space", "rows", "frames", "warnings")},
        shards=len(manifest["shards"]),
        alpha=manifest.get("alpha"),
        shards_new=shards_new,
    )
