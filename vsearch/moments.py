"""From frames to moments, and from scored rows to segments: pure arithmetic on one video's timeline.

A moment is a run of neighbouring frames so alike that one row of the index stands for them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]
Seconds = NDArray[np.float64]
Vectors = NDArray[np.float16]
Gaps = Sequence[tuple[float, float]]

ALIKE = 0.98
"""Frames with at least this cosine to the first one of their moment share a row."""

CUT = 0.75
"""Neighbouring frames whose DINO vectors have less cosine than this lie in two shots."""
ROUNDING_S = 1e-6
"""Times that lie no further apart are the same: some were told from another zero."""
FLASH_S = 0.5
"""What is seen for less than this, and then what was seen before, is no shot of its own."""


@dataclass(frozen=True)
class Moments:
    """The moments of one video in time order. `vectors` is float16 (m, dim), the normalised mean of
    the frames of each; `start_s`, `end_s` (m,) when it begins and when the next picture comes,
    `best_s` (m,) the time of the frame most like the mean, `frames` (m,) int32 how many there are,
    `shots` (m,) int32 the shot that it lies in.
    """

    vectors: Vectors
    start_s: Seconds
    end_s: Seconds
    best_s: Seconds
    frames: NDArray[np.int32]
    shots: NDArray[np.int32]


def shots_of(
    pts_s: Seconds, dino: Vectors, cut: float, at_once: int = 1 << 16
) -> NDArray[np.int32]:
    """The shot (n,) of each frame of a video, counted from 0, from the frames' times (n,) in order and
    DINO's vectors (n, dim), of any length. A cut lies between two frames whose cosine is less than `cut`,
    unless one of them is alike to what is seen on the other side within `FLASH_S`: a flash is no cut. A
    frame without a vector (all 0) is alike to any other.
    """
    cuts = np.zeros(len(dino), bool)
    for first in range(1, len(dino), at_once):
        part = np.asarray(dino[first - 1 : first + at_once], np.float32)
        for change in np.flatnonzero(_cosines(part[1:], part[:-1]) < cut).tolist():
            row = first + change
            # By the clock: a frame may stand for minutes among others that last a moment.
            low = int(np.searchsorted(pts_s, pts_s[row] - FLASH_S + ROUNDING_S, side="right")) - 1
            low = min(max(0, low), row - 1)
            stop = int(np.searchsorted(pts_s, pts_s[row] + FLASH_S - ROUNDING_S))
            near = np.asarray(dino[low:stop], np.float32)
            before, after = near[: row - low], near[row - low :]
            alike = [*_cosines(after, before[-1:]), *_cosines(before, after[:1])]
            cuts[row] = max(alike) < cut
    return np.cumsum(cuts, dtype=np.int32)


def _cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of the rows of (n, dim) and (n or 1, dim); 1 where one of them is 0."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products = np.einsum("nd,nd->n", a, np.broadcast_to(b, a.shape))
    return np.divide(products, lengths, out=np.ones_like(products), where=lengths > 0)


def moments_of(
    pts_s: Seconds,
    vectors: Vectors,
    gaps: Gaps,
    alike: float | None,
    at_once: int = 1 << 16,
    shots: NDArray[np.int32] | None = None,
) -> Iterator[Moments]:
    """The moments of a video, from the times (n,) of its frames in order, their unit vectors float16
    (n, dim), and the `gaps` of `frame_ends`; in pieces of `at_once` frames, whatever its length. A
    moment goes on as long as each frame has a cosine of at least `alike` to its first one, and neither
    a gap nor a cut between `shots` (n,) lies between them; with None every frame is a moment.
    """
    ends_s = frame_ends(pts_s, gaps)
    shots = np.zeros(len(pts_s), np.int32) if shots is None else shots
    for first in range(0, len(pts_s), at_once):
        piece = slice(first, first + at_once)
        yield _moments(pts_s[piece], ends_s[piece], vectors[piece], shots[piece], alike)


def _moments(
    pts_s: Seconds,
    end_s: Seconds,
    vectors: Vectors,
    shots: NDArray[np.int32],
    alike: float | None,
    piece: int = 64,
) -> Moments:
    if alike is None:
        return Moments(vectors, pts_s, end_s, pts_s, np.ones(len(pts_s), np.int32), shots)
    whole = np.asarray(vectors, np.float32)
    holes = np.append((pts_s[1:] > end_s[:-1] + ROUNDING_S) | (np.diff(shots) > 0), True)
    firsts, row = [], 0
    while row < len(whole):
        firsts.append(row)
        stop = row + 1
        limit = row + 1 + int(np.argmax(holes[row:]))
        while stop < limit:
            part = whole[stop : min(limit, stop + piece)]
            same = _until(~(part @ whole[row] >= alike))
            stop += same
            if same < len(part):
                break
        row = stop
    edges = np.array([*firsts, len(whole)])
    frames = np.diff(edges).astype(np.int32)
    means = np.add.reduceat(whole, edges[:-1], axis=0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    likeness = np.einsum("nd,nd->n", whole, np.repeat(means, frames, axis=0))
    best = [a + int(np.argmax(likeness[a:b])) for a, b in pairwise(edges.tolist())]
    return Moments(
        means.astype(np.float16),
        pts_s[edges[:-1]],
        end_s[edges[1:] - 1],
        pts_s[best],
        frames,
        shots[edges[:-1]],
    )


def frame_ends(pts_s: Seconds, gaps: Gaps) -> Seconds:
    """When each frame (n,) of a video gives way to the next, however long it stands. `gaps` are the
    stretches (from, to) of which nothing is known, in order and apart from each other. A frame with
    one before the next lasts until there, and at least, as the last frame does, as long as the
    video's frames usually do.
    """
    steps = np.diff(pts_s)
    usual = float(np.median(steps[steps > 0])) if (steps > 0).any() else 0.04
    usually_s = pts_s + usual
    next_s = np.append(pts_s[1:], usually_s[-1:])
    next_s = np.where(next_s > pts_s, next_s, usually_s)
    from_s, to_s = np.array([*gaps, (np.inf, np.inf)]).T
    lost_s = from_s[np.searchsorted(to_s, pts_s + ROUNDING_S, side="right")]
    known_s = np.minimum(next_s, np.maximum(lost_s, usually_s))
    ends: Seconds = np.where(lost_s < next_s - ROUNDING_S, known_s, next_s)
    return ends


@dataclass(frozen=True)
class Stretch:
    """Rows first … last of one video that answer together; `best` is the row of the peak, `score`
    the mean score over the time of the rows at or above the threshold."""

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
    """The stretch around a peak within rows [lowest, highest), those of its shot: outwards from the peak
    as long as rows above the threshold follow each other with gaps of at most `max_gap_s` seconds.

    The threshold is half the height of the peak above `background`, the query's mean score over the
    corpus (full width at half maximum). So neighbours that answer about as well are merged, and the
    scene before the cut, which answers worse, stays outside. `scores(i, j)` gives the scores of rows
    i … j − 1; they are asked for in pieces, so a long video costs no more than its answer. Rows for
    which `taken` (rows,) is true belong to a stronger stretch and end the growth.
    """
    top = float(scores(peak, peak + 1)[0])
    threshold = (top + background) / 2
    edges, rows_taken, values_taken = [peak, peak], [np.array([peak])], [np.array([top])]
    for side, (bound, step) in enumerate([(lowest - 1, -1), (highest, 1)]):
        row = peak + step
        while row != bound:
            length = min(piece, abs(bound - row))
            end = row + (length - 1) * step
            low, stop = min(row, end), max(row, end) + 1
            values = scores(low, stop)[::step]
            free = _until(taken[low:stop][::step])
            strong = row + step * np.flatnonzero(values[:free] >= threshold)
            # Seconds between each strong row and the strong row before it, as seen from the peak.
            chain = np.empty(len(strong) + 1, np.int64)
            chain[0], chain[1:] = edges[side], strong
            later, sooner = (chain[1:], chain[:-1]) if step > 0 else (chain[:-1], chain[1:])
            joined = strong[: _until(start_s[later] - end_s[sooner] > max_gap_s)]
            if len(joined):
                edges[side] = int(joined[-1])
                rows_taken.append(joined)
                values_taken.append(values[abs(joined - row)])
            edge = edges[side]
            away_s = start_s[end] - end_s[edge] if step > 0 else start_s[edge] - end_s[end]
            if len(joined) < len(strong) or free < length or away_s > max_gap_s:
                break
            row = end + step
    strong_rows = np.concatenate(rows_taken)
    lasting_s = np.maximum(end_s[strong_rows] - start_s[strong_rows], 1e-6)
    mean = float(np.concatenate(values_taken).astype(np.float64) @ lasting_s / lasting_s.sum())
    return Stretch(edges[0], edges[1], peak, min(mean, top))


def _until(bad: NDArray[np.bool_]) -> int:
    """How many come before the first that is bad."""
    first = int(bad.argmax()) if len(bad) else 0
    return first if len(bad) and bad[first] else len(bad)


def clock(seconds: float) -> str:
    """`1:02:03.4`, or `2:03.4` under an hour."""
    tenths = round(max(0.0, seconds) * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    text = f"{minutes:02d}:{rest / 10:04.1f}" if hours else f"{minutes}:{rest / 10:04.1f}"
    return f"{hours}:{text}" if hours else text
