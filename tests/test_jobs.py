"""`ray job submit` of the three jobs, against a head of our own, gives the corpus that the commands
give."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vsearch
from vsearch.corpus import Corpus, newest_projector
from vsearch.demo.world import make_world

pytestmark = pytest.mark.long
REPOSITORY = Path(__file__).parent.parent
RAY = str(Path(sys.executable).parent / "ray")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A Ray head in a process group of its own; its environment for clients is the value."""
    gcs, dashboard, client, agent = free_ports(4)
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS",)},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a-token-for-this-test-only-0123456789",
    }
    words = [RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2"]
    words += [
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}",
    ]
    words += [f"--dashboard-agent-listen-port={agent}"]  # another Ray may hold the usual one
    words += [f"--temp-dir={tmp_path_factory.mktemp('r')}", "--include-dashboard=true"]
    log = (tmp_path_factory.mktemp("head") / "log").open("w+")
    process = subprocess.Popen(
        words, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        for _ in range(120):
            listed = subprocess.run(
                [RAY, "job", "list", "--address", address],
                env=environment, capture_output=True, text=True,
            )  # fmt: skip
            if listed.returncode == 0:
                break
            assert process.poll() is None, Path(log.name).read_text()
            time.sleep(1)
        else:
            pytest.fail(f"the head did not come up: {listed.stderr}{Path(log.name).read_text()}")
        yield address, environment
    finally:
        process.terminate()
        process.wait(60)


def submit(head, *words: str) -> subprocess.CompletedProcess[str]:
    address, environment = head
    for _ in range(10):
        done = subprocess.run(
            [RAY, "job", "submit", "--address", address, "--working-dir", str(REPOSITORY), "--", *words],
            env=environment, capture_output=True, text=True, timeout=400,
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


def test_jobs_give_the_corpus_that_the_commands_give(head, tmp_path):
    world = tmp_path / "world"
    make_world(world, seed=3, videos=2, scenes_per_video=2)
    by_job, by_command = str(tmp_path / "jobs"), str(tmp_path / "commands")
    python = sys.executable
    jobs = [
        ("jobs/ingest.py", str(world), "--models", "demo"),
        ("jobs/train_projector.py",),
        ("jobs/build_index.py",),
    ]
    commands = ["ingest", "train", "index"]
    for (script, *options), command in zip(jobs, commands, strict=True):
        done = submit(head, python, script, *options, "--corpus", by_job)
        assert done.returncode == 0, done.stdout + done.stderr
        subprocess.run(
            [python, "-m", "vsearch.cli", command, *options, "--corpus", by_command],
            check=True, capture_output=True, timeout=300,
        )  # fmt: skip
    assert contents(by_job) == contents(by_command) != set()
    assert newest_projector(Corpus(by_job))[1] == newest_projector(Corpus(by_command))[1] | {
        "metrics": newest_projector(Corpus(by_job))[1]["metrics"]
    }
    query = "a car"
    found, expected = (vsearch.open(url).search(query, 3) for url in (by_job, by_command))
    assert [(s.video, s.start_s) for s in found] == [(s.video, s.start_s) for s in expected]


def test_a_failing_job_says_why_and_fails(head, tmp_path):
    done = submit(head, sys.executable, "jobs/build_index.py", "--corpus", str(tmp_path / "none"))
    assert done.returncode != 0
    assert "There is no corpus at" in done.stdout + done.stderr
