import json
import random
from math import log2
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vsearch.config import UserError
from vsearch.evaluate import (
    ANSWERS,
    FIGURES,
    Moment,
    Query,
    average_precision,
    claims,
    evaluate,
    intervals,
    read_queries,
    score,
    temporal_iou,
)
from vsearch.query import Term

OF_TRUTH = ["R1@0.5", "R1@0.7", "R5@0.5", "R5@0.7", "mAP@0.5", "mAP@0.75", "mAP", "NDCG@10"]
seconds = st.integers(0, 400).map(lambda quarter: quarter / 4)
moments = st.builds(
    lambda video, start_s, length_s: Moment(video, start_s, start_s + length_s),
    st.sampled_from(["a.mp4", "b.mp4"]),
    seconds,
    seconds,
)


def at(start_s: float, end_s: float, video: str = "a.mp4") -> Moment:
    return Moment(video, start_s, end_s)


@pytest.mark.parametrize(
    ("a", "b", "iou"),
    [
        (at(0, 10), at(0, 10), 1),
        (at(0, 10), at(5, 15), 1 / 3),
        (at(0, 10), at(2, 4), 0.2),
        (at(0, 10), at(10, 20), 0),
        (at(0, 10), at(12, 20), 0),
        (at(0, 10), at(0, 10, "b.mp4"), 0),
        (at(3, 3), at(3, 3), 0),
    ],
)
def test_iou_of_known_cases(a: Moment, b: Moment, iou: float) -> None:
    assert temporal_iou(a, b) == pytest.approx(iou)


@given(moments, moments)
def test_iou_is_symmetric_and_bounded(a: Moment, b: Moment) -> None:
    iou = temporal_iou(a, b)
    assert iou == temporal_iou(b, a)
    assert 0 <= iou <= 1
    assert (iou == 1) == (a == b and a.start_s < a.end_s)


def test_a_true_moment_is_claimed_once_by_the_strongest_answer_that_reaches_it() -> None:
    truth = [at(0, 10), at(20, 30)]
    answers = [at(0, 9), at(0, 10), at(21, 30), at(40, 50), at(20, 30)]
    assert claims(answers, truth, [0.5, 0.95]).tolist() == [
        [True, False, True, False, False],
        [False, True, False, False, True],
    ]


def test_an_answer_claims_the_moment_it_fits_best() -> None:
    assert claims([at(4, 14), at(0, 10)], [at(0, 10), at(4, 14)], [0.4]).all()


@given(st.lists(moments, max_size=12), st.lists(moments, max_size=6), st.floats(0.01, 1))
def test_there_are_never_more_claims_than_moments(
    answers: list[Moment], truth: list[Moment], iou: float
) -> None:
    [right] = claims(answers, truth, [iou]).tolist()
    assert len(right) == len(answers)
    assert sum(right) <= len(truth)
    for answer, claimed in zip(answers, right, strict=True):
        assert not claimed or max(temporal_iou(answer, moment) for moment in truth) >= iou


@pytest.mark.parametrize(
    ("right", "count", "precision"),
    [
        ([True, False, True], 2, (1 + 2 / 3) / 2),
        ([True, False, True], 4, (1 + 2 / 3) / 4),
        ([False, False, True], 1, 1 / 3),
        ([False, False], 3, 0),
        ([], 2, 0),
    ],
)
def test_average_precision_is_divided_by_the_number_of_true_moments(
    right: list[bool], count: int, precision: float
) -> None:
    assert average_precision(right, count) == pytest.approx(precision)


@given(st.lists(st.lists(moments, min_size=1, max_size=5, unique=True), min_size=1, max_size=4))
def test_perfect_answers_score_one(truths: list[list[Moment]]) -> None:
    assume(all(m.start_s < m.end_s for truth in truths for m in truth))
    queries = [Query("q", tuple(truth)) for truth in truths]
    figures = score(queries, [[(m, 0.5) for m in truth] for truth in truths])
    assert figures.pop("boundary-error-s") == 0
    assert figures == {"queries": len(queries)} | dict.fromkeys(OF_TRUTH, 1.0)


