"""What a large archive costs a driver: seconds and peak memory of listing, plan, sync and status.

Method: no media. `made://` is a file system whose folders are computed: sizes, marks and times are
functions of a file's number, cameras of 100 days of 100 files. The corpus that knows them is real:
`videos/*.parquet` with a row a video, `spans/*.parquet` with two spans a video, and a frames file for
each 16 spans, which is empty, as nobody opens a frames file that the ledger knows. Each piece is a
process of its own, whose largest resident memory is taken; it prints a line a step. In place of a
probe, which would need media, stands what it would find; its rows are stored as those of a probe, 64 a
file. A sync meets 1 % of changes: a quarter each new, changed, moved and gone.

    make      the corpus
    listing   all files at the source
    plan      `vsearch plan` with a sample of 200 files
    status    sums over all videos, and those to show
    sync      list, compare, classify, note, tidy, find what is missing, settle
    lists     the same questions asked with everything in lists: what `status` and `sync` replace

    python benchmarks/scale.py all --files 1000000 --folder /tmp/scale
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
from fsspec.spec import AbstractFileSystem

from vsearch.config import CorpusConfig, Encoder
from vsearch.corpus import Corpus
from vsearch.schema import VIDEOS

PIECES = ("make", "listing", "plan", "status", "sync", "status")
PER_DAY, PER_CAMERA = 100, 10_000
CHANGED, GONE, MOVED, NEW = range(4)
CYCLE = 400
"""Of so many files one each is changed, gone, moved and joined by a new one: 1 % in all."""

ROWS_A_FILE, PROBED_A_FILE, SPANS_A_FILE = 100_000, 64, 16
SPAN_S, SPANS = 20.0, 2
WRITTEN_AT = 1_750_000_000
RECORDED = datetime(2026, 1, 1, tzinfo=UTC)
LATER = datetime(2026, 2, 1, tzinfo=UTC)


def size_of(number: int) -> int:
    """10 to 20 MB: some thirty seconds."""
    return 10_000_000 + number * 2654435761 % 10_000_000


class Made(AbstractFileSystem):
    """The archive: `made://FILES/camCCCC/dDD/FF.mp4`. With `changed`, as it is after 1 % of changes."""

    protocol = "made"
    changed = False

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        root, *rest = self._strip_protocol(path).split("/")
        if len(rest) == 2:
            first = int(rest[0][3:]) * PER_CAMERA + int(rest[1][1:]) * PER_DAY
            numbers = range(first, min(first + PER_DAY, int(root)))
            return [info for n in numbers for info in self._infos(f"{root}/{rest[0]}/{rest[1]}", n)]
        cameras = -(-int(root) // PER_CAMERA)
        names = (
            [f"d{n:02d}" for n in range(100)] if rest else [f"cam{n:04d}" for n in range(cameras)]
        )
        where = "/".join([root, *rest])
        return [{"name": f"{where}/{name}", "type": "directory", "size": 0} for name in names]

    def _infos(self, folder: str, number: int) -> Iterator[dict[str, Any]]:
        kind = number % CYCLE if self.changed else None
        name = f"{folder}/{number % PER_DAY:02d}"
        if kind not in (GONE, MOVED):
            yield self._info(name, number, f"e{number}{'x' * (kind == CHANGED)}")
        if kind == MOVED:
            yield self._info(f"{name}-moved", number, f"e{number}")
        if kind == NEW:
            yield self._info(f"{name}-new", number, f"e{number}n")

    def _info(self, name: str, number: int, mark: str) -> dict[str, Any]:
        size = size_of(number)
        return {"name": f"{name}.mp4", "size": size, "ETag": mark, "type": "file"}

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": self._strip_protocol(path), "type": "directory", "size": 0}


fsspec.register_implementation("made", Made)


def uri_of(files: int, number: int) -> str:
    camera, left = divmod(number, PER_CAMERA)
    day, file = divmod(left, PER_DAY)
    return f"made://{files}/cam{camera:04d}/d{day:02d}/{file:02d}.mp4"


def video_row(files: int, number: int, **values: Any) -> dict[str, Any]:
    return {
        "uri": uri_of(files, number),
        "source": f"made://{files}",
        "tags": [],
        "video_id": f"{number:032x}",
        "size_bytes": size_of(number),
        "etag": f"e{number}",
        "container": "mov,mp4,m4a,3gp,3g2,mj2",
        "codec": "h264",
        "width": 1920,
        "height": 1080,
        "fps": 25.0,
        "start_s": 0.0,
        "duration_s": 30.0,
        "zero_s": 0.0,
        "span_s": SPAN_S,
        "expected_spans": SPANS,
        "seekable": True,
        "recorded_at": RECORDED,
        "recorded_at_source": "container",
        "ingested_at": RECORDED,
        "status": "ok",
        "attempts": 1,
        "quarantined": False,
    } | values


def video_table(files: int, numbers: range) -> pa.Table:
    """The rows of many videos: as `video_row`, by columns."""
    columns = {
        "uri": [uri_of(files, n) for n in numbers],
        "video_id": [f"{n:032x}" for n in numbers],
        "size_bytes": [size_of(n) for n in numbers],
        "etag": [f"e{n}" for n in numbers],
    }
    one = pa.Table.from_pylist([video_row(files, 0)], schema=VIDEOS)
    alike = one.take(pa.array(np.zeros(len(numbers), int)))
    return pa.table(
        [pa.array(columns[n]) if n in columns else alike[n] for n in VIDEOS.names], schema=VIDEOS
    )


class Steps:
    """Prints a line for each step of a piece: its seconds, those of the processor (which other work on
    the machine hardly changes; threads add up), and the peak memory so far.
    """

    def __init__(self, **about: Any) -> None:
        self._about, self._began = about, time.monotonic()

    @contextmanager
    def step(self, name: str, **found: Any) -> Iterator[dict[str, Any]]:
        began, worked = time.monotonic(), time.process_time()
        yield found
        spent = {"seconds": time.monotonic() - began, "cpu_s": time.process_time() - worked}
        self._print(step=name, **{name: round(value, 1) for name, value in spent.items()}, **found)

    def end(self) -> None:
        spent = {"seconds": time.monotonic() - self._began, "cpu_s": time.process_time()}
        self._print(step="all", **{name: round(value, 1) for name, value in spent.items()})

    def _print(self, **line: Any) -> None:
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps(self._about | line | {"peak_mb": peak_mb}), flush=True)


# ── pieces ───────────────────────────────────────────────────────────────────────────────────────


def make(files: int, url: str, steps: Steps) -> None:
    corpus = Corpus(url)
    corpus.require(CorpusConfig(Encoder("none", "0", 768), Encoder("none", "0", 512), 224))
    with steps.step("videos"):
        for start in range(0, files, ROWS_A_FILE):
            rows = video_table(files, range(start, min(files, start + ROWS_A_FILE)))
            corpus.write_table(f"videos/made-{start:09d}.parquet", rows)
    with steps.step("frames files"):
        Path(corpus.path("frames")).mkdir(exist_ok=True)
        for number in range(-(-files * SPANS // SPANS_A_FILE)):
            path = corpus.path(frames_file(number))
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
            os.utime(path, (WRITTEN_AT, WRITTEN_AT))
    with steps.step("ledger"):
        write_ledger(corpus, files)


def frames_file(number: int) -> str:
    return f"frames/{number:032x}.parquet"


def write_ledger(corpus: Corpus, files: int) -> None:
    from vsearch.schema import SPANS as LEDGER

    total = files * SPANS
    for start in range(0, total, 2 * ROWS_A_FILE):
        numbers = range(start, min(total, start + 2 * ROWS_A_FILE))
        count = len(numbers)
        span = np.arange(start, start + count) % SPANS
        columns = {
            "file": [frames_file(n // SPANS_A_FILE) for n in numbers],
            "mark": [f"0 {float(WRITTEN_AT)}"] * count,
            "in_file": np.full(count, SPANS_A_FILE),
            "video_id": [f"{n // SPANS:032x}" for n in numbers],
            "span_id": [f"{n:016x}" for n in numbers],
            "span": span,
            "frames": np.where(span == 0, 500, 250),
            "last_pts_s": np.where(span == 0, 19.96, 29.96),
            "ended": span == SPANS - 1,
            "embedded": np.where(span == 0, 500, 250),
            "pairs": np.ones(count, bool),
            "errors": [[]] * count,
            "gaps": [[]] * count,
            "attempts": np.ones(count, int),
            "quarantined": np.zeros(count, bool),
            "decode_s": np.full(count, 1.5),
            "encode_s": np.full(count, 0.5),
        }
        table = pa.table([pa.array(columns[f.name], f.type) for f in LEDGER], schema=LEDGER)
        corpus.write_table(f"spans/made-{start:09d}.parquet", table)


def listing(files: int, url: str, steps: Steps) -> None:
    from vsearch.sources import listing as run

    with steps.step("listing") as found:
        found["files"] = run([f"made://{files}"]).rows


def plan(files: int, url: str, steps: Steps) -> None:
    from vsearch.plan import plan as run

    with steps.step("plan") as found:
        made = run([f"made://{files}"], look=lambda entry: video_row(files, 0))
        found |= {"files": made.files, "hours": round(made.total("hours").value)}


def status(files: int, url: str, steps: Steps) -> None:
    with steps.step("status") as found:
        told = Corpus(url).overview(None, False, 40)
        found |= {**told.videos, "frames": told.sums["frames"]}


def sync(files: int, url: str, steps: Steps) -> None:
    from vsearch.buckets import Buckets, together
    from vsearch.probing import PLACES, PROBED, classify, portions
    from vsearch.sources import differences
    from vsearch.sources import listing as run
    from vsearch.tasks import missing_tasks

    corpus, source = Corpus(url), f"made://{files}"
    Made.changed = True
    with steps.step("listing"):
        listed = run([source], complete=True)
    with steps.step("what the corpus knows"):
        known = corpus.findings()
    probed, gone = Buckets("video_id", PROBED), Buckets("video_id", PLACES)
    notes = Buckets("uri", VIDEOS)
    with steps.step("compare") as found:
        for changes, rows in portions(differences(listed, known, [source])):
            looks = [look(files, entry) for entry in changes.probe]
            store_looks(corpus, looks)
            before = {row["uri"]: row["video_id"] for row in rows}
            for row in looks:
                row["before"] = before.get(row["uri"])
            probed.add(pa.Table.from_pylist(looks, schema=PROBED))
            gone.add(pa.Table.from_pylist(changes.gone, schema=PLACES))
            now = {"ingested_at": LATER, "status": "gone"}
            notes.add(pa.Table.from_pylist([row | now for row in changes.gone], schema=VIDEOS))
            found["unchanged"] = found.get("unchanged", 0) + changes.unchanged
    with steps.step("classify") as found:
        for _, kind in classify(known, probed, gone):
            found[kind] = found.get(kind, 0) + 1
    with steps.step("note"):
        for (table,) in together(notes):
            corpus.add_videos(table)
    with steps.step("tidy"):
        corpus.tidy()
    with steps.step("enter"):
        corpus.enter()
    with steps.step("what is missing") as found:
        found["tasks"] = missing_tasks(corpus, listed, False, 64).rows
    with steps.step("settle"):
        corpus.settle()


def look(files: int, entry: Any) -> dict[str, Any]:
    """What a probe would find, in place of one."""
    number, letter = int(entry.mark.strip("exn")), entry.mark[-1]
    content = f"{number:032x}" if letter.isdigit() else f"{number:031x}{letter}"
    place = {"uri": entry.uri, "video_id": content, "etag": entry.mark, "ingested_at": LATER}
    return video_row(files, number) | place


def store_looks(corpus: Corpus, looks: list[dict[str, Any]]) -> None:
    for start in range(0, len(looks), PROBED_A_FILE):
        corpus.add_videos(pa.Table.from_pylist(looks[start : start + PROBED_A_FILE], schema=VIDEOS))


def lists(files: int, url: str, steps: Steps) -> None:
    from vsearch.sources import compare, list_videos

    corpus, source = Corpus(url), f"made://{files}"
    Made.changed = True
    with steps.step("listing"):
        listed = list_videos([source])
    with steps.step("what the corpus knows"):
        known = corpus.videos()
    with steps.step("compare") as found:
        changes = compare(listed, known, [source])
        found["probe"] = len(changes.probe)
    with steps.step("status") as found:
        found["videos"] = len(corpus.states())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("piece", choices=[*dict.fromkeys(PIECES), "lists", "all"])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/scale"))
    args = parser.parse_args()
    if args.piece == "all":
        for piece in PIECES:
            command = [sys.executable, __file__, piece, "--files", str(args.files)]
            subprocess.run([*command, "--folder", str(args.folder)], check=True)
        return
    steps = Steps(piece=args.piece, files=args.files)
    globals()[args.piece](args.files, str(args.folder / str(args.files)), steps)
    steps.end()


if __name__ == "__main__":
    main()
