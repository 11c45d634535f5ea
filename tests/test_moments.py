import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vsearch.moments import Stretch, grow


def stretch_of(
    values: list[float],
    peak: int,
    background: float = 0.0,
    max_gap_s: float = 1.0,
    pts_s: list[float] | None = None,
    lowest: int = 0,
    highest: int | None = None,
    taken: frozenset[int] = frozenset(),
    piece: int = 256,
) -> Stretch:
    """`grow` over rows of one second each, of no length unless said otherwise."""
    scores = np.array(values, np.float32)
    start_s = np.array(pts_s if pts_s is not None else range(len(values)), float)
    return grow(
        peak,
        lowest,
        len(values) if highest is None else highest,
        lambda i, j: scores[i:j],
        start_s,
        start_s,
        background,
        max_gap_s,
        np.isin(np.arange(len(values)), list(taken)),
        piece,
    )


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
    scores = np.array([0.9, 0.9], np.float32)
    start_s, end_s = np.array([0.0, 5.5]), np.array([5.0, 6.0])
    stretch = grow(0, 0, 2, lambda i, j: scores[i:j], start_s, end_s, 0.0, 1.0, np.zeros(2, bool))
    assert (stretch.first, stretch.last) == (0, 1)


def test_other_videos_and_taken_rows_stay_outside() -> None:
    values = [0.9] * 8
    stretch = stretch_of(values, 4, lowest=2, highest=7)
    assert (stretch.first, stretch.last) == (2, 6)
    stretch = stretch_of(values, 4, taken=frozenset({1, 6}))
    assert (stretch.first, stretch.last) == (2, 5)


levels = st.lists(st.integers(0, 20).map(lambda n: n / 20), min_size=1, max_size=40)


@given(levels, st.integers(1, 7), st.sampled_from([0.5, 1.0, 2.0, 5.0]), st.data())
def test_the_size_of_the_pieces_changes_nothing(
    values: list[float], piece: int, max_gap_s: float, data: st.DataObject
) -> None:
    peak = data.draw(st.integers(0, len(values) - 1))
    whole = stretch_of(values, peak, max_gap_s=max_gap_s)
    assert stretch_of(values, peak, max_gap_s=max_gap_s, piece=piece) == whole


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
    assert np.isclose(stretch.score, np.mean([values[row] for row in inside]), atol=1e-6)
