"""Composed queries: what their one vector ranks, against standard scores taken one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsearch.config import UserError
from vsearch.query import Term, compose, described, terms_of


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


def test_a_query_needs_something_to_look_for():
    with pytest.raises(UserError, match="empty"):
        terms_of([Term(text="people", weight=-1)])
    with pytest.raises(UserError, match="empty"):
        terms_of("   ")
    assert described(terms_of("a street", without=["people"])) == "a street, without people (0.5)"
