"""`vsearch submit` against a head of our own, through a gate that can be shut."""

import io
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from gate import Gate, gate_before
from head import TOKEN, Head, ray_head

import vsearch
from vsearch.cli import main
from vsearch.config import UserError
from vsearch.demo.world import make_world
from vsearch.submit import (
    Cluster,
    LostJobError,
    connect,
    environment,
    exit_code,
    follow,
    job_name,
    start,
)

VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with ray_head(tmp_path_factory.mktemp("r")) as head:
        yield head


@pytest.fixture
def gate(head: Head):
    with gate_before(head.address, TOKEN) as gate:
        yield gate


@pytest.fixture
def cluster(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(
        "RAY_API_SERVER_ADDRESS", ""
    )  # put back at the end whatever is set meanwhile
    return connect(gate.address)


@pytest.fixture
def silent():
    """The address of a server that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/clip.mp4"


def run(entrypoint: str, cluster: Cluster, name: str, runtime_env: Any = None) -> str:
    """The id of a new job of this name."""
    job, new = start(cluster, name, entrypoint, runtime_env or {})
    assert new
    return job


def python(code: str) -> str:
    return shlex.join(["python", "-P", "-u", "-c", code])


def logged(cluster: Cluster, job: str) -> tuple[dict[str, Any], str]:
    """A job that has ended, and its log."""
    pieces: list[str] = []
    return follow(cluster, job, pieces.append, lambda text: None), "".join(pieces)


def submitted(head: Head, *words: str, **variables: str) -> "subprocess.Popen[str]":
    """A running `vsearch submit`."""
    return subprocess.Popen(
        [sys.executable, "-m", "vsearch.cli", "submit", "--address", head.address, *words],
        env=head.environment | {"COLUMNS": "1000"} | variables,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


# ── before anything is sent ──────────────────────────────────────────────────────────────────────

CORPUS = "--corpus s3://bucket/corpus"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"ingst s3://bucket/videos {CORPUS}", "There is no job 'ingst'"),
        (f"ingest s3://bucket/videos {CORPUS} --fsp 3", "No such option: --fsp"),
        (f"ingest {CORPUS}", "Missing argument 'sources'"),
        (f"ingest s3://bucket/videos {CORPUS} --fps many", "Invalid value for '--fps'"),
        (f"ingest s3://bucket/videos {CORPUS} --fps -1", "--fps must lie between"),
        (f"ingest s3://bucket/videos {CORPUS} --pairs 0", "--pairs must lie above 0"),
        (f"ingest s3://bucket/videos {CORPUS} --models best", "no model preset 'best'"),
        (f"ingest s3://bucket/videos {CORPUS} --time-pattern %Q", "unknown directive %Q"),
        (f"index {CORPUS} --kind hnsw", "There is no --kind 'hnsw'"),
        (f"index {CORPUS} --min-recall 2", "--min-recall must lie above 0"),
        (f"pipeline s3://bucket/videos {CORPUS} --kind hnsw", "There is no --kind 'hnsw'"),
        ("train", "The corpus 'corpus' is a path on this machine"),
        ("ingest ./videos --corpus s3://bucket/corpus", "The source './videos' is a path"),
        (f"index {CORPUS} --queries ours.txt", "The file of queries 'ours.txt' is a path"),
        (f"ingest s3://bucket/videos {CORPUS} --dino tests", "The DINO model 'tests' is a path"),
        ("train --corpus s3://key:secret@bucket/corpus", "carries a secret"),
    ],
)
def test_a_mistake_is_told_before_anything_is_sent(words, said, monkeypatch, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.chdir(Path(__file__).parent.parent)
        monkeypatch.setenv("COLUMNS", "1000")
        argv = ["vsearch", "submit", "--address", address, *words.split()]
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(SystemExit) as ended:
            main()
        nobody.settimeout(0)
        with pytest.raises(BlockingIOError):
            nobody.accept()
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in " ".join(told.split()) and "secret@" not in told
    assert told.strip().endswith(".") and "Traceback" not in told


def test_a_secret_in_the_address_of_the_storage_does_not_go_along(monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://key:secret@store:9000")
    with pytest.raises(UserError, match="carries a secret"):
        environment()


def test_what_goes_along_of_the_environment_is_where_the_storage_is(monkeypatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    wanted = {"AWS_ENDPOINT_URL": "http://store:9000", "AWS_REGION": "eu-north-1"}
    for name, value in (wanted | {"AWS_SECRET_ACCESS_KEY": "x", "HF_TOKEN": "x"}).items():
        monkeypatch.setenv(name, value)
    assert environment()["env_vars"] == wanted


def test_the_name_of_a_job_is_that_of_its_arguments() -> None:
    name = job_name("train", {"corpus": "s3://b/c", "workers": None})
    assert name == job_name("train", {"workers": None, "corpus": "s3://b/c"})
    assert name != job_name("train", {"workers": 2, "corpus": "s3://b/c"})
    assert name != job_name("index", {"corpus": "s3://b/c", "workers": None})


def test_where_nobody_answers_it_says_so(monkeypatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    with socket.create_server(("127.0.0.1", 0)) as once:
        address = f"http://127.0.0.1:{once.getsockname()[1]}"
    with pytest.raises(UserError, match=f"No Ray cluster answers at {address}"):
        connect(address)


# ── sending ──────────────────────────────────────────────────────────────────────────────────────


def test_only_the_packages_code_is_sent_and_counts(cluster: Cluster, gate: Gate) -> None:
    code = "import vsearch.parts as p; print(p.__file__, p.SENTENCES.exists())"
    job = run(python(code), cluster, "code", environment())
    ended, log = logged(cluster, job)
    assert exit_code(ended) == 0, log
    [package] = [request for request in gate.sent if request.startswith(b"PUT /api/packages/")]
    body = package.partition(b"\r\n\r\n")[2]
    assert len(body) < 1_000_000
    names = zipfile.ZipFile(io.BytesIO(body)).namelist()
    sources = {f"vsearch/{path.name}" for path in Path(vsearch.__file__).parent.glob("*.py")}
    assert set(names) == sources | {"vsearch/sentences.txt"}
    path, there = log.splitlines()[-1].split()
    assert "/py_modules_files/" in path and there == "True"
    # It is kept under what is in it: the same code is not sent again.
    run("true", cluster, "code", environment())
    assert sum(request.startswith(b"PUT /api/packages/") for request in gate.sent) == 1


def test_what_is_running_is_followed_and_what_has_ended_is_run_again(cluster: Cluster) -> None:
    entrypoint = python("print('at work')\nimport time; time.sleep(600)")
    assert start(cluster, "same", entrypoint, {}) == ("same-1", True)
    assert start(cluster, "same", entrypoint, {}) == ("same-1", False)
    seen: list[str] = []

    def stop_when_it_is_at_work(text: str) -> None:
        seen.append(text)
        if "at work" in text:
            cluster.stop_job("same-1")

    ended = follow(cluster, "same-1", stop_when_it_is_at_work, lambda text: None)
    assert exit_code(ended) == 4
    assert sum("at work" in line for line in "".join(seen).splitlines()[2:]) == 1
    assert start(cluster, "same", "true", {}) == ("same-2", True)
    assert exit_code(logged(cluster, "same-2")[0]) == 0


def test_an_answer_that_is_lost_starts_no_second_job(cluster: Cluster, gate: Gate) -> None:
    gate.unanswered = b"POST /api/jobs/"
    assert start(cluster, "lost", "true", {}) == ("lost-1", True)
    jobs = [job.submission_id for job in cluster.list_jobs()]
    assert [job for job in jobs if job and job.startswith("lost-")] == ["lost-1"]
    assert gate.unanswered is None


# ── following ────────────────────────────────────────────────────────────────────────────────────


def test_the_exit_code_is_the_jobs_own(cluster: Cluster) -> None:
    codes = {"exit 7": 7, "exit 2": 2, "kill -KILL $$": 137, "true": 0}
    jobs = [run(entrypoint, cluster, f"code{code}") for entrypoint, code in codes.items()]
    assert [exit_code(logged(cluster, job)[0]) for job in jobs] == list(codes.values())


def test_a_job_that_cannot_begin_fails(cluster: Cluster) -> None:
    job = run("true", cluster, "unready", {"py_modules": ["gcs://_ray_pkg_00000000.zip"]})
    ended, _ = logged(cluster, job)
    assert exit_code(ended) == 1
    assert "runtime_env" in ended["message"] and ended["driver_exit_code"] is None


def test_a_log_comes_whole_and_once_through_every_outage(cluster: Cluster, gate: Gate) -> None:
    code = "import time\nfor i in range(120): print('Zeile', i, 'ü' * (i % 7)); time.sleep(0.1)"
    job = run(python(code), cluster, "long")
    pieces: list[str] = []
    said: list[str] = []

    def disturb() -> None:
        for shut_s in (0.0, 0.0, 4.0, 0.0):
            time.sleep(1.5)
            gate.shut = shut_s > 0
            gate.cut()
            time.sleep(shut_s)
            gate.shut = False

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    ended = follow(cluster, job, pieces.append, said.append)
    disturbing.join()
    lines = "".join(pieces).splitlines()
    assert [line for line in lines if line.startswith("Zeile")] == [
        f"Zeile {i} {'ü' * (i % 7)}" for i in range(120)
    ]
    assert len(lines) == len(set(lines))
    assert exit_code(ended) == 0
    assert gate.streams() >= 4
    assert [text for text in said if "is lost. The job goes on" in text] == said
    assert len(said) == 1


def test_a_cluster_that_stays_away_is_given_up(cluster: Cluster, gate: Gate) -> None:
    job = run("sleep 600", cluster, "away")
    threading.Timer(1, lambda: (setattr(gate, "shut", True), gate.cut())).start()
    with pytest.raises(LostJobError, match="has not answered for") as lost:
        follow(cluster, job, lambda text: None, lambda text: None, lost_after_s=3)
    assert lost.value.exit_code == 5
    gate.shut = False
    assert not cluster.get_job_info(job).status.is_terminal()
    cluster.stop_job(job)


def test_a_job_that_the_cluster_no_longer_knows_is_lost(cluster: Cluster) -> None:
    with pytest.raises(LostJobError, match="no longer knows the job none-1"):
        follow(cluster, "none-1", lambda text: None, lambda text: None)


# ── the command ──────────────────────────────────────────────────────────────────────────────────


def test_without_the_token_nobody_gets_in(cluster: Cluster, head: Head) -> None:
    with pytest.raises(UserError, match="does not let you in: set RAY_AUTH_MODE=token"):
        connect(head.address)


def test_a_mistake_that_the_job_finds_is_exit_code_2(head: Head, tmp_path: Path) -> None:
    corpus = str(tmp_path / "none")
    with submitted(head, "index", "--corpus", corpus) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2, out + err
    assert f"There is no corpus at {corpus}" in out
    assert f"All machines of the cluster must have the same storage at {corpus}" in err
    assert re.search(r"The job vsearch-index-[0-9a-f]{10}-1 failed with exit code 2", err)


@pytest.mark.long
def test_ctrl_c_ends_the_following_and_the_same_command_goes_on(
    head: Head, silent: str, tmp_path: Path
) -> None:
    corpus = str(tmp_path / "corpus")
    first = submitted(head, "ingest", silent, "--models=demo", "--corpus", corpus, "--fps=4")
    told = ""
    while "The job is" not in told:
        told += first.stderr.readline()
    time.sleep(1)
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=30)
    assert first.returncode == 130
    assert "The job goes on" in err
    stop = re.search(r"ray (job stop --address \S+ \S+)", err)[1]
    words = ["--fps", "4.0", f"--corpus={corpus}", "--models=demo", silent]
    second = submitted(head, "ingest", *words)
    told = ""
    while "The job is" not in told:
        told += second.stderr.readline()
    assert stop.split()[-1] in told and "running already" in told
    subprocess.run(
        [Path(sys.executable).parent / "ray", *stop.split(), "--no-wait"],
        env=head.environment, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    _, err = second.communicate(timeout=60)
    assert second.returncode == 4
    assert "was stopped" in err


# ── what the driver costs ────────────────────────────────────────────────────────────────────────


def watch_drivers(stop: threading.Event, most: dict[str, dict[str, Any]]) -> None:
    """Notes of each driver that runs here its peak memory, CPU seconds, and which heavy libraries it has
    loaded.
    """
    while not stop.wait(0.3):
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if words[:4] != ["python", "-P", "-m", "vsearch.cli"]:
                continue
            with suppress(psutil.Error):
                found = most.setdefault(f"{words[4]} {process.pid}", {"rss_mb": 0, "heavy": set()})
                times = process.cpu_times()
                found["rss_mb"] = max(found["rss_mb"], process.memory_info().rss / 2**20)
                found["cpu_s"] = times.user + times.system
                paths = (library.path for library in process.memory_maps())
                found["heavy"] |= {Path(p).name for p in paths if re.search("libtorch|faiss", p)}


@pytest.mark.long
def test_the_pipeline_as_a_job_leaves_what_is_heavy_to_the_workers(
    head: Head, tmp_path: Path
) -> None:
    world, corpus = tmp_path / "world", str(tmp_path / "corpus")
    make_world(world, seed=3, videos=2, scenes_per_video=2)
    stop, most = threading.Event(), {}
    watching = threading.Thread(target=watch_drivers, args=(stop, most), daemon=True)
    watching.start()
    for words, attempt in (
        (["pipeline", str(world), "--models", "demo"], 1),
        (["pipeline", str(world), "--models", "demo"], 2),
        (["index", "--kind", "ivfpq", "--rows", "frames", "--min-recall", "0.5"], 1),
    ):
        with submitted(head, *words, "--corpus", corpus) as process:
            out, err = process.communicate(timeout=400)
        assert process.returncode == 0, out + err
        assert re.search(rf"The job vsearch-{words[0]}-[0-9a-f]{{10}}-{attempt} succeeded", err)
        if attempt == 2:
            assert "(up to date)" in out
    stop.set()
    watching.join()
    for name, driver in most.items():
        print(f"\n{name}: {driver['rss_mb']:.0f} MB, {driver['cpu_s']:.1f} s of CPU", end="")
    assert len(most) == 3
    for driver in most.values():
        assert driver["heavy"] == set()
        assert driver["rss_mb"] < 400
    assert len(vsearch.open(corpus).search("a car", limit=3)) > 0
