"""The contract between the stages: Arrow schemas of the corpus' tables, and the ids in them."""

import hashlib
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

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


def latest_of(rows: pa.Table) -> pa.Table:
    """The row that counts for each URI of rows of `VIDEOS`, sorted by URI; of equals the last."""
    order = pc.sort_indices(rows, [("uri", "ascending"), ("ingested_at", "ascending")])  # stable
    rows = rows.take(order)
    uris = rows["uri"].combine_chunks()
    last = pc.not_equal(uris.slice(0, max(0, len(uris) - 1)), uris.slice(1))
    return rows.filter(pa.concat_arrays([last, pa.array([True] * bool(len(uris)), pa.bool_())]))


def video_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Rows of `VIDEOS` as dictionaries, their tags too."""
    return [row | {"tags": dict(row["tags"])} for row in table.to_pylist()]


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
        pa.field("shot", pa.int32(), nullable=False),  # counts within the video
    ]
)
"""One row of the index, in the order of the shard's vectors: by video, then by time. Snapshots of before
there were shots lack the last column.
"""
ROWS_WITHOUT_SHOTS = ROWS.remove(len(ROWS) - 1)

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


SPANS = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),  # the frames file, within the corpus
        pa.field("mark", pa.string(), nullable=False),  # size and mark of that file
        pa.field("in_file", pa.int32(), nullable=False),  # how many spans are in it
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("span_id", pa.string(), nullable=False),
        pa.field("span", pa.int32(), nullable=False),
        pa.field("frames", pa.int32(), nullable=False),
        pa.field("last_pts_s", pa.float64()),
        pa.field("ended", pa.bool_(), nullable=False),
        pa.field("embedded", pa.int32(), nullable=False),
        pa.field("pairs", pa.bool_(), nullable=False),
        pa.field("errors", pa.list_(pa.struct([("at_s", pa.float64()), ("reason", pa.string())]))),
        pa.field("gaps", pa.list_(pa.list_(pa.float64(), 2))),
        pa.field("attempts", pa.int32(), nullable=False),
        pa.field("quarantined", pa.bool_(), nullable=False),
        pa.field("decode_s", pa.float64(), nullable=False),
        pa.field("encode_s", pa.float64(), nullable=False),
    ]
)
"""One row for each record of a span (see `SpanRecord`) with the frames file that it was found in. The
ledger holds these rows: it is derived from the frames files, counts for those that still have the same
`mark`, and may be taken away at any time.
"""

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
