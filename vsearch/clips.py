"""What shows a moment: the picture at a time, a preview that any browser plays, a segment as a file.

All times are stream time in seconds; a player's are `zero_s` less.

>>> from vsearch.clips import cut, picture
>>> with open("clip.mp4", "rb") as file:
...     jpeg = picture(file, 12.4, 320)
>>> cut("clip.mp4", 12.4, 15.0, Path("moment.mp4"))
Cut(early_s=1.9, video='copied', audio='copied')
"""

import heapq
import io
import itertools
import math
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import av
import av.error
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

from vsearch.config import UserError
from vsearch.storage import open_url
from vsearch.video import (
    TRIED_BEFORE_S,
    Lost,
    Scaler,
    Timed,
    VideoError,
    fit,
    frames_from,
    open_container,
    to_rgb_within,
    video_stream,
)

TICK_S = Fraction(1, 90000)
"""The unit of time in a preview. What lies within half of it is the same time: times are rounded on
their way here."""

JPEG_QUALITY = 80
PREVIEW_WIDTH_PX = 640
PREVIEW_S = 60.0
MAX_WIDTH_PX = 8192
MAX_TIME_S = 4e9
"""No stream counts further; some count from 1970."""

PREVIEW_X264 = {"preset": "superfast", "crf": "25", "maxrate": "4M", "bufsize": "4M"}
CUT_X264 = {"preset": "veryfast", "crf": "18"}

SOUND_BEFORE_S = 1
"""Sound may lie so much before its picture in a file."""

HELD_PACKETS = 64
"""A picture needs at most so many that are shown behind it, whatever the codec."""

AnyPacket: TypeAlias = "Packet[Any]"
Beat = Callable[[], None]


