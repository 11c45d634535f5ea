import functools
import struct
from collections.abc import Callable
from fractions import Fraction
from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
from clips import (
    ONE_SECOND,
    SHORT_PX,
    TWO_SECONDS,
    blank,
    errors,
    gaps,
    made,
    moving,
    spans_of,
    straight_frames,
    times,
    without_packets,
)
from numpy.typing import NDArray

from vsearch.config import Sampling
from vsearch.sampling import SpanRun
from vsearch.video import VideoError, decode, probe

# ── made clips ───────────────────────────────────────────────────────────────────────────────────


def uneven(number: int) -> Fraction:
    """Times of a variable frame rate: 7.5 to 50 frames a second."""
    return Fraction(number // 3, 10) + Fraction((0, 20, 60)[number % 3], 1000)


def all_sync(data: bytes) -> bytes:
    """An MP4 file without its list of keyframes: every frame then counts as one."""
    assert data.count(b"stss") == 1
    return data.replace(b"stss", b"free")


def cut_by_edit_list(data: bytes, seconds: float) -> bytes:
    """An MP4 file whose edit list leaves out its first seconds."""
    scale = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)[0]
    place = data.index(b"elst") + 16
    [begin] = struct.unpack_from(">i", data, place)
    return data[:place] + struct.pack(">i", begin + int(seconds * scale)) + data[place + 4 :]


