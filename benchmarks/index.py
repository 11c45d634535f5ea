"""How fast the index is, how much of the exact answer it finds, and what it costs to make and hold.

Method: made-up vectors (`vectors.py`: shots that drift, sentences that lie off the images), or with
`--corpus` those of a corpus and the sentences its recall is measured on. Truth is an exact search of
the float16 vectors. Each build and each search is a process of its own: a build may use all cores
and its peak memory is taken, a search has one thread, its memory is what it holds in anonymous
pages after all queries (a page of a mapped file can be given back at any time). A query asks for 200
hits, one at a time; its latency is the least of three, p50 and p99 are over the queries.

    speed     ours in one shard and in eight, exact search, HNSW, LanceDB, autofaiss, each tuned to
              recall ≥ 0.97; with several sizes also how they grow: the slopes of the logarithms
    filters   recall and latency where 100 % … 0.1 % of the rows are allowed, at random or by video;
              at which number of allowed rows a scan of them is as fast as the index
    updates   recall after a fifth of the rows was deleted and a fifth added, with the old quantizer
    training  what fewer cells, training rows or iterations of k-means cost in recall

autofaiss chooses an index by the memory that it may take: as much as ours holds, or 3 GB, once any
index and once one that can be mapped from disk. It and LanceDB need environments of their own.

    python benchmarks/index.py --rows 100000 1000000 --json out.json
"""

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from vectors import Vectors, frame_queries, sentences, world, write_frames

import vsearch.index
from vsearch import recall
from vsearch.index import Index, Mask, Rows, Shard, encode, exact_search
from vsearch.index import train_quantizer as trained
from vsearch.sizing import FLAT_ROWS, Setting, cells_for

AUTOFAISS = {
    "autofaiss": "our memory",
    "autofaiss-3GB": "3 GB",
    "autofaiss-mapped": "3 GB, mappable",
}
ENGINES = ("flat", "hnsw", "lancedb", *AUTOFAISS)
PARTS = ("speed", "filters", "updates", "training")
DEPTH = recall.DEPTH
TEXT_QUERIES, FRAME_QUERIES = 200, 100
HNSW_LINKS, HNSW_BUILD = 32, 80
HNSW_LOOKS = (200, 400, 800, 1600, 3200, 6400)
HNSW_MOST_ROWS = 1_000_000
AUTOFAISS_BYTES = 3_000_000_000
SHARES = (1.0, 0.1, 0.01, 0.001)
KEPT_ROWS = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000)
VIDEO_ROWS = 3_000
SCANNED_AT_MOST = 200_000
REPEATS = 3
ADDED = ("known", "others")
MASKS = 5
"""So many filters of a kind and size; queries take them in turn."""

CONSOLE = Console(width=200)
Figures = dict[str, Any]
Search = Callable[[Vectors], Rows]


@dataclass(frozen=True)
class Work:
    """Vectors float16 (rows, dim) in a file, and in `folder` queries, their true rows, what is made."""

    folder: Path
    vectors: Path
    rows: int
    dim: int

    def frames(self) -> NDArray[np.float16]:
        return np.memmap(self.vectors, np.float16, mode="r", shape=(self.rows, self.dim))

    def load(self, name: str) -> Any:
        return np.load(self.folder / f"{name}.npy")

    def queries(self) -> Vectors:
        """The sentences, then the frames."""
        return np.concatenate([self.load("text"), self.load("frames")])

    def truth(self) -> Rows:
        return np.concatenate([self.load("truth_text"), self.load("truth_frames")])


