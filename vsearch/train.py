"""Frames to projector, by Ray Train; what each worker does stands in `learning.py`.

Validation is split by video: neighbouring frames are nearly equal, so a split by frame would measure
memory, not understanding.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.fs
import ray.train
from ray import PlacementGroupID
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)
from ray.train import (
    CheckpointConfig,
    ControllerError,
    FailureConfig,
    RunConfig,
    ScalingConfig,
)
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

from vsearch import runtime
from vsearch.config import TrainConfig, UserError
from vsearch.corpus import Corpus, newest_projector
from vsearch.learning import kept_pairs, kept_path, refusal_path, train_loop
from vsearch.placement import train_words
from vsearch.sampling import split_videos
from vsearch.schema import SpanRecord

NODES_LOST = 10
"""A training goes on at its last checkpoint when so many nodes went away; those that Ray was told of
in time do not count."""

WENT_AWAY = (RayActorError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)
"""What Ray says of a process that is no longer there, or that cannot be reached."""

FINE_TUNING = replace(TrainConfig(), learning_rate=3e-4, max_epochs=20, patience=4)
"""How a training goes that starts from a projector."""


class NotBetterError(UserError):
    """A fine-tuned projector that forgot too much, or learned nothing: the former one stays in use."""

    exit_code = 3


@dataclass(frozen=True)
class TrainSummary:
    """The projector in use afterwards and its validation metrics; `new`: it was trained now."""

    version: str
    new: bool
    metrics: dict[str, float]


def train(
    corpus_url: str,
    config: TrainConfig | None = None,
    workers: int | None = None,
    gpus: int | None = None,
    announce: Callable[[str], None] = lambda line: None,
    from_newest: bool = False,
) -> TrainSummary:
    """Trains a projector on the corpus' pairs, unless the newest one was trained on the same. A run
    that was cut off is taken up at its last checkpoint. `gpus` are those that may be used, also such as
    an autoscaler has yet to start; by default all that are alive. `announce` gets a line about what the
    training runs on, when it begins.

    With `from_newest` it starts from the newest projector's weights, whose validation videos stay
    unseen. Raises `NotBetterError`, and publishes nothing, if what comes out of that is no better on all
    validation pairs, or its cosine on those of the newest projector falls by more than MOST_FALL of
    `learning.py`.
    """
    config = config or (FINE_TUNING if from_newest else TrainConfig())
    corpus = Corpus(corpus_url)
    spans = corpus.spans()
    counted = {span: found for span, found in spans.items() if found[1].frames and found[1].pairs}
    if not counted:
        if corpus.config.pairs < 1 and spans:
            raise UserError(
                f"None of the few spans of the corpus at {corpus_url} fell into the sample of pairs: "
                f"ingest more videos, or make a corpus with a larger --pairs."
            )
        raise UserError(f"The corpus at {corpus_url} holds no frames yet: ingest videos first.")
    stored = sorted((span, record.attempts) for span, (_, record) in counted.items())
    pairs, trained_on = _digest(stored), _digest([stored, asdict(config)])
    newest = newest_projector(corpus)
    if newest and _is_up_to_date(newest[1], pairs, trained_on, from_newest):
        return TrainSummary(newest[0], False, newest[1]["metrics"])
    start = _start(corpus, newest and newest[0]) if from_newest else None
    held_out = set(kept_pairs(corpus, start)[0]) if start else set()
    material = _material(counted, config, held_out)
    name = f"{trained_on}-{start}" if start else trained_on
    runtime.connect()
    nodes = runtime.nodes()
    gpus = sum(node.gpus for node in nodes) if gpus is None else gpus
    count = workers or max(1, gpus)
    most = gpus or runtime.cpus()
    if count > most and not runtime.on_cluster():
        raise UserError(f"{count} workers cannot run here: this machine has room for {most}.")
    cpus = 1 if gpus else max(1, runtime.cpus_of_smallest_node() // count)
    announce(train_words(nodes, count, cpus, gpus > 0))
    training = {
        "train_loop_config": {
            "corpus": corpus.url,
            **material,
            "config": asdict(config),
            "name": name,
            "record": {"trained_on": trained_on, "pairs": pairs, "from": start},
        },
        "scaling_config": ScalingConfig(
            num_workers=count,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus} | ({"GPU": 1} if gpus else {}),
        ),
        "run_config": RunConfig(
            name=name,
            **_run_storage(corpus),
            failure_config=FailureConfig(max_failures=NODES_LOST),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    }
    with runtime.user_errors():
        _fit_to_the_end(training)
    newest = newest_projector(corpus)
    if start and newest and newest[0] == start:
        raise NotBetterError(json.loads(corpus.read(refusal_path(name))))
    if newest is None or newest[1]["trained_on"] != trained_on:
        raise RuntimeError("the training ended without a projector")
    return TrainSummary(newest[0], True, newest[1]["metrics"])


def _fit_to_the_end(training: dict[str, Any]) -> None:
    """Runs a training again where what controls it goes away, or a worker while it starts: with that
    Ray's controller does not deal.
    """
    known = set(placement_group_table())
    for lost in range(NODES_LOST + 1):
        try:
            return ray.get(_fit.remote(training))
        except (*WENT_AWAY, ControllerError) as error:
            cause = error.controller_failure if isinstance(error, ControllerError) else error
            if lost == NODES_LOST or not isinstance(cause, WENT_AWAY):
                raise
            _free_placement_groups(known)


def _free_placement_groups(known: set[str]) -> None:
    """Frees what the job reserved beside the `known` groups. Ray keeps the placement group of a
    controller that died while its workers started, so that nothing could run there any more.
    """
    mine = ray.get_runtime_context().get_job_id()
    for name, group in placement_group_table().items():
        if name not in known and name.endswith(mine) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(name)))


@ray.remote(num_cpus=1, max_retries=0)
def _fit(training: dict[str, Any]) -> None:
    """Runs a training. Ray Train's controller stands where this is called, and both load much: as a
    task they are on a node that has cores. While it waits its core is the workers'.
    """
    if training["scaling_config"].num_workers == 1:  # then torch is loaded by the worker alone
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        DataParallelTrainer(train_loop, **training).fit()
        return
    from ray.train.torch import TorchTrainer

    TorchTrainer(train_loop, **training).fit()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _is_up_to_date(newest: dict[str, Any], pairs: str, trained_on: str, from_newest: bool) -> bool:
    """Whether a training would only repeat what the newest projector, by its config.json, knows. One
    that was fine-tuned on the same pairs counts, however it was asked for.
    """
    if newest["trained_on"] == trained_on:
        return True
    return newest.get("pairs") == pairs and (from_newest or newest["from"] is not None)


def _start(corpus: Corpus, version: str | None) -> str:
    """The projector to start from. Raises `UserError` if it cannot be."""
    if version is None:
        raise UserError(
            f"The corpus at {corpus.url} has no projector to start from: run 'vsearch train' first."
        )
    if not corpus.exists(kept_path(version)) or not kept_pairs(corpus, version)[0]:
        raise UserError(
            f"The projector {version} keeps no validation pairs, so what it would forget cannot be "
            f"told: run 'vsearch train' once without --from-newest."
        )
    return version


def _run_storage(corpus: Corpus) -> dict[str, Any]:
    """Where Ray Train keeps its checkpoints: in the corpus, through fsspec as all else."""
    fs = pa.fs.PyFileSystem(pa.fs.FSSpecHandler(corpus.fs))
    return {"storage_path": corpus.path("projector/.runs"), "storage_filesystem": fs}


def _material(
    counted: dict[str, tuple[str, SpanRecord]], config: TrainConfig, held_out: set[str]
) -> dict[str, Any]:
    """What the workers learn from: `files`, the ids of the spans that count in each frames file;
    `frames`, how many these hold; the `share` of their rows that is used; the videos that are
    `held_out` for validation, those given among them. Raises `UserError` where these are all.
    """
    files: dict[str, list[str]] = {}
    frames: Counter[str] = Counter()
    for span, (name, record) in sorted(counted.items()):
        files.setdefault(name, []).append(span)
        frames[name] += record.frames
    records = [record for _, record in counted.values()]
    videos = sorted({record.video_id for record in records})
    held_out = held_out & set(videos) | split_videos(videos, config.validation)
    if held_out == set(videos):
        raise UserError(
            "Every video that is left is one on which the projector is validated, so there is none to "
            "learn from: ingest more videos, or run 'vsearch train' without --from-newest."
        )
    return {
        "files": dict(sorted(files.items())),
        "frames": dict(frames),
        "share": min(1.0, config.max_pairs / sum(record.frames for record in records)),
        "held_out": sorted(held_out),
    }
