import math
from fractions import Fraction
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsearch.config import Sampling, UserError
from vsearch.sampling import (
    FrameSampler,
    SpanGrid,
    expected_spans,
    missing_runs,
    span_grid,
    span_id,
)

rates = st.none() | st.sampled_from([0.1, 1 / 3, 0.5, 1.0, 2.0, 29.97, 30.0]) | st.floats(0.01, 240)
samplings = st.builds(
    Sampling, fps=rates, span_s=st.floats(0.1, 120), span_frames=st.integers(1, 2000)
)
video_rates = st.none() | st.floats(0, 1000) | st.sampled_from([float("nan"), float("inf"), -1.0])
times = st.fractions(-100, 10_000, max_denominator=90_000)
grids = st.builds(span_grid, samplings, video_rates, times)


@given(grids, times)
def test_a_time_belongs_to_exactly_one_span(grid: SpanGrid, pts_s: Fraction) -> None:
    number = grid.number_of(pts_s)
    around = range(max(0, number - 2), number + 3)
    owners = [k for k in around if grid.start_s(k) <= pts_s < grid.end_s(k)]
    assert owners == ([number] if pts_s >= grid.origin_s else [])
    assert number == 0 or pts_s >= grid.origin_s


@given(samplings, video_rates, times)
def test_the_grid_fits_the_video_and_the_limits(
    sampling: Sampling, fps: float | None, start_s: Fraction
) -> None:
    grid = span_grid(sampling, fps, start_s)
    assert grid.start_s(0) <= start_s < grid.end_s(0)
    assert grid.length_s >= 1
    interval = 0 if sampling.fps is None else 1 / Fraction(sampling.fps).limit_denominator(1000)
    rate = min(fps if fps and 0 < fps < math.inf else 30.0, sampling.fps or math.inf)
    longest = min(sampling.span_s, sampling.span_frames / rate)
    assert grid.length_s <= max(1, longest) + interval
    if interval:
        assert (grid.length_s / interval).denominator == 1
        assert (grid.origin_s / interval).denominator == 1


@given(grids, times, st.floats(0.001, 5000))
def test_expected_spans_is_the_number_that_the_duration_reaches(
    grid: SpanGrid, start_s: Fraction, duration_s: float
) -> None:
    grid = SpanGrid((start_s // grid.length_s) * grid.length_s, grid.length_s)
    count = expected_spans(grid, start_s, duration_s)
    end_s = start_s + Fraction(duration_s)
    assert grid.start_s(count - 1) < end_s <= grid.end_s(count - 1)


@pytest.mark.parametrize("duration_s", [None, 0.0, -3.0, float("nan"), float("inf")])
def test_expected_spans_of_an_unknown_duration_is_one(duration_s: float | None) -> None:
    assert expected_spans(SpanGrid(Fraction(0), Fraction(2)), Fraction(0), duration_s) == 1


@given(st.integers(1, 40), st.sets(st.integers(0, 50)), st.booleans(), st.integers(1, 10))
def test_missing_runs_cover_exactly_what_is_not_done(
    expected: int, done: set[int], ended: bool, longest: int
) -> None:
    runs = missing_runs(expected, done, ended, longest)
    closed = [run for run in runs if run.stop is not None]
    assert all(0 < run.stop - run.first <= longest for run in closed)
    covered = list(chain.from_iterable(range(run.first, run.stop) for run in closed))
    known = max(done, default=-1) + 1
    if ended:
        assert closed == runs
        assert covered == [k for k in range(known) if k not in done]
    else:
        assert [run for run in runs if run.stop is None] == runs[-1:]
        horizon = max(expected, known) + 2
        covered += range(runs[-1].first, horizon)
        assert covered == [k for k in range(horizon) if k not in done]


@given(samplings, video_rates, st.lists(times, min_size=1, max_size=60))
def test_sampling_span_by_span_keeps_the_same_frames(
    sampling: Sampling, fps: float | None, pts: list[Fraction]
) -> None:
    pts = sorted(pts)
    grid = span_grid(sampling, fps, pts[0])
    whole = FrameSampler(sampling.fps)
    alone: dict[int, FrameSampler] = {}
    for pts_s in pts:
        sampler = alone.setdefault(grid.number_of(pts_s), FrameSampler(sampling.fps))
        assert sampler.keep(pts_s) == whole.keep(pts_s)


@pytest.mark.parametrize(
    ("fps", "kept"),
    [(None, [0, 1, 2, 3, 4, 5]), (1.0, [0, 3, 5]), (2.0, [0, 2, 3, 5]), (0.5, [0, 5])],
)
def test_the_first_frame_of_each_interval_is_kept(fps: float | None, kept: list[int]) -> None:
    pts = [Fraction(tenths, 10) for tenths in (1, 4, 5, 10, 14, 29)]
    sampler = FrameSampler(fps)
    assert [i for i, pts_s in enumerate(pts) if sampler.keep(pts_s)] == kept


ids = st.tuples(st.text("0123456789abcdef", max_size=4), st.text(max_size=6), st.integers(0, 10**6))


@given(st.sets(ids, min_size=2, max_size=20))
def test_span_ids_are_distinct_and_stable(names: set[tuple[str, str, int]]) -> None:
    assert len({span_id(*name) for name in names}) == len(names)
    assert [span_id(*name) for name in names] == [span_id(*name) for name in names]


@pytest.mark.parametrize(
    "wrong",
    [{"fps": 0.0}, {"fps": float("nan")}, {"fps": 5000.0}, {"span_s": 0}, {"span_frames": 0}],
)
def test_impossible_sampling_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError):
        Sampling(**wrong)
