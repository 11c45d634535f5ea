"""Which frames of a video are wanted, and its division into spans. Exact arithmetic on fractions.

A span owns the frames with start ≤ pts < end. Its ends are multiples of the sampling interval, so
'the first frame of each interval' can be decided inside a span, without its neighbours.
"""

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from vsearch.config import Sampling

Seconds = TypeVar("Seconds", Fraction, float)
CELLS = 16
"""Cells on the shorter side of a picture's signature."""


@dataclass(frozen=True)
class SpanGrid:
    """The spans of one video: number k covers [origin_s + k·length_s, origin_s + (k+1)·length_s)
    seconds of stream time; number 0 also takes whatever lies before.
    """

    origin_s: Fraction
    length_s: Fraction

    def start_s(self, number: int) -> Fraction:
        return self.origin_s + number * self.length_s

    def end_s(self, number: int) -> Fraction:
        return self.start_s(number + 1)

    def number_of(self, pts_s: Fraction) -> int:
        return max(0, (pts_s - self.origin_s) // self.length_s)


@dataclass(frozen=True)
class SpanRun:
    """Neighbouring spans to decode in one go: numbers first … stop − 1, to the end of the stream
    when `stop` is None.
    """

    first: int
    stop: int | None


def grid_origin_s(start_s: Seconds, length_s: Seconds) -> Seconds:
    """Where the first span begins in a video whose stream starts at `start_s`, with spans of
    `length_s` seconds: at a multiple of these, at or before the start.
    """
    return start_s // length_s * length_s


def span_grid(sampling: Sampling, video_fps: float | None, start_s: Fraction) -> SpanGrid:
    """The grid for a video whose stream starts at `start_s`. Spans are at most `span_s` seconds and
    about `span_frames` frames long, at least one second, and a multiple of the sampling interval.
    """
    rate = video_fps if video_fps and math.isfinite(video_fps) and video_fps > 0 else 30.0
    if sampling.fps is not None:
        rate = min(rate, sampling.fps)
    length = Fraction(max(1, math.floor(min(sampling.span_s, sampling.span_frames / rate))))
    if sampling.fps is not None:
        interval = 1 / Fraction(sampling.fps).limit_denominator(1000)
        length = interval * math.ceil(length / interval)
    return SpanGrid(origin_s=grid_origin_s(start_s, length), length_s=length)


def expected_spans(grid: SpanGrid, start_s: Fraction, duration_s: float | None) -> int:
    """How many spans a video should have by its header, at least 1. Only a claim: the last run is
    always decoded to the end of the stream, whatever the header says.
    """
    if duration_s is None or not math.isfinite(duration_s) or duration_s <= 0:
        return 1
    return max(1, math.ceil((start_s + Fraction(duration_s) - grid.origin_s) / grid.length_s))


def missing_runs(expected: int, done: Collection[int], ended: bool, longest: int) -> list[SpanRun]:
    """Runs of at most `longest` spans that cover what is not in `done`. Unless the span with the end
    of the stream is among the done (`ended`), the last run is open.
    """
    known = max(done, default=-1) + 1
    expected = known if ended else max(expected, known)
    missing = [number for number in range(expected) if number not in done]
    runs: list[SpanRun] = []
    for number in missing:
        last = runs[-1] if runs else None
        if last and last.stop == number and number - last.first < longest:
            runs[-1] = SpanRun(last.first, number + 1)
        else:
            runs.append(SpanRun(number, number + 1))
    if ended:
        return runs
    tail = expected if expected - 1 in done else expected - 1
    if runs and runs[-1].stop == tail + 1:
        return [*runs[:-1], SpanRun(runs[-1].first, None)]
    return [*runs, SpanRun(tail, None)]


def span_id(video_id: str, made_with: str, number: int) -> str:
    """16 hexadecimal digits that name a span: of which video, made with which encoders and sampling."""
    return hashlib.sha256(f"{video_id}|{made_with}|{number}".encode()).hexdigest()[:16]


def has_pairs(span_id: str, share: float) -> bool:
    """Whether a span is among the `share` that are embedded with CLIP too. Every worker decides alike."""
    return int(span_id[:8], 16) < share * 2**32


def signature(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The mean colours, float32 (rows, columns, 3), of about square cells of a picture uint8
    (height, width, 3), `CELLS` on its shorter side. The mean over a cell takes off sensor noise, but
    keeps what moves in one corner.
    """
    height, width = picture.shape[:2]
    side = max(1, min(height, width) // CELLS)
    rows, columns = (np.arange(n // side) * n // (n // side) for n in (height, width))
    sums = np.add.reduceat(picture, rows, axis=0, dtype=np.uint32)
    sums = np.add.reduceat(sums, columns, axis=1, dtype=np.uint32)
    pixels = np.outer(np.diff(rows, append=height), np.diff(columns, append=width))
    return (sums / pixels[:, :, None]).astype(np.float32)


def change(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """How far apart two pictures are by their signatures: the gray levels (0 … 255) between the two
    means of the cell, and colour, that differ most.
    """
    return float(np.abs(a - b).max()) if a.shape == b.shape else 255.0


class FrameSampler:
    """Keeps the first frame of each interval of 1/fps seconds; keeps all when fps is None."""

    def __init__(self, fps: float | None) -> None:
        self._fps = None if fps is None else Fraction(fps).limit_denominator(1000)
        self._last_interval: int | None = None

    def keep(self, pts_s: Fraction) -> bool:
        if self._fps is None:
            return True
        interval = math.floor(pts_s * self._fps)
        if interval == self._last_interval:
            return False
        self._last_interval = interval
        return True


def split_videos(video_ids: list[str], share: float) -> set[str]:
    """The videos kept for validation: about `share` of them, drawn by their ids, so that a video
    stays on its side as the corpus grows; at least one, if there are two.
    """
    draw = {v: int(hashlib.sha256(v.encode()).hexdigest()[:8], 16) / 2**32 for v in video_ids}
    ranked = sorted(draw, key=lambda video: draw[video])
    if len(ranked) < 2:
        return set()
    wanted = sum(value < share for value in draw.values())
    return set(ranked[: min(max(1, wanted), len(ranked) - 1)])
