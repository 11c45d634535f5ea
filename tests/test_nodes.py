"""Several nodes: what runs where, and nodes that come and go in each stage. The oracle is an undisturbed
run on the same cluster.

The nodes are Ray's, on this machine: a head without cores, and workers that carry the label of their
role. One declares a GPU that it does not have; there the encoders run on its cores. Where a task ran is
read from Ray's own record of tasks.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster
from test_ingest import assert_same_rows, command, make_video, statuses, stored_rows

from vsearch.build_index import build_index
from vsearch.config import PRESETS, TrainConfig
from vsearch.corpus import Corpus, newest_projector, vector_matrix
from vsearch.ingest import IngestSummary, Progress, ingest
from vsearch.placement import Limits
from vsearch.snapshots import Snapshots
from vsearch.train import train
from vsearch.verify import verify

ROLES: dict[str, dict[str, Any]] = {
    "decode": {"num_cpus": 2},
    "embed": {"num_cpus": 2, "num_gpus": 1},
    "index": {"num_cpus": 3},
}
HARDWARE = {"memory": 8 << 30, "object_store_memory": 150 << 20}
TASKS = {
    "decode": "_decode_run",
    "embed": "_Embedder",
    "store": "_store",
    "train": "RayTrainWorker",
    "rows": "shard_rows",
    "sample": "shard_sample",
    "quantizer": "^train$",
    "queries": "encode_queries",
    "codes": "shard_codes",
}
TRAINING = TrainConfig(max_epochs=30, patience=30, batch_size=512)
CODED: dict[str, Any] = {
    "kind": "ivfpq", "space": "clip", "rows": "frames", "min_recall": 0.3, "shard_frames": 6000,
}  # fmt: skip


class Nodes:
    """A cluster of nodes that have names, the first of them a head without cores."""

    def __init__(self, **hardware: Any) -> None:
        self._hardware = HARDWARE | hardware
        self._cluster = Cluster()
        self._nodes: dict[str, Any] = {}
        self._start("head", **({"num_cpus": 0} | hardware))
        ray.init(address=self.address, log_to_driver=False)

    def add(self, name: str, role: str, **resources: Any) -> None:
        labels = {"name": name, "vsearch/role": role}
        self._start(name, labels=labels, **(ROLES.get(role, {}) | resources))

    def _start(self, name: str, **resources: Any) -> None:
        found = {"include_dashboard": False} | self._hardware | resources
        self._nodes[name] = self._cluster.add_node(**found)

    def alive(self, role: str) -> str:
        """The name of a node of a role."""
        return next(name for name in self._nodes if name.startswith(role))

    def remove(self, name: str) -> None:
        """Kills all processes of a node, without a word to them before."""
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def names(self) -> dict[str, str]:
        """The name of each node by its id, also of those that are gone."""
        return {node["NodeID"]: node["Labels"].get("name", "head") for node in ray.nodes()}

    def ran(self) -> dict[str, Counter[str]]:
        """How many tasks ran on which nodes since the cluster began, by what they did."""
        time.sleep(2)  # workers tell of their tasks once a second
        names = self.names()
        found = {what: Counter[str]() for what in TASKS}
        for event in ray._private.state.state._get_all_task_events():
            name = names.get(event.state_updates.node_id.hex())
            for what, words in TASKS.items():
                if name and re.search(words, event.task_info.name):
                    found[what][name] += 1
        return found

    def training(self) -> str | None:
        """The node on which a worker trains."""
        for actor in ray._private.state.actors().values():
            if TASKS["train"] in actor["ActorClassName"] and actor["State"] == "ALIVE":
                return self.names()[actor["Address"]["NodeID"]]
        return None

    def shut_down(self) -> None:
        ray.shutdown()
        for name in reversed([*self._nodes]):
            self.remove(name)


@contextmanager
def cluster(*roles: str, **hardware: Any) -> Iterator[Nodes]:
    """A cluster of a head and a node of each role, named by it. What ran before is left alone."""
    if ray.is_initialized():
        ray.shutdown()
    nodes = Nodes(**hardware)
    try:
        for role in roles:
            nodes.add(role, role)
        yield nodes
    finally:
        nodes.shut_down()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with cluster(*ROLES) as started:
        yield started


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of which most are still to be embedded when the first are stored: small ones, and longer
    ones in several spans, some 12,000 frames in all."""
    folder = tmp_path_factory.mktemp("archive")
    for number in range(30):
        make_video(folder / f"{number}.mp4", number, seconds=1.5, fps=20)
    for number in range(6):
        make_video(folder / f"long {number}.mp4", 100 + number, seconds=60, fps=30)
    return folder


