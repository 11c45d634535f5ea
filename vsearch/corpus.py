"""The corpus on storage: its layout, atomic writes, and what it says about each video.

Files are immutable. They are written under a temporary name first (on object storage: in one PUT),
so whatever has its final name is whole.
"""

import fcntl
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vsearch.buckets import Buckets, together
from vsearch.config import FORMAT_VERSION, CorpusConfig, Encoder, Sampling, UserError
from vsearch.coverage import Overview, VideoState, plainly_indexed, video_state
from vsearch.schema import SPANS, SPANS_KEY, VIDEOS, SpanRecord, latest_of, video_rows
from vsearch.storage import (
    RANGE_BYTES,
    filesystem,
    is_local,
    is_refused,
    mapped,
    mark_of,
    open_file,
    pages,
    persist,
)

READERS = 16
FOOTER_BYTES = 1 << 16
"""Most footers of frames files fit in so much: the rest of the file is not read with them."""
SMALL_BYTES = 1 << 18
MOST_SMALL = 64
"""When more tables of `videos` or `spans` than this are small, they are made one."""
JOINED_BYTES = 1 << 24
"""Small tables of about so much in all are made one at a time: compressed, as they lie on storage."""
LEDGER_ROWS = 200_000


class Corpus:
    """A corpus at a URL (a local path, `s3://bucket/prefix`, anything fsspec opens)."""

    def __init__(self, url: str) -> None:
        self.fs, self._root = filesystem(str(url))
        self.url = str(url)
        self._root = self._root.rstrip("/")
        self._local = is_local(self.fs)
        self._footers: dict[str, pa.Table] = {}  # files are immutable: read once
        if self._local:  # a relative path means another place to a worker
            self.url = self._root

    # ── files ────────────────────────────────────────────────────────────────────────────────────

    def path(self, name: str) -> str:
        """The path of a file of the corpus, for its file system."""
        return f"{self._root}/{name}"

    def local_path(self, name: str) -> str | None:
        """The path on this machine's disk, None on object storage."""
        return self.path(name) if self._local else None

    def exists(self, name: str) -> bool:
        self.fs.invalidate_cache()
        try:
            persist(partial(self.fs.info, self.path(name)))
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str) -> bytes:
        self.fs.invalidate_cache(self.path(name))
        with self.open(name) as file:
            return file.read()

    def open(self, name: str, range_bytes: int = 8 * RANGE_BYTES) -> BinaryIO:
        return open_file(self.fs, self.path(name), range_bytes=range_bytes)

    def write(self, name: str, data: bytes) -> None:
        """Puts a whole file in place at once; readers see the old one or the new one."""
        if self._local:
            self._temporary(name, data).replace(self.path(name))
        else:
            persist(partial(self.fs.pipe_file, self.path(name), data))

    def write_new(self, name: str, data: bytes) -> bool:
        """Puts a file in place unless there is one; of several at once, one wins and gets True."""
        try:
            if not self._local:
                persist(partial(self.fs.pipe_file, self.path(name), data, mode="create"))
                return True
            temporary = self._temporary(name, data)
            try:  # a link, as a rename would replace what is there
                os.link(temporary, self.path(name))
            finally:
                temporary.unlink()
        except FileExistsError:
            return False
        return True

    def swap(self, name: str, expected: bytes | None, data: bytes) -> bool:
        """Puts `data` in the place of `expected` (None: of nothing) and returns True; returns False and
        changes nothing if the file holds something else by then. Of several at once, one wins: by a
        lock on disk, by a conditional PUT on S3; other storages can only look before they write.
        """
        if self._local:
            with self._locked(name):
                if self._content(name) != expected:
                    return False
                self.write(name, data)
            return True
        if expected is None:
            return self.write_new(name, data) or self._content(name) == data
        mark = persist(partial(self.fs.info, self.path(name), refresh=True)).get("ETag")
        if self._content(name) != expected:
            return False
        condition = {"IfMatch": mark} if "s3" in self.fs.protocol and mark else {}
        try:
            persist(partial(self.fs.pipe_file, self.path(name), data, **condition))
        except OSError as error:
            if not is_refused(error):
                raise
            return self._content(name) == data  # the answer to the first attempt may be lost
        return True

    def _content(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        path = Path(self.path(f"{name}.lock"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def modified_at(self, name: str) -> datetime:
        """When a file was written, by the storage's clock."""
        found: datetime = persist(partial(self.fs.modified, self.path(name)))
        return found

    def remove(self, name: str) -> None:
        """Removes a file; does nothing where there is none."""
        with suppress(FileNotFoundError):
            persist(partial(self.fs.rm_file, self.path(name)))

    def remove_folder(self, name: str) -> None:
        """Removes a folder with all that is in it; does nothing where there is none."""
        with suppress(FileNotFoundError):
            persist(partial(self.fs.rm, self.path(name), recursive=True))

    def _temporary(self, name: str, data: bytes) -> Path:
        """A finished file on this disk under a name that nobody looks for."""
        path = self.path(name)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return Path(temporary)

    def put(self, local_file: str, name: str) -> None:
        """Moves a finished local file into the corpus."""
        if self._local:
            Path(self.path(name)).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(local_file, self.path(name))
        else:
            persist(partial(self.fs.put_file, local_file, self.path(name)))
            Path(local_file).unlink()

    def fetch(self, name: str, sha256: str) -> Path:
        """A copy of a file on this machine's disk, kept under its SHA-256 for the next time."""
        path = Path.home() / ".cache" / "vsearch" / sha256
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
            persist(partial(self.fs.get_file, self.path(name), str(temporary)))
            temporary.replace(path)
        return path

    def write_table(self, name: str, table: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        self.write(name, sink.getvalue())

    def files(self, folder: str, suffix: str = ".parquet") -> list[str]:
        """Names (relative to the corpus) of the finished files in a folder, sorted."""
        self.fs.invalidate_cache()
        try:
            found = persist(partial(self.fs.ls, self.path(folder), detail=False))
        except FileNotFoundError:
            return []
        return sorted(f"{folder}/{p.rsplit('/', 1)[-1]}" for p in found if p.endswith(suffix))

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, sorted."""
        self.fs.invalidate_cache()
        try:
            found = persist(partial(self.fs.ls, self.path(folder), detail=True))
        except FileNotFoundError:
            return []
        names = (
            e["name"].rstrip("/").rsplit("/", 1)[-1] for e in found if e["type"] == "directory"
        )
        return sorted(names)

    @contextmanager
    def _parquet(self, name: str, range_bytes: int = 8 * RANGE_BYTES) -> Iterator[BinaryIO]:
        """An open Parquet file; damage is reported with its name."""
        try:
            with self.open(name, range_bytes) as file:
                yield file
        except (pa.ArrowException, OSError) as error:
            # Arrow tells a wrong checksum as an OSError, as the storage tells what it fails at.
            if isinstance(error, OSError) and "CRC" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self.path(name)} is damaged or of another format: {reason}"
            ) from error

    # ── configuration ────────────────────────────────────────────────────────────────────────────

    @cached_property
    def config(self) -> CorpusConfig:
        """What the corpus was made with. Raises `UserError` when there is none."""
        try:
            return _parse_config(self.read("corpus.json"))
        except FileNotFoundError:
            raise UserError(
                f"There is no corpus at {self.url}: make one with 'vsearch ingest VIDEOS "
                f"--corpus {self.url}'."
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.url}/corpus.json is damaged: {error!r}.") from error

    def require(self, wanted: CorpusConfig) -> None:
        """Makes the corpus if it is new, else refuses other encoders or sampling than its own."""
        if not self.exists("corpus.json"):
            self.write_new("corpus.json", (json.dumps(asdict(wanted), indent=2) + "\n").encode())
        self.__dict__.pop("config", None)
        for part in ("dino", "clip", "sampling", "pairs"):
            has, asked = getattr(self.config, part), getattr(wanted, part)
            if has != asked:
                raise UserError(
                    f"The corpus at {self.url} was made with {part} {_brief(has)}, not {_brief(asked)}: "
                    f"use the same again, or another --corpus."
                )

    # ── videos and spans ─────────────────────────────────────────────────────────────────────────

    def add_videos(self, rows: pa.Table) -> None:
        self.write_table(f"videos/{uuid.uuid4().hex}.parquet", rows.cast(VIDEOS))

    def videos(self) -> list[dict[str, Any]]:
        """The latest row of each URI that is not gone, as dictionaries, sorted by URI."""
        rows = [row for table in self.latest() for row in video_rows(table)]
        return sorted((r for r in rows if r["status"] != "gone"), key=lambda row: row["uri"])

    def latest(self) -> Iterator[pa.Table]:
        """The latest row of each URI, also of those that are gone, as `VIDEOS`, in pieces."""
        for (rows,) in together(self.findings()):
            yield latest_of(rows)

    def findings(self) -> Buckets:
        """All that was ever found of the videos: rows of `VIDEOS` by URI, of which the latest count."""
        found = Buckets("uri", VIDEOS)
        for table in self._tables("videos", VIDEOS):
            found.add(table)
        return found

    def _tables(self, folder: str, schema: pa.Schema) -> Iterator[pa.Table]:
        """The tables of a folder. Those that others make one of meanwhile come again within that one."""
        seen: set[str] = set()
        while new := [name for name in self.files(folder) if name not in seen]:
            seen.update(new)
            vanished = False
            for table in mapped(partial(self._table, schema=schema), new, READERS):
                if table is None:
                    vanished = True
                else:
                    yield table
            if not vanished:
                return

    def _table(self, name: str, schema: pa.Schema) -> pa.Table | None:
        """A whole table, None if it is no longer there."""
        try:
            with self._parquet(name) as file:
                return pq.read_table(file, schema=schema)
        except FileNotFoundError:
            return None

    def tidy(self) -> None:
        """Makes few tables of many small ones in `videos` and `spans`. Safe at any moment, beside any
        writer: a table is taken away when its rows lie in another, and rows may lie in several.
        """
        for folder, schema in (("videos", VIDEOS), ("spans", SPANS)):
            small = [(n, size) for n, size, _ in self._described(folder) if size < SMALL_BYTES]
            while len(small) > MOST_SMALL:
                part, part_bytes = [], 0
                while small and part_bytes < JOINED_BYTES:
                    name, size_bytes = small.pop()
                    part.append(name)
                    part_bytes += size_bytes
                tables = [self._table(name, schema) for name in part]
                rows = pa.concat_tables(
                    [schema.empty_table(), *(table for table in tables if table is not None)]
                )
                rows = latest_of(rows) if folder == "videos" else rows
                self.write_table(f"{folder}/{uuid.uuid4().hex}.parquet", rows)
                for name in part:
                    self.remove(name)

    def _described(self, folder: str) -> Iterator[tuple[str, int, str]]:
        """(name, size in bytes, mark) of each table of a folder."""
        for page in pages(self.fs, self.path(folder), deep=False):
            for entry in page:
                if entry["name"].endswith(".parquet"):
                    name = entry["name"].rsplit("/", 1)[-1]
                    yield f"{folder}/{name}", entry["size"], mark_of(entry)

    def _marks(self) -> dict[str, str]:
        """What of each frames file changes with it; empty where the storage does not tell."""
        return {name: mark and f"{size} {mark}" for name, size, mark in self._described("frames")}

    def add_frames(self, rows: pa.Table, spans: list[SpanRecord]) -> str:
        """Stores whole spans in one file, named by what is in it; returns the file's name."""
        text = json.dumps([asdict(span) for span in spans])
        ids = "".join(sorted(f"{span.span_id}{span.attempts}" for span in spans))
        name = f"frames/{uuid.uuid5(uuid.NAMESPACE_OID, ids).hex}.parquet"
        self.write_table(name, rows.replace_schema_metadata({SPANS_KEY: text.encode()}))
        return name

    def spans(self) -> dict[str, tuple[str, SpanRecord]]:
        """Every stored span by id, with the name of the frames file that counts for it. A span that
        was stored more than once (two ingests at once, another attempt) counts in one file only.
        """
        by_video = self.stored_spans()
        return {span: found for (rows,) in together(by_video) for span, found in counted(rows)}

    def stored_spans(self) -> Buckets:
        """The records of all frames files: rows of `SPANS` by video; a span may come twice."""
        found = Buckets("video_id", SPANS)
        for table in self._span_tables():
            found.add(table)
        return found

    def _span_tables(self) -> Iterator[pa.Table]:
        """Rows of `SPANS` of all frames files: from the ledger those of files that are what they were
        when it was written, from the files themselves the others.
        """
        seen: set[str] = set()
        while True:
            marks = self._marks()
            for table in self._tables("spans", SPANS) if not seen else ():
                table, files = _still_true(table, marks, seen)
                seen |= files
                yield table
            new = [name for name in marks if name not in seen]
            seen.update(new)
            vanished = False
            for table in mapped(partial(self._footer, marks), new, READERS):
                if table is None:  # settled meanwhile: its spans lie in files that are newer
                    vanished = True
                else:
                    yield table
            if not vanished:
                return

    def _footer(self, marks: dict[str, str], name: str) -> pa.Table | None:
        if name not in self._footers:
            try:
                records = self.records(name)
            except FileNotFoundError:
                return None
            known = {"file": name, "mark": marks[name], "in_file": len(records)}
            rows = [asdict(record) | known for record in records]
            self._footers[name] = pa.Table.from_pylist(rows, schema=SPANS)
        return self._footers[name]

    def enter(self) -> None:
        """Enters the frames files that the ledger does not know into it, so that nobody needs to open
        them to learn what is in them. Their storage must tell when a file changes.
        """
        marks = {name: mark for name, mark in self._marks().items() if mark}
        known: set[str] = set()
        for table in self._tables("spans", pa.schema([SPANS.field("file"), SPANS.field("mark")])):
            known |= _still_true(table, marks, known)[1]
        footers = mapped(
            partial(self._footer, marks), (name for name in marks if name not in known), READERS
        )
        found = (table for table in footers if table is not None)
        while tables := _rows_of(found, LEDGER_ROWS):
            self.write_table(f"spans/{uuid.uuid4().hex}.parquet", pa.concat_tables(tables))

    def in_force(self, table: pa.Table) -> pa.Table:
        """The rows of a table of the ledger that count: those of frames files as they are now."""
        return _still_true(table, self._marks(), set())[0]

    def settle(self) -> int:
        """Takes away the rows of spans that count in another file, so that a plain reader of the
        frames files sees each row once; returns the number of files that were removed or written
        anew. Safe at any moment, beside any writer: see `_rank`.
        """
        lost: dict[str, set[str]] = {}
        for (rows,) in together(self.stored_spans()):
            times = pc.value_counts(rows["span_id"])
            twice = times.field("values").filter(pc.greater(times.field("counts"), 1))
            rows = rows.filter(pc.is_in(rows["span_id"], twice))
            best = dict(counted(rows))
            for name, span in zip(*(rows[c].to_pylist() for c in ("file", "span_id")), strict=True):
                if best[span][0] != name:
                    lost.setdefault(name, set()).add(span)
        for name, spans in lost.items():
            try:
                kept = [record for record in self.records(name) if record.span_id not in spans]
                if kept:
                    with self._parquet(name) as file:
                        rows = pq.read_table(file)
                    ids = pa.array([record.span_id for record in kept])
                    self.add_frames(rows.filter(pc.is_in(rows["span_id"], ids)), kept)
            except FileNotFoundError:  # settled by another
                continue
            self.remove(name)
        return len(lost)

    def records(self, name: str) -> list[SpanRecord]:
        """The records of the spans in a frames file."""
        with self._parquet(name, FOOTER_BYTES) as file:
            metadata = pq.read_schema(file).metadata or {}
        if SPANS_KEY not in metadata:
            raise UserError(f"{self.path(name)} is not a frames file of a corpus.")
        return [SpanRecord.from_json(record) for record in json.loads(metadata[SPANS_KEY])]

    def frames(self, name: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The rows of one frames file, in pieces. Raises `UserError` if it was settled meanwhile."""
        try:
            with self._parquet(name) as file:
                parquet = pq.ParquetFile(file, page_checksum_verification=True)
                for batch in parquet.iter_batches(batch_size=65536, columns=columns):
                    yield pa.Table.from_batches([batch])
        except FileNotFoundError:
            raise UserError(
                f"{self.path(name)} was replaced by an ingest that ran meanwhile: run this again."
            ) from None

    def states(self) -> list[VideoState]:
        """What is known and embedded of every video, sorted by URI. Content that lies at several
        places is one video, which lives where it was found last.
        """
        return sorted(self.each_state(), key=lambda state: state.uri)

    def each_state(self) -> Iterator[VideoState]:
        """As `states`, for any number of videos: of more than `HELD_ROWS` only pieces are sorted."""
        fps = self.config.sampling.fps
        for rows, spans in self._contents():
            yield from _states(rows, spans, fps)

    def overview(
        self, indexed: dict[str, Any] | None, only_flawed: bool, most: int | None
    ) -> Overview:
        """The overview of all states, in which no states are made of what is only counted."""
        told, fps = Overview((), indexed, only_flawed, most), self.config.sampling.fps
        shown = 0 if only_flawed else most
        for rows, spans in self._contents():
            plain = plainly_indexed(rows, spans, fps).sort_by("uri")
            plain = plain.slice(plain.num_rows if shown is None else shown)
            told.add_sums(plain)
            ids = plain["video_id"].combine_chunks()
            rows = rows.filter(pc.invert(pc.is_in(rows["content"], ids)))
            spans = spans.filter(pc.invert(pc.is_in(spans["video_id"], ids)))
            for state in _states(rows, spans, fps):
                told.add(state)
        return told

    def _contents(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        """(places with their `content`, rows of `SPANS`) of the same contents, in pieces."""
        spans = self.stored_spans()
        videos = Buckets("content", _BY_CONTENT)
        for rows in self.latest():
            ids = rows["video_id"]
            content = pc.if_else(pc.equal(ids, ""), rows["uri"], ids)
            videos.add(rows.append_column("content", content).select(_BY_CONTENT.names))
        for rows, records in together(videos, spans):
            yield rows, _as_few(records)


def _states(rows: pa.Table, spans: pa.Table, fps: float | None) -> list[VideoState]:
    by_video: dict[str, list[SpanRecord]] = {}
    for _, (_, span) in counted(spans):
        by_video.setdefault(span.video_id, []).append(span)
    places: dict[str, list[dict[str, Any]]] = {}
    for row in video_rows(rows):
        places.setdefault(row.pop("content"), []).append(row)
    states = [
        video_state(found, by_video.get(content, []), fps)
        for content, found in places.items()
        if any(row["status"] != "gone" for row in found)
    ]
    return sorted(states, key=lambda state: state.uri)


_UNTOLD = ("source", "size_bytes", "etag", "container", "codec", "width", "height", "seekable")
_BY_CONTENT = pa.schema(
    [*(field for field in VIDEOS if field.name not in _UNTOLD), pa.field("content", pa.string())]
)


def _as_few(spans: pa.Table) -> pa.Table:
    """Rows of `SPANS` that tell the same of their videos: all spans of a video that has each of them
    once, without any fault, are one that holds the end.
    """
    columns = {
        "once": pc.cast(spans["ended"], pa.int32()),
        "end": pc.if_else(spans["ended"], spans["span"], -1),
        "faults": pc.add(
            pc.add(pc.list_value_length(spans["errors"]), pc.list_value_length(spans["gaps"])),
            pc.cast(spans["quarantined"], pa.int32()),
        ),
    }
    for name, column in columns.items():
        spans = spans.append_column(name, column)
    largest = (
        "span",
        "end",
        "faults",
        "last_pts_s",
        "attempts",
        "ended",
        "span_id",
        "file",
        "mark",
    )
    sums = ("once", "frames", "embedded", "decode_s", "encode_s")
    videos = spans.group_by("video_id").aggregate(
        [("span", "count"), ("span", "count_distinct"), ("pairs", "max"), ("in_file", "max")]
        + [(name, "max") for name in largest]
        + [(name, "sum") for name in sums]
    )
    spans_of = pc.add(videos["span_max"], 1)
    conditions = [
        pc.equal(videos["span_count"], spans_of),
        pc.equal(videos["span_count_distinct"], spans_of),
        pc.equal(videos["end_max"], videos["span_max"]),
        pc.equal(videos["once_sum"], 1),
        pc.equal(videos["faults_max"], 0),
    ]
    videos = videos.filter(reduce(pc.and_, conditions))
    count = videos.num_rows
    one = {
        "video_id": videos["video_id"],
        "span": pa.array([0] * count, pa.int32()),
        "errors": pa.array([[]] * count, SPANS.field("errors").type),
        "gaps": pa.array([[]] * count, SPANS.field("gaps").type),
        "quarantined": pa.array([False] * count),
    }
    for name in (*largest[3:], "pairs", "in_file"):
        one[name] = videos[f"{name}_max"]
    for name in sums[1:]:
        one[name] = videos[f"{name}_sum"]
    merged = pa.table([one[name].cast(SPANS.field(name).type) for name in SPANS.names], SPANS)
    others = pc.invert(pc.is_in(spans["video_id"], videos["video_id"].combine_chunks()))
    return pa.concat_tables([merged, spans.filter(others).select(SPANS.names).cast(SPANS)])


def _still_true(table: pa.Table, marks: dict[str, str], but: set[str]) -> tuple[pa.Table, set[str]]:
    """(rows, their files) of a table of the ledger whose frames files have the `marks` that they had,
    `but` for some.
    """
    pairs = table.select(["file", "mark"]).group_by(["file", "mark"]).aggregate([])
    files = {
        name
        for name, mark in zip(*(column.to_pylist() for column in pairs.columns), strict=True)
        if name not in but and marks.get(name) == mark != ""
    }
    if len(files) < pairs.num_rows:
        table = table.filter(pc.is_in(table["file"], pa.array(files, pa.string())))
    return table, files


def _rows_of(tables: Iterator[pa.Table], rows: int) -> list[pa.Table]:
    """The next tables, until they have so many rows."""
    taken: list[pa.Table] = []
    while (
        sum(table.num_rows for table in taken) < rows and (table := next(tables, None)) is not None
    ):
        taken.append(table)
    return taken


def counted(rows: pa.Table) -> Iterator[tuple[str, tuple[str, SpanRecord]]]:
    """(span's id, (file that counts, record)) of rows of `SPANS`, each span once."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows.to_pylist():
        known = best.get(row["span_id"])
        if known is None or _rank(row) < _rank(known):
            best[row["span_id"]] = row
    for span, row in best.items():
        yield span, (row["file"], span_record(row))


def span_record(row: dict[str, Any]) -> SpanRecord:
    """The record in a row of `SPANS`."""
    known = {name: value for name, value in row.items() if name not in ("file", "mark", "in_file")}
    return SpanRecord.from_json(known)


def _rank(row: dict[str, Any]) -> tuple[int, int, str]:
    """Which of several files counts for a span: the lowest rank, that is the latest attempt, then the
    file with the fewest spans. What `settle` writes anew ranks before what it was made from, so the
    best file of a span is never taken away, however many settle or write at once.
    """
    return (-row["attempts"], row["in_file"], row["file"])


def _parse_config(data: bytes) -> CorpusConfig:
    found = json.loads(data)
    if found["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"The corpus has format {found['format_version']}; this version of vsearch reads format "
            f"{FORMAT_VERSION}."
        )
    return CorpusConfig(
        dino=Encoder(**found["dino"]),
        clip=Encoder(**found["clip"]),
        input_px=found["input_px"],
        sampling=Sampling(**found["sampling"]),
        pairs=found["pairs"],
    )


def newest_projector(corpus: Corpus) -> tuple[str, dict[str, Any]] | None:
    """(version, its config.json) of the newest finished projector, None when there is none."""
    for version in reversed(corpus.folders("projector")):
        name = f"projector/{version}/config.json"
        if not version.startswith(".") and corpus.exists(name):
            return version, json.loads(corpus.read(name))
    return None


def vector_matrix(column: pa.ChunkedArray) -> NDArray[np.float16]:
    """float16 (n, dim) of a column of fixed-size lists."""
    dim = column.type.list_size
    parts = [chunk.flatten().to_numpy().reshape(len(chunk), dim) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros((0, dim), np.float16)


def _brief(part: Encoder | Sampling | float) -> str:
    if isinstance(part, Encoder):
        return f"{part.model} (weights {part.revision})"
    if isinstance(part, float):
        return f"{part:g}"
    rate = "every frame" if part.fps is None else f"{part.fps:g} frames a second"
    shared = "" if part.max_change is None else f", shared within {part.max_change:g} levels"
    return f"{rate} in spans of {part.span_s:g} s{shared}"
