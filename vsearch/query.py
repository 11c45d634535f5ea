"""What a query asks for, and its one vector: sentences, pictures and moments, each for or against."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vsearch.config import UserError

Vector = NDArray[np.float32]
MOST_WEIGHT = 2.0
AGAINST = -0.5
"""The weight of what a sentence says that it does not want."""

WITHOUT = re.compile(
    r",?\s+(?:(?:and|but)\s+)?(?:without|with\s+no)\s+|,?\s+(?:and|but)\s+(?:no|not)\s+",
    re.IGNORECASE,
)
QUOTES = ('""', "“”", "„“", "«»", "''", "‘’")


@dataclass(frozen=True)
class Term:
    """One thing that a moment should be like, or with a negative weight should not: a sentence, a
    picture (uint8 (height, width, 3) RGB), or what is seen at a second of a video of the index (as a
    player shows it).
    """

    text: str | None = None
    picture: NDArray[np.uint8] | None = None
    video_id: str | None = None
    at_s: float | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        given = [self.text is not None, self.picture is not None, self.video_id is not None]
        if sum(given) != 1 or (self.video_id is None) != (self.at_s is None):
            raise UserError(
                "Each term of a query is a text, an image, or a video_id with at_s: exactly one."
            )
        if self.text is not None and not self.text.strip():
            raise UserError("The query is empty: type what the moment should show.")
        if not 0 < abs(self.weight) <= MOST_WEIGHT:
            raise UserError(
                f"A weight lies between −{MOST_WEIGHT:g} and {MOST_WEIGHT:g} and is not 0: "
                f"{self.weight:g} does not."
            )

    def __str__(self) -> str:
        if self.text is not None:
            what = self.text
        else:
            what = "an image" if self.picture is not None else f"{self.video_id} at {self.at_s:g} s"
        if self.weight == 1:
            return what
        amount = "" if abs(self.weight) == 1 else f" ({abs(self.weight):g})"
        return f"{'without ' if self.weight < 0 else ''}{what}{amount}"


def read_sentence(text: str) -> list[Term]:
    """The terms of a sentence as people type it. What follows "without", "with no", "but no", "but not",
    "and no" or "and not" counts against it: CLIP itself does not understand them. A sentence in quotes
    is one term, as it stands.
    """
    text = text.strip()
    if text[:1] + text[-1:] in QUOTES and len(text) > 2 and text[0] not in text[1:-1]:
        return [Term(text=text[1:-1])]
    wanted, *unwanted = WITHOUT.split(text)
    if not wanted or not all(unwanted):
        return [Term(text=text)]
    return [Term(text=wanted), *(Term(text=part, weight=AGAINST) for part in unwanted)]


def terms_of(query: str | Sequence[Term], without: Sequence[str] = ()) -> list[Term]:
    """The terms of a query; a sentence is read as `read_sentence` does. Raises `UserError` if none of
    them says what to look for.
    """
    terms = read_sentence(query) if isinstance(query, str) else list(query)
    terms += [Term(text=text, weight=AGAINST) for text in without]
    if not any(term.weight > 0 for term in terms):
        raise UserError("The query is empty: say what the moment should show, not only what not.")
    return terms


def described(terms: Sequence[Term]) -> str:
    """A query in words."""
    return ", ".join(map(str, terms))


def compose(
    vectors: Sequence[Vector], weights: Sequence[float], spreads: Sequence[float]
) -> Vector:
    """The unit vector (dim,) whose scores rank as the weighted sum of the terms' standard scores.

    Cosines to a picture lie higher and spread wider than cosines to a sentence (the modality gap), so
    that a plain sum would be the picture's alone. `spreads` are the standard deviations of each
    term's scores over the index: Σ wᵢ·(qᵢ·x − μᵢ)/σᵢ ranks as (Σ wᵢ/σᵢ·qᵢ)·x does.
    """
    if len(vectors) == 1:
        return vectors[0]
    parts = zip(vectors, weights, spreads, strict=True)
    total = np.sum([v * (w / max(s, 1e-6)) for v, w, s in parts], axis=0, dtype=np.float64)
    length = float(np.linalg.norm(total))
    if length < 1e-9:
        raise UserError("What the query asks for and what it does not want cancel each other.")
    return np.asarray(total / length, np.float32)
