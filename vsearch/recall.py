"""How much of the exact answer an index finds, and the cheapest setting that finds enough.

Recall@k of a query is the share of its k best rows, by exact search, that the index finds. Candidates
are scored exactly, so a row is found if and only if it is among the candidates; that is what a
`Probe` of each shard tells, and probes of many shards add up to that of all.

Shapes: q = queries, k = 200 = DEPTH, p = numbers of cells tried, c = most candidates.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vsearch.config import MIN_RECALL, UserError
from vsearch.sizing import Setting

if TYPE_CHECKING:
    from vsearch.index import Shard

Vectors = NDArray[np.float32]

DEPTH = 200
PER_HIT = (2, 5, 10, 20)
FLOOR_BELOW = 0.12
"""The worst twentieth of the queries may have so much less recall than the mean must have."""

TIMED_QUERIES = 20
NOT_FOUND = np.float32(-np.inf)


class RecallError(UserError):
    """No setting of an index reaches the recall that was asked for."""

    exit_code = 3


@dataclass(frozen=True)
class Point:
    """One setting and what it gives: mean recall on text queries, that of the worst twentieth of them,
    the mean on frames, and the median milliseconds of a search by one thread.
    """

    nprobe: int
    per_hit: int
    recall_200_text: float
    recall_10_text: float
    worst_text: float
    recall_200_frames: float
    p50_ms: float


@dataclass(frozen=True)
class Probe:
    """What a part of an index tells about some queries.

    `truth` (q, ≤ k) are the exact scores of its best rows, best first; `estimates` (p, q, ≤ k) those
    that the codes give the same rows, −∞ where their cell is not visited; `best` (p, q, ≤ c + 1) the
    highest estimates of all its rows, best first; `p50_ms` (p, len(PER_HIT)) the time of a search.
    """

    nprobes: tuple[int, ...]
    truth: Vectors
    estimates: Vectors
    best: Vectors
    p50_ms: NDArray[np.float64]

    def __add__(self, other: "Probe") -> "Probe":
        assert self.nprobes == other.nprobes
        truth = np.concatenate([self.truth, other.truth], 1)
        order = np.argsort(-truth, axis=1, kind="stable")[:, :DEPTH]
        estimates = np.concatenate([self.estimates, other.estimates], 2)
        return Probe(
            self.nprobes,
            np.take_along_axis(truth, order, 1),
            np.take_along_axis(
                estimates, np.broadcast_to(order, (len(estimates), *order.shape)), 2
            ),
            _highest(np.concatenate([self.best, other.best], 2)),
            self.p50_ms + other.p50_ms,
        )

    def arrays(self) -> dict[str, Any]:
        """All of it as arrays, for a file."""
        return {"nprobes": np.array(self.nprobes), **{k: getattr(self, k) for k in _ARRAYS}}

    @classmethod
    def from_arrays(cls, arrays: Any) -> "Probe":
        return cls(tuple(map(int, arrays["nprobes"])), *(arrays[name] for name in _ARRAYS))


_ARRAYS = ("truth", "estimates", "best", "p50_ms")


def _highest(estimates: Vectors) -> Vectors:
    most = max(PER_HIT) * DEPTH + 1
    highest: Vectors = -np.sort(-estimates, axis=-1)[..., :most]
    return highest


def nprobes_for(nlist: int) -> tuple[int, ...]:
    """The numbers of cells to try: powers of two, at most 512 and all of them."""
    return tuple(2**i for i in range(2, 10) if 2**i < nlist) + ((nlist,) if nlist <= 512 else ())


def probe(shard: "Shard", queries: Vectors) -> Probe:
    """Asks a shard all queries, float32 (q, dim), exactly and at every setting."""
    from vsearch.index import exact_search  # FAISS, which all else does without

    if shard.flat:
        raise ValueError("a flat shard is exact: there is nothing to probe")
    truth, rows = exact_search(shard.vectors, queries, min(DEPTH, shard.rows))
    nprobes = nprobes_for(shard.nlist)
    most = max(PER_HIT) * DEPTH + 1
    estimates = np.full((len(nprobes), *truth.shape), NOT_FOUND)
    best = np.full((len(nprobes), len(queries), min(most, shard.rows)), NOT_FOUND)
    p50_ms = np.zeros((len(nprobes), len(PER_HIT)))
    for p, nprobe in enumerate(nprobes):
        for q, query in enumerate(queries):
            nearest = shard.nearest_cells(query, nprobe)
            scores, found = shard.candidates(query, most, nearest)
            best[p, q, : len(scores)] = scores
            _, place, same = np.intersect1d(rows[q], found, return_indices=True)
            estimates[p, q, place] = scores[same]
        for c, per_hit in enumerate(PER_HIT):
            p50_ms[p, c] = _p50_ms(shard, queries[-TIMED_QUERIES:], nprobe, per_hit * DEPTH)
    return Probe(nprobes, truth, estimates, _highest(best), p50_ms)


def _p50_ms(shard: "Shard", queries: Vectors, nprobe: int, count: int) -> float:
    took = []
    for query in queries:
        began = time.perf_counter()
        _, rows = shard.candidates(query, count, shard.nearest_cells(query, nprobe))
        shard.score(query, np.sort(rows))
        took.append(time.perf_counter() - began)
    return float(np.median(took)) * 1000


def curve(found: Probe, text: int) -> list[Point]:
    """What each setting gives. The first `text` queries are sentences, the others frames."""
    points = []
    for p, nprobe in enumerate(found.nprobes):
        for c, per_hit in enumerate(PER_HIT):
            among = _among_candidates(found, p, per_hit * DEPTH)
            recall = among.mean(1)
            lowest = np.sort(recall[:text])[: max(1, round(text / 20))]
            points.append(
                Point(
                    nprobe,
                    per_hit,
                    round(float(recall[:text].mean()), 4),
                    round(float(among[:text, :10].mean()), 4),
                    round(float(lowest.mean()), 4),
                    round(float(recall[text:].mean()), 4) if len(recall) > text else 1.0,
                    round(float(found.p50_ms[p, c]), 3),
                )
            )
    return points


def _among_candidates(found: Probe, p: int, count: int) -> NDArray[np.bool_]:
    """Whether each true row (q, ≤ k) is among the `count` candidates, however ties are broken."""
    estimates, best = found.estimates[p], found.best[p]
    if best.shape[1] <= count:
        return estimates > NOT_FOUND
    return estimates > best[:, count : count + 1]


def cheapest(points: Sequence[Point], min_recall: float = MIN_RECALL) -> Setting:
    """The fastest setting whose mean recall@200 on text reaches `min_recall`, with the worst twentieth
    not further than `FLOOR_BELOW` under it. Raises `RecallError` if there is none.
    """
    floor = min_recall - FLOOR_BELOW
    good = [p for p in points if p.recall_200_text >= min_recall and p.worst_text >= floor]
    if not good:
        best = max(points, key=lambda p: (p.recall_200_text, p.worst_text))
        raise RecallError(
            f"No setting finds enough: the best has recall@200 {best.recall_200_text:.3f} on text "
            f"queries (worst twentieth {best.worst_text:.3f}), asked for are {min_recall:g} and "
            f"{floor:g}. Nothing was published; --retrain fits the quantizer anew, --kind flat "
            f"searches exactly, --min-recall asks for less."
        )
    chosen = min(good, key=lambda p: (p.p50_ms, p.nprobe))
    return Setting(chosen.nprobe, chosen.per_hit)


def as_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [asdict(point) for point in points]
