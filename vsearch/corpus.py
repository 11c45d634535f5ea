"""The corpus on storage: its layout, atomic writes, and what it says about each video.

Files are immutable. They are written under a temporary name first (on object storage: in one PUT),
so whatever has its final name is whole.
"""

import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vsearch.config import CorpusConfig, Encoder, Sampling, UserError
from vsearch.schema import SPANS_KEY, VIDEOS, SpanRecord

FORMAT_VERSION = 1


@dataclass(frozen=True)
class VideoState:
    """One video and what is embedded of it. `status` is indexed, partial, failed or pending;
    `reason` says why it is not indexed in full.
    """

    uri: str
    video_id: str
    status: str
    reason: str | None
    frames: int
    duration_s: float | None
    zero_s: float
    recorded_at: datetime
    recorded_at_source: str
    ingested_at: datetime


class Corpus:
    """A corpus at a URL (a local path, `s3://bucket/prefix`, anything fsspec opens)."""

    def __init__(self, url: str) -> None:
        try:
            self.fs, self._root = fsspec.url_to_fs(str(url))
        except (ImportError, ValueError) as error:
            raise UserError(f"The corpus URL {str(url)!r} cannot be used: {error}.") from error
        self.url = str(url)
        self._root = self._root.rstrip("/")
        self._local = "file" in _protocols(self.fs)
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
        return bool(self.fs.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        data: bytes = self.fs.cat_file(self.path(name))
        return data

    def open(self, name: str) -> BinaryIO:
        file: BinaryIO = self.fs.open(self.path(name), "rb")
        return file

    def write(self, name: str, data: bytes) -> None:
        """Puts a whole file in place at once; readers see the old one or the new one."""
        path = self.path(name)
        if not self._local:
            self.fs.pipe_file(path, data)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)

    def put(self, local_file: str, name: str) -> None:
        """Moves a finished local file into the corpus."""
        if self._local:
            Path(self.path(name)).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(local_file, self.path(name))
        else:
            self.fs.put_file(local_file, self.path(name))
            Path(local_file).unlink()

    def fetch(self, name: str, sha256: str) -> Path:
        """A copy of a file on this machine's disk, kept under its SHA-256 for the next time."""
        path = Path.home() / ".cache" / "vsearch" / sha256
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
            self.fs.get_file(self.path(name), str(temporary))
            temporary.replace(path)
        return path

    def write_table(self, name: str, table: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        self.write(name, sink.getvalue())

    def files(self, folder: str, suffix: str = ".parquet") -> list[str]:
        """Names (relative to the corpus) of the finished files in a folder, sorted."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(f"{folder}/{p.rsplit('/', 1)[-1]}" for p in found if p.endswith(suffix))

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, sorted."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.path(folder), detail=True)
        except FileNotFoundError:
            return []
        names = (
            e["name"].rstrip("/").rsplit("/", 1)[-1] for e in found if e["type"] == "directory"
        )
        return sorted(names)

    @contextmanager
    def _parquet(self, name: str) -> Iterator[BinaryIO]:
        """An open Parquet file; damage is reported with its name."""
        try:
            with self.open(name) as file:
                yield file
        except pa.ArrowException as error:
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
            self.write("corpus.json", (json.dumps(asdict(wanted), indent=2) + "\n").encode())
        self.__dict__.pop("config", None)
        for part in ("dino", "clip", "sampling"):
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
        """The latest row of each URI, as dictionaries, sorted by URI."""
        latest: dict[str, dict[str, Any]] = {}
        for name in self.files("videos"):
            with self._parquet(name) as file:
                rows = pq.read_table(file, schema=VIDEOS).to_pylist()
            for row in rows:
                known = latest.get(row["uri"])
                if known is None or row["ingested_at"] >= known["ingested_at"]:
                    latest[row["uri"]] = row
        return [latest[uri] for uri in sorted(latest)]

    def add_frames(self, rows: pa.Table, spans: list[SpanRecord]) -> str:
        """Stores whole spans in one file, named by what is in it; returns the file's name."""
        text = json.dumps([asdict(span) for span in spans])
        ids = "".join(sorted(span.span_id for span in spans))
        name = f"frames/{uuid.uuid5(uuid.NAMESPACE_OID, ids).hex}.parquet"
        self.write_table(name, rows.replace_schema_metadata({SPANS_KEY: text.encode()}))
        return name

    def spans(self) -> dict[str, tuple[str, SpanRecord]]:
        """Every stored span by id, with the name of the frames file that counts for it. A span that
        was stored twice (two ingests at once) counts in one file only, the first by name.
        """

        def records(name: str) -> tuple[str, list[SpanRecord]]:
            with self._parquet(name) as file:
                metadata = pq.read_schema(file).metadata or {}
            if SPANS_KEY not in metadata:
                raise UserError(f"{self.path(name)} is not a frames file of a corpus.")
            return name, [SpanRecord(**record) for record in json.loads(metadata[SPANS_KEY])]

        found: dict[str, tuple[str, SpanRecord]] = {}
        with ThreadPoolExecutor(16) as pool:
            for name, spans in pool.map(records, self.files("frames")):
                for span in spans:
                    found.setdefault(span.span_id, (name, span))
        return found

    def frames(self, name: str, columns: list[str]) -> Iterator[pa.Table]:
        """The rows of one frames file, in pieces."""
        with self._parquet(name) as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=65536, columns=columns):
                yield pa.Table.from_batches([batch])

    def states(self) -> list[VideoState]:
        """What is known and embedded of every video."""
        fps = self.config.sampling.fps
        by_video: dict[str, list[SpanRecord]] = {}
        for _, span in self.spans().values():
            by_video.setdefault(span.video_id, []).append(span)
        # Content that was found at two places is one video, which lives where it was found last.
        latest: dict[str, dict[str, Any]] = {}
        for row in sorted(self.videos(), key=lambda row: row["ingested_at"]):
            latest[row["video_id"] or row["uri"]] = row
        rows = sorted(latest.values(), key=lambda row: row["uri"])
        return [_state(row, by_video.get(row["video_id"], []), fps) for row in rows]


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
        format_version=found["format_version"],
    )


