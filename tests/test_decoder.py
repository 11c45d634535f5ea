import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from clips import ROWS, SHORT_PX, made, without_packets

from vsearch.clips import picture, preview
from vsearch.config import Sampling, UserError
from vsearch.decoder import BusyError, Decoder, DecoderDiedError, Decoders, Limits
from vsearch.sampling import SpanRun
from vsearch.schema import fingerprint
from vsearch.storage import filesystem, mark_of
from vsearch.video import DecodedSpan, VideoError, VideoInfo, decode, probe

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")

WHOLE = SpanRun(0, None)
ONE_SECOND = Sampling(span_s=1)


def listed(path: Path) -> tuple[int, str]:
    """Size and mark of a file, as a listing gives them."""
    fs, name = filesystem(str(path))
    info = fs.info(name)
    return info["size"], mark_of(info)


def spans_of(
    decoder: Decoder, path: Path, sampling: Sampling = ONE_SECOND, run: SpanRun = WHOLE
) -> list[DecodedSpan]:
    decoded = decoder.decode(str(path), listed(path), SHORT_PX, sampling, run)
    return [span for span, _ in decoded]


def probed(decoder: Decoder, path: Path) -> VideoInfo:
    return decoder.probe(str(path), listed(path))


def same(found: list[DecodedSpan], wanted: list[DecodedSpan]) -> bool:
    plain = [(s.number, s.pts_s, s.picture, s.errors, s.gaps, s.ended) for s in found]
    assert plain == [(s.number, s.pts_s, s.picture, s.errors, s.gaps, s.ended) for s in wanted]
    return all(np.array_equal(a.pixels, b.pixels) for a, b in zip(found, wanted, strict=True))


def child(decoder: Decoder) -> int:
    assert decoder._child is not None
    return decoder._child.pid


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def room_for(extra_bytes: int, clip: Path) -> Limits:
    """Limits that let a decoder allocate so much more than it does for a small clip."""
    decoder = Decoder()
    clip.write_bytes(made())
    spans_of(decoder, clip)
    status = Path(f"/proc/{child(decoder)}/status").read_text(encoding="utf-8")
    [used] = [int(line.split()[1]) << 10 for line in status.splitlines() if "VmData" in line]
    decoder.close()
    return Limits(memory_bytes=(used + extra_bytes) * 8 // 7)


def within(seconds: float, happens: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if happens():
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    decoder = Decoder()
    yield decoder
    decoder.close()


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(made())
    return path


@pytest.fixture(scope="module")
def large_h264() -> bytes:
    still = np.zeros((2160, 3840, 3), np.uint8)
    return made(params="ref=4", frames=8, size=(3840, 2160), picture=lambda *_: still)


@pytest.fixture
def truth(clip: Path) -> list[DecodedSpan]:
    with clip.open("rb") as file:
        return list(decode(file, probe(file), SHORT_PX, ONE_SECOND, threads=1))


# ── the same as in this process ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "make",
    [
        lambda: made("mp4", params="open-gop=1"),
        lambda: made("matroska", "libx265"),
        lambda: made("mpegts", output_ts_offset="95440"),
        lambda: without_packets(made("mp4", fps=10), 40, 60),
        lambda: made("h264"),
    ],
    ids=["mp4", "hevc in mkv", "wrapping ts", "damaged", "without times"],
)
def test_it_gives_what_decoding_in_this_process_gives(
    decoder: Decoder, tmp_path: Path, make: Callable[[], bytes]
) -> None:
    data, path = make(), tmp_path / "v"
    path.write_bytes(data)
    file, found = BytesIO(data), list[str]()
    info = probe(file)
    assert decoder.probe(str(path), listed(path), found.append) == info
    assert found == [fingerprint(file, len(data))]
    for run in (WHOLE, SpanRun(2, 3)):
        for sampling in (ONE_SECOND, Sampling(span_s=2, max_change=30)):
            wanted = list(decode(file, info, SHORT_PX, sampling, run, threads=1))
            assert same(spans_of(decoder, path, sampling, run), wanted)


def test_real_files_come_out_as_in_this_process(decoder: Decoder, shared_videos: Path) -> None:
    for row in ROWS:
        if int(row["frames"] or 0) < 20:
            path = shared_videos / row["file"]
            with path.open("rb") as file:
                try:
                    info = probe(file)
                    wanted = list(decode(file, info, SHORT_PX, threads=1))
                except VideoError as error:
                    with pytest.raises(VideoError) as raised:
                        probed(decoder, path)
                    assert str(raised.value) == str(error)
                    continue
            assert probed(decoder, path) == info
            assert same(spans_of(decoder, path, Sampling()), wanted)


def test_one_child_serves_many_requests(decoder: Decoder, clip: Path) -> None:
    probed(decoder, clip)
    first = child(decoder)
    spans_of(decoder, clip)
    with pytest.raises(VideoError):
        probed(decoder, Path(__file__))
    probed(decoder, clip)
    assert child(decoder) == first


def test_seconds_of_processor_time_are_told(decoder: Decoder, clip: Path) -> None:
    began = time.monotonic()
    run = decoder.decode(str(clip), listed(clip), SHORT_PX, ONE_SECOND, WHOLE)
    seconds = [taken_s for _, taken_s in run]
    assert all(taken_s > 0 for taken_s in seconds)
    assert sum(seconds) < time.monotonic() - began


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────


def fails(decoder: Decoder, path: Path, before: Callable[[], None]) -> DecoderDiedError:
    """The error of a decoding with something done to the child after its first span."""
    spans = decoder.decode(str(path), listed(path), SHORT_PX, ONE_SECOND, WHOLE)
    next(spans)
    before()
    with pytest.raises(DecoderDiedError) as died:
        list(spans)
    assert len(str(died.value).splitlines()) == 1
    return died.value


@pytest.mark.parametrize("signal_name", ["SIGSEGV", "SIGKILL"])
def test_a_crash_is_named_and_costs_one_child(
    decoder: Decoder, clip: Path, truth: list[DecodedSpan], signal_name: str
) -> None:
    number = getattr(signal, signal_name)
    error = fails(decoder, clip, lambda: os.kill(child(decoder), number))
    assert str(error) == f"the decoder crashed ({signal_name})"
    assert same(spans_of(decoder, clip), truth)


def test_a_crash_while_it_decodes_is_known_at_once(decoder: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(made(frames=2500))
    probed(decoder, path)
    threading.Timer(0.1, os.kill, (child(decoder), signal.SIGSEGV)).start()
    began = time.monotonic()
    with pytest.raises(DecoderDiedError, match="SIGSEGV"):
        while time.monotonic() < began + 20:
            spans_of(decoder, path, Sampling(span_s=1000, span_frames=10**6))
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(stall_s=1), "the decoder hung: nothing came for 1 s"),
        (Limits(span_s=1), "decoding took more than 1 s"),
    ],
    ids=["stall", "span"],
)
def test_a_hang_is_ended(
    decoder: Decoder, clip: Path, truth: list[DecodedSpan], limits: Limits, reason: str
) -> None:
    def hang() -> None:
        os.kill(child(decoder), signal.SIGSTOP)
        decoder._limits = limits  # now: a busy machine may take its time to start a child

    probed(decoder, clip)
    hung, began = child(decoder), time.monotonic()
    assert str(fails(decoder, clip, hang)) == reason
    assert time.monotonic() - began < 20
    assert not is_running(hung)
    decoder._limits = Limits()
    assert same(spans_of(decoder, clip), truth)


