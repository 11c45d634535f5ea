"""The laws of `vsearch.laws` that can be measured on this machine: what decoding, embedding and storing
cost.

Method: seconds are those of the processor on one thread, so that other work on the machine counts
little. Decoding: a real clip, scaled to three sizes and encoded anew with each codec that PyAV can
write (constant quality, keyframes every two seconds), is decoded by `vsearch.video.decode` with every
frame kept and with one a second, the least of three; a fit by least squares divides the time into
decoding (by megapixel of every frame) and keeping (by frame that is kept, and by its megapixels).
Embedding: CLIP ViT-B/16 with random weights, whose time does not depend on them. Storing: a frames file
of random vectors, which nothing can compress. Requests: what a probe asks of a storage that is not
local, of the clip repeated to ten minutes.

    python benchmarks/calibrate.py CLIP
"""

import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pyarrow as pa

from vsearch.config import CorpusConfig, Encoder, Sampling
from vsearch.corpus import Corpus
from vsearch.laws import vit_gflop
from vsearch.schema import SpanRecord, fingerprint, frames_schema
from vsearch.storage import open_file
from vsearch.video import decode, probe

CODECS = {
    "h264": ("libx264", {"crf": "23", "preset": "veryfast"}),
    "hevc": ("libx265", {"crf": "28", "preset": "veryfast", "x265-params": "log-level=none"}),
    "vp9": ("libvpx-vp9", {"crf": "32", "b": "0", "cpu-used": "8", "deadline": "realtime"}),
    "av1": ("libsvtav1", {"crf": "35", "preset": "10"}),
    "mpeg4": ("mpeg4", {"q:v": "5"}),
    "mjpeg": ("mjpeg", {"q:v": "5"}),
}
HEIGHTS = (360, 720, 1080)
FRAMES, RATE, ROUNDS = 75, 25, 3
INPUT_PX = 224
LONG_S = 600


