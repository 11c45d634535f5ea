"""How long a query takes, from a sentence to JSON over HTTP, and where the time goes.

Method: CLIP ViT-B/16 with random weights in open_clip's own format; its last layer alone is fitted, so
that sentences lie off the images as those of a trained CLIP do (`vectors.py`): the time of a query does
not depend on the weights, what it finds and how many rows that touches does. The frames are those of
`vectors.py`: shots of 4 to 20 seconds that drift, two frames of each second, in videos of five minutes.
They are stored as an ingest stores them, `build_index` makes a snapshot of them, and the service opens it
as a user's. `--every-frame` takes all 25 frames of a second: a shot then has hundreds of rows.

    inside   in one process, one query at a time: the engine's steps, then the whole application without
             a server (routes, checks, JSON), on one thread as in the service
    http     `vsearch serve` in one process behind Ray Serve's proxy, `--haproxy` behind its HAProxy, on
             the same cores as the clients. Each client asks again when it has its answer (a closed
             loop), sentences that nobody asked before; `known` are sentences that the service remembers

`beyond` is what a query takes beside encode, search and exact scores: grouping, merging, JSON, HTTP.
The limit of a sentence is the larger of the text tower's arithmetic at the measured rate of a matrix
product, and of reading its weights at the measured rate of memory.

    python benchmarks/query.py --rows 10000 100000 1000000 --folder /tmp/query --json out.json
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import open_clip
import pyarrow as pa
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from serve import free_port, sentences
from vectors import DIM, GAP, MEANING, NEAR_IMAGES, OWN, OWN_NOISE, World, shot, unit, world

import vsearch
from vsearch.build_index import build_index
from vsearch.config import CorpusConfig, Encoder
from vsearch.corpus import Corpus
from vsearch.encoders import ClipEncoder, _text_features
from vsearch.laws import vit_gflop
from vsearch.parts import read_sentences
from vsearch.schema import VIDEOS, SpanRecord, frames_schema
from vsearch.snapshots import Snapshots

CONSOLE = Console(stderr=True, width=160)
SEED = 0
ARCHITECTURE = "ViT-B-16"
LAYERS, WIDTH = 12, 512
VIDEO_ROWS = 600
FRAMES_PER_S, STEP = 25.0, 12
"""Of the shots of `vectors.py`, and which of their frames are taken: two a second."""
SHOT_DIM = 64
"""In place of DINO's vectors stand random ones, another for each shot: cuts are found by them."""
FILE_VIDEOS = 150
FITTED_ON = 1200
CLIENTS = {1: 200, 8: 400, 32: 640}
"""How many queries so many clients ask in all."""
KNOWN = 50
INSIDE = 100
LIMIT = 12
PERCENTS = (50, 95, 99)
STEPS = ("encode", "search", "rerank", "group")

Figures = dict[str, Any]


# ── what is asked ────────────────────────────────────────────────────────────────────────────────


def save_clip(path: Path, known: World) -> None:
    """A checkpoint of the architecture whose sentences lie as those of `vectors.sentences`: normally
    distributed around the offset of texts, with the spectrum of what images mean.
    """
    torch.manual_seed(SEED)
    model = open_clip.create_model(ARCHITECTURE)
    with torch.no_grad():
        model.text_projection.copy_(torch.eye(DIM))
        texts = [*read_sentences(), *sentences(FITTED_ON)]
        tokens = open_clip.get_tokenizer(ARCHITECTURE)(texts)
        features = _text_features(model.eval())
        parts = [features(part) for part in tokens.split(64)]
        seen = torch.cat(parts).double().numpy()
        noise = OWN_NOISE / DIM * np.eye(DIM)
        wanted = (MEANING + OWN) * known.basis.T.astype(np.float64) @ known.basis + noise
        matrix = _root(np.cov(seen.T), -0.5) @ _root(wanted, 0.5)
        centre = np.sqrt(GAP) * known.texts + np.sqrt(NEAR_IMAGES) * known.images
        shift = np.linalg.solve(matrix.T, centre - seen.mean(0) @ matrix)
        model.text_projection.copy_(torch.from_numpy(matrix))
        model.ln_final.bias.add_(torch.from_numpy(shift))
    torch.save(model.state_dict(), path)


