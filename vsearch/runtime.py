"""The way to Ray: a cluster when RAY_ADDRESS names one, else a local one for this process alone."""

import logging
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

from vsearch.config import UserError
from vsearch.placement import NODE_ID, ROLE, Node

GPU_LOOK_S = 20.0
"""So long a stage waits for its nodes to tell how large their GPUs are."""


def on_cluster() -> bool:
    """Whether RAY_ADDRESS names a cluster, as it does inside a submitted job."""
    return bool(os.environ.get("RAY_ADDRESS"))


def connect() -> None:
    """Joins the cluster that RAY_ADDRESS names or starts a local one, unless it is connected."""
    if not ray.is_initialized():
        _start()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # One death while a model loads (a node that goes away) must not end the job.
    context.max_consecutive_actor_init_deaths = 3
    # Nor must a long wait for a node, as when no spot instance is to be had.
    context.execution_no_progress_timeout_s = -1
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _start() -> None:
    if on_cluster():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    else:
        # Ray's own processes keep their logs in its session folder; the terminal is for people.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


def cpus() -> int:
    """Cores of the connected cluster."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def cpus_of_smallest_node() -> int:
    """Cores that every node with cores has."""
    counts = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return max(1, int(min((count for count in counts if count), default=1)))


def nodes() -> list[Node]:
    """The nodes of the connected cluster that are alive."""
    return [
        Node(
            id=node["NodeID"],
            cpus=int(node["Resources"].get("CPU", 0)),
            gpus=int(node["Resources"].get("GPU", 0)),
            memory=int(node["Resources"].get("memory", 0)),
            role=node["Labels"].get(ROLE),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def gpu_memories(nodes: Sequence[Node]) -> list[int]:
    """Bytes of memory of the GPUs of these nodes, as far as nvidia-smi tells them there; the GPUs may be
    in use.
    """
    asked = [
        _own_gpu_memories.options(label_selector={NODE_ID: node.id}).remote()
        for node in nodes
        if node.gpus
    ]
    known, _ = ray.wait(asked, num_returns=len(asked), timeout=GPU_LOOK_S) if asked else ([], [])
    found: list[int] = []
    for reference in known:
        try:
            found += ray.get(reference)
        except RayError:  # the node has gone meanwhile
            continue
    return found


@ray.remote(num_cpus=0)
def _own_gpu_memories() -> list[int]:
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, timeout=GPU_LOOK_S, check=True
        ).stdout
        return [int(line) << 20 for line in said.split()]  # it counts in MiB
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


@contextmanager
def user_errors() -> Iterator[None]:
    """Brings a `UserError` that was raised in a worker back as itself, of its own kind."""
    try:
        yield
    except Exception as error:
        # Ray wraps what a worker raises, in more than one way; a training keeps it by worker.
        waiting: list[BaseException | None] = [error]
        while waiting:
            found = waiting.pop()
            if isinstance(found, UserError) and not isinstance(found, RayError):
                if found is error:
                    raise
                raise type(found)(str(found)) from error
            if found is not None:
                waiting += [found.__cause__, found.__context__, getattr(found, "cause", None)]
                waiting += getattr(found, "worker_failures", {}).values()
        raise