def test_figures_of_a_known_case() -> None:
    queries = [
        Query("found first", (at(0, 10),)),
        Query("found second, roughly", (at(0, 10), at(50, 60))),
        Query("missed", (at(0, 10),)),
        Query("nothing", ()),
    ]
    answers = [
        [(at(0, 10), 0.9)],
        [(at(30, 40), 0.6), (at(0, 6), 0.5)],
        [(at(0, 10, "b.mp4"), 0.2)],
        [(at(0, 10), 0.4)],
    ]
    assert score(queries, answers) == pytest.approx(
        {
            "queries": 4,
            "R1@0.5": 1 / 3,
            "R1@0.7": 1 / 3,
            "R5@0.5": 2 / 3,
            "R5@0.7": 1 / 3,
            "mAP@0.5": (1 + 0.5 / 2 + 0) / 3,
            "mAP@0.75": 1 / 3,
            "mAP": (10 * 1 + 3 * 0.5 / 2) / 10 / 3,  # an IoU of 0.6 reaches three thresholds
            "NDCG@10": (1 + (1 / log2(3)) / (1 + 1 / log2(3)) + 0) / 3,
            "boundary-error-s": 0,
            "FPR": 1,
            "AUROC": 2 / 3,
        },
        abs=1e-4,
    )


def test_a_tie_counts_half_in_auroc_and_no_answer_is_the_weakest() -> None:
    queries = [Query("a", (at(0, 1),)), Query("b", ()), Query("c", ())]
    answers = [[(at(0, 1), 0.3)], [(at(0, 1), 0.3)], []]
    assert score(queries, answers)["AUROC"] == 0.75


def test_evaluate_asks_every_query_and_scores_groups_apart() -> None:
    queries = [
        Query("cat", (at(0, 10),), "animals"),
        Query("dog", (at(0, 10),), "animals"),
        Query("car", (at(5, 8),)),
    ]
    asked = []

    def search(text: str, limit: int) -> list[SimpleNamespace]:
        asked.append((text, limit))
        found = {"cat": (0, 10), "car": (5, 8)}.get(text)
        return (
            [SimpleNamespace(video="s3://bucket/a.mp4", start_s=found[0], end_s=found[1], score=1)]
            if found
            else []
        )

    result = evaluate(search, queries)
    assert asked == [("cat", ANSWERS), ("dog", ANSWERS), ("car", ANSWERS)]
    assert result["R1@0.5"] == pytest.approx(2 / 3, abs=1e-4)
    assert {group: figures["mAP@0.5"] for group, figures in result["groups"].items()} == {
        "animals": 0.5
    }
    assert result["bootstrap"] == {
        "level": 0.95,
        "resamples": 1000,
        "seed": 0,
        "over": "queries",
    }
    assert result["intervals"]["R1@0.5"] == [0, 1]
    assert set(result["groups"]["animals"]["intervals"]) == {*OF_TRUTH, "boundary-error-s"}


def figures_by_loops(truth: list[Moment], found: list[Moment]) -> dict[str, float]:
    """Those of one query with true moments, by their plain definitions."""

    def right(iou: float) -> list[bool]:
        free, claimed = list(truth), []
        for answer in found:
            reached = [m for m in free if temporal_iou(answer, m) >= iou]
            claimed.append(bool(reached))
            if reached:
                free.remove(max(reached, key=lambda m: temporal_iou(answer, m)))
        return claimed

    def precision(iou: float) -> float:
        hits = [place for place, hit in enumerate(right(iou), 1) if hit]
        return sum(number / place for number, place in enumerate(hits, 1)) / len(truth)

    def gain(places: range | list[int]) -> float:
        return sum(1 / log2(place + 1) for place in places)

    figures = {f"R{k}@{iou}": float(any(right(iou)[:k])) for k in (1, 5) for iou in (0.5, 0.7)}
    figures |= {f"mAP@{iou}": precision(iou) for iou in (0.5, 0.75)}
    figures["mAP"] = sum(precision((50 + 5 * n) / 100) for n in range(10)) / 10
    claimed = [place for place, hit in enumerate(right(0.5)[:10], 1) if hit]
    figures["NDCG@10"] = gain(claimed) / gain(range(1, min(len(truth), 10) + 1))
    near = max(truth, key=lambda m: temporal_iou(found[0], m)) if found else None
    if near and temporal_iou(found[0], near) >= 0.5:
        off_s = abs(found[0].start_s - near.start_s), abs(found[0].end_s - near.end_s)
        figures["boundary-error-s"] = sum(off_s) / 2
    return figures


