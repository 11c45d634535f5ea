"""Training that starts from the newest projector, on vectors whose law is known."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import torch.nn.functional as F
from ray.exceptions import ActorUnavailableError
from ray.train import ControllerError
from ray.util.placement_group import placement_group_table
from records import span

import vsearch.train
from vsearch import runtime
from vsearch.config import CorpusConfig, Encoder, TrainConfig
from vsearch.corpus import Corpus, newest_projector
from vsearch.projector import load_projector
from vsearch.schema import frames_schema
from vsearch.train import FINE_TUNING, NotBetterError, split_videos, train
from vsearch.verify import verify

DINO, CLIP, FRAMES = 12, 8, 40
CONFIG = CorpusConfig(Encoder("dino-small", "d1", DINO), Encoder("clip-small", "c1", CLIP), 64)
SMALL = TrainConfig(hidden=64, max_epochs=40, batch_size=64)
TUNING = replace(FINE_TUNING, max_epochs=40, batch_size=64)


def vectors(name: str, centre: float, sign: float) -> tuple[np.ndarray, np.ndarray]:
    """DINO vectors around `centre`, and CLIP's: a fixed map of them, times `sign`."""
    law = np.random.default_rng(0).normal(size=(DINO, CLIP))
    rng = np.random.default_rng(int.from_bytes(name.encode()[:8].ljust(8)))
    dino = (centre + rng.normal(size=(FRAMES, DINO))).astype(np.float16)
    clip = sign * np.tanh(dino @ law)
    return dino, (clip / np.linalg.norm(clip, axis=1, keepdims=True)).astype(np.float16)


def add_footage(corpus: Corpus, names: list[str], centre: float, sign: float = 1.0) -> None:
    rows, records = [], []
    for name in names:
        records.append(span(0, name, frames=FRAMES, embedded=FRAMES, ended=True))
        for i, (dino, clip) in enumerate(zip(*vectors(name, centre, sign), strict=True)):
            rows.append(
                {"video_id": name, "span_id": f"{name}-0", "span": 0, "frame": i, "pts_s": i / 25}
                | {"dino": list(dino), "clip": list(clip)}
            )
    corpus.add_frames(pa.Table.from_pylist(rows, schema=frames_schema(DINO, CLIP)), records)


def cosine(corpus: Corpus, version: str, x: np.ndarray, y: np.ndarray) -> float:
    with torch.inference_mode():
        projected = load_projector(corpus, version)(torch.from_numpy(x).float())
    return float(F.cosine_similarity(projected, torch.from_numpy(y).float()).mean())


def kept(corpus: Corpus, version: str) -> pa.Table:
    return pq.read_table(corpus.local_path(f"projector/{version}/validation.parquet"))


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    return np.stack(column.to_numpy(zero_copy_only=False))


def versions(corpus: Corpus) -> list[str]:
    return [name for name in corpus.folders("projector") if not name.startswith(".")]


