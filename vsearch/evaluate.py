"""Retrieval metrics of answers against true moments.

The rule, that of corpus-level moment retrieval: an answer is right if it lies in the right video and
its temporal IoU with a true moment reaches the threshold; each true moment can be claimed once, by the
strongest answer that reaches it; average precision is not interpolated, and divided by the number of
true moments. Intervals are by bootstrap over the queries.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vsearch import scoring
from vsearch.config import MIN_CONFIDENCE, UserError, space_name
from vsearch.query import Term
from vsearch.scoring import Bools, Floats

ANSWERS = 50
"""How many segments a query is answered with when it is judged."""
RANKED = 10
"""So many of them count for NDCG@10."""
RECALLS = ((1, 0.5), (1, 0.7), (5, 0.5), (5, 0.7))
MEANS = (
    *(f"R{k}@{iou}" for k, iou in RECALLS),
    *("mAP@0.5", "mAP@0.75", "mAP", "NDCG@10", "boundary-error-s", "FPR", "negation"),
)
FIGURES = (*MEANS, "AUROC")


@dataclass(frozen=True)
class Moment:
    """Seconds [start_s, end_s] of a video, which is known by its file name."""

    video: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Query:
    """A sentence and its true moments, none if nothing matches; `group` is for figures apart. Two
    queries with the same `pair` differ in a negation. `terms` are what is asked instead of the
    sentence, if there are any.
    """

    text: str
    moments: tuple[Moment, ...]
    group: str = ""
    pair: int | None = None
    terms: tuple[Term, ...] = ()


Answers = Sequence[tuple[Moment, float]]
"""What a query was answered: moments with their strengths, strongest first."""
Search = Callable[[str | Sequence[Term], int], Sequence[Any]]
"""Gives the segments for a sentence or several terms, at most so many."""


def read_queries(path: str) -> list[Query]:
    """Queries of a JSONL file with lines `{"query", "moments": [{"video", "start_s", "end_s"}]}`, and
    optionally `group`, `pair` (a number that two lines share) and `terms` (`[{"text", "weight"}]`).
    Raises `UserError` that names the first line that cannot be used.
    """
    queries = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"The queries in {path} cannot be read: {error.strerror}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            queries.append(_query(json.loads(line)))
        except UserError as error:
            raise UserError(f"Line {number} of {path} cannot be used: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'Line {number} of {path} is not of the form {{"query", "moments": '
                f'[{{"video", "start_s", "end_s"}}]}}: {error!r}.'
            ) from error
    if not queries:
        raise UserError(f"{path} holds no queries.")
    for pair, count in Counter(q.pair for q in queries if q.pair is not None).items():
        if count != 2 or not all(q.moments for q in queries if q.pair == pair):
            raise UserError(
                f"Pair {pair} of {path} must be two lines with true moments each: it has {count}, or "
                f"one of them has no moments."
            )
    return queries


def _query(entry: dict[str, Any]) -> Query:
    moments = tuple(
        Moment(str(m["video"]), float(m["start_s"]), float(m["end_s"])) for m in entry["moments"]
    )
    for moment in moments:
        if not moment.start_s < moment.end_s:  # nor NaN; no answer could ever reach it
            raise UserError(
                f"A moment ends after it starts, unlike {moment.start_s:g} to {moment.end_s:g} s."
            )
    pair = entry.get("pair")
    if isinstance(pair, bool) or not isinstance(pair, int | None):
        raise UserError(f"A pair is a whole number, not {pair!r}.")
    terms = tuple(
        Term(text=str(term["text"]), weight=float(term.get("weight", 1.0)))
        for term in entry.get("terms", [])
    )
    return Query(str(entry["query"]), moments, str(entry.get("group", "")), pair, terms)


def temporal_iou(a: Moment, b: Moment) -> float:
    """Length of the overlap over the length of the union; 0 in different videos."""
    if a.video != b.video:
        return 0.0
    overlap = min(a.end_s, b.end_s) - max(a.start_s, b.start_s)
    union = max(a.end_s, b.end_s) - min(a.start_s, b.start_s)
    return max(0.0, overlap) / union if union > 0 else 0.0


def ious(answers: Sequence[Moment], truth: Sequence[Moment]) -> Floats:
    """Temporal IoU (answers, truth) of each answer with each true moment."""
    rows = [[temporal_iou(answer, moment) for moment in truth] for answer in answers]
    return np.array(rows, np.float64).reshape(len(answers), len(truth))


def claims(
    answers: Sequence[Moment], truth: Sequence[Moment], thresholds: Sequence[float]
) -> Bools:
    """For each answer, strongest first, whether it claims a true moment not yet claimed: (thresholds,
    answers), as `scoring.claims`.
    """
    iou = ious(answers, truth)
    if not iou.size:
        return np.zeros((len(thresholds), len(answers)), bool)
    return scoring.claims(iou[None], np.asarray(thresholds))[0]


def average_precision(right: Sequence[bool] | Bools, moments: int) -> float:
    """Mean over the true moments of the precision at the answer that claims each, 0 if none does."""
    hits = np.cumsum(right)
    return float(sum(hits[i] / (i + 1) for i, r in enumerate(right) if r) / moments)


def tells_apart(answers: Sequence[Moment], own: Sequence[Moment], other: Sequence[Moment]) -> bool:
    """Whether a query's ranking has its own true moments above those of the other query of its pair:
    the first answer that reaches either at IoU 0.5 fits one of its own better.
    """
    for answer in answers:
        mine, theirs = (
            max((temporal_iou(answer, moment) for moment in truth), default=0.0)
            for truth in (own, other)
        )
        if max(mine, theirs) >= 0.5 and mine != theirs:
            return mine > theirs
    return False


def score(queries: Sequence[Query], answers: Sequence[Answers]) -> dict[str, float]:
    """The figures for the answers to each of the queries, those that some of them concern: `FPR`
    queries without true moments, `negation` pairs, `AUROC`, which tells how well the strongest
    answer's strength separates the queries with true moments from those without, both kinds, and all
    others the queries with true moments.
    """
    return _score(_table(queries, answers))


def intervals(queries: Sequence[Query], answers: Sequence[Answers]) -> dict[str, list[float]]:
    """Lower and upper bound of each figure of `score`, by bootstrap over the queries, as
    `scoring.BOOTSTRAP` states. A figure that no query concerns has none.
    """
    return _intervals(_table(queries, answers))


@dataclass(frozen=True)
class _Table:
    """Of each query: `values` (queries, MEANS), NaN where it does not concern one, the strength of its
    strongest answer, and whether it has true moments.
    """

    values: Floats
    top: Floats
    answered: Bools

    def of(self, rows: Bools) -> "_Table":
        return _Table(self.values[rows], self.top[rows], self.answered[rows])

    def figures(self, draws: Floats) -> Floats:
        """FIGURES (draws, figures), from how often each query is there (draws, queries); NaN where
        there is none.
        """
        separation = [scoring.auroc(self.top, self.answered, counts) for counts in draws]
        return np.column_stack([scoring.means(self.values)(draws), separation])


def _table(
    queries: Sequence[Query], answers: Sequence[Answers], shown: Sequence[bool] | None = None
) -> _Table:
    """`shown` tells which queries people see an answer to; by default those that have one."""
    shown = [bool(answer) for answer in answers] if shown is None else shown
    found = [[moment for moment, _ in answer] for answer in answers]
    values = np.full((len(queries), len(MEANS)), np.nan)
    column = {name: values[:, place] for place, name in enumerate(MEANS)}
    for row, query in enumerate(queries):
        if query.moments:
            for name, value in _values(query, found[row]).items():
                column[name][row] = value
        else:
            column["FPR"][row] = shown[row]
    # A pair is one case, whose value stands at its first query.
    pairs: dict[int, list[int]] = {}
    for row, query in enumerate(queries):
        if query.pair is not None:
            pairs.setdefault(query.pair, []).append(row)
    for a, b in (rows for rows in pairs.values() if len(rows) == 2):
        truth = queries[a].moments, queries[b].moments
        both = tells_apart(found[a], *truth) and tells_apart(found[b], *truth[::-1])
        column["negation"][a] = both
    top = np.array([max((s for _, s in a), default=-1.0) for a in answers])
    return _Table(values, top, np.array([bool(q.moments) for q in queries], bool))


def _values(query: Query, found: Sequence[Moment]) -> dict[str, float]:
    """What the answers to a query with true moments are worth."""
    right = claims(found, query.moments, scoring.IOUS.tolist())
    at = {float(iou): claimed for iou, claimed in zip(scoring.IOUS, right, strict=True)}
    precision = {iou: average_precision(r, len(query.moments)) for iou, r in at.items()}
    ranked = np.zeros((1, 1, RANKED), bool)
    ranked[0, 0, : len(found)] = at[0.5][:RANKED]
    return {
        **{f"R{k}@{iou}": float(at[iou][:k].any()) for k, iou in RECALLS},
        "mAP@0.5": precision[0.5],
        "mAP@0.75": precision[0.75],
        "mAP": float(np.mean(list(precision.values()))),
        "NDCG@10": float(scoring.ndcg(ranked, np.array([len(query.moments)]))[0, 0]),
        "boundary-error-s": _boundary_error_s(query, found),
    }


def _boundary_error_s(query: Query, found: Sequence[Moment]) -> float:
    """Of the first answer against the true moment nearest to it, NaN where it does not reach it."""
    if not found:
        return np.nan
    iou = ious(found[:1], query.moments)[0]
    nearest = query.moments[int(iou.argmax())]
    first, true = (np.array([[m.start_s, m.end_s]]) for m in (found[0], nearest))
    return float(scoring.boundary_error_s(first, true, iou.max(keepdims=True))[0])


def _score(table: _Table) -> dict[str, float]:
    values = table.figures(np.ones((1, len(table.top))))[0]
    figures: dict[str, float] = {"queries": len(table.top)}
    return figures | {
        name: round(float(value), 4)
        for name, value in zip(FIGURES, values, strict=True)
        if not np.isnan(value)
    }


def _intervals(table: _Table) -> dict[str, list[float]]:
    bounds = scoring.bootstrap(table.figures, len(table.top))
    return {
        name: [round(low, 4), round(high, 4)]
        for name, low, high in zip(FIGURES, *bounds.tolist(), strict=True)
        if not np.isnan(low)
    }


def ask(search: Search, queries: Sequence[Query]) -> list[Sequence[Any]]:
    """The segments that each query is answered with, by its terms if it has some."""
    return [search(query.terms or query.text, ANSWERS) for query in queries]


def answers_of(segments: Sequence[Any]) -> Answers:
    """Segments as moments with their strengths."""
    return [(Moment(Path(s.video).name, s.start_s, s.end_s), _strength(s)) for s in segments]


def _strength(segment: Any) -> float:
    """Confidence, which means the same for all sentences; the score where an index does not tell it."""
    confidence = getattr(segment, "confidence", None)
    return float(segment.score if confidence is None else confidence)


def _is_sure(segment: Any) -> bool:
    """Whether a segment is shown unless someone asks for weak ones too."""
    confidence = getattr(segment, "confidence", None)
    return confidence is None or confidence >= MIN_CONFIDENCE


def precisions(queries: Sequence[Query], answers: Sequence[Answers]) -> Floats:
    """The `mAP` of each query (queries,), NaN for those without true moments."""
    return _table(queries, answers).values[:, MEANS.index("mAP")]


def judge(queries: Sequence[Query], found: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The figures for the segments `found` for each query. Queries that carry a group are scored by
    group as well, under `groups`. Each has its `intervals`.
    """
    shown = [any(_is_sure(segment) for segment in segments) for segments in found]
    table = _table(queries, [answers_of(segments) for segments in found], shown)
    result = _judged(table) | {"bootstrap": scoring.BOOTSTRAP}
    groups = np.array([query.group for query in queries])
    if any(groups):
        named = sorted({str(group) for group in groups if group})
        result["groups"] = {group: _judged(table.of(groups == group)) for group in named}
    return result


def evaluate(search: Search, queries: Sequence[Query]) -> dict[str, Any]:
    """Asks every query and judges the answers; `search(query, limit)` gives segments."""
    return judge(queries, ask(search, queries))


@dataclass(frozen=True)
class Judged:
    """The segments that each query was answered with in a space, and their `figures`, with `space` and
    `alpha`, its projected share if it is fused.
    """

    found: Sequence[Sequence[Any]]
    figures: dict[str, Any]

    @classmethod
    def of(
        cls, search: Search, queries: Sequence[Query], space: str, alpha: float | None = None
    ) -> "Judged":
        """Asks every query and judges the answers."""
        found = ask(search, queries)
        return cls(found, {"space": space, "alpha": alpha, **judge(queries, found)})

    @property
    def name(self) -> str:
        """The space, with its α."""
        return space_name(self.figures["space"], self.figures["alpha"])


def _judged(table: _Table) -> dict[str, Any]:
    return {**_score(table), "intervals": _intervals(table)}
