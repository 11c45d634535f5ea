"""autofaiss over the vectors of `benchmarks/index.py`, which runs this in an environment that has it.

    python index_autofaiss.py build|ask WORK_JSON

WORK_JSON names the vectors, the queries, their true rows and the memory that an index may take; what was
measured is printed as JSON. autofaiss brings a FAISS of its own: no process may load two.
"""

import ctypes
import gc
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import autofaiss
import faiss
import numpy as np

THREADS = 2
TUNED_ON = 50
DEPTH = 200
LOOKS = {
    "nprobe": (16, 32, 64, 128, 256, 512, 1024),
    "efSearch": (200, 400, 800, 1600, 3200, 6400),
}
REPEATS = 3


_OPQMatrix = faiss.OPQMatrix
# autofaiss 2.18 names the arguments, which FAISS 1.15 no longer knows by name.
faiss.OPQMatrix = lambda d, M=1, d2=-1: _OPQMatrix(d, M, d2)  # noqa: N803


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def build(work: dict) -> dict:
    """Its own choice of an index, training, adding and tuning, of a folder with one .npy in float16."""
    folder = Path(work["folder"]) / "npy"
    folder.mkdir(exist_ok=True)
    vectors = np.memmap(work["vectors"], np.float16, mode="r", shape=(work["rows"], work["dim"]))
    np.save(folder / "0.npy", vectors)
    began, worked = time.perf_counter(), time.process_time()
    autofaiss.build_index(
        str(folder),
        index_path=str(Path(work["folder"]) / "knn.index"),
        index_infos_path=str(Path(work["folder"]) / "infos.json"),
        max_index_memory_usage=f"{work['index_bytes'] / 1e6:.0f}MB",
        current_memory_available="4GB",
        should_be_memory_mappable=work["mappable"],
        metric_type="ip",
        nb_cores=THREADS,
        verbose=30,
    )
    took = {"all": time.perf_counter() - began, "all (CPU)": time.process_time() - worked}
    (folder / "0.npy").unlink()
    infos = json.loads((Path(work["folder"]) / "infos.json").read_text())
    return {
        "seconds": took,
        "peak_bytes": status_bytes("VmHWM"),
        "note": f"autofaiss {version('autofaiss')}, {infos['index_key']}",
    }


def ask(work: dict) -> dict:
    faiss.omp_set_num_threads(1)
    text, frames = np.load(work["text"]), np.load(work["frames"])
    truth_text, truth_frames = np.load(work["truth_text"]), np.load(work["truth_frames"])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status_bytes("RssAnon")
    index = faiss.read_index(str(Path(work["folder"]) / "knn.index"))
    space = faiss.ParameterSpace()
    kind = "efSearch" if "HNSW" in type(faiss.downcast_index(index)).__name__ else "nprobe"

    def measured(queries: np.ndarray, truth: np.ndarray) -> tuple[list, list, list]:
        at_200, at_10, took_ms = [], [], []
        for query, expected in zip(queries, truth, strict=True):
            took = []
            for _ in range(REPEATS):
                began = time.perf_counter()
                found = index.search(query[None], DEPTH)[1][0]
                took.append((time.perf_counter() - began) * 1000)
            took_ms.append(min(took))
            at_200.append(len(np.intersect1d(found, expected)) / len(expected))
            at_10.append(len(np.intersect1d(found, expected[:10])) / len(expected[:10]))
        return at_200, at_10, took_ms

    curve, note = [], "does not reach the recall asked for"
    for look in LOOKS[kind]:
        space.set_index_parameter(index, kind, look)
        recall, _, took_ms = measured(text[:TUNED_ON], truth_text[:TUNED_ON])
        curve.append((float(np.median(took_ms)), float(np.mean(recall)), look))
        if curve[-1][1] >= work["min_recall"]:
            note = ""
            break
        if len(curve) > 2 and curve[-1][1] < curve[-2][1] + 0.001:
            break  # the codes are what is missing, not the cells
    return {
        "setting": f"{kind} {look}",
        "text": measured(text, truth_text),
        "frames": measured(frames, truth_frames),
        "ram_bytes": status_bytes("RssAnon") - before,
        "disk_bytes": (Path(work["folder"]) / "knn.index").stat().st_size,
        "curve": curve,
        "note": note,
    }


if __name__ == "__main__":
    asked_for = json.loads(Path(sys.argv[2]).read_text())
    print(json.dumps({"build": build, "ask": ask}[sys.argv[1]](asked_for)))