def took_s(compute: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The least processor seconds of some rounds."""
    found = []
    for _ in range(rounds):
        began = time.process_time()
        compute()
        found.append(time.process_time() - began)
    return min(found)


def pictures(clip: str) -> list[av.VideoFrame]:
    with av.open(clip) as container:
        frames = [frame for frame, _ in zip(container.decode(video=0), range(FRAMES), strict=False)]
    return (frames * FRAMES)[:FRAMES]


def encoded(frames: list[av.VideoFrame], height: int, codec: str) -> bytes:
    name, options = CODECS[codec]
    width = round(height * frames[0].width / frames[0].height / 2) * 2
    file = io.BytesIO()
    with av.open(file, "w", "matroska") as container:
        stream = container.add_stream(name, rate=RATE, options={"g": str(2 * RATE), **options})
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number, frame in enumerate(frames):
            picture = frame.reformat(width, height, stream.pix_fmt)
            picture.pts, picture.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file.getvalue()


def decoding(clip: str) -> None:
    rows, times = [], []
    frames = pictures(clip)
    codecs = []
    for codec, (name, _) in CODECS.items():
        if name not in av.codecs_available:
            continue
        codecs.append(codec)
        for height in HEIGHTS:
            data = encoded(frames, height, codec)
            info = probe(io.BytesIO(data))
            size_mp = info.width * info.height / 1e6
            for fps in (None, 1.0):
                kept = len(frames) if fps is None else FRAMES // RATE

                def run(data: bytes = data, info: Any = info, fps: float | None = fps) -> None:
                    spans = decode(io.BytesIO(data), info, INPUT_PX, Sampling(fps=fps), threads=1)
                    assert sum(len(span.pts_s) for span in spans)

                seconds = took_s(run)
                row = [0.0] * len(CODECS)
                row[len(codecs) - 1] = len(frames) * size_mp
                rows.append([kept, kept * size_mp, *row])
                times.append(seconds)
                line = {"codec": codec, "height": height, "fps": fps, "bytes": len(data)}
                print(
                    json.dumps(line | {"ms_a_frame": round(1000 * seconds / FRAMES, 3)}), flush=True
                )
    matrix = np.array(rows)[:, : 2 + len(codecs)]
    weights = 1 / np.array(times)  # a fit of shares: large pictures count no more than small ones
    found, *_ = np.linalg.lstsq(matrix * weights[:, None], np.ones(len(times)), rcond=None)
    worst = np.abs(matrix @ found * weights - 1).max()
    law = {"keep_s_per_frame": found[0], "keep_s_per_mp": found[1]}
    law |= {f"decode_s_per_mp.{codec}": s for codec, s in zip(codecs, found[2:], strict=True)}
    print(json.dumps({name: float(f"{value:.3g}") for name, value in law.items()}))
    print(json.dumps({"worst_error_of_the_fit": round(float(worst), 2)}), flush=True)


def embedding() -> None:
    import open_clip
    import torch

    torch.set_num_threads(1)
    model = open_clip.create_model("ViT-B-16").eval().visual
    with torch.inference_mode():
        batch = torch.rand(8, 3, INPUT_PX, INPUT_PX)
        model(batch)
        seconds = took_s(lambda: model(batch)) / len(batch)
    gflop = vit_gflop(12, 768, 197, 16)
    line = {"frames_s_core": round(1 / seconds, 2), "gflop_s_core": round(gflop / seconds, 1)}
    print(json.dumps(line), flush=True)


def storing() -> None:
    dino, clip, frames = 768, 512, 8192
    rng = np.random.default_rng(0)
    vectors = []
    for dim in (dino, clip):
        found = rng.standard_normal((frames, dim)).astype(np.float32)
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        flat = pa.array(found.astype(np.float16).reshape(-1))
        vectors.append(pa.FixedSizeListArray.from_arrays(flat, dim))
    span = np.repeat(np.arange(16), frames // 16)
    columns = [
        pa.array(["0123456789abcdef" * 2] * frames),
        pa.array([f"{n:016x}" for n in span]),
        pa.array(span, pa.int32()),
        pa.array(np.arange(frames) % (frames // 16), pa.int32()),
        pa.array(np.arange(frames) / 25),
        *vectors,
    ]
    records = [
        SpanRecord(
            "0123456789abcdef" * 2, f"{n:016x}", n, frames // 16, 20.0 * n, n == 15, decode_s=1.5
        )
        for n in range(16)
    ]
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(folder)
        corpus.require(CorpusConfig(Encoder("", "", dino), Encoder("", "", clip), INPUT_PX))
        began = time.process_time()
        name = corpus.add_frames(pa.table(columns, schema=frames_schema(dino, clip)), records)
        seconds = time.process_time() - began
        size = Path(corpus.path(name)).stat().st_size
        corpus.enter()
        [ledger] = corpus.files("spans")
        ledger_size = Path(corpus.path(ledger)).stat().st_size
    raw = 2 * (dino + clip)
    line = {
        "bytes_a_frame": size / frames,
        "vectors_alone": raw,
        "ratio": round(size / frames / raw, 4),
    }
    print(json.dumps(line | {"store_us_a_frame": round(1e6 * seconds / frames, 1)}))
    print(json.dumps({"ledger_bytes_a_span": ledger_size / 16}), flush=True)


def repeated(clip: str, seconds: float) -> bytes:
    """The clip again and again in an MP4 file, its index at the end as cameras write it."""
    file = io.BytesIO()
    with av.open(clip) as found, av.open(file, "w", "mp4") as container:
        [source] = found.streams.video
        stream = container.add_stream_from_template(source)
        packets = [packet for packet in found.demux(source) if packet.pts is not None]
        length = int(len(packets) / source.average_rate / source.time_base)
        for round_ in range(round(seconds / (length * source.time_base))):
            for packet in packets:
                copy = av.Packet(bytes(packet))
                copy.pts, copy.dts = packet.pts + round_ * length, packet.dts + round_ * length
                copy.duration, copy.time_base = packet.duration, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                container.mux(copy)
    return file.getvalue()


def requests(clip: str) -> None:
    """What a probe of a long video asks for, besides one look at its size and mark."""
    data, asked = repeated(clip, LONG_S), 0

    def note() -> None:
        nonlocal asked
        asked += 1

    fsspec.filesystem("memory").pipe_file("/clip", data)
    with open_file(fsspec.filesystem("memory"), "/clip", None, note) as file:
        fingerprint(file, len(data))
        seekable = probe(file).seekable
    print(json.dumps({"bytes": len(data), "seekable": seekable, "ranges_a_probe": asked}))


if __name__ == "__main__":
    decoding(sys.argv[1])
    requests(sys.argv[1])
    storing()
    embedding()
