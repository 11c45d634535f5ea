"""What each worker of a training does: Ray Train runs `train_loop` on all of them.

Pairs are read once, from the frames files that fall to the worker, and stay in its memory (on its
GPU where there is one).
"""

import json
import math
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.train
from numpy.typing import NDArray

from vsearch.config import TrainConfig, UserError
from vsearch.corpus import Corpus, vector_matrix

if TYPE_CHECKING:
    import torch

CHECKPOINT_EVERY_S = 30.0
"""At least so much time lies between two checkpoints: what a training that is cut off can lose."""

VALIDATION_PAIRS = 2000
"""The metrics are taken on at most this many pairs a worker, spread evenly over its videos; as many are
kept with the projector."""

MOST_FALL = 0.01
"""A projector whose cosine on the validation pairs of the one that it started from fell further is not
published."""


def kept_path(version: str) -> str:
    return f"projector/{version}/validation.parquet"


def kept_pairs(
    corpus: Corpus, version: str
) -> tuple[list[str], NDArray[np.float16], NDArray[np.float16]]:
    """(video ids, dino (n, d), clip (n, c)) of the validation pairs kept with a projector."""
    with corpus.open(kept_path(version)) as file:
        table = pq.read_table(file, page_checksum_verification=True)
    return table["video_id"].to_pylist(), vector_matrix(table["dino"]), vector_matrix(table["clip"])


def refusal_path(name: str) -> str:
    """The file that says why the outcome of a run was not published."""
    return f"projector/.runs/{name}.json"


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


def train_loop(job: dict[str, Any]) -> None:
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
                corpus.write(refusal_path(job["name"]), json.dumps(refusal).encode())
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

    ids, dino, clip = kept_pairs(corpus, start)
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
    corpus.write_table(kept_path(version), kept)
    corpus.write(f"projector/{version}/config.json", (json.dumps(record, indent=2) + "\n").encode())
