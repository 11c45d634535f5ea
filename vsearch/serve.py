"""The query service on Ray Serve.

    HTTP ─▶ Gateway ─▶ TextEncoder, in batches
                   └─▶ IndexPart 1 … n, side by side

With one part everything is in the gateway's process, for latency; with more each part of the index and
the text encoder are deployments of their own, which scale by themselves.
"""

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from vsearch import runtime
from vsearch.config import UserError
from vsearch.corpus import Corpus
from vsearch.encoders import ClipEncoder
from vsearch.keys import Keys
from vsearch.query import Vector
from vsearch.routes import RETRY_AFTER_S, make_app
from vsearch.search import Engine
from vsearch.service import (
    MEDIA,
    PICTURES,
    SEARCHES,
    LoadedPart,
    Method,
    MissingPartError,
    Record,
    Service,
    UnavailableError,
    follow,
    search_threads,
)
from vsearch.versions import Versions

NAME = "vsearch"
ROWS_A_PART = 20_000_000
"""So many rows take about 3 GB of memory and answer within about 10 ms."""
BATCH = 32
AT_ONCE = SEARCHES + MEDIA + PICTURES
LOGGING = LoggingConfig(encoding="JSON")


class ServeArgs(BaseModel):
    """Arguments of the application in a Serve config file."""

    model_config = ConfigDict(extra="forbid")

    corpus: str = Field(description="where the corpus lives: a folder or an fsspec URL")
    parts: int | None = Field(
        None, ge=1, description="parts of the index; without it by the number of rows"
    )
    part_replicas: int = Field(
        1, ge=1, description="replicas of each part, where there are several"
    )
    keys: str | None = Field(None, description="file of API keys, as 'vsearch key' makes it")
    no_auth: bool = Field(
        False, description="answer without keys to everybody; else only to this machine's own names"
    )
    refresh_s: float = Field(5.0, gt=0, description="how often the snapshot in use is looked up")


class TextEncoder:
    """Sentences to unit vectors, as many at once as came while others were encoded. Ray Serve's own
    batches are closed before their turn comes: without a delay each would hold one sentence.
    """

    def __init__(self, corpus_url: str) -> None:
        self._encoder = ClipEncoder.recorded(Corpus(corpus_url).config.clip)
        self._encoder.encode_text(["warm-up"])
        self._waiting: deque[tuple[str, asyncio.Future[Vector]]] = deque()
        self._working: asyncio.Task[None] | None = None

    async def encode(self, sentence: str) -> Vector:
        """The unit vector, float32 (dim,)."""
        vector = asyncio.get_running_loop().create_future()
        self._waiting.append((sentence, vector))
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return await vector

    async def _work(self) -> None:
        while self._waiting:
            count = min(BATCH, len(self._waiting))
            batch = [self._waiting.popleft() for _ in range(count)]
            sentences = [sentence for sentence, _ in batch]
            try:
                found = await asyncio.to_thread(self._encoder.encode_text, sentences)
            except Exception as error:  # is raised where each was asked for
                for _, vector in batch:
                    if not vector.done():
                        vector.set_exception(error)
            else:
                for (_, vector), value in zip(batch, found, strict=True):
                    if not vector.done():  # else whoever asked has left
                        vector.set_result(value)


class IndexPart:
    """A part of the index in a process of its own; it follows the snapshot in use by itself."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it, so that there is a loop to follow in
        self, corpus_url: str, number: int, parts: int, refresh_s: float
    ) -> None:
        versions = Versions(corpus_url, slice(number, None, parts))
        self._part = LoadedPart(versions, search_threads())
        self._following = asyncio.create_task(follow(versions, refresh_s))

    async def ask(self, snapshot: str, method: Method, *arguments: Any) -> Any:
        return await self._part.ask(snapshot, method, *arguments)


class RemotePart:
    """A part of the index behind a handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def ask(self, snapshot: str, method: Method, *arguments: Any) -> Any:
        try:
            return await self._handle.ask.remote(snapshot, method, *arguments)
        except RayTaskError:  # a fault of ours, in another process
            raise
        except BackPressureError:
            raise MissingPartError("has too much to do") from None
        except (RayError, DeploymentUnavailableError) as error:
            logging.getLogger("ray.serve").warning("a part of the index is away: %r", error)
            raise MissingPartError("is away") from None


async def _encode_afar(encoder: DeploymentHandle, sentence: str) -> Vector:
    try:
        return await encoder.encode.remote(sentence)
    except RayTaskError:
        raise
    except (RayError, DeploymentUnavailableError, BackPressureError) as error:
        raise UnavailableError("Sentences cannot be encoded now: try again soon.") from error


