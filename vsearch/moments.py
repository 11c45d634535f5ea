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
    the mean score of the rows at or above the threshold.
    """

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
    total, count = top, 1

    def extend(step: int) -> int:
        nonlocal total, count
        edge, row = peak, peak + step
        while lowest <= row < highest:
            near, far = (
                (row, min(highest, row + piece))
                if step > 0
                else (max(lowest, row + 1 - piece), row + 1)
            )
            values = scores(near, far)
            for offset in range(far - near):
                row = near + offset if step > 0 else far - 1 - offset
                gap_s = start_s[row] - end_s[edge] if step > 0 else start_s[edge] - end_s[row]
                if gap_s > max_gap_s or taken[row]:
                    return edge
                value = float(values[row - near])
                if value >= threshold:
                    edge = row
                    total += value
                    count += 1
            row = far if step > 0 else near - 1
        return edge

    first, last = extend(-1), extend(+1)
    return Stretch(first, last, peak, total / count)
