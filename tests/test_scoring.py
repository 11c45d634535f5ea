from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vsearch.evaluate import Moment, temporal_iou
from vsearch.scoring import (
    auroc,
    bootstrap,
    claims,
    interpolated_precision,
    ious,
    means,
    ndcg,
    ranked_precision,
)

THRESHOLDS = np.array([0.3, 0.5, 0.7, 0.95])
lists_of_windows = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 10)).map(lambda w: (w[0], w[0] + w[1])), max_size=6
)
hits = arrays(bool, st.tuples(st.just(1), st.just(1), st.integers(1, 12)))


def padded(windows: list[tuple[int, int]], width: int) -> np.ndarray:
    return np.array([*windows, *[(np.nan, np.nan)] * (width - len(windows))], float)[None]


def claims_one_by_one(found: list[Moment], truth: list[Moment], threshold: float) -> list[bool]:
    free, right = list(truth), []
    for window in found:
        reached = [(temporal_iou(window, moment), place) for place, moment in enumerate(free)]
        best, place = max(reached, default=(-1.0, -1))
        right.append(best >= threshold)
        if right[-1]:
            del free[place]
    return right


@given(lists_of_windows, lists_of_windows)
def test_claims_are_those_of_one_query_at_a_time(found, truth) -> None:
    iou = ious(padded(found, 7), padded(truth, 8))
    for i, a in enumerate(found):
        for j, b in enumerate(truth):
            assert iou[0, i, j] == temporal_iou(Moment("", *a), Moment("", *b))
    assert (iou[0, len(found) :] == -1).all() and (iou[0, :, len(truth) :] == -1).all()
    right = claims(iou, THRESHOLDS)
    for row, threshold in zip(right[0], THRESHOLDS, strict=True):
        expected = claims_one_by_one(
            [Moment("", *w) for w in found], [Moment("", *w) for w in truth], threshold
        )
        assert row.tolist() == expected + [False] * (7 - len(found))


def test_a_window_that_is_empty_or_ends_before_it_starts_overlaps_nothing() -> None:
    truth = np.array([[[0.0, 20.0], [7.0, 9.0]]])
    assert (ious(np.array([[[5.0, 5.0], [10.0, 5.0]]]), truth) <= 0).all()


@given(hits, st.integers(0, 5))
def test_interpolated_precision_is_the_best_precision_at_each_recall(right, missed) -> None:
    row = right[0, 0].tolist()
    moments = sum(row) + missed
    best = [
        max(sum(row[:k]) / k for k in range(1, len(row) + 1) if sum(row[:k]) >= claimed)
        for claimed in range(1, sum(row) + 1)
    ]
    [[precision]] = interpolated_precision(right, np.array([moments]))
    if moments:
        assert precision == pytest.approx(sum(best) / moments)
    else:
        assert np.isnan(precision)


def test_interpolated_precision_of_a_known_case() -> None:
    right = np.array([[[False, True, True, False]]])  # precision 1/2, then 2/3, which both get
    assert interpolated_precision(right, np.array([2])) == pytest.approx(2 / 3)
    assert interpolated_precision(right, np.array([4])) == pytest.approx(2 * (2 / 3) / 4)


def test_ndcg_of_a_known_case() -> None:
    right = np.array([[[False, True, True], [True, True, True], [False, False, False]]])
    third = 1 / np.log2(3)
    gain = (third + 1 / 2) / (1 + third + 1 / 2)
    assert ndcg(right, np.array([3]))[0] == pytest.approx([gain, 1, 0])
    assert ndcg(right, np.array([9]))[0] == pytest.approx([gain, 1, 0])
    assert np.isnan(ndcg(right, np.array([0]))).all()


@pytest.mark.parametrize(
    ("relevant", "strength", "precision"),
    [
        ([1, 0, 1], [0.9, 0.8, 0.7], (1 + 2 / 3) / 2),
        ([0, 1, 1], [0.9, 0.8, 0.7], 2 / 3),  # 1/2, then 2/3, which both get
        ([1, 0, 1], [0.5, 0.5, 0.5], 2 / 3),  # one place for all
        ([1, 0, 1, 0], [0.5, 0.5, 0.4, 0.3], 2 / 3),  # 1/2 of two, then 2/3
        ([1, 1], [0.1, 0.2], 1),
        ([0, 0], [0.1, 0.2], 0),
    ],
)
def test_precision_of_known_rankings(relevant, strength, precision: float) -> None:
    relevant, strength = np.array(relevant, bool), np.array(strength)
    assert ranked_precision(relevant, strength) == pytest.approx(precision)
    assert ranked_precision(relevant[::-1], strength[::-1]) == pytest.approx(precision)
    assert ranked_precision(relevant, 7 * strength - 3) == pytest.approx(precision)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=1))
def test_auroc_is_the_share_of_pairs_in_order(entries) -> None:
    drawn = [(strength, positive) for strength, positive, times in entries for _ in range(times)]
    pairs = [
        1.0 if above > below else 0.5 if above == below else 0.0
        for above, positive in drawn
        for below, other in drawn
        if positive and not other
    ]
    strength, positive, counts = (np.array(column) for column in zip(*entries, strict=True))
    found = auroc(strength, positive, counts.astype(float))
    assert found == pytest.approx(np.mean(pairs)) if pairs else np.isnan(found)


def test_means_leave_out_what_is_nan_and_weigh_by_counts() -> None:
    values = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan], [8.0, 7.0, np.nan]])
    assert means(values)(np.ones(3)) == pytest.approx([4, 6, np.nan], nan_ok=True)
    assert means(values)(np.array([2.0, 0, 1])) == pytest.approx([10 / 3, 7, np.nan], nan_ok=True)


def test_an_interval_is_that_of_the_binomial_where_the_figure_is_a_share() -> None:
    for share, queries in ((0.5, 400), (0.2, 1000), (0.9, 2500)):
        values = (np.arange(queries) < share * queries).astype(float)[:, None]
        [low], [high] = bootstrap(means(values), queries)
        half = 1.96 * np.sqrt(share * (1 - share) / queries)
        assert low == pytest.approx(share - half, abs=0.15 * half)
        assert high == pytest.approx(share + half, abs=0.15 * half)


def test_intervals_hold_the_true_mean_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    samples = rng.exponential(size=(80, 300))  # 300 figures of 80 queries, each of mean 1
    low, high = bootstrap(means(samples), 80)
    assert 0.90 <= np.mean((low <= 1) & (high >= 1)) <= 0.98


def test_intervals_are_the_same_each_time_and_absent_where_there_is_nothing() -> None:
    values = np.array([[0.0, np.nan, 0.3], [1.0, np.nan, np.nan], [1.0, np.nan, np.nan]])
    first, second = (bootstrap(means(values), 3) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.isnan(first[:, 1]).all()
    assert first[:, 2].tolist() == [0.3, 0.3]


def test_intervals_narrow_with_the_queries() -> None:
    widths = []
    for queries in (50, 200, 800):
        values = np.tile([[0.0], [1.0]], (queries // 2, 1))
        low, high = bootstrap(means(values), queries)
        widths.append(float((high - low)[0]))
    for wide, narrow in pairwise(widths):
        assert wide / narrow == pytest.approx(2, rel=0.2)
