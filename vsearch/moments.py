"""From scored rows to segments: pure arithmetic on one video's timeline."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]
Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Stretch:
    """Rows first … last of one video that answer together; `best` is the row of the peak, `score`
    the mean score of the rows at or above the threshold."""

    first: int
    last: int
    best: int
    score: float


def grow(
    peak: int,
    lowest: int,
    highest: int,
    scores: Callable[[int, int], Scores],
    start_s: Seconds,
    end_s: Seconds,
    background: float,
    max_gap_s: float,
    taken: NDArray[np.bool_],
    piece: int = 256,
) -> Stretch:
    """The stretch around a peak within rows [lowest, highest): outwards from the peak as long as
    rows above the threshold follow each other with gaps of at most `max_gap_s` seconds.

    The threshold is half the height of the peak above `background`, the query's mean score over the
    corpus (full width at half maximum). So neighbours that answer about as well are merged, and the
    scene before the cut, which answers worse, stays outside. `scores(i, j)` gives the scores of rows
    i … j − 1; they are asked for in pieces, so a long video costs no more than its answer. Rows for
    which `taken` (rows,) is true belong to a stronger stretch and end the growth.
    """
    top = float(scores(peak, peak + 1)[0])
    threshold = (top + background) / 2
    edges, total, count = [peak, peak], top, 1
    for side, (bound, step) in enumerate([(lowest - 1, -1), (highest, 1)]):
        row = peak + step
        while row != bound:
            rows = np.arange(row, bound, step)[:piece]
            values = scores(int(rows.min()), int(rows.max()) + 1)[::step]
            free = _run(~taken[rows])
            strong = np.flatnonzero(values[:free] >= threshold)
            # Seconds between each strong row and the strong row before it, as seen from the peak.
            chain = np.concatenate([[edges[side]], rows[strong]])
            later, sooner = (chain[1:], chain[:-1]) if step > 0 else (chain[:-1], chain[1:])
            joined = strong[: _run(start_s[later] - end_s[sooner] <= max_gap_s)]
            if len(joined):
                edges[side] = int(rows[joined[-1]])
                total, count = (
                    total + float(values[joined].sum(dtype=np.float64)),
                    count + len(joined),
                )
            end, edge = int(rows[-1]), edges[side]
            away_s = start_s[end] - end_s[edge] if step > 0 else start_s[edge] - end_s[end]
            if len(joined) < len(strong) or free < len(rows) or away_s > max_gap_s:
                break
            row += len(rows) * step
    return Stretch(edges[0], edges[1], peak, total / count)


def _run(good: NDArray[np.bool_]) -> int:
    """How many of the first are good, without a break."""
    bad = np.flatnonzero(~good)
    return int(bad[0]) if len(bad) else len(good)
