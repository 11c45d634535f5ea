"""Confidence in a made-up space whose sentences, pictures and truth are known."""

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vsearch.confidence import Calibration, Scale, general, made_up, own_share
from vsearch.config import MIN_CONFIDENCE
from vsearch.query import Term, compose
from vsearch.scoring import auroc

DIM, TOPICS, THERE = 96, 300, 40
Vectors = NDArray[np.float32]


def unit(vectors: NDArray[np.float64]) -> Vectors:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


class Space:
    """Topics, of which the first `THERE` are seen in rows; a direction that all sentences share, and
    rows that show hardly anything else. A sentence is about one topic, or about none.
    """

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.topics = unit(self.rng.standard_normal((TOPICS, DIM))).astype(np.float64)
        self.shared = unit(self.rng.standard_normal(DIM)).astype(np.float64)
        self.rows = np.concatenate([self.seen(np.arange(THERE).repeat(4)), self.bare(20)])

    def seen(self, topics: NDArray[np.int64]) -> Vectors:
        noise = 0.06 * self.rng.standard_normal((len(topics), DIM))
        return unit(self.topics[topics] + 0.3 * self.shared + noise)

    def bare(self, count: int) -> Vectors:
        return unit(self.shared + 0.03 * self.rng.standard_normal((count, DIM)))

    def sentences(self, topics: NDArray[np.int64]) -> Vectors:
        shares = self.rng.uniform(0.3, 0.8, (len(topics), 1))
        return unit(self.topics[topics] + shares * self.shared)

    def empty_sentences(self, count: int) -> Vectors:
        return unit(self.shared + 0.05 * self.rng.standard_normal((count, DIM)))

    def calibration(self, rows: Vectors) -> Calibration:
        """As a build does: the bank speaks of any topic, each of the made-up sentences of two."""
        about = self.rng.integers(TOPICS, size=(2, 240))
        bank = self.sentences(about[0])
        shares = self.rng.uniform(0.3, 0.8, (240, 1))
        asked = unit(self.topics[about[0]] + self.topics[about[1]] + shares * self.shared)
        direction = general(bank)
        best = (asked @ rows.T).max(axis=1)
        return Calibration.of(direction, own_share(asked, direction), best)


def single(calibration: Calibration, vector: Vectors) -> Scale:
    scale = calibration.scale([Term(text="a sentence")], [vector], [1.0], [0.0])
    assert scale
    return scale


def confidences(calibration: Calibration, rows: Vectors, asked: Vectors) -> NDArray[np.float64]:
    """That of the best row for each sentence."""
    scales = [single(calibration, vector) for vector in asked]
    best = (asked @ rows.T).max(axis=1)
    return np.array([s.confidence(v) for s, v in zip(scales, best.tolist(), strict=True)])


@pytest.mark.parametrize("seed", range(3))
def test_it_tells_what_is_there_from_what_is_not(seed: int) -> None:
    space = Space(seed)
    there = space.sentences(np.arange(THERE))
    absent = space.sentences(np.arange(THERE, TOPICS))
    empty = space.empty_sentences(60)
    asked = np.concatenate([there, absent, empty])
    positive = np.arange(len(asked)) < THERE
    told = confidences(space.calibration(space.rows), space.rows, asked)
    once = np.ones(len(asked))
    assert auroc(told, positive, once) >= 0.95
    assert auroc((asked @ space.rows.T).max(axis=1), positive, once) < 0.9  # the cosine alone
    assert (told[positive] >= MIN_CONFIDENCE).mean() >= 0.8
    assert (told[~positive] >= MIN_CONFIDENCE).mean() <= 0.05


def test_unrelated_videos_hardly_change_it() -> None:
    space = Space()
    asked = space.sentences(np.arange(THERE))
    other = unit(space.rng.standard_normal((len(space.rows), DIM)) + space.shared)
    more = np.concatenate([space.rows, other])
    space.rng = np.random.default_rng(1)
    before = confidences(space.calibration(space.rows), space.rows, asked)
    space.rng = np.random.default_rng(1)
    after = confidences(space.calibration(more), more, asked)
    assert np.abs(after - before).max() < 0.05


