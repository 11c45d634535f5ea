import math
from fractions import Fraction
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vsearch.config import Sampling, UserError
from vsearch.sampling import (
    FrameSampler,
    SpanGrid,
    change,
    expected_spans,
    has_pairs,
    missing_runs,
    signature,
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


# ── which spans have pairs ───────────────────────────────────────────────────────────────────────

SPAN_IDS = [span_id(f"video {n // 50}", "encoders", n % 50) for n in range(10_000)]


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.25, 0.5, 0.9, 0.999])
def test_the_share_of_spans_with_pairs_is_met(share: float) -> None:
    count = sum(has_pairs(name, share) for name in SPAN_IDS)
    deviation = math.sqrt(len(SPAN_IDS) * share * (1 - share))
    assert abs(count - share * len(SPAN_IDS)) < 4 * deviation


def test_a_larger_share_only_adds_spans_and_1_takes_all() -> None:
    shares = [1e-9, 0.001, 0.1, 0.3, 0.300001, 0.7, 1.0]
    chosen = [{name for name in SPAN_IDS if has_pairs(name, share)} for share in shares]
    assert all(fewer <= more for fewer, more in pairwise(chosen))
    assert chosen[-1] == set(SPAN_IDS)
    assert has_pairs("f" * 16, 1.0) and not has_pairs("f" * 16, 0.999)


def test_every_video_has_its_share_of_pairs() -> None:
    per_video = [
        sum(has_pairs(name, 0.5) for name in SPAN_IDS[n : n + 50]) for n in range(0, 10_000, 50)
    ]
    assert min(per_video) > 8 and max(per_video) < 42


# ── how alike pictures are ───────────────────────────────────────────────────────────────────────

sides = st.integers(8, 80)


@st.composite
def pictures(draw: st.DrawFn) -> NDArray[np.uint8]:
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return random.integers(0, 256, (draw(sides), draw(sides), 3), np.uint8)


@given(pictures())
def test_a_signature_has_square_cells_sixteen_or_a_few_more_to_the_short_side(
    picture: NDArray[np.uint8],
) -> None:
    found = signature(picture)
    short, cells = min(picture.shape[:2]), min(found.shape[:2])
    side = max(1, short // 16)
    assert found.dtype == np.float32
    assert found.shape == (picture.shape[0] // side, picture.shape[1] // side, 3)
    assert cells == short if short < 32 else 16 <= cells <= 24
    corner = picture[: picture.shape[0] // found.shape[0], : picture.shape[1] // found.shape[1]]
    assert np.allclose(found[0, 0], corner.reshape(-1, 3).mean(axis=0), atol=1e-3)


@given(pictures(), st.data())
def test_no_pixel_is_left_out_of_a_signature(
    picture: NDArray[np.uint8], data: st.DataObject
) -> None:
    changed = picture.copy()
    place = tuple(data.draw(st.integers(0, side - 1)) for side in picture.shape)
    changed[place] ^= 128
    assert change(signature(picture), signature(changed)) > 1


@given(pictures(), st.integers(-60, 60))
def test_change_is_the_difference_in_gray_levels_of_the_cell_that_differs_most(
    picture: NDArray[np.uint8], step: int
) -> None:
    dim = picture // 2 + 64
    brighter = (dim.astype(int) + step).astype(np.uint8)
    assert change(signature(dim), signature(dim)) == 0
    assert change(signature(dim), signature(brighter)) == pytest.approx(abs(step), abs=1e-3)
    assert change(signature(brighter), signature(dim)) == pytest.approx(abs(step), abs=1e-3)


@pytest.mark.parametrize("corner", [(0, 0), (0, -14), (-14, 0), (-14, -14), (105, 147)])
def test_what_moves_in_one_cell_changes_a_picture_as_much_as_a_cut(corner: tuple[int, int]) -> None:
    quiet = np.full((224, 398, 3), 100, np.uint8)
    moved = quiet.copy()
    y, x = corner
    moved[y : y + 14 or None, x : x + 14 or None] = 200
    assert change(signature(quiet), signature(moved)) >= 25
    assert np.abs(moved.astype(int) - quiet).mean() < 1  # as a mean it would be lost


def test_sensor_noise_changes_little() -> None:
    random = np.random.default_rng(0)
    noisy = [
        np.clip(random.normal(120, 6, (224, 398, 3)), 0, 255).astype(np.uint8) for _ in range(2)
    ]
    assert change(*map(signature, noisy)) < 4


def test_pictures_of_different_shapes_differ_wholly() -> None:
    wide, tall = np.zeros((48, 96, 3), np.uint8), np.zeros((96, 48, 3), np.uint8)
    assert change(signature(wide), signature(tall)) == 255


@pytest.mark.parametrize(
    "wrong",
    [
        *[{"fps": fps} for fps in (0.0, -1.0, float("nan"), float("inf"), 5000.0)],
        *[{"max_change": level} for level in (-1.0, 256.0, float("nan"))],
        {"span_s": 0},
        {"span_frames": 0},
    ],
)
def test_impossible_sampling_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError):
        Sampling(**wrong)