def once_stored(act: Callable[[], None]) -> Callable[[Progress], None]:
    """A report that acts when the first frames are stored, and others are under way."""
    done: list[bool] = []

    def report(progress: Progress) -> None:
        if progress.frames and not done:
            done.append(True)
            act()

    return report


def ingest_on(folder: Path, url: Path, **options: Any) -> IngestSummary:
    """An ingest that decodes one file at a time, half of what the node for decoding has cores for."""
    options = {"limits": Limits(decoders=1)} | options
    return ingest(str(url), [str(folder)], PRESETS["demo"], **options)


def vectors(url: Path) -> dict[tuple[str, int, int], tuple[Any, Any]]:
    """The vectors of each frame, by video, span and frame."""
    found = {}
    for path in sorted(url.glob("frames/*.parquet")):
        table = pq.read_table(path)
        keys = zip(
            *(table[name].to_pylist() for name in ("video_id", "span", "frame")), strict=True
        )
        dino, clip = (vector_matrix(table[name]) for name in ("dino", "clip"))
        for row, key in enumerate(keys):
            assert key not in found
            found[key] = (dino[row], clip[row])
    return found


def assert_same_corpus(url: Path, whole: Path) -> None:
    assert_same_rows(stored_rows(str(url)), stored_rows(str(whole)))
    assert set(statuses(str(url)).values()) == {"indexed"}
    wanted = vectors(whole)
    for key, found in vectors(url).items():
        for mine, theirs in zip(found, wanted[key], strict=True):
            np.testing.assert_allclose(mine.astype(float), theirs.astype(float), atol=2e-3)


def shards_made(url: Path) -> list[dict[str, str]]:
    """The SHA-256 of the files of each shard of the index in use."""
    names = ("vectors_file", "rows_file", "codes_file", "cells_file")
    manifest = Snapshots(Corpus(str(url))).current_manifest()
    assert manifest is not None
    return [{name: shard[name]["sha256"] for name in names} for shard in manifest["shards"]]


def remove_trainer(nodes: Nodes, gone: list[str]) -> None:
    """Removes the node of the worker that trains, soon after it began."""
    while (name := nodes.training()) is None:
        time.sleep(0.2)
    time.sleep(2)
    gone.append(name)
    nodes.remove(name)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_each_stage_runs_where_it_belongs_and_outlives_its_nodes(
    nodes: Nodes, archive: Path, tmp_path: Path
) -> None:
    whole, url = tmp_path / "whole", tmp_path / "disturbed"
    said: list[str] = []
    ingest_on(archive, whole, announce=said.append)
    projector = train(str(whole), TRAINING, gpus=0, announce=said.append)
    build_index(str(whole), **CODED, gpus=0, announce=said.append)
    assert said == [
        "3 nodes: 1 core for decoding, 1 GPU for embedding",
        "3 nodes: 1 worker with 2 cores",
        "3 nodes: 3 cores of 1 index node for the index",
    ]
    ran = nodes.ran()
    assert set(ran["decode"]) == {"decode"}
    assert set(ran["embed"]) == {"embed"}
    for what in ("rows", "sample", "quantizer", "queries", "codes"):
        assert set(ran[what]) == {"index"}, what
    for what in ("store", "train"):
        assert ran[what] and "head" not in ran[what]

    def replace_encoder() -> None:
        nodes.remove("embed")
        nodes.add("embed again", "embed")

    ingest_on(archive, url, report=once_stored(replace_encoder))
    assert nodes.ran()["embed"]["embed again"] > 0
    assert_same_corpus(url, whole)

    gone: list[str] = []
    thread = threading.Thread(target=remove_trainer, args=(nodes, gone))
    thread.start()
    summary = train(str(url), TRAINING, gpus=0)
    thread.join()
    assert len(nodes.ran()["train"]) >= 2
    assert summary.metrics["epochs"] == projector.metrics["epochs"]
    assert summary.metrics["cosine"] == pytest.approx(projector.metrics["cosine"], abs=0.02)

    def remove_index(stage: str, done: int, total: int) -> None:
        if len(gone) == 1:  # the tasks were just handed out
            gone.append(nodes.alive("index"))
            nodes.remove(gone[-1])

    if gone == ["index"]:
        nodes.add("index again", "index")
    build_index(str(url), **CODED, gpus=0, report=remove_index)
    assert len(gone) == 2
    assert shards_made(url) == shards_made(whole)
    assert not verify(str(url)).damaged


# ── the whole matrix: pytest -m soak tests/test_nodes.py ─────────────────────────────────────────


