"""Probing and decoding, with PyAV: from a file to frames with exact presentation times.

>>> from vsearch.video import decode, probe
>>> with open("clip.mp4", "rb") as file:
...     for span in decode(file, probe(file), short_side_px=224):
...         print(span.number, span.pts_s[0], span.pixels.shape)
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from fractions import Fraction
from functools import cache
from typing import Any, BinaryIO

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.format import VideoFormat
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from vsearch.config import Sampling
from vsearch.sampling import FrameSampler, SpanGrid, SpanRun, change, signature, span_grid
from vsearch.schema import DecodeError

SEEKABLE_FORMATS = frozenset({"mov", "mp4", "matroska", "webm"})
"""Containers with a keyframe index. In others a seek is a guess: they are decoded from the start."""

TRIED_FROM_S = 60
"""Seeking is tried out in videos at least so long; shorter ones are hardly worth dividing."""

TAIL_PACKETS = 2000
"""At most so many packets are read to find the last time stamp: the rest of a file has no bound."""

MIN_SIDE_PX = 8
"""Pictures with a shorter side show nothing that could be found."""

MAX_SPAN_FRAMES = 8
"""A span of a stream that lies about its frame rate may hold so many times `Sampling.span_frames`."""

TRIED_BEFORE_S = 10
"""A seek may land behind its target, as pictures are stored out of order; one so much earlier is tried."""

TRIED_PACKETS = 100
"""After a clean seek a picture comes within so many packets, whatever their order."""

LOST_S = 0.5
"""What is lost between two frames counts as a gap from this length on."""

SKIPPED_BYTES = 2048
"""A reader passes in silence over what is damaged: so many bytes without a packet are suspicious."""

MAX_EMPTY_BYTES = 16
"""A packet of so few bytes may mean 'as before', and give no frame."""

JUST_BEFORE_S = Fraction(1, 10**6)

MAX_ERRORS = 100
"""More errors than this in one span tell nothing new."""

MAX_LEAP_S = 24 * 3600
"""A frame that lies so far behind the last one is out of place: it would make spans without number."""

MAX_DURATION_S = 30 * 24 * 3600
"""A header that claims more than this tells nothing."""

MIN_PACKET_BYTES = 4
"""No container stores a frame in less: a file with more frames than that repeats itself (edit lists)."""

CLOCK_FORMATS = frozenset({"mpegts", "mpeg"})
"""Containers whose time stamps come from a running clock; players count from their first one."""

Empty = Callable[[tuple[int, ...]], NDArray[np.uint8]]
"""Gives memory for so many pictures (n, height, width, 3). Asked again, for more, it may give the same
memory: what lies in it is copied first place to first place."""

MAX_ASPECT = 4
"""A longer side than this many short sides is squeezed: what it costs must have a bound."""


class VideoError(Exception):
    """A file that cannot be read as video; the message is a plain reason."""


@dataclass(frozen=True)
class VideoInfo:
    """What the container says of its first video stream. Times in seconds of stream time;
    `zero_s` is the stream time that players show as 0:00; sizes in pixels as stored, unrotated.
    `seekable` tells whether spans can be decoded each alone; `last_s` is the time of the last packet
    of a long seekable video, where it was found, whatever `duration_s` claims.
    """

    container: str
    codec: str
    width: int
    height: int
    fps: float | None
    start_s: Fraction
    duration_s: float | None
    zero_s: float
    recorded_at: datetime | None
    seekable: bool = False
    last_s: Fraction | None = None


@dataclass
class DecodedSpan:
    """The kept frames of one span in presentation order: `pts_s` are their n exact times in seconds,
    `pixels` is uint8 (m, height, width, 3) RGB, rotated as a player would, and `picture` tells for
    each frame which of the m ≤ n pictures is its own (all have one each without `max_change`).
    `gaps` are stretches (from, to) of stream time that reach into this span and whose frames were
    lost to an error; `ended` tells that the stream ended in this span.
    """

    number: int
    pts_s: list[Fraction] = field(default_factory=list)
    picture: list[int] = field(default_factory=list)
    pixels: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 1, 1, 3), np.uint8))
    errors: list[DecodeError] = field(default_factory=list)
    gaps: list[tuple[Fraction, Fraction]] = field(default_factory=list)
    ended: bool = False


def probe(file: BinaryIO) -> VideoInfo:
    """Reads a container's headers, and tries out whether one can seek in it. Raises `VideoError` for
    what is no video.
    """
    with open_container(file) as container:
        stream = video_stream(container)
        start = stream.start_time
        time_base = stream.time_base or Fraction(1, 90000)
        duration = (
            float(stream.duration * time_base)
            if stream.duration
            else container.duration / av.time_base
            if container.duration and container.duration > 0
            else None
        )
        clock = CLOCK_FORMATS & set(container.format.name.split(","))
        zero_s = (container.start_time or 0) / av.time_base if clock else 0.0
        rate = stream.average_rate
        context = stream.codec_context
        if 0 < min(context.width, context.height) < MIN_SIDE_PX:
            raise VideoError(f"pictures of {context.width}×{context.height} pixels show nothing")
        start_s = start * time_base if start is not None else Fraction(0)
        seekable = bool(SEEKABLE_FORMATS & set(container.format.name.split(",")))
        last_s = None
        if seekable and duration is not None and duration >= TRIED_FROM_S:
            # A video whose end cannot be found (cut off, or one keyframe for all) is not divided.
            end_s = start_s + Fraction(min(duration, MAX_DURATION_S))
            last_s = _last_packet_s(container, stream, end_s)
            seekable = last_s is not None and _seek_lands(container, (start_s + last_s) / 2)
        return VideoInfo(
            container=container.format.name,
            codec=stream.codec_context.codec.canonical_name,
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            fps=float(rate) if rate else None,
            start_s=start_s,
            duration_s=duration if duration and 0 < duration <= MAX_DURATION_S else None,
            zero_s=zero_s,
            recorded_at=_creation_time(container),
            seekable=seekable,
            last_s=last_s,
        )


def _last_packet_s(
    container: InputContainer, stream: VideoStream, near_s: Fraction
) -> Fraction | None:
    """The highest time stamp behind the last keyframe, None where none can be read or believed."""
    time_base = stream.time_base or Fraction(1, 90000)
    try:
        container.seek(math.floor(near_s / time_base), stream=stream, backward=True)
        tail = itertools.islice(container.demux(stream), TAIL_PACKETS + 1)
        stamps = [packet.pts for packet in tail]  # the packets themselves may be large
    except MemoryError:  # a limit was reached; the file is not to blame
        raise
    except av.error.FFmpegError:
        return None
    last = max((stamp for stamp in stamps if stamp is not None), default=None)
    if last is None or len(stamps) > TAIL_PACKETS or last * time_base > near_s + MAX_LEAP_S:
        return None
    return last * time_base


def _seek_lands(container: InputContainer, target_s: Fraction) -> bool:
    """Whether a seek gives a keyframe at or before its target as the first picture."""
    for seek_s in (target_s, target_s - TRIED_BEFORE_S):
        first = next(_frames(container, seek_s, 1), None)
        if isinstance(first, Timed) and _is_clean(first, target_s):
            return True
    return False


def _is_clean(first: "Timed", target_s: Fraction) -> bool:
    """Whether decoding that began with this frame gives every frame from `target_s` on as a decoding
    from the start would: the frame needs no other, and lies before all that is wanted. (The frames
    that come before it in an open group of pictures are lost, so it must not be one of those asked
    for; an index that calls any frame a keyframe is found out by the picture's own type.)
    """
    frame = first.frame
    return first.pts_s <= target_s and frame.key_frame and frame.pict_type == PictureType.I


def decode(
    file: BinaryIO,
    info: VideoInfo,
    short_side_px: int,
    sampling: Sampling | None = None,
    run: SpanRun | None = None,
    threads: int = 0,
    on_frame: Callable[[], None] = lambda: None,
    empty: Empty = lambda shape: np.empty(shape, np.uint8),
) -> Iterator[DecodedSpan]:
    """The spans of `run` (all of the video without one), one after the other, each as soon as it
    is complete. Frames are scaled so that their shorter side has `short_side_px`, with the aspect
    ratio kept. A damaged packet is noted in the span's `errors` and skipped. `threads` is FFmpeg's
    number of decoding threads, 0 for one a core. `on_frame` is called for each packet and frame, as
    a sign of life. `empty` gives the memory for the pixels of a span.
    """
    sampling = sampling or Sampling()
    run = run or SpanRun(0, None)
    grid = span_grid(sampling, info.fps, info.start_s)
    size_bytes = file.seek(0, 2)
    most = size_bytes // MIN_PACKET_BYTES + 1000
    builder = _SpanBuilder(grid, run, sampling, short_side_px, info, empty)
    start_s = grid.start_s(run.first)
    # Where a seek is not clean, the one to some spans earlier may be; if not, from the start.
    seeks = [start_s, start_s - 2 * grid.length_s] if run.first and info.seekable else []
    with frames_from(file, start_s, seeks, threads, on_frame) as (_, frames):
        yield from builder.take_all(itertools.islice(frames, most))
        if not builder.complete and next(frames, None) is not None:
            builder.note(Lost(None, "the file repeats its frames without end"))
    yield from builder.finish()


@contextmanager
def frames_from(
    file: BinaryIO,
    start_s: Fraction,
    seeks: Sequence[Fraction],
    threads: int = 0,
    on_frame: Callable[[], None] = lambda: None,
) -> "Iterator[tuple[Fraction | None, Iterator[Timed | Lost]]]":
    """Decoded frames in presentation order, and each loss on the way, from a keyframe at or before
    `start_s` on; with the one of `seeks` (times in seconds) that led to it. Those are tried in turn; if
    none gives all that is wanted, it is None, and the frames come from the start of the file.
    """
    for seek_s in [*seeks, None]:
        with open_container(file) as container:
            frames = _frames(container, seek_s, threads, on_frame)
            first = next(frames, None)
            if seek_s is None or (isinstance(first, Timed) and _is_clean(first, start_s)):
                yield seek_s, itertools.chain([] if first is None else [first], frames)
                return


class _Loss(Enum):
    """Whether something between a frame and the one before it did not come out."""

    NONE = 0
    TOLD = 1  # by an error
    SILENT = 2


@dataclass(frozen=True)
class Timed:
    """A decoded frame with its exact time; `sample_aspect` is the width of a stored pixel over its
    height.
    """

    pts_s: Fraction
    frame: VideoFrame
    sample_aspect: Fraction | None
    loss: _Loss


@dataclass(frozen=True)
class Lost:
    """A loss, with its reason: at `pts_s` where that is known, else behind the last frame."""

    pts_s: Fraction | None
    reason: str


class _SpanBuilder:
    """Sorts decoded frames into spans and turns the kept ones into pixels."""

    def __init__(
        self,
        grid: SpanGrid,
        run: SpanRun,
        sampling: Sampling,
        short_side: int,
        info: VideoInfo,
        empty: Empty,
    ) -> None:
        self._grid, self._run, self._short_side = grid, run, short_side
        self._sampling = sampling
        self._sampler = FrameSampler(sampling.fps)
        self._span = DecodedSpan(run.first)
        self._start_s = grid.start_s(run.first)
        self._scaler = Scaler()
        self._empty = empty
        self._signature: NDArray[np.float32] | None = None
        self._last_s = info.start_s  # of the last frame that was not lost
        self._spilled_s: Fraction | None = None  # of the last frame that the full span did not take
        self._lost = False  # whether something was, since then
        self._later: list[tuple[int, DecodeError]] = []  # with the span that each lies in
        rate = info.fps if info.fps and math.isfinite(info.fps) and info.fps > 0 else math.inf
        self._shortest_gap_s = max(LOST_S, 1.5 / rate)
        frames = float(grid.length_s) * min(rate, sampling.fps or math.inf)
        self._likely = 1 + math.ceil(min(frames, sampling.span_frames))
        self._room = np.empty((0, 1, 1, 3), np.uint8)  # the first `_count` are this span's pictures
        self._count = 0
        self._begun = False
        self.complete = False

    def take_all(self, frames: "Iterator[Timed | Lost]") -> Iterator[DecodedSpan]:
        for item in frames:
            if isinstance(item, Lost):
                self.note(item)
            else:
                yield from self._take(item)
            if self.complete:
                return

    def note(self, lost: Lost) -> None:
        """Adds an error to the span that it lies in."""
        at_s = self._last_s if lost.pts_s is None else lost.pts_s
        number, error = self._grid.number_of(at_s), DecodeError(float(at_s), lost.reason)
        if number > self._span.number:
            if len(self._later) < MAX_ERRORS:
                self._later.append((number, error))
        elif number >= self._run.first and len(self._span.errors) < MAX_ERRORS:
            self._span.errors.append(error)

    def _take(self, item: "Timed") -> Iterator[DecodedSpan]:
        number = self._grid.number_of(item.pts_s)
        if item.pts_s - max(self._last_s, self._start_s) > MAX_LEAP_S:
            self.note(Lost(None, f"a frame out of place, at {float(item.pts_s):g} s"))
            self._lost = True
            return
        if number < self._run.first and not self._begun:
            # Between the keyframe and the first wanted frame: what was lost here is another span's.
            self._last_s, self._lost = item.pts_s, False
            return
        self._begun = True
        most = MAX_SPAN_FRAMES * self._sampling.span_frames
        # A frame behind its time (a broken stream) stays with the span that is being filled.
        if number <= self._span.number and len(self._span.pts_s) >= most:
            if self._spilled_s is None:
                self.note(Lost(item.pts_s, f"more than {most} frames in one span"))
            self._spilled_s = item.pts_s
            return
        gap = self._gap_before(item)
        while number > self._span.number and not self.complete:
            self._add_gap(gap)
            yield self._close()
        if self.complete:
            return
        self._add_gap(gap)
        if not self._sampler.keep(item.pts_s) or self._keep(item):
            self._last_s, self._lost = item.pts_s, False

    def _gap_before(self, item: "Timed") -> tuple[Fraction, Fraction] | None:
        """The stretch between the last frame and this one if something was lost in it."""
        lost = self._lost or item.loss != _Loss.NONE
        if not lost or item.pts_s - self._last_s <= self._shortest_gap_s:
            return None
        if item.loss == _Loss.SILENT:
            self.note(Lost(None, "part of the file cannot be decoded"))
        return self._last_s, item.pts_s

    def _add_gap(self, gap: tuple[Fraction, Fraction] | None) -> None:
        number = self._span.number
        if gap and gap[0] < self._grid.end_s(number) and gap[1] > self._grid.start_s(number):
            self._span.gaps.append(gap)

    def _keep(self, item: "Timed") -> bool:
        """Adds a frame to the span; False if there is no picture of it."""
        if item.frame.is_corrupt:
            self.note(Lost(item.pts_s, "damaged frame"))
        try:
            picture = to_rgb(item.frame, self._short_side, item.sample_aspect, self._scaler)
        except MemoryError:
            raise
        except av.error.FFmpegError as error:
            self.note(Lost(item.pts_s, f"no picture: {_plain(error)}"))
            self._lost = True
            return False
        if self._is_new(picture):
            self._add(picture)
        self._span.pts_s.append(item.pts_s)
        self._span.picture.append(self._count - 1)
        return True

    def _add(self, picture: NDArray[np.uint8]) -> None:
        """Copied at once: FFmpeg can use its memory for the next frame."""
        if self._count == 0:
            self._room = self._empty((self._likely, *picture.shape))
        if self._count == len(self._room):
            known, self._room = self._room, self._empty((2 * self._count, *self._room.shape[1:]))
            self._room[: self._count] = known
        # A stream may change its size on the way: what differs is fitted to the first picture.
        self._room[self._count] = fit(picture, *self._room.shape[1:3])
        self._count += 1

    def _is_new(self, picture: NDArray[np.uint8]) -> bool:
        if self._sampling.max_change is None:
            return True
        found = signature(picture)
        known = self._signature
        if known is not None and change(known, found) <= self._sampling.max_change:
            return False
        self._signature = found
        return True

    def finish(self) -> Iterator[DecodedSpan]:
        """The last span, once the stream has ended."""
        if not self.complete:
            stop = self._run.stop
            while stop is not None and self._span.number < stop - 1:
                yield self._close()
            room = MAX_ERRORS - len(self._span.errors)
            self._span.errors += [error for _, error in self._later[:room]]
            self._span.ended = True
            yield self._close()

    def _close(self) -> DecodedSpan:
        span = self._span
        if self._spilled_s is not None:
            span.gaps.append((self._last_s, self._spilled_s))
            self._last_s, self._spilled_s = self._spilled_s, None
        if self._count:
            span.pixels = self._room[: self._count]
        number = span.number + 1
        self._span, self._count, self._signature = DecodedSpan(number), 0, None
        self._span.errors = [error for n, error in self._later if n == number]
        self._later = [(n, error) for n, error in self._later if n > number]
        self.complete = self._run.stop is not None and number >= self._run.stop
        return span


def _frames(
    container: InputContainer,
    seek_s: Fraction | None,
    threads: int,
    on_frame: Callable[[], None] = lambda: None,
) -> "Iterator[Timed | Lost]":
    """Decoded frames in presentation order, and each loss on the way. Nothing where a seek leads to
    nothing.
    """
    stream = video_stream(container)
    if not stream.codec_context.is_open:
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
    time_base = stream.time_base or Fraction(1, 90000)
    if seek_s is not None:
        try:
            container.seek(math.floor(seek_s / time_base), stream=stream, backward=True)
        except MemoryError:
            raise
        except av.error.FFmpegError:
            return
    patience = math.inf if seek_s is None else TRIED_PACKETS
    fed = _Fed()
    for packet, behind_hole in _packets(container, stream):
        on_frame()
        if isinstance(packet, Lost):
            yield packet
            return
        stamps = [stamp for stamp in (packet.pts, packet.dts) if stamp is not None]
        pts_s = stamps[0] * time_base if stamps else None
        for stamp in stamps if behind_hole else ():
            fed.add(stamp * time_base - JUST_BEFORE_S, _Loss.SILENT)
        if packet.size > MAX_EMPTY_BYTES and not packet.is_discard:
            fed.add(pts_s, _Loss.SILENT)
        try:
            frames = packet.decode()
        except MemoryError:  # a limit was reached; the packet is not to blame
            raise
        except av.error.FFmpegError as error:
            fed.add(pts_s, _Loss.TOLD)
            yield Lost(pts_s, f"damaged packet: {_plain(error)}")
            continue
        patience = patience - 1 if not frames else math.inf
        if patience < 0:
            return
        for frame in frames:
            if not isinstance(frame, VideoFrame):
                continue
            if frame.pts is None:
                fed.add(None, _Loss.TOLD)
                yield Lost(None, "frame without a time")
                continue
            on_frame()
            pts_s = frame.pts * (frame.time_base or time_base)
            yield Timed(pts_s, frame, stream.sample_aspect_ratio, fed.passed(pts_s))


class _Fed:
    """What a decoder was given and has not given back: packets between two frames that come one after
    the other were lost. (Frames come late and in another order than packets.)
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Fraction, _Loss]] = []
        self._unplaced = False
        self._last_s: Fraction | None = None

    def add(self, pts_s: Fraction | None, loss: _Loss) -> None:
        """A packet, and what its loss would be."""
        if pts_s is None:
            self._unplaced |= loss == _Loss.TOLD
        elif len(self._waiting) < TRIED_PACKETS:
            self._waiting.append((pts_s, loss))

    def passed(self, pts_s: Fraction) -> _Loss:
        """Takes note of a frame, and tells what was lost between it and the one before."""
        last_s = self._last_s
        losses = {
            loss
            for at_s, loss in self._waiting
            if (last_s is None or last_s < at_s) and at_s < pts_s
        }
        self._waiting = [(at_s, loss) for at_s, loss in self._waiting if at_s > pts_s]
        unplaced, self._unplaced, self._last_s = self._unplaced, False, pts_s
        if unplaced or _Loss.TOLD in losses:
            return _Loss.TOLD
        # A recording may begin between two keyframes: what comes before its first frame is no loss.
        return _Loss.SILENT if losses and last_s is not None else _Loss.NONE


