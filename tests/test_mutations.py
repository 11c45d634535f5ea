"""Broken videos by the thousand: bit flips, cuts and splices of real clips go through one ingest."""

import random
from collections import Counter
from pathlib import Path

import pytest

from vsearch.config import PRESETS
from vsearch.corpus import Corpus
from vsearch.ingest import ingest

LARGEST_BYTES = 300_000


def flip_bits(data: bytearray, rng: random.Random) -> None:
    """From one bit to one in a thousand."""
    for _ in range(max(1, int(len(data) * 10 ** rng.uniform(-6, -3)))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_header(data: bytearray, rng: random.Random) -> None:
    """A few bytes near one of the ends, where containers keep their tables."""
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(min(4096, len(data)))
        data[place if rng.random() < 0.5 else -1 - place] = rng.randrange(256)


def cut_end(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def cut_middle(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randint(1, len(data) // 2)]


def zero_block(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.randint(1, 20_000))
    data[start:stop] = bytes(stop - start)


def mutated(sources: list[bytes], rng: random.Random) -> bytes:
    data = bytearray(rng.choice(sources))
    if rng.random() < 0.15:  # a splice of two
        other = rng.choice(sources)
        data = data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]
    changes = [flip_bits, flip_header, cut_end, cut_middle, zero_block]
    for change in rng.choices(changes, k=rng.randint(1, 2)):
        if data:
            change(data, rng)
    return bytes(data)


@pytest.mark.parametrize(
    "count", [60, pytest.param(2000, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_mutated_files_each_get_a_status(count: int, shared_videos: Path, tmp_path: Path) -> None:
    folder, url = tmp_path / "videos", str(tmp_path / "corpus")
    folder.mkdir()
    paths = [path for path in sorted(shared_videos.iterdir()) if path.suffix != ".csv"]
    sources = [p.read_bytes() for p in paths if 1000 < p.stat().st_size < LARGEST_BYTES]
    rng = random.Random(0)
    for number in range(count):
        suffix = rng.choice((".mp4", ".mkv", ".ts", ".webm"))
        (folder / f"{number:05d}{suffix}").write_bytes(mutated(sources, rng))
    # What mutation left equal counts once.
    distinct = len({path.read_bytes() for path in folder.iterdir()})

    ingest(url, [str(folder)], PRESETS["demo"], fps=1)

    states = Corpus(url).states()
    assert sum(1 + len(state.copies) for state in states) == count
    assert len(states) <= distinct
    found = Counter(state.status for state in states)
    assert set(found) <= {"indexed", "partial", "failed"}
    assert found["indexed"] and found["partial"] and found["failed"]
    assert all(state.reason for state in states if state.status != "indexed")
    print(found, Counter(state.quarantined for state in states))
    for state in states:
        if state.quarantined:
            print(state.uri, state.reason)
    # The same command again finds nothing to do.
    again = ingest(url, [str(folder)], PRESETS["demo"], fps=1)
    assert (again.probed, again.spans) == (0, 0)
