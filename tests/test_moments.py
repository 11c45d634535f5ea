import statistics
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vsearch.moments import Moments, Scored, frame_ends, grow, moments_of, shots_of


class Stretch(NamedTuple):
    first: int
    last: int
    best: int
    score: float


def grown(
    peaks: list[int],
    bounds: list[tuple[int, int]],
    scored: Scored,
    background: float = 0.0,
    max_gap_s: float = 1.0,
    reach: int = 64,
) -> list[Stretch]:
    """The stretches that `grow` finds around peaks, each within its bounds."""
    lowest, highest = np.array(bounds).T
    found = grow(
        np.array(peaks), lowest, highest,
        lambda rows: Scored(*(values[rows] for values in scored)),
        background, max_gap_s, reach,
    )  # fmt: skip
    return [Stretch(*one) for one in zip(*(values.tolist() for values in found), strict=True)]


def stretch_of(
    values: list[float],
    peak: int,
    background: float = 0.0,
    max_gap_s: float = 1.0,
    pts_s: list[float] | None = None,
    lowest: int = 0,
    highest: int | None = None,
    taken: frozenset[int] = frozenset(),
    reach: int = 64,
) -> Stretch:
    """The stretch around a peak of rows of one second each, of no length unless said otherwise."""
    start_s = np.array(pts_s if pts_s is not None else range(len(values)), float)
    is_taken = np.isin(np.arange(len(values)), list(taken))
    scored = Scored(np.array(values, np.float32), start_s, start_s, is_taken)
    bounds = [(lowest, len(values) if highest is None else highest)]
    (found,) = grown([peak], bounds, scored, background, max_gap_s, reach)
    return found


def lasting(values: list[float], start_s: Any, end_s: Any) -> Scored:
    times_s = np.array(start_s, float), np.array(end_s, float)
    return Scored(np.array(values, np.float32), *times_s, np.zeros(len(values), bool))


def test_neighbours_above_half_the_height_are_merged() -> None:
    stretch = stretch_of([0.1, 0.5, 0.8, 0.75, 0.4, 0.1], peak=2)
    assert (stretch.first, stretch.last, stretch.best) == (1, 4, 2)
    assert np.isclose(stretch.score, (0.5 + 0.8 + 0.75 + 0.4) / 4)


def test_the_height_is_measured_from_the_background() -> None:
    values = [0.5, 0.59, 0.61, 0.8, 0.61, 0.59, 0.5]
    assert (s := stretch_of(values, 3, background=0.4)) and (s.first, s.last) == (2, 4)
    assert (s := stretch_of(values, 3, background=0.0)) and (s.first, s.last) == (0, 6)


def test_a_weak_row_is_bridged_only_within_the_gap() -> None:
    values = [0.9, 0.1, 0.8, 0.1, 0.1, 0.8]
    stretch = stretch_of(values, 0, max_gap_s=2.0)
    assert (stretch.first, stretch.last) == (0, 2)
    assert np.isclose(stretch.score, (0.9 + 0.8) / 2)
    assert stretch_of(values, 0, max_gap_s=3.0).last == 5


def test_a_pause_in_time_ends_the_stretch() -> None:
    assert stretch_of([0.9, 0.9, 0.9, 0.9], 1, pts_s=[0.0, 1.0, 2.5, 3.0]).last == 1
    assert stretch_of([0.9, 0.9, 0.9, 0.9], 2, pts_s=[0.0, 1.0, 2.5, 3.0]).first == 2


def test_the_gap_is_counted_from_the_end_of_a_row() -> None:
    (stretch,) = grown([0], [(0, 2)], lasting([0.9, 0.9], [0.0, 5.5], [5.0, 6.0]))
    assert (stretch.first, stretch.last) == (0, 1)


