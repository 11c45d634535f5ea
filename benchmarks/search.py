"""Search alone, beside LanceDB, Milvus Lite and Qdrant's local mode: the same vectors, queries and run.

Method: vectors and sentences of `vectors.py`, as in `benchmarks/index.py`; the 200 best of 200 queries,
one at a time, on one thread, each engine in a process of its own; after a first round that does not
count each query is asked once. An engine with a setting is tuned on a part of the queries to a mean
recall@200 of 0.97 against exact search; ours takes the setting that a build would choose. An engine
that needs more than `--limit-s` seconds to build and answer, or more than `--limit-gb` of memory, is
ended, and the table says so.

    python benchmarks/search.py --peer-python PEER_ENV/bin/python --folder /tmp/search --json out.json
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from index import (
    DEPTH,
    Figures,
    Search,
    Work,
    alone,
    base,
    made_up,
    open_shards,
    request,
    shares_found,
    show,
    status_bytes,
)

from vsearch import recall
from vsearch.index import Index
from vsearch.sizing import Setting

PEERS = ("lancedb", "milvus", "qdrant")
HERE = Path(__file__).parent


def row(engine: str, work: Work, build_s: float, found: Figures) -> Figures:
    shares, took_ms = np.array(found["recall"]), np.array(found["took_ms"])
    return {
        "rows": work.rows,
        "engine": engine,
        "build_s": round(build_s, 1),
        "ram_mb": round(found["ram_bytes"] / 1e6),
        "recall_200": round(float(shares.mean()), 4),
        "worst_5%": round(float(np.sort(shares)[: len(shares) // 20].mean()), 4),
        "p50_ms": round(float(np.median(took_ms)), 2),
        "p95_ms": round(float(np.percentile(took_ms, 95)), 2),
        "p99_ms": round(float(np.percentile(took_ms, 99)), 2),
        "setting": found["setting"],
        "note": found["note"],
    }


def ask_ours(work: Work, folder: Path, setting: Setting) -> Figures:
    before = status_bytes("RssAnon")
    index = Index(open_shards(work, folder, 1), setting)

    def search(query: Any) -> Any:
        return index.search(query, DEPTH)[2]

    queries = work.load("text")
    asked(search, queries)
    found, took_ms = asked(search, queries)
    return {
        "recall": shares_found(found, work.load("truth_text")).tolist(),
        "took_ms": took_ms,
        "ram_bytes": status_bytes("RssAnon") - before,
        "setting": f"nprobe {setting.nprobe}, per_hit {setting.per_hit}",
        "note": "exact scores from fp16 rows on disk",
    }


def asked(search: Search, queries: Any) -> tuple[list[Any], list[float]]:
    found, took_ms = [], []
    for query in queries:
        began = time.perf_counter()
        found.append(search(query))
        took_ms.append((time.perf_counter() - began) * 1000)
    return found, took_ms


def ours(work: Work, threads: int) -> Figures:
    folder, built, probed = base(work, threads)
    seconds = built["seconds"]
    found = alone(1, ask_ours, work, folder, Setting(**probed["setting"]))
    return row("vsearch", work, seconds["train"] + seconds["encode"] + probed["probe_s"], found)


def lancedb(work: Work, python: str, limits: tuple[float, float]) -> Figures:
    path = request(work, work.folder / "lancedb")
    script = str(HERE / "index_peer.py")
    built = watched([python, script, "build", str(path)], *limits)
    found = watched([python, script, "ask", str(path)], *limits)
    text, _, took_ms = found["text"]
    known = {"recall": text, "took_ms": took_ms, "note": built["note"]}
    return row("LanceDB", work, sum(built["seconds"].values()), found | known)


def other(which: str, work: Work, python: str, limits: tuple[float, float]) -> Figures:
    path = request(work, work.folder / which)
    found = watched([python, str(HERE / "search_peer.py"), which, str(path)], *limits)
    return row(which, work, found["build_s"], found)


def watched(command: list[str], limit_s: float, limit_gb: float) -> Figures:
    """What a command prints last, as JSON. Raises `TimeoutError` or `MemoryError` at a limit."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        began, seen = time.monotonic(), psutil.Process(process.pid)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if time.monotonic() - began > limit_s:
                    raise TimeoutError(f"not done within {limit_s:g} s")
                family = [seen, *seen.children(recursive=True)]
                if sum(one.memory_info().rss for one in family) > limit_gb * 1e9:
                    raise MemoryError(f"more than {limit_gb:g} GB of memory")
        except psutil.NoSuchProcess:  # it ended meanwhile
            pass
        except (TimeoutError, MemoryError):
            process.kill()
            raise
        printed = process.communicate()[0]
    if process.returncode:
        raise OSError(f"ended with {process.returncode}")
    return dict(json.loads(printed.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--peer-python", help="the Python of an environment that has the peers")
    parser.add_argument("--limit-s", type=float, default=300.0)
    parser.add_argument("--limit-gb", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of our build")
    parser.add_argument("--folder", type=Path, help="keeps what is made, for the next time")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    limits = (arguments.limit_s, arguments.limit_gb)
    table: list[Figures] = []
    with tempfile.TemporaryDirectory() as temporary:
        home = arguments.folder or Path(temporary)
        for rows in arguments.rows:
            work = alone(1, made_up, home / str(rows), rows, 0)
            table.append(ours(work, arguments.threads))
            for peer in arguments.peers if arguments.peer_python else ():
                try:
                    python = arguments.peer_python
                    if peer == "lancedb":
                        table.append(lancedb(work, python, limits))
                    else:
                        table.append(other(peer, work, python, limits))
                except (OSError, MemoryError) as error:  # TimeoutError is an OSError
                    table.append({"rows": rows, "engine": peer, "note": str(error)})
                if arguments.json:
                    about = {"min_recall": recall.MIN_RECALL, "rows": table}
                    arguments.json.write_text(json.dumps(about, indent=1) + "\n")
    show("search alone", table)


if __name__ == "__main__":
    main()
