"""What a look into files tells: a row of `videos` for each, good or bad, and what is new about it."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vsearch.buckets import Buckets, together
from vsearch.config import Sampling
from vsearch.corpus import Corpus
from vsearch.decoder import ATTEMPTS, DecoderDiedError, own_decoder
from vsearch.sampling import expected_spans, span_grid
from vsearch.schema import VIDEOS, latest_of
from vsearch.sources import Changes, Listed, name_clock
from vsearch.video import VideoError

PORTION_FILES = 50_000
"""So many files that are new or differ are worked on at a time."""


def probe_tasks(files: list[Listed], known: list[dict[str, Any]]) -> list[str]:
    """The tasks of `probe_files` as JSON, one a file: the file, how often it failed before, and whether
    the `known` rows hold a good one of it.
    """
    tried = {row["uri"]: row["attempts"] for row in known if row["status"] == "failed"}
    good = {row["uri"] for row in known if row["status"] == "ok"}
    tasks = []
    for entry in files:
        at = entry.modified_at
        values = asdict(entry) | {"modified_at": at.isoformat() if at else None}
        tasks.append(json.dumps([values, tried.get(entry.uri, 0), entry.uri in good]))
    return tasks


def probe_files(
    batch: pa.Table, corpus_url: str | None, sampling: Sampling, time_pattern: str | None
) -> pa.Table:
    """Looks into the files of the column `task` and stores a row for each (none without a corpus);
    gives their `uri`, `video_id` and `status`.
    """
    time_of = name_clock(time_pattern)
    rows, stored = [], []
    for text in batch["task"].to_pylist():
        values, tried, good = json.loads(text)
        at = values["modified_at"]
        entry = Listed(**values | {"modified_at": datetime.fromisoformat(at) if at else None})
        row = video_row(entry, tried, sampling, time_of)
        rows.append(row)
        if not (good and row["status"] == "unreadable"):  # what is known of it still holds
            stored.append(row)
    if corpus_url is not None and stored:
        Corpus(corpus_url).add_videos(pa.Table.from_pylist(stored, schema=VIDEOS))
    return pa.Table.from_pylist(rows, schema=VIDEOS).select(["uri", "video_id", "status"])


def video_row(
    entry: Listed,
    tried: int,
    sampling: Sampling,
    time_of: Callable[[str], datetime | None],
) -> dict[str, Any]:
    """What a look into a file tells, as a row of `VIDEOS`. `tried` is how often it failed before."""
    now = datetime.now(UTC)
    named_at = time_of(entry.uri)
    row: dict[str, Any] = {
        "uri": entry.uri,
        "source": entry.source,
        "tags": entry.tags,
        "video_id": "",
        "size_bytes": entry.size_bytes,
        "etag": entry.mark,
        "recorded_at": named_at or entry.modified_at or now,
        "recorded_at_source": "name" if named_at else "mtime" if entry.modified_at else "ingest",
        "ingested_at": now,
        "status": "failed",
        "attempts": tried + 1,
        "quarantined": False,
    }
    if entry.reason is not None:
        return row | {"status": "unreadable", "reason": entry.reason}
    for attempt in range(1, ATTEMPTS + 1):
        row["attempts"] = tried + attempt
        try:
            info = own_decoder().probe(
                entry.uri,
                (entry.size_bytes, entry.mark),
                lambda video_id: row.update(video_id=video_id),
            )
            break
        except DecoderDiedError as error:
            if attempt == ATTEMPTS:
                reason = f"quarantined after {attempt} attempts: {error}"
                return row | {"reason": reason, "quarantined": True}
        except VideoError as error:
            return row | {"reason": str(error)}
        except OSError as error:  # no fault of the content: the next ingest tries again
            return row | {"status": "unreadable", "reason": f"cannot be read: {error}"}
    grid = span_grid(sampling, info.fps, info.start_s)
    if info.recorded_at:
        row |= {"recorded_at": info.recorded_at, "recorded_at_source": "container"}
    expected = expected_spans(grid, info.start_s, info.duration_s)
    if info.last_s is not None:  # whatever the header claims
        expected = grid.number_of(info.last_s) + 1
    return row | {
        "container": info.container,
        "codec": info.codec,
        "width": info.width,
        "height": info.height,
        "fps": info.fps,
        "start_s": float(info.start_s),
        "duration_s": info.duration_s,
        "zero_s": info.zero_s,
        "span_s": float(grid.length_s),
        "expected_spans": expected,
        "seekable": info.seekable,
        "status": "ok",
    }


PLACES = pa.schema([pa.field("video_id", pa.string()), pa.field("uri", pa.string())])
PROBED = pa.schema([*PLACES, pa.field("status", pa.string()), pa.field("before", pa.string())])
"""What a look into a file found, and which content it was known to have `before`, if any."""


def portions(
    differences: Iterable[tuple[Changes, list[dict[str, Any]]]],
) -> Iterator[tuple[Changes, list[dict[str, Any]]]]:
    """The differences, put together so that there is enough to probe at a time."""
    held, known = Changes([], [], [], 0), list[dict[str, Any]]()
    for changes, rows in differences:
        held = Changes(
            held.probe + changes.probe,
            held.relabel + changes.relabel,
            held.gone + changes.gone,
            held.unchanged + changes.unchanged,
        )
        known += rows
        if len(held.probe) + len(held.relabel) + len(held.gone) >= PORTION_FILES:
            yield held, known
            held, known = Changes([], [], [], 0), []
    yield held, known


def classify(findings: Buckets, probed: Buckets, gone: Buckets) -> Iterator[tuple[str, str]]:
    """(uri, what it is) of files that were probed or are gone: rows of `PROBED` and `PLACES` by content.
    `findings` is what the corpus knew before.
    """
    places = Buckets("video_id", PLACES)
    if probed.rows:
        for (rows,) in together(findings):
            rows = latest_of(rows)
            known = pc.and_(
                pc.not_equal(rows["status"], "gone"), pc.not_equal(rows["video_id"], "")
            )
            places.add(rows.filter(known).select(PLACES.names))
    for tables in together(places, probed, gone):
        yield from _kinds(*(table.to_pylist() for table in tables))


def _kinds(
    known: list[dict[str, Any]], probed: list[dict[str, Any]], gone_rows: list[dict[str, Any]]
) -> Iterator[tuple[str, str]]:
    gone = {row["uri"] for row in gone_rows}
    places: dict[str, set[str]] = {}
    for row in known:
        places.setdefault(row["video_id"], set()).add(row["uri"])
    moved: set[str] = set()
    for row in sorted(probed, key=lambda row: str(row["uri"])):
        uri, content = row["uri"], row["video_id"]
        elsewhere = places.get(content, set()) - {uri}
        if row["status"] != "ok":
            kind = row["status"]
        elif row["before"]:
            kind = "unchanged" if row["before"] == content else "changed"
        elif elsewhere & gone - moved:
            kind = "moved"
            moved.add(min(elsewhere & gone - moved))
        else:
            kind = "copy" if elsewhere else "new"
        places.setdefault(content, set()).add(uri)
        yield uri, kind
    yield from ((uri, "gone") for uri in gone - moved)
