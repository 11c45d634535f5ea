"""What the service does with a request, without Ray and HTTP: asks the parts of the index, merges what
comes in time, follows the snapshot in use.

    request ─▶ Service ─▶ vectors of its terms ─▶ every Part, one snapshot ─▶ merged segments
"""

import asyncio
import logging
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from vsearch.api import MOST_SEGMENTS, from_cursor, to_cursor
from vsearch.confidence import Scale
from vsearch.config import UserError
from vsearch.corpus import Corpus
from vsearch.coverage import VideoState, totals
from vsearch.decoder import BusyError, Decoders
from vsearch.filters import Filter
from vsearch.query import Term, Vector, compose, described
from vsearch.search import Engine, Found, Results, Timeline, shown
from vsearch.versions import Versions

LOG = logging.getLogger("ray.serve")
LIMIT_S = 10.0
"""So long may an answer take in all."""
PART_LIMIT_S = 1.0
"""So long is waited for one of several parts; then the others answer without it."""
HURRY_S = 0.2
"""So long for a part that was late within the last `LATE_S` seconds: one that is gone must not make
every answer late."""
LATE_S = 5.0
SEARCHES, MEDIA, PICTURES, IMAGES = 32, 64, 32, 16
"""So many are under way at once in one process; more are refused, to be asked again."""
VECTORS_KEPT = 10_000
PICTURE_BYTES_KEPT = 64 << 20
COVERAGE_S = 60.0
VALUES_LISTED = 100
NOT_READ_YET = "The videos of the corpus are being read: try again soon."

Method = Literal["find", "vector_at", "spreads", "timeline"]
Record = Callable[[str, float, dict[str, str]], None]
K = TypeVar("K")
V = TypeVar("V")


class GoneError(Exception):
    """The snapshot that a cursor belongs to is no longer there."""


class UnavailableError(Exception):
    """The answer cannot be had now; the message says why, for people."""


class MissingPartError(Exception):
    """A part of the index does not answer; the message says why."""


@dataclass(frozen=True)
class NotLoaded:
    """What a part says when it does not have the snapshot: which it has, the current one first."""

    loaded: tuple[str, ...]


class Part(Protocol):
    """A part of the index, here or elsewhere."""

    async def ask(self, snapshot: str, method: Method, *arguments: Any) -> Any:
        """What the method of `Engine` gives, or `NotLoaded`. Raises `MissingPartError`."""