def test_a_span_may_hold_more_frames_than_it_should(decoder: Decoder, clip: Path) -> None:
    sampling = Sampling(span_frames=3)  # but no span is shorter than a second
    with clip.open("rb") as file:
        wanted = list(decode(file, probe(file), SHORT_PX, sampling, threads=1))
    assert max(len(span.pixels) for span in wanted) > 12
    assert same(spans_of(decoder, clip, sampling), wanted)


@pytest.mark.parametrize("mebibytes", [12, 24, 36])
def test_wanting_too_much_memory_is_no_silent_loss(
    clip: Path, truth: list[DecodedSpan], large_h264: bytes, mebibytes: int
) -> None:
    large = clip.with_name("large.mp4")
    large.write_bytes(large_h264)
    decoder = Decoder(room_for(mebibytes << 20, clip))
    with pytest.raises(DecoderDiedError) as died:
        spans_of(decoder, large)
    assert re.fullmatch(r"the decoder wanted more than 0\.\d+ GiB of memory", str(died.value))
    assert same(spans_of(decoder, clip), truth)
    decoder.close()


@pytest.mark.parametrize(
    ("frames", "size", "span_s", "mebibytes"),
    [(60, (1920, 1080), 20, 100), (900, (64, 48), 1, 30)],
    ids=["large ones", "many"],
)
def test_decoding_keeps_no_more_than_the_pictures_of_a_span(
    clip: Path, frames: int, size: tuple[int, int], span_s: int, mebibytes: int
) -> None:
    still = np.zeros((size[1], size[0], 3), np.uint8)
    clip.write_bytes(made("mp4", "mpeg4", frames=frames, size=size, picture=lambda *_: still))
    decoder = Decoder(room_for(mebibytes << 20, clip.with_name("small.mp4")))
    sampling = Sampling(span_s=span_s)
    spans = decoder.decode(str(clip), listed(clip), 224, sampling, WHOLE)
    assert sum(len(span.pts_s) for span, _ in spans) == frames
    decoder.close()