def _state(row: dict[str, Any], spans: list[SpanRecord], fps: float | None) -> VideoState:
    frames = sum(span.frames for span in spans)
    errors = [error for span in sorted(spans, key=lambda s: s.span) for error in span.errors]
    ended = any(span.ended for span in spans)
    last_pts_s = max((s.last_pts_s for s in spans if s.last_pts_s is not None), default=None)
    status, reason = "indexed", None
    if row["status"] == "failed":
        status, reason = "failed", row["reason"]
    elif not ended or len(spans) < 1 + max((s.span for s in spans if s.ended), default=0):
        status, reason = "pending", f"{len(spans)} of about {row['expected_spans']} spans embedded"
    elif frames == 0:
        status, reason = "failed", errors[0] if errors else "no frame can be decoded"
    elif errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        status, reason = "partial", errors[0] + more
    elif row["duration_s"] and last_pts_s is not None:
        lacking_s = row["start_s"] + row["duration_s"] - last_pts_s
        if lacking_s > max(2.0, 0.05 * row["duration_s"]) + (1 / fps if fps else 0):
            status = "partial"
            reason = (
                f"the pictures end {lacking_s:.1f} s before the {row['duration_s']:.1f} s claimed"
            )
    return VideoState(
        uri=row["uri"],
        video_id=row["video_id"],
        status=status,
        reason=reason,
        frames=frames,
        duration_s=row["duration_s"],
        zero_s=row["zero_s"] or 0.0,
        recorded_at=row["recorded_at"],
        recorded_at_source=row["recorded_at_source"],
        ingested_at=row["ingested_at"],
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


def _brief(part: Encoder | Sampling) -> str:
    if isinstance(part, Encoder):
        return f"{part.model} (weights {part.revision})"
    rate = "every frame" if part.fps is None else f"{part.fps:g} frames a second"
    return f"{rate} in spans of {part.span_s:g} s"


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