@pytest.fixture(scope="module")
def whole(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of an undisturbed ingest on three nodes, with an index."""
    url = tmp_path_factory.mktemp("whole")
    with cluster(*ROLES):
        ingest_on(archive, url)
        train(str(url), TRAINING, gpus=0)
        build_index(str(url), **CODED, gpus=0)
    return url


@pytest.mark.soak
def test_a_node_for_decoding_goes_and_another_comes(nodes: Nodes, tmp_path: Path) -> None:
    # Half a minute of decoding, and few frames to embed: most is still to be decoded when some are stored.
    for number in range(12):
        make_video(tmp_path / "videos" / f"{number}.mp4", number, seconds=100, fps=50)

    def replace_decoder() -> None:
        nodes.remove("decode")
        nodes.add("decode again", "decode")

    url = tmp_path / "corpus"
    report = once_stored(replace_decoder)
    ingest_on(tmp_path / "videos", url, fps=0.5, report=report)
    assert nodes.ran()["decode"]["decode again"] > 0
    assert set(statuses(str(url)).values()) == {"indexed"}
    rows = stored_rows(str(url))
    assert len(rows) == len(set(rows)) == 12 * 50


@pytest.mark.soak
@pytest.mark.parametrize("role", ["decode", "index"])
def test_without_the_nodes_of_a_role_the_others_do_its_work(
    role: str, nodes: Nodes, archive: Path, whole: Path, tmp_path: Path
) -> None:
    ingest_on(archive, tmp_path, report=once_stored(lambda: nodes.remove(role)))
    assert_same_corpus(tmp_path, whole)
    build_index(str(tmp_path), **CODED, gpus=0)
    assert shards_made(tmp_path) == shards_made(whole)


@pytest.mark.soak
def test_without_labels_and_gpus_a_node_may_go_too(
    archive: Path, whole: Path, tmp_path: Path
) -> None:
    with cluster(num_cpus=2) as nodes:  # the head works as well
        nodes.add("other", "none", num_cpus=2)
        ingest_on(archive, tmp_path, report=once_stored(lambda: nodes.remove("other")))
        assert set(nodes.ran()["decode"]) == {"head", "other"}
    assert_same_corpus(tmp_path, whole)


@pytest.mark.soak
def test_one_of_two_gpus_goes_for_good(
    nodes: Nodes, archive: Path, whole: Path, tmp_path: Path
) -> None:
    nodes.add("embed too", "embed")
    ingest_on(archive, tmp_path, report=once_stored(lambda: nodes.remove("embed too")))
    assert set(nodes.ran()["embed"]) == {"embed", "embed too"}
    assert_same_corpus(tmp_path, whole)


def gpus_asked_for() -> float:
    """The GPUs that an autoscaler would be told to start."""
    from ray._raylet import GcsClient
    from ray.autoscaler.v2.sdk import get_cluster_resource_state

    state = get_cluster_resource_state(GcsClient(ray.get_runtime_context().gcs_address))
    return sum(
        asked.count * asked.request.resources_bundle["GPU"]
        for asked in state.pending_resource_requests
        if "GPU" in asked.request.resources_bundle
    )


@pytest.mark.soak
def test_gpus_that_are_yet_to_start_are_asked_for_and_waited_for(
    archive: Path, whole: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    options = {"limits": Limits(gpus=1), "announce": said.append}
    with cluster("decode", "index") as nodes:
        thread = threading.Thread(target=ingest_on, args=(archive, tmp_path), kwargs=options)
        thread.start()
        while not (asked := gpus_asked_for()):
            assert thread.is_alive()
            time.sleep(0.5)
        nodes.add("embed", "embed")
        thread.join()
        assert asked == 1
        assert set(nodes.ran()["embed"]) == {"embed"}
    assert said == ["2 nodes: 5 cores for decoding, 0 GPUs for embedding (up to 1)"]
    assert_same_corpus(tmp_path, whole)


@pytest.mark.soak
def test_the_head_may_be_lost_between_stages(archive: Path, whole: Path, tmp_path: Path) -> None:
    with cluster(*ROLES):
        ingest_on(archive, tmp_path)
    with cluster(*ROLES):
        train(str(tmp_path), TRAINING, gpus=0)
    with cluster(*ROLES):
        build_index(str(tmp_path), **CODED, gpus=0)
    assert_same_corpus(tmp_path, whole)
    assert newest_projector(Corpus(str(tmp_path)))
    assert shards_made(tmp_path) == shards_made(whole)


@pytest.mark.soak
def test_an_object_store_that_is_too_small_spills(
    archive: Path, whole: Path, tmp_path: Path
) -> None:
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    @ray.remote(num_cpus=1)
    def fill() -> Any:
        return np.ones(60 << 20, np.uint8)

    with cluster(*ROLES, object_store_memory=80 << 20) as nodes:
        ballast = [
            fill.options(label_selector={"name": name}).remote()
            for name in ("decode", "embed", "index")
        ]
        ray.wait(ballast, num_returns=len(ballast))
        ingest_on(archive, tmp_path)
        stats = get_memory_info_reply(get_state_from_address(nodes.address)).store_stats
        assert stats.spilled_bytes_total > 0
        assert all(int(ray.get(kept).sum()) == 60 << 20 for kept in ballast)
    assert_same_corpus(tmp_path, whole)


@pytest.mark.soak
@pytest.mark.parametrize("corpora", [1, 2])
def test_two_jobs_at_once(
    corpora: int, nodes: Nodes, archive: Path, whole: Path, tmp_path: Path
) -> None:
    urls = [tmp_path / str(number % corpora) for number in range(2)]
    for url in set(urls):
        url.mkdir()
        shutil.copy(whole / "corpus.json", url)
    environment = {**os.environ, "RAY_ADDRESS": nodes.address}
    jobs = [
        subprocess.Popen(command(archive, str(url)), env=environment, stderr=subprocess.PIPE)
        for url in urls
    ]
    for job in jobs:
        _, said = job.communicate(timeout=400)
        assert job.returncode == 0, said.decode()[-3000:]
    for url in set(urls):
        Corpus(str(url)).settle()
        assert_same_corpus(url, whole)


# ── nodes with addresses of their own, and a link that is cut ────────────────────────────────────


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Links:
    """A bridge of this machine with addresses 10.203.0.0/24, and machines behind it, as far as the network
    is concerned: each a network namespace with a cable to the bridge.
    """

    HEAD = "10.203.0.1"

    def __init__(self) -> None:
        self._names: list[str] = []
        self._started: list[subprocess.Popen[bytes]] = []
        ip("link", "add", "vsbridge", "type", "bridge")
        ip("addr", "add", f"{self.HEAD}/24", "dev", "vsbridge")
        ip("link", "set", "vsbridge", "up")

    def start(self, role: str, nodes: Nodes) -> None:
        """Starts a node of a role behind a cable of its own, and waits until it has joined: two that start
        at once on one machine take each other's sockets.
        """
        number = len(self._names) + 2
        name = f"vs-{role}-{number}"
        self._names.append(name)
        ip("netns", "add", name)
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", name, "master", "vsbridge", "up")
        ip("-n", name, "addr", "add", f"10.203.0.{number}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "link", "set", "lo", "up")
        resources = ROLES[role]
        ray_start = [
            "ip", "netns", "exec", name, sys.executable, "-m", "ray.scripts.scripts", "start",
            f"--address={nodes.address}", f"--node-ip-address=10.203.0.{number}",
            f"--labels=name={role},vsearch/role={role}",
            f"--num-cpus={resources['num_cpus']}", f"--num-gpus={resources.get('num_gpus', 0)}",
            f"--memory={HARDWARE['memory']}",
            f"--object-store-memory={HARDWARE['object_store_memory']}", "--block",
        ]  # fmt: skip
        nowhere = subprocess.DEVNULL
        joined = len(nodes.names())
        self._started.append(subprocess.Popen(ray_start, stdout=nowhere, stderr=nowhere))
        while len(nodes.names()) == joined:
            assert self._started[-1].poll() is None, f"{name} did not start"
            time.sleep(0.5)

    def cut(self, role: str) -> None:
        """Cuts the cable of the first node of a role."""
        name = next(name for name in self._names if name.startswith(f"vs-{role}-"))
        ip("link", "set", name, "down")

    def take_down(self) -> None:
        for started in self._started:
            started.terminate()
        for started in self._started:
            started.wait(timeout=60)
        for name in self._names:
            # A namespace lives as long as a process in it, and with it its end of the cable.
            left = subprocess.check_output(["ip", "netns", "pids", name], text=True)
            for process in left.split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            ip("netns", "del", name)
            ip("link", "del", name)
        ip("link", "del", "vsbridge")


@pytest.fixture
def links() -> Iterator[Links]:
    try:
        links = Links()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"networks cannot be made here: {error}")
    yield links
    links.take_down()


@pytest.mark.soak
@pytest.mark.parametrize("role", ["decode", "embed"])
def test_a_link_that_is_cut_costs_only_time(
    role: str, links: Links, archive: Path, whole: Path, tmp_path: Path
) -> None:
    with cluster(node_ip_address=Links.HEAD) as nodes:
        for name in ROLES:
            links.start(name, nodes)
        if role == "embed":
            links.start("embed", nodes)
        began = time.monotonic()
        ingest_on(archive, tmp_path, report=once_stored(lambda: links.cut(role)))
        print(f"{role} cut off: {time.monotonic() - began:.0f} s")
    assert_same_corpus(tmp_path, whole)
