"""Corpora of random vectors, made without decoding a video: for tests of what is built on frames."""

from collections.abc import Collection
from datetime import UTC, datetime
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vsearch.config import CorpusConfig, Encoder
from vsearch.corpus import Corpus
from vsearch.schema import VIDEOS, SpanRecord, frames_schema

SHOT = 10
"""Frames of a shot: they are alike, the next shot is not."""
SPAN = 200


@cache
def config() -> CorpusConfig:
    """That of a corpus whose CLIP is the one that comes with the package, with a DINO of 8 numbers."""
    from vsearch.encoders import ClipEncoder

    return CorpusConfig(Encoder("none", "0", 8), ClipEncoder("demo/clip").record, input_px=64)


def vectors_of(name: str, frames: int, towards: NDArray[np.float64] | None = None) -> Any:
    """Unit vectors float16 (frames, dim) of a video, in shots; `towards` pulls them to a direction."""
    rng = np.random.default_rng(list(name.encode()))
    dim = config().clip.dim
    kinds = np.random.default_rng(0).standard_normal((100, dim))  # of which each archive has some
    count = -(-frames // SHOT)
    shots = kinds[rng.integers(len(kinds), size=count)] + 0.6 * rng.standard_normal((count, dim))
    if towards is not None:
        shots = 0.3 * shots + towards * np.sqrt(dim)
    found = np.repeat(shots, SHOT, axis=0)[:frames] + 0.1 * rng.standard_normal((frames, dim))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float16)


def video_row(name: str, content: str | None = None, **values: Any) -> dict[str, Any]:
    return {
        "uri": f"/videos/{name}.mp4",
        "source": "/videos",
        "tags": {},
        "video_id": content or name,
        "size_bytes": 1000,
        "etag": "1",
        "fps": 10.0,
        "start_s": 0.0,
        "duration_s": None,
        "zero_s": 0.0,
        "span_s": SPAN / 10,
        "expected_spans": 1,
        "seekable": True,
        "recorded_at": datetime(2026, 5, 1, tzinfo=UTC),
        "recorded_at_source": "container",
        "ingested_at": datetime.now(UTC),
        "status": "ok",
        "attempts": 1,
        "quarantined": False,
    } | values


def add_rows(corpus: Corpus, *rows: dict[str, Any]) -> None:
    corpus.add_videos(pa.Table.from_pylist(list(rows), schema=VIDEOS))


def add_video(
    corpus: Corpus,
    name: str,
    frames: int = 400,
    attempts: int = 1,
    towards: NDArray[np.float64] | None = None,
    times_s: NDArray[np.float64] | None = None,
    lacking: Collection[int] = (),
    dino: NDArray[np.float16] | None = None,
    **values: Any,
) -> None:
    """Adds a video of ten frames a second, whose content is named by it, with its frames; `times_s`
    (frames,) are other times of them. The spans in `lacking` are not stored. DINO's vectors (frames, 8)
    are all 0 unless given.
    """
    corpus.require(config())
    clip = vectors_of(f"{name}{attempts}", frames, towards)
    times_s = np.arange(frames) / 10 if times_s is None else times_s
    seen = np.zeros((frames, 8), np.float16) if dino is None else dino
    span_of = (times_s * 10 / SPAN + 1e-9).astype(int).tolist()
    records, tables = [], []
    for number in sorted({*range(span_of[-1] + 1)} - {*lacking}):
        mine = np.equal(span_of, number)
        part, pts_s = clip[mine], times_s[mine]
        span_id = f"{name}-{number}"
        records.append(
            SpanRecord(name, span_id, number, len(part), max(pts_s, default=None),
                       number == span_of[-1], embedded=len(part), attempts=attempts)
        )  # fmt: skip
        columns = [
            pa.array([name] * len(part)),
            pa.array([span_id] * len(part)),
            pa.array([number] * len(part), pa.int32()),
            pa.array(range(len(part)), pa.int32()),
            pa.array(pts_s),
            pa.FixedSizeListArray.from_arrays(pa.array(seen[mine].reshape(-1)), 8),
            pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), clip.shape[1]),
        ]
        tables.append(pa.table(columns, schema=frames_schema(8, clip.shape[1])))
    corpus.add_frames(pa.concat_tables(tables), records)
    add_rows(corpus, video_row(name, expected_spans=span_of[-1] + 1, **values))
