import json
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from vsearch.config import CorpusConfig, Encoder, Sampling, UserError
from vsearch.corpus import Corpus, newest_projector, vector_matrix
from vsearch.schema import VIDEOS, DecodeError, SpanRecord, fingerprint, frames_schema

CONFIG = CorpusConfig(
    dino=Encoder("dino-small", "d1", 4), clip=Encoder("clip-small", "c1", 2), input_px=64
)
NOW = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)


@pytest.fixture(params=["disk", "s3"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Corpus:
    """An empty corpus with its configuration, on disk and on S3."""
    if request.param == "disk":
        url = str(tmp_path / "corpus")
    else:
        request.getfixturevalue("s3")
        bucket = f"b{os.urandom(6).hex()}"
        fsspec.filesystem("s3").mkdir(bucket)
        url = f"s3://{bucket}/archive/corpus"
    corpus = Corpus(url)
    corpus.require(CONFIG)
    return corpus


def video_row(name: str = "a", **values: Any) -> dict[str, Any]:
    """What a probe found of a video of 10 seconds that has two spans."""
    return {
        "uri": f"/videos/{name}.mp4",
        "source": "/videos",
        "tags": {},
        "video_id": name,
        "size_bytes": 1000,
        "etag": "m1",
        "fps": 25.0,
        "start_s": 0.0,
        "duration_s": 10.0,
        "zero_s": 0.0,
        "span_s": 5.0,
        "expected_spans": 2,
        "seekable": True,
        "recorded_at": NOW,
        "recorded_at_source": "container",
        "ingested_at": NOW,
        "status": "ok",
        "reason": None,
        "attempts": 1,
        "quarantined": False,
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
            "embedded": 5,
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
            "clip": [np.float16(s.span - frame - i) for i in range(2)] if s.pairs else None,
        }
        for s in spans
        for frame in range(s.frames)
    ]
    return corpus.add_frames(pa.Table.from_pylist(rows, schema=frames_schema(4, 2)), list(spans))


def stored_rows(corpus: Corpus) -> list[dict[str, Any]]:
    """The rows of all frames files, as a Parquet reader finds them that knows of no records."""
    files = [BytesIO(corpus.read(name)) for name in corpus.files("frames")]
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def assert_settled(corpus: Corpus, spans: list[SpanRecord]) -> None:
    """Each of the spans counts, its rows are stored once, and no others are."""
    assert {name: record for name, (_, record) in corpus.spans().items()} == {
        record.span_id: record for record in spans
    }
    found = Counter((row["span_id"], row["frame"]) for row in stored_rows(corpus))
    assert found == Counter((s.span_id, frame) for s in spans for frame in range(s.frames))


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
    stored = [
        span(
            0,
            errors=[DecodeError(1.0, "damaged packet"), DecodeError(1.5, "damaged frame")],
            gaps=[(1.0, 2.25)],
            attempts=2,
            decode_s=0.5,
            encode_s=0.25,
        ),
        span(1, frames=3, ended=True, pairs=False, quarantined=True),
    ]
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
    assert corpus.spans()["a-0"][0] == first
    [state] = corpus.states()
    assert (state.status, state.frames) == ("indexed", 10)


def test_states_are_the_same_on_every_storage(corpus: Corpus) -> None:
    add_videos(
        corpus,
        video_row("done"),
        video_row("half"),
        video_row("hurt"),
        video_row("bad", status="failed", reason="the file is empty", video_id=""),
    )
    add_spans(corpus, span(0, "done"), span(1, "done", ended=True), span(0, "half"))
    damage = [DecodeError(1.0, "damaged packet"), DecodeError(1.5, "damaged frame")]
    add_spans(corpus, span(0, "hurt", errors=damage), span(1, "hurt", ended=True))
    found = {s.video_id: (s.status, s.reason, s.frames) for s in corpus.states()}
    assert found == {
        "done": ("indexed", None, 10),
        "half": ("pending", "1 of about 2 spans embedded", 5),
        "hurt": ("partial", "damaged packet at 1.000 s (and 1 more)", 10),
        "": ("failed", "the file is empty", 0),
    }


def test_the_spacing_of_frames_is_allowed_for_at_the_end(tmp_path: Path) -> None:
    corpus = Corpus(str(tmp_path))
    corpus.require(replace(CONFIG, sampling=Sampling(fps=0.1)))
    add_videos(corpus, video_row(duration_s=19.0))
    add_spans(corpus, span(0, last_pts_s=10.0, ended=True))
    assert corpus.states()[0].status == "indexed"


def test_copies_of_a_content_are_one_video_where_it_was_found_last(corpus: Corpus) -> None:
    later = NOW + timedelta(hours=1)
    first = {"tags": {"camera": "1", "town": "Ulm"}}
    last = {"tags": {"camera": "2", "floor": "3"}, "ingested_at": later}
    add_videos(corpus, video_row("a", **first), video_row("b", video_id="a", **last))
    add_videos(corpus, video_row("c", video_id="a", tags={}), video_row("other"))
    add_spans(corpus, span(0), span(1, ended=True))
    state, other = corpus.states()
    assert (state.uri, state.copies) == ("/videos/b.mp4", ["/videos/a.mp4", "/videos/c.mp4"])
    assert state.tags == {"camera": "2", "town": "Ulm", "floor": "3"}
    assert (state.status, state.frames) == ("indexed", 10)
    assert (other.status, other.copies, other.tags) == ("pending", [], {})


def test_what_is_gone_hides_its_uri_until_it_comes_back(corpus: Corpus) -> None:
    add_videos(corpus, video_row("a"), video_row("b", video_id="a"), video_row("c"))
    hour = timedelta(hours=1)
    for number, name in enumerate("abc", 1):
        add_videos(
            corpus,
            video_row(
                name, status="gone", ingested_at=NOW + hour, video_id="c" if number == 3 else "a"
            ),
        )
        assert [row["uri"] for row in corpus.videos()] == [
            f"/videos/{n}.mp4" for n in "abc"[number:]
        ]
        assert [state.uri for state in corpus.states()] == [
            f"/videos/{n}.mp4" for n in "bc"[number - 1 :]
        ]
    add_videos(corpus, video_row("a", ingested_at=NOW + 2 * hour))
    assert [state.uri for state in corpus.states()] == ["/videos/a.mp4"]
    assert corpus.states()[0].copies == []


def test_a_move_keeps_spans_and_recording_time(corpus: Corpus) -> None:
    later = NOW + timedelta(days=9)
    clock = {"recorded_at_source": "mtime"}
    add_videos(corpus, video_row("old", video_id="a", **clock))
    add_spans(corpus, span(0), span(1, ended=True))
    add_videos(
        corpus,
        video_row("old", video_id="a", status="gone", ingested_at=later, **clock),
        video_row("new", video_id="a", recorded_at=later, ingested_at=later, **clock),
    )
    [state] = corpus.states()
    assert (state.uri, state.status, state.copies) == ("/videos/new.mp4", "indexed", [])
    assert (state.recorded_at, state.recorded_at_source) == (NOW, "mtime")


def test_tags_of_any_text_come_back(corpus: Corpus) -> None:
    tags = {"Ort": "Zürich, HB", "": "=", "camera 1": 'a"b\n'}
    add_videos(corpus, video_row("a", tags=tags), video_row("b"))
    assert [row["tags"] for row in corpus.videos()] == [tags, {}]


def test_the_snapshot_in_use_is_told(corpus: Corpus) -> None:
    assert corpus.current_manifest() is None and corpus.indexed() is None
    for version, ids in (("v1", ["a"]), ("v2", ["a", "b"])):
        name = f"index/{version}/videos.parquet"
        corpus.write_table(name, pa.table({"video_id": ids, "uri": ids}))
        manifest = {
            "version": version,
            "kind": "exact",
            "space": "clip",
            "rows": len(ids),
            "videos": {"name": "videos.parquet"},
        }
        corpus.write(f"index/{version}/manifest.json", json.dumps(manifest).encode())
    corpus.write("index/CURRENT", b"v1\n")
    assert Corpus(corpus.url).current_manifest()["version"] == "v1"
    corpus.write("index/CURRENT", b"v2\n")
    assert corpus.indexed() == {
        "snapshot": "v2",
        "kind": "exact",
        "space": "clip",
        "rows": 2,
        "videos": {"a", "b"},
    }


def test_rows_without_clip_vectors_are_stored_as_nulls(corpus: Corpus) -> None:
    add_spans(corpus, span(0, pairs=False), span(1))
    add_spans(corpus, span(1, attempts=2))
    corpus.settle()
    for row in stored_rows(corpus):
        assert (row["clip"] is None) == (row["span"] == 0)
        assert len(row["dino"]) == 4
    assert {s: record.pairs for s, (_, record) in corpus.spans().items()} == {
        "a-0": False,
        "a-1": True,
    }


# ── settling ─────────────────────────────────────────────────────────────────────────────────────


def test_a_later_attempt_counts(corpus: Corpus) -> None:
    first = add_spans(corpus, span(0, quarantined=True, frames=0, last_pts_s=None))
    second = add_spans(corpus, span(0, attempts=2), span(1, ended=True))
    third = add_spans(corpus, span(1, "b"), span(0, attempts=3, frames=2), span(2, "b"))
    add_videos(corpus, video_row())
    assert len({first, second, third}) == 3
    name, record = corpus.spans()["a-0"]
    assert (name, record.attempts, record.frames) == (third, 3, 2)
    [state] = corpus.states()
    assert (state.frames, state.attempts, state.quarantined) == (7, 3, False)


def test_settling_leaves_each_span_in_one_file(corpus: Corpus) -> None:
    alone = add_spans(corpus, span(0, "b"), span(1, "b"))
    add_spans(corpus, span(0), span(1))
    add_spans(corpus, span(1), span(2))
    add_spans(corpus, span(2), span(0), span(3, ended=True))
    add_spans(corpus, span(3, ended=True))
    before = corpus.spans()
    assert len(stored_rows(corpus)) == 50
    assert corpus.settle() > 0
    after = Corpus(corpus.url).spans()
    assert after.keys() == before.keys() and after["b-0"][0] == alone
    assert_settled(Corpus(corpus.url), [record for _, record in before.values()])
    left = corpus.files("frames")
    assert corpus.settle() == 0
    assert corpus.files("frames") == left


def test_settling_drops_the_rows_of_earlier_attempts(corpus: Corpus) -> None:
    add_spans(corpus, span(0, frames=4), span(1))
    add_spans(corpus, span(0, frames=3, attempts=2), span(1, attempts=2, frames=1), span(2))
    add_spans(corpus, span(1, frames=2, attempts=3))
    corpus.settle()
    assert_settled(
        corpus,
        [span(0, frames=3, attempts=2), span(1, frames=2, attempts=3), span(2)],
    )


def test_settling_keeps_the_vectors_of_each_row(corpus: Corpus) -> None:
    add_spans(corpus, span(0), span(1), span(2))
    key = ("span", "frame")
    before = sorted(stored_rows(corpus), key=lambda row: [row[name] for name in key])
    add_spans(corpus, span(1))
    corpus.settle()
    assert sorted(stored_rows(corpus), key=lambda row: [row[name] for name in key]) == before


def test_settling_keeps_spans_without_frames(corpus: Corpus) -> None:
    lost = {"frames": 0, "last_pts_s": None, "quarantined": True}
    add_spans(corpus, span(0, **lost), span(1, **lost))
    add_spans(corpus, span(0, attempts=2))
    corpus.settle()
    assert_settled(corpus, [span(0, attempts=2), span(1, **lost)])


@pytest.mark.parametrize("seed", range(2))
def test_several_settle_at_once(corpus: Corpus, seed: int) -> None:
    chance = random.Random(seed)
    best: dict[int, SpanRecord] = {}
    for _ in range(8):
        records = [
            span(number, attempts=attempt, frames=attempt)
            for number in chance.sample(range(6), 3)
            for attempt in [chance.choice((1, 1, 2))]
        ]
        add_spans(corpus, *records)
        best |= {
            r.span: r for r in records if r.span not in best or r.attempts > best[r.span].attempts
        }
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(Corpus(corpus.url).settle) for _ in range(3)]
        for future in running:
            future.result()
    seen = {row["span_id"] for row in stored_rows(corpus)}
    assert seen == {record.span_id for record in best.values()}
    Corpus(corpus.url).settle()
    assert_settled(corpus, list(best.values()))


