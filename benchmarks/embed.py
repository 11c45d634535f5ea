"""How long both embeddings of a frame take, against what the machine can do: uint8 in host memory →
DINOv3 ViT-B/16 and CLIP ViT-B/16 at 224 pixels in host memory.

Method: `Encoders.embed`, as the ingest actor calls it, with models of the real architectures and random
weights, on which the time does not depend. The frames are real, 224 pixels on the shorter side, repeated;
each call gets a span of them. A figure is the best of `ROUNDS` over all spans, by the clock of the host,
after one round that nobody counts (it compiles). The limit is the operations of a frame, counted by
torch's own counter, over the rate of a large product of matrices, of the fastest of the types compared,
measured on the same device just before. The cosine is the least between vectors of frames of several
clips and those that the same models give in float32 on the CPU. `alone` are the parts of an embedding one
after the other, each waited for: `bring` (to pinned memory and to the device), `prepare` (both
preprocessings), `models`. Growth is that of the seconds with the number of frames, in the default way and
its first batch, by spans as ever.

On a GPU it compares ways and batches, and makes memory short, in which the batch must halve. Without one,
it does the same with few frames on the CPU, in bf16 where that computes in it. Needs torch, transformers,
open_clip, PyAV and `vsearch`, not Ray.

    python benchmarks/embed.py --json embed.json     # under 8 minutes
"""

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from decode import exponent
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DINOv3ViTConfig, DINOv3ViTImageProcessor, DINOv3ViTModel

from vsearch.config import EncoderNames, Sampling
from vsearch.encoders import Encoders, image_dtype
from vsearch.video import decode, probe

Pixels = NDArray[np.uint8]

VIDEOS = Path(__file__).parents[2] / "shared" / "videos"
CLIPS = (
    "intel__car-detection.mp4",
    "intel__book.mkv",
    "mdn__flower.mp4",
    "media__bear-vp9.webm",
)
PX = 224
ROUNDS = 3
LAST_START_S = 330
"""No further way is begun after so many seconds."""
SHORT_MEMORY_BYTES = 2 << 30
PUBLISHED = {
    "the article, both models": "5 to 10 ms a frame",
    "clip-retrieval, one CLIP B/16, A100": "1,100 images/s: 0.9 ms a frame for one of the two models",
}


@dataclass(frozen=True)
class Way:
    dtype: torch.dtype
    compiled: str | None
    """torch.compile's mode, None where the models run as they are."""
    batches: tuple[int, ...]

    @property
    def name(self) -> str:
        how = {None: "eager", "default": "compiled", "reduce-overhead": "CUDA graphs"}
        return f"{str(self.dtype).removeprefix('torch.')}, {how[self.compiled]}"


@dataclass(frozen=True)
class Size:
    """What is measured on a device: `spans` of `span_frames` frames, and as many as `growth` says."""

    ways: tuple[Way, ...]
    spans: int
    span_frames: int
    cosine_frames: int
    """Of each clip."""
    growth: tuple[int, ...]
    matrix: int


GPU = Size(
    (
        Way(torch.bfloat16, None, (32, 128, 256)),
        Way(torch.bfloat16, "default", (256, 512, 128, 64, 32)),
        Way(torch.float32, None, (256,)),
        Way(torch.bfloat16, "reduce-overhead", (256, 32)),
    ),
    spans=4,
    span_frames=Sampling().span_frames,
    cosine_frames=16,
    growth=(512, 2048, 8192),
    matrix=8192,
)
CPU = Size(
    tuple(Way(dtype, None, (8,)) for dtype in dict.fromkeys((image_dtype("cpu"), torch.float32))),
    spans=1,
    span_frames=8,
    cosine_frames=2,
    growth=(4, 16, 64),
    matrix=3072,
)


