"""How long the projector takes to learn, what a machine could do at most, and where the time goes.

Method: made-up pairs with a law to be learned. A latent vector drifts through the shots of videos
(`vectors.py`); DINO's vector (768) is one random smooth network of it, CLIP's (512) another, each with
noise of its own, CLIP's with the offset that all images share. They lie in a corpus as ingest stores
them: Parquet frames files of 16 spans of 20 s, fp16, zstd. A tenth of the videos is validation, as
always.

    ours    `vsearch.train.train` as a command of its own, from its start to its end. The projector's
            config.json tells the parts of its worker's time and when each epoch ended; what lies before
            its reading is starting (Python, imports, Ray and its three processes), what comes after the
            published file is closing. Memory is the largest of one of its processes
    peer    plain torch: all pairs in memory in fp32, the same MLP, first weights, loss, batches, learning
            rates, validation pairs and early stopping in fp32, no Ray; its seconds begin when Python has
            imported torch, and end when the best weights are in a file

`to 1 %` is the first epoch whose validation cosine is within 1 % of the best of all epochs: `loop` are the
seconds of learning and validating until then, `whole` also those of all that comes before. `--epochs`
makes the training, and with it the decay of its learning rate, shorter than the default. The limit
is the time of the multiplications of matrices (MLP and InfoNCE, forward and backward) at the largest
rate that `a @ b` of 2048 × 2048 reaches here, measured in the same run, in fp32 and, where the processor
has it, in bf16. `cpu s` are the processor seconds of all processes, from the start of Python. Limit and
peer are those of the cores, also where ours finds a GPU. The peer validates by the cosine alone, ours
takes the recall as well.

    python benchmarks/train.py --pairs 10000 100000 1000000 --json out.json
    python benchmarks/train.py --who peer --json out.json      # beside what was measured of ours
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from vectors import OFFSET, World, shot, unit, world

from vsearch.config import CorpusConfig, Encoder, TrainConfig
from vsearch.corpus import Corpus, newest_projector
from vsearch.schema import SpanRecord, frames_schema

if TYPE_CHECKING:
    import torch

DINO, CLIP, LATENT, HIDDEN = 768, 512, 512, 1024
FPS, SPAN_FRAMES, SPANS_A_FILE, VIDEO_FRAMES = 25, 500, 16, 1500
STEEPNESS = 1.5
"""How far the teachers are from linear: the deviation of what their tanh gets."""

CLIP_NOISE, DINO_NOISE = 0.05, 0.1
"""Of CLIP's squared length that nothing foretells; deviation of the noise on DINO's numbers, which
have one of about 0.3."""

CLOSE = 0.01
WHO = ("ours", "peer")
ONLY_IN_JSON = ("curve", "most_epochs", "train_pairs", "peak_all_mb", "gflop_an_epoch", "limit_s")
CONSOLE = Console(width=200)
Figures = dict[str, Any]


# ── pairs ────────────────────────────────────────────────────────────────────────────────────────


class Teacher:
    """A random smooth network: LATENT → HIDDEN, tanh, → `dim`; unit deviation on average."""

    def __init__(self, rng: np.random.Generator, dim: int) -> None:
        self._into = STEEPNESS * rng.standard_normal((LATENT, HIDDEN), np.float32)
        self._out = rng.standard_normal((HIDDEN, dim), np.float32) / np.float32(np.sqrt(HIDDEN))

    def __call__(self, latent: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = np.tanh(latent @ self._into) @ self._out
        return found


def video(
    known: World, dino: Teacher, clip: Teacher, rng: np.random.Generator
) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """DINO's and CLIP's vectors of a video of whole shots."""
    shots: list[NDArray[np.float32]] = []
    while sum(map(len, shots)) < VIDEO_FRAMES:
        shots.append(shot(known, rng) - np.sqrt(OFFSET) * known.images)
    latent = np.concatenate(shots).astype(np.float32)
    x = dino(latent) + DINO_NOISE * rng.standard_normal((len(latent), DINO), np.float32)
    meaning, noise = unit(clip(latent)), unit(rng.standard_normal((len(latent), CLIP)))
    y = np.sqrt(OFFSET) * known.images + np.sqrt(1 - OFFSET - CLIP_NOISE) * meaning
    return x.astype(np.float16), unit(y + np.sqrt(CLIP_NOISE) * noise).astype(np.float16)


def make(folder: Path, pairs: int, seed: int) -> str:
    """A corpus of so many pairs, or a few more: the last video is whole."""
    url = str(folder / str(pairs))
    corpus = Corpus(url)
    if corpus.exists("made"):
        return url
    corpus.require(CorpusConfig(Encoder("none", "0", DINO), Encoder("none", "0", CLIP), 224))
    rng, known = np.random.default_rng([seed, 5]), world(seed)
    teachers = Teacher(rng, DINO), Teacher(rng, CLIP)
    tables: list[pa.Table] = []
    records: list[SpanRecord] = []
    made = number = 0
    while made < pairs:
        x, y = video(known, *teachers, rng)
        for span, start in enumerate(range(0, len(x), SPAN_FRAMES)):
            part = slice(start, start + SPAN_FRAMES)
            table, record = span_of(f"{number:032x}", span, x[part], y[part])
            tables.append(table)
            records.append(record)
        made, number = made + len(x), number + 1
        if len(records) >= SPANS_A_FILE or made >= pairs:
            corpus.add_frames(pa.concat_tables(tables), records)
            tables, records = [], []
    corpus.enter()
    corpus.write("made", b"")
    return url


def span_of(
    name: str, span: int, x: NDArray[np.float16], y: NDArray[np.float16]
) -> tuple[pa.Table, SpanRecord]:
    count, span_id = len(x), f"{name}-{span}"
    pts_s = (span * SPAN_FRAMES + np.arange(count)) / FPS
    columns = [
        pa.array([name] * count),
        pa.array([span_id] * count),
        pa.array(np.full(count, span, np.int32)),
        pa.array(np.arange(count, dtype=np.int32)),
        pa.array(pts_s),
        pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), DINO),
        pa.FixedSizeListArray.from_arrays(pa.array(y.reshape(-1)), CLIP),
    ]
    record = SpanRecord(name, span_id, span, count, pts_s[-1], False, embedded=count)
    return pa.table(columns, schema=frames_schema(DINO, CLIP)), record


# ── the limit ────────────────────────────────────────────────────────────────────────────────────


def flop_a_pair(config: TrainConfig) -> float:
    """Of the multiplications of matrices of a step, for one of its pairs. Backward has the gradients of
    the weights and of what goes into them, but for the input of the first layer and InfoNCE's keys.
    """
    first, second = 2 * DINO * config.hidden, 2 * config.hidden * CLIP
    logits = 2 * CLIP * config.batch_size
    return 2 * first + 3 * second + 2 * logits


def matmul_gflops() -> dict[str, float]:
    """GFLOP/s of the machine, by precision: the best of many, with all its cores."""
    import torch

    found, kinds = {}, {"fp32": torch.float32}
    known = torch.cpu.get_capabilities()
    if known.get("avx512_bf16") or known.get("amx_bf16"):
        kinds["bf16"] = torch.bfloat16
    for name, kind in kinds.items():
        a, b = (torch.randn(2048, 2048).to(kind) for _ in range(2))
        took = []
        for _ in range(20):
            began = time.perf_counter()
            a @ b
            took.append(time.perf_counter() - began)
        found[name] = round(2 * 2048**3 / min(took) / 1e9, 1)
    return found


# ── ours ─────────────────────────────────────────────────────────────────────────────────────────


class Watch:
    """While it is entered: the most anonymous memory of one process below this one, and of all, and the
    seconds that processors worked for each, by the names that Ray gives them.
    """

    def __enter__(self) -> "Watch":
        self.one = self.all = 0
        self._worked: dict[int, tuple[str, float]] = {}
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            sizes = [0]
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    sizes.append(anonymous_bytes(process.pid))
                    times, command = process.cpu_times(), process.cmdline()
                    if command:  # it has not ended
                        name = process_name(command)
                        self._worked[process.pid] = name, times.user + times.system
            self.one, self.all = max(self.one, *sizes), max(self.all, sum(sizes))

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()

    def cpu_s(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, seconds in self._worked.values():
            found[name] = found.get(name, 0.0) + seconds
        return {name: round(s, 1) for name, s in sorted(found.items(), key=lambda f: -f[1])}


def process_name(command: list[str]) -> str:
    known = ("_fit", "TrainController", "RayTrainWorker")
    name = next((name for name in known if command[0].startswith(f"ray::{name}")), None)
    return name or ("command" if "-c" in command[:3] else "other processes of Ray")


def anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


COMMAND = """
import sys
from vsearch.config import TrainConfig
from vsearch.train import train
train(sys.argv[1], TrainConfig(max_epochs=int(sys.argv[2])))
"""


def measure_ours(url: str, config: TrainConfig) -> Figures:
    corpus = Corpus(url)
    corpus.remove_folder("projector")  # else there would be nothing to do
    command = [sys.executable, "-c", COMMAND, url, str(config.max_epochs)]
    began = time.time()
    with Watch() as watch:
        subprocess.run(command, check=True)
    ended = time.time()
    found = newest_projector(corpus)
    assert found
    version, record = found
    published = corpus.modified_at(f"projector/{version}/config.json").timestamp()
    took_s = record["took_s"]
    looped = sum(took_s.values())
    starting = published - looped - began
    parts = {"start": starting, **took_s, "close": ended - published}
    close = first_close(record["curve"])
    return {
        "seconds": round(ended - began, 1),
        "parts": {name: round(seconds, 1) for name, seconds in parts.items()},
        "epochs": record["metrics"]["epochs"],
        "cosine": record["metrics"]["cosine"],
        "epochs_to_1%": close["epoch"] + 1,
        "loop_s_to_1%": round(close["at_s"], 1),
        "whole_s_to_1%": round(starting + took_s["read"] + took_s["prepare"] + close["at_s"], 1),
        "train_pairs": record["metrics"]["train_pairs"],
        "peak_mb": round(watch.one / 1e6),
        "peak_all_mb": round(watch.all / 1e6),
        "cpu_s": watch.cpu_s(),
        "curve": record["curve"],
    }


def first_close(curve: list[Figures]) -> Figures:
    best = max(point["cosine"] for point in curve)
    enough = best - CLOSE * abs(best)
    return next(point for point in curve if point["cosine"] >= enough)


# ── the peer ─────────────────────────────────────────────────────────────────────────────────────


def measure_peer(url: str, config: TrainConfig) -> Figures:
    """What one would write without Ray, a corpus or a half precision."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    began = since = time.perf_counter()
    took_s = dict.fromkeys(("read", "prepare", "learn", "validate", "close"), 0.0)

    def note(part: str) -> float:
        nonlocal since
        now = time.perf_counter()
        took_s[part] += now - since
        since = now
        return now

    (x, x_val), (y, y_val) = peer_pairs(url, config.validation)
    note("read")
    torch.manual_seed(config.seed)
    mean, std = x.mean(0), x.std(0)
    model = nn.Sequential(nn.Linear(DINO, config.hidden), nn.GELU(), nn.Linear(config.hidden, CLIP))
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, weight_decay=config.weight_decay
    )
    batch = min(config.batch_size, len(x))
    steps = len(x) // batch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / 50)
            * 0.5
            * (1 + math.cos(math.pi * step / (steps * config.max_epochs)))
        ),
    )
    looped = note("prepare")
    best, best_epoch, weights, epoch = -1.0, 0, model.state_dict(), 0
    curve = []
    while epoch < config.max_epochs and epoch - best_epoch <= config.patience:
        drawn = torch.Generator().manual_seed(10_007 * epoch)  # as ours draws them
        for rows in torch.randperm(len(x), generator=drawn).split(batch)[:steps]:
            out, clip = model((x[rows] - mean) / std), y[rows]
            logits = F.normalize(out, dim=-1) @ F.normalize(clip, dim=-1).T / config.temperature
            loss = 1 - F.cosine_similarity(out, clip, dim=-1).mean()
            loss = loss + config.info_nce_weight * F.cross_entropy(logits, torch.arange(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        note("learn")
        with torch.inference_mode():
            cosine = float(F.cosine_similarity(model((x_val - mean) / std), y_val, dim=-1).mean())
        if cosine > best:
            best, best_epoch, weights = cosine, epoch, deepcopy(model.state_dict())
        curve.append({"epoch": epoch, "cosine": cosine, "at_s": note("validate") - looped})
        epoch += 1
    torch.save(weights | {"mean": mean, "std": std}, Path(url) / "peer.pt")
    ended = note("close")
    close = first_close(curve)
    return {
        "seconds": round(ended - began, 1),
        "parts": {name: round(seconds, 1) for name, seconds in took_s.items()},
        "epochs": epoch,
        "cosine": round(best, 4),
        "epochs_to_1%": close["epoch"] + 1,
        "loop_s_to_1%": round(close["at_s"], 1),
        "whole_s_to_1%": round(looped - began + close["at_s"], 1),
        "train_pairs": len(x),
        "curve": curve,
    }


def peer_pairs(url: str, validation: float) -> list[tuple["torch.Tensor", "torch.Tensor"]]:
    """DINO's, then CLIP's vectors, in fp32: (those to learn from, those of the validation pairs)."""
    import torch

    from vsearch.sampling import split_videos

    paths = sorted(Path(url).glob("frames/*.parquet"))
    table = pa.concat_tables(
        pq.read_table(path, columns=["video_id", "dino", "clip"]) for path in paths
    )
    videos = split_videos(table["video_id"].unique().to_pylist(), validation)
    held = pc.is_in(table["video_id"], pa.array(sorted(videos))).to_numpy()
    few = np.linspace(0, held.sum() - 1, min(held.sum(), 2000)).astype(np.int64)
    found = []
    for name, dim in (("dino", DINO), ("clip", CLIP)):
        chunks = [chunk.flatten().to_numpy() for chunk in table[name].chunks]
        vectors = np.concatenate(chunks).reshape(-1, dim)
        parts = vectors[~held], vectors[held][few]
        found.append(tuple(torch.from_numpy(part).float() for part in parts))
    return found


# ── all of it ────────────────────────────────────────────────────────────────────────────────────


def alone(function: Any, *arguments: Any) -> tuple[Any, Watch]:
    """What a function returns in a process of its own, and what was seen of that."""
    with Watch() as watch, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(function, *arguments).result()
    return found, watch


def against_limit(found: Figures, gflops: dict[str, float], config: TrainConfig) -> Figures:
    """The least seconds that all epochs, and those to 1 %, could take; how much of that rate is used."""
    epoch = found["train_pairs"] * flop_a_pair(config) / 1e9
    limit = {name: epoch * found["epochs"] / rate for name, rate in gflops.items()}
    learned = found["parts"]["learn"]
    return {
        "gflop_an_epoch": round(epoch),
        "limit_s": {name: round(seconds, 1) for name, seconds in limit.items()},
        "learn_over_limit": {n: round(learned / seconds, 2) for n, seconds in limit.items()},
    }


def exponent(sizes: list[float], values: list[float]) -> float:
    """The slope of the logarithms: 1 where twice the pairs take twice as much."""
    return round(float(np.polyfit(np.log(sizes), np.log(values), 1)[0]), 2)


def measures(row: Figures) -> dict[str, float]:
    return {
        "seconds": row["seconds"],
        "learn_s_an_epoch": row["parts"]["learn"] / row["epochs"],
        "read_s": max(0.05, row["parts"]["read"]),
        "peak_mb": row["peak_mb"],
    }


def growth(rows: list[Figures]) -> list[Figures]:
    found = []
    for who in dict.fromkeys(row["who"] for row in rows):
        mine = [row for row in rows if row["who"] == who]
        pairs = [row["train_pairs"] for row in mine]
        if len(mine) > 1:
            values = {name: [measures(row)[name] for row in mine] for name in measures(mine[0])}
            found.append({"who": who} | {n: exponent(pairs, v) for n, v in values.items()})
    return found


def ratios(rows: list[Figures]) -> list[Figures]:
    """Ours over the peer's, at each size that both were measured at: below 1 ours is less."""
    found = []
    known = {(row["pairs"], row["who"]): row for row in rows}
    for pairs in sorted({row["pairs"] for row in rows}):
        if all((pairs, who) in known for who in WHO):
            ours, peer = (
                measures(row)
                | {
                    name: row[name]
                    for name in ("loop_s_to_1%", "whole_s_to_1%", "epochs", "cosine")
                }
                | {"cpu_s": sum(row["cpu_s"].values())}
                for row in (known[pairs, who] for who in WHO)
            )
            found.append({"pairs": pairs} | {n: round(ours[n] / peer[n], 3) for n in ours})
    return found


def show(title: str, rows: list[Figures]) -> None:
    if not rows:
        return
    names = [name for name in rows[0] if name not in ONLY_IN_JSON]
    table = Table(*(name.replace("_", " ") for name in names), title=title)
    for row in rows:
        table.add_row(*(shown(row.get(name, "")) for name in names))
    CONSOLE.print(table)


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner:g}" for name, inner in value.items())
    return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--epochs", type=int, default=TrainConfig().max_epochs)
    parser.add_argument("--json", type=Path, help="figures go here; those of other sizes are kept")
    parser.add_argument("--folder", type=Path, help="keeps the corpora, for the next time")
    parser.add_argument("--who", nargs="*", choices=WHO, default=WHO)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = replace(TrainConfig(), max_epochs=arguments.epochs)
    figures: Figures = {"config": asdict(config), "rows": []}
    if arguments.json and arguments.json.exists():
        figures["rows"] = json.loads(arguments.json.read_text())["rows"]
    with tempfile.TemporaryDirectory() as temporary:
        for pairs in arguments.pairs:
            url, _ = alone(make, arguments.folder or Path(temporary), pairs, arguments.seed)
            for who in arguments.who:
                gflops, _ = alone(matmul_gflops)
                load = round(os.getloadavg()[0], 1)
                if who == "ours":
                    found = measure_ours(url, config)
                else:
                    found, watch = alone(measure_peer, url, config)
                    found["peak_mb"] = found["peak_all_mb"] = round(watch.one / 1e6)
                    found["cpu_s"] = watch.cpu_s()
                row = {"who": who, "pairs": pairs, "most_epochs": config.max_epochs}
                row |= {"gflops": gflops, "load_before": load}
                row |= found | against_limit(found, gflops, config)
                names = ("who", "pairs", "most_epochs")
                others = [r for r in figures["rows"] if any(r[n] != row[n] for n in names)]
                figures["rows"] = [*others, row]
                show(f"{who}: {pairs} pairs", [row])
                if arguments.json:
                    arguments.json.write_text(json.dumps(figures, indent=1))
    same = [row for row in figures["rows"] if row["most_epochs"] == config.max_epochs]
    figures["growth"], figures["ratios"] = growth(same), ratios(same)
    show("growth: exponents", figures["growth"])
    show("ours over the peer's", figures["ratios"])
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
