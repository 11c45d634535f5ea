import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from vsearch.config import CorpusConfig, Encoder, Sampling, UserError
from vsearch.corpus import Corpus, newest_projector, vector_matrix
from vsearch.schema import VIDEOS, SpanRecord, fingerprint, frames_schema

CONFIG = CorpusConfig(
    dino=Encoder("dino-small", "d1", 4), clip=Encoder("clip-small", "c1", 2), input_px=64
)
NOW = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """The address of an S3 server that speaks the real protocol over HTTP."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["disk", "s3"])
def corpus(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Corpus:
    """An empty corpus with its configuration, on disk and on S3."""
    if request.param == "disk":
        url = str(tmp_path / "corpus")
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3_server"))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        bucket = f"b{os.urandom(6).hex()}"
        fs.mkdir(bucket)
        url = f"s3://{bucket}/archive/corpus"
    corpus = Corpus(url)
    corpus.require(CONFIG)
    return corpus


def video_row(name: str = "a", **values: Any) -> dict[str, Any]:
    """What a probe found of a video of 10 seconds that has two spans."""
    return {
        "uri": f"/videos/{name}.mp4",
        "video_id": name,
        "size_bytes": 1000,
        "start_s": 0.0,
        "duration_s": 10.0,
        "zero_s": 0.0,
        "span_s": 5.0,
        "expected_spans": 2,
        "recorded_at": NOW,
        "recorded_at_source": "container",
        "ingested_at": NOW,
        "status": "ok",
    } | values


def add_videos(corpus: Corpus, *rows: dict[str, Any]) -> None:
    corpus.add_videos(pa.Table.from_pylist(list(rows), schema=VIDEOS))


def span(number: int, video: str = "a", **values: Any) -> SpanRecord:
    """A stored span of five frames, the last of them half a second before its end."""
    return SpanRecord(
        **{
            "video_id": video,
            "span_id": f"{video}-{number}",
            "span": number,
            "frames": 5,
            "last_pts_s": 5.0 * number + 4.5,
            "ended": False,
            "errors": [],
        }
        | values
    )


def add_spans(corpus: Corpus, *spans: SpanRecord) -> str:
    """Stores spans with rows whose vectors count up from the video's and span's number."""
    rows = [
        {
            "video_id": s.video_id,
            "span_id": s.span_id,
            "span": s.span,
            "frame": frame,
            "pts_s": 5.0 * s.span + frame,
            "dino": [np.float16(s.span + frame + i) for i in range(4)],
            "clip": [np.float16(s.span - frame - i) for i in range(2)],
        }
        for s in spans
        for frame in range(s.frames)
    ]
    return corpus.add_frames(pa.Table.from_pylist(rows, schema=frames_schema(4, 2)), list(spans))


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
    ],
    ids=["dino", "clip", "sampling"],
)
def test_another_configuration_is_refused_naming_both(
    corpus: Corpus, change: dict[str, Any], named: list[str]
) -> None:
    before = corpus.read("corpus.json")
    with pytest.raises(UserError) as refused:
        Corpus(corpus.url).require(replace(CONFIG, **change))
    assert all(part in str(refused.value) for part in [corpus.url, *named])
    assert corpus.read("corpus.json") == before


def test_no_corpus_is_said_and_nothing_made(corpus: Corpus) -> None:
    empty = Corpus(f"{corpus.url}-empty")
    with pytest.raises(UserError, match=r"There is no corpus at .*vsearch ingest"):
        empty.config  # noqa: B018
    assert not empty.exists("corpus.json")


@pytest.mark.parametrize(
    "content",
    [b"", b'{"format_version": 1', b"\xff\xfe", b'{"format_version": 1}', b"[]"],
    ids=["empty", "cut", "no text", "no fields", "no object"],
)
def test_a_damaged_configuration_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "corpus.json").write_bytes(content)
    with pytest.raises(UserError, match=r"corpus\.json is damaged"):
        Corpus(str(tmp_path)).config  # noqa: B018


def test_another_format_is_refused(corpus: Corpus) -> None:
    content = json.loads(corpus.read("corpus.json")) | {"format_version": 2}
    corpus.write("corpus.json", json.dumps(content).encode())
    with pytest.raises(UserError, match=r"has format 2.*reads format 1"):
        Corpus(corpus.url).config  # noqa: B018


# ── videos and spans ─────────────────────────────────────────────────────────────────────────────


def test_the_latest_row_of_a_uri_counts(corpus: Corpus) -> None:
    add_videos(corpus, video_row("a", size_bytes=1), video_row("b"))
    add_videos(corpus, video_row("a", size_bytes=3, ingested_at=NOW + timedelta(hours=2)))
    add_videos(corpus, video_row("a", size_bytes=2, ingested_at=NOW + timedelta(hours=1)))
    rows = corpus.videos()
    assert [(row["uri"], row["size_bytes"]) for row in rows] == [
        ("/videos/a.mp4", 3),
        ("/videos/b.mp4", 1000),
    ]
    assert rows[0]["recorded_at"] == NOW


def test_spans_come_back_with_their_frames(corpus: Corpus) -> None:
    stored = [span(0, errors=["damaged packet after 1.0 s"]), span(1, frames=3, ended=True)]
    name = add_spans(corpus, *stored)
    assert corpus.spans() == {record.span_id: (name, record) for record in stored}
    table = pa.concat_tables(corpus.frames(name, ["span", "pts_s", "dino"]))
    assert table["pts_s"].to_pylist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert vector_matrix(table["dino"]).tolist() == [
        [n, n + 1, n + 2, n + 3] for n in (0, 1, 2, 3, 4, 1, 2, 3)
    ]


def test_a_span_without_frames_is_stored(corpus: Corpus) -> None:
    name = add_spans(corpus, span(0, frames=0, last_pts_s=None, ended=True))
    assert corpus.spans()["a-0"][1].last_pts_s is None
    assert sum(part.num_rows for part in corpus.frames(name, ["pts_s"])) == 0


def test_vectors_of_pieces_and_slices_keep_their_rows() -> None:
    values = np.arange(24, dtype=np.float16).reshape(6, 4)
    array = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 4)
    pieces = pa.chunked_array([array.slice(4, 2), array.slice(1, 2)])
    assert vector_matrix(pieces).tolist() == values[[4, 5, 1, 2]].tolist()
    assert vector_matrix(pa.chunked_array([], array.type)).shape == (0, 4)


def test_a_span_stored_twice_counts_once(corpus: Corpus) -> None:
    add_videos(corpus, video_row())
    first = add_spans(corpus, span(0))
    both = add_spans(corpus, span(0), span(1, ended=True))
    again = add_spans(corpus, span(0))
    assert first == again
    assert corpus.files("frames") == sorted([first, both])
    assert corpus.spans()["a-0"][0] == min(first, both)
    [state] = corpus.states()
    assert (state.status, state.frames) == ("indexed", 10)


@pytest.mark.parametrize(
    ("row", "spans", "status", "reason"),
    [
        ({}, [span(0), span(1, ended=True)], "indexed", None),
        ({"duration_s": None}, [span(0, ended=True)], "indexed", None),
        ({}, [], "pending", "0 of about 2 spans"),
        ({}, [span(0)], "pending", "1 of about 2 spans"),
        ({}, [span(0), span(2, ended=True)], "pending", "2 of about 2 spans"),
        ({"status": "failed", "reason": "the file is empty"}, [], "failed", "the file is empty"),
        (
            {},
            [span(0, frames=0, last_pts_s=None, ended=True, errors=["no key"])],
            "failed",
            "no key",
        ),
        (
            {},
            [span(0, frames=0, last_pts_s=None, ended=True)],
            "failed",
            "no frame can be decoded",
        ),
        (
            {},
            [span(1, ended=True, errors=["second"]), span(0, errors=["first"])],
            "partial",
            "first (and 1 more)",
        ),
        ({}, [span(0, ended=True)], "partial", "the pictures end 5.5 s before the 10.0 s"),
        (
            {"start_s": 20.0, "duration_s": 5.0},
            [span(0, last_pts_s=24.5, ended=True)],
            "indexed",
            None,
        ),
        (
            {"start_s": 20.0},
            [span(0, last_pts_s=24.5, ended=True)],
            "partial",
            "the pictures end 5.5 s before the 10.0 s",
        ),
    ],
)
def test_the_state_of_a_video_follows_from_its_spans(
    tmp_path: Path,
    row: dict[str, Any],
    spans: list[SpanRecord],
    status: str,
    reason: str | None,
) -> None:
    corpus = Corpus(str(tmp_path))
    corpus.require(CONFIG)
    add_videos(corpus, video_row(**row), video_row("other"))
    for record in spans:
        add_spans(corpus, record)
    state, other = corpus.states()
    assert state.status == status
    assert (state.reason or "").startswith(reason or "") and bool(state.reason) == bool(reason)
    assert state.frames == sum(record.frames for record in spans)
    assert other.status == "pending"


def test_sparse_sampling_does_not_make_a_video_partial(tmp_path: Path) -> None:
    corpus = Corpus(str(tmp_path))
    corpus.require(replace(CONFIG, sampling=Sampling(fps=0.1)))
    add_videos(corpus, video_row(duration_s=19.0))
    add_spans(corpus, span(0, last_pts_s=10.0, ended=True))
    assert corpus.states()[0].status == "indexed"


def test_states_are_the_same_on_every_storage(corpus: Corpus) -> None:
    add_videos(
        corpus,
        video_row("done"),
        video_row("half"),
        video_row("hurt"),
        video_row("bad", status="failed", reason="the file is empty", video_id=""),
    )
    add_spans(corpus, span(0, "done"), span(1, "done", ended=True), span(0, "half"))
    add_spans(corpus, span(0, "hurt", errors=["x"]), span(1, "hurt", ended=True))
    assert {state.video_id: (state.status, state.frames) for state in corpus.states()} == {
        "done": ("indexed", 10),
        "half": ("pending", 5),
        "hurt": ("partial", 10),
        "": ("failed", 0),
    }


@pytest.mark.parametrize("folder", ["videos", "frames"])
def test_a_damaged_table_is_refused_by_name(corpus: Corpus, folder: str) -> None:
    add_videos(corpus, video_row())
    add_spans(corpus, span(0, ended=True))
    [name] = corpus.files(folder)
    corpus.write(name, corpus.read(name)[:-50])
    with pytest.raises(UserError, match=name):
        corpus.states()


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