class Stepper:
    """A thread that stops before and after each of its operations on storage, until `step`. It takes
    the place of the file system of the corpus that it works on.
    """

    def __init__(self, corpus: Corpus, job: Callable[[], Any]) -> None:
        self._fs, corpus.fs = corpus.fs, self
        self.running, self.error = True, None
        self._turn, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(job,), daemon=True)
        self._thread.start()

    def step(self) -> None:
        self._turn.release()
        self._stopped.acquire()

    def _run(self, job: Callable[[], Any]) -> None:
        self._turn.acquire()
        try:
            job()
        except BaseException as error:
            self.error = error
        self.running = False
        self._stopped.release()

    def _pause(self) -> None:
        if threading.current_thread() is self._thread:  # helpers of the thread do not stop
            self._stopped.release()
            self._turn.acquire()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._fs, name)
        if not callable(value):
            return value

        def operation(*args: Any, **options: Any) -> Any:
            self._pause()
            try:
                return value(*args, **options)
            finally:
                self._pause()

        return operation


stored_files = st.lists(
    st.dictionaries(st.integers(0, 4), st.integers(1, 2), min_size=1, max_size=4), max_size=5
)


@settings(max_examples=40, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(stored_files, stored_files, st.randoms(use_true_random=False))
def test_settlers_a_writer_and_a_reader_in_any_interleaving_lose_no_span(
    before: list[dict[int, int]], meanwhile: list[dict[int, int]], chance: random.Random
) -> None:
    url = f"memory://{os.urandom(6).hex()}"
    best: dict[str, SpanRecord] = {}

    def add(corpus: Corpus, files: list[dict[int, int]]) -> None:
        for numbers in files:
            records = [span(n, attempts=attempt, frames=attempt) for n, attempt in numbers.items()]
            add_spans(corpus, *records)

    def assert_nothing_lost() -> None:
        found = {name: record for name, (_, record) in Corpus(url).spans().items()}
        assert all(found[name].attempts >= best[name].attempts for name in best)
        best.update(found)

    add(Corpus(url), before)
    settlers, writer, reader = [Corpus(url), Corpus(url)], Corpus(url), Corpus(url)
    steppers = [Stepper(corpus, corpus.settle) for corpus in settlers]
    steppers.append(Stepper(writer, lambda: add(writer, meanwhile)))
    steppers.append(Stepper(reader, lambda: [reader.spans(), reader.spans()]))
    files = None
    while running := [stepper for stepper in steppers if stepper.running]:
        chance.choice(running).step()
        if files != (files := Corpus(url).files("frames")):
            assert_nothing_lost()
    for stepper in steppers:
        if stepper.error:
            raise stepper.error
    Corpus(url).settle()
    wanted = {n: max((f.get(n, 0) for f in before + meanwhile), default=0) for n in range(5)}
    assert_settled(Corpus(url), [span(n, attempts=a, frames=a) for n, a in wanted.items() if a])


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
