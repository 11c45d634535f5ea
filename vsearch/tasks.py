"""The decoding that a corpus lacks, as tasks: what it should hold minus what it holds."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vsearch.buckets import Buckets, together
from vsearch.corpus import Corpus, counted
from vsearch.sampling import SpanRun, grid_origin_s, missing_runs
from vsearch.schema import VIDEOS, SpanRecord, latest_of

LONGEST_RUN = 8
"""Spans that one task decodes after one seek: longer runs seek less, shorter ones spread better."""

TASKS = pa.schema(
    [
        ("uri", pa.string()),
        ("size_bytes", pa.int64()),
        ("mark", pa.string()),
        ("video_id", pa.string()),
        ("seekable", pa.bool_()),
        ("origin_s", pa.float64()),
        ("span_s", pa.float64()),
        ("first", pa.int32()),
        ("stop", pa.int32()),
        ("done", pa.list_(pa.int32())),
        ("tried", pa.int32()),
        ("spans", pa.int32()),
    ]
)
"""A run of spans of one video to decode in one go: numbers `first` … `stop` − 1, but for those that
are `done`, to the end of the stream where `stop` is null. `spans` is about how many it will give.
"""


def missing_tasks(corpus: Corpus, listed: Buckets, retry: bool, cpus: int) -> Buckets:
    """The tasks for what is missing of the videos that are `listed`, as `TASKS` by video. With `retry`
    spans with errors are decoded again.
    """
    videos, total = Buckets("video_id", VIDEOS), 0
    for entries, rows in together(listed, corpus.findings()):
        rows = latest_of(rows)
        here = pc.is_in(rows["uri"], entries["uri"].combine_chunks())
        rows = rows.filter(pc.and_(here, pc.equal(rows["status"], "ok")))
        total += pc.sum(rows["expected_spans"]).as_py() or 0
        videos.add(rows)
    longest = max(1, min(LONGEST_RUN, total // (4 * cpus)))
    tasks = Buckets("video_id", TASKS)
    for rows, spans in together(videos, corpus.stored_spans()):
        whole = _whole(spans, retry)
        rows = rows.filter(pc.invert(pc.is_in(rows["video_id"], whole)))
        spans = spans.filter(pc.is_in(spans["video_id"], rows["video_id"].combine_chunks()))
        stored: dict[str, list[SpanRecord]] = {}
        for _, (_, span) in counted(spans):
            stored.setdefault(span.video_id, []).append(span)
        # Of several places of one content, one is read.
        by_id = {row["video_id"]: row for row in rows.sort_by("uri").to_pylist()}
        found = [
            task
            for video_id, row in by_id.items()
            for task in _tasks(row, stored.get(video_id, []), retry, longest)
        ]
        tasks.add(pa.Table.from_pylist(found, schema=TASKS))
    return tasks


def _whole(spans: pa.Table, retry: bool) -> pa.Array:
    """Ids of the videos that lack no span, by rows of `SPANS`."""
    spans = spans.append_column("faults", pc.list_value_length(spans["errors"]))
    videos = spans.group_by("video_id").aggregate(
        [("span", "count_distinct"), ("span", "max"), ("ended", "any"), ("faults", "max")]
    )
    whole = pc.and_(
        videos["ended_any"],
        pc.greater(videos["span_count_distinct"], pc.cast(videos["span_max"], pa.int64())),
    )
    if retry:
        whole = pc.and_(whole, pc.equal(videos["faults_max"], 0))
    return videos["video_id"].filter(whole).combine_chunks()


def _tasks(
    row: dict[str, Any], spans: list[SpanRecord], retry: bool, longest: int
) -> Iterator[dict[str, Any]]:
    again = [span for span in spans if retry and span.errors]
    done = {span.span: span.ended for span in spans if span not in again}
    runs = missing_runs(
        row["expected_spans"],
        done,
        any(done.values()),
        longest if row["seekable"] else 1 << 30,
    )
    if runs and not row["seekable"]:  # decoded from its start: then once, not run by run
        runs = [SpanRun(runs[0].first, None)]
    for run in runs:
        stop = run.stop or max(row["expected_spans"], run.first + 1)
        yield {
            "uri": row["uri"],
            "size_bytes": row["size_bytes"],
            "mark": row["etag"],
            "video_id": row["video_id"],
            "seekable": row["seekable"],
            "origin_s": grid_origin_s(row["start_s"], row["span_s"]),
            "span_s": row["span_s"],
            "first": run.first,
            "stop": run.stop,
            "done": sorted(done),
            "tried": max((span.attempts for span in again), default=0),
            "spans": sum(n not in done for n in range(run.first, stop)),
        }
