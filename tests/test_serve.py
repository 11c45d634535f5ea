"""The service on Ray Serve, its index in parts: answers, a part that is killed, snapshots, metrics."""

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlencode

import psutil
import pytest
from archive import add_video
from head import free_ports
from test_build_index import build

import vsearch
from vsearch.config import UserError
from vsearch.corpus import Corpus
from vsearch.serve import ROWS_A_PART, ServeArgs, parts_for, start, stop
from vsearch.snapshots import Snapshots

TEXTS = ["a boat", "a red house at night", "rain"]
PATIENCE_S = 90.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """A corpus of six shards with two snapshots."""
    corpus = Corpus(str(tmp_path_factory.mktemp("corpus")))
    for number in range(12):
        add_video(corpus, f"v{number}")
    versions = [
        build(corpus, rows=rows, shard_frames=800).snapshot for rows in ("frames", "moments")
    ]
    return corpus.url, versions


@pytest.fixture(scope="module")
def address(corpus: tuple[str, list[str]]) -> Iterator[str]:
    from ray import serve

    (port,) = free_ports(1)
    yield start(ServeArgs(corpus=corpus[0], parts=3, refresh_s=0.5), port=port)
    stop()
    serve.shutdown()


def ask(address: str, text: str, limit: int = 8) -> dict[str, Any]:
    with urllib.request.urlopen(
        f"{address}v1/search?{urlencode({'q': text, 'limit': limit})}", timeout=30
    ) as answer:
        assert answer.headers["x-request-id"]
        found: dict[str, Any] = json.loads(answer.read())
        return found


def until(there: Callable[[], bool]) -> float:
    began = time.monotonic()
    while not there():
        assert time.monotonic() - began < PATIENCE_S
        time.sleep(0.2)
    return time.monotonic() - began


def expected(url: str, snapshot: str, text: str) -> Any:
    return vsearch.open(url, snapshot).search(text, limit=8).to_dict()["segments"]


def same(found: list[Any], wanted: list[Any]) -> bool:
    """Scores of sentences that were encoded together differ in their last digits."""
    pairs = list(zip(found, wanted, strict=True))
    return all(
        a | {"score": 0, "confidence": 0} == b | {"score": 0, "confidence": 0}
        and abs(a["score"] - b["score"]) < 1e-5
        and abs(a["confidence"] - b["confidence"]) < 1e-3
        for a, b in pairs
    )


@pytest.mark.long
def test_parts_answer_as_the_engine_and_follow_the_snapshot_in_use(
    address: str, corpus: tuple[str, list[str]]
) -> None:
    url, (first, second) = corpus
    for snapshot in (second, first, second):
        if Snapshots(Corpus(url)).current != snapshot:
            Snapshots(Corpus(url)).roll_back(snapshot)
        until(lambda: ask(address, "a boat")["snapshot"] == snapshot)  # noqa: B023
        for text in TEXTS:
            answer = ask(address, text)
            assert not answer["partial"] and answer["snapshot"] == snapshot
            assert same(answer["segments"], expected(url, snapshot, text))


@pytest.mark.long
def test_a_part_that_is_killed_is_named_at_once_and_comes_back(
    address: str, corpus: tuple[str, list[str]]
) -> None:
    whole = ask(address, "a boat", 100)["segments"]
    below = psutil.Process().children(recursive=True)
    (part,) = (process for process in below if "IndexPart-1" in " ".join(process.cmdline()))
    part.kill()
    began = time.monotonic()
    answer = ask(address, "a boat")
    assert time.monotonic() - began < 5
    assert answer["partial"] and answer["missing"][0].startswith("part 2 of 3 ")
    assert len(answer["segments"]) == 8 and all(s in whole for s in answer["segments"])
    until(lambda: not ask(address, "a boat")["partial"])
    assert ask(address, "a boat", 100)["segments"] == whole


@pytest.mark.long
def test_metrics_can_be_scraped(address: str) -> None:
    import ray

    ask(address, "a boat")
    node = ray.nodes()[0]
    scraped = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def text() -> str:
        with urllib.request.urlopen(scraped, timeout=10) as answer:
            return str(answer.read().decode())

    names = ["queries", "step_seconds_bucket", "query_seconds", "text_cache", "rows", "shards"]
    wanted = {f"ray_vsearch_{name}" for name in [*names, "snapshot_published"]}
    # Each is exported some seconds after it was recorded for the first time.
    until(lambda: all(name in found for found in [text()] for name in wanted))


def test_an_index_gets_parts_by_its_rows() -> None:
    assert [parts_for(rows) for rows in (0, 1, ROWS_A_PART, ROWS_A_PART + 1)] == [1, 1, 1, 2]
    assert parts_for(10 * ROWS_A_PART) == 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "lets others in"),
        (["--keys", "a.json", "--no-auth"], "contradict"),
        (["--host", "0.0.0.0", "--keys", "none.json"], "cannot be read"),
    ],
)
def test_a_service_that_would_be_open_is_refused(
    options: list[str], said: str, corpus: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from vsearch.cli import app

    done = CliRunner().invoke(app, ["serve", "--corpus", corpus[0], *options])
    assert isinstance(done.exception, UserError) and said in str(done.exception)
