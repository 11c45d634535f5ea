"""The way to Ray: a cluster when RAY_ADDRESS names one, else a local one for this process alone."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

from vsearch.config import UserError


def on_cluster() -> bool:
    """Whether RAY_ADDRESS names a cluster, as it does inside a submitted job."""
    return bool(os.environ.get("RAY_ADDRESS"))


def connect() -> None:
    """Joins the cluster that RAY_ADDRESS names or starts a local one; does nothing when connected."""
    if ray.is_initialized():
        return
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
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # One death while a model loads (a node that goes away) must not end the job.
    context.max_consecutive_actor_init_deaths = 3
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def cpus() -> int:
    """Cores of the connected cluster."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def cpus_of_smallest_node() -> int:
    """Cores that every node with cores has."""
    counts = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    return max(1, int(min((count for count in counts if count), default=1)))


def memory_bytes() -> int:
    """Memory that Ray gives out on the connected cluster."""
    return int(ray.cluster_resources().get("memory", 0))


def gpus() -> int:
    """GPUs of the connected cluster."""
    return int(ray.cluster_resources().get("GPU", 0))


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
