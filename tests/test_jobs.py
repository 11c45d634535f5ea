"""Against a head of our own: `ray job submit` of the three jobs gives the corpus of `vsearch build`;
`serve deploy` of our config gives the service."""

import io
import json
import subprocess
import sys
import time
import urllib.request
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import pytest
import yaml
from archive import add_video
from gate import gate_before
from head import PYTHON, RAY, Head, free_ports, ray_head
from test_build_index import build

import vsearch
from vsearch.corpus import Corpus, newest_projector
from vsearch.demo.world import make_world
from vsearch.keys import add_key

pytestmark = pytest.mark.long
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with ray_head(tmp_path_factory.mktemp("r")) as head:
        yield head


def submit(head: Head, *words: str) -> subprocess.CompletedProcess[str]:
    client = [RAY, "job", "submit", "--address", head.address, "--working-dir", str(REPOSITORY)]
    for _ in range(10):
        done = subprocess.run(
            [*client, "--", *words],
            env=head.environment, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        # A young head takes jobs a little later than it answers.
        if "No available agent to submit job" not in done.stderr:
            break
        time.sleep(2)
    return done


def contents(url: str) -> set[tuple[str, int, float, bytes, bytes]]:
    corpus = Corpus(url)
    rows = set()
    for name in corpus.files("frames"):
        for table in corpus.frames(name, ["span_id", "frame", "pts_s", "dino", "clip"]):
            for row in table.to_pylist():
                vectors = (str(row["dino"]).encode(), str(row["clip"]).encode())
                rows.add((row["span_id"], row["frame"], row["pts_s"], *vectors))
    return rows


def projector(url: str) -> dict[str, Any]:
    """What the newest projector's config says, but for what depends on the clock."""
    config = newest_projector(Corpus(url))[1]
    curve = [{**epoch, "at_s": 0} for epoch in config["curve"]]
    return {**config, "curve": curve, "took_s": 0, "metrics": 0}


def test_jobs_give_the_corpus_that_the_command_gives(head, tmp_path):
    world = tmp_path / "world"
    make_world(world, seed=3, videos=2, scenes_per_video=2)
    by_job, by_command = str(tmp_path / "jobs"), str(tmp_path / "command")
    python = sys.executable
    sources = (str(world), "--models", "demo")
    jobs = [("ingest", *sources), ("train_projector",), ("build_index",)]
    packages: list[bytearray] = []
    for script, *options in jobs:
        with gate_before(head.address) as gate:
            gated = replace(head, address=gate.address)
            done = submit(gated, python, f"jobs/{script}.py", *options, "--corpus", by_job)
        packages += [request for request in gate.sent if request.startswith(b"PUT /api/packages/")]
        assert done.returncode == 0, done.stdout + done.stderr
    subprocess.run(
        [python, "-m", "vsearch.cli", "build", *sources, "--corpus", by_command],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    [package] = packages  # once
    names = zipfile.ZipFile(io.BytesIO(package.partition(b"\r\n\r\n")[2])).namelist()
    assert {"jobs", "vsearch"} == {name.partition("/")[0] for name in names if "/" in name}
    assert not [name for name in names if name.startswith("vsearch/demo/models")]
    assert contents(by_job) == contents(by_command) != set()
    assert projector(by_job) == projector(by_command)
    query = "a car"
    found, expected = (vsearch.open(url).search(query, 3) for url in (by_job, by_command))
    assert [(s.video, s.start_s) for s in found] == [(s.video, s.start_s) for s in expected]


def test_a_failing_job_says_why_and_fails(head, tmp_path):
    done = submit(head, sys.executable, "jobs/build_index.py", "--corpus", str(tmp_path / "none"))
    assert done.returncode != 0
    assert "There is no corpus at" in done.stdout + done.stderr


def test_the_service_is_deployed_from_its_config(head, tmp_path):
    corpus = Corpus(str(tmp_path / "corpus"))
    for number in range(3):
        add_video(corpus, f"v{number}")
    build(corpus)
    key = add_key(tmp_path / "keys.json", "test")
    config = yaml.safe_load((REPOSITORY / "cluster" / "serve.yaml").read_text())
    [port] = free_ports(1)
    config["http_options"]["port"] = port
    [application] = config["applications"]
    application["args"] |= {"corpus": corpus.url, "keys": str(tmp_path / "keys.json")}
    [gateway] = application["deployments"]
    gateway["autoscaling_config"] |= {
        "min_replicas": 1,
        "initial_replicas": 1,
    }  # here are two cores
    gateway["ray_actor_options"] = {"num_cpus": 1}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))

    def serve(*words: str) -> None:
        done = subprocess.run(
            [str(PYTHON / "serve"), *words, "--address", head.address],
            env=head.environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def get(path: str, headers: dict[str, str]) -> bytes:
        asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.read()

    serve("deploy", str(file))
    try:
        for _ in range(120):
            with suppress(URLError, OSError):
                get("/readyz", {})
                break
            time.sleep(1)
        found = json.loads(get("/v1/search?q=a+boat&limit=3", {"Authorization": f"Bearer {key}"}))
        expected = vsearch.open(corpus.url).search("a boat", 3)
        assert found["segments"] == [
            segment.to_dict() | {"score": pytest.approx(segment.score, abs=1e-5)}
            for segment in expected
        ]
        assert len(expected) == 3
        with pytest.raises(HTTPError, match="401"):
            get("/v1/search?q=a+boat", {})
    finally:
        serve("shutdown", "-y")
