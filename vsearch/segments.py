"""Segments around the hits of one query, over all shards: what is seen of rows, and what was grown."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vsearch.index import Shard
from vsearch.moments import Scored, Scores, Stretches, grow, ranges

FIRST_PEAKS = 64
"""So many of the best hits are looked at first, and then twice as many each time."""


@dataclass(frozen=True)
class ShardRows:
    """The rows of a shard. `video` (n,) int32, ascending, is the place of a row's video in the shard,
    `shot` (n,) int64, ascending, another for each shot of each video; `numbers` (videos,) that video's in
    the snapshot, −1 if its rows count no longer; `start_s`, `end_s`, `best_s` (n,) are as a player shows
    them; `frames` (n,) int32 how many a row stands for.
    """

    video: NDArray[np.int32]
    shot: NDArray[np.int64]
    numbers: NDArray[np.int64]
    start_s: NDArray[np.float64]
    end_s: NDArray[np.float64]
    best_s: NDArray[np.float64]
    frames: NDArray[np.int32]


class Sight:
    """What one query sees of rows, which are counted over all shards. Exact scores are computed once;
    `taken` (rows,) is true where a row is not admitted, or belongs to a segment.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        timelines: Sequence[ShardRows],
        vector: NDArray[np.float32],
        taken: NDArray[np.bool_],
    ) -> None:
        self._shards, self._timelines, self._vector = shards, timelines, vector
        self.taken = taken
        self.starts = np.cumsum([0, *(shard.rows for shard in shards)])
        self._known = np.zeros(len(taken), bool)
        self._scores = np.zeros(len(taken), np.float32)

    def __call__(self, rows: NDArray[np.int64]) -> Scored:
        """Of rows (n,), ascending."""
        new = rows[~self._known[rows]]
        for part, at, mine in self._by_shard(new):
            self._scores[new[at]] = self._shards[part].score(self._vector, mine)
        self._known[new] = True
        start_s, end_s = np.empty(len(rows)), np.empty(len(rows))
        for part, at, mine in self._by_shard(rows):
            start_s[at] = self._timelines[part].start_s[mine]
            end_s[at] = self._timelines[part].end_s[mine]
        return Scored(self._scores[rows], start_s, end_s, self.taken[rows])

    def know(self, rows: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        """Takes exact scores (n,) of rows (n,) that were computed elsewhere."""
        self._known[rows] = True
        self._scores[rows] = scores

    def shots(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first row (n,) of the shots of rows (n,), in any order, and the row after their last."""
        lowest, highest = np.empty_like(rows), np.empty_like(rows)
        order = np.argsort(rows)
        for part, at, mine in self._by_shard(rows[order]):
            shot = self._timelines[part].shot
            lowest[order[at]] = self.starts[part] + np.searchsorted(shot, shot[mine])
            highest[order[at]] = self.starts[part] + np.searchsorted(shot, shot[mine], "right")
        return lowest, highest

    def _by_shard(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, slice, NDArray[np.int64]]]:
        """(shard, which of the rows, these counted within it) for each shard of some rows (n,),
        ascending."""
        for part, (first, stop) in enumerate(pairwise(np.searchsorted(rows, self.starts))):
            if first < stop:
                yield part, slice(first, stop), rows[first:stop] - self.starts[part]


class Grown:
    """The segments around the hits of a query, of which the best `wanted` are asked for that score
    `least` or more.
    """

    def __init__(
        self, sight: Sight, background: float, max_gap_s: float, least: float, wanted: int
    ) -> None:
        self._sight, self._background, self._max_gap_s = sight, background, max_gap_s
        self._least, self._wanted = least, wanted
        nothing = np.zeros(0, np.int64)
        self._found = [Stretches(nothing, nothing, nothing, np.zeros(0))]
        self._best = np.zeros(0)  # the scores of the best `wanted`, ascending

    @property
    def bar(self) -> float:
        """The score of the last of the `wanted`; −inf as long as there are fewer."""
        return float(self._best[0]) if len(self._best) == self._wanted else -math.inf

    def may_be_peak(self, scores: Scores) -> NDArray[np.bool_]:
        """Whether rows with these scores (n,) can be peaks of what is wanted: the score of a segment
        is a mean, and so no more than its peak."""
        return (scores >= self._least) & (scores > self.bar)

    def add(self, rows: NDArray[np.int64], scores: Scores) -> None:
        """What is around rows (n,) with these scores, best first."""
        self._sight.know(rows, scores)
        first, size = 0, FIRST_PEAKS
        while first < len(rows):
            piece = slice(first, first + size)
            peaks = rows[piece][~self._sight.taken[rows[piece]] & self.may_be_peak(scores[piece])]
            if not len(peaks):
                first, size = first + size, 2 * size
                continue
            # In one shot each peak depends on what the stronger ones have taken.
            lowest, highest = self._sight.shots(peaks)
            lowest, strongest = np.unique(lowest, return_index=True)
            bounds = peaks[strongest], lowest, highest[strongest]
            new = grow(*bounds, self._sight, self._background, self._max_gap_s)
            new = new._replace(score=np.round(new.score, 6))
            self._sight.taken[ranges(new.first, new.last + 1)[0]] = True
            self._found.append(new)
            self._best = np.sort(np.append(self._best, new.score))[-self._wanted :]

    def best(self) -> list[tuple[int, int, int, float]]:
        """(first row, last row, peak, score) of those that score enough, best first, of equals the first
        in the archive."""
        first, last, peak, score = (np.concatenate(v) for v in zip(*self._found, strict=True))
        order = np.lexsort([first, -score])[: np.count_nonzero(score >= self._least)]
        values = (column[order].tolist() for column in (first, last, peak, score))
        return list(zip(*values, strict=True))


def times_more(scores: Scores, least: float) -> float:
    """How many times as many hits to ask for, where `scores` (n,), best first, end above `least`: 2 to 16.
    They fall about equally with each doubling of their number. 4, where nothing is known of `least`.
    """
    if not len(scores) or least == -math.inf:
        return 4
    fall = max(float(scores[len(scores) // 2] - scores[-1]), 1e-6)
    doublings = (float(scores[-1]) - least) / fall
    return float(2 ** min(max(doublings, 1.0), 4.0))
