"""Probing and decoding, with PyAV: from a file to frames with exact presentation times.

>>> from vsearch.video import decode, probe
>>> with open("clip.mp4", "rb") as file:
...     for span in decode(file, probe(file), short_side_px=224):
...         print(span.number, span.pts_s[0], span.pixels.shape)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any, BinaryIO

import av
import av.error
import fsspec
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from vsearch.config import Sampling
from vsearch.sampling import FrameSampler, SpanGrid, SpanRun, span_grid

SEEKABLE_FORMATS = frozenset({"mov", "mp4", "matroska", "webm"})
"""Containers with a keyframe index. In others a seek is a guess: they are decoded from the start."""

CLOCK_FORMATS = frozenset({"mpegts", "mpeg"})
"""Containers whose time stamps come from a running clock; players count from their first one."""

MAX_ASPECT = 4
"""A longer side than this many short sides is squeezed: what it costs must have a bound."""


def seekable(container: str) -> bool:
    """Whether spans of such a container (FFmpeg's names, comma-separated) can be decoded alone."""
    return bool(SEEKABLE_FORMATS & set(container.split(",")))


class VideoError(Exception):
    """A file that cannot be read as video; the message is a plain reason."""


@dataclass(frozen=True)
class VideoInfo:
    """What the container says of its first video stream. Times in seconds of stream time;
    `zero_s` is the stream time that players show as 0:00; sizes in pixels as stored, unrotated.
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


@dataclass
class DecodedSpan:
    """The kept frames of one span in presentation order: `pixels` is uint8 (n, height, width, 3)
    RGB, rotated as a player would, `pts_s` their n exact times in seconds. `errors` are plain
    sentences; `ended` tells that the stream ended in this span.
    """

    number: int
    pts_s: list[Fraction] = field(default_factory=list)
    pixels: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 1, 1, 3), np.uint8))
    errors: list[str] = field(default_factory=list)
    ended: bool = False


def open_url(url: str) -> BinaryIO:
    """A file at any fsspec URL, read in ranges of 1 MiB: what a span needs and little more."""
    fs, path = fsspec.url_to_fs(url)
    file: BinaryIO = fs.open(path, "rb", block_size=1 << 20)
    return file


def probe(file: BinaryIO) -> VideoInfo:
    """Reads a container's headers. Raises `VideoError` for what is no video."""
    with _open(file) as container:
        stream = _video_stream(container)
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
        return VideoInfo(
            container=container.format.name,
            codec=stream.codec_context.codec.canonical_name,
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            fps=float(rate) if rate else None,
            start_s=start * time_base if start is not None else Fraction(0),
            duration_s=duration,
            zero_s=zero_s,
            recorded_at=_creation_time(container),
        )


def decode(
    file: BinaryIO,
    info: VideoInfo,
    short_side_px: int,
    sampling: Sampling | None = None,
    run: SpanRun | None = None,
    threads: int = 0,
) -> Iterator[DecodedSpan]:
    """The spans of `run` (all of the video without one), one after the other, each as soon as it
    is complete. Frames are scaled so that their shorter side has `short_side_px`, with the aspect
    ratio kept. A damaged packet is noted in the span's `errors` and skipped. `threads` is FFmpeg's
    number of decoding threads, 0 for one a core.
    """
    sampling = sampling or Sampling()
    run = run or SpanRun(0, None)
    grid = span_grid(sampling, info.fps, info.start_s)
    builder = _SpanBuilder(grid, run, sampling.fps, short_side_px)
    from_start = run.first == 0 or not seekable(info.container)
    with _open(file) as container:
        frames = _frames(container, None if from_start else grid.start_s(run.first), threads)
        first = next(frames, None)
        # A seek that lands behind its target cannot be trusted: decode from the start instead.
        trusted = from_start or (
            isinstance(first, _Timed) and first.pts_s <= grid.start_s(run.first)
        )
        if trusted and first is not None:
            yield from builder.take(first)
            yield from builder.take_all(frames)
    if not trusted:
        with _open(file) as container:
            yield from builder.take_all(_frames(container, None, threads))
    yield from builder.finish()


@dataclass(frozen=True)
class _Timed:
    pts_s: Fraction
    frame: VideoFrame
    sample_aspect: Fraction | None


class _SpanBuilder:
    """Sorts decoded frames into spans and turns the kept ones into pixels."""

    def __init__(self, grid: SpanGrid, run: SpanRun, fps: float | None, short_side: int) -> None:
        self._grid, self._run, self._short_side = grid, run, short_side
        self._sampler = FrameSampler(fps)
        self._span = DecodedSpan(run.first)
        self._pictures: list[NDArray[np.uint8]] = []
        self._begun = False
        self._complete = False

    def take_all(self, frames: "Iterator[_Timed | str]") -> Iterator[DecodedSpan]:
        for item in frames:
            yield from self.take(item)
            if self._complete:
                return

    def take(self, item: "_Timed | str") -> Iterator[DecodedSpan]:
        if isinstance(item, str):
            self._span.errors.append(item)
            return
        number = self._grid.number_of(item.pts_s)
        if number < self._run.first and not self._begun:
            # Between the keyframe and the first wanted frame: this and its errors are another span's.
            self._span.errors.clear()
            return
        self._begun = True
        # A frame behind its time (a broken stream) stays with the span that is being filled.
        while number > self._span.number and not self._complete:
            yield self._close()
        if self._complete or not self._sampler.keep(item.pts_s):
            return
        if item.frame.is_corrupt:
            self._span.errors.append(f"damaged frame at {float(item.pts_s):.3f} s")
        try:
            picture = to_rgb(item.frame, self._short_side, item.sample_aspect)
        except av.error.FFmpegError as error:
            self._span.errors.append(f"no picture at {float(item.pts_s):.3f} s: {_plain(error)}")
            return
        self._span.pts_s.append(item.pts_s)
        self._pictures.append(picture)

    def finish(self) -> Iterator[DecodedSpan]:
        """The last span, once the stream has ended."""
        if not self._complete:
            stop = self._run.stop
            while stop is not None and self._span.number < stop - 1:
                yield self._close()
            self._span.ended = True
            yield self._close()

    def _close(self) -> DecodedSpan:
        span, pictures = self._span, self._pictures
        if pictures:
            # A stream may change its size on the way: what differs is fitted to the first picture.
            height, width = pictures[0].shape[:2]
            span.pixels = np.stack([_fit(picture, height, width) for picture in pictures])
        self._span, self._pictures = DecodedSpan(span.number + 1), []
        self._complete = self._run.stop is not None and self._span.number >= self._run.stop
        return span


def _frames(
    container: InputContainer, seek_s: Fraction | None, threads: int
) -> "Iterator[_Timed | str]":
    """Decoded frames in presentation order, and a sentence for each error on the way."""
    stream = _video_stream(container)
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = threads
    time_base = stream.time_base or Fraction(1, 90000)
    if seek_s is not None:
        container.seek(math.floor(seek_s / time_base), stream=stream, backward=True)
    packets = container.demux(stream)
    last_pts_s = Fraction(0)
    while True:
        try:
            packet = next(packets, None)
        except (av.error.FFmpegError, OSError) as error:
            if not isinstance(error, av.error.FFmpegError):
                raise
            yield f"reading stopped after {float(last_pts_s):.3f} s: {_plain(error)}"
            return
        if packet is None:
            return
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            yield f"damaged packet after {float(last_pts_s):.3f} s: {_plain(error)}"
            continue
        for frame in frames:
            if not isinstance(frame, VideoFrame):
                continue
            if frame.pts is None:
                yield f"frame without a time after {float(last_pts_s):.3f} s"
                continue
            last_pts_s = frame.pts * (frame.time_base or time_base)
            yield _Timed(last_pts_s, frame, stream.sample_aspect_ratio)


def to_rgb(
    frame: VideoFrame, short_side_px: int, sample_aspect: Fraction | None = None
) -> NDArray[np.uint8]:
    """A frame as uint8 (height, width, 3) RGB: square pixels, upright, shorter side as asked.
    `sample_aspect` is the width of a stored pixel over its height.
    """
    width = frame.width * float(sample_aspect or 1)
    scale = short_side_px / min(width, frame.height)
    longest = MAX_ASPECT * short_side_px
    size = [min(longest, max(1, round(side * scale))) for side in (width, frame.height)]
    return _upright(_scaled(frame, size[0], size[1]), frame)


def _upright(picture: NDArray[np.uint8], frame: VideoFrame) -> NDArray[np.uint8]:
    """Turned and mirrored as the frame's display matrix says: x' = a·x + c·y, y' = b·x + d·y (FFmpeg,
    libavutil/display.h). Only right angles are followed, as players do."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _fit(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    if picture.shape[:2] == (height, width):
        return picture
    return _scaled(VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24"), width, height)


def _scaled(frame: VideoFrame, width: int, height: int) -> NDArray[np.uint8]:
    scaled = frame.reformat(width, height, "rgb24", interpolation="BICUBIC")
    return np.asarray(scaled.to_ndarray(), np.uint8)


def _open(file: BinaryIO) -> InputContainer:
    file.seek(0, 2)
    if file.tell() == 0:
        raise VideoError("the file is empty")
    file.seek(0)
    try:
        return av.open(file, mode="r", metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise VideoError(f"not a readable video file: {_plain(error)}") from error


def _video_stream(container: InputContainer) -> VideoStream:
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
