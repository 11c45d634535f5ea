"""How fast one core decodes, next to FFmpeg itself doing the same decode and scale.

Method: processor seconds of all processes that take part (other work on the machine counts little), and
seconds of the clock; the least of some rounds. Real clips, and one of them scaled to four sizes and
encoded anew with each codec (`calibrate.py`). Every frame is kept, its shorter side is 224 px. The ways:

    ffmpeg       the program, if there is one: `-vf scale -pix_fmt rgb24 -f rawvideo`, one thread, to
                 /dev/null, less what it takes for one frame
    loop         PyAV's FFmpeg in the tightest loop: packets → decode → one scale (bicubic) to rgb24, its
                 set-up kept, nothing done with the pixels. This is what the ratio is against
    loop, ours   the same, by way of planes: the least that gives our pixels
    decode       `vsearch.video.decode`, in this process
    worker       `vsearch.decoder.Decoder.decode`: the child decodes, this process copies the pixels

    rates    frames a second and core of each way, on each real clip
    sizes    the same of the clips that are made, and how the time grows with the pixels
    threads  FFmpeg's frame and slice threads on all cores, next to a worker a core
    scalers  what flags of the scaler cost, and how near the demo's embeddings are to those of the exact
             picture (scaled to 16 bits)
    ranges   reading through ranges, as from remote storage, next to a plain file
    yuv      YUV in place of RGB through the object store: what it would save and cost
    lengths  how seconds and memory grow with the length of a video

NVDEC (torchcodec on a GPU): not measured yet.

    python benchmarks/decode.py CLIPS --folder DIR --json out.json     # CLIPS: a folder
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import fsspec
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from calibrate import encoded, pictures, repeated
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from vsearch.config import PRESETS, Sampling
from vsearch.decoder import Decoder
from vsearch.sampling import SpanRun
from vsearch.storage import RangeReader, filesystem, mark_of
from vsearch.video import Scaler, VideoInfo, decode, probe

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("rates", "sizes", "threads", "scalers", "ranges", "yuv", "lengths")
REAL = (
    "torchcodec__nasa_13013.mp4",
    "media__bear-vp9.webm",
    "derived_av1_10bit.mp4",
    "intel__bottle-detection.mp4",
    "intel__car-detection.mp4",
    "mdn__flower.webm",
    "moviepy__no_duration.webm",
    "sam2__04_coffee.mp4",
    "mediabunny__video-h265.mp4",
)
FEW = ("intel__bottle-detection.mp4", "sam2__04_coffee.mp4", "mediabunny__video-h265.mp4")
"""For all parts but the rates."""

SOURCE = "sam2__04_coffee.mp4"
MADE = ("h264", "hevc", "vp9", "av1")
HEIGHTS = (360, 720, 1080, 2160)
SHORT_PX = 224
LENGTHS_S = (30, 120, 480)
EVERY = 20
"""Of so many frames of a clip one is embedded."""
RANGES_KIB = (64, 1024, 8192)

BICUBIC = Interpolation.BICUBIC
EXACT = BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
SCALERS = {
    "bicubic": BICUBIC,
    "bicubic, full colour": BICUBIC | Interpolation.FULL_CHR_H_INT,
    "bilinear": Interpolation.BILINEAR,
    "fast bilinear": Interpolation.FAST_BILINEAR,
    "area": Interpolation.AREA,
    "lanczos": Interpolation.LANCZOS,
}
CONSOLE = Console(width=160, stderr=True)
Row = dict[str, Any]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Clip:
    """A file to decode, and the size that its frames are scaled to."""

    path: Path
    info: VideoInfo
    width: int
    height: int

    @property
    def name(self) -> str:
        return f"{self.path.name} ({self.info.codec}, {self.info.width}×{self.info.height})"


def clip_of(path: Path) -> Clip:
    with path.open("rb") as file:
        info = probe(file)
    scale = SHORT_PX / min(info.width, info.height)
    return Clip(path, info, round(info.width * scale), round(info.height * scale))


def made(folder: Path, source: Path, codec: str, height: int) -> Clip:
    path = folder / f"{height}p-{codec}.mkv"
    if not path.exists():
        path.write_bytes(encoded(pictures(str(source)), height, codec))
    return clip_of(path)


def cpu_s(pids: list[int]) -> float:
    """Processor seconds so far of these processes, to the nanosecond: Linux makes a clock's number of a
    process id.
    """
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in [os.getpid(), *pids])


@dataclass(frozen=True)
class Took:
    frames: int
    cpu_s: float
    wall_s: float

    @property
    def cpu_ms(self) -> float:
        return 1000 * self.cpu_s / self.frames

    @property
    def rate(self) -> float:
        """Frames a second and core."""
        return self.frames / self.cpu_s


def least(compute: Callable[[], int], rounds: int, pids: list[int] | None = None) -> Took:
    found = []
    for _ in range(rounds):
        began = cpu_s(pids or []), time.perf_counter()
        frames = compute()
        found.append(Took(frames, cpu_s(pids or []) - began[0], time.perf_counter() - began[1]))
    return min(found, key=lambda took: took.cpu_s)


# ── ways of decoding ─────────────────────────────────────────────────────────────────────────────


def frames_of(path: Path, threads: int = 1, kind: str = "AUTO") -> Iterator[VideoFrame]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = kind, threads
        for packet in container.demux(stream):
            yield from packet.decode()


def one_step(clip: Clip, flags: Interpolation = BICUBIC) -> Callable[[VideoFrame], VideoFrame]:
    kept = VideoReformatter()
    return lambda frame: kept.reformat(
        frame, clip.width, clip.height, "rgb24", interpolation=flags, threads=1
    )


def by_planes(clip: Clip) -> Callable[[VideoFrame], VideoFrame]:
    scaler = Scaler()
    return lambda frame: scaler.rgb(frame, clip.width, clip.height)


def loop(
    clip: Clip, scale: Callable[[VideoFrame], object], threads: int = 1, kind: str = "AUTO"
) -> int:
    count = 0
    for frame in frames_of(clip.path, threads, kind):
        scale(frame)
        count += 1
    return count


def in_process(clip: Clip) -> int:
    with clip.path.open("rb") as file:
        return sum(len(span.pts_s) for span in decode(file, clip.info, SHORT_PX, threads=1))


def by_worker(decoder: Decoder, clip: Clip) -> int:
    fs, name = filesystem(str(clip.path))
    listed = fs.info(name)
    expected = (int(listed["size"]), mark_of(listed))
    spans = decoder.decode(str(clip.path), expected, SHORT_PX, Sampling(), SpanRun(0, None))
    return sum(len(span.pts_s) for span, _ in spans)


def by_program(clip: Clip, threads: int, rounds: int) -> Took | None:
    """None where there is no such program, or it cannot decode this."""
    program = shutil.which("ffmpeg")
    if program is None:
        return None

    def run(*more: str) -> Took:
        command = [program, "-v", "error", "-nostdin", "-threads", str(threads)]
        command += ["-noautorotate", "-i", str(clip.path), "-map", "0:v:0", *more]
        command += ["-vf", f"scale={clip.width}:{clip.height}:flags=bicubic"]
        command += ["-filter_threads", str(threads), "-fps_mode", "passthrough"]
        command += ["-pix_fmt", "rgb24", "-f", "rawvideo", "-y", "/dev/null"]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = sum(getattr(after, n) - getattr(before, n) for n in ("ru_utime", "ru_stime"))
        return Took(0, used, time.perf_counter() - began)

    try:
        whole, one = (
            min((run(*more) for _ in range(rounds)), key=lambda took: took.cpu_s)
            for more in ((), ("-frames:v", "1"))
        )
    except subprocess.CalledProcessError:
        return None
    frames = loop(clip, lambda frame: None)
    return Took(frames - 1, whole.cpu_s - one.cpu_s, whole.wall_s - one.wall_s)


# ── the parts ────────────────────────────────────────────────────────────────────────────────────


def rates(clips: list[Clip], rounds: int) -> list[Row]:
    decoder = Decoder()
    rows = []
    for clip in clips:
        by_worker(decoder, clip)  # the child has started, its memory is there
        assert decoder._child is not None
        child = [decoder._child.pid]
        ways = {
            "loop": least(lambda c=clip: loop(c, one_step(c)), rounds),
            "loop, ours": least(lambda c=clip: loop(c, by_planes(c)), rounds),
            "decode": least(lambda c=clip: in_process(c), rounds),
            "worker": least(lambda c=clip: by_worker(decoder, c), rounds, child),
        }
        program = by_program(clip, 1, rounds)
        bare = least(lambda c=clip: loop(c, lambda frame: None), rounds)
        rows.append(
            {"clip": clip.name, "frames": bare.frames, "decode alone, ms": round(bare.cpu_ms, 3)}
            | {"ffmpeg": round(program.rate) if program else None}
            | {name: round(took.rate) for name, took in ways.items()}
            | {"worker, wall": round(ways["worker"].frames / ways["worker"].wall_s)}
            | {"worker / loop": round(ways["worker"].rate / ways["loop"].rate, 2)}
            | {"/ ours": round(ways["worker"].rate / ways["loop, ours"].rate, 2)}
            | {"/ ffmpeg": round(ways["worker"].rate / program.rate, 2) if program else None}
        )
        CONSOLE.print(rows[-1])
    decoder.close()
    return rows


def at_once(pool: ThreadPoolExecutor, decoders: list[Decoder], clip: Clip) -> int:
    return sum(pool.map(by_worker, decoders, [clip] * len(decoders)))


def threads(clips: list[Clip], rounds: int) -> list[Row]:
    """Frames a second by the clock, and processor milliseconds a frame, on all cores."""
    cores = os.cpu_count() or 1
    decoders = [Decoder() for _ in range(cores)]
    rows = []
    with ThreadPoolExecutor(cores) as pool:
        for clip in clips:
            every = partial(at_once, pool, decoders, clip)
            every()
            children = [d._child.pid for d in decoders if d._child is not None]
            ways = {
                f"{kind.lower()}, {count}": least(
                    lambda c=clip, k=kind, n=count: loop(c, by_planes(c), n, k), rounds
                )
                for kind, count in (("SLICE", 1), ("SLICE", cores), ("FRAME", cores))
            }
            ways[f"{cores} workers"] = least(every, rounds, children)
            row: Row = {"clip": clip.name}
            for name, took in ways.items():
                row[f"{name}: frames/s"] = round(took.frames / took.wall_s)
                row[f"{name}: ms"] = round(took.cpu_ms, 2)
            program = by_program(clip, cores, rounds)
            row["ffmpeg: frames/s"] = round(program.frames / program.wall_s) if program else None
            rows.append(row)
            CONSOLE.print(row)
    for decoder in decoders:
        decoder.close()
    return rows


def sample(clip: Clip) -> list[VideoFrame]:
    return [frame for number, frame in enumerate(frames_of(clip.path)) if number % EVERY == 0]


def exact(frame: VideoFrame, width: int, height: int) -> Pixels:
    """Scaled to 16 bits with nothing left out, and rounded."""
    found = VideoReformatter().reformat(
        frame, width, height, "gbrp16le", interpolation=EXACT, threads=1
    )
    planes = [np.frombuffer(p, np.uint16).reshape(height, -1)[:, :width] for p in found.planes]
    return np.stack([np.rint(planes[n] / 257) for n in (2, 0, 1)], axis=2).astype(np.uint8)


class Nearness:
    """How near pictures, and their embeddings by the demo's models, are to those of the exact ones."""

    def __init__(self, clips: list[Clip]) -> None:
        from vsearch.encoders import Encoders

        self._encoders = Encoders(PRESETS["demo"], "cpu")
        self._frames = [sample(clip) for clip in clips]
        self._truth = self._of(exact)

    def _size(self, frame: VideoFrame) -> tuple[int, int]:
        scale = self._encoders.input_px / min(frame.width, frame.height)
        return round(frame.width * scale), round(frame.height * scale)

    def _of(self, convert: Callable[[VideoFrame, int, int], Pixels]) -> list[tuple[Any, ...]]:
        found = []
        for frames in self._frames:
            pixels = np.stack([convert(frame, *self._size(frame)) for frame in frames])
            found.append((pixels, *self._encoders.embed(pixels)))
        return found

    def of(self, convert: Callable[[VideoFrame, int, int], Pixels]) -> Row:
        found = self._of(convert)
        pairs = list(zip(found, self._truth, strict=True))
        square = np.concatenate([np.square(a[0].astype(int) - b[0]).ravel() for a, b in pairs])
        row: Row = {"rms of pixels": round(float(np.sqrt(square.mean())), 2)}
        for place, name in ((1, "dino"), (2, "clip")):
            a, b = (
                np.concatenate([x[place] for x in side]).astype(float)
                for side in zip(*pairs, strict=True)
            )
            cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
            row |= {
                f"{name}, mean": round(cosine.mean(), 5),
                f"{name}, least": round(cosine.min(), 4),
            }
        return row


