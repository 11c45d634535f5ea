"""Probing, decoding and showing in a process of its own, under limits of time and memory.

A broken file can crash FFmpeg, hang it, or make it ask for any amount of memory. Here that costs one
child process and a `DecoderDiedError`; the worker lives on. The child is kept for the next file.

    worker ──request──▶ child    over a socket, pickled (both ends are this program)
    worker ◀──spans──── child    pixels in a shared file without a name, the rest over the socket

>>> decoders = Decoders(2)
>>> jpeg = decoders.picture("/videos/clip.mp4", 12.4, 320)
"""

import contextlib
import functools
import math
import mmap
import multiprocessing.connection
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from vsearch import clips
from vsearch.config import Sampling, UserError
from vsearch.sampling import SpanRun
from vsearch.schema import fingerprint
from vsearch.storage import is_transient, open_url
from vsearch.video import DecodedSpan, VideoError, VideoInfo, decode, probe

STALL_S = 60.0
"""So long may a decoder work on one packet. Waiting for the storage, which has limits of its own, is no
stall."""

SPAN_LIMIT_S = 1800.0
"""So long may one span, or a probe, take in all: 512 frames of 8K at 0.3 frames a second."""

MEMORY_BYTES = 3 << 30
"""What a decoder may allocate: a 16-frame window of 8K pictures takes 0.8 GiB, each thread as much."""

MEMORY_RESERVE = 8
"""FFmpeg loses frames in silence where it gets no memory, so it is stopped when a part of that many of
what it may allocate is left."""

ATTEMPTS = 2
"""A span, or a header, that killed its decoder so often is quarantined."""

BEAT_S = 1.0

SHOWN_STALL_S = 10.0
SHOWN_LIMIT_S = 20.0
"""What somebody waits for may take so long; of a preview, each second adds one."""

FREE_WITHIN_S = 5.0
"""So long a request waits for a decoder that is free."""


class DecoderDiedError(VideoError):
    """The decoder crashed, hung or wanted too much memory; the message says which."""


class BusyError(Exception):
    """Every decoder has been at work for longer than a request may wait, or they were closed."""


@dataclass(frozen=True)
class Limits:
    """What a decoder may take: seconds without progress, seconds a span, bytes of memory."""

    stall_s: float = STALL_S
    span_s: float = SPAN_LIMIT_S
    memory_bytes: int = MEMORY_BYTES


