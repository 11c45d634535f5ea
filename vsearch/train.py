"""Frames to projector: Ray Train runs the loop below on every worker.

Pairs are read once, from the frames files that fall to the worker, and stay in its memory (on its
GPU where there is one). Validation is split by video: neighbouring frames are nearly equal, so a
split by frame would measure memory, not understanding.
"""

import hashlib
import json
import math
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import ray.train
from numpy.typing import NDArray
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
from vsearch.corpus import Corpus, newest_projector, vector_matrix
from vsearch.placement import train_words
from vsearch.sampling import split_videos
from vsearch.schema import SpanRecord

if TYPE_CHECKING:
    import torch

CHECKPOINT_EVERY_S = 30.0
"""At least so much time lies between two checkpoints: what a training that is cut off can lose."""

NODES_LOST = 10
"""A training goes on at its last checkpoint when so many nodes went away; those that Ray was told of
in time do not count."""

WENT_AWAY = (RayActorError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)
"""What Ray says of a process that is no longer there, or that cannot be reached."""

VALIDATION_PAIRS = 2000
"""The metrics are taken on at most this many pairs a worker, spread evenly over its videos; as many are
kept with the projector."""

FINE_TUNING = replace(TrainConfig(), learning_rate=3e-4, max_epochs=20, patience=4)
"""How a training goes that starts from a projector."""

MOST_FALL = 0.01
"""A projector whose cosine on the validation pairs of the one that it started from fell further is not
published."""


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
    validation pairs, or its cosine on those of the newest projector falls by more than `MOST_FALL`.
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
    held_out = set(_kept_pairs(corpus, start)[0]) if start else set()
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
        raise NotBetterError(json.loads(corpus.read(_refusal(name))))
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

        DataParallelTrainer(_train_loop, **training).fit()
        return
    from ray.train.torch import TorchTrainer

    TorchTrainer(_train_loop, **training).fit()


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
    if not corpus.exists(_kept(version)) or not _kept_pairs(corpus, version)[0]:
        raise UserError(
            f"The projector {version} keeps no validation pairs, so what it would forget cannot be "
            f"told: run 'vsearch train' once without --from-newest."
        )
    return version


def _kept(version: str) -> str:
    return f"projector/{version}/validation.parquet"


def _kept_pairs(
    corpus: Corpus, version: str
) -> tuple[list[str], NDArray[np.float16], NDArray[np.float16]]:
    """(video ids, dino (n, d), clip (n, c)) of the validation pairs kept with a projector."""
    with corpus.open(_kept(version)) as file:
        table = pq.read_table(file, page_checksum_verification=True)
    return table["video_id"].to_pylist(), vector_matrix(table["dino"]), vector_matrix(table["clip"])


def _refusal(name: str) -> str:
    """The file that says why the outcome of a run was not published."""
    return f"projector/.runs/{name}.json"


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


# ── on the workers ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Pairs:
    """This worker's pairs: training x (n, d), y (n, c) in fp16, validation in fp32 with the `videos`
    that these are of. `dealt`: the other workers have other validation pairs.
    """

    x: "torch.Tensor"
    y: "torch.Tensor"
    x_val: "torch.Tensor"
    y_val: "torch.Tensor"
    videos: list[str]
    dealt: bool