def made_up(folder: Path, rows: int, seed: int) -> Work:
    work = Work(folder, folder / "vectors.f16", rows, 512)
    if not (folder / "truth_frames.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        known = world(seed)
        write_frames(known, rows, work.vectors, seed)
        text = sentences(known, TEXT_QUERIES, seed)
        _save_queries(work, text, frame_queries(work.vectors, rows, FRAME_QUERIES, seed))
    return work


def of_corpus(folder: Path, url: str) -> Work:
    """The vectors of a corpus' snapshot, and its sentences."""
    from vsearch.corpus import Corpus
    from vsearch.encoders import ClipEncoder
    from vsearch.parts import SENTENCES
    from vsearch.snapshots import Snapshots

    folder.mkdir(parents=True, exist_ok=True)
    snapshots = Snapshots(Corpus(url))
    manifest = snapshots.manifest(snapshots.require_current())
    work = Work(folder, folder / "vectors.f16", manifest["rows"], manifest["dim"])
    with work.vectors.open("wb") as file:
        for shard in manifest["shards"]:
            file.write(snapshots.path(shard["vectors_file"]).read_bytes())
    if manifest["queries"]:
        text = np.load(snapshots.path(manifest["queries"]["queries_file"]))
        text = text[: manifest["queries"]["text"]]
    else:
        lines = SENTENCES.read_text(encoding="utf-8").splitlines()
        encoder = ClipEncoder.recorded(snapshots.corpus.config.clip)
        text = encoder.encode_text([line for line in lines if line.strip()])
    chosen = np.linspace(0, work.rows - 1, FRAME_QUERIES).astype(np.int64)
    _save_queries(work, text[:TEXT_QUERIES], work.frames()[chosen].astype(np.float32))
    return work


def _save_queries(work: Work, text: Vectors, frames: Vectors) -> None:
    for name, queries in (("text", text), ("frames", frames)):
        scores, rows = exact_search(work.frames(), queries.astype(np.float32), DEPTH)
        np.save(work.folder / f"{name}.npy", queries.astype(np.float32))
        np.save(work.folder / f"scores_{name}.npy", scores)
        np.save(work.folder / f"truth_{name}.npy", rows)


# ── processes ────────────────────────────────────────────────────────────────────────────────────


def alone(threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process with so many threads."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


class Peak:
    """While it is entered: the most memory of this process, with and without pages of mapped files."""

    def __enter__(self) -> "Peak":
        self.anonymous, self._over = 0, threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.anonymous = max(self.anonymous, status_bytes("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()
        self.resident = status_bytes("VmHWM")


# ── ours ─────────────────────────────────────────────────────────────────────────────────────────


def shard_files(work: Work, folder: Path, shards: int) -> list[tuple[Path, Path, int]]:
    """(vectors, codes, rows) of each shard. One shard has the vectors as they are."""
    edges = np.linspace(0, work.rows, shards + 1).astype(int)
    vectors = [work.vectors] if shards == 1 else [folder / f"{n}.f16" for n in range(shards)]
    codes = [folder / f"{n}.faiss" for n in range(shards)]
    return list(zip(vectors, codes, np.diff(edges).tolist(), strict=True))


def open_shards(work: Work, folder: Path, shards: int) -> list[Shard]:
    files = shard_files(work, folder, shards)
    return [Shard(vectors, rows, work.dim, codes) for vectors, codes, rows in files]


def build_ours(
    work: Work, folder: Path, shards: int, nlist: int, rows_per_cell: int, iterations: int
) -> Figures:
    folder.mkdir(parents=True, exist_ok=True)
    vsearch.index.ROWS_PER_CELL = rows_per_cell
    vsearch.index.ITERATIONS = iterations
    vectors = work.frames()
    quantizer = folder.parent / f"quantizer-{nlist}-{rows_per_cell}-{iterations}"
    seconds = {}
    with Peak() as peak:
        began, worked = time.perf_counter(), time.process_time()
        if not quantizer.exists() or shards == 1:
            size = min(work.rows, rows_per_cell * nlist)
            chosen = np.linspace(0, work.rows - 1, size).astype(np.int64)
            quantizer.write_bytes(trained(np.asarray(vectors[chosen], np.float32), nlist))
            seconds["train"] = time.perf_counter() - began
            seconds["train (CPU)"] = time.process_time() - worked
        began, worked, start, cosine = time.perf_counter(), time.process_time(), 0, 0.0
        for path, codes, rows in shard_files(work, folder, shards):
            part = vectors[start : start + rows]
            if shards > 1:
                part.tofile(path)
            fitted, _ = encode(quantizer.read_bytes(), part, codes)
            cosine += fitted * rows / work.rows
            start += rows
        seconds["encode"] = time.perf_counter() - began
        seconds["encode (CPU)"] = time.process_time() - worked
    return {
        "seconds": seconds,
        "peak_bytes": peak.resident,
        "peak_anonymous_bytes": peak.anonymous,
        "mean_cosine": cosine,
        "quantizer": str(quantizer),
    }


def _in_words(setting: Setting) -> str:
    return f"nprobe {setting.nprobe}, per_hit {setting.per_hit}"


def probe_ours(work: Work, folder: Path, shards: int) -> Figures:
    """The curve of settings, as a build measures it, and the setting it would choose."""
    began = time.perf_counter()
    queries = work.queries()
    parts = [recall.probe(shard, queries) for shard in open_shards(work, folder, shards)]
    found = parts[0]
    for part in parts[1:]:
        found = found + part
    points = recall.curve(found, len(work.load("text")))
    try:
        setting, reached = recall.cheapest(points), True
    except recall.RecallError:
        best = max(points, key=lambda p: (p.recall_200_text, p.worst_text))
        setting, reached = Setting(best.nprobe, best.per_hit), False
    return {
        "setting": asdict(setting),
        "reached": reached,
        "probe_s": time.perf_counter() - began,
        "curve": recall.as_json(points),
    }


def ask_ours(work: Work, folder: Path, shards: int, setting: Setting) -> Figures:
    def opened() -> Search:
        index = Index(open_shards(work, folder, shards), setting)
        starts = np.cumsum([0, *(shard.rows for shard in index.shards)])

        def search(query: Vectors) -> Rows:
            _, numbers, rows = index.search(query, DEPTH)
            return starts[numbers] + rows

        return search

    files = shard_files(work, folder, shards)
    disk = sum(path.stat().st_size for vectors, codes, _ in files for path in (vectors, codes))
    return {"disk_bytes": disk, **asked(work, opened)}


# ── others ───────────────────────────────────────────────────────────────────────────────────────


def build_faiss(work: Work, path: Path, kind: str) -> Figures:
    vectors = work.frames()
    with Peak() as peak:
        began = time.perf_counter()
        if kind == "flat":
            index = faiss.IndexFlatIP(work.dim)
        else:
            index = faiss.IndexHNSWFlat(work.dim, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction = HNSW_BUILD
        for start in range(0, work.rows, 1 << 16):
            index.add(np.asarray(vectors[start : start + (1 << 16)], np.float32))
        seconds = {"train and encode": time.perf_counter() - began}
        faiss.write_index(index, str(path))
    return {
        "seconds": seconds,
        "peak_bytes": peak.resident,
        "peak_anonymous_bytes": peak.anonymous,
    }


def ask_faiss(work: Work, path: Path, kind: str) -> Figures:
    chosen: list[int] = []

    def opened() -> Search:
        index = faiss.read_index(str(path))

        def search(query: Vectors) -> Rows:
            return index.search(query[None], DEPTH)[1][0]

        if kind == "hnsw":
            text, truth = work.load("text"), work.load("truth_text")
            for looks in HNSW_LOOKS:
                index.hnsw.efSearch = looks
                found = [search(query) for query in text]
                chosen[:] = [looks]
                if shares_found(found, truth).mean() >= recall.MIN_RECALL:
                    break
        return search

    figures = asked(work, opened)
    setting = f"efSearch {chosen[0]}" if chosen else ""
    return {"disk_bytes": path.stat().st_size, "setting": setting, **figures}


def request(work: Work, folder: Path, **more: Any) -> Path:
    """The file that tells a peer what to do: see `index_peer.py`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("text", "frames", "truth_text", "truth_frames")
    asked_for = {
        "vectors": str(work.vectors),
        "rows": work.rows,
        "dim": work.dim,
        "folder": str(folder),
        "cells": cells_for(work.rows),
        "nlist": cells_for(work.rows) // 4,  # LanceDB asks for 256 rows a cell
        "min_recall": recall.MIN_RECALL,
        **more,
    } | {name: str(work.folder / f"{name}.npy") for name in names}
    path = folder / "work.json"
    path.write_text(json.dumps(asked_for))
    return path


def run_peer(script: str, python: str, what: str, work: Work, folder: Path, **more: Any) -> Figures:
    path = request(work, folder, **more)
    command = [python, str(Path(__file__).with_name(script)), what, str(path)]
    alone_in = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TQDM_DISABLE": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=alone_in)
    return dict(json.loads(done.stdout.splitlines()[-1]))


# ── what is measured of a search ─────────────────────────────────────────────────────────────────


def shares_found(found: list[Rows], truth: Rows, k: int = DEPTH) -> NDArray[np.float64]:
    """Recall@k of each query; `truth` (q, ≤ DEPTH), −1 where there are fewer rows."""
    shares = []
    for rows, expected in zip(found, truth, strict=True):
        wanted = expected[:k][expected[:k] >= 0]
        shares.append(len(np.intersect1d(rows, wanted)) / max(1, len(wanted)))
    return np.array(shares)


def fastest_ms(search: Callable[[Vectors], Any], query: Vectors) -> float:
    """The least of several times, so that what else the machine does counts little."""
    took = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        search(query)
        took.append(time.perf_counter() - began)
    return min(took) * 1000


def asked(work: Work, opened: Callable[[], Search]) -> Figures:
    """Recall and latencies by text and by frames, and the memory that an index holds."""
    warm = np.ones((1000, work.dim), np.float32)
    exact_search(warm.astype(np.float16), warm[:1], 10)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before would be filled first
    before = status_bytes("RssAnon")
    search = opened()
    figures: Figures = {}
    for name in ("text", "frames"):
        queries, truth = work.load(name), work.load(f"truth_{name}")
        found = [search(query) for query in queries]
        took_ms = [fastest_ms(search, query) for query in queries]
        at_200 = shares_found(found, truth)
        figures[name] = (at_200.tolist(), shares_found(found, truth, 10).tolist(), took_ms)
        if name == "text":
            np.save(work.folder / "found.npy", found)
    return figures | {"ram_bytes": status_bytes("RssAnon") - before}


def summary(name: str, work: Work, built: Figures, found: Figures) -> Figures:
    """One row of the table of speeds."""
    at_200, at_10, took_ms = map(np.array, found["text"])
    frames_200, _, frames_ms = map(np.array, found["frames"])
    return {
        "index": name,
        "rows": work.rows,
        "build_s": {stage: round(value, 2) for stage, value in built["seconds"].items()},
        "build_peak_mb": round(built["peak_bytes"] / 1e6),
        "build_peak_anonymous_mb": round(built.get("peak_anonymous_bytes", 0) / 1e6) or None,
        "ram_bytes_a_vector": round(found["ram_bytes"] / work.rows, 1),
        "disk_bytes_a_vector": round(found["disk_bytes"] / work.rows, 1),
        "recall_200_text": round(float(at_200.mean()), 4),
        "recall_200_worst": round(float(np.sort(at_200)[: max(1, len(at_200) // 20)].mean()), 4),
        "recall_10_text": round(float(at_10.mean()), 4),
        "recall_200_frames": round(float(frames_200.mean()), 4),
        "p50_ms": round(float(np.median(took_ms)), 3),
        "p99_ms": round(float(np.percentile(took_ms, 99)), 3),
        "p50_frames_ms": round(float(np.median(frames_ms)), 3),
        "setting": found.get("setting", ""),
        "note": ", ".join(filter(None, (built.get("note"), found.get("note")))),
    }


# ── speed ────────────────────────────────────────────────────────────────────────────────────────


def base(work: Work, threads: int) -> tuple[Path, Figures, Figures]:
    """Ours in one shard with the values of `vsearch.index`: its folder, its build, its curve."""
    values = (cells_for(work.rows), vsearch.index.ROWS_PER_CELL, vsearch.index.ITERATIONS)
    folder = work.folder / "-".join(map(str, ("ours", *values)))
    stored = folder / "figures.json"
    if not stored.exists():
        built = alone(threads, build_ours, work, folder, 1, *values)
        probed = alone(1, probe_ours, work, folder, 1)
        stored.write_text(json.dumps([built, probed]))
    built, probed = json.loads(stored.read_text())
    return folder, built, probed


def speed(
    work: Work,
    threads: int,
    engines: list[str],
    peer_python: str | None,
    autofaiss_python: str | None,
) -> list[Figures]:
    folder, built, probed = base(work, threads)
    setting = Setting(**probed["setting"])
    built["seconds"]["probe"] = probed["probe_s"]
    built["note"] = "" if probed["reached"] else "does not reach the recall asked for"
    one = alone(1, ask_ours, work, folder, 1, setting)
    shown = _in_words(setting)
    table = [summary("ours, 1 shard", work, built, one | {"setting": shown})]
    hits = work.load("found")

    values = (cells_for(work.rows), vsearch.index.ROWS_PER_CELL, vsearch.index.ITERATIONS)
    eight = work.folder / "ours-8"
    built = alone(threads, build_ours, work, eight, 8, *values)
    found = alone(1, ask_ours, work, eight, 8, setting)
    share = shares_found(list(work.load("found")), hits).mean()
    built["note"] = f"{share:.2%} of the hits of one shard"
    table.append(summary("ours, 8 shards", work, built, found | {"setting": shown}))
    for path in eight.iterdir():
        path.unlink()

    for kind in (k for k in ("flat", "hnsw") if k in engines):
        if kind == "hnsw" and work.rows > HNSW_MOST_ROWS:
            CONSOLE.print(f"HNSW is left out above {HNSW_MOST_ROWS} rows: its build takes hours.")
            continue
        path = work.folder / f"{kind}.faiss"
        built = alone(threads, build_faiss, work, path, kind)
        name = "exact, float32" if kind == "flat" else f"HNSW{HNSW_LINKS}"
        table.append(summary(name, work, built, alone(1, ask_faiss, work, path, kind)))
        path.unlink()

    if "lancedb" in engines:
        table += of_lancedb(work, peer_python)
    table += of_autofaiss(work, engines, one["ram_bytes"], autofaiss_python)
    return table


def of_lancedb(work: Work, python: str | None) -> list[Figures]:
    if python is None:
        CONSOLE.print("LanceDB is left out: --peer-python names no environment that has it.")
        return []
    try:
        folder = work.folder / "peer"
        built = run_peer("index_peer.py", python, "build", work, folder)
        disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        found = run_peer("index_peer.py", python, "ask", work, folder) | {"disk_bytes": disk}
    except (OSError, subprocess.CalledProcessError) as error:
        CONSOLE.print(f"LanceDB is left out: {error}")
        return []
    return [summary("LanceDB IVF_PQ", work, built, found) | {"curve": found["curve"]}]


def of_autofaiss(
    work: Work, engines: list[str], our_bytes: int, python: str | None
) -> list[Figures]:
    wanted = {f"autofaiss, {how}": how for name, how in AUTOFAISS.items() if name in engines}
    if wanted and python is None:
        CONSOLE.print("autofaiss is left out: --autofaiss-python names no environment with it.")
    if python is None:
        return []
    table: list[Figures] = []
    folder = work.folder / "autofaiss"
    for name, how in wanted.items():
        index_bytes = our_bytes if how == "our memory" else AUTOFAISS_BYTES
        asked_for = {"index_bytes": index_bytes, "mappable": "mappable" in how}
        try:
            built = run_peer("index_autofaiss.py", python, "build", work, folder, **asked_for)
            found = run_peer("index_autofaiss.py", python, "ask", work, folder)
        except (OSError, subprocess.CalledProcessError) as error:
            CONSOLE.print(f"{name} is left out: {error}")
            continue
        table.append(summary(name, work, built, found) | {"curve": found["curve"]})
        shutil.rmtree(folder)
    return table


def growth(figures: Figures) -> list[Figures]:
    """The exponents of each index over the made-up sizes: 1 where twice the rows take twice as much."""
    rows = [row for of_size in figures.values() for row in of_size.get("speed", ())]
    table = []
    for name in dict.fromkeys(row["index"] for row in rows):
        mine = [row for row in rows if row["index"] == name]
        if len({row["rows"] for row in mine}) < 2:
            continue
        values = {
            "build_s": [sum(v for k, v in r["build_s"].items() if "CPU" not in k) for r in mine],
            "build_cpu_s": [sum(v for k, v in r["build_s"].items() if "CPU" in k) for r in mine],
            "build_peak": [row["build_peak_mb"] for row in mine],
            "ram": [row["ram_bytes_a_vector"] * row["rows"] for row in mine],
            "p50": [row["p50_ms"] for row in mine],
        }
        sizes = np.log([row["rows"] for row in mine])
        slopes = {
            f"{what} exponent": round(float(np.polyfit(sizes, np.log(found), 1)[0]), 2)
            for what, found in values.items()
            if min(found) > 0
        }
        table.append({"index": name, "rows": str([row["rows"] for row in mine])} | slopes)
    return table


# ── filters ──────────────────────────────────────────────────────────────────────────────────────


def random_rows(rng: np.random.Generator, rows: int, kept: int) -> Mask:
    mask = np.zeros(rows, bool)
    mask[rng.choice(rows, kept, replace=False)] = True
    return mask


def whole_videos(rng: np.random.Generator, rows: int, kept: int) -> Mask:
    """Videos drawn at random, as many as have `kept` rows; the last one in part."""
    mask = np.zeros(rows, bool)
    left = kept
    for video in rng.permutation(math.ceil(rows / VIDEO_ROWS)):
        start = video * VIDEO_ROWS
        stop = min(start + VIDEO_ROWS, rows, start + left)
        mask[start:stop] = True
        left -= stop - start
        if not left:
            break
    return mask


KINDS = {"rows": random_rows, "videos": whole_videos}


def measure_filters(work: Work, folder: Path, setting: Setting, sizes: list[int]) -> list[Figures]:
    index = Index(open_shards(work, folder, 1), setting)
    text, vectors = work.load("text"), work.frames()
    usual = vsearch.index.SCANNED_ROWS
    table = []
    for kept in sizes:
        for kind, drawn in KINDS.items():
            rng = np.random.default_rng([kept, len(kind)])
            entry: Figures = {"rows": work.rows, "kept": kept, "kind": kind}
            found: dict[str, list[float]] = {}
            took: dict[str, list[float]] = {}
            for number in range(MASKS):
                mask = drawn(rng, work.rows, kept)
                queries = text[number::MASKS][:10]
                allowed = np.flatnonzero(mask)
                _, places = exact_search(vectors[allowed], queries, DEPTH)
                for way, scanned in (("as is", usual), ("scan", work.rows), ("index", -1)):
                    vsearch.index.SCANNED_ROWS = scanned
                    if way == "scan" and kept > SCANNED_AT_MOST:
                        continue
                    search = partial(index.search, k=DEPTH, allowed=[mask])
                    hits = [search(query)[2] for query in queries]
                    took.setdefault(way, []).extend(fastest_ms(search, q) for q in queries)
                    shares = shares_found(hits, allowed[places])
                    found.setdefault(way, []).extend(shares.tolist())
            vsearch.index.SCANNED_ROWS = usual
            for way in found:
                entry[f"recall_{way}"] = round(float(np.mean(found[way])), 4)
                entry[f"p50_{way}_ms"] = round(float(np.median(took[way])), 3)
            table.append(entry)
    return table


# ── updates ──────────────────────────────────────────────────────────────────────────────────────


def measure_updates(
    work: Work, folder: Path, trained_before: str, setting: Setting, seed: int
) -> list[Figures]:
    """A fifth deleted by whole videos, then a fifth added: half on known topics, half on others."""
    rng = np.random.default_rng([seed, 5])
    quantizer = Path(trained_before).read_bytes()
    known, others = world(seed), world(seed, topics_seed=1)
    deleted = whole_videos(rng, work.rows, work.rows // 5)
    shards, masks, cosines = open_shards(work, folder, 1), [~deleted], []
    for number, (name, about) in enumerate(zip(ADDED, (known, others), strict=True)):
        path, codes = folder / f"{name}.f16", folder / f"{name}.added"
        rows = work.rows // 10
        write_frames(about, rows, path, seed + 100 + number)
        added = np.memmap(path, np.float16, mode="r", shape=(rows, work.dim))
        cosines.append(encode(quantizer, added, codes)[0])
        shards.append(Shard(path, rows, work.dim, codes))
        masks.append(np.ones(rows, bool))
    whole, _ = vsearch.index.fit(quantizer, work.frames()[:: max(1, work.rows // 65536)])

    queries = {
        "text": work.load("text"),
        "text on new topics": sentences(others, TEXT_QUERIES // 2, seed + 200),
        "frames": work.load("frames"),
    }
    states = {
        "before": (shards[:1], [np.ones(work.rows, bool)], whole),
        "a fifth deleted": (shards[:1], masks[:1], whole),
        "and a tenth added, known topics": (shards[:2], masks[:2], cosines[0]),
        "and a tenth added, new topics": (shards, masks, cosines[1]),
    }
    table = []
    for state, (used, allowed, cosine) in states.items():
        entry = {"rows": work.rows, "state": state, "mean_cosine": round(cosine, 4)}
        table.append(entry | _of_shards(used, allowed, queries, setting))
    if work.rows // 5 <= FLAT_ROWS:  # as an update keeps so few rows
        flat = [Shard(folder / f"{name}.f16", work.rows // 10, work.dim) for name in ADDED]
        entry = table[-1] | {"state": "both added as flat shards"}
        table.append(entry | _of_shards([shards[0], *flat], masks, queries, setting))
        return table
    for per_hit in recall.PER_HIT:  # as an update is tuned anew
        for nprobe in (n for n in recall.nprobes_for(shards[0].nlist) if n >= setting.nprobe):
            if table[-1]["recall_200 text"] < recall.MIN_RECALL and per_hit > setting.per_hit:
                tuned = Setting(nprobe, per_hit)
                entry = table[-1] | {"state": f"both added, {_in_words(tuned)}"}
                table.append(entry | _of_shards(shards, masks, queries, tuned))
    return table


def _of_shards(
    shards: list[Shard], masks: list[Mask], queries: dict[str, Vectors], setting: Setting
) -> Figures:
    """Recall and latency on each kind of query, of the rows that the masks (one a shard) leave."""
    index = Index(shards, setting)
    full = all(mask.all() for mask in masks)
    search = partial(index.search, k=DEPTH, allowed=None if full else masks)
    figures: Figures = {}
    for name, asked_now in queries.items():
        shares, took_ms = [], []
        for query, expected in zip(asked_now, _exact_over(shards, masks, asked_now), strict=True):
            _, numbers, rows = search(query)
            took_ms.append(fastest_ms(search, query))
            found = set(zip(numbers.tolist(), rows.tolist(), strict=True))
            shares.append(len(found & expected) / len(expected))
        figures[f"recall_200 {name}"] = round(float(np.mean(shares)), 4)
        figures[f"p50_ms {name}"] = round(float(np.median(took_ms)), 3)
    return figures


def _exact_over(
    shards: list[Shard], allowed: list[Mask], queries: Vectors
) -> list[set[tuple[int, int]]]:
    """The true (shard, row) of each query."""
    scores, places = [], []
    for number, (shard, mask) in enumerate(zip(shards, allowed, strict=True)):
        rows = np.flatnonzero(mask)
        of_shard, found = exact_search(
            shard.vectors if mask.all() else shard.vectors[rows], queries, DEPTH
        )
        scores.append(of_shard)
        places.append(np.stack([np.full_like(found, number), rows[found]], -1))
    order = np.argsort(-np.concatenate(scores, 1), axis=1, kind="stable")[:, :DEPTH]
    best = np.take_along_axis(np.concatenate(places, 1), order[..., None], 1)
    return [set(map(tuple, rows)) for rows in best.tolist()]


# ── training ─────────────────────────────────────────────────────────────────────────────────────


def training(work: Work, threads: int, variants: list[tuple[int, int, int]]) -> list[Figures]:
    """What each (nlist, rows per cell, iterations) gives; the first row is what is in use."""
    values = (cells_for(work.rows), vsearch.index.ROWS_PER_CELL, vsearch.index.ITERATIONS)
    _, built, probed = base(work, threads)
    table = [_trained(work, values, built, probed)]
    for variant in variants:
        if variant == values:
            continue
        folder = work.folder / "variant"
        built = alone(threads, build_ours, work, folder, 1, *variant)
        probed = alone(1, probe_ours, work, folder, 1)
        table.append(_trained(work, variant, built, probed))
    ms = table[0]["p50_ms"]
    for entry in table:
        entry["recall_at_equal_ms"] = round(_recall_within(entry["curve"], ms), 4)
    return table


def _trained(work: Work, variant: tuple[int, int, int], built: Figures, probed: Figures) -> Figures:
    setting = probed["setting"]
    point = next(p for p in probed["curve"] if setting.items() <= p.items())
    return {
        "rows": work.rows,
        **dict(zip(("nlist", "rows_per_cell", "iterations"), variant, strict=True)),
        "train_cpu_s": round(built["seconds"]["train (CPU)"], 2),
        "encode_cpu_s": round(built["seconds"]["encode (CPU)"], 2),
        "mean_cosine": round(built["mean_cosine"], 4),
        **setting,
        **{name: point[name] for name in ("recall_200_text", "worst_text", "p50_ms")},
        "reached": probed["reached"],
        "curve": probed["curve"],
    }


def _recall_within(curve: list[Figures], ms: float) -> float:
    """The recall on text of a search of so many milliseconds, between the points of a curve."""
    best: list[tuple[float, float]] = []
    for point in sorted(curve, key=lambda p: p["p50_ms"]):
        if not best or point["recall_200_text"] > best[-1][1]:
            best.append((point["p50_ms"], point["recall_200_text"]))
    return float(np.interp(ms, *zip(*best, strict=True)))


def variants_for(rows: int) -> list[tuple[int, int, int]]:
    nlist = cells_for(rows)
    return [
        (nlist, 100, 4),
        (nlist, 50, 10),
        (nlist, 39, 6),
        (nlist // 2, 100, 10),
        (nlist // 2, 50, 6),
        (nlist // 4, 50, 6),
    ]


# ── all of it ────────────────────────────────────────────────────────────────────────────────────


def show(title: str, rows: list[Figures], leave_out: tuple[str, ...] = ("curve",)) -> None:
    if not rows:
        return
    names = [name for name in rows[0] if name not in leave_out]
    table = Table(*(name.replace("_", " ") for name in names), title=title)
    for row in rows:
        values = (row.get(name, "") for name in names)
        table.add_row(*("" if value is None else _shown(value) for value in values))
    CONSOLE.print(table)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def targets(rows: list[Figures]) -> list[Figures]:
    """What ought to hold, for each row that an exact search stands beside."""
    exact = {row["rows"]: row["p50_ms"] for row in rows if row["index"].startswith("exact")}
    return [
        {
            "rows": row["rows"],
            "index": row["index"],
            "recall@200 text ≥ 0.97": row["recall_200_text"] >= 0.97,
            "RAM ≤ 200 B/vector": row["ram_bytes_a_vector"] <= 200,
            "faster than exact": round(exact[row["rows"]] / row["p50_ms"], 1),
            "p50 ≤ 1/8 of exact": 8 * row["p50_ms"] <= exact[row["rows"]],
        }
        for row in rows
        if row["rows"] in exact
    ]


def measured(part: str, work: Work, arguments: argparse.Namespace) -> list[Figures]:
    if part == "speed":
        pythons = arguments.peer_python, arguments.autofaiss_python
        return speed(work, arguments.threads, arguments.engines, *pythons)
    if part == "training":
        return training(work, arguments.threads, variants_for(work.rows))
    folder, built, probed = base(work, arguments.threads)
    setting = Setting(**probed["setting"])
    if part == "updates":
        known = (work, folder, built["quantizer"], setting, arguments.seed)
        return list(alone(1, measure_updates, *known))
    sizes = {round(share * work.rows) for share in SHARES} | set(KEPT_ROWS)
    kept = sorted((size for size in sizes if size <= work.rows), reverse=True)
    return list(alone(1, measure_filters, work, folder, setting, kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--corpus", help="measure with the vectors of this corpus as well")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=ENGINES)
    parser.add_argument("--json", type=Path, help="figures go here; those of other parts are kept")
    parser.add_argument("--folder", type=Path, help="keeps what is made, for the next time")
    parser.add_argument("--peer-python", help="the Python of an environment that has lancedb")
    parser.add_argument("--autofaiss-python", help="the same, of one that has autofaiss")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of a build")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    figures: Figures = {}
    if arguments.json and arguments.json.exists():
        figures = json.loads(arguments.json.read_text())
    with tempfile.TemporaryDirectory() as temporary:
        home = arguments.folder or Path(temporary)
        works: list[tuple[str, Callable[..., Work], tuple[Any, ...]]] = [
            (str(rows), made_up, (home / str(rows), rows, arguments.seed))
            for rows in arguments.rows
        ]
        if arguments.corpus:
            works.append((arguments.corpus, of_corpus, (home / "corpus", arguments.corpus)))
        for name, make, described_by in works:
            work = alone(1, make, *described_by)
            parts = [p for p in arguments.parts if name != arguments.corpus or p != "updates"]
            for part in parts:
                began = time.perf_counter()
                rows = measured(part, work, arguments)
                show(f"{part}: {name}", rows)
                if part == "speed":
                    show(f"targets: {name}", targets(rows))
                if part == "speed":  # other engines were perhaps measured before
                    new = {row["index"] for row in rows}
                    kept = figures.get(name, {}).get(part, [])
                    rows = [*rows, *(row for row in kept if row["index"] not in new)]
                figures.setdefault(name, {})[part] = rows
                figures[name].setdefault("took_s", {})[part] = round(time.perf_counter() - began, 1)
                if arguments.json:
                    arguments.json.write_text(json.dumps(figures, indent=1))
    show("growth", growth({name: f for name, f in figures.items() if name.isdigit()}))


if __name__ == "__main__":
    main()
