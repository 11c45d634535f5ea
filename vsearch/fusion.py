"""The spaces that rows of an index can lie in: CLIP's own, the projected one, and both fused.

A fused vector is the unit vector of α parts of the projected one and 1 − α of CLIP's own. α is tuned
without labels: chosen is the one whose scores of general sentences correlate best with CLIP's own scores
two seconds later, when most videos still show the same. A projector that sees past CLIP's noise of the
moment raises that, one that sees something else, or less, does not.

Shapes: n = frames, d = DINO's width, c = CLIP's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vsearch.corpus import Corpus

Vectors = NDArray[np.float16]
Floats = NDArray[np.float32]
Pair = tuple[Vectors, Vectors]
"""Projected and CLIP's own vectors of the same frames, each (n, c)."""

ALPHAS = tuple(step / 20 for step in range(2, 19))
"""What is tried: a fused space has a part of each."""
EVEN = 0.5
"""α where nothing tells: no video is long enough, or no score foretells another."""
LATER_S = 2.0


def fuse(projected: Vectors, clip: Vectors, alpha: float) -> Vectors:
    """normalize(α · projected + (1 − α) · clip) of unit vectors, each float16 (n, c)."""
    total = alpha * np.asarray(projected, np.float32) + (1 - alpha) * np.asarray(clip, np.float32)
    lengths = np.linalg.norm(total, axis=1, keepdims=True)
    fused: Vectors = (total / np.maximum(lengths, 1e-6)).astype(np.float16)
    return fused


def mapping(
    corpus: Corpus, projector: str | None, alpha: float | None
) -> tuple[list[str], Callable[..., Vectors]]:
    """(columns of the frames, function of their vectors, each float16 (n, …), that gives the unit vectors
    float16 (n, c) of a space). `projector` is the version of the one in use, None for CLIP's own
    vectors; `alpha` its share in a fused space, None in another.
    """
    if projector is None:
        return ["clip"], lambda clip: clip
    from vsearch.projector import projection

    column, project = projection(corpus, projector)
    if alpha is None:
        return [column], project
    return [column, "clip"], lambda dino, clip: fuse(project(dino), clip, alpha)


def pairs(pts_s: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(frames, those at least `LATER_S` seconds later) of a stretch, by its times (n,) in order."""
    after = np.searchsorted(pts_s, pts_s + LATER_S - 1e-6)
    first = np.flatnonzero(after < len(pts_s))
    return first, after[first]


def foretold(now: Pair, then: Pair, sentences: Floats) -> list[tuple[float, float]]:
    """(α, correlation) for each of `ALPHAS`: the mean over sentences float32 (…, c) of the correlation of
    their scores on frames `now` with CLIP's on the frames `then`.
    """
    later = _scores(then[1], sentences)
    return [
        (alpha, round(max(0.0, float((_scores(fuse(*now, alpha), sentences) * later).mean())), 5))
        for alpha in ALPHAS
    ]


def tuned(curve: Sequence[tuple[float, float]]) -> float:
    """The best α of a curve, the smallest of equals; `EVEN` if none was tried or all of them are 0."""
    alpha, worth = max(curve, key=lambda point: point[1], default=(EVEN, 0.0))
    return alpha if worth > 0 else EVEN


def _scores(vectors: Vectors, sentences: Floats) -> Any:
    """Scores (n, sentences) of frames, with mean 0 and deviation 1 by sentence."""
    scores = np.asarray(vectors, np.float32) @ sentences.T
    scores -= scores.mean(axis=0)
    return scores / np.maximum(scores.std(axis=0), 1e-6)