class _NoCopyError(Exception):
    """The packets of one kind of stream cannot go into the other file as they are."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass(frozen=True)
class Cut:
    """How a segment was cut out: the file begins `early_s` seconds before what was asked for, at a
    keyframe. `video` and `audio` are `copied` or `encoded`; `audio` is None where there is no sound.
    """

    early_s: float
    video: str
    audio: str | None


def picture(
    file: BinaryIO, pts_s: float, width_px: int, threads: int = 0, on_frame: Beat = lambda: None
) -> bytes:
    """A JPEG of the frame that a player shows at `pts_s`: the last one that begins at or before it, or
    the first of all; upright, with square pixels, at most `width_px` wide. Raises `VideoError` where
    nothing can be decoded, `UserError` for a time or width that makes no sense.
    """
    at_s = _time(pts_s)
    if not 1 <= width_px <= MAX_WIDTH_PX:
        raise UserError(f"A picture is 1 to {MAX_WIDTH_PX} pixels wide, not {width_px}.")
    with _frames_shown(file, at_s, None, threads, on_frame) as frames:
        shown = next(frames, None)
        pixels = None if shown is None else _pixels(shown.frame, width_px)
        if pixels is None:
            raise VideoError("no frame can be decoded there")
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()


def preview(
    file: BinaryIO, start_s: float, end_s: float, threads: int = 0, on_frame: Beat = lambda: None
) -> bytes:
    """An MP4 file (H.264, no sound) of what a player shows from `start_s` to `end_s`, at most 640 pixels
    wide; its time 0 is `start_s`, and its index comes first. Raises `VideoError` where nothing can be
    decoded, `UserError` for a stretch that makes no sense or is longer than `PREVIEW_S`.
    """
    check_preview(start_s, end_s)
    begin_s, stop_s = _stretch(start_s, end_s)
    buffer = io.BytesIO()
    # To put the index first the file is read once more while it is written.
    with av.open(
        buffer,
        "w",
        format="mp4",
        container_options={"movflags": "+faststart"},
        io_open=lambda *_: io.BytesIO(buffer.getvalue()),
    ) as out:
        stream = _h264(out, PREVIEW_X264, threads)
        with _frames_shown(file, begin_s, stop_s, threads, on_frame) as shown:
            for packet in _encoded(stream, shown, PREVIEW_WIDTH_PX):
                out.mux(packet)
    return buffer.getvalue()


def check_preview(start_s: float, end_s: float) -> None:
    """Raises `UserError` for a stretch of which there is no preview."""
    begin_s, stop_s = _stretch(start_s, end_s)
    if stop_s - begin_s > PREVIEW_S + TICK_S:
        raise UserError(f"A preview is at most {PREVIEW_S:g} s long, not {end_s - start_s:g} s.")


def cut(uri: str, start_s: float, end_s: float, target: Path) -> Cut:
    """Writes a segment with its sound to a file, whose suffix tells the container. Video and sound are
    copied, so the file begins at a keyframe at or before `start_s`; each is encoded anew, which begins
    at `start_s`, only where the container cannot take it. An existing file is replaced once the new one
    is whole. Raises `VideoError` for what cannot be read or written, `UserError` for a stretch or
    suffix that makes no sense, and what the storage raises as `OSError`.
    """
    begin_s, stop_s = _stretch(start_s, end_s)
    temporary = target.with_name(f"{uuid.uuid4().hex}.tmp{target.suffix}")
    encode: set[str] = set()
    try:
        while True:
            try:
                done = _write(uri, begin_s, stop_s, temporary, frozenset(encode))
                break
            except _NoCopyError as error:
                encode.add(error.kind)
            except MemoryError:
                raise
            except av.error.FFmpegError as error:
                raise VideoError(f"it cannot be written: {error.strerror}") from error
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return done


# ── from the source ──────────────────────────────────────────────────────────────────────────────


def _time(value_s: float) -> Fraction:
    if not abs(value_s) <= MAX_TIME_S:
        raise UserError(f"{value_s} is no time in a video.")
    return Fraction(value_s)


def _stretch(start_s: float, end_s: float) -> tuple[Fraction, Fraction]:
    begin_s, stop_s = _time(start_s), _time(end_s)
    if stop_s - begin_s < TICK_S:
        raise UserError(f"The end, {end_s:g} s, must lie behind the start, {start_s:g} s.")
    return begin_s, stop_s


def _seeks(at_s: Fraction) -> list[Fraction]:
    # Also where a seek is a guess: what it led to is checked.
    return [at_s, at_s - TRIED_BEFORE_S]


@contextmanager
def _frames_shown(
    file: BinaryIO,
    start_s: Fraction,
    end_s: Fraction | None,
    threads: int = 0,
    on_frame: Beat = lambda: None,
) -> "Iterator[Iterator[_Shown]]":
    stop = None if end_s is None else round((end_s - start_s) / TICK_S)
    with frames_from(file, start_s, _seeks(start_s), threads, on_frame) as (_, frames):
        yield _shown(frames, start_s, stop)


@dataclass(frozen=True)
class _Shown:
    """A frame that a player shows from tick `since` until tick `until`."""

    since: int
    until: int
    frame: Timed


def _shown(frames: Iterable[Timed | Lost], start_s: Fraction, stop: int | None) -> Iterator[_Shown]:
    """What a player shows from `start_s` (tick 0) until tick `stop`, or to the end."""
    shown: Timed | None = None
    since = 0
    for item in frames:
        if isinstance(item, Lost):
            continue
        tick = round((item.pts_s - start_s) / TICK_S)
        if stop is not None and tick >= stop:
            break
        if shown is not None:
            if tick > since:
                yield _Shown(since, tick, shown)
            since = max(since, tick)
        shown = item  # before the first frame a player shows that one
    if shown is not None:
        yield _Shown(since, max(since + 1, stop or 0), shown)


def _pixels(item: Timed, width_px: int, scaler: Scaler | None = None) -> NDArray[np.uint8] | None:
    """The picture of a frame, None if there is none."""
    try:
        return to_rgb_within(item.frame, width_px, item.sample_aspect, scaler)
    except MemoryError:
        raise
    except av.error.FFmpegError:
        return None


def _demuxed(container: InputContainer, stream: Any) -> Iterator[AnyPacket]:
    """The packets of a stream, as far as they can be read."""
    try:
        for packet in container.demux(stream):
            if packet.size:
                yield packet
    except MemoryError:
        raise
    except av.error.FFmpegError:
        return


def _seek(container: InputContainer, to_s: Fraction) -> None:
    """Goes to a keyframe at or before a time; stays at the start where that is not possible."""
    stream = video_stream(container)
    try:
        container.seek(
            math.floor(to_s / (stream.time_base or TICK_S)), stream=stream, backward=True
        )
    except MemoryError:
        raise
    except av.error.FFmpegError:
        return


# ── into a file ──────────────────────────────────────────────────────────────────────────────────


def _h264(out: OutputContainer, options: dict[str, str], threads: int) -> VideoStream:
    if "libx264" not in out.supported_codecs:
        raise UserError(
            f"A segment of this video must be encoded, as H.264, which a file of the format "
            f"{out.format.name} cannot hold: choose *.mp4."
        )
    stream = out.add_stream("libx264", options=options)
    context = stream.codec_context
    context.pix_fmt, context.time_base, context.thread_count = "yuv420p", TICK_S, threads
    context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU601
    return stream


def _encoded(stream: VideoStream, frames: Iterable[_Shown], width_px: int) -> Iterator[AnyPacket]:
    """The packets of the frames, whose even size is that of the first one."""
    lasting: dict[int | None, int] = {}  # which the encoder does not tell

    def encode(frame: VideoFrame | None) -> Iterator[AnyPacket]:
        for packet in stream.encode(frame):
            packet.duration = lasting.pop(packet.pts)
            yield packet

    scaler = Scaler()
    size: tuple[int, int] | None = None
    for shown in frames:
        pixels = _pixels(shown.frame, width_px, scaler)
        if pixels is None:
            continue
        if size is None:
            height, width = pixels.shape[:2]
            size = max(2, height // 2 * 2), max(2, width // 2 * 2)
            stream.height, stream.width = size
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(fit(pixels, *size)), "rgb24")
        # One thread: see vsearch/video.py.
        frame = frame.reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
        frame.pts, frame.time_base = shown.since, TICK_S
        lasting[shown.since] = shown.until - shown.since
        yield from encode(frame)
    if size is None:
        raise VideoError("no frame can be decoded there")
    yield from encode(None)


def _output(path: Path) -> OutputContainer:
    """A file to write packets to. Raises `UserError` for a suffix that no container has."""
    indexed = path.suffix.lower() in (".mp4", ".m4v", ".mov")
    try:
        return av.open(path, "w", container_options={"movflags": "+faststart"} if indexed else {})
    except ValueError as error:
        raise UserError(f"Videos cannot be written as *{path.suffix}: choose *.mp4.") from error


def _write(
    uri: str, begin_s: Fraction, stop_s: Fraction, path: Path, encode: frozenset[str]
) -> Cut:
    """Writes a segment, with the kinds of stream in `encode` encoded anew. Raises `_NoCopyError` for
    another kind that cannot be copied.
    """
    with ExitStack() as stack:
        enter = stack.enter_context
        with open_url(uri) as file:
            seek_s, key_s = _clean_start(file, begin_s)
        if key_s is None and "video" not in encode:
            raise _NoCopyError("video")
        origin_s = begin_s if "video" in encode or key_s is None else key_s
        out = enter(_output(path))
        file = enter(open_url(uri))
        if "video" in encode:
            shown = enter(_frames_shown(file, begin_s, stop_s))
            packets = _encoded(_h264(out, CUT_X264, 0), shown, MAX_WIDTH_PX)
        else:
            packets = _copied_pictures(out, enter(open_container(file)), seek_s, origin_s, stop_s)
        container = enter(open_container(enter(open_url(uri))))
        if seek_s is not None:
            _seek(container, origin_s - SOUND_BEFORE_S)
        sound = _sound(out, container, origin_s, stop_s, "audio" in encode)
        for packet in heapq.merge(packets, sound or (), key=_decoded_at):
            try:
                out.mux(packet)
            except MemoryError:
                raise
            except av.error.FFmpegError as error:
                if packet.stream.type in encode:
                    raise
                raise _NoCopyError(packet.stream.type) from error
    how = {kind: "encoded" if kind in encode else "copied" for kind in ("video", "audio")}
    early_s = max(0.0, float(begin_s - origin_s))
    return Cut(early_s, how["video"], how["audio"] if sound is not None else None)


def _decoded_at(packet: AnyPacket) -> Fraction:
    assert packet.dts is not None and packet.time_base is not None
    return packet.dts * packet.time_base


def _clean_start(file: BinaryIO, begin_s: Fraction) -> tuple[Fraction | None, Fraction | None]:
    """The seek that leads to a keyframe at or before a time (see `frames_from`), and the time of that;
    None in its place if the first frame needs others, which an edit list hides.
    """
    with frames_from(file, begin_s, _seeks(begin_s), threads=1) as (seek_s, frames):
        first = next((item for item in frames if isinstance(item, Timed)), None)
    if first is None:
        raise VideoError("no frame can be decoded there")
    return seek_s, first.pts_s if first.frame.key_frame else None


def _copied_pictures(
    out: OutputContainer,
    container: InputContainer,
    seek_s: Fraction | None,
    key_s: Fraction,
    stop_s: Fraction,
) -> Iterator[AnyPacket]:
    """The packets from the keyframe at `key_s` on, after the seek that leads there."""
    source = video_stream(container)
    stream = _like(out, source)
    if seek_s is not None:
        _seek(container, seek_s)
    packets = itertools.dropwhile(
        lambda packet: _begins_at(packet) != key_s, _demuxed(container, source)
    )
    return _copied(packets, stream, key_s, stop_s)


def _sound(
    out: OutputContainer,
    container: InputContainer,
    origin_s: Fraction,
    stop_s: Fraction,
    encode: bool,
) -> Iterator[AnyPacket] | None:
    """The packets of the sound that belongs to the pictures, None if there is none that can be read."""
    source = container.streams.best("audio", video_stream(container))
    if not isinstance(source, AudioStream) or source.codec_context is None:
        return None
    packets = _demuxed(container, source)
    if encode:
        frames = _sound_frames(packets, origin_s, stop_s)
        first = next(frames, None)
        if first is None:
            return None
        codec = "aac" if "aac" in out.supported_codecs else out.default_audio_codec
        # Not the layout of the source: some files tell only how many channels there are.
        layout = "mono" if first.layout.nb_channels == 1 else "stereo"
        stream = out.add_stream(codec, rate=first.sample_rate, layout=layout)
        assert isinstance(stream, AudioStream)
        return _encoded_sound(stream, itertools.chain([first], frames))
    packets = itertools.dropwhile(lambda packet: _before(packet, origin_s), packets)
    head = next(packets, None)
    if head is None or (begins_s := _begins_at(head)) is None or begins_s >= stop_s:
        return None
    return _copied(itertools.chain([head], packets), _like(out, source), origin_s, stop_s)


def _begins_at(packet: AnyPacket) -> Fraction | None:
    return None if packet.pts is None else packet.pts * packet.time_base


def _before(packet: AnyPacket, time_s: Fraction) -> bool:
    begins_s = _begins_at(packet)
    return begins_s is None or begins_s < time_s


def _like(out: OutputContainer, source: VideoStream | AudioStream) -> Any:
    """A stream that takes the packets of another file's. Raises `_NoCopyError` where it cannot be."""
    if source.codec_context.codec.name not in out.supported_codecs:
        raise _NoCopyError(source.type)
    return out.add_stream_from_template(source, opaque=True)


