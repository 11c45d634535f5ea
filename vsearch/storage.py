"""Files at any fsspec URL: transient failures are retried, files are read in ranges."""

import hashlib
import io
import os
import re
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import parse_qsl, urlsplit

import fsspec
import tenacity
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.core import split_protocol

from vsearch.config import UserError

RANGE_BYTES = 1 << 20
RANGES_KEPT = 8

ATTEMPTS = 8
PATIENCE_S = 60.0
"""No attempt begins after so long: a storage's own client may repeat each for minutes already."""

ANSWER_S = 15.0
SLOWEST_BYTES = 1 << 16
"""A range may take `ANSWER_S` and a second for each so many bytes, whatever the client would wait."""


class ChangedError(OSError):
    """A file that is no longer the one that was listed."""


LASTING = (
    *(FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError),
    *(BlockingIOError, ChangedError, ValueError),
)
MISCONFIGURED = re.compile("Credentials|Profile|Region|Config|Param|Valid|Token|Login|Unknown")
REPEATABLE_STATUS = frozenset({408, 409, 425, 429, *range(500, 600)} - {501})
SPOILED = frozenset({"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch"})
"""Codes of S3 for a request that was damaged or lost on the way, which have status 400."""

STORAGE_PACKAGES = frozenset(
    {"adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "fsspec", "gcsfs", "google", "s3fs"}
)
SECRET_PARAMETERS = frozenset(
    {"x-amz-signature", "x-amz-security-token", "x-goog-signature", "signature", "sig", "token"}
)


PAGE_ENTRIES = 1000
"""So many files of a listing are in memory at once, where the storage lists them in pages."""

T = TypeVar("T")
A = TypeVar("A")


def filesystem(url: str) -> tuple[Any, str]:
    """(file system, path) of a URL. Raises `UserError` for one that cannot be used, or that carries
    a secret: it would be stored in the corpus and shown in answers.
    """
    try:
        refuse_secret(url)
        if "::" not in url or len(_parts(url)) > 1:
            return fsspec.url_to_fs(url)
        kind = fsspec.get_filesystem_class(split_protocol(url)[0] or "file")
        return kind(**kind._get_kwargs_from_urls(url)), kind._strip_protocol(url)
    except (ImportError, ValueError) as error:
        plain = re.sub("//.*@", "//…@", url)
        raise UserError(f"The URL {plain!r} cannot be used: {error}.") from error


def refuse_secret(url: str) -> None:
    """Raises `UserError` for a URL that carries a secret, ValueError for what is no URL."""
    for part in _parts(url):
        if (plain := _without_secret(part)) is not None:
            raise UserError(
                f"The address {plain} carries a secret, which would be stored: give it without, "
                f"and the credentials as its storage reads them (environment, configuration "
                f"file, role)."
            )


def _parts(url: str) -> list[str]:
    """The addresses that are chained in a URL, or it alone: a name on disk may hold the same signs."""
    last = url.rpartition("::")[2]
    chained = not url.startswith("/") and ("://" in last or last.startswith("/"))
    return url.split("::") if chained else [url]


def _without_secret(url: str) -> str | None:
    """An address without the password, the token in place of a user, or the signature that it carries;
    None if it carries none.
    """
    split = urlsplit(url if "://" in url else "")
    if "@" in url and re.fullmatch(r"[^:@]+:[^:@]*\D[^:@]*", split.netloc):
        return f"{split.scheme}://…"  # a '/' or '?' in the password: what is what cannot be told
    names = {name.lower() for name, _ in parse_qsl(split.query)}
    token = split.username if split.scheme in ("http", "https") else None
    if split.password or token or names & SECRET_PARAMETERS:
        return f"{split.scheme}://{split.netloc.rpartition('@')[2]}{split.path}"
    return None


def sha256(path: Path) -> str:
    """The SHA-256 of a file on this machine, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_local(fs: Any) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: network, server and time-out errors. Each storage
    has errors of its own; they are known by their package, so that none is imported for it.
    """
    if isinstance(error, LASTING) or MISCONFIGURED.search(type(error).__name__):
        return False
    status, code = _answer(error)
    if status is not None and status not in REPEATABLE_STATUS and code not in SPOILED:
        return False
    homes = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, (OSError, EOFError)) or bool(homes & STORAGE_PACKAGES)


