"""What lies at the sources, and how that differs from what a corpus knows. No Ray, no decoding."""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import partial, reduce
from itertools import islice
from posixpath import basename
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.utils import glob_translate

from vsearch.buckets import Buckets, together
from vsearch.config import UserError
from vsearch.schema import latest_of, video_rows
from vsearch.storage import filesystem, is_local, mapped, mark_of, open_url, pages, persist

VIDEO_SUFFIXES = (
    *(".3g2", ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg"),
    *(".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)
LOOKUPS = 32


@dataclass(frozen=True)
class Listed:
    """A file at a source. `mark` changes with its content; `source` is the folder, glob, file or list
    that it came by; `reason` says why it cannot be looked at.
    """

    uri: str
    size_bytes: int
    mark: str
    modified_at: datetime | None
    source: str
    tags: dict[str, str] = field(default_factory=dict)
    reason: str | None = None


@dataclass(frozen=True)
class Changes:
    """What is to do so that a corpus knows what lies at its sources: files to look into, known rows
    of which only tags or recording time differ (as they should be), rows that are gone.
    """

    probe: list[Listed]
    relabel: list[dict[str, Any]]
    gone: list[dict[str, Any]]
    unchanged: int


LISTED = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("mark", pa.string(), nullable=False),
        pa.field("modified_at", pa.timestamp("us", tz="UTC")),
        pa.field("source", pa.string(), nullable=False),
        pa.field("tags", pa.map_(pa.string(), pa.string()), nullable=False),
        pa.field("reason", pa.string()),
    ]
)
"""One row for each `Listed`."""

PIECE_ROWS = 10_000


def list_videos(sources: list[str], complete: bool = False) -> list[Listed]:
    """The files at `sources`, sorted by URI, each once: folders (files with a video's suffix), globs,
    files, and lists (CSV, JSONL, Parquet) with a column `uri`, whose other columns become tags.
    Raises `UserError` for a source that is not there, cannot be read or holds nothing. A folder in a
    folder that cannot be read is passed over, unless the listing must be `complete`.
    """
    found = [e for (table,) in together(listing(sources, complete)) for e in each_once(table)]
    return sorted(found, key=lambda entry: entry.uri)


def listing(sources: list[str], complete: bool = False) -> Buckets:
    """As `list_videos`, for any number of files: rows of `LISTED` by URI, one for each source that a
    file came by (see `each_once`).
    """
    found = Buckets("uri", LISTED)
    for source in sources:
        before = found.rows
        entries = _listed(source, complete)
        while piece := list(islice(entries, PIECE_ROWS)):
            found.add(_table(piece))
        if found.rows == before:
            raise UserError(f"No videos found at {source}.")
    return found


def each_once(table: pa.Table) -> list[Listed]:
    """The files of rows of `LISTED`, each once: with the tags of the last list that has some."""
    found: dict[str, Listed] = {}
    for row in table.to_pylist():
        entry = Listed(**row | {"tags": dict(row["tags"])})
        if entry.uri not in found or entry.tags:
            found[entry.uri] = entry
    return list(found.values())


def once(table: pa.Table) -> pa.Table:
    """As `each_once`, as a table."""
    if table.num_rows == pc.count_distinct(table["uri"]).as_py():
        return table
    return _table(each_once(table))


def _table(entries: list[Listed]) -> pa.Table:
    columns = {f.name: [getattr(e, f.name) for e in entries] for f in fields(Listed)}
    columns["tags"] = [list(tags.items()) for tags in columns["tags"]]
    return pa.table(columns, schema=LISTED)


def _listed(source: str, complete: bool) -> Iterator[Listed]:
    fs, path = filesystem(source)
    if source.lower().endswith(tuple(LIST_READERS)):
        yield from _from_list(source)
        return
    home = uri_of(fs, path)
    try:
        for entry in _described(fs, _entries(fs, path, complete)):
            yield _entry(fs, entry, home)
    except FileNotFoundError:
        raise UserError(f"There is nothing at {source}.") from None
    except Exception as error:  # each storage has errors of its own: credentials, network, name
        raise UserError(f"{source} cannot be listed: {error}.") from error


def _entries(fs: Any, path: str, complete: bool) -> Iterator[dict[str, Any]]:
    """The storage's descriptions of the files that a source stands for, but for a list."""
    fs.invalidate_cache()
    if any(c in path for c in "*?[") and not persist(partial(fs.exists, path)):
        found = persist(partial(fs.glob, path, detail=True)).values()
        yield from (entry for entry in found if entry["type"] != "directory")
    elif persist(partial(fs.isdir, path)):
        if complete and is_local(fs):
            _require_readable(path)
        for page in pages(fs, path):
            yield from (entry for entry in page if entry["name"].lower().endswith(VIDEO_SUFFIXES))
    else:
        yield persist(partial(fs.info, path))


def _described(fs: Any, entries: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The entries with their sizes: a web server's listing holds names only."""
    while piece := list(islice(entries, PIECE_ROWS)):
        if all(entry.get("size") for entry in piece):
            yield from piece
        else:
            yield from mapped(
                lambda e: e if e.get("size") else persist(partial(fs.info, e["name"])),
                piece,
                LOOKUPS,
            )


def _require_readable(path: str) -> None:
    """Raises what any folder below a local path raises: fsspec passes over those."""

    def refuse(error: OSError) -> None:
        raise error

    for _ in os.walk(path, onerror=refuse):
        pass


# Not read with Arrow, which would make numbers and dates of a tag's text ("007").
def _csv_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    for row in csv.DictReader(text, strict=True):
        if None in row:
            raise ValueError("a line has more fields than there are columns")
        yield row


def _json_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
    for line in io.TextIOWrapper(file, "utf-8-sig", newline="\n"):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("a line is no object")
            yield row


def _parquet_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(file).iter_batches(PIECE_ROWS):
        yield from batch.to_pylist()


LIST_READERS: dict[str, Callable[[BinaryIO], Iterator[dict[str, Any]]]] = {
    ".csv": _csv_rows,
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
}


def _from_list(source: str) -> Iterator[Listed]:
    fs, path = filesystem(source)
    home = uri_of(fs, path)
    named = (row for row in _rows_of_list(source) if row.get("uri"))
    return mapped(partial(_look_up, home), named, LOOKUPS)


def _rows_of_list(source: str) -> Iterator[dict[str, Any]]:
    suffix = next(s for s in LIST_READERS if source.lower().endswith(s))
    rows, has_uri = 0, False
    try:
        with open_url(source) as file:
            for row in LIST_READERS[suffix](file):
                rows += 1
                has_uri = has_uri or "uri" in row
                yield row
    except FileNotFoundError:
        raise UserError(f"There is nothing at {source}.") from None
    except Exception as error:
        raise UserError(f"The list {source} cannot be read: {error}.") from error
    if rows and not has_uri:
        raise UserError(f"The list {source} has no column 'uri'.")


def _look_up(home: str, row: dict[str, Any]) -> Listed:
    """One line of a list. A path without a protocol is relative to the list's folder."""
    uri = str(row.pop("uri"))
    tags = {name: str(value) for name, value in row.items() if value is not None and value != ""}
    if "://" not in uri and not uri.startswith("/"):
        uri = f"{home.rpartition('/')[0]}/{uri}"
    fs, path = filesystem(uri)
    fs.invalidate_cache()
    try:
        return _entry(fs, persist(partial(fs.info, path)), home, tags)
    except Exception as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "there is no such file" if missing else f"cannot be read: {error}"
        return Listed(uri_of(fs, path), 0, "", None, home, tags, reason)


def _entry(
    fs: Any, info: dict[str, Any], source: str, tags: dict[str, str] | None = None
) -> Listed:
    uri = uri_of(fs, info["name"])
    return Listed(
        uri, int(info["size"] or 0), mark_of(info), _modified_at(info), source, tags or {}
    )


def uri_of(fs: Any, path: str) -> str:
    """How a file is called in a corpus: its path on a local disk, else its URL."""
    if not is_local(fs):
        return str(fs.unstrip_protocol(path)).rstrip("/")
    plain = os.path.normpath(path)  # one name for one file; but behind a link `..` leads elsewhere
    same = plain == path or os.path.realpath(plain) == os.path.realpath(path)
    return plain if same else path.rstrip("/")


def _modified_at(info: dict[str, Any]) -> datetime | None:
    value = info.get("LastModified") or info.get("mtime") or info.get("updated")
    if isinstance(value, (int, float)):
        return datetime.fromtimestamp(value, UTC)
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if not isinstance(value, datetime):
        return None
    return value if value.tzinfo else value.replace(tzinfo=UTC)


# ── comparing ────────────────────────────────────────────────────────────────────────────────────


def compare(
    listed: list[Listed],
    known: list[dict[str, Any]],
    sync_sources: Iterable[str] = (),
    retry_failed: bool = False,
    time_of: Callable[[str], datetime | None] = lambda uri: None,
) -> Changes:
    """What a corpus that knows the rows `known` must do about `listed`. With `sync_sources`, rows that
    lie at these sources but are not listed are gone. `time_of` reads a recording time from a URI.
    """
    covers = _covering(sync_sources, (entry.uri for entry in listed))
    return _compare(listed, known, covers, retry_failed, time_of)


def differences(
    listed: Buckets,
    found: Buckets,
    sync_sources: Iterable[str] = (),
    retry_failed: bool = False,
    time_pattern: str | None = None,
) -> Iterator[tuple[Changes, list[dict[str, Any]]]]:
    """As `compare`, for any number of files: bucket by bucket, what is to do, and the rows that are
    known of the files to probe. `listed` is a `listing`, `found` all rows of the corpus by URI.
    """
    time_of = name_clock(time_pattern)
    sync_sources = list(sync_sources)
    here = (uri for (table,) in together(listed) for uri in table["uri"].to_pylist())
    covers = _covering(sync_sources, here)
    for entries, rows in together(listed, found):
        entries, rows = once(entries), latest_of(rows)
        rows = rows.filter(pc.not_equal(rows["status"], "gone"))
        same = _plainly_unchanged(entries, rows, retry_failed, time_pattern is not None)
        others = entries.filter(pc.invert(same))
        wanted = pc.is_in(rows["uri"], others["uri"].combine_chunks())
        if sync_sources:
            wanted = pc.or_(
                wanted, pc.invert(pc.is_in(rows["uri"], entries["uri"].combine_chunks()))
            )
        known = video_rows(rows.filter(wanted))
        changes = _compare(each_once(others), known, covers, retry_failed, time_of)
        to_probe = {entry.uri for entry in changes.probe}
        unchanged = changes.unchanged + entries.num_rows - others.num_rows
        yield (
            replace(changes, unchanged=unchanged),
            [row for row in known if row["uri"] in to_probe],
        )


def _plainly_unchanged(
    entries: pa.Table, rows: pa.Table, retry_failed: bool, timed: bool
) -> pa.ChunkedArray:
    """Whether `_compare` would find nothing to do about an entry: true only where columns tell."""
    at = pc.index_in(entries["uri"], rows["uri"].combine_chunks())
    row = rows.select(["size_bytes", "etag", "status", "recorded_at_source"]).take(at)
    good = ["ok"] if retry_failed else ["ok", "failed"]
    tags = np.diff(entries["tags"].combine_chunks().offsets)
    conditions = [
        pc.equal(row["size_bytes"], entries["size_bytes"]),
        pc.equal(row["etag"], entries["mark"]),
        pc.is_in(row["status"], pa.array(good)),
        pa.chunked_array([tags == 0]),
    ]
    if timed:
        conditions.append(pc.equal(row["recorded_at_source"], "container"))
    return pc.fill_null(reduce(pc.and_, conditions), False)


def _compare(
    listed: list[Listed],
    known: list[dict[str, Any]],
    covers: Callable[[dict[str, Any]], bool],
    retry_failed: bool,
    time_of: Callable[[str], datetime | None],
) -> Changes:
    by_uri = {row["uri"]: row for row in known}
    probe: list[Listed] = []
    relabel: list[dict[str, Any]] = []
    for entry in listed:
        row = by_uri.get(entry.uri)
        if (
            row is None
            or (row["size_bytes"], row["etag"]) != (entry.size_bytes, entry.mark)
            or row["status"] == "unreadable"
            or (retry_failed and row["status"] == "failed")
        ):
            probe.append(entry)
            continue
        wanted: dict[str, Any] = {}
        if entry.tags and entry.tags != row["tags"]:
            wanted["tags"] = entry.tags
        if row["recorded_at_source"] != "container" and (time := time_of(entry.uri)):
            wanted |= {"recorded_at": time, "recorded_at_source": "name"}
        if any(row[name] != value for name, value in wanted.items()):
            relabel.append(row | wanted)
    here = {entry.uri for entry in listed}
    gone = [row for row in known if row["uri"] not in here and covers(row)]
    return Changes(probe, relabel, gone, len(listed) - len(probe) - len(relabel))


def _covering(sources: Iterable[str], here: Iterable[str]) -> Callable[[dict[str, Any]], bool]:
    """Whether a row lies at one of the sources: in the folder, matched by the glob, by that list. A
    source that the URIs `here` show to be a file or folder is no glob, whatever its name holds.
    """
    homes = [uri_of(*filesystem(source)) for source in sources]
    patterns = [home for home in homes if any(c in home for c in "*?[")]
    if patterns:
        names = {home for uri in here for home in patterns if f"{uri}/".startswith(f"{home}/")}
        patterns = [home for home in patterns if home not in names]
    globs = [re.compile(glob_translate(home)) for home in patterns]

    def covers(row: dict[str, Any]) -> bool:
        return (
            row["source"] in homes
            or any(row["uri"].startswith(f"{home}/") for home in homes)
            or any(glob.match(row["uri"]) for glob in globs)
        )

    return covers


DIRECTIVES = {
    "%Y": r"\d{4}", "%y": r"\d{2}", "%m": r"\d{2}", "%d": r"\d{2}", "%H": r"\d{2}", "%I": r"\d{2}",
    "%M": r"\d{2}", "%S": r"\d{2}", "%f": r"\d{1,6}", "%j": r"\d{3}", "%p": r"[AaPp][Mm]",
    "%b": r"[A-Za-z]{3}", "%B": r"[A-Za-z]+", "%z": r"(?:Z|[+-]\d{2}:?\d{2})", "%%": "%",
}  # fmt: skip


def name_clock(pattern: str | None) -> Callable[[str], datetime | None]:
    """Reads the recording time out of a URI's last part: `pattern` is strptime's, such as
    `%Y%m%d_%H%M%S`, and may stand anywhere in it; UTC unless it has %z. None where it does not fit.
    """
    if pattern is None:
        return lambda uri: None
    parts = re.split(r"(%.)", pattern)
    unknown = [part for part in parts if "%" in part and part not in DIRECTIVES]
    twice = [part for part in DIRECTIVES if part != "%%" and parts.count(part) > 1]
    if unknown or twice or not {"%Y", "%y"} & set(parts):
        what = "holds no year (%Y)"
        if unknown or twice:
            what = f"has the unknown directive {unknown[0]}" if unknown else f"has {twice[0]} twice"
        raise UserError(f"The pattern {pattern!r} {what}; an example: cam1_%Y%m%d_%H%M%S.")
    regex = re.compile("".join(DIRECTIVES.get(part) or re.escape(part) for part in parts))

    def time_of(uri: str) -> datetime | None:
        for match in regex.finditer(basename(uri)):
            try:
                time = datetime.strptime(match[0], pattern)
            except ValueError:
                continue
            return time if time.tzinfo else time.replace(tzinfo=UTC)
        return None

    return time_of