def test_other_videos_and_taken_rows_stay_outside() -> None:
    values = [0.9] * 8
    stretch = stretch_of(values, 4, lowest=2, highest=7)
    assert (stretch.first, stretch.last) == (2, 6)
    stretch = stretch_of(values, 4, taken=frozenset({1, 6}))
    assert (stretch.first, stretch.last) == (2, 5)


levels = st.lists(st.integers(0, 20).map(lambda n: n / 20), min_size=1, max_size=40)


@given(levels, st.integers(1, 7), st.sampled_from([0.5, 1.0, 2.0, 5.0]), st.data())
def test_how_far_is_looked_at_first_changes_nothing(
    values: list[float], reach: int, max_gap_s: float, data: st.DataObject
) -> None:
    peak = data.draw(st.integers(0, len(values) - 1))
    taken = data.draw(st.frozensets(st.integers(0, len(values) - 1), max_size=4)) - {peak}
    whole = stretch_of(values, peak, max_gap_s=max_gap_s, taken=taken)
    assert stretch_of(values, peak, max_gap_s=max_gap_s, taken=taken, reach=reach) == whole
    assert not taken & set(range(whole.first, whole.last + 1))


@given(st.lists(levels, min_size=1, max_size=5), st.integers(1, 7), st.data())
def test_stretches_are_the_same_together_and_alone(
    shots: list[list[float]], reach: int, data: st.DataObject
) -> None:
    stops = np.cumsum([len(shot) for shot in shots]).tolist()
    bounds = list(pairwise([0, *stops]))
    peaks = [data.draw(st.integers(low, stop - 1)) for low, stop in bounds]
    values = [value for shot in shots for value in shot]
    scored = lasting(values, range(len(values)), np.arange(len(values)) + 0.5)
    together = grown(peaks, bounds, scored, reach=reach)
    alone = [grown([p], [b], scored)[0] for p, b in zip(peaks, bounds, strict=True)]
    assert [one[:3] for one in together] == [one[:3] for one in alone]
    assert np.allclose([one.score for one in together], [one.score for one in alone])


@given(levels, st.sampled_from([1.0, 2.0, 3.0]), st.data())
def test_a_stretch_is_what_its_definition_says(
    values: list[float], max_gap_s: float, data: st.DataObject
) -> None:
    peak = data.draw(st.integers(0, len(values) - 1))
    threshold = np.float32(values[peak]) / 2
    strong = [i for i, v in enumerate(values) if np.float32(v) >= threshold or i == peak]
    inside = {peak}
    for row in strong[strong.index(peak) :]:
        if row - max(inside) <= max_gap_s:
            inside.add(row)
    for row in reversed(strong[: strong.index(peak)]):
        if min(inside) - row <= max_gap_s:
            inside.add(row)
    stretch = stretch_of(values, peak, max_gap_s=max_gap_s)
    assert (stretch.first, stretch.last, stretch.best) == (min(inside), max(inside), peak)
    mean = np.mean([values[row] for row in inside])
    assert np.isclose(stretch.score, min(mean, values[peak]), atol=1e-6)


# ── weighting ────────────────────────────────────────────────────────────────────────────────────


@given(levels, st.data())
def test_the_score_is_the_mean_over_the_time_of_the_rows(
    values: list[float], data: st.DataObject
) -> None:
    quarters = st.integers(1, 40).map(lambda n: n / 4)
    lasting_s = data.draw(st.lists(quarters, min_size=len(values), max_size=len(values)))
    peak = data.draw(st.integers(0, len(values) - 1))
    end_s = np.cumsum(lasting_s)
    scored = lasting(values, end_s - lasting_s, end_s)
    scores = scored.scores
    (stretch,) = grown([peak], [(0, len(values))], scored)
    rows = range(stretch.first, stretch.last + 1)
    strong = [row for row in rows if row == peak or scores[row] >= scores[peak] / 2]
    time_s = sum(lasting_s[row] for row in strong)
    mean = sum(values[row] * lasting_s[row] for row in strong) / time_s
    assert np.isclose(stretch.score, min(mean, values[peak]), atol=1e-6)