def _load_pairs(
    job: dict[str, Any], config: TrainConfig, rank: int, world: int, device: Any
) -> _Pairs:
    import torch

    corpus = Corpus(job["corpus"])
    names, held_out = list(job["files"]), job["held_out"]
    by_file = len(names) >= 4 * world  # few files are dealt out by rows, so that all ranks get some
    mine = names[rank::world] if by_file else names
    most = sum(job["frames"][name] for name in mine)
    widths = corpus.config.dino.dim, corpus.config.clip.dim
    # In place at once: in pieces all would be there twice. What is not written takes no memory.
    train = [np.empty((most, width), np.float16) for width in widths]
    held: list[list[NDArray[np.float16]]] = [[], []]
    videos: list[str] = []
    rng = np.random.default_rng(config.seed)
    count = seen = 0
    for name in mine:
        for table in corpus.frames(name, ["video_id", "span_id", "dino", "clip"]):
            chosen = np.isin(table["span_id"].to_numpy(zero_copy_only=False), job["files"][name])
            chosen &= rng.random(len(chosen)) < job["share"]
            table = table.filter(pa.array(chosen))
            ids = table["video_id"].to_numpy(zero_copy_only=False)
            is_held = np.isin(ids, held_out)
            videos += ids[is_held].tolist()
            rows = np.flatnonzero(~is_held)
            seen += len(rows)
            if not by_file:
                rows = rows[np.arange(seen - len(rows), seen) % world == rank]
            for place, column in enumerate(("dino", "clip")):
                vectors = vector_matrix(table[column])
                train[place][count : count + len(rows)] = vectors[rows]
                held[place].append(vectors[is_held])
            count += len(rows)
    x, y = (values[:count] for values in train)
    # A single video: there is nothing to hold out.
    x_val, y_val = (np.concatenate(values) for values in held) if held_out else (x, y)
    few = _few(len(x_val))
    return _Pairs(
        torch.from_numpy(x).to(device),
        torch.from_numpy(y).to(device),
        torch.from_numpy(x_val[few]).float().to(device),
        torch.from_numpy(y_val[few]).float().to(device),
        [videos[i] for i in few] if held_out else [],
        by_file,
    )


def _few(count: int) -> NDArray[np.int64]:
    """At most `VALIDATION_PAIRS` of so many rows, spread evenly."""
    return np.linspace(0, count - 1, min(count, VALIDATION_PAIRS)).astype(np.int64)