class Gateway:
    """Takes requests; holds the whole index itself where it is given no handles to its parts."""

    def __init__(
        self,
        args: ServeArgs,
        encoder: DeploymentHandle | None = None,
        *parts: DeploymentHandle,
    ) -> None:
        self._args = args
        encode = partial(_encode_afar, encoder) if encoder else TextEncoder(args.corpus).encode
        self._service = Service(
            args.corpus,
            Versions(args.corpus, slice(0, 0) if parts else slice(None)),
            encode,
            [RemotePart(handle) for handle in parts],
            _measurements(),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        keys = Keys.load(Path(self._args.keys)) if self._args.keys else None
        local = keys is None and not self._args.no_auth
        background = partial(self._service.run, self._args.refresh_s)
        return make_app(self._service, keys, local, background)


def _measurements() -> Record:
    """Metrics as Ray exports them to Prometheus, with the deployment and the replica as labels."""
    from ray.serve import metrics

    steps = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    known: dict[str, Any] = {
        "queries": metrics.Counter("vsearch_queries", "answers, by outcome", ("outcome",)),
        "refused": metrics.Counter("vsearch_refused", "refused for too much under way", ("kind",)),
        "missing_parts": metrics.Counter("vsearch_missing_parts", "parts that did not answer"),
        "text_cache": metrics.Counter("vsearch_text_cache", "look-ups of sentences", ("outcome",)),
        "query_seconds": metrics.Histogram("vsearch_query_seconds", "whole queries", steps),
        "step_seconds": metrics.Histogram(
            "vsearch_step_seconds", "steps of queries", steps, ("step",)
        ),
        "rows": metrics.Gauge("vsearch_rows", "rows of the snapshot in use"),
        "shards": metrics.Gauge("vsearch_shards", "shards of the snapshot in use"),
        "published": metrics.Gauge("vsearch_snapshot_published", "when, in seconds since 1970"),
        "searches": metrics.Gauge("vsearch_searches_under_way", "queries being answered"),
    }

    def record(name: str, value: float, labels: dict[str, str]) -> None:
        metric = known[name]
        if isinstance(metric, metrics.Counter):
            metric.inc(value, labels)
        elif isinstance(metric, metrics.Gauge):
            metric.set(value, labels)
        else:
            metric.observe(value, labels)

    return record


# ── the application ──────────────────────────────────────────────────────────────────────────────


def build_app(args: ServeArgs) -> Application:
    """The application for `serve deploy`: `import_path: vsearch.serve:build_app`."""
    return _application(args, lambda replicas: 1.0)


def _application(args: ServeArgs, cores: Callable[[int], float]) -> Application:
    """`cores` says how many each of so many replicas asks Ray for."""
    if args.keys:
        Keys.load(Path(args.keys))  # a file that is not there is said here, in one sentence
    parts = args.parts or parts_for(Engine(args.corpus, part=slice(0, 0)).manifest["rows"])
    asked = {"num_cpus": cores(1 if parts == 1 else 2 + parts * args.part_replicas)}
    # What is under way at once is limited by the service, which refuses with 429 and a time to wait; so
    # does the proxy, where the service is too busy even for that.
    gateway = serve.deployment(serve.ingress()(Gateway)).options(
        name="Gateway",
        ray_actor_options=asked,
        max_ongoing_requests=AT_ONCE,
        max_queued_requests=AT_ONCE // 2,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
        logging_config=LOGGING,
        graceful_shutdown_timeout_s=30,
        health_check_period_s=10,
    )
    if parts == 1:
        return gateway.bind(args)
    encoder = serve.deployment(TextEncoder).options(
        name="TextEncoder",
        ray_actor_options=asked,
        max_ongoing_requests=4 * BATCH,
        logging_config=LOGGING,
    )
    handles = [
        serve.deployment(IndexPart)
        .options(
            name=f"IndexPart-{number}",
            num_replicas=args.part_replicas,
            ray_actor_options=asked,
            max_ongoing_requests=64,
            max_queued_requests=128,
            logging_config=LOGGING,
        )
        .bind(args.corpus, number, parts, args.refresh_s)
        for number in range(parts)
    ]
    return gateway.bind(args, encoder.bind(args.corpus), *handles)


def parts_for(rows: int) -> int:
    """How many parts an index of so many rows gets."""
    return max(1, -(-rows // ROWS_A_PART))


def _require_free(host: str, port: int) -> None:
    """Ray's proxy would share a taken port without a word."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"Cannot listen on {host}:{port} ({error.strerror}): choose another --port."
            ) from error


def stop() -> None:
    """Takes the service down, also from a cluster that goes on; what it accepted is finished."""
    serve.delete(NAME)


def start(args: ServeArgs, host: str = "127.0.0.1", port: int = 8000) -> str:
    """Serves a corpus from this machine until Ray ends; returns the page's address."""
    engine = Engine(args.corpus, part=slice(0, 0))  # a missing index is said here, in one sentence
    if not runtime.on_cluster():
        _require_free(host, port)
    runtime.connect()
    serve.start(http_options={"host": host, "port": port})
    whole = args.model_copy(update={"corpus": engine.corpus.url})
    # On one machine more parts than cores share them, rather than wait for cores for ever.
    cores = runtime.cpus()
    with runtime.user_errors():
        application = (
            build_app(whole)
            if runtime.on_cluster()
            else _application(whole, lambda replicas: min(1.0, cores * 99 // replicas / 100))
        )
        serve.run(application, name=NAME, route_prefix="/")
    return f"http://{'localhost' if host in ('127.0.0.1', '0.0.0.0') else host}:{port}/"