def _packets(
    container: InputContainer, stream: VideoStream
) -> "Iterator[tuple[Packet[VideoStream] | Lost, bool]]":
    """The packets of a stream, each with whether the file has a hole before it: bytes that no packet of
    any stream lies in. (The index of an MP4 file leads to every packet: none is passed over.)
    """
    indexed = "mov" in container.format.name.split(",")
    packets: Iterator[Packet[Any]] = container.demux()
    read_to, hole = 0, False
    while True:
        try:
            packet = next(packets, None)
        except MemoryError:
            raise
        except (av.error.FFmpegError, OSError) as error:
            if not isinstance(error, av.error.FFmpegError):
                raise
            yield Lost(None, f"reading stopped: {_plain(error)}"), False
            return
        if packet is None:
            return
        if packet.pos is not None and not indexed:
            hole = hole or 0 < read_to < packet.pos - SKIPPED_BYTES
            read_to = max(read_to, packet.pos + packet.size)
        if packet.stream.index == stream.index:
            yield packet, hole
            hole = False


class Scaler:
    """What FFmpeg sets up for pictures of a size, kept for the next frame: a third of the time goes into
    it otherwise. For one thread at a time.
    """

    def __init__(self) -> None:
        self._scaling, self._packing, self._tiny = (VideoReformatter() for _ in range(3))

    def rgb(self, frame: VideoFrame, width: int, height: int) -> VideoFrame:
        """The frame in this size, as rgb24: by way of planes of red, green and blue. To FFmpeg that is half
        the work, and no colour is lost: on its short way it drops every other column's. (Where nothing
        is scaled, its planes have faults at the right edge.)
        """
        if (frame.width, frame.height) != (width, height) and _is_coloured(frame.format.name):
            frame = self._converted(self._scaling, frame, width, height, "gbrp")
        return self._converted(self._packing, frame, width, height, "rgb24")

    @staticmethod
    def _converted(
        reformatter: VideoReformatter, frame: VideoFrame, width: int, height: int, kind: str
    ) -> VideoFrame:
        # One thread: FFmpeg's choice would be as many as the machine has cores, for each frame anew.
        return reformatter.reformat(
            frame, width, height, kind, interpolation=Interpolation.BICUBIC, threads=1
        )

    def orientation(self, frame: VideoFrame) -> tuple[bool, bool, bool]:
        """Whether rows become columns, and whether x and y run backwards then, as the frame's display
        matrix says: x' = a·x + c·y, y' = b·x + d·y (FFmpeg, libavutil/display.h). Only right angles
        are followed, as players do.
        """
        # A frame that was asked for its side data stays until the next garbage collection: ask a tiny one.
        tiny = self._tiny.reformat(frame, 8, 8, interpolation=Interpolation.POINT, threads=1)
        matrix: Any = tiny.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return False, False, False
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
        turned = abs(b) + abs(c) > abs(a) + abs(d)
        return (True, c < 0, b < 0) if turned else (False, a < 0, d < 0)


