"""Retrieval metrics of answers against true moments.

The rule, that of corpus-level moment retrieval with QVHighlights' average precision: an answer is
right if it lies in the right video and its temporal IoU with a true moment reaches the threshold;
each true moment can be claimed once, by the strongest answer that reaches it; average precision is
divided by the number of true moments. Intervals are by bootstrap over the queries.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vsearch import scoring
from vsearch.config import UserError
from vsearch.scoring import Floats

ANSWERS = 50
"""How many segments a query is answered with when it is judged."""
RECALLS = ((1, 0.5), (1, 0.7), (5, 0.5), (5, 0.7))
MEANS = (*(f"R{k}@{iou}" for k, iou in RECALLS), "mAP")


@dataclass(frozen=True)
class Moment:
    """Seconds [start_s, end_s] of a video, which is known by its file name."""

    video: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Query:
    """A sentence and its true moments, none if nothing matches; `group` is for figures apart."""

    text: str
    moments: tuple[Moment, ...]
    group: str = ""


Answers = Sequence[tuple[Moment, float]]
"""What a query was answered: moments with their strengths, strongest first."""


def read_queries(path: str) -> list[Query]:
    """Queries of a JSONL file with lines `{"query", "moments": [{"video", "start_s", "end_s"}]}`."""
    queries = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"The queries in {path} cannot be read: {error.strerror}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            moments = tuple(
                Moment(str(m["video"]), float(m["start_s"]), float(m["end_s"]))
                for m in entry["moments"]
            )
            queries.append(Query(str(entry["query"]), moments, str(entry.get("group", ""))))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'Line {number} of {path} is not of the form {{"query", "moments": '
                f'[{{"video", "start_s", "end_s"}}]}}: {error!r}.'
            ) from error
    if not queries:
        raise UserError(f"{path} holds no queries.")
    return queries


def temporal_iou(a: Moment, b: Moment) -> float:
    """Length of the overlap over the length of the union; 0 in different videos."""
    if a.video != b.video:
        return 0.0
    overlap = min(a.end_s, b.end_s) - max(a.start_s, b.start_s)
    union = max(a.end_s, b.end_s) - min(a.start_s, b.start_s)
    return max(0.0, overlap) / union if union > 0 else 0.0


def claims(answers: Sequence[Moment], truth: Sequence[Moment], iou: float) -> list[bool]:
    """For each answer, strongest first, whether it claims a true moment not yet claimed."""
    free = list(truth)
    right = []
    for answer in answers:
        reached = [(temporal_iou(answer, moment), i) for i, moment in enumerate(free)]
        best = max(reached, default=(0.0, -1))
        right.append(best[1] >= 0 and best[0] >= iou)
        if right[-1]:
            del free[best[1]]
    return right


def average_precision(right: Sequence[bool], moments: int) -> float:
    """Mean over the true moments of the precision at the answer that claims each, 0 if none does."""
    hits = np.cumsum(right)
    return float(sum(hits[i] / (i + 1) for i, r in enumerate(right) if r) / moments)


def score(queries: Sequence[Query], answers: Sequence[Answers]) -> dict[str, float]:
    """The figures for the answers to each of the queries. `mAP` is at IoU 0.5. `AUROC` tells how well
    the strongest answer's strength separates queries that have an answer from those that have none; it
    is there when both kinds are.
    """
    values = _figures(queries, answers)(np.ones((1, len(queries))))
    figures: dict[str, float] = {"queries": len(queries)}
    *means, separation = values[0].tolist()
    figures |= {
        name: round(0.0 if np.isnan(v) else v, 4) for name, v in zip(MEANS, means, strict=True)
    }
    if not np.isnan(separation):
        figures["AUROC"] = round(separation, 4)
    return figures


def intervals(queries: Sequence[Query], answers: Sequence[Answers]) -> dict[str, list[float]]:
    """Lower and upper bound of each figure of `score`, by bootstrap over the queries, as
    `scoring.BOOTSTRAP` states. A figure that no query concerns has none.
    """
    bounds = scoring.bootstrap(_figures(queries, answers), len(queries))
    return {
        name: [round(low, 4), round(high, 4)]
        for name, low, high in zip((*MEANS, "AUROC"), *bounds.tolist(), strict=True)
        if not np.isnan(low)
    }


def _figures(queries: Sequence[Query], answers: Sequence[Answers]) -> Callable[[Floats], Floats]:
    """MEANS and AUROC (draws, 6), as a function of how often each query is there (draws, queries); NaN
    where there is none.
    """
    values = [_values(q, a) for q, a in zip(queries, answers, strict=True)]
    means = scoring.means(np.array(values).reshape(-1, len(MEANS)))
    top = np.array([max((s for _, s in a), default=-1.0) for a in answers])
    answered = np.array([bool(q.moments) for q in queries], bool)
    return lambda draws: np.column_stack(
        [means(draws), [scoring.auroc(top, answered, counts) for counts in draws]]
    )


def _values(query: Query, answer: Answers) -> list[float]:
    """MEANS of one query, NaN if nothing matches it."""
    if not query.moments:
        return [np.nan] * len(MEANS)
    found = [moment for moment, _ in answer]
    recalls = [float(any(claims(found[:k], query.moments, iou))) for k, iou in RECALLS]
    right = claims(found, query.moments, 0.5)
    return [*recalls, average_precision(right, len(query.moments))]


def evaluate(
    search: Callable[[str, int], Sequence[Any]], queries: Sequence[Query]
) -> dict[str, Any]:
    """Asks every query and scores the answers; `search(text, limit)` gives segments. Queries that
    carry a group are scored by group as well, under `groups`. Each has its `intervals`.
    """
    answers = []
    for query in queries:
        found = search(query.text, ANSWERS)
        answers.append(
            [(Moment(Path(s.video).name, s.start_s, s.end_s), _strength(s)) for s in found]
        )
    result = _judged(queries, answers) | {"bootstrap": scoring.BOOTSTRAP}
    groups = sorted({query.group for query in queries if query.group})
    if groups:
        result["groups"] = {
            group: _judged(
                [q for q in queries if q.group == group],
                [a for q, a in zip(queries, answers, strict=True) if q.group == group],
            )
            for group in groups
        }
    return result


def _strength(segment: Any) -> float:
    """Confidence, which means the same for all sentences; the score where an index does not tell it."""
    confidence = getattr(segment, "confidence", None)
    return float(segment.score if confidence is None else confidence)


def _judged(queries: Sequence[Query], answers: Sequence[Answers]) -> dict[str, Any]:
    return {**score(queries, answers), "intervals": intervals(queries, answers)}
