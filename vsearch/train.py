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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

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

VALIDATION_PAIRS = 2000
"""The metrics are taken on at most this many pairs a worker, spread evenly over its videos."""


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
) -> TrainSummary:
    """Trains a projector on the corpus' pairs, unless the newest one was trained on the same. A run
    that was cut off is taken up at its last checkpoint. `gpus` are those that may be used, also such as
    an autoscaler has yet to start; by default all that are alive. `announce` gets a line about what the
    training runs on, when it begins.
    """
    config = config or TrainConfig()
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
    text = json.dumps([stored, asdict(config)])
    trained_on = hashlib.sha256(text.encode()).hexdigest()[:16]
    newest = newest_projector(corpus)
    if newest and newest[1]["trained_on"] == trained_on:
        return TrainSummary(newest[0], False, newest[1]["metrics"])
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
            **_material(counted, config),
            "config": asdict(config),
            "trained_on": trained_on,
        },
        "scaling_config": ScalingConfig(
            num_workers=count,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus} | ({"GPU": 1} if gpus else {}),
        ),
        "run_config": RunConfig(
            name=trained_on,
            **_run_storage(corpus),
            failure_config=FailureConfig(max_failures=NODES_LOST),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    }
    with runtime.user_errors():
        ray.get(_fit.remote(training))
    newest = newest_projector(corpus)
    if newest is None or newest[1]["trained_on"] != trained_on:
        raise RuntimeError("the training ended without a projector")
    return TrainSummary(newest[0], True, newest[1]["metrics"])


@ray.remote(num_cpus=1, max_retries=NODES_LOST)
def _fit(training: dict[str, Any]) -> None:
    """Runs a training. Ray Train's controller stands where this is called, and both load torch: as a
    task they are on a node that has cores. While it waits its core is the workers'.
    """
    from ray.train.torch import TorchTrainer

    TorchTrainer(_train_loop, **training).fit()


def _run_storage(corpus: Corpus) -> dict[str, Any]:
    """Where Ray Train keeps its checkpoints: in the corpus, through fsspec as all else."""
    fs = pa.fs.PyFileSystem(pa.fs.FSSpecHandler(corpus.fs))
    return {"storage_path": corpus.path("projector/.runs"), "storage_filesystem": fs}


def _material(counted: dict[str, tuple[str, SpanRecord]], config: TrainConfig) -> dict[str, Any]:
    """What the workers learn from: `files`, the ids of the spans that count in each frames file; the
    `share` of their rows that is used; the videos that are `held_out` for validation.
    """
    files: dict[str, list[str]] = {}
    for span, (name, _) in sorted(counted.items()):
        files.setdefault(name, []).append(span)
    records = [record for _, record in counted.values()]
    return {
        "files": dict(sorted(files.items())),
        "share": min(1.0, config.max_pairs / sum(record.frames for record in records)),
        "held_out": sorted(split_videos(sorted({r.video_id for r in records}), config.validation)),
    }


# ── on the workers ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Pairs:
    """This worker's pairs: training x (n, d), y (n, c) in fp16, validation in fp32."""

    x: "torch.Tensor"
    y: "torch.Tensor"
    x_val: "torch.Tensor"
    y_val: "torch.Tensor"


def _load_pairs(
    job: dict[str, Any], config: TrainConfig, rank: int, world: int, device: Any
) -> _Pairs:
    import torch

    corpus = Corpus(job["corpus"])
    names = list(job["files"])
    held_out = job["held_out"]
    by_file = len(names) >= 4 * world  # few files are dealt out by rows, so that all ranks get some
    rng = np.random.default_rng(config.seed)
    dino, clip, held = [], [], []
    for name in names[rank::world] if by_file else names:
        for table in corpus.frames(name, ["video_id", "span_id", "dino", "clip"]):
            chosen = np.isin(table["span_id"].to_numpy(zero_copy_only=False), job["files"][name])
            chosen &= rng.random(len(chosen)) < job["share"]
            table = table.filter(pa.array(chosen))
            dino.append(vector_matrix(table["dino"]))
            clip.append(vector_matrix(table["clip"]))
            held.append(np.isin(table["video_id"].to_numpy(zero_copy_only=False), held_out))
    x, y, validation = np.concatenate(dino), np.concatenate(clip), np.concatenate(held)
    train_rows, val_rows = np.flatnonzero(~validation), np.flatnonzero(validation)
    if not by_file:
        train_rows = train_rows[rank::world]
    if not held_out:  # a single video: there is nothing to hold out
        val_rows = train_rows
    few = np.linspace(0, len(val_rows) - 1, min(len(val_rows), VALIDATION_PAIRS)).astype(int)
    val_rows = val_rows[few]
    return _Pairs(
        torch.from_numpy(x[train_rows]).to(device),
        torch.from_numpy(y[train_rows]).to(device),
        torch.from_numpy(x[val_rows]).float().to(device),
        torch.from_numpy(y[val_rows]).float().to(device),
    )


