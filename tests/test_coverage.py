import json
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import NOW, span, video_row

from vsearch.coverage import VideoState, as_dict, video_state
from vsearch.schema import DecodeError, SpanRecord

LONG = {"duration_s": 20.0, "expected_spans": 4}
LATER = NOW + timedelta(hours=1)


def state_of(
    spans: list[SpanRecord] | None = None, sampled_fps: float | None = None, **row: Any
) -> VideoState:
    return video_state([video_row(**row)], spans or [], sampled_fps)


def lost(number: int, **values: Any) -> SpanRecord:
    """A span that killed its decoder twice."""
    error = DecodeError(5.0 * number, "quarantined after 2 attempts: the decoder crashed (SIGSEGV)")
    return span(
        number,
        **{
            "frames": 0,
            "embedded": 0,
            "last_pts_s": None,
            "errors": [error],
            "attempts": 2,
            "quarantined": True,
        }
        | values,
    )


EMPTY = {"frames": 0, "last_pts_s": None, "ended": True}
NO_KEY = [DecodeError(0.0, "no key")]


# ── status ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("row", "spans", "status", "reason"),
    [
        ({}, [span(0), span(1, ended=True)], "indexed", None),
        ({"duration_s": None}, [span(0, ended=True)], "indexed", None),
        ({}, [], "pending", "0 of about 2 spans embedded"),
        ({}, [span(0)], "pending", "1 of about 2 spans embedded"),
        ({}, [span(0), span(1)], "pending", "2 of about 2 spans embedded"),
        ({}, [span(0), span(2, ended=True)], "pending", "2 of about 2 spans embedded"),
        ({"status": "failed", "reason": "the file is empty"}, [], "failed", "the file is empty"),
        ({"status": "unreadable", "reason": "no such file"}, [], "failed", "no such file"),
        ({}, [span(0, **EMPTY, errors=NO_KEY)], "failed", "no key"),
        ({}, [span(0, **EMPTY)], "failed", "no frame can be decoded"),
        (
            {},
            [span(0, errors=[DecodeError(1, "damaged packet")]), span(1, ended=True)],
            "partial",
            "damaged packet at 1.000 s",
        ),
        (
            {},
            [
                span(1, ended=True, errors=[DecodeError(7.5, "second")]),
                span(0, errors=[DecodeError(1.25, "first"), DecodeError(2, "damaged frame")]),
            ],
            "partial",
            "first at 1.250 s (and 2 more)",
        ),
        (
            {"start_s": 20.0, "zero_s": 18.5},
            [span(0, errors=[DecodeError(21, "damaged packet")]), span(1, ended=True)],
            "partial",
            "damaged packet at 2.500 s",
        ),
        (
            {},
            [span(0, ended=True)],
            "partial",
            "the pictures end 5.5 s before the 10.0 s claimed",
        ),
        ({"start_s": 20.0, "duration_s": 5.0}, [span(4, span=0, ended=True)], "indexed", None),
        (
            {"start_s": 20.0},
            [span(4, span=0, ended=True)],
            "partial",
            "the pictures end 5.5 s before the 10.0 s claimed",
        ),
    ],
)
def test_the_state_of_a_video_follows_from_its_spans(
    row: dict[str, Any], spans: list[SpanRecord], status: str, reason: str | None
) -> None:
    state = state_of(spans, **row)
    assert (state.status, state.reason) == (status, reason)
    assert state.frames == sum(record.frames for record in spans)


@pytest.mark.parametrize(("fps", "status"), [(None, "partial"), (0.1, "indexed")])
def test_sparse_sampling_does_not_make_a_video_partial(fps: float | None, status: str) -> None:
    state = state_of([span(0, last_pts_s=10.0, ended=True)], fps, duration_s=19.0)
    assert state.status == status


def test_what_was_done_for_a_video_is_summed_up() -> None:
    first = span(0, frames=5, embedded=2, decode_s=0.5, encode_s=2, attempts=3)
    last = span(1, frames=4, embedded=4, decode_s=0.25, encode_s=1, ended=True)
    state = state_of([first, last])
    assert (state.frames, state.embedded) == (9, 6)
    assert (state.decode_s, state.encode_s) == (0.75, 3)
    assert (state.attempts, state.quarantined) == (3, False)


