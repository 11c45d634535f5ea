"""What tells how a projector fares on new footage, on vectors whose law is known."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from records import CONFIG, span
from rich.text import Text

from vsearch import drift
from vsearch.config import UserError
from vsearch.corpus import Corpus
from vsearch.projector import Projector
from vsearch.schema import frames_schema
from vsearch.show import drift_line
from vsearch.train import train
from vsearch.verify import verify

DINO, CLIP = CONFIG.dino.dim, CONFIG.clip.dim
FRAMES = 60
VERSION = "20260101T000000-abcdef"


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    corpus = Corpus(str(tmp_path))
    corpus.require(CONFIG)
    return corpus


def footage(corpus: Corpus, name: str, centre: float, pairs: bool = True, seed: int = 0) -> str:
    """A frames file of a video whose DINO vectors lie around `centre`. CLIP's are their absolute values
    two by two: what is linear on one side of zero is not the same on the other.
    """
    dino = np.random.default_rng(seed).normal(centre, 1.0, (FRAMES, DINO)).astype(np.float16)
    clip = np.abs(dino[:, :CLIP]) + np.abs(dino[:, CLIP:])
    clip = clip / np.linalg.norm(clip, axis=1, keepdims=True)
    record = span(0, name, frames=FRAMES, embedded=FRAMES, ended=True, pairs=pairs)
    rows = [
        {
            "video_id": name,
            "span_id": record.span_id,
            "span": 0,
            "frame": i,
            "pts_s": i / 10,
            "dino": list(dino[i]),
            "clip": list(clip[i].astype(np.float16)) if pairs else None,
        }
        for i in range(FRAMES)
    ]
    return corpus.add_frames(pa.Table.from_pylist(rows, schema=frames_schema(DINO, CLIP)), [record])


def store_projector(corpus: Corpus, centre: float = 3.0) -> Projector:
    """A projector that fits footage around `centre` exactly, in the layout of former versions."""
    torch.manual_seed(0)
    projector = Projector(DINO, CLIP, hidden=8)
    projector.standardise_by(torch.full((DINO,), centre), torch.ones(DINO))
    # GELU(x + 30) is x + 30 all around here, so the net computes x₁ + x₃ and x₂ + x₄.
    first, last = projector.net[0], projector.net[2]
    with torch.no_grad():
        first.weight.zero_(), last.weight.zero_()
        first.bias.fill_(30.0)
        for i in range(DINO):
            first.weight[i, i] = 1.0
            last.weight[i % CLIP, i] = 1.0
        last.bias.fill_(2 * centre - 2 * 30.0)
    weights, sizes = projector.to_bytes()
    record = json.loads(sizes) | {
        "trained_on": "0123456789abcdef",
        "training": {"hidden": 8},
        "metrics": {"cosine": 0.999, "recall@1": 0.5, "train_pairs": 100},
    }
    corpus.write(f"projector/{VERSION}/model.safetensors", weights)
    corpus.write(f"projector/{VERSION}/config.json", json.dumps(record).encode())
    return projector


def test_drift_is_that_of_a_straight_computation(corpus):
    projector = store_projector(corpus)
    files = [footage(corpus, "a", 3.5, seed=1), footage(corpus, "b", 2.0, seed=2)]
    found = drift.measure(corpus, files, 2 * FRAMES)
    tables = [next(corpus.frames(name)) for name in files]
    dino, clip = (
        np.concatenate([np.stack(t[c].to_numpy(zero_copy_only=False)) for t in tables])
        for c in ("dino", "clip")
    )
    out = ((dino.astype(np.float64) - 3.0) ** 2).mean()
    projected = projector(torch.from_numpy(dino).float()).detach()
    cosine = F.cosine_similarity(projected, torch.from_numpy(clip).float()).mean()
    assert found.frames == 2 * FRAMES
    assert found.distance == pytest.approx(np.sqrt(out), rel=1e-3)
    assert found.cosine == pytest.approx(float(cosine), abs=1e-4)
    assert drift.recorded(corpus, VERSION) == found


def test_more_of_the_same_is_no_drift_and_other_footage_is(corpus):
    store_projector(corpus)
    for number in range(3):
        drift.measure(corpus, [footage(corpus, f"same{number}", 3.0, seed=number)], FRAMES)
    same = drift.told(corpus)
    assert same["new_frames"] == 3 * FRAMES and not same["training_due"]
    assert same["new_cosine"] > 0.998 and same["new_distance"] == pytest.approx(1.0, abs=0.1)
    assert "due" not in drift_line(same)

    # On the other side of zero the law is another one, and more of it counts more.
    figures = [same]
    for number in range(2):
        drift.measure(corpus, [footage(corpus, f"other{number}", -3.0, seed=number)], FRAMES)
        figures.append(drift.told(corpus))
    assert figures[0]["new_cosine"] > figures[1]["new_cosine"] > figures[2]["new_cosine"]
    assert figures[0]["new_distance"] < figures[1]["new_distance"] < figures[2]["new_distance"]
    assert figures[2]["training_due"]
    line = Text.from_markup(drift_line(figures[2])).plain
    assert "A training is due" in line and "vsearch train" in line


def test_an_ingest_counts_by_its_frames_and_only_the_latest_do(corpus, monkeypatch):
    store_projector(corpus)
    same, other = footage(corpus, "same", 3.0), footage(corpus, "other", -3.0)
    near = drift.measure(corpus, [same], 3000)
    far = drift.measure(corpus, [other], 1000)
    both = drift.recorded(corpus, VERSION)
    assert both.frames == 4000
    assert both.cosine == pytest.approx(0.75 * near.cosine + 0.25 * far.cosine)
    assert both.distance == pytest.approx(0.75 * near.distance + 0.25 * far.distance)
    monkeypatch.setattr(drift, "LATEST", 1)
    assert drift.recorded(corpus, VERSION) == far


def test_footage_that_clip_did_not_see_has_a_distance_alone(corpus):
    store_projector(corpus)
    found = drift.measure(corpus, [footage(corpus, "a", 9.0, pairs=False)], FRAMES)
    assert found.cosine is None and found.distance == pytest.approx(np.sqrt(37), rel=0.05)
    told = drift.told(corpus)
    assert told["new_cosine"] is None and not told["training_due"]
    assert "times as far" in drift_line(told)
    drift.measure(corpus, [footage(corpus, "b", 3.0)], FRAMES)
    assert drift.told(corpus)["new_cosine"] > 0.998


def test_of_a_large_ingest_a_part_is_read(corpus, monkeypatch):
    store_projector(corpus)
    monkeypatch.setattr(drift, "SAMPLED_FRAMES", 20)
    files = [footage(corpus, "a", 3.0, seed=1), footage(corpus, "b", 3.0, seed=2)]
    monkeypatch.setattr(drift, "vector_matrix", counted := Counted(drift.vector_matrix))
    assert drift.measure(corpus, files, 2 * FRAMES).distance == pytest.approx(1.0, abs=0.2)
    assert max(counted.rows) == 10


class Counted:
    """A function that remembers how many rows each of its results has."""

    def __init__(self, function):
        self._function, self.rows = function, []

    def __call__(self, column):
        found = self._function(column)
        self.rows.append(len(found))
        return found


@pytest.mark.parametrize("text", [b"", b'{"frames": 1', b'{"frames": 1}', b"[]", b"3"])
def test_damaged_figures_are_named(corpus, text):
    store_projector(corpus)
    drift.measure(corpus, [footage(corpus, "a", 3.0)], FRAMES)
    (good,) = corpus.files(f"drift/{VERSION}", ".json")
    assert verify(corpus.url).checked["drift"] == 1 and not verify(corpus.url).damaged
    damaged = good.replace(".json", "x.json")
    corpus.write(damaged, text)
    assert [name for name, _ in verify(corpus.url).damaged] == [damaged]
    with pytest.raises(UserError, match=f"{damaged} .*is damaged"):
        drift.told(corpus)


def test_without_a_projector_or_files_nothing_is_recorded(corpus):
    name = footage(corpus, "a", 3.0)
    assert drift.measure(corpus, [name], FRAMES) is None and drift.told(corpus) is None
    store_projector(corpus)
    assert drift.measure(corpus, [], 0) is None
    assert drift.measure(corpus, ["frames/settled.parquet"], FRAMES) is None
    empty = corpus.add_frames(frames_schema(DINO, CLIP).empty_table(), [span(0, "b", frames=0)])
    assert drift.measure(corpus, [empty], 0) is None
    told = drift.told(corpus)
    assert told["new_frames"] == 0 and not told["training_due"]
    assert "nothing was ingested since" in drift_line(told)


def test_fine_tuning_needs_videos_that_it_may_learn_from(corpus):
    footage(corpus, "a", 3.0)
    store_projector(corpus)
    frames = next(corpus.frames(corpus.files("frames")[0], ["video_id", "dino", "clip"]))
    corpus.write_table(f"projector/{VERSION}/validation.parquet", frames)
    with pytest.raises(UserError, match=r"none to learn from.*without --from-newest"):
        train(corpus.url, from_newest=True)


def test_a_projector_of_a_former_version_is_no_start_for_fine_tuning(corpus):
    footage(corpus, "a", 3.0)
    with pytest.raises(UserError, match="no projector to start from"):
        train(corpus.url, from_newest=True)
    store_projector(corpus)
    with pytest.raises(UserError, match=r"keeps no validation pairs.*without --from-newest"):
        train(corpus.url, from_newest=True)