class _Shared:
    """A file without a name that both processes see as memory: nothing is left behind, whoever dies."""

    def __init__(self, handle: int | None = None) -> None:
        """Makes one, or opens that of the other process."""
        if handle is not None:
            self.handle = handle
        elif hasattr(os, "memfd_create"):  # not /dev/shm: in a container it has 64 MiB
            import fcntl  # not on Windows

            self.handle = os.memfd_create("vsearch", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            # A file that got shorter would end the process that looks into it.
            fcntl.fcntl(self.handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        else:
            with tempfile.TemporaryFile(buffering=0) as file:
                self.handle = os.dup(file.fileno())
        self._memory = np.empty(0, np.uint8)

    def array(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Its beginning, without a copy."""
        size = math.prod(shape)
        if size > len(self._memory):
            if size > os.fstat(self.handle).st_size:
                os.ftruncate(self.handle, size)
            self._memory = np.frombuffer(mmap.mmap(self.handle, size), np.uint8)
        return self._memory[:size].reshape(shape)

    def close(self) -> None:
        self._memory = self._memory[:0].copy()  # a mapping holds the file too
        os.close(self.handle)


class Decoder:
    """A child process that probes, decodes and shows. One request at a time: a new one ends a decoding that
    was left half-way. `close` ends the child.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._child: subprocess.Popen[bytes] | None = None
        self._busy: object = None  # one for each request

    def probe(
        self, uri: str, expected: tuple[int, str], identify: Callable[[str], None] = lambda _: None
    ) -> VideoInfo:
        """What `video.probe` finds. `identify` gets the `video_id` as soon as it is known, also of a
        file that cannot be decoded. `expected` is the file's size in bytes and its mark. Raises
        `VideoError`, `DecoderDiedError`, and what the storage raises as `OSError`.
        """
        answers = dict[str, Any]()
        for kind, value in self._ask(("probe", uri, expected, None)):
            answers[kind] = value
            if kind == "video_id":
                identify(value)
        return answers["info"]

    def decode(
        self,
        uri: str,
        expected: tuple[int, str],
        short_side_px: int,
        sampling: Sampling,
        run: SpanRun,
    ) -> Iterator[tuple[DecodedSpan, float]]:
        """The spans of a run as `video.decode` gives them, each with the seconds of processor time
        that it took. Raises as `probe` does.
        """
        for kind, value in self._ask(("decode", uri, expected, (short_side_px, sampling, run))):
            if kind == "span":
                span, shape, seconds = value
                span.pixels = self._shared.array(shape).copy()
                self._send("go on")
                yield span, seconds

    def picture(self, uri: str, pts_s: float, width_px: int) -> bytes:
        """The JPEG that `clips.picture` gives. Raises as `probe` does, and `UserError` for a time or
        width that makes no sense.
        """
        return self._shown(("picture", uri, None, (pts_s, width_px)))

    def preview(self, uri: str, start_s: float, end_s: float) -> bytes:
        """The MP4 file that `clips.preview` gives. Raises as `picture` does."""
        clips.check_preview(start_s, end_s)
        limits = replace(self._limits, span_s=self._limits.span_s + end_s - start_s)
        return self._shown(("preview", uri, None, (start_s, end_s)), limits)

    def _shown(self, request: tuple[Any, ...], limits: Limits | None = None) -> bytes:
        shown: bytes = dict(self._ask(request, limits))["shown"]
        return shown

    def close(self) -> None:
        """Ends the child; the next request starts another."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._socket.close()
            self._shared.close()
            assert self._child.stdin is not None
            self._child.stdin.close()
            self._child = None
        self._busy = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._shared = _Shared()
        handles = (theirs.fileno(), self._shared.handle)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "vsearch.decoder", *map(str, handles)],
            stdin=subprocess.PIPE,  # its end tells the child that this process is gone
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # FFmpeg's own chatter; what matters comes as a message
            pass_fds=handles,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        self._socket = multiprocessing.connection.Connection(ours.detach())

    def _ask(
        self, request: tuple[Any, ...], limits: Limits | None = None
    ) -> Iterator[tuple[str, Any]]:
        # It may have died between two requests, or still be busy with one that was left half-way.
        if self._busy or (self._child is not None and self._child.poll() is not None):
            self.close()
        mine = self._busy = object()
        try:
            if self._child is None:
                self._start()
            self._send((request, self._limits))
            while (message := self._receive(limits or self._limits))[0] not in ("done", "error"):
                yield message
                if self._busy is not mine:
                    raise RuntimeError("the decoder was closed, or given another request")
            self._busy = None
            if message[0] == "error":
                raise message[1]
        finally:
            if self._busy is mine:  # crashed, hung, or given up half-way
                self.close()

    def _send(self, message: Any) -> None:
        try:
            self._socket.send(message)
        except ConnectionError:
            raise DecoderDiedError(self._cause_of_death()) from None

    def _receive(self, limits: Limits) -> tuple[str, Any]:
        """The next message that is more than a sign of life."""
        began = time.monotonic()
        while True:
            left_s = limits.span_s - (time.monotonic() - began)
            if left_s <= 0:
                raise DecoderDiedError(f"decoding took more than {limits.span_s:g} s")
            if not self._socket.poll(min(left_s, limits.stall_s)):
                if left_s > limits.stall_s:
                    raise DecoderDiedError(
                        f"the decoder hung: nothing came for {limits.stall_s:g} s"
                    )
                continue
            try:
                kind, value = self._socket.recv()
            except (EOFError, ConnectionError):
                raise DecoderDiedError(self._cause_of_death()) from None
            if kind == "memory":
                gib = limits.memory_bytes / (1 << 30)
                raise DecoderDiedError(f"the decoder wanted more than {gib:g} GiB of memory")
            if kind != "beat":
                return kind, value

    def _cause_of_death(self) -> str:
        assert self._child is not None
        code = self._child.wait()
        return f"the decoder crashed ({signal.Signals(-code).name if code < 0 else f'exit {code}'})"


class Decoders:
    """A few decoders that any number of threads may ask for pictures and previews, with limits for
    what somebody waits for. `close` ends them.
    """

    def __init__(
        self,
        count: int = 2,
        limits: Limits | None = None,
        free_within_s: float = FREE_WITHIN_S,
    ) -> None:
        self._free_within_s = free_within_s
        self._all = [Decoder(limits or Limits(SHOWN_STALL_S, SHOWN_LIMIT_S)) for _ in range(count)]
        # The one that was used last comes first: the others' children may never be needed.
        self._free: queue.LifoQueue[Decoder] = queue.LifoQueue()
        for decoder in self._all:
            self._free.put(decoder)

    def picture(self, uri: str, pts_s: float, width_px: int) -> bytes:
        """As `Decoder.picture`. Raises `BusyError` where no decoder becomes free in time."""
        with self._free_one() as decoder:
            return decoder.picture(uri, pts_s, width_px)

    def preview(self, uri: str, start_s: float, end_s: float) -> bytes:
        """As `Decoder.preview`. Raises `BusyError` where no decoder becomes free in time."""
        with self._free_one() as decoder:
            return decoder.preview(uri, start_s, end_s)

    def close(self) -> None:
        """Ends the children once they have answered, which their limits see to; later requests are
        refused.
        """
        while self._all:
            decoder = self._free.get()
            decoder.close()
            self._all.remove(decoder)

    @contextlib.contextmanager
    def _free_one(self) -> Iterator[Decoder]:
        try:
            decoder = self._free.get(timeout=self._free_within_s)
        except queue.Empty:
            raise BusyError(f"no decoder became free within {self._free_within_s:g} s") from None
        try:
            yield decoder
        finally:
            self._free.put(decoder)


@functools.cache
def own_decoder() -> Decoder:
    """This process's decoder, kept for all of its tasks."""
    return Decoder()


# ── in the child ─────────────────────────────────────────────────────────────────────────────────


class _Server:
    """Answers requests until the other side is gone."""

    def __init__(self, channel: multiprocessing.connection.Connection, pixels: int) -> None:
        self._channel = channel
        self._shared = _Shared(pixels)
        self._sending = threading.Lock()
        self._last_beat = 0.0
        self._waiting = False
        self.memory_bytes = MEMORY_BYTES
        threading.Thread(target=self._beat_while_waiting, daemon=True).start()

    def send(self, kind: str, value: Any = None) -> None:
        with self._sending:
            self._channel.send((kind, value))

    def on_frame(self) -> None:
        """Looks after the limits of memory and time while a video is decoded."""
        if _allocated_bytes() > self.memory_bytes - self.memory_bytes // MEMORY_RESERVE:
            raise MemoryError
        self.beat()

    def beat(self) -> None:
        now = time.monotonic()
        if now - self._last_beat >= BEAT_S:
            self._last_beat = now
            self.send("beat")

    def _beat_while_waiting(self) -> None:
        while True:
            time.sleep(BEAT_S)
            if self._waiting:
                self.beat()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While it waits for the storage, time is a sign of life."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def answer(self, kind: str, uri: str, expected: tuple[int, str] | None, rest: Any) -> None:
        with self.waiting():
            source = open_url(uri, expected)
        with source:
            file = cast(BinaryIO, _Watched(source, self))
            if kind == "probe":
                assert expected is not None
                self.send("video_id", fingerprint(file, expected[0]))
                self.send("info", probe(file))
            elif kind == "decode":
                self._decode(file, *rest)
            else:
                show: Callable[..., bytes] = getattr(clips, kind)
                self.send("shown", show(file, *rest, threads=1, on_frame=self.on_frame))

    def _decode(self, file: Any, short_side_px: int, sampling: Sampling, run: SpanRun) -> None:
        began = time.process_time()
        # The header may have been read differently once, by another version: it is read again.
        info, threads = probe(file), 1
        for span in decode(
            file, info, short_side_px, sampling, run, threads, self.on_frame, self._shared.array
        ):
            seconds = time.process_time() - began
            small = replace(span, pixels=np.zeros((0, 1, 1, 3), np.uint8))
            self.send("span", (small, span.pixels.shape, seconds))
            self._channel.recv()  # the pixels have been taken over
            began = time.process_time()


class _Watched:
    """A file that tells the server when it waits for the storage."""

    def __init__(self, file: BinaryIO, server: _Server) -> None:
        self._file, self._server = file, server
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        with self._server.waiting():
            return self._file.read(size)


def _limit_memory(size_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = size_bytes if hard == resource.RLIM_INFINITY else min(size_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _allocated_bytes() -> int:
    """What counts against the limit, 0 where the system does not tell."""
    handle = _statm()
    return int(os.pread(handle, 200, 0).split()[5]) * mmap.PAGESIZE if handle is not None else 0


@functools.cache
def _statm() -> int | None:
    """Opened once: it is read for each packet and frame."""
    try:
        return os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return None


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def _plain_error(error: Exception) -> Exception:
    """An error that any process can unpickle and act on."""
    if isinstance(error, UserError):
        return UserError(str(error))
    if isinstance(error, VideoError):
        return VideoError(str(error))
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(str(error))
    if is_transient(error) or isinstance(error, OSError):
        return OSError(str(error))
    return RuntimeError("".join(traceback.format_exception(error)))


def _serve(channel_handle: int, pixels_handle: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    channel = multiprocessing.connection.Connection(channel_handle)
    server = _Server(channel, pixels_handle)
    while True:
        try:
            request, limits = channel.recv()
        except EOFError:
            return
        server.memory_bytes = limits.memory_bytes
        _limit_memory(limits.memory_bytes)
        try:
            server.answer(*request)
        except MemoryError:
            server.send("memory")
        except Exception as error:
            server.send("error", _plain_error(error))
        else:
            server.send("done")


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