def is_refused(error: BaseException) -> bool:
    """Whether a conditional request was refused because its condition did not hold."""
    return _answer(error)[0] == 412


def _answer(error: BaseException) -> tuple[int | None, str]:
    """Status and code of the HTTP answer that an error stands for, (None, "") if for none."""
    for kind in (error, error.__cause__):  # s3fs puts an error of Python's before that of botocore
        response = getattr(kind, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(response.get("Error", {}).get("Code", ""))
    for name in ("status", "status_code", "code"):  # aiohttp, azure, gcsfs and google
        if isinstance(status := getattr(error, name, None), int):
            return status, ""
    return None, ""


def persist(request: Callable[[], T], on_failure: Callable[[], None] = lambda: None) -> T:
    """Makes a request, and again after each transient failure: at most `ATTEMPTS` times with growing,
    random pauses of some 20 seconds in all, as long as `PATIENCE_S` is not over. `on_failure` is
    called before each pause. The last failure is raised.
    """
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS) | tenacity.stop_before_delay(PATIENCE_S),
        wait=tenacity.wait_random_exponential(multiplier=0.3, max=20),
        retry=tenacity.retry_if_exception(is_transient),
        before_sleep=lambda _: on_failure(),
        reraise=True,
    )
    return retrying(request)


def _ask(fs: Any, method: str, path: str, limit_s: float, **parameters: Any) -> Any:
    """What a method of a file system returns. Given up after `limit_s` where its client can be
    stopped: to a server that says nothing, that may repeat a request for half an hour.
    """
    try:
        if isinstance(fs, AsyncFileSystem) and fs.async_impl:
            return sync(fs.loop, getattr(fs, f"_{method}"), path, timeout=limit_s, **parameters)
        return getattr(fs, method)(path, **parameters)
    except TimeoutError as error:
        raise TimeoutError(f"{path}: the storage did not answer in time") from error


def mark_of(info: dict[str, Any]) -> str:
    """What of a storage's description of a file changes with its content; empty if nothing does."""
    names = ("ETag", "mtime", "LastModified", "etag", "last_modified")
    return str(next((info[name] for name in names if info.get(name)), ""))


def pages(fs: Any, path: str, deep: bool = True) -> Iterator[list[dict[str, Any]]]:
    """The storage's descriptions of the files below a folder (with `deep` also of the folders in it)
    in pieces, so that memory does not hold a large listing: by pages on S3 and on a disk, elsewhere
    folder by folder. Nothing for a folder that is not there.
    """
    if is_local(fs):
        yield from _pages_of_disk(fs, path, deep)
    elif "s3" in fs.protocol:
        yield from _pages_of_s3(fs, path, deep)
    else:
        fs.invalidate_cache()
        for _, _, files in fs.walk(path, maxdepth=None if deep else 1, detail=True):
            yield list(files.values())
            fs.invalidate_cache()


def _pages_of_disk(fs: Any, path: str, deep: bool) -> Iterator[list[dict[str, Any]]]:
    page, folders = [], [path]
    while folders:
        try:
            entries = os.scandir(folders.pop())
        except (FileNotFoundError, PermissionError):  # passed over, as fsspec does
            continue
        with entries:
            for entry in entries:
                try:
                    info = fs.info(entry)
                except FileNotFoundError:  # taken away meanwhile
                    continue
                if info["type"] != "directory":
                    page.append(info)
                elif deep:
                    folders.append(info["name"])
                if len(page) >= PAGE_ENTRIES:
                    yield page
                    page = []
    yield page