def scaled(flags: Interpolation) -> Callable[[VideoFrame, int, int], Pixels]:
    return lambda frame, width, height: np.asarray(
        VideoReformatter()
        .reformat(frame, width, height, "rgb24", interpolation=flags, threads=1)
        .to_ndarray()
    )


def ours(frame: VideoFrame, width: int, height: int) -> Pixels:
    return np.asarray(Scaler().rgb(frame, width, height).to_ndarray())


def scaling(clip: Clip, scale: Callable[[VideoFrame], object], rounds: int) -> float:
    """Processor milliseconds a frame."""
    frames = sample(clip)
    return least(lambda: len([scale(frame) for frame in frames]), 3 * rounds).cpu_ms


def scalers(clips: list[Clip], rounds: int) -> list[Row]:
    near = Nearness(clips)
    ways = {"ours: bicubic, by planes": (by_planes, ours)} | {
        name: (lambda clip, f=flags: one_step(clip, f), scaled(flags))
        for name, flags in SCALERS.items()
    }
    rows = []
    for name, (scale, convert) in ways.items():
        costs = {
            f"ms, {clip.info.height}p": round(scaling(clip, scale(clip), rounds), 2)
            for clip in clips
        }
        rows.append({"scaler": name} | costs | near.of(convert))
        CONSOLE.print(rows[-1])
    return rows


