"""A Ray head of our own, with its dashboard and with authentication by token."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

PYTHON = Path(sys.executable).parent
RAY = str(PYTHON / "ray")
TOKEN = "a-token-for-this-test-only-0123456789"


@dataclass(frozen=True)
class Head:
    """`address` is that of the dashboard; `environment` lets a client in, and finds this Python; drivers
    that are not jobs join at `gcs`.
    """

    address: str
    gcs: str
    environment: dict[str, str]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at, from below those that the system gives to outgoing connections."""
    free: list[int] = []
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as s, suppress(OSError):
            s.bind(("", port))
            free.append(port)
    return free[:count]


@contextmanager
def ray_head(folder: Path) -> Iterator[Head]:
    """A head of two cores that takes jobs, in a process group of its own, until the end of the block."""
    gcs, dashboard, client, agent = free_ports(4)
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS",)},
        "PATH": f"{PYTHON}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
    }
    words = [RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2"]
    words += [f"--port={gcs}", f"--dashboard-port={dashboard}"]
    words += [f"--ray-client-server-port={client}"]
    words += [f"--dashboard-agent-listen-port={agent}"]  # another Ray may hold the usual one
    words += [f"--temp-dir={folder}", "--include-dashboard=true"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", environment)
    try:
        _wait(head, process, folder / "log")
        yield head
    finally:
        process.terminate()
        process.wait(60)


def _wait(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(120):
        listed = subprocess.run(
            [RAY, "job", "list", "--address", head.address],
            env=head.environment, capture_output=True, text=True,
        )  # fmt: skip
        if listed.returncode == 0:
            return
        assert process.poll() is None, log.read_text()
        time.sleep(1)
    pytest.fail(f"the head did not come up: {listed.stderr}{log.read_text()}")
