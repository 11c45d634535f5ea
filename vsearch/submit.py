"""The way to another machine's Ray: a command of vsearch becomes a job there, followed to its end.

A job is told by its name. The id is made of the command and its arguments, with the number of the
attempt, so whoever asks for the same again finds what is already running, and an answer of the cluster
that was lost can be asked for again.
"""

import asyncio
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

import vsearch
from vsearch.config import (
    Sampling,
    UserError,
    check_index_options,
    check_pairs,
    encoder_names,
)
from vsearch.sources import name_clock
from vsearch.storage import refuse_secret

STOPPED_CODE = 4
"""Exit code for a job that somebody stopped."""

FORWARDED = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
"""Variables that go along: where the storage is. Secrets stay: the job's environment is shown to all who
can see the cluster's dashboard, so the cluster's machines have their own."""

LEFT_OUT = ["__pycache__", "/demo/", "/web/"]
"""Of the package, as in a .gitignore: the demo with its models, the page of the service."""

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"

ANSWER_S = 30.0
RETRY_S = 2.0
POLL_S = 1.0
START_S = 60.0
"""So long the cluster is asked again to take a job: a young head is not ready yet."""

LOST_AFTER_S = 1800.0
"""Without any answer for so long a job is given up: not stopped, but no longer followed."""

QUIET_S = 60.0
"""Failures that follow each other faster are one outage."""

STREAM = aiohttp.ClientWSTimeout(ws_receive=600.0, ws_close=1.0)
"""Ray's dashboard answers neither a ping nor a farewell: a stream that is silent is opened anew."""


class LostJobError(UserError):
    """How a job ended cannot be found out."""

    exit_code = 5


class RefusedError(RuntimeError):
    """The cluster answered with a status other than 200."""


class Cluster(JobSubmissionClient):
    """Ray's client for the jobs of a cluster, at the address of its dashboard."""

    @property
    def headers(self) -> dict[str, str]:
        """With the token, if Ray's authentication is on."""
        return dict(self._headers)

    def _raise_error(self, answer: requests.Response) -> None:
        raise RefusedError(answer.text.strip().splitlines()[-1] if answer.text.strip() else "")


# ── before anything is sent ──────────────────────────────────────────────────────────────────────


def check(arguments: dict[str, Any]) -> list[str]:
    """Raises `UserError` for what a job could not use: values out of range, addresses that carry a
    secret, paths that mean another place to the cluster. Gives the absolute paths, which are good only
    if all of the cluster's machines have the same storage there.
    """
    if "models" in arguments:
        encoder_names(arguments["models"], arguments["dino"], arguments["clip"])
        Sampling(fps=arguments["fps"], max_change=arguments["max_change"])
        name_clock(arguments["time_pattern"])
        check_pairs(arguments["pairs"])
    names = ("kind", "space", "rows", "min_recall", "alpha")
    check_index_options(**{name: arguments[name] for name in names if name in arguments})
    shared = []
    for what, place in _places(arguments):
        refuse_secret(place)
        path = place.removeprefix("file://")
        if "://" in path or "::" in path:
            continue
        if not path.startswith("/"):
            raise UserError(
                f"The {what} {place!r} is a path on this machine, which the cluster does not see: give a "
                f"URL (s3://…), or the absolute path of storage that all its machines share."
            )
        shared.append(path)
    return shared


