import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from records import CONFIG, NOW, add_spans, add_videos, span, video_row

from vsearch.config import Sampling, UserError
from vsearch.corpus import Corpus, vector_matrix
from vsearch.schema import DecodeError, SpanRecord


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