def _train_loop(job: dict[str, Any]) -> None:
    import torch
    from ray.train.torch import get_device, prepare_model

    from vsearch.projector import Projector, load_projector, projection_loss

    config, corpus = TrainConfig(**job["config"]), Corpus(job["corpus"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device()
    torch.manual_seed(config.seed)  # the same on all ranks: they start from one model
    clock = _Clock()
    pairs = _load_pairs(job, config, rank, world, device)
    clock.note("read")
    count, mean, std = _statistics(pairs.x, world)
    fewest = _across(torch.tensor(float(len(pairs.x)), device=device), "MIN", world)
    if fewest < 1:
        raise UserError(
            "There are too few frames for so many training workers: use fewer --workers."
        )
    batch = min(config.batch_size, int(fewest))
    steps_per_epoch = max(1, int(fewest) // batch)

    start = job["record"]["from"]
    if start:
        projector = load_projector(corpus, start).train()
    else:
        projector = Projector(pairs.x.shape[1], pairs.y.shape[1], config.hidden)
        projector.standardise_by(mean.cpu(), std.cpu())
    model = prepare_model(projector)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    state = _State(projector, optimizer)
    if start:  # what comes out is better than that, or is not published
        state.note(_validate(projector, pairs, world), -1)
    state.resume(ray.train.get_checkpoint(), device)
    clock.note("prepare")
    began = saved = time.monotonic()
    first_epoch, curve = state.epoch, []
    while state.epoch < config.max_epochs and state.epoch - state.best_epoch <= config.patience:
        order = torch.randperm(
            len(pairs.x), generator=torch.Generator().manual_seed(state.epoch * 10_007 + rank)
        ).to(device)
        losses = []
        for step in range(steps_per_epoch):
            done = state.epoch * steps_per_epoch + step
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * warm_cosine(
                    done, config.max_epochs * steps_per_epoch
                )
            rows = order[step * batch : (step + 1) * batch]
            with torch.autocast(device.type, torch.bfloat16, enabled=_has_bf16(device)):
                projected = model(pairs.x[rows].float())
            loss = projection_loss(
                projected.float(),
                pairs.y[rows].float(),
                config.info_nce_weight,
                config.temperature,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        loss_mean = float(torch.stack(losses).mean())
        clock.note("learn")
        metrics = _validate(projector, pairs, world)
        clock.note("validate")
        state.note(metrics, state.epoch)
        report = {"epoch": state.epoch, "loss": loss_mean, **metrics}
        curve.append(report | {"at_s": round(time.monotonic() - began, 2)})
        print(json.dumps({"stage": "train", **report}), flush=True)  # seen in a job's log
        # A report with a checkpoint costs seconds, an epoch may take less: the first rank's clock
        # decides, for all ranks must report equally often.
        due = float(rank == 0 and time.monotonic() - saved > CHECKPOINT_EVERY_S)
        if _across(torch.tensor(due, device=device), "SUM", world) > 0:
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = state.save(Path(folder)) if rank == 0 else None
                ray.train.report(report, checkpoint=checkpoint)
            saved = time.monotonic()
            clock.note("checkpoint")
        state.epoch += 1
    kept = _all_validation(pairs, world)
    if rank == 0:
        projector.load_state_dict(state.best)
        projector.eval().cpu()
        summary = {
            "epochs": state.epoch,
            "resumed_at_epoch": first_epoch,
            "train_pairs": int(count),
            "validation_pairs": len(pairs.x_val),
            "seconds": round(time.monotonic() - began, 1),
            **{name: round(value, 4) for name, value in state.best_metrics.items()},
        }
        if start:
            compared = _compared(corpus, start, projector, kept)
            refusal = _why_not_better(start, state.best_epoch >= 0, compared)
            if refusal:
                corpus.write(_refusal(job["name"]), json.dumps(refusal).encode())
                return
            summary |= compared
        clock.note("prepare")
        history = {"curve": curve, "took_s": clock.took_s}
        _publish(corpus, projector, config, job["record"] | history, kept, summary)


def _has_bf16(device: Any) -> bool:
    """Whether the layers are multiplied in bfloat16: on a processor that has it, where it is the better
    half of the time. Weights, updates, loss and validation are fp32 everywhere, and so is a GPU.
    """
    import torch

    if device.type != "cpu":
        return False
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def _validate(projector: Any, pairs: _Pairs, world: int) -> dict[str, float]:
    """The metrics over the validation pairs of all ranks, the same on each: they must all stop at
    the same epoch. A rank may hold none."""
    import torch

    from vsearch.projector import paired_metrics

    count = len(pairs.x_val)
    with torch.inference_mode():
        found = paired_metrics(projector(pairs.x_val), pairs.y_val) if count else {}
    names = ("cosine", "recall@1")
    values = [found.get(name, 0.0) * count for name in names]
    total = _across(torch.tensor([*values, float(count)], device=pairs.x.device), "SUM", world)
    return {name: float(total[i] / total[-1]) for i, name in enumerate(names)}


def _all_validation(pairs: _Pairs, world: int) -> pa.Table:
    """The validation pairs to keep, of all ranks: `video_id`, `dino`, `clip` (both fp16)."""
    import torch.distributed as dist

    x, y = (values.half().cpu().numpy() for values in (pairs.x_val, pairs.y_val))
    mine = (pairs.videos, x[: len(pairs.videos)], y[: len(pairs.videos)])
    parts: list[Any] = [mine]
    if world > 1 and pairs.dealt:
        parts = [None] * world
        dist.all_gather_object(parts, mine)
    videos = [video for part in parts for video in part[0]]
    few = _few(len(videos))
    columns = {"video_id": pa.array([videos[i] for i in few], pa.string())}
    for place, name in ((1, "dino"), (2, "clip")):
        rows = np.concatenate([part[place] for part in parts])[few]
        values = pa.array(rows.reshape(-1), pa.float16())
        columns[name] = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
    return pa.table(columns)


def _compared(corpus: Corpus, start: str, projector: Any, kept: pa.Table) -> dict[str, float]:
    """The mean cosines of the projector that a training started from and of what came out, on the
    validation pairs of the former and on those of videos that it did not keep, if there are any.
    """
    import torch

    from vsearch.projector import load_projector, paired_metrics

    ids, dino, clip = _kept_pairs(corpus, start)
    new = ~np.isin(kept["video_id"].to_numpy(zero_copy_only=False), ids)
    rest = kept.filter(pa.array(new))
    sets = {"old": (dino, clip)}
    if rest.num_rows:
        sets["new"] = vector_matrix(rest["dino"]), vector_matrix(rest["clip"])
    found = {}
    with torch.inference_mode():
        for when, model in (("before", load_projector(corpus, start)), ("after", projector)):
            for name, (x, y) in sets.items():
                projected = model(torch.from_numpy(x).float())
                cosine = paired_metrics(projected, torch.from_numpy(y).float())["cosine"]
                found[f"{name}_{when}"] = round(cosine, 4)
    return found


def _why_not_better(start: str, learned: bool, compared: dict[str, float]) -> str | None:
    """Why a fine-tuned projector is not to be published, None if it is."""
    stays = f"The projector {start} stays in use"
    if not learned:
        return f"{stays}: starting from it, nothing better was found on the validation videos."
    before, after = compared["old_before"], compared["old_after"]
    if after < before - MOST_FALL:
        return (
            f"{stays}: what came of it has a cosine of {after:.4f} on its validation pairs, where it has "
            f"{before:.4f} itself; run 'vsearch train' to train afresh on all pairs."
        )
    return None


def warm_cosine(step: int, steps: int, warm_up: int = 50) -> float:
    """The share of the learning rate at a step: a linear start, then half a cosine down to zero."""
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _across(value: "torch.Tensor", how: str, world: int) -> "torch.Tensor":
    import torch.distributed as dist

    if world > 1:
        dist.all_reduce(value, getattr(dist.ReduceOp, how))
    return value


def _statistics(
    x: "torch.Tensor", world: int
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """(count, mean (d,), standard deviation (d,)) of the training inputs of all ranks."""
    import torch

    count = _across(torch.tensor(float(len(x)), device=x.device), "SUM", world)
    parts = x.split(8192)  # in pieces: fp64 of everything would be four times the input
    mean = _across(torch.stack([p.double().sum(0) for p in parts]).sum(0), "SUM", world) / count
    squares = torch.stack([(p.double() - mean).square().sum(0) for p in parts]).sum(0)
    square = _across(squares, "SUM", world) / count
    return count, mean.float(), square.sqrt().float()


class _Clock:
    """How many seconds each part of a worker's time took."""

    def __init__(self) -> None:
        self.took_s: dict[str, float] = {}
        self._since = time.monotonic()

    def note(self, part: str) -> None:
        """The time since the last note was spent on this part."""
        now = time.monotonic()
        self.took_s[part] = round(self.took_s.get(part, 0.0) + now - self._since, 3)
        self._since = now


class _State:
    """What a training must keep to go on after a cut: weights, Adam's moments, the best so far."""

    def __init__(self, projector: Any, optimizer: Any) -> None:
        self._projector, self._optimizer = projector, optimizer
        self.epoch = self.best_epoch = 0
        self.best: dict[str, torch.Tensor] = {}
        self.best_metrics: dict[str, float] = {"cosine": -math.inf}

    def note(self, metrics: dict[str, float], epoch: int) -> None:
        """Remembers the weights if they are the best so far; those at the start are of epoch −1."""
        if metrics["cosine"] > self.best_metrics["cosine"]:
            self.best_epoch, self.best_metrics = epoch, metrics
            self.best = {k: v.detach().clone() for k, v in self._projector.state_dict().items()}

    def save(self, folder: Path) -> Any:
        from safetensors.torch import save_file

        tensors = {f"model.{k}": v for k, v in self._projector.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for number, values in self._optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": value for name, value in values.items()}
        save_file(
            {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
            folder / "state.safetensors",
        )
        (folder / "state.json").write_text(
            json.dumps([self.epoch, self.best_epoch, self.best_metrics])
        )
        return ray.train.Checkpoint.from_directory(folder)

    def resume(self, checkpoint: Any, device: Any) -> None:
        if checkpoint is None:
            return
        from safetensors.torch import load_file

        with checkpoint.as_directory() as folder:
            tensors = load_file(Path(folder) / "state.safetensors", device=str(device))
            epoch, self.best_epoch, self.best_metrics = json.loads(
                (Path(folder) / "state.json").read_text()
            )
        self.epoch = epoch + 1
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "best": {}, "adam": {}}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        self._projector.load_state_dict(parts["model"])
        self.best = parts["best"]
        adam = self._optimizer.state_dict()
        for key, value in parts["adam"].items():
            number, _, name = key.partition(".")
            adam["state"].setdefault(int(number), {})[name] = value
        self._optimizer.load_state_dict(adam)


def _publish(
    corpus: Corpus,
    projector: Any,
    config: TrainConfig,
    made_of: dict[str, Any],
    kept: pa.Table,
    metrics: dict[str, Any],
) -> None:
    """Writes the projector's folder; `config.json` comes last and makes it count."""
    version = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    weights, sizes = projector.to_bytes()
    record = {**json.loads(sizes), **made_of, "training": asdict(config), "metrics": metrics}
    corpus.write(f"projector/{version}/model.safetensors", weights)
    corpus.write_table(_kept(version), kept)
    corpus.write(f"projector/{version}/config.json", (json.dumps(record, indent=2) + "\n").encode())
