"""Rows of videos and records of spans for tests, and a configuration to store them with."""

from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from vsearch.config import CorpusConfig, Encoder
from vsearch.corpus import Corpus
from vsearch.schema import VIDEOS, SpanRecord, frames_schema

CONFIG = CorpusConfig(
    dino=Encoder("dino-small", "d1", 4), clip=Encoder("clip-small", "c1", 2), input_px=64
)
NOW = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)


def video_row(name: str = "a", **values: Any) -> dict[str, Any]:
    """What a probe found of a video of 10 seconds that has two spans."""
    return {
        "uri": f"/videos/{name}.mp4",
        "source": "/videos",
        "tags": {},
        "video_id": name,
        "size_bytes": 1000,
        "etag": "m1",
        "fps": 25.0,
        "start_s": 0.0,
        "duration_s": 10.0,
        "zero_s": 0.0,
        "span_s": 5.0,
        "expected_spans": 2,
        "seekable": True,
        "recorded_at": NOW,
        "recorded_at_source": "container",
        "ingested_at": NOW,
        "status": "ok",
        "reason": None,
        "attempts": 1,
        "quarantined": False,
    } | values


def add_videos(corpus: Corpus, *rows: dict[str, Any]) -> None:
    corpus.add_videos(pa.Table.from_pylist(list(rows), schema=VIDEOS))


def span(number: int, video: str = "a", **values: Any) -> SpanRecord:
    """A stored span of five frames, the last of them half a second before its end."""
    return SpanRecord(
        **{
            "video_id": video,
            "span_id": f"{video}-{number}",
            "span": number,
            "frames": 5,
            "last_pts_s": 5.0 * number + 4.5,
            "ended": False,
            "embedded": 5,
        }
        | values
    )


def add_spans(corpus: Corpus, *spans: SpanRecord) -> str:
    """Stores spans with rows whose vectors count up from the video's and span's number."""
    rows = [
        {
            "video_id": s.video_id,
            "span_id": s.span_id,
            "span": s.span,
            "frame": frame,
            "pts_s": 5.0 * s.span + frame,
            "dino": [np.float16(s.span + frame + i) for i in range(4)],
            "clip": [np.float16(s.span - frame - i) for i in range(2)] if s.pairs else None,
        }
        for s in spans
        for frame in range(s.frames)
    ]
    return corpus.add_frames(pa.Table.from_pylist(rows, schema=frames_schema(4, 2)), list(spans))