def _places(arguments: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(what it is, address) of all that a job reads or writes."""
    yield from (("source", source) for source in arguments.get("sources", []))
    yield "corpus", arguments["corpus"]
    if arguments.get("queries"):
        yield "file of queries", arguments["queries"]
    # A model is a name on a hub unless such a path is there.
    for role in ("dino", "clip"):
        name = arguments.get(role) or ""
        for path in (name, name.partition(":")[2]):
            if path.startswith("/") or (path and Path(path).exists()):
                yield f"{role.upper()} model", path


def environment() -> dict[str, Any]:
    """The runtime environment of a job: this package's code, without its dependencies, and where the
    storage is. Raises `UserError` for an address that carries a secret.
    """
    variables = {name: os.environ[name] for name in FORWARDED if os.environ.get(name)}
    for value in variables.values():
        refuse_secret(value)
    package = Path(vsearch.__file__).parent
    return {"py_modules": [str(package)], "excludes": LEFT_OUT, "env_vars": variables}


def job_name(command: str, arguments: dict[str, Any]) -> str:
    """The same for the same command and arguments, in whatever order and form they were written."""
    made_from = json.dumps([command, arguments], sort_keys=True, default=str)
    return f"vsearch-{command}-{hashlib.sha256(made_from.encode()).hexdigest()[:10]}"


# ── sending ──────────────────────────────────────────────────────────────────────────────────────


def connect(address: str | None) -> Cluster:
    """The cluster at an address, by default the one that Ray's variables name, else this machine's.
    Raises `UserError` when none answers there, or refuses the token.
    """
    logging.getLogger("ray").setLevel(logging.WARNING)
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if address is not None:  # to Ray its variables count for more than an argument
        os.environ[ADDRESSES[0]] = address
    named = [os.environ[name] for name in ADDRESSES if os.environ.get(name)]
    address = named[0] if named else DEFAULT_ADDRESS
    with explained(address):
        try:
            return Cluster(address)
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"{address} is not the address of a Ray cluster's dashboard: {_brief(error)}."
            ) from error


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Says in one sentence why a cluster cannot be talked to."""
    try:
        yield
    except AuthenticationError as error:
        raise _needs_token(address) from error
    except (ConnectionError, requests.RequestException) as error:
        raise UserError(
            f"No Ray cluster answers at {address}: --address is that of its dashboard, often port 8265, "
            f"which may need a tunnel ({_brief(error)})."
        ) from error


def _needs_token(address: str) -> UserError:
    return UserError(
        f"The cluster at {address} does not let you in: set RAY_AUTH_MODE=token, and its token in "
        f"RAY_AUTH_TOKEN or in the file that RAY_AUTH_TOKEN_PATH names."
    )


def _brief(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def start(
    cluster: Cluster, name: str, entrypoint: str, runtime_env: dict[str, Any]
) -> tuple[str, bool]:
    """Starts a job unless one of this name is running; gives its id, and whether it is a new one. Raises
    `UserError` when the cluster does not take it.
    """
    mine, deadline = "", time.monotonic() + START_S
    with explained(cluster.get_address()):
        while True:
            try:
                number, newest = _newest(cluster, name)
                if newest and (newest.submission_id == mine or not newest.status.is_terminal()):
                    return newest.submission_id, newest.submission_id == mine
                mine = f"{name}-{number + 1}"
                cluster.submit_job(
                    entrypoint=entrypoint,
                    submission_id=mine,
                    runtime_env=runtime_env,
                    metadata={"vsearch_version": vsearch.__version__},
                )
                return mine, True
            except (RefusedError, requests.RequestException) as error:
                # It may have been taken, by this request or another's: then the next look finds it.
                if time.monotonic() > deadline:
                    raise UserError(
                        f"The cluster at {cluster.get_address()} does not take the job: {_brief(error)}."
                    ) from error
            time.sleep(RETRY_S)


def _newest(cluster: Cluster, name: str) -> tuple[int, Any]:
    """(number, job) of the last attempt; (0, None) if there is none."""
    found = (
        (re.fullmatch(rf"{name}-(\d+)", j.submission_id or ""), j) for j in cluster.list_jobs()
    )
    attempts = [(int(match[1]), job) for match, job in found if match]
    return max(attempts, key=lambda attempt: attempt[0], default=(0, None))


# ── following ────────────────────────────────────────────────────────────────────────────────────


def follow(
    cluster: Cluster,
    job_id: str,
    show: Callable[[str], None],
    say: Callable[[str], None],
    lost_after_s: float = LOST_AFTER_S,
) -> dict[str, Any]:
    """Waits for the end of a job; gives what Ray tells of it then. Each piece of its log goes to `show`,
    once; `say` is told of an outage. Raises `LostJobError` when the cluster does not answer for
    `lost_after_s` seconds, or no longer knows the job.
    """
    return asyncio.run(_Follower(cluster, job_id, show, say, lost_after_s).follow())


def exit_code(job: dict[str, Any]) -> int:
    """What a job that ended as Ray tells it stands for: 0, `STOPPED_CODE`, or the code of its own; 128
    and the signal if one ended it, 1 if it never ran.
    """
    if job["status"] != "FAILED":
        return {"SUCCEEDED": 0, "STOPPED": STOPPED_CODE}[job["status"]]
    code = job["driver_exit_code"] or 1
    return 128 - code if code < 0 else code


class _Follower:
    def __init__(
        self,
        cluster: Cluster,
        job_id: str,
        show: Callable[[str], None],
        say: Callable[[str], None],
        lost_after_s: float,
    ) -> None:
        self._cluster, self._address = cluster, cluster.get_address()
        self._job_id = job_id
        self._url = f"{self._address}/api/jobs/{job_id}"
        self._show, self._say, self._lost_after_s = show, say, lost_after_s
        self._shown = 0  # characters of the log
        self._failed_at = -QUIET_S
        self._answered_at = time.monotonic()

    async def follow(self) -> dict[str, Any]:
        limits = aiohttp.ClientTimeout(total=None, sock_connect=ANSWER_S)
        async with aiohttp.ClientSession(headers=self._cluster.headers, timeout=limits) as session:
            reading = asyncio.create_task(self._read(session))
            try:
                while True:
                    job = await self._ask(session, self._url)
                    if job["status"] in ("SUCCEEDED", "FAILED", "STOPPED"):
                        break
                    done, _ = await asyncio.wait([reading], timeout=POLL_S)
                    for task in done:  # it ends by an exception only
                        task.result()
            finally:
                reading.cancel()
                with suppress(asyncio.CancelledError):
                    await reading
            # A stream may break off so that it looks like the end: the whole log tells what is missing.
            self._take((await self._ask(session, f"{self._url}/logs"))["logs"], 0)
            return job

    async def _read(self, session: aiohttp.ClientSession) -> None:
        """Reads the log for as long as it is let. Ray begins each stream at the log's beginning."""
        while True:
            at = 0
            try:
                async with session.ws_connect(f"{self._url}/logs/tail", timeout=STREAM) as stream:
                    async for message in stream:
                        if message.type is aiohttp.WSMsgType.TEXT:
                            at = self._take(message.data, at)
                if stream.close_code != aiohttp.WSCloseCode.OK:
                    self._note_failure()
            except TimeoutError:  # a quiet job, or a connection that a gateway has forgotten
                pass
            except aiohttp.ClientError:
                self._note_failure()
            await asyncio.sleep(RETRY_S)

    def _take(self, text: str, at: int) -> int:
        """Shows what is new of a piece of the log that begins at `at`; gives where it ends."""
        if new := text[max(0, self._shown - at) :]:
            self._show(new)
        self._shown = max(self._shown, at + len(text))
        return at + len(text)

    async def _ask(self, session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
        """The answer to a request, which is repeated until there is one."""
        while True:
            try:
                async with session.get(url, timeout=aiohttp.ClientTimeout(ANSWER_S)) as answer:
                    text = await answer.text()
                    if answer.status in (401, 403):
                        raise _needs_token(self._address)
                    if answer.status == 404 and f"{self._job_id} does not exist" in text:
                        raise LostJobError(
                            f"The cluster at {self._address} no longer knows the job {self._job_id}: "
                            f"was its head replaced? Submit it again; what was stored counts."
                        )
                    answer.raise_for_status()
                    found: dict[str, Any] = json.loads(text)
                    self._answered_at = time.monotonic()
                    return found
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                self._note_failure()
                if time.monotonic() - self._answered_at > self._lost_after_s:
                    raise LostJobError(
                        f"The cluster at {self._address} has not answered for "
                        f"{self._lost_after_s / 60:.0f} minutes: how the job {self._job_id} ends is not "
                        f"known; the same command follows it when the cluster is back."
                    ) from error
            await asyncio.sleep(RETRY_S)

    def _note_failure(self) -> None:
        now = time.monotonic()
        if now - self._failed_at >= QUIET_S:
            self._say(
                f"The connection to {self._address} is lost. The job goes on; its log is read on as "
                f"soon as the cluster answers."
            )
        self._failed_at = now