@pytest.mark.parametrize("seed", range(30))
def test_every_figure_is_that_of_its_plain_definition(seed: int) -> None:
    rng = random.Random(seed)

    def some(count: int) -> list[Moment]:
        starts = [rng.uniform(0, 30) for _ in range(count)]
        return [at(s, s + rng.uniform(5, 15), rng.choice(["a.mp4", "b.mp4"])) for s in starts]

    truth, found = some(rng.randint(1, 14)), some(rng.randint(0, 30))
    figures = score([Query("q", tuple(truth))], [[(m, -n) for n, m in enumerate(found)]])
    assert figures.pop("queries") == 1
    assert figures == pytest.approx(figures_by_loops(truth, found), abs=1e-4)


def test_boundaries_are_those_of_the_first_answer_where_it_reaches_a_moment() -> None:
    queries = [Query(str(n), (at(0, 10), at(40, 50))) for n in range(4)]
    firsts = [at(1, 13), at(40, 48), at(0, 30), at(0, 10, "b.mp4")]
    answers = [[(first, 0.9), (at(0, 10), 0.8)] for first in firsts]
    # (1 + 3) / 2 and (0 + 2) / 2; the third overlaps too little, the fourth is in another video.
    assert score(queries, answers)["boundary-error-s"] == 1.5


def test_the_share_of_sentences_without_moments_that_were_answered() -> None:
    queries = [Query("a", ()), Query("b", ()), Query("c", ()), Query("d", (at(0, 1),))]
    figures = score(queries, [[(at(0, 1), 0.3)], [], [], []])
    assert figures["FPR"] == pytest.approx(1 / 3, abs=1e-4)
    assert "negation" not in figures


WITH, WITHOUT = (at(0, 10), at(20, 30)), (at(40, 50), at(60, 70))


@pytest.mark.parametrize(
    ("of_with", "of_without", "share"),
    [
        ([at(0, 10), at(40, 50)], [at(60, 70), at(0, 10)], 1),
        ([at(80, 90), at(21, 30)], [at(41, 50)], 1),  # what is neither's does not count
        ([at(0, 10), at(40, 50)], [at(20, 30), at(60, 70)], 0),  # the negation was not understood
        ([at(40, 50)], [at(20, 30)], 0),
        ([at(0, 10)], [], 0),
        ([at(0, 30)], [at(60, 70)], 0),  # reaches nothing
    ],
)
def test_a_pair_counts_where_each_sentence_has_its_own_moments_first(
    of_with: list[Moment], of_without: list[Moment], share: float
) -> None:
    queries = [
        Query("a red car with a tree", WITH, "cars", 7),
        Query("something else", (at(0, 5),)),
        Query("a red car without a tree", WITHOUT, "cars", 7),
    ]
    answers = [[(m, 0.5) for m in found] for found in (of_with, [at(0, 5)], of_without)]
    assert score(queries, answers)["negation"] == share
    assert intervals(queries, answers)["negation"] == [share, share]


def test_a_pair_is_one_case_of_the_bootstrap() -> None:
    """Two queries that are right or wrong together tell no more than one."""
    rng = random.Random(0)
    wins = [rng.random() < 0.5 for _ in range(40)]
    queries = [Query("q", truth, "", n) for n in range(40) for truth in (WITH, WITHOUT)]
    answers = [
        [(m, 0.5) for m in (own if win else other)]
        for win in wins
        for own, other in ((WITH, WITHOUT), (WITHOUT, WITH))
    ]
    single = [Query("q", WITH) for _ in wins]
    found = [[(WITH[0] if win else at(90, 99), 0.5)] for win in wins]
    assert score(queries, answers)["negation"] == score(single, found)["R1@0.5"]
    low, high = intervals(queries, answers)["negation"]
    reference = intervals(single, found)["R1@0.5"]
    assert (low, high) == pytest.approx(reference, abs=0.06)


