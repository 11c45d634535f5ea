"""Arithmetic of judging answers: windows of seconds that claim true ones, ranks, and intervals by
bootstrap over queries. Pure NumPy; a query that a figure does not concern has NaN for it.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

IOUS = np.array([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95])
"""The thresholds over which a mean average precision is averaged."""
BOUNDARY_IOU = 0.5
"""Boundaries are compared where a window and a true one overlap so much."""

LEVEL = 0.95
RESAMPLES = 1000
SEED = 0
DRAWS_AT_ONCE = 50
BOOTSTRAP = {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED, "over": "queries"}
"""How intervals are made, as reports state it."""


def overlaps(found: Floats, truth: Floats) -> Floats:
    """Seconds that windows [start, end] (…, 2) share with others; the leading axes broadcast."""
    shared = np.minimum(found[..., 1], truth[..., 1]) - np.maximum(found[..., 0], truth[..., 0])
    return np.maximum(shared, 0.0)


def ious(found: Floats, truth: Floats) -> Floats:
    """Temporal IoU (queries, found, truth) of windows (queries, found, 2) and (queries, truth, 2).
    It is −1 where either window is NaN, as padding is.
    """
    found, truth = found[:, :, None], truth[:, None]
    shared = overlaps(found, truth)
    union = (found[..., 1] - found[..., 0]) + (truth[..., 1] - truth[..., 0]) - shared
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(shared / union, nan=-1.0)


def claims(iou: Floats, thresholds: Floats) -> Bools:
    """Whether each window, strongest first, claims a true one not yet claimed: of those that it
    reaches the one it fits best, of equals the last. IoU (queries, found, truth) and thresholds give
    (queries, thresholds, found).
    """
    queries, places, moments = iou.shape
    right = np.zeros((queries, len(thresholds), places), bool)
    free = np.ones((queries, len(thresholds), moments), bool)
    for place in range(places):
        left = np.where(free, iou[:, None, place], -1.0)
        best = moments - 1 - left[:, :, ::-1].argmax(axis=2, keepdims=True)
        hit = np.take_along_axis(left, best, axis=2) >= thresholds[:, None]
        free &= ~(hit & (np.arange(moments) == best))
        right[:, :, place] = hit[:, :, 0]
    return right


def interpolated_precision(right: Bools, moments: NDArray[np.int64]) -> Floats:
    """Average precision (queries, thresholds) of claims (queries, thresholds, found): at each claim
    the best precision from there on, summed and divided by the query's number of true moments.
    """
    precision = right.cumsum(axis=2) / np.arange(1, right.shape[2] + 1)
    best = np.maximum.accumulate(precision[:, :, ::-1], axis=2)[:, :, ::-1]
    return _share((best * right).sum(axis=2), moments[:, None])


def boundary_error_s(found: Floats, truth: Floats, iou: Floats) -> Floats:
    """Mean distance in seconds (queries,) of start and of end between windows (queries, 2) and true ones
    (queries, 2); NaN where their IoU (queries,) does not reach `BOUNDARY_IOU`.
    """
    error = np.abs(found - truth).mean(axis=1)
    return np.where(iou >= BOUNDARY_IOU, error, np.nan)


def ndcg(right: Bools, moments: NDArray[np.int64]) -> Floats:
    """Normalised discounted cumulative gain (queries, thresholds) of claims (queries, thresholds,
    found): a claim at place n is worth 1 / log2(n + 1), and the ideal has all its claims first.
    """
    worth = 1 / np.log2(np.arange(2, right.shape[2] + 2))
    ideal = np.concatenate([[0.0], worth.cumsum()])[np.minimum(moments, len(worth))]
    return _share(right @ worth, ideal[:, None])


def ranked_precision(relevant: Bools, strength: Floats) -> float:
    """Average precision of one ranking, interpolated: equal strengths share a place, and the mean is
    over the places at which recall rises; 0 if nothing is relevant.
    """
    order = np.argsort(-strength, kind="stable")
    last = np.flatnonzero(np.diff(strength[order], append=np.nan) != 0)
    hits = relevant[order].cumsum()[last]
    best = np.maximum.accumulate((hits / (last + 1))[::-1])[::-1]
    rises = np.diff(hits, prepend=0) > 0
    return float(best[rises].mean()) if rises.any() else 0.0


def auroc(strength: Floats, positive: Bools, counts: Floats) -> float:
    """Chance that a positive is stronger than a negative, a tie counting half; `counts` says how often
    each is there. NaN if there are none of a kind.
    """
    kinds, which = np.unique(strength, return_inverse=True)
    above = np.bincount(which, counts * positive, len(kinds))
    below = np.bincount(which, counts * ~positive, len(kinds))
    won = above @ (below.cumsum() - below / 2)
    return float(_share(won, above.sum() * below.sum()))


def means(values: Floats) -> Callable[[Floats], Floats]:
    """The mean (…, figures) of values (queries, figures) without NaN, as a function of how often each
    query is there (…, queries).
    """
    known = ~np.isnan(values)
    filled, weight = np.where(known, values, 0.0), known.astype(float)
    return lambda counts: _share(counts @ filled, counts @ weight)


def bootstrap(figures: Callable[[Floats], Floats], queries: int) -> Floats:
    """Percentile intervals (2, figures): lower and upper bounds. `figures` gives (draws, figures) for
    how often each query is drawn (draws, queries); a draw that leaves a figure NaN does not count for
    it.
    """
    rng = np.random.default_rng(SEED)
    drawn = np.concatenate(
        [figures(_counts(rng, DRAWS_AT_ONCE, queries)) for _ in range(RESAMPLES // DRAWS_AT_ONCE)]
    )
    known = ~np.isnan(drawn).all(axis=0)
    bounds = np.full((2, drawn.shape[1]), np.nan)
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    bounds[:, known] = np.nanquantile(drawn[:, known], tails, axis=0)
    return bounds


def _counts(rng: np.random.Generator, draws: int, queries: int) -> Floats:
    """How often each query is there (draws, queries) if as many are drawn as there are."""
    drawn = rng.integers(queries, size=(draws, queries))
    return np.array([np.bincount(row, minlength=queries) for row in drawn], np.float64)


def _share(part: Floats, whole: Floats | NDArray[np.int64]) -> Floats:
    """Part over whole; NaN where the whole is 0."""
    out = np.full(np.broadcast_shapes(np.shape(part), np.shape(whole)), np.nan)
    return np.divide(part, whole, out=out, where=np.asarray(whole) != 0)
