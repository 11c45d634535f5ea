"""The contract between the stages: Arrow schemas of the corpus' tables, and the ids in them."""

import hashlib
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa

VIDEOS = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field(
            "source", pa.string(), nullable=False
        ),  # the folder, glob, file or list it came by
        pa.field("tags", pa.map_(pa.string(), pa.string()), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("etag", pa.string()),  # what the storage says changes with the content
        pa.field("container", pa.string()),
        pa.field("codec", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("fps", pa.float64()),
        pa.field("start_s", pa.float64()),
        pa.field("duration_s", pa.float64()),
        pa.field("zero_s", pa.float64()),
        pa.field("span_s", pa.float64()),
        pa.field("expected_spans", pa.int32()),
        pa.field("seekable", pa.bool_()),  # whether its spans can be decoded each alone
        pa.field("recorded_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("recorded_at_source", pa.string(), nullable=False),  # container|name|mtime|ingest
        pa.field("ingested_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # ok | failed | unreadable | gone
        pa.field("reason", pa.string()),
        pa.field("attempts", pa.int32(), nullable=False),  # how often it was probed
        pa.field("quarantined", pa.bool_(), nullable=False),  # each attempt killed its decoder
    ]
)
"""One row for each finding about a URI; the latest counts. `failed` is the content's fault and final
until it changes; `unreadable` is the storage's, and tried again; `gone` was removed by a sync.
"""


def frames_schema(dino_dim: int, clip_dim: int) -> pa.Schema:
    """One row an embedded frame: `frame` counts within its span, `pts_s` is stream time."""
    return pa.schema(
        [
            pa.field("video_id", pa.string(), nullable=False),
            pa.field("span_id", pa.string(), nullable=False),
            pa.field("span", pa.int32(), nullable=False),
            pa.field("frame", pa.int32(), nullable=False),
            pa.field("pts_s", pa.float64(), nullable=False),
            pa.field("dino", pa.list_(pa.float16(), dino_dim), nullable=False),
            pa.field("clip", pa.list_(pa.float16(), clip_dim)),  # null outside the sample of pairs
        ]
    )


ROWS = pa.schema(
    [
        pa.field("video_id", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("start_s", pa.float64(), nullable=False),  # stream time, as of frames
        pa.field("end_s", pa.float64(), nullable=False),
        pa.field("best_s", pa.float64(), nullable=False),  # the frame most like the row's vector
        pa.field("frames", pa.int32(), nullable=False),  # how many frames the row stands for
    ]
)
"""One row of the index, in the order of the shard's vectors: by video, then by time."""

SNAPSHOT_VIDEOS = pa.schema(
    [
        pa.field("video_id", pa.string(), nullable=False),
        pa.field(
            "shard", pa.int32(), nullable=False
        ),  # where its rows count; elsewhere they are dead
        pa.field("generation", pa.string(), nullable=False),  # changes when its frames do
        pa.field("frames", pa.int64(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("copies", pa.list_(pa.string()), nullable=False),
        pa.field("tags", pa.map_(pa.string(), pa.string()), nullable=False),
        pa.field("zero_s", pa.float64(), nullable=False),
        pa.field("duration_s", pa.float64()),
        pa.field("recorded_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("recorded_at_source", pa.string(), nullable=False),
    ]
)
"""One row for each video of a snapshot."""

SPANS_KEY = b"vsearch.spans"
"""Key of a frames file's own metadata under which its span records lie, as a JSON list. Records and
rows share one file, so that a span is stored whole or not at all."""


@dataclass(frozen=True)
class DecodeError:
    """What went wrong while decoding, and after which second of stream time."""

    at_s: float
    reason: str


@dataclass(frozen=True)
class SpanRecord:
    """What became of one span. `frames` were stored, `embedded` of them went through the encoders
    (with `pairs` through CLIP too); `last_pts_s` is of the last of them; `gaps` are stretches of
    stream time whose frames were lost to an error; `ended` tells that the stream ended in it.
    `quarantined` spans killed their decoder in each of `attempts` attempts.
    """

    video_id: str
    span_id: str
    span: int
    frames: int
    last_pts_s: float | None
    ended: bool
    embedded: int = 0
    pairs: bool = True
    errors: list[DecodeError] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    attempts: int = 1
    quarantined: bool = False
    decode_s: float = 0.0
    encode_s: float = 0.0

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "SpanRecord":
        errors = [DecodeError(**error) for error in value["errors"]]
        return cls(**value | {"errors": errors, "gaps": [(a, b) for a, b in value["gaps"]]})


SAMPLE_BYTES = 1 << 16


def fingerprint(file: BinaryIO, size_bytes: int) -> str:
    """`video_id`: 32 hexadecimal digits of the SHA-256 of the size and of five samples of 64 KiB
    spread evenly over the file, so that it costs the same for any size.
    """
    digest = hashlib.sha256(size_bytes.to_bytes(8, "little"))
    last = max(0, size_bytes - SAMPLE_BYTES)
    for offset in sorted({last * quarter // 4 for quarter in range(5)}):
        file.seek(offset)
        digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]
