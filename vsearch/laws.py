"""What each thing costs: the constants behind `vsearch plan`, each with its unit and where it is from.

`measured` ones come from the programs in `benchmarks/`, `counted` ones from a format of this package
or from what it asks a storage for, `derived` ones from published figures: no GPU was measured.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Law:
    """A constant: its value, its unit, its basis (measured, counted or derived), and its source."""

    value: float
    unit: str
    basis: str
    source: str


CALIBRATED = "benchmarks/calibrate.py, one thread of a 2-core cloud machine"


def _measured(value: float, unit: str, source: str = CALIBRATED) -> Law:
    return Law(value, unit, "measured", source)


# ── decoding ─────────────────────────────────────────────────────────────────────────────────────

DECODE_S_PER_MP = {
    "h264": _measured(0.0021, "core-s per megapixel of each source frame"),
    "hevc": _measured(0.002, "core-s per megapixel of each source frame"),
    "vp9": _measured(0.002, "core-s per megapixel of each source frame"),
    "av1": _measured(0.0013, "core-s per megapixel of each source frame"),
    "mpeg4": _measured(0.00041, "core-s per megapixel of each source frame"),
    "mjpeg": _measured(0.0014, "core-s per megapixel of each source frame"),
}
OTHER_CODEC = "h264"
"""A codec that was not measured counts as this one, the dearest."""

KEEP_S_PER_FRAME = _measured(0.00095, "core-s per frame that is kept: converted, scaled, passed on")
KEEP_S_PER_MP = _measured(0.0010, "core-s per megapixel of a frame that is kept")
USUAL_FPS = 25.0
"""Frames a second of a video that does not say."""

# ── embedding ────────────────────────────────────────────────────────────────────────────────────


def vit_gflop(layers: int, width: int, tokens: int, patch_px: int) -> float:
    """GFLOP (a multiplication and an addition are two) of a vision transformer for one picture of
    `tokens` tokens.
    """
    layer = 12 * tokens * width**2 + 2 * tokens**2 * width
    patches = 3 * patch_px**2 * width * tokens
    return 2 * (layers * layer + patches) / 1e9


@dataclass(frozen=True)
class EncoderLaw:
    """An encoder: numbers in its vector, GFLOP for one picture of 224 × 224 pixels."""

    dim: int
    gflop: float


ENCODERS = {
    "facebook/dinov3-vitb16-pretrain-lvd1689m": EncoderLaw(768, vit_gflop(12, 768, 201, 16)),
    "facebook/dinov2-base": EncoderLaw(768, vit_gflop(12, 768, 257, 14)),
    "ViT-B-16:laion2b_s34b_b88k": EncoderLaw(512, vit_gflop(12, 768, 197, 16)),
}
"""Derived from their architectures: ViT-B with 196 or 256 patches, a class token, registers."""

_DATA_SHEET = "the maker's data sheet: dense bfloat16, without sparsity"
GPU_TFLOPS = {
    "a10g": Law(70, "TFLOP/s", "derived", _DATA_SHEET),
    "l4": Law(121, "TFLOP/s", "derived", _DATA_SHEET),
    "rtx4090": Law(165, "TFLOP/s", "derived", _DATA_SHEET),
    "a100": Law(312, "TFLOP/s", "derived", _DATA_SHEET),
    "l40s": Law(362, "TFLOP/s", "derived", _DATA_SHEET),
    "h100": Law(989, "TFLOP/s", "derived", _DATA_SHEET),
    "h200": Law(989, "TFLOP/s", "derived", _DATA_SHEET),
}
GPU_UTILISATION = Law(
    0.14,
    "share of a GPU's TFLOP/s",
    "derived",
    "clip-retrieval on an A100: 1,100 images/s of ViT-B/16 (0.12) and 312 of L/14 (0.16)",
)
CORE_GFLOP_S = _measured(83.0, "GFLOP/s of one core in float32")

# ── storing ──────────────────────────────────────────────────────────────────────────────────────

FRAME_BYTES_PER_VECTOR_BYTE = _measured(
    0.95, "bytes of a frames file per byte of its vectors (2 a number), by benchmarks/calibrate.py"
)
SPANS_PER_FILE = Law(16, "spans in a frames file", "counted", "vsearch/ingest.py")

# ── asking a storage ─────────────────────────────────────────────────────────────────────────────

RANGE_BYTES = Law(1 << 20, "bytes of a range that is read at once", "counted", "vsearch/storage.py")
LISTED_PER_REQUEST = Law(1000, "files in an answer to a listing", "counted", "S3's ListObjectsV2")
PROBE_REQUESTS = _measured(8, "requests of a probe: a look at the file, seven ranges of it")

# ── the index ────────────────────────────────────────────────────────────────────────────────────

FRAMES_PER_ROW = _measured(
    12.7, "frames that share a row (a moment)", "benchmarks/moments.py: drawn worlds at native rate"
)
FLAT_ROWS = Law(50_000, "rows up to which an index is flat", "counted", "docs/index.md")
ROW_RAM_BYTES = _measured(
    36, "bytes in memory per row, besides dim / 4 of codes", "benchmarks/index.py at 10⁶ rows"
)
ROW_DISK_BYTES = _measured(
    12,
    "bytes on disk per row, besides dim / 4 of codes and 2 · dim of vectors",
    "benchmarks/index.py",
)