def scenes(number: int, width: int, height: int) -> NDArray[np.uint8]:
    return moving(number + 37 * (number // 30), width, height)


MADE: dict[str, Callable[..., bytes]] = {
    "h264, open groups, mp4": functools.partial(made, "mp4", params="open-gop=1"),
    "h264, open groups, mkv": functools.partial(made, "matroska", params="open-gop=1"),
    "h264, five references": functools.partial(made, "mp4", params="ref=5:mixed-refs=1"),
    "h264, no keyframe but the first": functools.partial(made, params="intra-refresh=1:bframes=0"),
    "hevc, open groups, mp4": functools.partial(made, "mp4", "libx265", "open-gop=1:bframes=4"),
    "hevc, open groups, mkv": functools.partial(made, "matroska", "libx265", "open-gop=1"),
    "mpeg4, b-frames": functools.partial(made, "mp4", "mpeg4"),
    "mpeg2, b-frames": functools.partial(made, "matroska", "mpeg2video", fps=25),
    "vp9": functools.partial(made, "webm", "libvpx-vp9"),
    "av1": functools.partial(made, "mp4", "libsvtav1"),
    "ffv1": functools.partial(made, "matroska", "ffv1"),
    "fragmented": functools.partial(made, movflags="frag_keyframe+empty_moov"),
    "uneven times, mp4": functools.partial(made, "mp4", at=uneven),
    "uneven times, mkv": functools.partial(made, "matroska", at=uneven),
    "every sample flagged": lambda **o: all_sync(made(params="ref=5", **o)),
    "every sample flagged, open groups": lambda **o: all_sync(made(params="open-gop=1", **o)),
    "every sample flagged, scenes": lambda **o: all_sync(
        made(params="ref=5:keyint=250:min-keyint=100:scenecut=60", picture=scenes, **o)
    ),
    "every sample flagged, hevc": lambda **o: all_sync(made("mp4", "libx265", "open-gop=1", **o)),
    "start cut by an edit list": lambda **o: cut_by_edit_list(made(**o), 1.3),
    "negative start, mp4": lambda fps=25, **o: made(
        at=lambda n: Fraction(n - 33, fps), fps=fps, **o
    ),
    "negative start, mkv": lambda fps=25, **o: made(
        "matroska", at=lambda n: Fraction(n - 33, fps), fps=fps, **o
    ),
    "late start": lambda fps=25, **o: made(
        "matroska", at=lambda n: Fraction(n + 333, fps), fps=fps, **o
    ),
}
UNSEEKABLE_IF_LONG = {"h264, no keyframe but the first", "every sample flagged, scenes"}


@pytest.mark.parametrize("is_long", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("name", sorted(MADE))
def test_made_clips_give_every_span_alone_as_in_the_whole(name: str, is_long: bool) -> None:
    data = MADE[name](frames=400, fps=5) if is_long else MADE[name]()
    file, sampling = BytesIO(data), Sampling(span_s=8 if is_long else 1)
    info = probe(file)
    whole = list(decode(file, info, SHORT_PX, sampling, threads=1))
    pts = times(whole)
    assert pts == [frame.pts * frame.time_base for frame in straight_frames(data)]
    assert all(a < b for a, b in pairwise(pts))
    assert errors(whole) == [] == gaps(whole)
    if is_long and "uneven" not in name:
        assert info.seekable == (name not in UNSEEKABLE_IF_LONG)
        assert info.last_s == pytest.approx(pts[-1], abs=0.5)
    for span in whole:
        run = SpanRun(span.number, None if span.ended else span.number + 1)
        [alone] = decode(file, info, SHORT_PX, sampling, run, threads=1)
        assert (alone.number, alone.pts_s, alone.ended) == (span.number, span.pts_s, span.ended)
        assert np.array_equal(alone.pixels, span.pixels), span.number
        assert (alone.errors, alone.gaps) == ([], [])


def steps_of(data: bytes, sampling: Sampling, run: SpanRun) -> int:
    """How many packets and frames a decoding takes."""
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    list(decode(BytesIO(data), probe(BytesIO(data)), SHORT_PX, sampling, run, 1, count))
    return steps


@pytest.mark.parametrize("name", ["h264, open groups, mp4", "hevc, open groups, mkv", "vp9"])
def test_a_late_span_costs_no_decoding_from_the_start(name: str) -> None:
    data, sampling = MADE[name](frames=400, fps=5), Sampling(span_s=8)
    whole = steps_of(data, sampling, SpanRun(0, None))
    assert steps_of(data, sampling, SpanRun(9, None)) < whole / 3


def test_a_seek_that_leads_to_no_picture_is_given_up_soon() -> None:
    data = all_sync(made(params="keyint=9999", frames=1000))
    whole = steps_of(data, ONE_SECOND, SpanRun(0, None))
    assert whole < steps_of(data, ONE_SECOND, SpanRun(5, None)) < whole + 250


@pytest.mark.parametrize("offset_s", [95440, 95443.717])
@pytest.mark.parametrize(("container", "codec"), [("mpegts", "libx264"), ("vob", "mpeg2video")])
def test_times_rise_where_the_clock_of_a_stream_wraps(
    container: str, codec: str, offset_s: float
) -> None:
    data = made(container, codec, frames=250, output_ts_offset=str(offset_s))
    pts = times(spans_of(data, sampling=TWO_SECONDS))
    assert pts == [frame.pts * frame.time_base for frame in straight_frames(data)]
    assert len(pts) == 250
    assert {b - a for a, b in pairwise(pts)} == {Fraction(1, 25)}


@pytest.mark.parametrize(
    ("container", "codec", "pix_fmt"),
    [("matroska", "ffv1", "bgr0"), ("matroska", "rawvideo", "yuv420p"), ("mov", "png", "rgb24")],
)
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (64, 4)])
def test_pictures_of_a_few_pixels_are_refused(
    container: str, codec: str, pix_fmt: str, size: tuple[int, int]
) -> None:
    data = made(
        container, codec, size=size, pix_fmt=pix_fmt, frames=3, picture=lambda n, w, h: blank(w, h)
    )
    with pytest.raises(VideoError, match=f"^pictures of {size[0]}×{size[1]} pixels show nothing$"):
        probe(BytesIO(data))


# ── what a header claims ─────────────────────────────────────────────────────────────────────────


def claims(data: bytes, seconds: float) -> bytes:
    """A Matroska file that claims to be so long."""
    place = data.index(b"\x44\x89\x88") + 3
    return data[:place] + struct.pack(">d", seconds * 1000) + data[place + 8 :]


def last_frame_lasts(data: bytes, seconds: int) -> bytes:
    """An MP4 file that claims to be so long: by all its headers, and the length of its last frame."""
    broken = bytearray(data)
    scales = [struct.unpack_from(">I", data, data.index(box) + 16)[0] for box in (b"mvhd", b"mdhd")]
    table = data.index(b"stts")
    [count] = struct.unpack_from(">I", data, table + 8)
    last = table + 12 + 8 * (count - 1)
    assert struct.unpack_from(">I", data, last) == (1,)
    for place, scale in (
        (data.index(b"mvhd") + 20, scales[0]),
        (data.index(b"tkhd") + 24, scales[0]),
        (data.index(b"elst") + 12, scales[0]),
        (data.index(b"mdhd") + 20, scales[1]),
        (last + 4, scales[1]),
    ):
        struct.pack_into(">I", broken, place, seconds * scale)
    return bytes(broken)


def slow_end(number: int) -> Fraction:
    return Fraction(number, 5) if number < 399 else Fraction(81)


@pytest.mark.parametrize("container", ["matroska", "mp4"])
def test_a_header_that_claims_two_days_is_not_believed(container: str) -> None:
    if container == "mp4":
        data = last_frame_lasts(made(frames=400, at=slow_end, b_frames=0), 143_000)
    else:
        data = claims(made("matroska", frames=400, at=slow_end), 143_000)
    info = probe(BytesIO(data))
    assert info.duration_s == pytest.approx(143_000, abs=100)
    assert (info.last_s, info.seekable) == (81, True)


@pytest.mark.parametrize("seconds", [1e9, 1e300, float("nan"), float("inf"), -5.0, 0.0])
def test_an_impossible_duration_is_none(seconds: float) -> None:
    info = probe(BytesIO(claims(made("matroska"), seconds)))
    assert info.duration_s is None


def test_a_long_video_that_was_cut_off_is_decoded_once_from_the_start() -> None:
    data = made(frames=400, fps=5, movflags="faststart")
    whole = times(spans_of(data))
    half = BytesIO(data[: len(data) // 2])
    info = probe(half)
    assert (info.seekable, info.last_s) == (False, None)
    spans = list(decode(half, info, SHORT_PX, Sampling(span_s=4), threads=1))
    assert 100 < len(times(spans)) < 300
    assert times(spans) == whole[: len(times(spans))]
    assert errors(spans) and spans[-1].ended


def test_a_frame_days_behind_the_others_makes_no_spans() -> None:
    data = made("matroska", frames=60, at=lambda n: Fraction(n, 10) + (200_000 if n == 59 else 0))
    spans = spans_of(data, sampling=TWO_SECONDS)
    assert (len(spans), len(times(spans))) == (3, 59)
    [error] = errors(spans)
    assert "out of place" in error.reason


def test_a_stream_without_times_says_so_in_few_errors() -> None:
    spans = spans_of(made("h264", frames=300))
    assert times(spans) == []
    assert {error.reason for error in errors(spans)} == {"frame without a time"}
    assert len(errors(spans)) == 100


# ── what is lost ─────────────────────────────────────────────────────────────────────────────────


def with_hole(data: bytes, first: float, stop: float) -> bytes:
    """The file with zeros between two shares of its length."""
    a, b = int(first * len(data)), int(stop * len(data))
    return data[:a] + bytes(b - a) + data[b:]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_a_gap_covers_exactly_the_frames_that_were_lost(codec: str) -> None:
    data = made("mp4", codec, fps=10, b_frames=0 if codec == "mpeg4" else 2)
    spans = spans_of(without_packets(data, 40, 60), sampling=TWO_SECONDS)
    tenths = [int(pts_s * 10) for pts_s in times(spans)]
    assert tenths == [*range(40), *range(60, 100)]
    assert gaps(spans) == [(Fraction(39, 10), 6)]
    assert [span.number for span in spans if span.gaps] == [1, 2]
    assert {span.number for span in spans if span.errors} == {2}
    assert {error.reason.partition(":")[0] for error in errors(spans)} == {"damaged packet"}
    assert all(4 <= error.at_s < 6 for error in errors(spans))


def test_what_was_lost_before_the_first_frame_is_a_gap() -> None:
    data = made("mp4", fps=10)
    first = times(spans_of(data))[40]
    assert gaps(spans_of(without_packets(data, 0, 40))) == [(0, first)]


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        *[("mp4", codec) for codec in ("libx264", "libx265", "libsvtav1")],
        *[("matroska", codec) for codec in ("libx264", "libx265", "libvpx-vp9")],
        *[("mpegts", codec) for codec in ("libx264", "mpeg2video")],
    ],
)
def test_a_hole_in_the_file_is_known_as_a_gap(container: str, codec: str) -> None:
    data = made(container, codec, frames=300, fps=25 if codec == "mpeg2video" else 10)
    intact, holed = times(spans_of(data)), BytesIO(with_hole(data, 0.4, 0.6))
    info = probe(holed)
    spans = list(decode(holed, info, SHORT_PX, TWO_SECONDS, threads=1))
    found = times(spans)
    lost = [(a, b) for a, b in pairwise(found) if b - a > Fraction(1, 2)]
    assert sum(b - a for a, b in lost) > 2 and set(found) <= set(intact)
    assert gaps(spans) == lost
    assert errors(spans)
    for span in spans if info.seekable else []:
        run = SpanRun(span.number, None if span.ended else span.number + 1)
        [alone] = decode(holed, info, SHORT_PX, TWO_SECONDS, run, threads=1)
        assert (alone.pts_s, alone.gaps) == (span.pts_s, span.gaps)
        assert bool(alone.errors) == bool(span.errors), span.number


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
@pytest.mark.parametrize("stuffed", [False, True], ids=["", "stuffed"])
def test_a_pause_between_frames_is_no_gap(container: str, stuffed: bool) -> None:
    if stuffed and container != "mpegts":
        return
    muxer = {"muxrate": "400000"} if stuffed else {}
    spans = spans_of(made(container, frames=30, fps=1, **muxer), sampling=TWO_SECONDS)
    paused = spans_of(made(container, frames=60, at=lambda n: Fraction(n, 10) + n // 30 * 5))
    for each, count in ((spans, 30), (paused, 60)):
        assert len(times(each)) == count
        assert errors(each) == [] == gaps(each)


def test_a_span_takes_no_more_frames_than_memory_allows() -> None:
    data = made(frames=100)
    spans = spans_of(data, sampling=Sampling(span_s=2, span_frames=3))
    assert [len(span.pixels) for span in spans] == [24] * 4
    assert [[error.reason for error in span.errors] for span in spans] == [
        ["more than 24 frames in one span"]
    ] * 4
    assert [span.gaps for span in spans] == [
        [(number + Fraction(23, 25), number + Fraction(24, 25))] for number in range(4)
    ]