def test_terms_are_asked_instead_of_the_sentence() -> None:
    terms = (Term(text="a red car"), Term(text="a tree", weight=-0.5))
    asked = []

    def search(query: object, limit: int) -> list[SimpleNamespace]:
        asked.append(query)
        return []

    evaluate(search, [Query("a red car without a tree", WITH, terms=terms), Query("b", WITH)])
    assert asked == [terms, "b"]


def test_each_figure_lies_in_its_interval() -> None:
    queries = [Query(str(n), (at(0, 10),) if n % 4 else ()) for n in range(80)]
    answers = [
        [(at(0, 10 if n % 3 else 30), 0.9 if n % 5 else 0.2), (at(0, 9), 0.1)] for n in range(80)
    ]
    figures, bounds = score(queries, answers), intervals(queries, answers)
    assert set(bounds) == {*FIGURES} - {"negation"} == set(figures) - {"queries"}
    for name, (low, high) in bounds.items():
        assert low <= figures[name] <= high
    assert 0 < bounds["R1@0.5"][0] < bounds["R1@0.5"][1] < 1
    assert 0 < bounds["AUROC"][0] < bounds["AUROC"][1] < 1
    assert bounds["R5@0.7"] == [1, 1]


def test_a_figure_that_no_query_concerns_has_no_interval() -> None:
    nothing, something = Query("a", ()), Query("b", (at(0, 1),))
    assert intervals([nothing], [[]]) == {"FPR": [0, 0]}
    assert set(intervals([something], [[]])) == {*OF_TRUTH}
    assert score([], []) == {"queries": 0}


GOOD = {"query": "a cat", "moments": [{"video": "a.mp4", "start_s": 1, "end_s": 2.5}]}


def test_queries_are_read_in_order_with_blank_lines_skipped(tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    other = {"query": "nothing é", "moments": [], "group": "none"}
    terms = [{"text": "a cat"}, {"text": "a dog", "weight": -0.5}]
    pair = [GOOD | {"pair": 3}, GOOD | {"query": "no dog", "pair": 3, "terms": terms}]
    lines = [json.dumps(line) for line in (GOOD, other, *pair)]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    assert read_queries(str(path)) == [
        Query("a cat", (at(1, 2.5),)),
        Query("nothing é", (), "none"),
        Query("a cat", (at(1, 2.5),), "", 3),
        Query(
            "no dog",
            (at(1, 2.5),),
            "",
            3,
            (Term(text="a cat"), Term(text="a dog", weight=-0.5)),
        ),
    ]


@pytest.mark.parametrize(
    "lines", [[{"pair": 1}], [{"pair": 1}] * 3, [{"pair": 1}, {"pair": 1, "moments": []}]]
)
def test_a_pair_is_two_lines_with_moments(tmp_path: Path, lines: list[dict[str, object]]) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text("".join(json.dumps(GOOD | line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"^Pair 1 of .* two lines"):
        read_queries(str(path))


@pytest.mark.parametrize(
    "line",
    [
        "{not json",
        "[]",
        '"text"',
        '{"query": "a"}',
        '{"moments": []}',
        '{"query": "a", "moments": [{"video": "a.mp4", "start_s": 1}]}',
        '{"query": "a", "moments": [{"video": "a.mp4", "start_s": "x", "end_s": 2}]}',
        '{"query": "a", "moments": 3}',
        '{"query": "a", "moments": [{"video": "a.mp4", "start_s": 2, "end_s": 2}]}',
        '{"query": "a", "moments": [{"video": "a.mp4", "start_s": 1, "end_s": NaN}]}',
        '{"query": "a", "moments": [], "pair": "x"}',
        '{"query": "a", "moments": [], "terms": [{"weight": 1}]}',
        '{"query": "a", "moments": [], "terms": [{"text": "a", "weight": 9}]}',
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "queries.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(UserError, match=rf"^Line 3 of .*{path.name}"):
        read_queries(str(path))


def test_a_missing_or_empty_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_queries(str(tmp_path / "no.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no queries"):
        read_queries(str(tmp_path / "empty.jsonl"))