@cache
def _is_coloured(format_name: str) -> bool:
    """Whether a format has brightness and colour apart."""
    kind = VideoFormat(format_name)
    return not kind.is_rgb and len(kind.components) >= 3


def to_rgb(
    frame: VideoFrame,
    short_side_px: int,
    sample_aspect: Fraction | None = None,
    scaler: Scaler | None = None,
) -> NDArray[np.uint8]:
    """A frame as uint8 (height, width, 3) RGB: square pixels, upright, shorter side as asked.
    `sample_aspect` is the width of a stored pixel over its height.
    """
    scaler = scaler or Scaler()
    width = frame.width * float(sample_aspect or 1)
    scale = short_side_px / min(width, frame.height)
    return _shrunk(scaler, frame, (width, frame.height), scale, scaler.orientation(frame))


def to_rgb_within(
    frame: VideoFrame,
    width_px: int,
    sample_aspect: Fraction | None = None,
    scaler: Scaler | None = None,
) -> NDArray[np.uint8]:
    """As `to_rgb`, but at most `width_px` wide once it is upright, and never enlarged."""
    scaler = scaler or Scaler()
    size = (frame.width * float(sample_aspect or 1), frame.height)
    orientation = scaler.orientation(frame)
    across = size[1] if orientation[0] else size[0]
    return _shrunk(scaler, frame, size, min(1.0, width_px / across), orientation)