def test_a_long_row_counts_for_more_than_a_short_one() -> None:
    (stretch,) = grown([0], [(0, 2)], lasting([0.9, 0.6], [0.0, 9.0], [9.0, 10.0]))
    assert np.isclose(stretch.score, 0.9 * 0.9 + 0.1 * 0.6)


# ── moments ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Film:
    """Frames of a video: times on a grid of 1/4 s, some of which stand for 5 s or are followed by a
    gap; vectors of a few shots with noise.
    """

    pts_s: NDArray[np.float64]
    vectors: NDArray[np.float16]
    gaps: list[tuple[float, float]]


@st.composite
def films(draw: st.DrawFn) -> Film:
    frames = draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps = rng.choice([0.25, 0.5, 5.0], size=frames, p=[0.9, 0.07, 0.03])
    shot = np.cumsum(rng.random(frames) < draw(st.sampled_from([0.01, 0.2, 0.9])))
    centres = rng.standard_normal((frames + 1, 6))
    # Consecutive shots drift, so that some likenesses lie near any bound.
    vectors = centres[shot // 3] + 0.3 * centres[shot] + 0.1 * rng.standard_normal((frames, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pts_s = 100.0 + np.cumsum(steps)
    # What is lost begins with a frame or later, and ends with the next one.
    gaps = [
        (a + rng.choice([0.0, 0.1, 0.7]) * (b - a), b)
        for a, b in pairwise(pts_s.tolist())
        if b - a > rng.choice([0.3, 1.0, 9.0])
    ]
    return Film(pts_s, vectors.astype(np.float16), gaps)


bounds = st.sampled_from([0.5, 0.9, 0.97, 0.999])
some_films = films()


def joined(parts: list[Moments]) -> Moments:
    names = ("vectors", "start_s", "end_s", "best_s", "frames", "shots")
    return Moments(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def frames_of(moments: Moments) -> list[range]:
    """The numbers of the frames of each moment."""
    stops = np.cumsum(moments.frames).tolist()
    return [range(a, b) for a, b in pairwise([0, *stops])]


def ends_by_hand(film: Film) -> list[float]:
    times = film.pts_s.tolist()
    usual = statistics.median([b - a for a, b in pairwise(times)] or [0.04])
    ends = []
    for at, following in pairwise([*times, times[-1] + usual]):
        lost_from = [a for a, b in film.gaps if a < following and b > at]
        ends.append(min(following, max(at + usual, *lost_from)) if lost_from else following)
    return ends


def groups_by_hand(film: Film, alike: float, at_once: int) -> list[list[int]]:
    """The definition, frame by frame."""
    ends = ends_by_hand(film)
    groups: list[list[int]] = []
    for row, vector in enumerate(film.vectors.astype(np.float64)):
        if groups and row % at_once:
            first = film.vectors[groups[-1][0]].astype(np.float64)
            whole = film.pts_s[row] <= ends[row - 1] + 1e-6
            if whole and vector @ first >= alike:
                groups[-1].append(row)
                continue
        groups.append([row])
    return groups


def near_a_bound(film: Film, alike: float) -> bool:
    """Whether rounding alone may decide on some pair of frames."""
    cosines = film.vectors.astype(np.float64) @ film.vectors.astype(np.float64).T
    return bool((np.abs(cosines - alike) < 1e-6).any())


@given(some_films, bounds, st.integers(1, 400))
def test_moments_are_those_of_a_plain_loop(film: Film, alike: float, at_once: int) -> None:
    assume(not near_a_bound(film, alike))
    moments = joined(list(moments_of(film.pts_s, film.vectors, film.gaps, alike, at_once)))
    groups = groups_by_hand(film, alike, at_once)
    ends = ends_by_hand(film)
    assert [list(rows) for rows in frames_of(moments)] == groups
    assert moments.start_s.tolist() == [film.pts_s[rows[0]] for rows in groups]
    assert np.allclose(moments.end_s, [ends[rows[-1]] for rows in groups], atol=1e-9)
    for rows, vector, best_s in zip(groups, moments.vectors, moments.best_s, strict=True):
        part = film.vectors[rows].astype(np.float64)
        mean = part.mean(0) / np.linalg.norm(part.mean(0))
        assert np.allclose(vector, mean, atol=2e-3)
        best = rows[0] + int(np.flatnonzero(film.pts_s[rows] == best_s)[0])
        assert film.vectors[best].astype(np.float64) @ mean >= (part @ mean).max() - 1e-6


@given(some_films, bounds, st.integers(1, 400))
def test_every_frame_is_in_one_moment_and_gaps_are_in_none(
    film: Film, alike: float, at_once: int
) -> None:
    moments = joined(list(moments_of(film.pts_s, film.vectors, film.gaps, alike, at_once)))
    ends = frame_ends(film.pts_s, film.gaps)
    assert moments.frames.dtype == np.int32 and moments.frames.min() >= 1
    assert moments.frames.sum() == len(film.pts_s)
    assert moments.start_s[0] == film.pts_s[0] and moments.end_s[-1] == ends[-1]
    assert (moments.start_s < moments.end_s).all()
    assert (moments.end_s[:-1] <= moments.start_s[1:] + 1e-9).all()
    assert np.isclose((moments.end_s - moments.start_s).sum(), (ends - film.pts_s).sum())
    lengths = np.linalg.norm(moments.vectors.astype(np.float64), axis=1)
    assert np.allclose(lengths, 1, atol=2e-3)
    assert moments.vectors.dtype == np.float16
    for rows, start_s, end_s, best_s in zip(
        frames_of(moments), moments.start_s, moments.end_s, moments.best_s, strict=True
    ):
        assert best_s in film.pts_s[rows.start : rows.stop]
        assert start_s <= best_s < end_s
        first = film.vectors[rows[0]].astype(np.float32)
        cosines = film.vectors[rows[1:]].astype(np.float32) @ first
        assert (cosines >= alike - 1e-6).all()
        assert (film.pts_s[rows[1:]] <= ends[rows[:-1]] + 1e-6).all()
    usual = float(np.median(np.diff(film.pts_s))) if len(film.pts_s) > 1 else 0.04
    for a, b in film.gaps:  # of each, a frame's usual time at most is in a moment
        inside = np.minimum(moments.end_s, b) - np.maximum(moments.start_s, a)
        assert inside.clip(0).sum() <= usual + 1e-9


@given(some_films, st.integers(1, 400))
def test_without_a_bound_every_frame_is_a_moment(film: Film, at_once: int) -> None:
    moments = joined(list(moments_of(film.pts_s, film.vectors, film.gaps, None, at_once)))
    assert (moments.vectors == film.vectors).all()
    assert (moments.start_s == film.pts_s).all() and (moments.best_s == film.pts_s).all()
    assert (moments.end_s == frame_ends(film.pts_s, film.gaps)).all()
    assert (moments.frames == 1).all()


@given(st.integers(1, 300), st.integers(1, 100))
def test_pieces_divide_a_moment_and_do_nothing_else(frames: int, at_once: int) -> None:
    still = np.tile(np.array([0.6, 0.8], np.float16), (frames, 1))
    pts_s = np.arange(frames) / 25
    pieces = list(moments_of(pts_s, still, [], 0.97, at_once))
    assert [len(piece.frames) for piece in pieces] == [1] * -(-frames // at_once)
    assert all(piece.frames[0] <= at_once for piece in pieces)
    assert (
        joined(pieces).end_s.tolist()
        == frame_ends(pts_s, [])[[*range(at_once - 1, frames - 1, at_once), -1]].tolist()
    )


def test_a_moment_may_be_longer_than_what_is_compared_at_once() -> None:
    vectors = np.repeat(np.eye(2, dtype=np.float16), [1000, 3], axis=0)
    moments = joined(list(moments_of(np.arange(1003.0), vectors, [], 0.97)))
    assert moments.frames.tolist() == [1000, 3]


def shots_by_hand(pts_s: NDArray[np.float64], dino: NDArray[np.float16], cut: float) -> list[int]:
    """The definition, frame by frame: what is on the screen in the half second to either side."""
    unit = dino.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    shots = [0]
    for row in range(1, len(unit)):
        since, until = pts_s[row] - 0.5 + 1e-6, pts_s[row] + 0.5 - 1e-6
        after = unit[row:][pts_s[row:] < until] @ unit[row - 1]
        before = unit[:row][(pts_s[1 : row + 1] > since)] @ unit[row]
        shots.append(shots[-1] + int(max(after.max(), before.max()) < cut))
    return shots


@given(
    st.integers(0, 1000),
    st.integers(1, 60),
    st.integers(1, 70),
    st.sampled_from([2, 6, 10]),
    st.booleans(),
)
def test_shots_are_those_of_a_plain_loop(
    seed: int, frames: int, at_once: int, fps: int, steady: bool
) -> None:
    rng = np.random.default_rng(seed)
    scenes = rng.standard_normal((4, 6))
    dino = scenes[rng.integers(4, size=-(-frames // 3)).repeat(3)[:frames]]
    dino = (dino + 0.2 * rng.standard_normal(dino.shape)).astype(np.float16)
    steps = np.ones(frames) if steady else rng.choice([0.1, 1.0, 30.0], size=frames)
    pts_s = 7 + np.cumsum(steps) / fps
    shots = shots_of(pts_s, dino, 0.75, at_once=at_once)
    assert shots.dtype == np.int32
    assert shots.tolist() == shots_by_hand(pts_s, dino, 0.75)


def test_a_flash_and_a_frame_without_a_vector_are_no_cuts() -> None:
    seen = np.eye(3, dtype=np.float16)
    flash = seen[[0] * 9 + [2] * 4 + [0] * 9 + [1] * 9]
    assert shots_of(np.arange(31) / 10, flash, 0.75).tolist() == [0] * 22 + [1] * 9
    one_a_second = shots_of(np.arange(31.0), flash, 0.75).tolist()
    assert one_a_second == [0] * 9 + [1] * 4 + [2] * 9 + [3] * 9
    # A window that covers the screen for a minute is one frame, as is a flash.
    times_s = np.concatenate([np.arange(10) / 25, 60 + np.arange(10) / 25])
    screen = seen[[0] * 9 + [2] + [0] * 10]
    assert shots_of(times_s, screen, 0.75).tolist() == [0] * 9 + [1] + [2] * 10
    assert shots_of(np.arange(20) / 25, screen, 0.75).tolist() == [0] * 20
    assert shots_of(np.arange(9.0), np.zeros((9, 3), np.float16), 0.75).tolist() == [0] * 9
    assert shots_of(np.zeros(0), np.zeros((0, 3), np.float16), 0.75).tolist() == []


@given(some_films, bounds, st.integers(0, 1000))
def test_no_moment_lies_in_two_shots(film: Film, alike: float, seed: int) -> None:
    cuts = np.random.default_rng(seed).random(len(film.pts_s)) < 0.2
    shots = np.cumsum(cuts, dtype=np.int32)
    parts = list(moments_of(film.pts_s, film.vectors, film.gaps, alike, shots=shots))
    for rows, shot in zip(frames_of(joined(parts)), joined(parts).shots, strict=True):
        assert set(shots[rows.start : rows.stop].tolist()) == {shot}


def test_a_video_without_frames_has_no_moments() -> None:
    assert list(moments_of(np.zeros(0), np.zeros((0, 4), np.float16), [], 0.97)) == []


SLIDES = np.eye(3, dtype=np.float16)[[0, 0, 0, 1, 2, 2]]
SLIDES_S = np.array([0.0, 0.1, 0.2, 0.3, 40.3, 40.4])
"""A recording of a screen: a new picture only where something changes."""


def test_a_slide_is_one_moment_for_as_long_as_it_stands() -> None:
    moments = joined(list(moments_of(SLIDES_S, SLIDES, [], 0.97)))
    assert moments.start_s.tolist() == [0.0, 0.3, 40.3]
    assert moments.end_s.tolist()[:2] == [0.3, 40.3]
    assert moments.frames.tolist() == [3, 1, 2]
    # The same picture before and after makes no difference.
    (same,) = moments_of(SLIDES_S, SLIDES[[0] * 6], [], 0.97)
    assert (same.start_s.tolist(), same.frames.tolist()) == ([0.0], [6])


@pytest.mark.parametrize(
    ("gap", "end_s"),
    [
        pytest.param((0.3, 40.3), 0.4, id="lost from the frame on"),
        pytest.param((0.35, 40.3), 0.4, id="lost before the usual time is over"),
        pytest.param((20.0, 40.0), 20.0, id="spans that lack"),
    ],
)
def test_a_gap_ends_a_moment(gap: tuple[float, float], end_s: float) -> None:
    for vectors in (SLIDES, SLIDES[[0] * 6]):
        moments = joined(list(moments_of(SLIDES_S, vectors, [gap], 0.97)))
        assert moments.start_s[-1] == 40.3
        assert moments.end_s[-2:].tolist() == pytest.approx([end_s, 40.5], abs=1e-9)


# ── ends of frames ───────────────────────────────────────────────────────────────────────────────


@given(some_films)
def test_a_frame_ends_as_the_plain_loop_says(film: Film) -> None:
    assert np.allclose(frame_ends(film.pts_s, film.gaps), ends_by_hand(film), atol=1e-9)


def test_a_frame_lasts_until_the_next_unless_there_is_a_gap() -> None:
    pts_s = np.array([0.0, 1.0, 2.0, 6.0, 7.0, 20.0])
    assert frame_ends(pts_s, []).tolist() == [1.0, 2.0, 6.0, 7.0, 20.0, 21.0]
    assert frame_ends(pts_s, [(7.0, 20.0)]).tolist() == [1.0, 2.0, 6.0, 7.0, 8.0, 21.0]
    assert frame_ends(pts_s, [(3.5, 6.0), (9.0, 15.0)]).tolist() == [1.0, 2.0, 3.5, 7.0, 9.0, 21.0]
    # One that reaches over several frames, and one behind the last.
    assert frame_ends(pts_s, [(3.5, 18.0)]).tolist() == [1.0, 2.0, 3.5, 7.0, 8.0, 21.0]
    assert frame_ends(pts_s, [(20.0, 90.0)]).tolist() == [1.0, 2.0, 6.0, 7.0, 20.0, 21.0]


def test_rounding_makes_no_gap() -> None:
    pts_s = np.array([1.1, 2.1, 3.1, 43.1]) + 26.5 * 3600
    gaps = [(pts_s[1], pts_s[2] + 1e-10), (pts_s[3] - 1e-10, pts_s[3] + 9)]
    assert frame_ends(pts_s, gaps)[1:3].tolist() == [pts_s[2], pts_s[3]]


def test_a_single_frame_lasts_as_one_of_25_a_second() -> None:
    assert frame_ends(np.array([3.0]), []).tolist() == [3.04]
    assert frame_ends(np.zeros(0), []).shape == (0,)


def test_a_time_that_is_given_twice_lasts_as_long_as_usual() -> None:
    assert frame_ends(np.array([0.0, 1.0, 1.0, 2.0]), []).tolist() == [1.0, 2.0, 2.0, 3.0]
