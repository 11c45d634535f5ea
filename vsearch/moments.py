"""From frames to moments, and from scored rows to segments: pure arithmetic on one video's timeline.

A moment is a run of neighbouring frames so alike that one row of the index stands for them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]
Seconds = NDArray[np.float64]
Vectors = NDArray[np.float16]
Rows = NDArray[np.int64]
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


class Scored(NamedTuple):
    """Rows with their `scores`, (n,) each; `start_s` and `end_s` are their times, `taken` (bool) says
    which belong to no stretch that is still to come."""

    scores: Scores
    start_s: Seconds
    end_s: Seconds
    taken: NDArray[np.bool_]


class Stretches(NamedTuple):
    """Rows first … last, int64 (p,) each, that answer together; `best` is the row of the peak, `score`
    float64 (p,) the mean score over the time of the rows at or above the threshold."""

    first: Rows
    last: Rows
    best: Rows
    score: Seconds


def grow(
    peaks: Rows,
    lowest: Rows,
    highest: Rows,
    look: Callable[[Rows], Scored],
    background: float,
    max_gap_s: float,
    reach: int = 64,
) -> Stretches:
    """The stretches around peaks (p,), rows that are not taken, each within rows [lowest, highest) of its
    own, those of its shot: outwards from the peak as long as rows above the threshold follow each other
    with gaps of at most `max_gap_s` seconds.

    The threshold is half the height of the peak above `background`, the query's mean score over the
    corpus (full width at half maximum). So neighbours that answer about as well are merged, and the
    scene before the cut, which answers worse, stays outside. Rows that are taken belong to a stronger
    stretch and end the growth. `look(rows)` tells of rows (n,); it is asked for `reach` of them on both
    sides of a peak, and for more where that is too few: a long video costs no more than its answer.
    """
    low, stop = np.maximum(lowest, peaks - reach), np.minimum(highest, peaks + reach + 1)
    rows, owner = ranges(low, stop)
    ends = np.cumsum(stop - low)
    begins = ends - (stop - low)
    seen = look(rows)
    at_peak = begins + peaks - low
    top = seen.scores[at_peak].astype(np.float64)
    strong = (seen.scores >= ((top + background) / 2)[owner]) & ~seen.taken
    strong[at_peak] = True
    places = np.flatnonzero(strong)
    start_s, end_s = seen.start_s[places], seen.end_s[places]
    walls = np.cumsum(seen.taken)
    apart = start_s[1:] - end_s[:-1] > max_gap_s
    apart |= (np.diff(owner[places]) > 0) | (np.diff(walls[places]) > 0)
    chains = np.append(0, np.cumsum(apart))
    mine = chains[np.searchsorted(places, at_peak)]
    head, tail = np.searchsorted(chains, mine), np.searchsorted(chains, mine, side="right") - 1
    # What lies beyond the rows seen belongs to it as well, if it is near enough and nothing is between.
    left = (low > lowest) & (start_s[head] - seen.end_s[begins] <= max_gap_s)
    left &= walls[places[head]] == walls[begins] - seen.taken[begins]
    right = (stop < highest) & (seen.start_s[ends - 1] - end_s[tail] <= max_gap_s)
    right &= walls[places[tail]] == walls[ends - 1]
    lasting_s = np.append(np.maximum(end_s - start_s, 1e-6), 0.0)
    weighted = lasting_s * np.append(seen.scores[places], 0.0)
    bounds = np.column_stack([head, tail + 1]).ravel()
    mean = np.add.reduceat(weighted, bounds)[::2] / np.add.reduceat(lasting_s, bounds)[::2]
    best = peaks.copy()
    found = Stretches(rows[places[head]], rows[places[tail]], best, np.minimum(mean, top))
    longer = np.flatnonzero(left | right)
    if len(longer):
        bounded = peaks[longer], lowest[longer], highest[longer]
        again = grow(*bounded, look, background, max_gap_s, 4 * reach)
        for mended, values in zip(found, again, strict=True):
            mended[longer] = values
    return found


def ranges(low: Rows, stop: Rows) -> tuple[Rows, Rows]:
    """The numbers of several ranges [low, stop), none of them empty, one after another, and which range
    each is of."""
    lengths = stop - low
    owner = np.repeat(np.arange(len(low)), lengths)
    return np.arange(lengths.sum()) + (low - np.cumsum(lengths) + lengths)[owner], owner


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