def _train_loop(job: dict[str, Any]) -> None:
    import torch
    from ray.train.torch import get_device, prepare_model

    from vsearch.projector import Projector, projection_loss

    config = TrainConfig(**job["config"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device()
    torch.manual_seed(config.seed)  # the same on all ranks: they start from one model
    pairs = _load_pairs(job, config, rank, world, device)
    count, mean, std = _statistics(pairs.x, world)
    fewest = _across(torch.tensor(float(len(pairs.x)), device=device), "MIN", world)
    if fewest < 1:
        raise UserError(
            "There are too few frames for so many training workers: use fewer --workers."
        )
    batch = min(config.batch_size, int(fewest))
    steps_per_epoch = max(1, int(fewest) // batch)

    projector = Projector(pairs.x.shape[1], pairs.y.shape[1], config.hidden)
    projector.standardise_by(mean.cpu(), std.cpu())
    model = prepare_model(projector)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, weight_decay=config.weight_decay
    )
    state = _State(projector, optimizer)
    state.resume(ray.train.get_checkpoint(), device)
    began = saved = time.monotonic()
    first_epoch = state.epoch
    while state.epoch < config.max_epochs and state.epoch - state.best_epoch <= config.patience:
        order = torch.randperm(
            len(pairs.x), generator=torch.Generator().manual_seed(state.epoch * 10_007 + rank)
        ).to(device)
        losses = []
        for step in range(steps_per_epoch):
            done = state.epoch * steps_per_epoch + step
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _warm_cosine(
                    done, config.max_epochs * steps_per_epoch
                )
            rows = order[step * batch : (step + 1) * batch]
            loss = projection_loss(
                model(pairs.x[rows].float()),
                pairs.y[rows].float(),
                config.info_nce_weight,
                config.temperature,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        metrics = _validate(projector, pairs, world)
        state.note(metrics)
        report = {"epoch": state.epoch, "loss": float(torch.stack(losses).mean()), **metrics}
        print(json.dumps({"stage": "train", **report}), flush=True)  # seen in a job's log
        # A report with a checkpoint costs seconds, an epoch may take less: the first rank's clock
        # decides, for all ranks must report equally often.
        due = float(rank == 0 and time.monotonic() - saved > CHECKPOINT_EVERY_S)
        if _across(torch.tensor(due, device=device), "SUM", world) > 0:
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = state.save(Path(folder)) if rank == 0 else None
                ray.train.report(report, checkpoint=checkpoint)
            saved = time.monotonic()
        state.epoch += 1
    if rank == 0:
        projector.load_state_dict(state.best)
        summary = {
            "epochs": state.epoch,
            "resumed_at_epoch": first_epoch,
            "train_pairs": int(count),
            "validation_pairs": len(pairs.x_val),
            "seconds": round(time.monotonic() - began, 1),
            **{name: round(value, 4) for name, value in state.best_metrics.items()},
        }
        _publish(Corpus(job["corpus"]), projector, config, job["trained_on"], summary)


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


def _warm_cosine(step: int, steps: int, warm_up: int = 50) -> float:
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
    parts = x.split(65536)  # in pieces: fp64 of everything would be four times the input
    mean = _across(torch.stack([p.double().sum(0) for p in parts]).sum(0), "SUM", world) / count
    squares = torch.stack([(p.double() - mean).square().sum(0) for p in parts]).sum(0)
    square = _across(squares, "SUM", world) / count
    return count, mean.float(), square.sqrt().float()


class _State:
    """What a training must keep to go on after a cut: weights, Adam's moments, the best so far."""

    def __init__(self, projector: Any, optimizer: Any) -> None:
        self._projector, self._optimizer = projector, optimizer
        self.epoch = self.best_epoch = 0
        self.best: dict[str, torch.Tensor] = {}
        self.best_metrics: dict[str, float] = {"cosine": -math.inf}

    def note(self, metrics: dict[str, float]) -> None:
        if metrics["cosine"] > self.best_metrics["cosine"]:
            self.best_epoch, self.best_metrics = self.epoch, metrics
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
    corpus: Corpus, projector: Any, config: TrainConfig, trained_on: str, metrics: dict[str, Any]
) -> None:
    """Writes the projector's folder; `config.json` comes last and makes it count."""
    version = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    weights, sizes = projector.to_bytes()
    record = {
        **json.loads(sizes),
        "trained_on": trained_on,
        "training": asdict(config),
        "metrics": metrics,
    }
    corpus.write(f"projector/{version}/model.safetensors", weights)
    corpus.write(f"projector/{version}/config.json", (json.dumps(record, indent=2) + "\n").encode())
