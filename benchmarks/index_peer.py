"""LanceDB over the vectors of `benchmarks/index.py`, which runs this in an environment that has it.

    python index_peer.py build|ask WORK_JSON

WORK_JSON names the vectors, the queries and their true rows; what was measured is printed as JSON.
"""

import json
import os
import sys
import time
from pathlib import Path

THREADS = "2" if sys.argv[1] == "build" else "1"
for name in ("LANCE_CPU_THREADS", "LANCE_IO_THREADS", "TOKIO_WORKER_THREADS", "RAYON_NUM_THREADS"):
    os.environ[name] = THREADS

import lancedb  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402

BATCH = 1 << 16
SUB_VECTORS = 64
NPROBES = (16, 32, 64, 128, 256)
REFINES = (5, 10, 20, 50)
TUNED_ON = 50
DEPTH = 200


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def build(work: dict) -> dict:
    rows, dim = work["rows"], work["dim"]
    vectors = np.memmap(work["vectors"], np.float16, mode="r", shape=(rows, dim))
    schema = pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.float32(), dim))])

    def batches():
        for start in range(0, rows, BATCH):
            part = np.asarray(vectors[start : start + BATCH], np.float32)
            column = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), dim)
            ids = pa.array(np.arange(start, start + len(part)))
            yield pa.record_batch([ids, column], schema=schema)

    began = time.perf_counter()
    reader = pa.RecordBatchReader.from_batches(schema, batches())
    table = lancedb.connect(work["folder"]).create_table("rows", reader, schema=schema)
    written = time.perf_counter()
    table.create_index(
        metric="dot",
        num_partitions=work["nlist"],
        num_sub_vectors=SUB_VECTORS,
        vector_column_name="vector",
    )
    done = time.perf_counter()
    return {
        "seconds": {"write": written - began, "train and encode": done - written},
        "peak_bytes": status_bytes("VmHWM"),
        "note": f"lancedb {lancedb.__version__}, IVF{work['nlist']} PQ{SUB_VECTORS}x8, float32 rows",
    }


def ask(work: dict) -> dict:
    text, frames = np.load(work["text"]), np.load(work["frames"])
    truth_text, truth_frames = np.load(work["truth_text"]), np.load(work["truth_frames"])
    before = status_bytes("RssAnon")
    table = lancedb.connect(work["folder"]).open_table("rows")

    def search(query: np.ndarray, nprobe: int, refine: int) -> np.ndarray:
        asked = table.search(query, vector_column_name="vector").distance_type("dot")
        asked = asked.nprobes(nprobe).refine_factor(refine).limit(DEPTH).select(["id", "_distance"])
        return asked.to_arrow()["id"].to_numpy()

    def measured(queries: np.ndarray, truth: np.ndarray, *setting: int) -> tuple[list, list, list]:
        at_200, at_10, took_ms = [], [], []
        for query, expected in zip(queries, truth, strict=True):
            began = time.perf_counter()
            found = search(query, *setting)
            took_ms.append((time.perf_counter() - began) * 1000)
            at_200.append(len(np.intersect1d(found, expected)) / len(expected))
            at_10.append(len(np.intersect1d(found, expected[:10])) / len(expected[:10]))
        return at_200, at_10, took_ms

    curve, best = [], None
    for refine in REFINES:
        for nprobe in (n for n in NPROBES if n <= work["nlist"]):
            recall, _, took_ms = measured(text[:TUNED_ON], truth_text[:TUNED_ON], nprobe, refine)
            point = (float(np.median(took_ms)), float(np.mean(recall)), nprobe, refine)
            curve.append(point)
            enough = point[1] >= work["min_recall"]
            if enough and (best is None or point < best):
                best = point
            if enough:
                break
    note = "" if best else "does not reach the recall asked for"
    best = best or max(curve, key=lambda p: p[1])
    measured(text, truth_text, *best[2:])
    of_text, of_frames = (
        measured(queries, truth, *best[2:])
        for queries, truth in ((text, truth_text), (frames, truth_frames))
    )
    return {
        "setting": f"nprobe {best[2]}, refine {best[3]}",
        "text": of_text,
        "frames": of_frames,
        "ram_bytes": status_bytes("RssAnon") - before,
        "curve": curve,
        "note": note,
    }


if __name__ == "__main__":
    asked_for = json.loads(Path(sys.argv[2]).read_text())
    print(json.dumps({"build": build, "ask": ask}[sys.argv[1]](asked_for)))
