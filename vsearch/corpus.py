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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vsearch.config import FORMAT_VERSION, CorpusConfig, Encoder, Sampling, UserError
from vsearch.coverage import VideoState, video_state
from vsearch.schema import SPANS_KEY, VIDEOS, SpanRecord
from vsearch.storage import RANGE_BYTES, filesystem, is_local, is_refused, open_file, persist

READERS = 16
FOOTER_BYTES = 1 << 16
"""Most footers of frames files fit in so much: the rest of the file is not read with them."""


class Corpus:
    """A corpus at a URL (a local path, `s3://bucket/prefix`, anything fsspec opens)."""

    def __init__(self, url: str) -> None:
        self.fs, self._root = filesystem(str(url))
        self.url = str(url)
        self._root = self._root.rstrip("/")
        self._local = is_local(self.fs)
        self._footers: dict[str, list[SpanRecord]] = {}  # files are immutable: read once
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
        return [row for row in self._latest_rows() if row["status"] != "gone"]

    def _latest_rows(self) -> list[dict[str, Any]]:
        def rows_of(name: str) -> list[dict[str, Any]]:
            with self._parquet(name) as file:
                rows: list[dict[str, Any]] = pq.read_table(file, schema=VIDEOS).to_pylist()
            return [row | {"tags": dict(row["tags"])} for row in rows]

        latest: dict[str, dict[str, Any]] = {}
        with ThreadPoolExecutor(READERS) as pool:
            for rows in pool.map(rows_of, self.files("videos")):
                for row in rows:
                    known = latest.get(row["uri"])
                    if known is None or row["ingested_at"] >= known["ingested_at"]:
                        latest[row["uri"]] = row
        return [latest[uri] for uri in sorted(latest)]

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
        return _counted(self._spans_by_file())

    def settle(self) -> int:
        """Takes away the rows of spans that count in another file, so that a plain reader of the
        frames files sees each row once; returns the number of files that were removed or written
        anew. Safe at any moment, beside any writer: see `_rank`.
        """
        by_file = self._spans_by_file()
        counted = _counted(by_file)
        settled = 0
        for name, records in by_file.items():
            kept = [record for record in records if counted[record.span_id][0] == name]
            if len(kept) == len(records):
                continue
            if kept:
                try:
                    with self._parquet(name) as file:
                        rows = pq.read_table(file)
                except FileNotFoundError:  # settled by another
                    continue
                ids = pa.array([record.span_id for record in kept])
                self.add_frames(rows.filter(pc.is_in(rows["span_id"], ids)), kept)
            self.remove(name)
            settled += 1
        return settled

    def records(self, name: str) -> list[SpanRecord]:
        """The records of the spans in a frames file."""
        with self._parquet(name, FOOTER_BYTES) as file:
            metadata = pq.read_schema(file).metadata or {}
        if SPANS_KEY not in metadata:
            raise UserError(f"{self.path(name)} is not a frames file of a corpus.")
        return [SpanRecord.from_json(record) for record in json.loads(metadata[SPANS_KEY])]

    def _spans_by_file(self) -> dict[str, list[SpanRecord]]:
        while True:
            names = self.files("frames")
            new = [name for name in names if name not in self._footers]
            try:
                with ThreadPoolExecutor(READERS) as pool:
                    self._footers |= zip(new, pool.map(self.records, new), strict=True)
            except FileNotFoundError:  # settled meanwhile: list again
                continue
            return {name: self._footers[name] for name in names}

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
        by_video: dict[str, list[SpanRecord]] = {}
        for _, span in self.spans().values():
            by_video.setdefault(span.video_id, []).append(span)
        places: dict[str, list[dict[str, Any]]] = {}
        for row in self._latest_rows():
            places.setdefault(row["video_id"] or row["uri"], []).append(row)
        fps = self.config.sampling.fps
        states = [
            video_state(rows, by_video.get(rows[0]["video_id"], []), fps)
            for rows in places.values()
            if any(row["status"] != "gone" for row in rows)
        ]
        return sorted(states, key=lambda state: state.uri)


def _counted(by_file: dict[str, list[SpanRecord]]) -> dict[str, tuple[str, SpanRecord]]:
    counted: dict[str, tuple[str, SpanRecord]] = {}
    ranks: dict[str, tuple[int, int, str]] = {}
    for name, records in by_file.items():
        for record in records:
            rank = _rank(name, records, record)
            if record.span_id not in ranks or rank < ranks[record.span_id]:
                ranks[record.span_id] = rank
                counted[record.span_id] = (name, record)
    return counted


def _rank(name: str, records: list[SpanRecord], record: SpanRecord) -> tuple[int, int, str]:
    """Which of several files counts for a span: the lowest rank, that is the latest attempt, then the
    file with the fewest spans. What `settle` writes anew ranks before what it was made from, so the
    best file of a span is never taken away, however many settle or write at once.
    """
    return (-record.attempts, len(records), name)


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