def test_a_child_that_died_between_requests_is_replaced(
    decoder: Decoder, clip: Path, truth: list[DecodedSpan]
) -> None:
    info = probed(decoder, clip)
    os.kill(child(decoder), signal.SIGKILL)
    decoder._child.wait()
    assert probed(decoder, clip) == info
    assert same(spans_of(decoder, clip), truth)


def test_what_is_no_video_is_the_files_fault(decoder: Decoder, tmp_path: Path) -> None:
    for content, reason in ((b"", "the file is empty"), (b"words " * 50, "not a readable video")):
        path = tmp_path / "v.mp4"
        path.write_bytes(content)
        found: list[str] = []
        with pytest.raises(VideoError, match=reason) as refused:
            decoder.probe(str(path), listed(path), found.append)
        assert not isinstance(refused.value, DecoderDiedError)
        assert len(found) == 1


def test_what_the_storage_raises_comes_back_as_such(decoder: Decoder, clip: Path) -> None:
    before = listed(clip)
    with pytest.raises(FileNotFoundError):
        decoder.probe(str(clip.with_name("none.mp4")), before)
    with clip.open("ab") as file:
        file.write(b"more")
    for ask in (
        lambda: decoder.probe(str(clip), before),
        lambda: list(decoder.decode(str(clip), before, SHORT_PX, ONE_SECOND, WHOLE)),
    ):
        with pytest.raises(OSError, match="has changed since it was listed"):
            ask()
    with pytest.raises(UserError, match="cannot be used"):
        decoder.probe("nonsense://there/v.mp4", before)
    assert probed(decoder, clip).codec == "h264"


def test_waiting_for_the_storage_is_no_hang(decoder: Decoder, clip: Path) -> None:
    pipe = clip.with_name("slow.mp4")
    os.mkfifo(pipe)
    probed(decoder, clip)
    decoder._limits = Limits(stall_s=2)

    def write_late() -> None:
        time.sleep(3.5)
        with pipe.open("wb"):
            pass

    threading.Thread(target=write_late, daemon=True).start()
    with pytest.raises(OSError) as raised:  # in the end: one cannot seek in a pipe
        probed(decoder, pipe)
    assert not isinstance(raised.value, VideoError)


# ── pictures and previews ────────────────────────────────────────────────────────────────────────


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    """One decoder, which runs already: a busy machine may take its time to start it."""
    decoders = Decoders(1, Limits(stall_s=2, span_s=3), free_within_s=1)
    decoders._all[0]._limits, limits = Limits(), decoders._all[0]._limits
    with pytest.raises(VideoError):
        decoders.picture(__file__, 0, 64)
    decoders._all[0]._limits = limits
    yield decoders
    decoders.close()


def test_many_threads_get_each_its_own_picture(clip: Path) -> None:
    data = clip.read_bytes()
    times = [number / 7 for number in range(24)]
    decoders = Decoders(2, free_within_s=60)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda at_s: decoders.picture(str(clip), at_s, 50), times))
        shown = pool.submit(decoders.preview, str(clip), 1.0, 2.0).result()
    assert found == [picture(BytesIO(data), at_s, 50, threads=1) for at_s in times]
    assert shown == preview(BytesIO(data), 1.0, 2.0, threads=1)
    decoders.close()


ASKED: dict[str, Callable[[Decoders, Path], bytes]] = {
    "picture": lambda decoders, path: decoders.picture(str(path), 1.0, 50),
    "preview": lambda decoders, path: decoders.preview(str(path), 0.0, 1.0),
}


@pytest.mark.parametrize("ask", list(ASKED.values()), ids=list(ASKED))
@pytest.mark.parametrize(
    ("signal_name", "reason"),
    [
        ("SIGSEGV", r"the decoder crashed \(SIGSEGV\)"),
        ("SIGSTOP", "the decoder hung: nothing came for 2 s"),
    ],
)
def test_a_child_lost_on_the_way_is_an_error_within_the_limit(
    decoders: Decoders,
    clip: Path,
    ask: Callable[[Decoders, Path], bytes],
    signal_name: str,
    reason: str,
) -> None:
    lost = child(decoders._all[0])
    pipe = clip.with_name("slow.mp4")
    os.mkfifo(pipe)  # it waits there until it is hit
    hit = threading.Timer(0.3, os.kill, (lost, getattr(signal, signal_name)))
    hit.start()
    began = time.monotonic()
    with pytest.raises(DecoderDiedError, match=reason):
        ask(decoders, pipe)
    assert time.monotonic() - began < 5
    assert not is_running(lost)
    decoders._all[0]._limits = Limits()
    assert ask(decoders, clip)