def ranges(clips: list[Clip], rounds: int) -> list[Row]:
    local = fsspec.filesystem("file")
    rows = []
    for clip in clips:
        size = clip.path.stat().st_size

        def read(open_file: Callable[[], Any], clip: Clip = clip) -> int:
            with open_file() as file:
                return sum(len(span.pts_s) for span in decode(file, clip.info, SHORT_PX, threads=1))

        plain = least(lambda c=clip: read(lambda: c.path.open("rb")), rounds)
        row: Row = {"clip": clip.name, "MB": round(size / 1e6, 1), "plain, ms": plain.cpu_ms}
        for kib in RANGES_KIB:
            ranged = least(
                lambda c=clip, s=size, k=kib: read(
                    lambda: RangeReader(local, str(c.path), s, lambda: None, k << 10)
                ),
                rounds,
            )
            row[f"{kib} KiB"] = f"{ranged.cpu_ms / plain.cpu_ms - 1:+.1%}"
        rows.append(row | {"plain, ms": round(plain.cpu_ms, 3)})
        CONSOLE.print(rows[-1])
    return rows


# ── YUV ──────────────────────────────────────────────────────────────────────────────────────────


def to_yuv(frame: VideoFrame, width: int, height: int, kept: VideoReformatter) -> VideoFrame:
    return kept.reformat(
        frame, width // 2 * 2, height // 2 * 2, "yuv420p", interpolation=BICUBIC, threads=1
    )