@pytest.mark.parametrize(
    ("reason", "attempts", "quarantined"),
    [
        ("quarantined after 2 attempts: the decoder hung: nothing came for 60 s", 2, True),
        ("not a readable video file: invalid data", 1, False),
        ("not a readable video file: invalid data", 3, False),
    ],
    ids=["killed its decoder", "refused", "refused again"],
)
def test_a_header_is_quarantined_only_if_it_killed_its_decoder(
    reason: str, attempts: int, quarantined: bool
) -> None:
    state = state_of(status="failed", reason=reason, attempts=attempts, quarantined=quarantined)
    assert (state.status, state.reason, state.attempts) == ("failed", reason, attempts)
    assert state.quarantined == quarantined


# ── places ───────────────────────────────────────────────────────────────────────────────────────


def test_a_video_lives_where_it_was_found_last() -> None:
    rows = [
        video_row("b", tags={"camera": "1", "town": "Ulm"}),
        video_row("a", tags={"camera": "2"}, ingested_at=LATER),
        video_row("c"),
    ]
    state = video_state(rows, [], None)
    assert (state.uri, state.ingested_at) == ("/videos/a.mp4", LATER)
    assert state.copies == ["/videos/b.mp4", "/videos/c.mp4"]
    assert state.tags == {"camera": "2", "town": "Ulm"}


@pytest.mark.parametrize("status", ["failed", "unreadable"])
def test_a_copy_that_cannot_be_read_does_not_hide_one_that_can(status: str) -> None:
    bad = video_row("b", video_id="a", status=status, reason="cannot be read", ingested_at=LATER)
    bad |= {"start_s": None, "duration_s": None, "zero_s": None, "expected_spans": None}
    state = video_state([video_row("a"), bad], [span(0), span(1, ended=True)], None)
    assert (state.uri, state.status) == ("/videos/a.mp4", "indexed")
    assert state.copies == ["/videos/b.mp4"]


@pytest.mark.parametrize(
    ("older", "newer", "kept"),
    [
        ("mtime", "mtime", "older"),
        ("name", "mtime", "older"),
        ("mtime", "container", "newer"),
        ("ingest", "mtime", "newer"),
        ("mtime", "name", "newer"),
    ],
)
def test_the_most_trusted_clock_of_all_places_counts(older: str, newer: str, kept: str) -> None:
    gone = video_row("old", status="gone", recorded_at_source=older, tags={"left": "behind"})
    found = video_row("new", recorded_at=LATER, recorded_at_source=newer, ingested_at=LATER)
    for rows in ([gone, found], [found, gone]):
        state = video_state(rows, [], None)
        assert (state.uri, state.copies, state.tags) == ("/videos/new.mp4", [], {})
        wanted = (NOW, older) if kept == "older" else (LATER, newer)
        assert (state.recorded_at, state.recorded_at_source) == wanted


