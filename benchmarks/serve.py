"""The service under load, while its index changes and a part of it dies: is every answer right, and how
long does it take?

Method: the corpus (of a tiny world, as `vsearch demo` leaves it) gets two snapshots, a row a frame and
a row a moment, of several shards. Each sentence is answered by an engine of this program for each
snapshot: that is what the service must say, to the digit. A process of its own then offers queries at
a fixed rate, whatever comes back (an open loop; a latency counts from when a query was due). Within
the run the snapshot is rolled back, changed again, and where the index is in parts one of them gets
`kill -9`. An answer is *wrong* if it differs from the engine's for the snapshot that it names, *lost*
if there is none or it is neither 200 nor 429. One that is partial must be a part of the engine's.

    python benchmarks/serve.py --corpus demo-archive/corpus --rate 200 --haproxy --json out.json
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import random
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

import vsearch
from vsearch.build_index import build_index
from vsearch.corpus import Corpus
from vsearch.snapshots import Snapshots

CONSOLE = Console(stderr=True, width=160)
SHARD_FRAMES = 4096
LIMIT = 12
DEEP = 1000
"""More than there are: what one part alone gives may be far down in the whole answer."""
MODES = {"one process": 1, "4 parts": 4}
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
THINGS = ("a car", "a house", "a tree", "a boat", "a star", "a ball", "a dog", "a person", "a bird")
PLACES = ("on the beach", "at night", "in the snow", "in the city", "on grass", "in the rain", "")
LATENCIES = (50, 95, 99)
CLOSE = 1e-5
"""Scores of a sentence differ so much by which others it was encoded with."""

Figures = dict[str, Any]


def sentences(count: int) -> list[str]:
    """So many different ones."""
    found = (
        f"{thing.replace('a ', f'a {colour} ', 1)} {place} {number or ''}".strip()
        for number in itertools.count()
        for colour in COLOURS
        for thing in THINGS
        for place in PLACES
    )
    return list(itertools.islice(found, count))


def free_port() -> int:
    """One that nobody listens at, from below those that the system gives to outgoing connections."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError("no port is free")


@dataclass(frozen=True)
class Reply:
    sentence: int
    status: int
    took_ms: float
    at_s: float
    body: dict[str, Any] | None


async def _offer(address: str, queries: list[str], rate: float, seconds: float) -> list[Reply]:
    replies: list[Reply] = []

    async def ask(number: int, due: float, session: aiohttp.ClientSession) -> None:
        sentence = number % len(queries)
        status, body = 0, None
        try:
            parameters = {"q": queries[sentence], "limit": LIMIT}
            async with session.get(f"{address}v1/search", params=parameters) as response:
                status = response.status
                if status == 200:
                    body = await response.json()
        except (aiohttp.ClientError, TimeoutError):
            pass  # status 0: lost
        now = time.perf_counter()
        replies.append(Reply(sentence, status, (now - due) * 1000, due - began, body))

    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for number in range(int(rate * seconds)):
                due = began + number / rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.create_task(ask(number, due, session))
    return replies


def offer(address: str, queries: list[str], rate: float, seconds: float) -> list[Reply]:
    """The replies to an open loop of queries."""
    return asyncio.run(_offer(address, queries, rate, seconds))


def expected(corpus: str, versions: list[str], queries: list[str]) -> dict[str, list[Any]]:
    """What an engine says to each query, as many segments as there are, by snapshot."""
    truth = {}
    for version in versions:
        engine = vsearch.open(corpus, version)
        vectors = engine.encoder.encode_text(queries)
        truth[version] = [
            [segment.to_dict() for segment in engine.search_vector(vector, DEEP)]
            for vector in vectors
        ]
    return truth


def verdict(reply: Reply, truth: dict[str, list[Any]]) -> str:
    if reply.status == 429:
        return "refused"
    if reply.status != 200 or reply.body is None:
        return "lost"
    wanted = truth[reply.body["snapshot"]][reply.sentence]
    given = reply.body["segments"]
    if reply.body["partial"]:
        return "partial" if all(_among(segment, wanted) for segment in given) else "wrong"
    there = all(_among(segment, wanted) for segment in given)
    scores = [[segment["score"] for segment in some] for some in (given, wanted[:LIMIT])]
    right = there and len(scores[0]) == len(scores[1]) and np.allclose(*scores, atol=CLOSE)
    return "right" if right else "wrong"


