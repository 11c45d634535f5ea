"""What an update of a large index costs: seconds of `vsearch index` after small changes.

Method: the CLIP vectors of a corpus (of a tiny world, as `vsearch demo` leaves it) are multiplied to so
many frames, each copy of a video turned a little its own way and each frame shaken, and stored as the
frames files of a new corpus; nothing is decoded or embedded. It is indexed, a row a frame; then it is
changed, step by step, and indexed again after each. A step is a process of its own, as a command is, so
its seconds hold the start of Ray as well. The recall is that which a snapshot was published with: that
of its coded shards, what is flat is exact.

    python benchmarks/updates.py --like demo-archive/corpus --rows 1000000 --json out.json
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from vsearch.corpus import Corpus, vector_matrix
from vsearch.schema import VIDEOS, SpanRecord, frames_schema

FPS = 25
COPY, FRAME = 0.05, 0.01
"""Squared lengths, to a frame's 1, by which a copy of a video and each of its frames are moved."""
ADDED, MANY = 10, 80
FILE_FRAMES = 100_000

Vectors = NDArray[np.float32]


def videos_of(corpus: Corpus) -> list[Vectors]:
    """The CLIP vectors (frames, dim) of each video."""
    found: dict[str, list[Vectors]] = {}
    for name in corpus.files("frames"):
        for table in corpus.frames(name, ["video_id", "clip"]):
            ids = table["video_id"].to_numpy(zero_copy_only=False)
            vectors = vector_matrix(table["clip"]).astype(np.float32)
            for video in np.unique(ids):
                found.setdefault(video, []).append(vectors[ids == video])
    return [np.concatenate(parts) for parts in found.values()]


def copy_of(vectors: Vectors, seed: int) -> NDArray[np.float16]:
    """Unit vectors float16 (frames, dim) like those of a video."""
    rng = np.random.default_rng(seed)
    frames, dim = vectors.shape
    moved = vectors + np.sqrt(COPY / dim) * rng.standard_normal(dim, np.float32)
    moved += np.sqrt(FRAME / dim) * rng.standard_normal((frames, dim), np.float32)
    return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float16)


def video_row(name: str, frames: int, status: str = "ok") -> dict[str, Any]:
    now = datetime.now(UTC)
    return {
        "uri": f"/videos/{name}.mp4", "source": "/videos", "tags": {}, "video_id": name,
        "size_bytes": frames, "etag": "1", "fps": float(FPS), "start_s": 0.0,
        "duration_s": frames / FPS, "zero_s": 0.0, "span_s": frames / FPS + 1, "expected_spans": 1,
        "seekable": True, "recorded_at": now, "recorded_at_source": "mtime", "ingested_at": now,
        "status": status, "attempts": 1, "quarantined": False,
    }  # fmt: skip


def videos(like: list[Vectors], first: int) -> Iterator[tuple[str, NDArray[np.float16]]]:
    """Endless copies, numbered from `first`."""
    for number in range(first, sys.maxsize):
        yield f"v{number:06d}", copy_of(like[number % len(like)], number)


def store(corpus: Corpus, made: list[tuple[str, NDArray[np.float16]]]) -> None:
    """Adds videos of one span each, with their frames in one file."""
    dino_dim, dim = corpus.config.dino.dim, corpus.config.clip.dim
    tables, records, rows = [], [], []
    for name, clip in made:
        count = len(clip)
        pts_s = np.arange(count) / FPS
        nothing = pa.array(np.zeros(dino_dim * count, np.float16))
        columns = [
            pa.array([name] * count),
            pa.array([f"{name}-0"] * count),
            pa.array(np.zeros(count, np.int32)),
            pa.array(np.arange(count, dtype=np.int32)),
            pa.array(pts_s),
            pa.FixedSizeListArray.from_arrays(nothing, dino_dim),
            pa.FixedSizeListArray.from_arrays(pa.array(clip.reshape(-1)), dim),
        ]
        tables.append(pa.table(columns, schema=frames_schema(dino_dim, dim)))
        records.append(SpanRecord(name, f"{name}-0", 0, count, pts_s[-1], True, embedded=count))
        rows.append(video_row(name, count))
    corpus.add_frames(pa.concat_tables(tables), records)
    corpus.add_videos(pa.Table.from_pylist(rows, schema=VIDEOS))


def fill(corpus: Corpus, like: list[Vectors], rows: int) -> int:
    """Stores videos of about so many frames; gives how many videos."""
    waiting: list[tuple[str, NDArray[np.float16]]] = []
    done = stored = 0
    for video in videos(like, 0):
        waiting.append(video)
        stored += len(video[1])
        if stored >= rows or sum(len(clip) for _, clip in waiting) >= FILE_FRAMES:
            store(corpus, waiting)
            done, waiting = done + len(waiting), []
        if stored >= rows:
            return done
    raise AssertionError("copies never end")


def index(url: str, min_recall: float) -> dict[str, Any]:
    from vsearch.build_index import build_index
    from vsearch.snapshots import Snapshots

    began = time.perf_counter()
    summary = build_index(url, space="clip", rows="frames", min_recall=min_recall)
    took_s = time.perf_counter() - began
    manifest = Snapshots(Corpus(url)).manifest(summary.snapshot)
    tuning = manifest["tuning"]
    chosen = (
        [p for p in tuning["curve"] if tuning["setting"].items() <= p.items()] if tuning else []
    )
    return {
        "seconds": round(took_s, 1),
        "rows": summary.rows,
        "new shards": f"{summary.shards_new} of {summary.shards}",
        "recall@200 text": round(chosen[0]["recall_200_text"], 6) if chosen else 1.0,
        "peak MB of the command": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }


def alone(function: Any, *arguments: Any) -> Any:
    """In a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--like", required=True, help="the corpus whose vectors are multiplied")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--min-recall", type=float, default=0.97)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    source = Corpus(arguments.like)
    like = videos_of(source)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(folder)
        corpus.require(source.config)
        count = fill(corpus, like, arguments.rows)
        steps: dict[str, dict[str, Any]] = {}

        def step(name: str) -> None:
            steps[name] = alone(index, folder, arguments.min_recall)

        step("from nothing")
        step("nothing changed")
        more = videos(like, count)
        store(corpus, [next(more) for _ in range(ADDED)])
        step(f"{ADDED} videos added")
        store(corpus, [next(more)])
        step("one more added")
        store(corpus, [next(more) for _ in range(MANY)])
        step(f"{MANY} more added")
        gone = [video_row(f"v{number:06d}", 1, "gone") for number in range(ADDED)]
        corpus.add_videos(pa.Table.from_pylist(gone, schema=VIDEOS))
        step(f"{ADDED} removed")
    table = Table(title=f"Updates of an index of {arguments.rows:,} rows")
    for heading in ("", *next(iter(steps.values()))):
        table.add_column(heading, justify="right")
    for name, found in steps.items():
        table.add_row(name, *map(str, found.values()))
    Console(stderr=True).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(steps, indent=1) + "\n")


if __name__ == "__main__":
    main()
