"""Clips for tests: the real ones of the manifest, made ones, and what is decoded of them."""

import csv
import functools
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
from conftest import SHARED_VIDEOS
from numpy.typing import NDArray

from vsearch.config import Sampling
from vsearch.schema import DecodeError
from vsearch.video import DecodedSpan, decode, probe

SHORT_PX = 32
ONE_SECOND = Sampling(span_s=1)
TWO_SECONDS = Sampling(span_s=2)
MANIFEST = SHARED_VIDEOS / "manifest.csv"
ROWS = list(csv.DictReader(MANIFEST.open(encoding="utf-8"))) if MANIFEST.is_file() else []


def spans_of(data: bytes, **options: object) -> list[DecodedSpan]:
    file = BytesIO(data)
    return list(decode(file, probe(file), SHORT_PX, **{"threads": 1, **options}))


def times(spans: list[DecodedSpan]) -> list[Fraction]:
    return [pts_s for span in spans for pts_s in span.pts_s]


def errors(spans: list[DecodedSpan]) -> list[DecodeError]:
    return [error for span in spans for error in span.errors]


def gaps(spans: list[DecodedSpan]) -> list[tuple[Fraction, Fraction]]:
    """The gaps of all spans; one that reaches into several counts once."""
    return sorted({gap for span in spans for gap in span.gaps})


def straight_frames(source: Path | bytes) -> Iterator[av.VideoFrame]:
    """The oracle: every packet of the first video stream, decoded in turn."""
    with av.open(BytesIO(source) if isinstance(source, bytes) else source) as container:
        for packet in container.demux(container.streams.video[0]):
            try:
                yield from packet.decode()
            except av.FFmpegError:
                continue


def moving(number: int, width: int = 64, height: int = 48) -> NDArray[np.uint8]:
    """A picture of which every part changes from frame to frame."""
    y, x = np.mgrid[:height, :width]
    layers = (4 * x + 3 * number, 5 * y - 2 * number, 7 * number + 0 * x)
    picture = np.stack([layer % 256 for layer in layers], axis=2).astype(np.uint8)
    left = 3 * number % max(1, width - 12)
    picture[10:22, left : left + 12] = 255
    return picture


@functools.cache
def made(
    container: str = "mp4",
    codec: str = "libx264",
    params: str = "",
    frames: int = 100,
    fps: int = 25,
    at: Callable[[int], Fraction] | None = None,
    picture: Callable[..., NDArray[np.uint8]] = moving,
    size: tuple[int, int] = (64, 48),
    pix_fmt: str = "yuv420p",
    b_frames: int = 2,
    **muxer: str,
) -> bytes:
    """A video of `picture(0)`, `picture(1)`, … with a keyframe every 20 frames; `at` gives their times
    in milliseconds' precision, and `params` goes to x264 or x265.
    """
    options = {"preset": "ultrafast"} if codec.startswith("libx26") else {}
    if codec.startswith("libx26"):
        known = f"keyint=20:min-keyint=20:scenecut=0:bframes={b_frames}:log-level=none"
        options[codec.removeprefix("lib") + "-params"] = f"{known}:{params}".removesuffix(":")
    time_base = Fraction(1, 1000) if at else Fraction(1, fps)
    with (
        tempfile.NamedTemporaryFile() as buffer,
        av.open(buffer.name, "w", format=container, options=muxer) as file,
    ):
        stream = file.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.gop_size = 20
        stream.codec_context.time_base = time_base
        if codec in ("mpeg4", "mpeg2video"):
            stream.codec_context.max_b_frames = b_frames
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            pts_s = at(number) if at else Fraction(number, fps)
            frame.pts, frame.time_base = round(pts_s / time_base), time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        file.close()
        return buffer.read()


def blank(width: int = 64, height: int = 48, level: int = 0) -> NDArray[np.uint8]:
    return np.full((height, width, 3), level, np.uint8)


def without_packets(data: bytes, first: int, stop: int) -> bytes:
    """The file with zeros in place of its packets number first … stop − 1."""
    broken = bytearray(data)
    with av.open(BytesIO(data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    for packet in packets[first:stop]:
        assert packet.pos is not None
        broken[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    return bytes(broken)


def quadrants(number: int = 0, width: int = 160, height: int = 96) -> NDArray[np.uint8]:
    """Red, green, blue and white quarters, whose brightness counts the frames."""
    picture = np.zeros((height, width, 3), np.uint8)
    level = 255 - number % 100
    picture[: height // 2, : width // 2, 0] = level
    picture[: height // 2, width // 2 :, 1] = level
    picture[height // 2 :, : width // 2, 2] = level
    picture[height // 2 :, width // 2 :] = level
    return picture


def write(
    path: Path,
    pictures: list[NDArray[np.uint8]],
    codec: str = "libx264",
    first: int = 0,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A video of the pictures at 25 frames a second, with a keyframe every 30 frames."""
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = 30
        for number, picture in enumerate(pictures, first):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