def _pages_of_s3(fs: Any, path: str, deep: bool) -> Iterator[list[dict[str, Any]]]:
    bucket, _, prefix = path.partition("/")
    options = {"Bucket": bucket, "Prefix": f"{prefix.rstrip('/')}/" if prefix else ""}
    options |= {} if deep else {"Delimiter": "/"}
    while True:
        page = persist(partial(fs.call_s3, "list_objects_v2", **options))
        yield [
            {
                "name": f"{bucket}/{entry['Key']}",
                "size": entry["Size"],
                "ETag": entry["ETag"],
                "LastModified": entry["LastModified"],
                "type": "file",
            }
            for entry in page.get("Contents", [])
            if not entry["Key"].endswith("/")
        ]
        if not page.get("IsTruncated"):
            return
        options["ContinuationToken"] = page["NextContinuationToken"]


def mapped(function: Callable[[A], T], items: Iterable[A], threads: int) -> Iterator[T]:
    """As `map`, with so many threads that run only a little ahead of what is taken."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def open_url(
    url: str,
    expected: tuple[int, str] | None = None,
    on_range: Callable[[], None] = lambda: None,
    range_bytes: int = RANGE_BYTES,
) -> BinaryIO:
    """A file for reading. `expected` is its size in bytes and its mark: raises `ChangedError` if it
    has others by now. `on_range` is called after each request to a remote storage, also a failed one.
    """
    fs, path = filesystem(url)
    fs.invalidate_cache(path)  # the file may have changed since its folder was listed
    return open_file(fs, path, expected, on_range, range_bytes)


def open_file(
    fs: Any,
    path: str,
    expected: tuple[int, str] | None = None,
    on_range: Callable[[], None] = lambda: None,
    range_bytes: int = RANGE_BYTES,
) -> BinaryIO:
    """As `open_url`, in a file system; what that remembers of a listing counts."""
    info = persist(partial(_ask, fs, "info", path, 2 * ANSWER_S), on_range)
    if info.get("type") == "directory":
        raise IsADirectoryError(f"{path} is a folder")
    if expected is not None and (int(info["size"] or 0), mark_of(info)) != expected:
        raise ChangedError(f"{path} has changed since it was listed")
    if is_local(fs):
        return open(path, "rb")
    if info["size"] is None:
        raise OSError(f"{path}: its server does not say how long it is")
    return cast(BinaryIO, RangeReader(fs, path, int(info["size"]), on_range, range_bytes))


class RangeReader(io.RawIOBase):
    """A remote file, read in aligned ranges of which the last few are kept. An answer that was cut
    short counts as a failure and is asked for again.
    """

    def __init__(
        self, fs: Any, path: str, size_bytes: int, on_range: Callable[[], None], range_bytes: int
    ) -> None:
        self._fs, self._path, self._size, self._on_range = fs, path, size_bytes, on_range
        self._range_bytes = range_bytes
        self._position = 0
        self._ranges: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills as much of the buffer as one range allows."""
        if self._position >= self._size:
            return 0
        number, offset = divmod(self._position, self._range_bytes)
        data = self._range(number)[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        """Exactly `size` bytes, fewer only at the end of the file."""
        wanted = self._size - self._position
        if size is not None and size >= 0:
            wanted = min(size, wanted)
        data = bytearray(max(0, wanted))
        view, filled = memoryview(data), 0
        while filled < wanted:
            filled += self.readinto(view[filled:])
        return bytes(data)

    def _range(self, number: int) -> bytes:
        if number not in self._ranges:
            start = number * self._range_bytes
            stop = min(self._size, start + self._range_bytes)
            self._ranges[number] = persist(partial(self._fetch, start, stop), self._on_range)
            if len(self._ranges) > RANGES_KEPT:
                self._ranges.popitem(last=False)
            self._on_range()
        self._ranges.move_to_end(number)
        return self._ranges[number]

    def _fetch(self, start: int, stop: int) -> bytes:
        limit_s = ANSWER_S + (stop - start) / SLOWEST_BYTES
        data: bytes = _ask(self._fs, "cat_file", self._path, limit_s, start=start, end=stop)
        if len(data) > stop - start:
            raise io.UnsupportedOperation(f"{self._path}: its server sends no ranges of a file")
        if len(data) < stop - start:
            raise EOFError(f"{self._path}: {len(data)} bytes came of {stop - start} asked for")
        return data