def save_random_models(folder: Path, layers: int) -> EncoderNames:
    """DINOv3 ViT-B/16 as a transformers folder, CLIP ViT-B/16 as one of open_clip."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    dino = DINOv3ViTConfig(num_hidden_layers=layers, num_register_tokens=4, **sizes)
    DINOv3ViTModel(dino).save_pretrained(folder / "dino")
    DINOv3ViTImageProcessor(size={"height": PX, "width": PX}).save_pretrained(folder / "dino")
    clip = open_clip.get_model_config("ViT-B-16")
    for tower in ("vision_cfg", "text_cfg"):
        clip[tower]["layers"] = layers
    (folder / "clip").mkdir()
    (folder / "clip" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": clip, "preprocess_cfg": {}})
    )
    state = open_clip.CLIP(**clip).state_dict()
    torch.save(state, folder / "clip" / "open_clip_pytorch_model.bin")
    return EncoderNames(str(folder / "dino"), str(folder / "clip"))


def frames_of_clips(count: int) -> Iterator[Pixels]:
    """`count` frames, uint8 (count, height, width, 3), of each clip; of made ones where there are none."""
    if not VIDEOS.is_dir():
        print(f"There are no clips in {VIDEOS}: frames are made up.", file=sys.stderr)
        yield from _made_frames(count)
        return
    for name in CLIPS:
        with (VIDEOS / name).open("rb") as file:
            spans = decode(file, probe(file), PX, Sampling(fps=4))
            pictures = [picture for span in spans for picture in span.pixels]
        chosen = np.linspace(0, len(pictures) - 1, count).astype(int)
        yield np.stack([pictures[i] for i in chosen])


def _made_frames(count: int) -> Iterator[Pixels]:
    from PIL import Image

    from vsearch.demo.scenes import SceneRenderer, sample_scene

    rng = np.random.default_rng(0)
    for width in (398, 298, 224, 398):
        scenes = (SceneRenderer(sample_scene(rng)).frame(0.5) for _ in range(count))
        drawn = (Image.fromarray(scene).resize((width, PX)) for scene in scenes)
        yield np.stack([np.asarray(picture) for picture in drawn])


# ── the limit ────────────────────────────────────────────────────────────────────────────────────


def matrix_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of the product of two square matrices of random numbers: the best of some."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    products = 10 if device == "cuda" else 1

    def work() -> None:
        for _ in range(products):
            a @ b

    return 2 * size**3 * products / min(islice(_timed(device, work), 1, 6))


def flop_per_frame(encoders: Encoders, frame: Pixels) -> dict[str, int]:
    """Floating-point operations, counted in what the models do on the CPU with one frame (1, h, w, 3)."""
    counted = {}
    torch.backends.mha.set_fastpath_enabled(False)  # its operation is not one that is counted
    for name in ("dino", "clip"):
        encoder = getattr(encoders, name)
        images = encoder.prepare(frame)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encoder.encode_prepared(images)
        counted[name] = counter.get_total_flops()
    torch.backends.mha.set_fastpath_enabled(True)
    return counted


def _timed(device: str, work: Callable[[], object]) -> Iterator[float]:
    """Seconds of one run after another."""
    while True:
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        yield time.perf_counter() - began


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ── the ways ─────────────────────────────────────────────────────────────────────────────────────


class Bench:
    def __init__(self, device: str, size: Size, layers: int, folder: Path) -> None:
        self._device, self._size = device, size
        self._names = save_random_models(folder, layers)
        self._clips = list(frames_of_clips(size.cosine_frames))
        few = self._clips[0]
        self._span = np.concatenate([few] * -(-size.span_frames // len(few)))[: size.span_frames]
        exact = Encoders(self._names, "cpu", dtype=torch.float32)
        self.flop = flop_per_frame(exact, few[:1])
        self._exact = [exact.embed(pixels) for pixels in self._clips]
        self.rates = {
            str(dtype).removeprefix("torch."): matrix_rate(device, dtype, size.matrix)
            for dtype in dict.fromkeys(way.dtype for way in size.ways)
        }
        self._limit_s = sum(self.flop.values()) / max(self.rates.values())

    def rows(self) -> Iterator[dict[str, Any]]:
        for way in self._size.ways:
            default = way.dtype == image_dtype(self._device)
            row = {"way": way.name, "default": default and way.compiled in (None, "default")}
            if time.monotonic() - BEGAN > LAST_START_S:
                yield row | {"failed": "not begun: no time was left"}
                continue
            try:
                encoders = self._encoders(way)
                for batch in way.batches:
                    print(f"{way.name}, batch {batch}", file=sys.stderr, flush=True)
                    figures = self._figures(encoders, batch)
                    if batch == way.batches[0]:
                        figures["kernels"] = self._kernels(encoders)
                        if row["default"]:
                            figures["growth"] = self._growth(encoders)
                    yield row | figures
            except Exception as error:  # the other ways are still of interest
                yield {"way": way.name, "default": False} | _failure(error)
            torch._dynamo.reset()

    def _encoders(self, way: Way) -> Encoders:
        encoders = Encoders(self._names, self._device, dtype=way.dtype)
        if way.compiled:
            encoders.compile(way.compiled)
            torch._dynamo.config.suppress_errors = False  # here a failure must be seen
        return encoders

    def _figures(self, encoders: Encoders, batch: int) -> dict[str, Any]:
        encoders.batch = batch
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()

        frames = self._size.spans * self._size.span_frames
        first_s, *times = islice(self._embeddings(encoders, frames), 1 + ROUNDS)
        frame_s = min(times) / frames
        return {
            "batch": encoders.batch,
            "ms": frame_s * 1000,
            "frames_per_s": 1 / frame_s,
            "to_limit": self._limit_s / frame_s,
            "peak_gib": self._peak_bytes() / 2**30,
            "cosine": self.cosine(encoders),
            "first_s": first_s - min(times),
            "alone_ms": self._alone(encoders),
            "spread": max(times) / min(times) - 1,
        }

    def _growth(self, encoders: Encoders) -> dict[str, Any]:
        """Seconds of so many frames, and of which power of these they are."""
        frames = self._size.growth
        seconds = [min(islice(self._embeddings(encoders, n), ROUNDS)) for n in frames]
        return {"frames": frames, "seconds": seconds, "exponent": exponent(frames, seconds)}

    def _embeddings(self, encoders: Encoders, frames: int) -> Iterator[float]:
        """Seconds of embedding so many frames, span by span, again and again."""

        def work() -> None:
            for start in range(0, frames, len(self._span)):
                encoders.embed(self._span[: frames - start])

        return _timed(self._device, work)

    def _peak_bytes(self) -> int:
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def cosine(self, encoders: Encoders) -> dict[str, float]:
        """The least over frames of the clips, to float32 on the CPU."""
        found = [encoders.embed(pixels) for pixels in self._clips]
        pairs = zip(
            *(zip(a, b, strict=True) for a, b in zip(found, self._exact, strict=True)), strict=True
        )
        return {
            name: min(_cosine(a, b) for a, b in each)
            for name, each in zip(("dino", "clip"), pairs, strict=True)
        }

    def _alone(self, encoders: Encoders) -> dict[str, float]:
        pixels = self._span[: encoders.batch]
        frames = encoders.link.bring(pixels)
        both = (encoders.dino, encoders.clip)
        prepared = [e.prepare(frames) for e in both]
        parts: dict[str, Callable[[], object]] = {
            "bring": lambda: encoders.link.bring(pixels),
            "prepare": lambda: [e.prepare(frames) for e in both],
            "models": lambda: [e.encode_prepared(p) for e, p in zip(both, prepared, strict=True)],
        }
        once = {
            name: next(islice(_timed(self._device, work), 1, None)) for name, work in parts.items()
        }
        return {name: seconds / len(pixels) * 1000 for name, seconds in once.items()}

    def _kernels(self, encoders: Encoders) -> dict[str, float]:
        """The largest shares of the device's time for a span, by kernel; of the CPU's, by operation."""
        with torch.profiler.profile() as profile:
            encoders.embed(self._span)
        kind, spent = torch.autograd.DeviceType.CPU, "self_cpu_time_total"
        if self._device == "cuda":
            kind, spent = torch.autograd.DeviceType.CUDA, "self_device_time_total"
        events = [event for event in profile.key_averages() if event.device_type == kind]
        times = {event.key: getattr(event, spent) for event in events}
        largest = sorted(times, key=lambda key: -times[key])[:12]
        return {key[:80]: round(times[key] / sum(times.values()), 3) for key in largest}

    def short_memory(self) -> dict[str, Any]:
        """On a GPU of which we allow ourselves little, the largest batch is asked for."""
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(SHORT_MEMORY_BYTES / total)
        try:
            encoders = Encoders(self._names, self._device, batch=len(self._span))
            encoders.embed(self._span)
            found = {"batch": encoders.batch, "cosine": self.cosine(encoders)}
        except Exception as error:
            found = _failure(error)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return {"allowed_gib": SHORT_MEMORY_BYTES / 2**30, "asked": len(self._span), **found}


def _failure(error: Exception) -> dict[str, Any]:
    return {"failed": f"{type(error).__name__}: {error}"[:300]}


def _cosine(a: NDArray[np.float16], b: NDArray[np.float16]) -> float:
    """The least over rows."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    return float(((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).min())


