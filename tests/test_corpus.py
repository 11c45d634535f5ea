import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import CONFIG, add_videos, video_row

from vsearch.config import Encoder, Sampling, UserError
from vsearch.corpus import Corpus, newest_projector
from vsearch.schema import fingerprint

# ── files ────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_written_is_read_and_listed(corpus: Corpus) -> None:
    for name in ("index/v2/b.bin", "index/v1/a.bin", "index/v1/c.txt"):
        assert not corpus.exists(name)
        corpus.write(name, name.encode())
        assert corpus.exists(name)
        assert corpus.read(name) == name.encode()
    assert corpus.folders("index") == ["v1", "v2"]
    assert corpus.files("index/v1", ".bin") == ["index/v1/a.bin"]
    assert corpus.files("nowhere") == corpus.folders("nowhere") == []


def test_another_machine_sees_it_at_once(corpus: Corpus) -> None:
    other = Corpus(corpus.url)
    assert not other.exists("index/CURRENT") and other.files("videos") == []
    corpus.write("index/CURRENT", b"v1")
    add_videos(corpus, video_row())
    assert other.read("index/CURRENT") == b"v1"
    assert len(other.files("videos")) == 1


def test_of_several_new_files_at_once_exactly_one_wins(corpus: Corpus) -> None:
    writers = 8
    together = threading.Barrier(writers)

    def write(number: int) -> bool:
        own = Corpus(corpus.url)
        together.wait()
        return own.write_new("index/lock", b"%d" % number)

    with ThreadPoolExecutor(writers) as pool:
        won = list(pool.map(write, range(writers)))
    assert won.count(True) == 1
    assert corpus.read("index/lock") == b"%d" % won.index(True)
    assert [Path(path).name for path in corpus.fs.find(corpus.path("index"))] == ["lock"]
    assert not corpus.write_new("index/lock", b"late")
    corpus.remove("index/lock")
    assert corpus.write_new("index/lock", b"next")
    assert corpus.read("index/lock") == b"next"


def test_what_is_removed_is_gone_and_may_be_removed_again(corpus: Corpus) -> None:
    corpus.write("index/v1/a.bin", b"a")
    corpus.write("index/v1/b.bin", b"b")
    for _ in range(2):
        corpus.remove("index/v1/a.bin")
        assert not corpus.exists("index/v1/a.bin")
        assert corpus.files("index/v1", ".bin") == ["index/v1/b.bin"]
    corpus.remove("nowhere/c.bin")


def test_readers_see_the_old_file_or_the_new_one(corpus: Corpus) -> None:
    contents = [bytes([i]) * 200_000 for i in range(2)]
    corpus.write("index/CURRENT", contents[0])
    stop = threading.Event()

    def rewrite() -> None:
        for turn in range(1000):
            if stop.is_set():
                return
            corpus.write("index/CURRENT", contents[turn % 2])

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        reader = Corpus(corpus.url)
        assert {reader.read("index/CURRENT") for _ in range(30)} <= set(contents)
    finally:
        stop.set()
        writer.join()


def test_a_write_cut_short_leaves_nothing_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus(str(tmp_path))
    corpus.write("videos/old.parquet", b"old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    for name in ("videos/old.parquet", "videos/new.parquet"):
        with pytest.raises(OSError, match="disk full"):
            corpus.write(name, b"new")
    assert corpus.files("videos") == ["videos/old.parquet"]
    assert corpus.read("videos/old.parquet") == b"old"


def test_a_local_file_is_put_and_fetched(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    made = tmp_path / "made.f16"
    made.write_bytes(b"vectors")
    corpus.put(str(made), "index/v1/vectors.f16")
    assert not made.exists()
    assert corpus.read("index/v1/vectors.f16") == b"vectors"
    copy = corpus.fetch("index/v1/vectors.f16", "ab" * 32)
    assert copy.read_bytes() == b"vectors"
    assert copy == corpus.fetch("index/v1/vectors.f16", "ab" * 32)


@pytest.mark.parametrize("url", ["nope://bucket/corpus", "s4://x"])
def test_an_unknown_protocol_is_one_sentence(url: str) -> None:
    with pytest.raises(UserError, match=f"{url}.*cannot be used"):
        Corpus(url)


# ── configuration ────────────────────────────────────────────────────────────────────────────────


def test_the_configuration_is_kept(corpus: Corpus) -> None:
    assert Corpus(corpus.url).config == CONFIG
    Corpus(corpus.url).require(CONFIG)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dino": Encoder("dino-small", "d2", 4)}, ["dino-small (weights d1)", "(weights d2)"]),
        ({"clip": Encoder("clip-big", "c9", 2)}, ["clip-small (weights c1)", "clip-big"]),
        ({"sampling": Sampling(fps=2)}, ["every frame", "2 frames a second"]),
        ({"sampling": Sampling(max_change=1.5)}, ["every frame", "shared within 1.5 levels"]),
        ({"pairs": 0.25}, ["pairs 1", "not 0.25"]),
    ],
    ids=["dino", "clip", "sampling", "sharing", "pairs"],
)
def test_another_configuration_is_refused_naming_both(
    corpus: Corpus, change: dict[str, Any], named: list[str]
) -> None:
    before = corpus.read("corpus.json")
    with pytest.raises(UserError) as refused:
        Corpus(corpus.url).require(replace(CONFIG, **change))
    assert all(part in str(refused.value) for part in [corpus.url, *named])
    assert corpus.read("corpus.json") == before