def planes_of(frame: VideoFrame) -> "list[Tensor]":
    import torch

    found = []
    for plane in frame.planes:
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width]
        found.append(torch.from_numpy(np.ascontiguousarray(rows)))
    return found


def rgb_of(planes: "list[Tensor]", matrix: "Tensor", offset: "Tensor") -> "Tensor":
    """uint8 RGB (n, 3, h, w) of Y (n, h, w), U and V (n, h/2, w/2), as a device would do it."""
    import torch

    luma, *chroma = (plane.float()[:, None] for plane in planes)
    wide = torch.nn.functional.interpolate(torch.cat(chroma, 1), scale_factor=2, mode="bilinear")
    yuv = torch.cat([luma, wide], 1) - offset
    return torch.einsum("ij,njhw->nihw", matrix, yuv).round_().clamp_(0, 255).byte()


def colours(frame: VideoFrame) -> "tuple[Tensor, Tensor]":
    """The matrix of a frame's colour space and range, and what is taken off before."""
    import torch

    red, blue = (0.2126, 0.0722) if frame.colorspace == 1 else (0.299, 0.114)
    green, full = 1 - red - blue, frame.color_range == 2
    light, colour = (1.0, 1.0) if full else (255 / 219, 255 / 224)
    v, u = 2 * (1 - red) * colour, 2 * (1 - blue) * colour
    rows = [[light, 0, v], [light, -u * blue / green, -v * red / green], [light, u, 0]]
    return torch.tensor(rows), torch.tensor([0.0 if full else 16.0, 128, 128])[:, None, None]


def by_yuv(frame: VideoFrame, width: int, height: int) -> Pixels:
    small = to_yuv(frame, width, height, VideoReformatter())
    rgb = rgb_of([plane[None] for plane in planes_of(small)], *colours(frame))[0]
    pixels = rgb.permute(1, 2, 0).numpy()
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.pad(pixels, ((0, height - len(pixels)), (0, width - pixels.shape[1]), (0, 0)), "edge")