@pytest.mark.long
def test_fine_tuning_learns_what_is_new_and_publishes_nothing_that_forgot(tmp_path):
    corpus = Corpus(str(tmp_path))
    corpus.require(CONFIG)
    old = [f"old{i:02d}" for i in range(30)]
    add_footage(corpus, old, centre=0.0)
    first = train(corpus.url, SMALL)
    table = kept(corpus, first.version)
    held_out = split_videos(old, SMALL.validation)
    assert set(table["video_id"].to_pylist()) == held_out
    for name in held_out:  # the very pairs that were stored
        mine = table.filter(pa.array([v == name for v in table["video_id"].to_pylist()]))
        dino, clip = vectors(name, 0.0, 1.0)
        np.testing.assert_array_equal(matrix(mine["dino"]), dino)
        np.testing.assert_array_equal(matrix(mine["clip"]), clip)
    assert not verify(corpus.url).damaged

    # Other footage under the same law.
    new = [f"fresh{i:02d}" for i in range(30)]
    add_footage(corpus, new, centre=1.5)
    second = train(corpus.url, TUNING, from_newest=True)
    assert second.new and second.version != first.version
    unseen = split_videos(old + new, SMALL.validation) - held_out
    assert unseen and unseen < set(new)
    metrics, config = second.metrics, newest_projector(corpus)[1]
    assert (config["from"], config["hidden"]) == (first.version, 64)
    x, y = matrix(table["dino"]), matrix(table["clip"])
    for when, version in (("before", first.version), ("after", second.version)):
        assert metrics[f"old_{when}"] == pytest.approx(cosine(corpus, version, x, y), abs=1e-3)
        pairs = [
            np.concatenate(part)
            for part in zip(*(vectors(n, 1.5, 1.0) for n in unseen), strict=True)
        ]
        assert metrics[f"new_{when}"] == pytest.approx(cosine(corpus, version, *pairs), abs=1e-3)
    assert metrics["new_after"] > metrics["new_before"] + 0.01
    assert metrics["old_after"] >= metrics["old_before"] - 0.01
    assert set(kept(corpus, second.version)["video_id"].to_pylist()) == held_out | unseen
    assert metrics["train_pairs"] == FRAMES * (len(old + new) - len(held_out | unseen))

    # It counts as trained on these pairs, however it is asked for.
    assert train(corpus.url, from_newest=True) == train(corpus.url, SMALL) == second_again(second)

    # Footage that contradicts the rest: what learns it forgets.
    add_footage(corpus, [f"odd{i:03d}" for i in range(150)], centre=0.0, sign=-1.0)
    before = versions(corpus)
    with pytest.raises(NotBetterError, match=f"{second.version} stays in use") as caught:
        train(corpus.url, TUNING, from_newest=True)
    assert caught.value.exit_code == 3
    assert versions(corpus) == before == sorted([first.version, second.version])
    assert newest_projector(corpus)[0] == second.version


def second_again(summary):
    """The summary of a training that found its projector there already."""
    return type(summary)(summary.version, False, summary.metrics)


def test_a_controller_that_dies_while_its_workers_start_leaves_nothing_reserved(tmp_path):
    """The placement group that it leaves behind holds all cores: nothing could go on beside it."""
    corpus = Corpus(str(tmp_path))
    corpus.require(CONFIG)
    add_footage(corpus, [f"old{i:02d}" for i in range(30)], centre=0.0)
    runtime.connect()
    before = set(placement_group_table())
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train, corpus.url, SMALL)
        while not (groups := set(placement_group_table()) - before):
            assert not training.done()
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if process.cmdline()[0].startswith(("ray::_fit", "ray::TrainController")):
                    process.kill()
        assert training.result(timeout=300).new
    states = {name: group["state"] for name, group in placement_group_table().items()}
    assert all(states[name] == "REMOVED" for name in groups)


@ray.remote
def fail(failure):
    raise ControllerError(failure)  # as Ray's controller does


class FailsFirst:
    """In place of the task that trains: fails the first time."""

    def __init__(self, failure, task):
        self.failure, self.task, self.calls = failure, task, 0

    def remote(self, training):
        self.calls += 1
        return fail.remote(self.failure) if self.calls == 1 else self.task.remote(training)


@pytest.mark.long
def test_a_training_goes_on_when_a_worker_goes_while_it_starts(tmp_path, monkeypatch):
    """Ray's controller ends with it, unlike with one that goes later."""
    corpus = Corpus(str(tmp_path))
    corpus.require(CONFIG)
    add_footage(corpus, [f"old{i:02d}" for i in range(30)], centre=0.0)
    task = vsearch.train._fit
    first = FailsFirst(ActorUnavailableError("its node is not there", b"1" * 16), task)
    monkeypatch.setattr("vsearch.train._fit", first)
    assert train(corpus.url, SMALL).new and first.calls == 2
    other = FailsFirst(ValueError("something else"), task)
    monkeypatch.setattr("vsearch.train._fit", other)
    with pytest.raises(ControllerError, match="something else"):
        train(corpus.url, replace(SMALL, max_epochs=41))
    assert other.calls == 1
