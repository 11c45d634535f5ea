"""Milvus Lite and Qdrant's local mode over the vectors of `benchmarks/search.py`, which runs this in an
environment that has them.

    python search_peer.py milvus|qdrant WORK_JSON

WORK_JSON names the vectors, the queries, their true rows and a folder; what was measured is printed as
JSON. Milvus Lite has an IVF_FLAT index, whose nprobe is tuned; Qdrant's local mode compares all vectors
by NumPy, so it is exact.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import numpy as np  # noqa: E402

BATCH = 5_000
NPROBES = (16, 32, 64, 128, 256, 512, 1024)
TUNED_ON = 50
DEPTH = 200


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def batches(work: dict):
    shape = (work["rows"], work["dim"])
    vectors = np.memmap(work["vectors"], np.float16, mode="r", shape=shape)
    for start in range(0, len(vectors), BATCH):
        yield start, np.asarray(vectors[start : start + BATCH], np.float32)


def open_milvus(work: dict) -> tuple[Callable, tuple[int, ...], str]:
    from importlib.metadata import version

    from pymilvus import DataType, MilvusClient

    client = MilvusClient(str(Path(work["folder"]) / "milvus.db"))
    schema = client.create_schema(auto_id=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=work["dim"])
    client.create_collection("rows", schema=schema)
    for start, part in batches(work):
        rows = [{"id": start + n, "vector": vector} for n, vector in enumerate(part)]
        client.insert("rows", rows)
    client.flush("rows")
    index = client.prepare_index_params()
    params = {"nlist": work["cells"]}
    index.add_index("vector", index_type="IVF_FLAT", metric_type="IP", params=params)
    client.create_index("rows", index)
    client.load_collection("rows")

    def search(query: np.ndarray, nprobe: int) -> np.ndarray:
        asked = {"metric_type": "IP", "params": {"nprobe": nprobe}}
        found = client.search("rows", data=[query], limit=DEPTH, search_params=asked)
        return np.array([hit["id"] for hit in found[0]])

    told = f"milvus-lite {version('milvus-lite')}, IVF_FLAT, nlist {work['cells']}"
    return search, NPROBES, told


def open_qdrant(work: dict) -> tuple[Callable, tuple[int, ...], str]:
    from importlib.metadata import version

    from qdrant_client import QdrantClient, models

    client = QdrantClient(":memory:")
    form = models.VectorParams(size=work["dim"], distance=models.Distance.DOT)
    client.create_collection("rows", vectors_config=form)
    for start, part in batches(work):
        ids = list(range(start, start + len(part)))
        client.upload_collection("rows", vectors=part, ids=ids)

    def search(query: np.ndarray, _: int) -> np.ndarray:
        found = client.query_points("rows", query=query, limit=DEPTH, with_payload=False)
        return np.array([point.id for point in found.points])

    return search, (0,), f"qdrant-client {version('qdrant-client')}, local mode: exact, by NumPy"


def measured(search: Callable, queries: np.ndarray, truth: np.ndarray, nprobe: int) -> tuple:
    found, took_ms = [], []
    for query in queries:
        began = time.perf_counter()
        found.append(search(query, nprobe))
        took_ms.append((time.perf_counter() - began) * 1000)
    at_200 = [len(np.intersect1d(f, t)) / len(t) for f, t in zip(found, truth, strict=True)]
    return at_200, took_ms


def main() -> None:
    which, work = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    text, truth = np.load(work["text"]), np.load(work["truth_text"])
    before, began = status_bytes("RssAnon"), time.perf_counter()
    search, settings, note = {"milvus": open_milvus, "qdrant": open_qdrant}[which](work)
    build_s = time.perf_counter() - began
    for setting in settings:
        recall, _ = measured(search, text[:TUNED_ON], truth[:TUNED_ON], setting)
        if np.mean(recall) >= work["min_recall"]:
            break
    recall, took_ms = measured(search, text, truth, setting)
    found = {
        "note": note,
        "setting": f"nprobe {setting}" if setting else "",
        "build_s": build_s,
        "ram_bytes": status_bytes("RssAnon") - before,
        "recall": recall,
        "took_ms": took_ms,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
