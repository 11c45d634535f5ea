"""What lies at the sources, and how that differs from what a corpus knows. No Ray, no decoding."""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from posixpath import basename
from typing import Any, BinaryIO

import pyarrow.parquet
from fsspec.utils import glob_translate

from vsearch.config import UserError
from vsearch.storage import filesystem, is_local, mark_of, open_url, persist

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


def list_videos(sources: list[str], complete: bool = False) -> list[Listed]:
    """The files at `sources`, sorted by URI, each once: folders (files with a video's suffix), globs,
    files, and lists (CSV, JSONL, Parquet) with a column `uri`, whose other columns become tags.
    Raises `UserError` for a source that is not there, cannot be read or holds nothing. A folder in a
    folder that cannot be read is passed over, unless the listing must be `complete`.
    """
    found: dict[str, Listed] = {}
    for source in sources:
        entries = _listed(source, complete)
        if not entries:
            raise UserError(f"No videos found at {source}.")
        for entry in entries:
            known = found.get(entry.uri)
            if known is None or entry.tags:
                found[entry.uri] = entry
    return [found[uri] for uri in sorted(found)]


def _listed(source: str, complete: bool) -> list[Listed]:
    fs, path = filesystem(source)
    if source.lower().endswith(tuple(LIST_READERS)):
        return _from_list(source)
    fs.invalidate_cache()
    try:
        if any(c in path for c in "*?[") and not persist(partial(fs.exists, path)):
            entries = persist(partial(fs.glob, path, detail=True)).values()
        elif persist(partial(fs.isdir, path)):
            if complete and is_local(fs):
                _require_readable(path)
            everything = persist(partial(fs.find, path, detail=True)).values()
            entries = [e for e in everything if e["name"].lower().endswith(VIDEO_SUFFIXES)]
        else:
            entries = [persist(partial(fs.info, path))]
    except FileNotFoundError:
        raise UserError(f"There is nothing at {source}.") from None
    except Exception as error:  # each storage has errors of its own: credentials, network, name
        raise UserError(f"{source} cannot be listed: {error}.") from error
    home = uri_of(fs, path)
    files = [e for e in entries if e["type"] != "directory"]
    with ThreadPoolExecutor(LOOKUPS) as pool:  # a web server's listing holds names only
        whole = pool.map(
            lambda e: e if e.get("size") else persist(partial(fs.info, e["name"])), files
        )
        return [_entry(fs, e, home) for e in whole]


def _require_readable(path: str) -> None:
    """Raises what any folder below a local path raises: fsspec passes over those."""

    def refuse(error: OSError) -> None:
        raise error

    for _ in os.walk(path, onerror=refuse):
        pass


# Not read with Arrow, which would make numbers and dates of a tag's text ("007").
def _csv_rows(file: BinaryIO) -> list[dict[str, Any]]:
    table = csv.DictReader(io.StringIO(file.read().decode("utf-8-sig"), newline=""), strict=True)
    rows = list(table)
    if any(None in row for row in rows):
        raise ValueError("a line has more fields than there are columns")
    return rows


def _json_rows(file: BinaryIO) -> list[dict[str, Any]]:
    lines = file.read().decode("utf-8-sig").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no object")
    return rows


def _parquet_rows(file: BinaryIO) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
    return rows


LIST_READERS: dict[str, Callable[[BinaryIO], list[dict[str, Any]]]] = {
    ".csv": _csv_rows,
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
}


def _from_list(source: str) -> list[Listed]:
    suffix = next(s for s in LIST_READERS if source.lower().endswith(s))
    try:
        with open_url(source) as file:
            rows = LIST_READERS[suffix](file)
    except FileNotFoundError:
        raise UserError(f"There is nothing at {source}.") from None
    except Exception as error:
        raise UserError(f"The list {source} cannot be read: {error}.") from error
    if rows and not any("uri" in row for row in rows):
        raise UserError(f"The list {source} has no column 'uri'.")
    fs, path = filesystem(source)
    home = uri_of(fs, path)
    with ThreadPoolExecutor(LOOKUPS) as pool:
        return list(pool.map(partial(_look_up, home), [row for row in rows if row.get("uri")]))


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
    covers = _covers(sync_sources, here)
    gone = [row for row in known if row["uri"] not in here and covers(row)]
    return Changes(probe, relabel, gone, len(listed) - len(probe) - len(relabel))


def _covers(sources: Iterable[str], here: set[str]) -> Callable[[dict[str, Any]], bool]:
    """Whether a row lies at one of the sources: in the folder, matched by the glob, by that list. A
    source that the URIs `here` show to be a file or folder is no glob, whatever its name holds.
    """
    homes = [uri_of(*filesystem(source)) for source in sources]
    globs = [
        re.compile(glob_translate(home))
        for home in homes
        if any(c in home for c in "*?[")
        and not any(uri == home or uri.startswith(f"{home}/") for uri in here)
    ]

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