def test_waiting_for_the_storage_has_an_end_too(decoders: Decoders, clip: Path) -> None:
    pipe = clip.with_name("never.mp4")
    os.mkfifo(pipe)
    began = time.monotonic()
    with pytest.raises(DecoderDiedError, match="decoding took more than 3 s"):
        decoders.picture(str(pipe), 0, 50)
    assert time.monotonic() - began < 6


def test_who_finds_no_free_decoder_is_told_so(decoders: Decoders, clip: Path) -> None:
    pipe = clip.with_name("never.mp4")
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(decoders.picture, str(pipe), 0, 50)
        time.sleep(0.3)
        began = time.monotonic()
        with pytest.raises(BusyError, match="no decoder became free within 1 s"):
            decoders.picture(str(clip), 0, 50)
        assert time.monotonic() - began < 2
        assert isinstance(first.exception(), DecoderDiedError)
    decoders._all[0]._limits = Limits()
    assert decoders.picture(str(clip), 0, 50)


def test_what_cannot_be_shown_is_said_and_costs_no_child(decoders: Decoders, clip: Path) -> None:
    first = child(decoders._all[0])
    with pytest.raises(FileNotFoundError):
        decoders.picture(str(clip.with_name("none.mp4")), 0, 50)
    with pytest.raises(UserError, match="pixels wide"):
        decoders.picture(str(clip), 0, 0)
    with pytest.raises(UserError, match="no time in a video"):
        decoders.picture(str(clip), float("nan"), 50)
    with pytest.raises(UserError, match="at most 60 s"):
        decoders.preview(str(clip), 0, 1000)
    assert decoders.picture(str(clip), 0, 50)
    assert child(decoders._all[0]) == first


def test_a_picture_that_wants_too_much_memory_is_refused(clip: Path, large_h264: bytes) -> None:
    large = clip.with_name("large.mp4")
    large.write_bytes(large_h264)
    decoders = Decoders(1, room_for(24 << 20, clip))
    with pytest.raises(DecoderDiedError, match="GiB of memory"):
        decoders.picture(str(large), 0.2, 320)
    assert decoders.picture(str(clip), 0, 50)
    decoders.close()


def test_closed_decoders_leave_no_child_and_refuse(clip: Path) -> None:
    decoders = Decoders(2, free_within_s=0.1)
    decoders.picture(str(clip), 0, 50)
    pids = [decoder._child.pid for decoder in decoders._all if decoder._child]
    assert len(pids) == 1
    decoders.close()
    decoders.close()
    assert not any(is_running(pid) for pid in pids)
    with pytest.raises(BusyError):
        decoders.picture(str(clip), 0, 50)


# ── no child is left ─────────────────────────────────────────────────────────────────────────────


def test_close_ends_the_child_and_a_later_request_starts_another(clip: Path) -> None:
    decoder = Decoder()
    decoder.close()
    probed(decoder, clip)
    pid = child(decoder)
    decoder.close()
    decoder.close()
    assert not is_running(pid)
    probed(decoder, clip)
    pid = child(decoder)
    os.kill(pid, signal.SIGSTOP)
    decoder.close()
    assert not is_running(pid)


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "kept"])
def test_a_decoding_left_half_way_does_not_block_the_next(
    decoder: Decoder, clip: Path, truth: list[DecodedSpan], closed: bool
) -> None:
    spans = decoder.decode(str(clip), listed(clip), SHORT_PX, ONE_SECOND, WHOLE)
    next(spans)
    abandoned = child(decoder)
    if closed:
        spans.close()
    began = time.monotonic()
    assert probed(decoder, clip).codec == "h264"
    assert same(spans_of(decoder, clip), truth)
    assert time.monotonic() - began < 10
    assert not is_running(abandoned)
    if not closed:
        with pytest.raises(RuntimeError, match="another request"):
            next(spans)
    assert same(spans_of(decoder, clip), truth)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_the_child_ends_with_its_parent(clip: Path, busy: bool) -> None:
    pipe = clip.with_name("never.mp4")
    os.mkfifo(pipe)
    asked = [str(clip), *([str(pipe)] if busy else [])]
    program = (
        "import sys, time; from vsearch.decoder import Decoder\n"
        "decoder = Decoder()\n"
        f"for path, expected in {[(path, listed(Path(path))) for path in asked]}:\n"
        "    decoder.probe(path, expected)\n"
        "    print(decoder._child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    assert is_running(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert within(5, lambda: not is_running(pid))


def test_nothing_is_left_open(clip: Path) -> None:
    handles = Path("/proc/self/fd")
    before = len(list(handles.iterdir()))
    for _ in range(3):
        decoder = Decoder()
        spans = decoder.decode(str(clip), listed(clip), SHORT_PX, ONE_SECOND, WHOLE)
        next(spans)
        spans.close()
        decoder.close()
    assert len(list(handles.iterdir())) == before