def test_it_is_the_share_of_made_up_sentences_that_score_less() -> None:
    """If these are normally distributed, as the figures of docs/evaluate.md are about."""
    values = np.random.default_rng(0).normal(0.4, 0.07, 20_000)
    calibration = Calibration.of(np.zeros(4, np.float32), [1.0] * len(values), values.tolist())
    scale = single(calibration, unit(np.ones(4)))
    for score in (0.3, 0.4, 0.45, 0.55):
        assert scale.confidence(score) == pytest.approx((values < score).mean(), abs=0.01)


@given(st.integers(0, 500), st.lists(st.floats(-1, 1), min_size=2, max_size=9))
def test_within_a_query_it_rises_with_the_score(seed: int, scores: list[float]) -> None:
    space = Space(seed % 5)
    vectors = list(space.sentences(np.array([seed % TOPICS, 7])))
    terms = [Term(text="a"), Term(text="b", weight=-0.5)]
    calibration = space.calibration(space.rows)
    composed = calibration.scale(terms, vectors, [0.2, 0.3], [0.1, 0.2])
    for scale in (single(calibration, vectors[0]), composed):
        assert scale and scale.slope > 0
        told = [scale.confidence(score) for score in sorted(scores)]
        assert told == sorted(told) and 0 <= told[0] <= told[-1] <= 1


def test_a_composed_query_is_as_sure_as_what_it_looks_for() -> None:
    """On a row where what it does not want scores as it does on average."""
    space = Space()
    calibration = space.calibration(space.rows)
    wanted, unwanted = space.sentences(np.array([3, 50]))
    scores = space.rows @ np.stack([wanted, unwanted]).T
    spreads, means = scores.std(axis=0).tolist(), scores.mean(axis=0).tolist()
    terms = [Term(text="a"), Term(text="b", weight=-0.5)]
    scale = calibration.scale(terms, [wanted, unwanted], spreads, means)
    vector = compose([wanted, unwanted], [1, -0.5], spreads)
    usual = int(np.argmin(np.abs(scores[: 4 * THERE, 1] - means[1])))
    alone = single(calibration, wanted).confidence(float(scores[usual, 0]))
    assert scale
    told = scale.confidence(float(space.rows[usual] @ vector))
    assert told == pytest.approx(alone, abs=0.02)
    same = calibration.scale([Term(text="a")] * 2, [wanted, wanted], spreads[:1] * 2, means[:1] * 2)
    assert same and same.confidence(0.5) == pytest.approx(
        single(calibration, wanted).confidence(0.5)
    )


def test_pictures_have_no_confidence() -> None:
    space = Space()
    calibration = space.calibration(space.rows)
    vectors = list(space.sentences(np.array([3, 50])))
    moment = Term(video_id="v", at_s=1.0)
    assert calibration.scale([moment], vectors[:1], [1.0], [0.0]) is None
    assert calibration.scale([Term(text="a"), moment], vectors, [1.0] * 2, [0.0] * 2) is None
    against = [Term(text="a"), Term(video_id="v", at_s=1.0, weight=-1)]
    assert calibration.scale(against, vectors, [1.0] * 2, [0.0] * 2) is not None


def test_made_up_sentences_speak_of_two_things() -> None:
    bank = [f"thing {n}" for n in range(9)]
    found = made_up(bank)
    assert len(set(found)) == len(bank)
    parts = [text.split(", ") for text in found]
    assert [first for first, _ in parts] == bank and {other for _, other in parts} == set(bank)
    assert all(first != other for first, other in parts)
    assert made_up(["alone"]) == ["alone, alone"]


def test_it_is_kept_as_json() -> None:
    calibration = Space().calibration(Space().rows)
    same = Calibration.from_json(calibration.as_json())
    assert same.mean == pytest.approx(calibration.mean, abs=1e-6)
    assert same.deviation == pytest.approx(calibration.deviation, abs=1e-6)
    assert np.allclose(same.general, calibration.general, atol=1e-6)
    assert statistics.fmean((same.general.astype(float) ** 2).tolist()) * DIM == pytest.approx(
        1, abs=1e-4
    )