# ── what it prints ───────────────────────────────────────────────────────────────────────────────


def machine(device: str) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": {
            name: version(name) for name in ("torch", "transformers", "open_clip_torch", "av")
        },
        "date": time.strftime("%Y-%m-%d"),
    }


def measure(device: str, size: Size, layers: int = 12) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, size, layers, Path(folder))
        found: dict[str, Any] = {
            "machine": machine(device),
            "gflop_per_frame": {name: flop / 1e9 for name, flop in bench.flop.items()},
            "tflops": {name: rate / 1e12 for name, rate in bench.rates.items()},
        }
        if device == "cuda":
            found["short_memory"] = bench.short_memory()
        return found | {"rows": list(bench.rows()), "published": PUBLISHED}


def show(found: dict[str, Any], console: Console) -> None:
    rates = ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in found["tflops"].items())
    gflop = sum(found["gflop_per_frame"].values())
    console.print(f"{found['machine']}\nmatrices: {rates}; a frame: {gflop:.1f} GFLOP")
    table = Table()
    heads = ("way", "batch", "ms", "frames/s", "of the limit", "peak GiB", "cosine DINO", "CLIP")
    for head in (*heads, "bring + prepare + models alone, ms"):
        table.add_column(head)
    for row in found["rows"]:
        name = row["way"] + (" (default)" if row["default"] else "")
        if "failed" in row:
            table.add_row(name, row["failed"])
            continue
        table.add_row(
            name,
            str(row["batch"]),
            f"{row['ms']:.3g}",
            f"{row['frames_per_s']:.4g}",
            f"{row['to_limit']:.0%}",
            f"{row['peak_gib']:.1f}",
            *(f"{row['cosine'][name]:.5f}" for name in ("dino", "clip")),
            " + ".join(f"{part:.3g}" for part in row["alone_ms"].values()),
        )
    if not torch.cuda.is_available():
        table.add_row("GPU", "not measured yet")
    console.print(table)
    for row in found["rows"]:
        if "kernels" in row:
            shares = (f"{share:.0%} {name}" for name, share in list(row["kernels"].items())[:6])
            console.print(f"{row['way']}, batch {row['batch']}:", ", ".join(shares))
        if "growth" in row:
            growth = row["growth"]
            times = zip(growth["frames"], growth["seconds"], strict=True)
            shown = ", ".join(f"{frames:,} frames {seconds:.3g} s" for frames, seconds in times)
            console.print(f"growth with the frames: {shown}; exponent {growth['exponent']}")
    for name in ("short_memory", "published"):
        if name in found:
            console.print(f"{name}:", found[name])


BEGAN = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = measure(device, GPU if device == "cuda" else CPU)
    show(found, Console(width=None if sys.stdout.isatty() else 160))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