def yuv(clips: list[Clip], rounds: int) -> list[Row]:
    import torch

    torch.set_num_threads(1)
    near = Nearness(clips)
    told = {"rgb": near.of(ours), "yuv": near.of(by_yuv)}
    rows = []
    for clip in clips:
        frames, kept = sample(clip)[:32], VideoReformatter()
        colour = colours(frames[0])
        ready = [planes_of(to_yuv(frame, clip.width, clip.height, kept)) for frame in frames]
        batch = [torch.stack(list(planes)) for planes in zip(*ready, strict=True)]
        store = np.empty((len(frames), clip.height, clip.width, 3), np.uint8)
        thin = np.empty((len(frames), 3 * clip.height * clip.width // 2), np.uint8)
        costs = {
            "RGB: scale, ms": scaling(clip, by_planes(clip), rounds),
            "YUV: scale, ms": scaling(
                clip, lambda f, c=clip, k=kept: to_yuv(f, c.width, c.height, k), rounds
            ),
            "convert on a core, ms": least(
                lambda b=batch, c=colour: len(rgb_of(b, *c)), 3 * rounds
            ).cpu_ms,
            "RGB: a copy, ms": least(lambda s=store: len(s.copy()), 3 * rounds).cpu_ms,
            "YUV: a copy, ms": least(lambda s=thin: len(s.copy()), 3 * rounds).cpu_ms,
        }
        bytes_ = {"RGB: kB": store[0].nbytes / 1000, "YUV: kB": thin[0].nbytes / 1000}
        rows.append({"clip": clip.name} | {k: round(v, 3) for k, v in (costs | bytes_).items()})
        CONSOLE.print(rows[-1])
    rows += [{"clip": f"all, {name}"} | row for name, row in told.items()]
    return rows


# ── growth ───────────────────────────────────────────────────────────────────────────────────────


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    return round(float(np.polyfit(np.log(sizes), np.log(costs), 1)[0]), 2)


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if "VmHWM" in line)


def sizes(folder: Path, source: Path, heights: Sequence[int], rounds: int) -> list[Row]:
    rows: list[Row] = []
    grown: list[Row] = []
    for codec in MADE:
        clips = [made(folder, source, codec, height) for height in heights]
        found = rates(clips, rounds)
        pixels = [clip.info.width * clip.info.height for clip in clips]
        rows += found
        grown.append(
            {"clip": f"growth with the pixels, {codec}: exponent"}
            | {way: exponent(pixels, [1 / row[way] for row in found]) for way in ("loop", "worker")}
        )
    return rows + (grown if len(heights) > 1 else [])


def lengths(folder: Path, source: Path) -> list[Row]:
    cost: Row = {"of": "processor seconds, by length"}
    memory: Row = {"of": "peak memory of the child, MB"}
    frames, costs = [], []
    for seconds in LENGTHS_S:
        path = folder / f"{seconds}s.mp4"
        if not path.exists():
            path.write_bytes(repeated(str(source), seconds))
        decoder = Decoder()
        by_worker(decoder, clip_of(source))
        assert decoder._child is not None
        pid = decoder._child.pid
        took = least(lambda d=decoder, p=path: by_worker(d, clip_of(p)), 1, [pid])
        frames.append(took.frames)
        costs.append(took.cpu_s)
        cost[f"{seconds} s"] = round(took.cpu_s, 2)
        memory[f"{seconds} s"] = round(peak_bytes(pid) / 1e6)
        decoder.close()
    return [cost | {"exponent": exponent(frames, costs)}, memory]


def show(title: str, rows: list[Row]) -> None:
    table = Table(title=title)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(name, justify="left" if name in ("clip", "scaler", "of") else "right")
    for row in rows:
        table.add_row(*("" if row.get(name) is None else str(row[name]) for name in names))
    CONSOLE.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", type=Path, help="the folder with the real clips")
    parser.add_argument("--folder", type=Path, help="keeps what is made, for the next time")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--heights", type=int, nargs="*", default=HEIGHTS, help="of made clips")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="figures go here; those of other parts are kept")
    options = parser.parse_args()
    figures = {}
    if options.json and options.json.exists():
        figures = json.loads(options.json.read_text())
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        source = options.clips / SOURCE
        real = [clip_of(options.clips / name) for name in REAL]
        few = [clip for clip in real if clip.path.name in FEW]
        for part in options.parts:
            if part == "sizes":
                rows = sizes(folder, source, options.heights, options.rounds)
            elif part == "lengths":
                rows = lengths(folder, source)
            else:
                measure = {"rates": rates, "threads": threads, "scalers": scalers}
                measure |= {"ranges": ranges, "yuv": yuv}
                rows = measure[part](real if part == "rates" else few, options.rounds)
            show(part, rows)
            figures[part] = rows
            if options.json:
                options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