def _copied(
    packets: Iterable[AnyPacket], stream: Any, origin_s: Fraction, stop_s: Fraction
) -> Iterator[AnyPacket]:
    """Packets as they are, `origin_s` earlier: those that begin before `stop_s`, and those that these
    need. What begins before `origin_s` but comes later needs what is cut off, and is left out.
    """
    held: list[AnyPacket] = []
    for packet in _stamped(packets):
        begins_s = _begins_at(packet)
        if begins_s is None or packet.pts is None or packet.dts is None:
            raise _NoCopyError(stream.type)
        if begins_s < origin_s:
            continue
        last = packet.dts * packet.time_base >= stop_s or len(held) == HELD_PACKETS
        shift = round(origin_s / packet.time_base)
        packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
        held.append(packet)
        if begins_s < stop_s:
            yield from held
            held.clear()
        elif last:
            return


def _stamped(packets: Iterable[AnyPacket]) -> Iterator[AnyPacket]:
    """Packets with times of decoding, which some containers do not store, so that FFmpeg cannot tell
    them of the first ones after a seek: those come a tick each before the first that has one.
    """
    waiting: list[AnyPacket] = []
    for packet in packets:
        waiting.append(packet)
        if packet.dts is not None:
            for place, earlier in enumerate(waiting):
                earlier.dts = packet.dts - (len(waiting) - 1 - place)
        if packet.dts is not None or len(waiting) > HELD_PACKETS:
            yield from waiting
            waiting.clear()
    yield from waiting


def _sound_frames(
    packets: Iterable[AnyPacket], begin_s: Fraction, stop_s: Fraction
) -> Iterator[AudioFrame]:
    """What begins in a stretch, with times from its begin on."""
    for packet in packets:
        try:
            frames = packet.decode()
        except MemoryError:
            raise
        except av.error.FFmpegError:  # a player goes on as well
            continue
        for frame in frames:
            if frame.pts is None or not isinstance(frame, AudioFrame):
                continue
            begins_s = frame.pts * frame.time_base
            if begins_s >= stop_s:
                return
            if begins_s >= begin_s:
                frame.time_base = Fraction(1, frame.sample_rate)
                frame.pts = round((begins_s - begin_s) * frame.sample_rate)
                yield frame


def _encoded_sound(stream: AudioStream, frames: Iterable[AudioFrame]) -> Iterator[AnyPacket]:
    for frame in frames:
        yield from stream.encode(frame)
    yield from stream.encode(None)
