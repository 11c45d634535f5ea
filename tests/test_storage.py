import errno
import io
import os
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import av
import fsspec
import numpy as np
import pyarrow as pa
import pytest
import tenacity
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from faulty_s3 import FAULTS, FaultyS3, put
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from vsearch import storage, video
from vsearch.config import Sampling, UserError
from vsearch.corpus import Corpus
from vsearch.sampling import SpanRun
from vsearch.schema import SpanRecord, frames_schema
from vsearch.storage import (
    RANGE_BYTES,
    RANGES_KEPT,
    ChangedError,
    filesystem,
    is_transient,
    mark_of,
    open_file,
    open_url,
    persist,
)

SHARES = [0.0, 0.2]
MIB = 1 << 20


def noise(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("share", SHARES)
def test_seeks_and_reads_give_the_bytes_of_the_object(
    proxy: FaultyS3, bucket: str, share: float
) -> None:
    data = noise(3 * MIB + 12345)
    url = put(bucket, "a.bin", data)
    proxy.forget()
    proxy.share = share
    file, oracle, rng = open_url(url, range_bytes=MIB // 8), io.BytesIO(data), random.Random(1)
    for _ in range(60):
        whence = rng.choice([io.SEEK_SET, io.SEEK_CUR, io.SEEK_END])
        offset = rng.randrange(len(data))
        if whence != io.SEEK_SET:
            offset = rng.choice([-1, 1]) * (offset // 4)
        offset = max(offset, -oracle.tell()) if whence == io.SEEK_CUR else offset
        assert file.seek(offset, whence) == oracle.seek(offset, whence)
        size = rng.choice([0, 1, 100, 70_000, 300_000])
        assert file.read(size) == oracle.read(size)
        assert file.tell() == oracle.tell()
    file.seek(0)
    assert file.read() == data
    assert proxy.largest_range <= MIB // 8
    assert set(proxy.injected) == (set(FAULTS) if share else set())


def test_a_missing_end_is_no_end_of_the_file(proxy: FaultyS3, bucket: str) -> None:
    data = noise(300_000)
    file = open_url(put(bucket, "a.bin", data), range_bytes=100_000)
    proxy.share, proxy.faults = 0.7, ("cut",)
    assert file.read() == data
    assert proxy.injected["cut"] > 0


def test_an_empty_object_and_the_end_read_as_nothing(bucket: str) -> None:
    assert open_url(put(bucket, "empty", b"")).read() == b""
    file = open_url(put(bucket, "a.bin", b"abc"))
    file.seek(10)
    assert file.read(5) == b""
    assert file.seek(-2, io.SEEK_END) == 1
    assert file.read(5) == b"bc"


@pytest.mark.parametrize(("ranges", "rounds_asked"), [(RANGES_KEPT, 1), (RANGES_KEPT + 1, 3)])
def test_few_ranges_are_kept(proxy: FaultyS3, bucket: str, ranges: int, rounds_asked: int) -> None:
    file = open_url(put(bucket, "a.bin", noise(ranges * 1000)), range_bytes=1000)
    for _ in range(3):
        for number in range(ranges):
            file.seek(number * 1000)
            file.read(1)
    assert proxy.requests["GET", f"{bucket}/a.bin"] == rounds_asked * ranges


def test_a_range_in_use_is_kept(proxy: FaultyS3, bucket: str) -> None:
    file = open_url(put(bucket, "a.bin", noise(3 * RANGES_KEPT * 1000)), range_bytes=1000)
    for number in range(3 * RANGES_KEPT):
        for start in (0, number * 1000):
            file.seek(start)
            file.read(1)
    assert proxy.requests["GET", f"{bucket}/a.bin"] == 3 * RANGES_KEPT


def test_a_large_file_is_not_held_in_memory() -> None:
    fsspec.filesystem("memory").pipe_file("/large.bin", noise(48 * MIB))
    file = open_url("memory://large.bin")
    tracemalloc.start()
    try:
        while file.read(64 << 10):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        fsspec.filesystem("memory").rm("/large.bin")
    assert peak < (RANGES_KEPT + 3) * RANGE_BYTES


def write_video(path: Path, faststart: bool) -> bytes:
    """60 seconds at 10 frames a second, a keyframe each second, of noise that fills some megabytes."""
    rng = np.random.default_rng(7)
    pictures = [rng.integers(0, 256, (144, 256, 3), np.uint8) for _ in range(20)]
    options = {"movflags": "+faststart"} if faststart else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 256, 144, "yuv420p"
        stream.bit_rate, stream.gop_size = 2_000_000, 10
        for number in range(600):
            frame = av.VideoFrame.from_ndarray(pictures[number % 20], "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = path.read_bytes()
    assert (data.index(b"moov") < data.index(b"mdat")) == faststart
    return data


@pytest.mark.parametrize("faststart", [False, True], ids=["moov at the end", "faststart"])
def test_a_span_costs_its_own_bytes_and_the_header(
    proxy: FaultyS3, bucket: str, tmp_path: Path, faststart: bool
) -> None:
    data = write_video(tmp_path / "v.mp4", faststart)
    url = put(bucket, "v.mp4", data)
    sampling, run = Sampling(span_s=5), SpanRun(6, 8)
    with open_url(url) as file:
        info = video.probe(file)
    proxy.forget()
    with open_url(url) as file:
        found = list(video.decode(file, info, 64, sampling, run, threads=1))
    local = list(video.decode(io.BytesIO(data), info, 64, sampling, run, threads=1))
    assert [span.pts_s for span in found] == [span.pts_s for span in local]
    assert [len(span.pts_s) for span in found] == [50, 50]
    assert all((a.pixels == b.pixels).all() for a, b in zip(found, local, strict=True))
    sent = proxy.sent_bytes["GET", f"{bucket}/v.mp4"]
    share = len(data) / 6
    print(f"{sent} bytes for a share of {share:.0f}: factor {sent / share:.2f}")
    assert len(data) > 8 * MIB
    assert sent <= 2 * share + 3 * MIB
    assert proxy.largest_range <= RANGE_BYTES


# ── the corpus ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("share", SHARES)
def test_a_corpus_keeps_its_promises(proxy: FaultyS3, bucket: str, share: float) -> None:
    corpus = Corpus(f"s3://{bucket}/corpus")
    # Whether the answer to a creation was lost cannot be told from another's having been first.
    proxy.share, proxy.faults = share, tuple(fault for fault in FAULTS if fault != "lost")
    contents = {f"index/v1/{number}.bin": noise(50_000 * number) for number in range(5)}
    for name, data in contents.items():
        assert not corpus.exists(name)
        corpus.write(name, data)
        assert corpus.exists(name)
        assert corpus.read(name) == data
    assert corpus.files("index/v1", ".bin") == list(contents)
    assert corpus.folders("index") == ["v1"]
    corpus.write("index/v1/0.bin", b"other")
    assert corpus.read("index/v1/0.bin") == b"other"
    assert corpus.write_new("once", b"first")
    assert not corpus.write_new("once", b"second")
    assert corpus.read("once") == b"first"
    for _ in range(2):
        corpus.remove("index/v1/1.bin")
    assert not corpus.exists("index/v1/1.bin")
    assert bool(proxy.injected) == bool(share)


@pytest.mark.parametrize("share", SHARES)
def test_frames_come_back_as_they_were_stored(proxy: FaultyS3, bucket: str, share: float) -> None:
    corpus = Corpus(f"s3://{bucket}/corpus")
    proxy.share = share
    stored: dict[str, list[dict[str, Any]]] = {}
    for number in range(4):
        record = SpanRecord(
            video_id="v", span_id=f"s{number}", span=number, frames=50, last_pts_s=9.0,
            ended=False, errors=[],
        )  # fmt: skip
        rows = [
            {"video_id": "v", "span_id": f"s{number}", "span": number, "frame": frame}
            | {"pts_s": frame / 10, "dino": [np.float16(frame + i) for i in range(64)]}
            for frame in range(50)
        ]
        table = pa.Table.from_pylist(rows, schema=frames_schema(64, 2))
        stored[corpus.add_frames(table, [record])] = table.to_pylist()
    spans = Corpus(f"s3://{bucket}/corpus").spans()
    assert {name for name, _ in spans.values()} == set(stored)
    assert sorted(spans) == [f"s{number}" for number in range(4)]
    for name, rows in stored.items():
        assert pa.concat_tables(corpus.frames(name)).to_pylist() == rows
    assert bool(proxy.injected) == bool(share)


# ── failures that last ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("url", ["s3://{}/none.mp4", "s3://no-such-bucket-here/a.mp4"])
def test_what_is_not_there_is_said_at_once(proxy: FaultyS3, bucket: str, url: str) -> None:
    with pytest.raises(FileNotFoundError):
        open_url(url.format(bucket))
    assert proxy.requests.total() == 2  # the file's, and whether it is a folder
    corpus = Corpus(url.format(bucket).rpartition("/")[0])
    proxy.forget()
    with pytest.raises(FileNotFoundError):
        corpus.read("none.mp4")
    assert proxy.requests.total() <= 3


def test_denied_access_is_said_at_once(proxy: FaultyS3, bucket: str) -> None:
    url = put(bucket, "a.mp4", noise(1000))
    file, corpus = open_url(url), Corpus(f"s3://{bucket}")
    proxy.share, proxy.faults = 1.0, ("403",)
    for request in (
        lambda: open_url(url),
        lambda: file.read(),
        lambda: corpus.write("b", b"data"),
        lambda: corpus.files("videos"),
    ):
        proxy.forget()
        with pytest.raises(PermissionError):
            request()
        assert proxy.requests.total() == 1


def test_an_object_that_shrank_is_an_error_at_once(proxy: FaultyS3, bucket: str) -> None:
    file = open_url(put(bucket, "a.mp4", noise(5000)), range_bytes=1000)
    put(bucket, "a.mp4", noise(500))
    file.seek(4000)
    proxy.forget()
    with pytest.raises(OSError, match="range"):
        file.read(10)
    assert proxy.requests.total() == 1


def test_a_changed_object_is_not_taken_for_the_one_that_was_listed(bucket: str) -> None:
    url = put(bucket, "folder/a.mp4", b"old")
    fs, path = filesystem(url)
    [listed] = fs.ls(f"{bucket}/folder", detail=True)
    expected = (listed["size"], mark_of(listed))
    assert open_url(url, expected).read() == b"old"
    assert fs.ls(f"{bucket}/folder") == [path]
    put(bucket, "folder/a.mp4", b"new")
    with pytest.raises(ChangedError, match=path):
        open_url(url, expected)
    assert open_url(url).read() == b"new"


def test_a_folder_is_no_file(bucket: str) -> None:
    put(bucket, "folder/a.mp4", b"data")
    with pytest.raises(IsADirectoryError):
        open_url(f"s3://{bucket}/folder")


# ── failures that do not end ─────────────────────────────────────────────────────────────────────


def test_a_server_that_always_refuses_is_given_up(
    proxy: FaultyS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    url = put(bucket, "a.mp4", noise(1000))
    file, corpus = open_url(url), Corpus(f"s3://{bucket}")
    proxy.share, proxy.faults = 1.0, ("503",)
    for request in (lambda: open_url(url), lambda: file.read(), lambda: corpus.exists("b")):
        proxy.forget()
        began = time.monotonic()
        with pytest.raises(OSError) as failed:
            request()
        assert failed.value.errno == errno.EBUSY
        assert 2 <= proxy.requests.total() <= 2 * 5  # s3fs makes up to five of each
        assert time.monotonic() - began < 15


def test_a_server_that_falls_silent_is_given_up(
    proxy: FaultyS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    monkeypatch.setattr(storage, "ANSWER_S", 0.5)
    signs: list[None] = []
    file = open_url(put(bucket, "a.mp4", noise(1000)), on_range=lambda: signs.append(None))
    signs.clear()  # on a busy machine the opening may have taken two attempts as well
    proxy.share, proxy.faults, proxy.pause_s = 1.0, ("slow",), 5.0
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=rf"{bucket}/a\.mp4: .*did not answer in time"):
        file.read()
    assert time.monotonic() - began < 4
    assert len(signs) == 1  # between the two attempts: whoever waits knows that this is alive


def test_pauses_grow_and_are_some_twenty_seconds_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    totals = []
    for _ in range(200):
        pauses: list[float] = []
        monkeypatch.setattr(tenacity.nap, "time", SimpleNamespace(sleep=pauses.append))
        with pytest.raises(ConnectionError, match="refused"):
            persist(failing(ConnectionError("refused")))
        assert len(pauses) == storage.ATTEMPTS - 1
        assert max(pauses) < 30  # less than what a decoder may be silent
        totals.append(sum(pauses))
    assert 15 < np.mean(totals) < 25
    assert max(totals) < 45


def test_no_attempt_begins_when_patience_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE_S", 0.5)
    attempts: list[None] = []

    def slow() -> None:
        attempts.append(None)
        time.sleep(0.6)
        raise ConnectionError("refused")

    with pytest.raises(ConnectionError):
        persist(slow)
    assert len(attempts) == 1


def failing(error: Exception) -> Callable[[], None]:
    def request() -> None:
        raise error

    return request


# ── which failures are which ─────────────────────────────────────────────────────────────────────


def s3_error(status: int, code: str) -> Exception:
    """What s3fs raises for an answer of S3."""
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(boto.ClientError(answer, "GetObject"))


def http_error(status: int) -> Exception:
    return aiohttp.ClientResponseError(None, (), status=status)  # type: ignore[arg-type]


TRANSIENT = [
    *(s3_error(500, "InternalError"), s3_error(503, "SlowDown"), s3_error(503, "503")),
    *(s3_error(502, "BadGateway"), s3_error(429, "TooManyRequests"), s3_error(409, "409")),
    *(s3_error(400, "RequestTimeout"), s3_error(400, "BadDigest"), http_error(503)),
    boto.EndpointConnectionError(endpoint_url="u"),
    boto.ConnectionClosedError(endpoint_url="u"),
    boto.ReadTimeoutError(endpoint_url="u"),
    boto.ConnectTimeoutError(endpoint_url="u"),
    boto.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    ResponseParserError("cut off"),
    *(aiohttp.ClientPayloadError("cut"), aiohttp.ServerDisconnectedError()),
    *(FSTimeoutError(), TimeoutError(), ConnectionResetError(), EOFError("short")),
    OSError(errno.EIO, "input/output error"),
]
LASTING = [
    *(s3_error(404, "NoSuchKey"), s3_error(404, "NoSuchBucket"), s3_error(403, "AccessDenied")),
    *(s3_error(403, "403"), s3_error(403, "SignatureDoesNotMatch"), s3_error(400, "ExpiredToken")),
    *(s3_error(301, "PermanentRedirect"), s3_error(400, "400"), s3_error(416, "InvalidRange")),
    *(s3_error(412, "PreconditionFailed"), s3_error(501, "NotImplemented")),
    *(s3_error(400, "InvalidBucketName"), http_error(401), http_error(404), http_error(410)),
    *(boto.NoCredentialsError(), boto.ProfileNotFound(profile="p"), boto.NoRegionError()),
    boto.ParamValidationError(report="bad"),
    boto.PartialCredentialsError(provider="p", cred_var="v"),
    boto.UnauthorizedSSOTokenError(),
    aiohttp.InvalidURL("nope"),
    *(FileNotFoundError(), FileExistsError(), PermissionError(), IsADirectoryError()),
    *(ChangedError("other"), io.UnsupportedOperation("seek"), UserError("no"), ValueError("no")),
    *(KeyError("no"), MemoryError(), RuntimeError("no"), KeyboardInterrupt()),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_it_is_worth_another_attempt(error: BaseException) -> None:
    assert is_transient(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_it_will_not_pass(error: BaseException) -> None:
    assert not is_transient(error)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "slow"])
def test_what_the_client_raises_for_each_fault_is_known(
    proxy: FaultyS3, bucket: str, fault: str
) -> None:
    put(bucket, "folder/a.bin", noise(1000))
    fs, path = filesystem(f"s3://{bucket}/folder/a.bin")
    fs.retries = 1
    proxy.share, proxy.faults = 1.0, (fault,)
    for request in (
        lambda: fs.info(path),
        lambda: fs.cat_file(path, start=0, end=500),
        lambda: fs.pipe_file(path, b"data"),
        lambda: fs.ls(f"{bucket}/folder"),
        lambda: fs.rm_file(path),
    ):
        with pytest.raises(Exception) as failed:
            request()
        assert is_transient(failed.value), repr(failed.value)


# ── other storages ───────────────────────────────────────────────────────────────────────────────


class Answering(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
    """A storage with a file of 1000 bytes that answers requests for parts of it with `answers`."""

    def __init__(self, *answers: bytes) -> None:
        super().__init__(skip_instance_cache=True)
        self.answers = list(answers)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return {"name": path, "size": 1000, "type": "file"}

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        return self.answers.pop(0)


def test_an_answer_cut_short_is_asked_for_again() -> None:
    fs = Answering(b"", b"x" * 99, b"x" * 100)
    assert open_file(fs, "a", range_bytes=100).read(10) == b"x" * 10
    assert not fs.answers


def test_a_server_without_ranges_is_said_at_once() -> None:
    with pytest.raises(io.UnsupportedOperation, match="no ranges"):
        open_file(Answering(b"x" * 1000), "a", range_bytes=100).read(10)


def test_a_local_file_is_read_from_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    info = filesystem(str(path))[0].info(str(path))
    expected = (3, mark_of(info))
    assert open_url(str(path), expected).read() == b"old"
    path.write_bytes(b"new")
    os.utime(path, (1, 1))
    with pytest.raises(ChangedError):
        open_url(str(path), expected)
