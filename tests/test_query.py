"""Composed queries: what their one vector ranks, against standard scores taken one by one."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vsearch
from vsearch.api import QueryIn, TermIn
from vsearch.config import MIN_CONFIDENCE, UserError
from vsearch.query import AGAINST, Term, compose, described, read_sentence, terms_of


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@given(
    st.integers(0, 10_000),
    st.lists(st.floats(-2, 2).filter(lambda w: abs(w) > 0.05), min_size=2, max_size=5),
)
def test_a_composed_query_ranks_as_the_weighted_sum_of_standard_scores(seed, weights):
    rng = np.random.default_rng(seed)
    rows = unit(rng.standard_normal((300, 32)) + 1)
    terms = unit(rng.standard_normal((len(weights), 32)) + rng.random((len(weights), 1))).astype(
        np.float32
    )
    scores = rows @ terms.T
    standard = (scores - scores.mean(0)) / scores.std(0)
    expected = standard @ np.array(weights)
    found = rows @ compose(list(terms), weights, scores.std(0).tolist())
    assert np.corrcoef(found, expected)[0, 1] == pytest.approx(1, abs=1e-5)
    assert np.linalg.norm(compose(list(terms), weights, [1.0] * len(weights))) == pytest.approx(
        1, abs=1e-5
    )


def test_a_single_term_is_taken_as_it_is():
    vector = unit(np.arange(8.0)).astype(np.float32)
    assert np.array_equal(compose([vector], [0.3], [0.7]), vector)


def test_terms_that_cancel_are_refused():
    vector = unit(np.arange(8.0)).astype(np.float32)
    with pytest.raises(UserError, match="cancel"):
        compose([vector, vector], [1, -1], [0.5, 0.5])


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"text": "a", "video_id": "b", "at_s": 1.0},
        {"video_id": "b"},
        {"at_s": 1.0},
        {"text": "a", "at_s": 1.0},
        {"text": "  "},
        {"text": "a", "weight": 0.0},
        {"text": "a", "weight": 2.5},
        {"text": "a", "weight": float("nan")},
    ],
)
def test_a_term_that_makes_no_sense_is_refused(values):
    with pytest.raises(UserError):
        Term(**values)


@pytest.mark.parametrize(
    ("typed", "wanted", "unwanted"),
    [
        ("a car without a tree", "a car", ["a tree"]),
        ("A car, without a tree", "A car", ["a tree"]),
        ("a beach but no people", "a beach", ["people"]),
        ("a beach, but not people", "a beach", ["people"]),
        ("a man and not a woman", "a man", ["a woman"]),
        ("a room with no windows and no doors", "a room", ["windows", "doors"]),
        ("a car without snow, without trees", "a car", ["snow", "trees"]),
        ("a car WITHOUT snow but without trees", "a car", ["snow", "trees"]),
        ("“a car without a tree”", "a car without a tree", []),
        ('"a car without a tree"', "a car without a tree", []),
        ('"a car" without "a tree"', '"a car"', ['"a tree"']),
        ("a car and a tree", "a car and a tree", []),
        ("without a tree", "without a tree", []),
        ("a car without", "a car without", []),
        ("nothing but sand", "nothing but sand", []),
        ("a man with a notebook", "a man with a notebook", []),
        ("a knot, a notary and nobody", "a knot, a notary and nobody", []),
        ('"', '"', []),
        ('""', '""', []),
    ],
)
def test_what_a_sentence_does_not_want_counts_against_it(typed, wanted, unwanted):
    expected = [Term(text=wanted), *(Term(text=text, weight=-0.5) for text in unwanted)]
    assert read_sentence(typed) == terms_of(typed) == expected


def test_terms_and_what_is_left_out_are_not_read_as_sentences():
    assert terms_of([Term(text="a car without a tree")]) == [Term(text="a car without a tree")]
    assert terms_of("a car", without=["a man without a hat"])[1].text == "a man without a hat"


@given(st.text(max_size=60).filter(lambda text: text.strip()))
def test_any_sentence_can_be_read(typed):
    first, *others = read_sentence(typed)
    assert first.weight == 1 and all(term.weight == -0.5 for term in others)


def test_the_page_asks_as_the_command_line_does():
    script = (Path(vsearch.__file__).parent / "web" / "query.js").read_text(encoding="utf-8")
    found = re.findall(r"const ([A-Z_]+) = ([-\d.]+);", script)
    assert {name: float(value) for name, value in found} == {
        "AGAINST": AGAINST,
        "MIN_CONFIDENCE": MIN_CONFIDENCE,
    }


@pytest.mark.parametrize(("in_sentence", "beside"), [(9, 0), (30, 0), (5, 4), (2, 7)])
def test_a_request_cannot_ask_for_any_number_of_terms(in_sentence, beside):
    terms = [TermIn(text="fog", weight=-0.5)] * beside
    sentence = "a car" + " and no tree" * in_sentence
    with pytest.raises(UserError, match=f"at most 9 terms.*has {1 + in_sentence + beside}"):
        QueryIn(q=sentence, terms=terms).all_terms()
    fewer = sentence.removesuffix(" and no tree" * max(1, in_sentence + beside - 8))
    assert len(QueryIn(q=fewer, terms=terms).all_terms()) == 9


def test_a_query_needs_something_to_look_for():
    with pytest.raises(UserError, match="empty"):
        terms_of([Term(text="people", weight=-1)])
    with pytest.raises(UserError, match="empty"):
        terms_of("   ")
    assert described(terms_of("a street", without=["people"])) == "a street, without people (0.5)"
