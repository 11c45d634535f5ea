"""What an engine tells of a video beyond answers: its moments, its pictures, a query's vector; and how
answers show themselves in a notebook. Without Ray: one space of a small corpus, indexed in a folder.
"""

import base64
import html
import io
import re
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from archive import add_video, config, vectors_of
from PIL import Image

from vsearch.clips import picture
from vsearch.config import UserError
from vsearch.corpus import Corpus
from vsearch.demo.world import make_world, world_beside
from vsearch.query import Term, terms_of
from vsearch.search import Engine
from vsearch.spaces import Comparison

FRAMES = 120
ZERO_S = 0.5
"""A player's time 0 in the video `shown`."""


@pytest.fixture(scope="module")
def engine(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """`shown` is a real file whose clock begins late, and has a cut after 6 s; `lost` is gone."""
    corpus = Corpus(str(tmp_path_factory.mktemp("corpus")))
    corpus.require(config())
    seen = np.zeros((FRAMES, 8), np.float16)
    seen[:60, 0] = seen[60:, 1] = 1
    uri = str(sorted(world.glob("*.mp4"))[0])
    add_video(corpus, "shown", FRAMES, dino=seen, uri=uri, zero_s=ZERO_S, duration_s=12.0)
    add_video(corpus, "lost", FRAMES)
    with Comparison(corpus.url).engine("clip") as engine:
        yield engine


def test_moments_of_a_video_cover_its_frames_in_order(engine: Engine) -> None:
    found = engine.moments("shown")
    assert found is not None
    assert found.frames.sum() == FRAMES
    np.testing.assert_allclose(found.start_s, [0 - ZERO_S, *found.end_s[:-1]])
    # The first frame of each moment, counted, tells when it begins.
    firsts = np.cumsum(found.frames) - found.frames
    np.testing.assert_allclose(found.start_s, firsts / 10 - ZERO_S)
    np.testing.assert_array_equal(found.shots, (firsts >= 60).astype(int))
    stored = vectors_of("shown1", FRAMES).astype(np.float64)
    means = np.stack(
        [stored[a : a + n].mean(axis=0) for a, n in zip(firsts, found.frames, strict=True)]
    )
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(found.vectors, means, atol=2e-3)
    assert engine.moments("other") is None


def test_the_vector_of_a_query_finds_what_the_query_finds(engine: Engine) -> None:
    for query in ("a red car", "a car without snow", [Term(video_id="shown", at_s=2.0)]):
        found = engine.search(query, limit=3)
        assert engine.search_vector(engine.vector(query), 3) == [
            type(s)(**s.to_dict() | {"confidence": None}) for s in found
        ]
    plain, away = (engine.encoder.encode_text([text])[0] for text in ("a car", "snow"))
    vector = engine.vector("a car without snow")
    assert vector @ plain > 0 > vector @ away - plain @ away
    with pytest.raises(UserError, match="empty"):
        engine.vector(terms_of("a car")[:0])


def test_pictures_and_cuts_are_at_a_players_times(engine: Engine, tmp_path: Path) -> None:
    with open(engine.videos[engine.numbers["shown"]]["uri"], "rb") as file:
        assert engine.picture("shown", 2.0, 48) == picture(file, 2.0 + ZERO_S, 48)
    assert max(Image.open(io.BytesIO(engine.picture("shown", 2.0, 48))).size) <= 48
    with pytest.raises(UserError, match="no video other"):
        engine.picture("other", 0.0)
    segment = next(s for s in engine.search("a car", limit=20) if s.video_id == "shown")
    done = engine.cut(segment, tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as file:
        length_s = float(file.duration / av.time_base)
    assert length_s == pytest.approx(segment.end_s - segment.start_s + done.early_s, abs=0.1)


def test_answers_show_themselves_with_pictures(engine: Engine) -> None:
    results = engine.search('"<b> & a car"', limit=20)
    shown = results._repr_html_()
    assert html.escape(results.query) in shown and "<b> & a car" not in shown
    figures = re.findall("<figure.*?</figure>", shown)
    assert len(figures) == len(results) > 1
    assert {segment.video_id for segment in results} == {"shown", "lost"}
    for figure, segment in zip(figures, results, strict=True):
        assert f"confidence {segment.confidence:.2f}" in figure
        if segment.video_id == "lost":
            assert "no picture" in figure and "<img" not in figure
        else:
            (data,) = re.findall('src="data:image/jpeg;base64,([^"]*)"', figure)
            assert base64.b64decode(data) == engine.picture("shown", segment.best_s)


def test_a_world_lies_beside_its_corpus_once(tmp_path: Path) -> None:
    folder = world_beside(str(tmp_path), seed=3, videos=2)
    again = tmp_path / "again"
    make_world(again, seed=3, videos=2)
    assert (folder / "truth.jsonl").read_bytes() == (again / "truth.jsonl").read_bytes()
    again.rename(tmp_path.parent / f"{tmp_path.name}-again")
    before = (folder / "shots.jsonl").stat().st_mtime_ns
    assert world_beside(str(tmp_path), seed=3, videos=2) == folder == tmp_path / "world-3-2"
    assert (folder / "shots.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds another world"):
        world_beside(str(tmp_path), seed=4, videos=2)