class LoadedPart:
    """A part of the index in this process."""

    def __init__(self, versions: Versions, threads: Executor) -> None:
        self._versions, self._threads = versions, threads

    async def ask(self, snapshot: str, method: Method, *arguments: Any) -> Any:
        engine = self._versions.get(snapshot)
        if engine is None:
            return NotLoaded(tuple(engine.snapshot for engine in self._versions.loaded))
        call = partial(getattr(engine, method), *arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def search_threads() -> ThreadPoolExecutor:
    """Threads for searches: FAISS computes outside of Python's lock."""
    return ThreadPoolExecutor(max(2, os.cpu_count() or 1), "search")


async def follow(
    versions: Versions, every_s: float, ready: Callable[[Engine], Awaitable[bool]] | None = None
) -> None:
    """Takes up each new snapshot once it is loaded, and `ready` agrees; for ever."""
    while True:
        await asyncio.sleep(every_s)
        try:
            engine = await asyncio.to_thread(versions.load)
            if engine and (ready is None or await ready(engine)):
                await asyncio.to_thread(versions.take, engine)
                LOG.info("snapshot %s is in use", engine.snapshot)
            versions.forget()
        except Exception:  # the storage may not answer for a while: what is loaded goes on
            LOG.exception("the snapshot in use cannot be read")


class Kept(Generic[K, V]):
    """The values used last, of at most `most` in all by `size`."""

    def __init__(self, most: int, size: Callable[[V], int] = lambda _: 1) -> None:
        self._most, self._size, self._held = most, size, 0
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def put(self, key: K, value: V) -> None:
        if key in self._values:
            self._held -= self._size(self._values.pop(key))
        self._values[key] = value
        self._held += self._size(value)
        while self._held > self._most:
            self._held -= self._size(self._values.popitem(last=False)[1])


@dataclass(frozen=True)
class Answer:
    """What was found in one snapshot, what of the index had no say in it, and where it goes on."""

    results: Results
    missing: list[str]
    cursor: str | None

    def to_dict(self) -> dict[str, Any]:
        """As `api.SearchOut`."""
        more = {"partial": bool(self.missing), "missing": self.missing, "cursor": self.cursor}
        return self.results.to_dict() | more


@dataclass(frozen=True)
class Catalogue:
    """What is known of all videos of the corpus, when it was last read."""

    states: dict[str, VideoState]
    totals: dict[str, Any]
    rows: list[dict[str, Any]]


class _StaleError(Exception):
    """A part does not have the snapshot."""


class Service:
    """Answers from one snapshot at a time. `encode_text` gives a sentence's unit vector; `parts` are
    asked for segments, without them the shards of `versions` in this process; `versions` tells of
    videos; `record` takes measurements.
    """

    def __init__(
        self,
        corpus_url: str,
        versions: Versions,
        encode_text: Callable[[str], Awaitable[Vector]],
        parts: Sequence[Part] = (),
        record: Record = lambda name, value, labels: None,
        decoders: Decoders | None = None,
    ) -> None:
        self._corpus = Corpus(corpus_url)
        self.versions, self._encode_text = versions, encode_text
        self._afar = bool(parts)
        self._parts = list(parts) or [LoadedPart(versions, search_threads())]
        self._record = record
        self._decoders = decoders or Decoders(2)
        self._under_way: Counter[str] = Counter()
        self._late_until = [0.0] * len(self._parts)
        self._vectors: Kept[str, Vector] = Kept(VECTORS_KEPT)
        self._pictures: Kept[tuple[str, float, int], bytes] = Kept(PICTURE_BYTES_KEPT, len)
        self._picture_threads = ThreadPoolExecutor(2, "pictures")
        self.catalogue: Catalogue | None = None

    def close(self) -> None:
        """Ends the decoders."""
        self._decoders.close()
        self._picture_threads.shutdown(wait=False, cancel_futures=True)

    # ── staying current ──────────────────────────────────────────────────────────────────────────

    async def run(self, every_s: float) -> None:
        """Follows the snapshot in use, and the videos of the corpus; for ever."""
        ready = self.ready if self._afar else None
        await asyncio.gather(follow(self.versions, every_s, ready), self._watch())

    async def ready(self, engine: Engine) -> bool:
        """Whether the parts have a snapshot."""
        asked = [
            self._ask(number, engine, "vector_at", "", 0.0) for number in range(len(self._parts))
        ]
        found = await asyncio.gather(*asked, return_exceptions=True)
        return not any(isinstance(answer, NotLoaded) for answer in found)

    async def _watch(self) -> None:
        """Reads what the corpus knows of its videos again and again; for ever."""
        while True:
            began = time.monotonic()
            try:
                self.catalogue = await asyncio.to_thread(self._read_catalogue)
            except Exception:  # the last one stays; the next attempt follows
                LOG.exception("the videos of the corpus cannot be read")
            self._measure()
            await asyncio.sleep(max(COVERAGE_S, 20 * (time.monotonic() - began)))

    def _measure(self) -> None:
        manifest = self.versions.current.manifest
        published = datetime.fromisoformat(manifest["created_at"]).timestamp()
        self._record("rows", manifest["rows"], {})
        self._record("shards", len(manifest["shards"]), {})
        self._record("published", published, {})
        self._record("searches", self._under_way["search"], {})

    def _read_catalogue(self) -> Catalogue:
        states = self._corpus.states()
        by_id = {state.video_id: state for state in states}
        return Catalogue(by_id, totals(states), self._corpus.videos())

    # ── load ─────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def admitted(self, kind: str, most: int) -> Iterator[None]:
        """Counts what is under way. Raises `BusyError` where that is as much as may be."""
        if self._under_way[kind] >= most:
            self._record("refused", 1, {"kind": kind})
            raise BusyError
        self._under_way[kind] += 1
        try:
            yield
        finally:
            self._under_way[kind] -= 1

    async def read(self, call: Callable[[], V]) -> V:
        """The result of a call that may decode images. Few of them run at once, as an image may take a
        gigabyte while it is decoded. Raises `BusyError`.
        """
        with self.admitted("image", IMAGES):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._picture_threads, call)

    # ── searching ────────────────────────────────────────────────────────────────────────────────

    async def search(
        self,
        terms: Sequence[Term],
        where: Filter | None = None,
        limit: int = 12,
        max_gap_s: float = 1.0,
        min_score: float | None = None,
        cursor: str | None = None,
        min_confidence: float = 0.0,
    ) -> Answer:
        """The segments that answer; those less sure than `min_confidence` are hidden and
        counted. Raises `UserError`, `BusyError`, `GoneError`, `UnavailableError`."""
        snapshot, skip = from_cursor(cursor) if cursor else (None, 0)
        with self.admitted("search", SEARCHES):
            began = time.perf_counter()

            async def answer(engine: Engine, lenient: bool) -> Answer:
                vector, scale, missing = await self._vector(engine, terms, lenient)
                encoded_s = time.perf_counter() - began
                until = skip + limit
                found: list[Found]
                found, lost = await self._ask_all(
                    engine, lenient, "find", vector, until, max_gap_s, where, min_score
                )
                merged = sorted(
                    (segment for part in found for segment in part.segments),
                    key=lambda segment: -segment.score,
                )
                more = len(merged) > until or any(part.more for part in found)
                steps = {
                    step: max((part.took_s[step] for part in found), default=0.0)
                    for step in ("search", "rerank", "group")
                }
                told = shown(merged[skip:until], more, scale, min_confidence)
                follows = told.more and until < MOST_SEGMENTS
                results = Results(
                    query=described(terms),
                    snapshot=engine.snapshot,
                    took_ms=(time.perf_counter() - began) * 1000,
                    background=engine.background(vector),
                    took_s={"encode": encoded_s, **steps},
                    **told._asdict(),
                )
                cursor = to_cursor(engine.snapshot, until) if follows else None
                return Answer(results, sorted({*missing, *lost}), cursor)

            found = await self._in_time(self._on_one_snapshot(answer, snapshot))
            for step, seconds in found.results.took_s.items():
                self._record("step_seconds", seconds, {"step": step})
            self._record("query_seconds", found.results.took_ms / 1000, {})
            self._record("queries", 1, {"outcome": "partial" if found.missing else "whole"})
            return found

    async def timeline(
        self, video_id: str, terms: Sequence[Term], steps: int
    ) -> tuple[Timeline, str, float]:
        """(timeline, snapshot, background) of a video. Raises as `search`; `LookupError` where the
        video is not in the index.
        """
        with self.admitted("search", SEARCHES):

            async def answer(engine: Engine, lenient: bool) -> tuple[Timeline, str, float]:
                self.video(video_id)
                vector, _, _ = await self._vector(engine, terms, lenient)
                found, missing = await self._ask_all(
                    engine, lenient, "timeline", video_id, vector, steps
                )
                there = next((timeline for timeline in found if timeline), None)
                if there is None:
                    raise UnavailableError("; ".join(missing) or "The video has no rows.")
                return there, engine.snapshot, engine.background(vector)

            return await self._in_time(self._on_one_snapshot(answer, None))

    async def _in_time(self, answer: Awaitable[V]) -> V:
        try:
            return await asyncio.wait_for(answer, LIMIT_S)
        except TimeoutError:
            self._record("queries", 1, {"outcome": "late"})
            raise UnavailableError(f"No answer within {LIMIT_S:g} s: try again later.") from None

    async def _on_one_snapshot(
        self, answer: Callable[[Engine, bool], Awaitable[V]], snapshot: str | None
    ) -> V:
        """The answer of one snapshot that all parts have: the one asked for, else the newest."""
        if snapshot is not None:
            engine = self.versions.get(snapshot)
            if engine is None:
                raise GoneError("The index has changed since: search again.")
            return await answer(engine, True)
        for engine in self.versions.loaded:
            try:
                return await answer(engine, False)
            except _StaleError:
                continue
        # Parts are ahead of us: one that was started again knows the newest snapshot only.
        newest = await asyncio.to_thread(self.versions.load)
        if newest:
            await asyncio.to_thread(self.versions.take, newest)
        return await answer(self.versions.current, True)

    async def _vector(
        self, engine: Engine, terms: Sequence[Term], lenient: bool
    ) -> tuple[Vector, Scale | None, list[str]]:
        """The query's vector (dim,), the scale of its scores, and which parts were missing from what it
        needs.
        """
        found = await asyncio.gather(*(self._vector_of(engine, t, lenient) for t in terms))
        vectors = [vector for vector, _ in found]
        missing = [reason for _, reasons in found for reason in reasons]
        spreads = [1.0]
        if len(vectors) > 1:
            parts, lost = await self._ask_all(engine, lenient, "spreads", vectors)
            missing += lost
            if not parts:
                raise UnavailableError("; ".join(missing))
            spreads = np.sqrt(np.mean(np.square(parts), axis=0)).tolist()
        vector = compose(vectors, [term.weight for term in terms], spreads)
        return vector, engine.scale(terms, vectors, spreads), missing

    async def _vector_of(
        self, engine: Engine, term: Term, lenient: bool
    ) -> tuple[Vector, list[str]]:
        if term.text is not None:
            vector = self._vectors.get(term.text)
            self._record("text_cache", 1, {"outcome": "miss" if vector is None else "hit"})
            if vector is None:
                vector = await self._encode_text(term.text)
                self._vectors.put(term.text, vector)
            return vector, []
        if term.picture is not None:
            call = partial(_encode_picture, engine, term.picture)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._picture_threads, call), []
        assert term.video_id is not None and term.at_s is not None
        if term.video_id not in engine.numbers:
            raise UserError(f"There is no video {term.video_id} in the index.")
        parts, missing = await self._ask_all(engine, lenient, "vector_at", term.video_id, term.at_s)
        there = next((vector for vector in parts if vector is not None), None)
        if there is None:
            raise UnavailableError("; ".join(missing) or "The video has no rows.")
        return there, missing

    async def _ask_all(
        self, engine: Engine, lenient: bool, method: Method, *arguments: Any
    ) -> tuple[list[Any], list[str]]:
        """What the parts answer, and which do not and why. Raises `_StaleError` if one does not have the
        snapshot, unless `lenient`: then it is missing.
        """
        asked = [self._ask(n, engine, method, *arguments) for n in range(len(self._parts))]
        answers, missing = [], []
        for number, answer in enumerate(await asyncio.gather(*asked, return_exceptions=True)):
            name = f"part {number + 1} of {len(self._parts)}"
            if isinstance(answer, NotLoaded):
                if not lenient:
                    raise _StaleError
                missing.append(f"{name} does not have the snapshot yet")
            elif isinstance(answer, MissingPartError):
                missing.append(f"{name} {answer}")
            elif isinstance(answer, BaseException):
                raise answer
            else:
                answers.append(answer)
        for _ in missing:
            self._record("missing_parts", 1, {})
        return answers, missing

    async def _ask(self, number: int, engine: Engine, method: Method, *arguments: Any) -> Any:
        asked = self._parts[number].ask(engine.snapshot, method, *arguments)
        if len(self._parts) == 1:
            return await asked
        limit_s = HURRY_S if time.monotonic() < self._late_until[number] else PART_LIMIT_S
        try:
            answer = await asyncio.wait_for(asked, limit_s)
            self._late_until[number] = 0.0
            return answer
        except TimeoutError:
            self._late_until[number] = time.monotonic() + LATE_S
            raise MissingPartError(f"did not answer within {limit_s:g} s") from None
        except MissingPartError:
            self._late_until[number] = time.monotonic() + LATE_S
            raise

    # ── videos ───────────────────────────────────────────────────────────────────────────────────

    def video(self, video_id: str) -> dict[str, Any]:
        """A video of the index, as `schema.SNAPSHOT_VIDEOS`. Raises `LookupError`."""
        for engine in self.versions.loaded:
            if video_id in engine.numbers:
                return engine.videos[engine.numbers[video_id]]
        raise LookupError("There is no such video in the index.")

    async def picture(self, video_id: str, at_s: float, width: int) -> bytes:
        """A frame of a video as JPEG. Raises `LookupError`, `BusyError`, `VideoError`, `OSError`."""
        video = self.video(video_id)
        key = (video_id, round(at_s, 3), width)
        found = self._pictures.get(key)
        if found is None:
            with self.admitted("picture", PICTURES):
                found = await asyncio.to_thread(
                    self._decoders.picture, video["uri"], at_s + video["zero_s"], width
                )
            self._pictures.put(key, found)
        return found

    async def preview(self, video_id: str, start_s: float, end_s: float) -> bytes:
        """A stretch of a video as MP4 that every browser plays. Raises as `picture`."""
        video = self.video(video_id)
        zero_s = video["zero_s"]
        with self.admitted("preview", PICTURES // 8):
            return await asyncio.to_thread(
                self._decoders.preview, video["uri"], start_s + zero_s, end_s + zero_s
            )

    def status(self) -> dict[str, Any]:
        """As `api.StatusOut`."""
        engine = self.versions.current
        now = time.monotonic()
        late = [n for n, until in enumerate(self._late_until) if now < until]
        return {
            "snapshot": engine.snapshot,
            "space": engine.manifest["space"],
            "rows": engine.manifest["rows"],
            "videos": len(engine.videos),
            "hours": round(sum(v["duration_s"] or 0.0 for v in engine.videos) / 3600, 3),
            "coverage": self._coverage(engine),
            "tags": _tags(engine.videos),
            "parts": len(self._parts),
            "missing": [f"part {n + 1} of {len(self._parts)}" for n in late],
            "problem": self.versions.problem,
        }

    def _coverage(self, engine: Engine) -> dict[str, Any] | None:
        if self.catalogue is None:
            return None
        found = self.catalogue.totals
        return {
            **{
                name: found["videos"][name]
                for name in ("total", "indexed", "partial", "failed", "pending")
            },
            "not_in_index": sum(
                state.frames > 0 and video_id not in engine.numbers
                for video_id, state in self.catalogue.states.items()
            ),
            "expected_s": round(found["expected_s"], 3),
            "indexed_s": round(found["indexed_s"], 3),
        }

    def rows(self) -> list[dict[str, Any]]:
        """The videos of the corpus as `schema.VIDEOS`, as far as they were read."""
        return self.catalogue.rows if self.catalogue else []

    def state(self, video_id: str) -> dict[str, Any]:
        """As `api.VideoOut`. Raises `LookupError`, and `UnavailableError` as `videos` does."""
        if self.catalogue is None:
            raise UnavailableError(NOT_READ_YET)
        state = self.catalogue.states.get(video_id)
        if state is None:
            raise LookupError("The corpus knows no such video.")
        return asdict(state) | {"in_index": video_id in self.versions.current.numbers}

    def videos(self, text: str = "", status: str | None = None) -> list[dict[str, Any]]:
        """As `api.VideoOut`: those whose URI has `text` in it, with this status, sorted by URI. Raises
        `UnavailableError` until they were read for the first time.
        """
        if self.catalogue is None:
            raise UnavailableError(NOT_READ_YET)
        engine = self.versions.current
        return [
            asdict(state) | {"in_index": state.video_id in engine.numbers}
            for state in self.catalogue.states.values()
            if text.lower() in state.uri.lower() and status in (None, state.status)
        ]


def _encode_picture(engine: Engine, picture: Any) -> Vector:
    try:
        return engine.picture_encoder.encode(picture)
    except UserError as error:  # the model cannot be had on this machine
        raise UnavailableError(f"This service cannot search by image: {error}") from error


def _tags(videos: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    values: dict[str, set[str]] = {}
    for video in videos:
        for name, value in video["tags"].items():
            values.setdefault(name, set()).add(value)
    return {
        name: sorted(found)[:VALUES_LISTED]
        for name, found in sorted(values.items())[:VALUES_LISTED]
    }
