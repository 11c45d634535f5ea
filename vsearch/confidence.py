"""How sure an answer is: its score beside those of sentences that nothing in the index shows. Pure
arithmetic.

A cosine means another thing for each sentence. Two corrections make one threshold serve all:

- What a sentence has in common with all sentences answers nothing. With g the mean direction of a bank
  of general sentences, a query q keeps of its score the share √(1 − max(0, q·g)²): one that says nothing
  of its own, as of words that the model has never seen, keeps little.
- What is left is compared with what made-up sentences reach on the same rows: each two of the bank at
  once ("a horse race, hands cutting vegetables"), which hardly anything shows. Their best scores have a
  mean μ and a standard deviation σ, and the confidence is Φ((score·share − μ) / σ), the share of them
  that score less.

So a threshold of 0.95 lets pass one made-up sentence in twenty. It is no probability that an answer is
right. Within one query, confidence rises with the score.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vsearch.query import Term, Vector


def made_up(sentences: Sequence[str]) -> list[str]:
    """As many sentences that hardly anything shows: each with one that stands a third of the list on."""
    away = max(1, len(sentences) // 3)
    pairs = zip(sentences, [*sentences[away:], *sentences[:away]], strict=True)
    return [f"{one}, {other}" for one, other in pairs]


def general(vectors: NDArray[np.float32]) -> Vector:
    """The mean direction (dim,) of the vectors (n, dim) of sentences, a unit vector; 0 if there is none."""
    mean = vectors.mean(axis=0, dtype=np.float64)
    length = float(np.linalg.norm(mean))
    return np.asarray(mean / length if length > 1e-9 else 0 * mean, np.float32)


def own_share(query: NDArray[np.float32], direction: Vector) -> Any:
    """What queries (…, dim), unit vectors, have that not all sentences have: 0 to 1, shaped (…)."""
    return np.sqrt(1 - np.clip(query @ direction, 0, 1) ** 2)


@dataclass(frozen=True)
class Scale:
    """The confidence of one query's scores: Φ(slope · score + offset)."""

    slope: float
    offset: float

    def confidence(self, score: float) -> float:
        """0 to 1."""
        return 0.5 * math.erfc(-(self.slope * score + self.offset) / math.sqrt(2))


@dataclass(frozen=True)
class Calibration:
    """What an index tells of it: g, and μ and σ of the made-up sentences."""

    general: Vector
    mean: float
    deviation: float

    @classmethod
    def of(cls, direction: Vector, shares: Sequence[float], best: Sequence[float]) -> "Calibration":
        """From the shares and the best scores (n,) of the made-up sentences."""
        values = np.multiply(shares, best)
        return cls(direction, float(values.mean()), float(values.std()))

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Calibration":
        return cls(np.asarray(entry["general"], np.float32), entry["mean"], entry["deviation"])

    def as_json(self) -> dict[str, Any]:
        return {
            "general": np.round(self.general.astype(np.float64), 6).tolist(),
            "mean": round(self.mean, 6),
            "deviation": round(self.deviation, 6),
        }

    def scale(
        self,
        terms: Sequence[Term],
        vectors: Sequence[Vector],
        spreads: Sequence[float],
        means: Sequence[float],
    ) -> Scale | None:
        """For the query that `query.compose` makes of terms with unit `vectors` (dim,), of which
        `spreads` and `means` are the standard deviation and mean of the scores over the index. None
        where something else than sentences is looked for: cosines to pictures lie elsewhere.

        The confidence of a composed query is that of what it looks for, as it would score where what it
        does not want scores as usual.
        """
        if self.deviation <= 0 or any(t.weight > 0 and t.text is None for t in terms):
            return None
        if len(terms) == 1:
            share, length, usual = float(own_share(vectors[0], self.general)), 1.0, 0.0
        else:
            each = np.array([t.weight for t in terms]) / np.maximum(spreads, 1e-6)
            for_it = np.where(each > 0, each, 0.0)
            whole = for_it.sum()
            shares = own_share(np.stack(vectors), self.general)
            share = float(for_it @ shares / whole)
            length = float(np.linalg.norm(each @ np.stack(vectors).astype(np.float64)) / whole)
            usual = float((for_it - each) @ np.asarray(means) / whole)
        return Scale(share * length / self.deviation, (share * usual - self.mean) / self.deviation)