def _root(matrix: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    """A power of a symmetric, positive matrix; its smallest eigenvalues are lifted a little."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.maximum(values, 1e-5 * values.max()) ** power) @ vectors.T)


# ── what is searched ─────────────────────────────────────────────────────────────────────────────


def videos(
    known: World, rows: int, step: int
) -> Iterator[tuple[str, NDArray[np.float16], NDArray[Any]]]:
    """(id, frames (n, DIM), the vectors of their shots (n, SHOT_DIM)) of videos of so many rows in all,
    each `step`-th frame of their shots.
    """
    for number in range(math.ceil(rows / VIDEO_ROWS)):
        size = min(VIDEO_ROWS, rows - number * VIDEO_ROWS)
        rng = np.random.default_rng([SEED, 6, number])
        frames = np.empty((size, DIM), np.float16)
        shots = np.empty((size, SHOT_DIM), np.float16)
        filled = 0
        while filled < size:
            part = shot(known, rng)[::step][: size - filled]
            place = slice(filled, filled + len(part))
            frames[place], shots[place] = part, unit(rng.standard_normal(SHOT_DIM))
            filled += len(part)
        yield f"v{number:06d}", frames, shots


def store(
    corpus: Corpus, made: list[tuple[str, NDArray[np.float16], NDArray[Any]]], fps: float
) -> None:
    """Adds videos of one span each, with their frames in one file."""
    tables, records, found = [], [], []
    now = datetime(2026, 1, 1, tzinfo=UTC)
    for name, frames, shots in made:
        count = len(frames)
        pts_s = np.arange(count) / fps
        columns = [
            pa.array([name] * count),
            pa.array([f"{name}-0"] * count),
            pa.array(np.zeros(count, np.int32)),
            pa.array(np.arange(count, dtype=np.int32)),
            pa.array(pts_s),
            pa.FixedSizeListArray.from_arrays(pa.array(shots.reshape(-1)), SHOT_DIM),
            pa.FixedSizeListArray.from_arrays(pa.array(frames.reshape(-1)), DIM),
        ]
        tables.append(pa.table(columns, schema=frames_schema(SHOT_DIM, DIM)))
        records.append(SpanRecord(name, f"{name}-0", 0, count, pts_s[-1], True, embedded=count))
        found.append({
            "uri": f"/archive/2026/{name}.mp4", "source": "/archive", "tags": {}, "video_id": name,
            "size_bytes": count, "etag": "1", "fps": fps, "start_s": 0.0,
            "duration_s": count / fps, "zero_s": 0.0, "span_s": count / fps + 1,
            "expected_spans": 1, "seekable": True, "recorded_at": now,
            "recorded_at_source": "mtime", "ingested_at": now, "status": "ok", "attempts": 1,
            "quarantined": False,
        })  # fmt: skip
    corpus.add_frames(pa.concat_tables(tables), records)
    corpus.add_videos(pa.Table.from_pylist(found, schema=VIDEOS))


def make(folder: Path, rows: int, step: int) -> str:
    """The corpus of so many rows, with its snapshot, unless it is there; gives its address."""
    url = str(folder / f"{rows}-{step}")
    checkpoint = folder / "clip.pt"
    known = world(SEED)
    if not checkpoint.exists():
        save_clip(checkpoint, known)
    corpus = Corpus(url)
    if Snapshots(corpus).current is None:
        clip = ClipEncoder(f"{ARCHITECTURE}:{checkpoint}", "cpu").record
        corpus.require(CorpusConfig(Encoder("none", "0", SHOT_DIM), clip, 224))
        waiting = []
        for video in videos(known, rows, step):
            waiting.append(video)
            if len(waiting) == FILE_VIDEOS:
                store(corpus, waiting, FRAMES_PER_S / step)
                waiting = []
        if waiting:
            store(corpus, waiting, FRAMES_PER_S / step)
        build_index(url, space="clip")
    return url


# ── inside ───────────────────────────────────────────────────────────────────────────────────────


def milliseconds(values: list[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(values, q)), 2) for q in PERCENTS}


def inside(url: str, asked: list[str]) -> Figures:
    """Medians, in milliseconds, of the steps of a query in this process, first by the engine, then by
    the application; and what limits the text tower.
    """
    torch.set_num_threads(1)
    engine = vsearch.open(url)
    engine.search("warm-up", LIMIT)
    steps: dict[str, list[float]] = {name: [] for name in (*STEPS, "engine")}
    for sentence in asked:
        found = engine.search(sentence, LIMIT)
        steps["engine"].append(found.took_ms)
        for name, seconds in found.took_s.items():
            steps[name].append(seconds * 1000)
    steps |= asyncio.run(_application(url, asked, engine.encoder))
    rows = {"rows": engine.rows, "videos": len(engine.videos), "setting": str(engine.index.setting)}
    return rows | {name: milliseconds(took) for name, took in steps.items()}


async def _application(url: str, asked: list[str], encoder: ClipEncoder) -> dict[str, list[float]]:
    """How long the application takes over the same sentences, and what of that is its own search."""
    from vsearch.routes import make_app
    from vsearch.service import Service
    from vsearch.versions import Versions

    async def encode(sentence: str) -> Any:
        return (await asyncio.to_thread(encoder.encode_text, [sentence]))[0]

    service = Service(url, Versions(url), encode)
    app = make_app(service)
    whole: list[float] = []
    searched: list[float] = []
    for sentence in asked:
        began = time.perf_counter()
        body = await _get(app, "/v1/search", {"q": sentence, "limit": str(LIMIT)})
        whole.append((time.perf_counter() - began) * 1000)
        searched.append(json.loads(body)["took_ms"])
    service.close()
    return {"service": searched, "application": whole}


async def _get(app: Any, path: str, parameters: dict[str, str]) -> bytes:
    """The body of an answer, asked for as a server would ask."""
    from urllib.parse import urlencode

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET",
        "scheme": "http", "path": path, "raw_path": path.encode(), "root_path": "",
        "query_string": urlencode(parameters).encode(), "headers": [(b"host", b"localhost")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    parts: list[bytes] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return b"".join(parts)


def limit(asked: list[str], threads: int) -> Figures:
    """What the text tower's arithmetic and its weights cost at least, in milliseconds a sentence."""
    torch.set_num_threads(threads)
    tokens = open_clip.get_tokenizer(ARCHITECTURE)(asked).argmax(-1) + 1
    length = float(tokens.float().median())
    gflop = vit_gflop(LAYERS, WIDTH, int(length), 0)
    square, layers = torch.randn(2048, 2048), torch.randn(12 * LAYERS, WIDTH, WIDTH)
    matmul_s = _least_s(lambda: square @ square)
    read_s = _least_s(lambda: layers.sum())
    rate = 2 * 2048**3 / matmul_s / 1e9
    return {
        "threads": threads,
        "tokens": length,
        "gflop": round(gflop, 3),
        "gflop_per_s": round(rate, 1),
        "arithmetic_ms": round(gflop / rate * 1000, 2),
        "weights_mb": round(layers.nbytes / 1e6, 1),
        "gb_per_s": round(layers.nbytes / read_s / 1e9, 1),
        "weights_ms": round(read_s * 1000, 2),
    }


def _least_s(compute: Callable[[], object], times: int = 15) -> float:
    took = []
    for _ in range(times):
        began = time.perf_counter()
        compute()
        took.append(time.perf_counter() - began)
    return min(took)


# ── over HTTP ────────────────────────────────────────────────────────────────────────────────────


async def _ask(address: str, asked: list[str], clients: int) -> Figures:
    waiting = iter(asked)
    whole: list[float] = []
    steps: dict[str, list[float]] = {name: [] for name in (*STEPS, "service", "beyond")}
    refused = size_bytes = 0

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal refused, size_bytes
        for sentence in waiting:
            began = time.perf_counter()
            parameters = {"q": sentence, "limit": LIMIT}
            async with session.get(f"{address}v1/search", params=parameters) as response:
                raw = await response.read()
            took_ms = (time.perf_counter() - began) * 1000
            if response.status != 200:
                refused += 1
                continue
            size_bytes, body = len(raw), json.loads(raw)
            took = {name: body["took"][f"{name}_ms"] for name in STEPS}
            whole.append(took_ms)
            for name, value in took.items():
                steps[name].append(value)
            steps["service"].append(body["took_ms"])
            steps["beyond"].append(took_ms - took["encode"] - took["search"] - took["rerank"])

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        seconds = time.perf_counter() - began
    return {
        "clients": clients,
        "ms": milliseconds(whole),
        "per_s": round(len(whole) / seconds, 1),
        "refused": refused,
        "bytes": size_bytes,
        "steps": {name: milliseconds(took) for name, took in steps.items()},
    }


def ask(address: str, asked: list[str], clients: int) -> Figures:
    """The figures of so many clients that ask all of the sentences between them."""
    return asyncio.run(_ask(address, asked, clients))


def over_http(url: str) -> list[Figures]:
    import ray

    from vsearch.serve import ServeArgs, start

    address = start(ServeArgs(corpus=url, parts=1), port=free_port())
    warm, *rest = _portions([KNOWN, *CLIENTS.values()])
    table = []
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as client:
        client.submit(ask, address, warm, 1).result()
        for clients, asked in zip(CLIENTS, rest, strict=True):
            found = client.submit(ask, address, asked, clients).result()
            table.append({"sentences": "new", "loadavg": os.getloadavg()[0]} | found)
        found = client.submit(ask, address, warm * 6, 1).result()
        table.append({"sentences": "known", "loadavg": os.getloadavg()[0]} | found)
    ray.shutdown()
    return table


def _portions(sizes: list[int]) -> Iterator[list[str]]:
    """Sentences, other ones each time."""
    every = iter(sentences(FITTED_ON + sum(sizes))[FITTED_ON:])
    return ([next(every) for _ in range(size)] for size in sizes)


# ── all of it ────────────────────────────────────────────────────────────────────────────────────


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def exponent(sizes: list[int], values: list[float]) -> float:
    """Of the power of the size with which a value grows, by least squares."""
    return round(float(np.polyfit(np.log(sizes), np.log(values), 1)[0]), 2)


def growth(figures: dict[str, Figures]) -> Figures:
    """The exponents of the medians."""
    sizes = sorted(map(int, figures))
    found = [figures[str(size)] for size in sizes]
    if len(sizes) < 2:
        return {}
    steps = {
        name: [one["inside"][name]["p50"] for one in found] for name in (*STEPS, "application")
    }
    steps["search and rerank"] = [
        one["inside"]["search"]["p50"] + one["inside"]["rerank"]["p50"] for one in found
    ]
    steps["over HTTP, 1 client"] = [one["http"][0]["ms"]["p50"] for one in found]
    return {name: exponent(sizes, values) for name, values in steps.items() if min(values) > 0}


def show(figures: dict[str, Figures], limits: list[Figures]) -> None:
    for one in limits:
        CONSOLE.print(one)
    table = Table("rows", "sentences", "clients", *(f"p{q} ms" for q in PERCENTS), "per s",
                  *STEPS, "beyond", "refused", title="over HTTP (steps: p50 ms)")  # fmt: skip
    for rows, found in sorted(figures.items(), key=lambda one: int(one[0])):
        for one in found["http"]:
            values = [one["ms"][f"p{q}"] for q in PERCENTS]
            steps = [one["steps"][name]["p50"] for name in (*STEPS, "beyond")]
            shown = [one["sentences"], one["clients"], *values, one["per_s"], *steps]
            table.add_row(f"{int(rows):,}", *map(str, [*shown, one["refused"]]))
    CONSOLE.print(table)
    names = (*STEPS, "engine", "service", "application")
    table = Table("rows", *names, title="inside, p50 ms")
    for rows, found in sorted(figures.items(), key=lambda one: int(one[0])):
        table.add_row(f"{int(rows):,}", *(f"{found['inside'][name]['p50']:g}" for name in names))
    CONSOLE.print(table)
    CONSOLE.print({"exponents": growth(figures)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--haproxy", action="store_true", help="in place of Serve's Python proxy")
    parser.add_argument("--folder", type=Path, help="keeps what is made, for the next time")
    parser.add_argument("--every-frame", action="store_true", help="shots of hundreds of rows")
    parser.add_argument("--only-make", action="store_true", help="makes the corpora, asks nothing")
    parser.add_argument("--json", type=Path, help="figures go here; those of others are kept")
    arguments = parser.parse_args()
    if arguments.haproxy:
        os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"  # before Ray starts: its workers inherit it
    proxy = "HAProxy" if arguments.haproxy else "Serve's proxy"
    figures: Figures = {}
    if arguments.json and arguments.json.exists():
        figures = json.loads(arguments.json.read_text())
    (asked,) = _portions([INSIDE])
    if not arguments.only_make:
        threads = sorted({1, os.cpu_count() or 1})
        figures["limits"] = [alone(limit, asked, count) for count in threads]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for rows in arguments.rows:
            url = alone(make, folder, rows, 1 if arguments.every_frame else STEP)
            if arguments.only_make:
                continue
            found = {"inside": alone(inside, url, asked), "http": alone(over_http, url)}
            mine = figures.setdefault(proxy, {})
            mine[str(rows)] = found
            show(mine, figures["limits"])
            if arguments.json:
                arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