def test_the_share_of_pairs_is_kept(tmp_path: Path) -> None:
    few = replace(CONFIG, pairs=0.25)
    Corpus(str(tmp_path)).require(few)
    corpus = Corpus(str(tmp_path))
    corpus.require(few)
    assert corpus.config.pairs == 0.25
    with pytest.raises(UserError, match=r"made with pairs 0\.25, not 1: "):
        corpus.require(CONFIG)


def test_of_several_configurations_at_once_one_is_made(corpus: Corpus) -> None:
    url, together = f"{corpus.url}-new", threading.Barrier(4)

    def require(pairs: float) -> float | None:
        together.wait()
        try:
            Corpus(url).require(replace(CONFIG, pairs=pairs))
        except UserError:
            return None
        return pairs

    with ThreadPoolExecutor(4) as pool:
        made = [pairs for pairs in pool.map(require, (0.2, 0.4, 0.6, 0.8)) if pairs]
    assert made == [Corpus(url).config.pairs]


def test_no_corpus_is_said_and_nothing_made(corpus: Corpus) -> None:
    empty = Corpus(f"{corpus.url}-empty")
    with pytest.raises(UserError, match=r"There is no corpus at .*vsearch ingest"):
        empty.config  # noqa: B018
    assert not empty.exists("corpus.json")


@pytest.mark.parametrize(
    "content",
    [b"", b'{"format_version": 2', b"\xff\xfe", b'{"format_version": 2}', b"[]"],
    ids=["empty", "cut", "no text", "no fields", "no object"],
)
def test_a_damaged_configuration_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "corpus.json").write_bytes(content)
    with pytest.raises(UserError, match=r"corpus\.json is damaged"):
        Corpus(str(tmp_path)).config  # noqa: B018


@pytest.mark.parametrize("version", [1, 3])
def test_another_format_is_refused(corpus: Corpus, version: int) -> None:
    content = json.loads(corpus.read("corpus.json")) | {"format_version": version}
    corpus.write("corpus.json", json.dumps(content).encode())
    for use in (lambda c: c.config, lambda c: c.require(CONFIG)):
        with pytest.raises(UserError, match=rf"has format {version}.*reads format 2"):
            use(Corpus(corpus.url))


# ── what is in use ───────────────────────────────────────────────────────────────────────────────


def test_the_newest_finished_projector_counts(corpus: Corpus) -> None:
    assert newest_projector(corpus) is None
    for version in ("20240101", "20240301", "20240201"):
        corpus.write(f"projector/{version}/config.json", json.dumps({"v": version}).encode())
    corpus.write("projector/20240401/model.safetensors", b"unfinished")
    assert newest_projector(corpus) == ("20240301", {"v": "20240301"})


# ── ids ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(1_000_000)

    def mark(content: bytes) -> str:
        path = tmp_path / os.urandom(4).hex()
        path.write_bytes(content)
        with path.open("rb") as file:
            return fingerprint(file, len(content))

    assert mark(data) == mark(data)
    variants = [data, data[:-1], data + b"\0", b"x" + data[1:], data[:-1] + b"x", b"", b"x"]
    middle = len(data) // 2
    variants.append(data[:middle] + b"changed" + data[middle + 7 :])
    marks = [mark(content) for content in variants]
    assert len(set(marks)) == len(variants)
    assert all(len(found) == 32 and int(found, 16) >= 0 for found in marks)