def _among(segment: dict[str, Any], wanted: list[Any]) -> bool:
    # Not `best_s`: neighbours that look the same differ by less than what a score is known to.
    names = ("video_id", "start_s", "end_s")
    return any(
        all(segment[name] == other[name] for name in names)
        and abs(segment["score"] - other["score"]) < CLOSE
        for other in wanted
    )


def kill_a_part() -> int:
    """Ends a replica of a part without grace; gives its process id."""
    below = psutil.Process().children(recursive=True)
    part = next(process for process in below if "IndexPart-1" in " ".join(process.cmdline()))
    part.kill()
    return int(part.pid)


def run(corpus: str, parts: int, versions: list[str], truth: Figures, arguments: Any) -> Figures:
    import ray

    from vsearch.serve import ServeArgs, start

    snapshots = Snapshots(Corpus(corpus))
    address = start(ServeArgs(corpus=corpus, parts=parts, refresh_s=1.0), port=free_port())
    queries = sentences(arguments.sentences)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        pool.apply(offer, (address, queries[:50], 20.0, 3.0))  # warm
        began = time.monotonic()
        pending = pool.apply_async(offer, (address, queries, arguments.rate, arguments.seconds))
        events: list[tuple[str, threading.Timer]] = []

        def at(share: float, name: str, action: Any, *values: Any) -> None:
            timer = threading.Timer(share * arguments.seconds, action, values)
            events.append((f"{name} at {share * arguments.seconds:g} s", timer))
            timer.start()

        at(0.25, "rollback", snapshots.roll_back, versions[0])
        at(0.5, "new snapshot", snapshots.roll_back, versions[1])
        if parts > 1:
            at(0.7, "kill -9 of a part", kill_a_part)
        replies: list[Reply] = pending.get()
        for _, timer in events:
            timer.join()
        took_s = time.monotonic() - began
    ray.shutdown()  # the proxy would stay at its port
    verdicts = Counter(verdict(reply, truth) for reply in replies)
    wrong = [
        {"asked": queries[reply.sentence], "given": reply.body, "wanted": wanted[:LIMIT]}
        for reply in replies
        if reply.body and verdict(reply, truth) == "wrong"
        for wanted in [truth[reply.body["snapshot"]][reply.sentence]]
    ]
    named = Counter(reply.body["snapshot"] for reply in replies if reply.body)
    steps: dict[str, list[float]] = {"answer, as the client sees it": []}
    for reply in replies:
        if reply.body and reply.status == 200:
            steps["answer, as the client sees it"].append(reply.took_ms)
            steps.setdefault("in the service", []).append(reply.body["took_ms"])
            for name, value in reply.body["took"].items():
                steps.setdefault(name.removesuffix("_ms"), []).append(value)
    return {
        "parts": parts,
        "offered_per_s": arguments.rate,
        "answered_per_s": round(len(steps["answer, as the client sees it"]) / took_s, 1),
        "events": [name for name, _ in events],
        "replies": dict(verdicts),
        "snapshots": dict(named),
        "wrong": wrong,
        "ms": {
            name: {f"p{q}": round(float(np.percentile(values, q)), 2) for q in LATENCIES}
            for name, values in steps.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--rate", type=float, default=200.0, help="queries a second")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--sentences", type=int, default=500, help="how many different ones")
    parser.add_argument("--modes", nargs="*", choices=list(MODES), default=list(MODES))
    parser.add_argument("--haproxy", action="store_true", help="in place of Serve's Python proxy")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.haproxy:
        os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"  # before Ray starts: its workers inherit it
    corpus = str(Path(arguments.corpus).resolve())
    versions = [
        build_index(corpus, rows=rows, shard_frames=SHARD_FRAMES, rebuild=True).snapshot
        for rows in ("frames", "moments")
    ]
    truth = expected(corpus, versions, sentences(arguments.sentences))
    figures = {
        mode: run(corpus, MODES[mode], versions, truth, arguments) for mode in arguments.modes
    }
    table = Table(title=f"{arguments.rate:g} queries a second for {arguments.seconds:g} s")
    for heading in ("", "replies", "step", *(f"p{q} ms" for q in LATENCIES)):
        table.add_column(heading)
    for mode, found in figures.items():
        shown = ", ".join(f"{n} {kind}" for kind, n in sorted(found["replies"].items()))
        for name, values in found["ms"].items():
            table.add_row(mode, shown, name, *(f"{v:g}" for v in values.values()))
            mode = shown = ""
    CONSOLE.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
