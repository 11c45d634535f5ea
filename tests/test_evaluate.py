import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vsearch.config import UserError
from vsearch.evaluate import (
    ANSWERS,
    MEANS,
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
    assert claims(answers, truth, 0.5) == [True, False, True, False, False]
    assert claims(answers, truth, 0.95) == [False, True, False, False, True]


def test_an_answer_claims_the_moment_it_fits_best() -> None:
    assert claims([at(4, 14), at(0, 10)], [at(0, 10), at(4, 14)], 0.4) == [True, True]


@given(st.lists(moments, max_size=12), st.lists(moments, max_size=6), st.floats(0.01, 1))
def test_there_are_never_more_claims_than_moments(
    answers: list[Moment], truth: list[Moment], iou: float
) -> None:
    right = claims(answers, truth, iou)
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
    assert figures == {"queries": len(queries)} | dict.fromkeys(
        ["R1@0.5", "R1@0.7", "R5@0.5", "R5@0.7", "mAP"], 1.0
    )


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
            "mAP": (1 + 0.5 / 2 + 0) / 3,
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
    assert {group: figures["mAP"] for group, figures in result["groups"].items()} == {
        "animals": 0.5
    }
    assert result["bootstrap"] == {
        "level": 0.95,
        "resamples": 1000,
        "seed": 0,
        "over": "queries",
    }
    assert result["intervals"]["R1@0.5"] == [0, 1]
    assert set(result["groups"]["animals"]["intervals"]) == {*MEANS}


def test_each_figure_lies_in_its_interval() -> None:
    queries = [Query(str(n), (at(0, 10),) if n % 4 else ()) for n in range(80)]
    answers = [
        [(at(0, 10 if n % 3 else 30), 0.9 if n % 5 else 0.2), (at(0, 9), 0.1)] for n in range(80)
    ]
    figures, bounds = score(queries, answers), intervals(queries, answers)
    assert set(bounds) == {*MEANS, "AUROC"} == set(figures) - {"queries"}
    for name, (low, high) in bounds.items():
        assert low <= figures[name] <= high
    assert 0 < bounds["R1@0.5"][0] < bounds["R1@0.5"][1] < 1
    assert 0 < bounds["AUROC"][0] < bounds["AUROC"][1] < 1
    assert bounds["R5@0.7"] == [1, 1]


def test_a_figure_that_no_query_concerns_has_no_interval() -> None:
    nothing, something = Query("a", ()), Query("b", (at(0, 1),))
    assert intervals([nothing], [[]]) == {}
    assert set(intervals([something], [[]])) == {*MEANS}
    assert score([], []) == {"queries": 0} | dict.fromkeys(MEANS, 0.0)


GOOD = {"query": "a cat", "moments": [{"video": "a.mp4", "start_s": 1, "end_s": 2.5}]}


def test_queries_are_read_in_order_with_blank_lines_skipped(tmp_path: Path) -> None:
    path = tmp_path / "queries.jsonl"
    other = {"query": "nothing é", "moments": [], "group": "none"}
    path.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(other)}\n", encoding="utf-8")
    assert read_queries(str(path)) == [
        Query("a cat", (at(1, 2.5),)),
        Query("nothing é", (), "none"),
    ]


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