# ── extent and gaps ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("row", "spans", "expected_s", "gaps"),
    [
        pytest.param(LONG, [span(0), span(1), span(2), span(3, ended=True)], 20, [], id="whole"),
        pytest.param(LONG, [], 20, [(0, 20)], id="nothing yet"),
        pytest.param(LONG, [span(0)], 20, [(5, 20)], id="only the first"),
        pytest.param(
            LONG, [span(3, ended=True), span(0)], 20, [(5, 15)], id="pending in the middle"
        ),
        pytest.param(
            LONG,
            [span(1), span(3, ended=True)],
            20,
            [(0, 5), (10, 15)],
            id="pending here and there",
        ),
        pytest.param(
            {**LONG, "duration_s": 17.0},
            [span(0), span(1), span(2)],
            17,
            [(15, 17)],
            id="pending at the end",
        ),
        pytest.param(
            {**LONG, "duration_s": 60.0},
            [span(0), span(2)],
            60,
            [(5, 10), (15, 60)],
            id="pending, and a header that claims more than its spans hold",
        ),
        pytest.param(
            LONG,
            [span(0), lost(1), span(2), span(3, ended=True)],
            20,
            [(5, 10)],
            id="quarantined in the middle",
        ),
        pytest.param(
            LONG,
            [span(0), span(1), lost(2, ended=True)],
            20,
            [(9.5, 20)],
            id="quarantined open end",
        ),
        pytest.param(LONG, [lost(0, ended=True)], 20, [(0, 20)], id="quarantined as a whole"),
        pytest.param(
            LONG,
            [
                span(0, gaps=[(3.0, 4.25)]),
                span(1, gaps=[(6.0, 7.0), (8.0, 9.0)]),
                span(2),
                span(3, ended=True),
            ],
            20,
            [(3, 4.25), (6, 7), (8, 9)],
            id="lost inside spans",
        ),
        pytest.param(
            LONG,
            [span(0, gaps=[(4.0, 5.5)]), lost(1), span(2, gaps=[(9.0, 11.0)]), span(3, ended=True)],
            20,
            [(4, 11)],
            id="lost around a quarantined span",
        ),
        pytest.param(
            LONG,
            [span(0), span(1), span(2, **EMPTY), span(3, ended=True)],
            20,
            [(9.5, 15)],
            id="reading stopped before the end",
        ),
        pytest.param(
            LONG,
            [span(0, **EMPTY), span(1), span(2, **EMPTY), span(3, **EMPTY)],
            20,
            [(0, 5), (9.5, 20)],
            id="reading stopped at once, and the tail never came",
        ),
        pytest.param(
            LONG, [span(0), span(1, ended=True)], 20, [(9.5, 20)], id="the tail never came"
        ),
        pytest.param(
            {**LONG, "duration_s": 11.0},
            [span(0), span(1, ended=True)],
            11,
            [],
            id="sound behind the last picture",
        ),
        pytest.param(
            {"duration_s": 7.0}, [span(0), span(1, ended=True)], 9.54, [], id="a modest header"
        ),
        pytest.param(
            {"duration_s": None, "expected_spans": 1},
            [span(0), span(1, ended=True)],
            9.54,
            [],
            id="no duration",
        ),
        pytest.param(
            {"duration_s": None, "expected_spans": 1, "fps": None},
            [span(0), span(2)],
            14.54,
            [(5, 10)],
            id="no duration, no rate, pending",
        ),
    ],
)
def test_expected_indexed_and_gaps(
    row: dict[str, Any],
    spans: list[SpanRecord],
    expected_s: float,
    gaps: list[tuple[float, float]],
) -> None:
    state = state_of(spans, **row)
    assert state.expected_s == pytest.approx(expected_s)
    assert state.gaps == [pytest.approx(gap) for gap in gaps]
    assert state.indexed_s == pytest.approx(expected_s - sum(b - a for a, b in gaps))
    assert state.quarantined == any(record.quarantined for record in spans)


def test_times_are_as_players_show_them() -> None:
    error = DecodeError(106.0, "damaged packet")
    spans = [
        span(20, span=0),
        span(21, span=1, errors=[error], gaps=[(106.0, 108.0)]),
        span(23, span=3, ended=True),
    ]
    state = state_of(spans, start_s=101.0, zero_s=99.0, duration_s=19.0, expected_spans=4)
    assert state.expected_s == 19
    assert state.gaps == [(7.0, 9.0), (11.0, 16.0)]
    assert state.errors == [DecodeError(7.0, "damaged packet")]
    assert state.indexed_s == 12


def test_the_first_span_begins_where_the_video_does() -> None:
    row = {"start_s": 103.0, "zero_s": 103.0, "duration_s": 7.0}
    state = state_of([span(21, span=1, ended=True)], **row)
    assert (state.expected_s, state.gaps, state.indexed_s) == (7, [(0, 2)], 5)


@pytest.mark.parametrize("spans", [[], [span(0, frames=0, last_pts_s=None)]])
def test_without_a_duration_or_a_frame_nothing_is_expected(spans: list[SpanRecord]) -> None:
    state = state_of(spans, duration_s=None, expected_spans=1)
    assert (state.status, state.expected_s, state.indexed_s, state.gaps) == ("pending", None, 0, [])


def test_a_failed_probe_has_neither_length_nor_gaps() -> None:
    nothing = dict.fromkeys(("start_s", "duration_s", "zero_s", "span_s", "expected_spans", "fps"))
    state = state_of(status="failed", reason="the file is empty", video_id="", **nothing)
    assert (state.expected_s, state.indexed_s, state.gaps) == (None, 0, [])
    assert (state.duration_s, state.zero_s) == (None, 0)