def _shrunk(
    scaler: Scaler,
    frame: VideoFrame,
    size: tuple[float, float],
    scale: float,
    orientation: tuple[bool, bool, bool],
) -> NDArray[np.uint8]:
    """Scaled to so many times `size`, but no longer than `MAX_ASPECT` allows, and turned upright."""
    sides = [max(1, round(side * scale)) for side in size]
    longest = MAX_ASPECT * min(sides)
    small = scaler.rgb(frame, min(longest, sides[0]), min(longest, sides[1]))
    picture = np.asarray(small.to_ndarray(), np.uint8)
    turned, flipped_x, flipped_y = orientation
    if turned:
        picture = picture.transpose(1, 0, 2)
    return picture[:: -1 if flipped_y else 1, :: -1 if flipped_x else 1]


def fit(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """A picture (h, w, 3), scaled to (height, width, 3) if that is not its size."""
    if picture.shape[:2] == (height, width):
        return picture
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
    return np.asarray(Scaler().rgb(frame, width, height).to_ndarray(), np.uint8)


def open_container(file: BinaryIO) -> InputContainer:
    """A file as FFmpeg reads it. Raises `VideoError` for what it cannot."""
    file.seek(0, 2)
    if file.tell() == 0:
        raise VideoError("the file is empty")
    file.seek(0)
    try:
        return av.open(file, mode="r", metadata_errors="replace")
    except MemoryError:
        raise
    except av.error.FFmpegError as error:
        raise VideoError(f"not a readable video file: {_plain(error)}") from error


def video_stream(container: InputContainer) -> VideoStream:
    """The first that is no cover picture. Raises `VideoError` if there is none."""
    streams = [
        s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams:
        sound = " (it holds sound only)" if container.streams.audio else ""
        raise VideoError(f"the file has no video stream{sound}")
    if streams[0].codec_context is None:
        raise VideoError("the video's codec is unknown")
    return streams[0]


def _creation_time(container: InputContainer) -> datetime | None:
    text = container.metadata.get("creation_time", "")
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    time = time if time.tzinfo else time.replace(tzinfo=UTC)
    # Writers without a clock leave the epoch of their format (1904, 1970).
    return time if time.year >= 1990 else None


def _plain(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
