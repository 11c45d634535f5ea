"""Checks a whole corpus: that each file is what it should be, and that they fit together.

videos ↔ frames ↔ rows ↔ vectors ↔ codes: counts are compared everywhere, checksums wherever there are
any, and for one video of each shard the vectors of its rows with those of its frames.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vsearch import drift
from vsearch.config import UserError
from vsearch.corpus import Corpus, span_record, vector_matrix
from vsearch.fusion import mapping
from vsearch.index import Shard
from vsearch.projector import Projector
from vsearch.schema import ROWS, ROWS_WITHOUT_SHOTS, SPANS, VIDEOS, SpanRecord, frames_schema
from vsearch.snapshots import Snapshots, Spans, content_of, files_of, spans_by_video

ALIKE_ENOUGH = 0.999
"""Vectors that are projected anew may differ in the last bits of a matrix product."""


@dataclass
class Verification:
    """What was found. `checked` counts files by kind; `damaged` are (file, what is wrong with it);
    `orphans` are files that nothing needs, left by builds that were cut off or superseded.
    """

    checked: Counter[str] = field(default_factory=Counter)
    damaged: list[tuple[str, str]] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)


def verify(corpus_url: str, report: Callable[[str], None] = lambda name: None) -> Verification:
    """Reads every file of a corpus. Raises `UserError` only if there is no corpus there at all."""
    corpus = Corpus(corpus_url)
    corpus.config  # noqa: B018  says so if there is none
    found = Verification()

    @contextmanager
    def checking(kind: str, name: str) -> Iterator[None]:
        """Notes what is wrong with a file; one that is gone by now was settled or collected."""
        report(name)
        found.checked[kind] += 1
        try:
            yield
        except (
            UserError,
            AssertionError,
            pa.ArrowException,
            OSError,
            ValueError,
            KeyError,
        ) as error:
            reason = str(error).splitlines() or [repr(error)]
            found.damaged.append((name, reason[0]))

    for name in corpus.files("videos"):
        with checking("videos", name):
            _check_schema(corpus, name, VIDEOS)
    _check_frames(corpus, found, checking)
    for name in corpus.files("spans"):
        with checking("ledger", name):
            _check_ledger(corpus, _check_schema(corpus, name, SPANS))
    for version in corpus.folders("projector"):
        name = f"projector/{version}"
        if not version.startswith(".") and corpus.exists(f"{name}/config.json"):
            with checking("projector", name):
                weights = corpus.read(f"{name}/model.safetensors")
                Projector.from_bytes(weights, corpus.read(f"{name}/config.json"))
                if corpus.exists(f"{name}/validation.parquet"):  # older ones have none
                    with corpus.open(f"{name}/validation.parquet") as file:
                        pq.read_table(file, page_checksum_verification=True)
    for version in corpus.folders("drift"):
        for name in corpus.files(f"drift/{version}", ".json"):
            with checking("drift", name):
                drift.read(corpus, name)
    _check_index(corpus, found, checking)
    for folder in ("videos", "frames", "spans", "index", "index/parts"):
        found.orphans += corpus.files(folder, ".tmp")
    return found


Checking = Callable[[str, str], Any]


def _check_schema(corpus: Corpus, name: str, schema: pa.Schema) -> pa.Table:
    with corpus.open(name) as file:
        table = pq.read_table(file, page_checksum_verification=True)
    if not table.schema.equals(schema):
        raise UserError("its columns are not those of this format")
    return table


def _check_frames(corpus: Corpus, found: Verification, checking: Checking) -> None:
    """Each frames file against its own records, which say how many rows each span has."""
    config = corpus.config
    schema = frames_schema(config.dino.dim, config.clip.dim)
    counted: Counter[str] = Counter()
    for name in corpus.files("frames"):
        with checking("frames", name):
            records = {record.span_id: record for record in corpus.records(name)}
            table = _check_schema(corpus, name, schema)
            rows = dict(zip(*(c.to_pylist() for c in _counts(table["span_id"])), strict=True))
            for span, record in records.items():
                if rows.pop(span, 0) != record.frames:
                    raise UserError(f"span {span} has not the {record.frames} rows of its record")
            if rows:
                raise UserError(f"{sum(rows.values())} of its rows belong to no span")
            counted[name] = len(records)
    if not found.damaged:
        in_use = {name for name, _ in corpus.spans().values()}
        found.orphans += sorted(counted.keys() - in_use)


def _check_ledger(corpus: Corpus, rows: pa.Table) -> None:
    """A table of the ledger against the frames files that it speaks of."""
    by_file: dict[str, list[SpanRecord]] = {}
    for row in corpus.in_force(rows).to_pylist():
        by_file.setdefault(row["file"], []).append(span_record(row))
    for name, records in by_file.items():
        if records != corpus.records(name):
            raise UserError(f"it does not say of {name} what that file says itself")


def _counts(column: pa.ChunkedArray) -> tuple[Any, Any]:
    counts = pc.value_counts(column)
    return counts.field("values"), counts.field("counts")


def _check_index(corpus: Corpus, found: Verification, checking: Checking) -> None:
    """Every file of every snapshot by its SHA-256; of the one in use, how they fit together."""
    snapshots = Snapshots(corpus)
    needed: set[str] = set()
    seen: set[str] = set()
    broken = False
    current = snapshots.current
    for version in snapshots.versions():
        manifest: dict[str, Any] | None = None
        with checking("snapshot", f"index/{version}/manifest.json"):
            manifest = snapshots.manifest(version)
        if manifest is None:
            broken = True
            continue
        for entry in files_of(manifest):
            needed |= {entry["name"], entry["name"].partition("-")[0] + ".json"}
            if entry["name"] not in seen:
                seen.add(entry["name"])
                with checking("index file", f"index/{entry['name']}"), snapshots.borrowed(entry):
                    pass
    if current is not None:
        with checking("pointer", "index/CURRENT"):
            manifest = snapshots.manifest(current)
        damaged = {name for name, _ in found.damaged}
        if damaged.isdisjoint({"index/CURRENT", *(f"index/{name}" for name in needed)}):
            _check_fit(corpus, snapshots, manifest, checking)
    if not broken:
        for name in corpus.files("index/parts", ""):
            if name.endswith(".json"):
                with checking("part", name):
                    json.loads(corpus.read(name))
            if name.removeprefix("index/") not in needed and not name.endswith(".tmp"):
                found.orphans.append(name)


def _check_fit(
    corpus: Corpus, snapshots: Snapshots, manifest: dict[str, Any], checking: Checking
) -> None:
    """Rows ↔ vectors ↔ codes of each shard of a snapshot, and rows ↔ frames of its videos."""
    videos = snapshots.videos(manifest).to_pylist()
    spans = spans_by_video(corpus)
    for number, shard in enumerate(manifest["shards"]):
        with checking("shard", f"index/{shard['rows_file']['name']}"):
            rows = pq.read_table(snapshots.path(shard["rows_file"]))
            if rows.schema not in (ROWS, ROWS_WITHOUT_SHOTS) or rows.num_rows != shard["rows"]:
                raise UserError(f"it does not hold the shard's {shard['rows']} rows")
            path = snapshots.path(shard["vectors_file"])
            codes = shard["codes_file"] and snapshots.path(shard["codes_file"])
            opened = Shard(path, shard["rows"], manifest["dim"], codes)
            ids = rows["video_id"].cast(pa.string())
            frames = (
                rows.set_column(0, "video_id", ids)
                .group_by("video_id")
                .aggregate([("frames", "sum")])
            )
            stands_for = dict(zip(*(c.to_pylist() for c in frames.columns), strict=True))
            mine = [video for video in videos if video["shard"] == number]
            for video in mine:
                if stands_for.get(video["video_id"]) != video["frames"]:
                    raise UserError(
                        f"its rows of {video['uri']} do not stand for all of its frames"
                    )
            same = (
                v
                for v in mine
                if v["video_id"] in spans
                and content_of(v["video_id"], spans).generation == v["generation"]
            )
            if (video := next(same, None)) is not None:
                _check_rows(corpus, manifest, rows, opened, video["video_id"], spans)


def _check_rows(
    corpus: Corpus,
    manifest: dict[str, Any],
    rows: pa.Table,
    shard: Shard,
    video_id: str,
    spans: Spans,
) -> None:
    """The rows of a video against the frames that they stand for, projected anew."""
    columns, vectors_of = mapping(corpus, manifest["projector"], manifest.get("alpha"))
    parts = [
        table.filter(pc.equal(table["span_id"], span.span_id))
        for file, span in spans[video_id]
        if span.frames
        for table in corpus.frames(file, ["span_id", "pts_s", *columns])
    ]
    table = pa.concat_tables(parts)
    chosen = np.flatnonzero(pc.equal(rows["video_id"].cast(pa.string()), video_id).to_numpy())
    row_of_frame = np.searchsorted(
        rows["start_s"].to_numpy()[chosen], table["pts_s"].to_numpy(), side="right"
    )
    counts = np.bincount(row_of_frame, minlength=len(chosen) + 1)[1:]
    vectors = np.asarray(vectors_of(*(vector_matrix(table[c]) for c in columns)), np.float32)
    if (counts == rows["frames"].to_numpy()[chosen]).all():
        means = np.add.reduceat(vectors, np.append(0, counts.cumsum()[:-1]), axis=0)
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        stored = np.asarray(shard.vectors[chosen], np.float32)
        if (np.einsum("nd,nd->n", means, stored) >= ALIKE_ENOUGH).all():
            return
    raise UserError(f"the rows of video {video_id} are not those that its frames give")