@st.composite
def videos(draw: st.DrawFn) -> VideoState:
    """A video of any header, with spans that agree with its grid and with nothing else."""
    start_s = draw(st.integers(-100_000, 1_000_000)) / 1000
    span_s = draw(st.sampled_from([1.0, 5.0, 17.0, 20.0]))
    origin_s = start_s // span_s * span_s
    within = st.integers(0, 100).map(lambda hundredths: hundredths / 100)
    spans = []
    for number in draw(st.sets(st.integers(0, 8))):
        first_s = origin_s + number * span_s
        pts_s = sorted(first_s + share * span_s for share in draw(st.lists(within, max_size=4)))
        ends = sorted(first_s + 2 * share * span_s for share in draw(st.lists(within, max_size=4)))
        quarantined = not pts_s and draw(st.booleans())
        record = span(
            number,
            frames=len(pts_s),
            last_pts_s=max(pts_s, default=None),
            ended=draw(st.booleans()),
            gaps=list(zip(ends[::2], ends[1::2], strict=False)),
            errors=[DecodeError(first_s, "damaged packet")] if quarantined else [],
            quarantined=quarantined,
        )
        spans.append(record)
    return state_of(
        spans,
        draw(st.none() | st.sampled_from([0.1, 1.0, 25.0])),
        start_s=start_s,
        zero_s=draw(st.sampled_from([0.0, start_s])),
        duration_s=draw(st.none() | st.integers(-10, 200).map(float)),
        span_s=span_s,
        expected_spans=draw(st.integers(1, 10)),
        fps=draw(st.none() | st.sampled_from([0.0, 1.0, 29.97])),
    )


@given(videos())
def test_gaps_and_what_is_indexed_make_up_what_is_expected(state: VideoState) -> None:
    lengths_s = sum(b - a for a, b in state.gaps)
    if state.expected_s is None:
        assert (state.gaps, state.indexed_s) == ([], 0)
        return
    assert all(a < b for a, b in state.gaps)
    assert all(left[1] < right[0] for left, right in pairwise(state.gaps))
    assert 0 <= state.indexed_s <= state.expected_s
    assert state.indexed_s + lengths_s == pytest.approx(state.expected_s, abs=1e-6)
    if state.frames == 0:
        assert state.indexed_s == pytest.approx(0, abs=1e-6)
    json.dumps(as_dict([state], None))


# ── for machines ─────────────────────────────────────────────────────────────────────────────────


def test_the_coverage_of_a_corpus_is_plain_json() -> None:
    damage = [DecodeError(1.0, "damaged packet")]
    done = {"embedded": 3, "decode_s": 0.5, "encode_s": 1.5}
    states = [
        state_of([span(0, **done), span(1, ended=True)], tags={"camera": "1"}),
        state_of([span(0, errors=damage), span(1, ended=True)], name="hurt"),
        state_of([span(0), lost(1, ended=True)], name="lost"),
        state_of([span(0)], name="half"),
        state_of(name="bad", status="failed", reason="the file is empty", start_s=None),
    ]
    index = {"snapshot": "v1", "kind": "exact", "space": "clip", "rows": 7}
    index |= {"videos": frozenset({"a", "hurt", "unknown"})}
    found = json.loads(json.dumps(as_dict(states, index)))
    assert found["videos"] == {
        "total": 5,
        "indexed": 1,
        "partial": 2,
        "failed": 1,
        "pending": 1,
        "quarantined": 1,
    }
    assert (found["frames"], found["embedded"]) == (30, 28)
    assert (found["decode_s"], found["encode_s"]) == (0.5, 1.5)
    assert found["expected_s"] == 40
    assert found["indexed_s"] == pytest.approx(10 + 10 + 4.5 + 5)
    assert found["failed"] == [{"video": "/videos/bad.mp4", "reason": "the file is empty"}]
    assert [video["video"] for video in found["partial"]] == [
        "/videos/hurt.mp4",
        "/videos/lost.mp4",
    ]
    assert [video["video"] for video in found["pending"]] == ["/videos/half.mp4"]
    assert found["index"] == {**index, "videos": 3}
    by_uri = {video["uri"]: video for video in found["per_video"]}
    assert [uri for uri, video in by_uri.items() if video["in_index"]] == [
        "/videos/a.mp4",
        "/videos/hurt.mp4",
    ]
    assert by_uri["/videos/a.mp4"]["tags"] == {"camera": "1"}
    assert by_uri["/videos/a.mp4"]["recorded_at"] == NOW.isoformat()
    assert by_uri["/videos/hurt.mp4"]["errors"] == [{"at_s": 1.0, "reason": "damaged packet"}]
    assert by_uri["/videos/lost.mp4"]["gaps"] == [[4.5, 10.0]]


def test_without_a_snapshot_nothing_is_in_the_index() -> None:
    found = as_dict([state_of()], None)
    assert found["index"] is None
    assert [video["in_index"] for video in found["per_video"]] == [False]
    assert as_dict([], None)["videos"]["total"] == 0
