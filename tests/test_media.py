import asyncio
from contextlib import closing
from pathlib import Path

import fsspec
import pytest
from botocore.exceptions import EndpointConnectionError
from clips import made
from fastapi import HTTPException

from vsearch import media
from vsearch.clips import cut
from vsearch.decoder import Decoders


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [
        (FileNotFoundError("a.mp4"), 404, "no longer where it was ingested from"),
        (PermissionError("Access Denied"), 503, "cannot be read now"),
        (TimeoutError("did not answer in time"), 503, "cannot be read now"),
        (EndpointConnectionError(endpoint_url="http://minio"), 503, "cannot be read now"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_storage_that_fails_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, status: int, said: str
) -> None:
    def fail(uri: str) -> None:
        raise failure

    monkeypatch.setattr(media, "open_url", fail)
    with pytest.raises(HTTPException, match=said) as answer:
        media.ranged("s3://bucket/a.mp4", None)
    assert answer.value.status_code == status
    assert "minio" not in answer.value.detail


def test_a_video_that_went_away_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(HTTPException) as answer:
        media.ranged(str(tmp_path / "a.mp4"), None)
    assert answer.value.status_code == 404


def served(uri: str, header: str | None) -> tuple[int, str | None, bytes]:
    answer = media.ranged(uri, header)

    async def whole() -> bytes:
        return b"".join([bytes(piece) async for piece in answer.body_iterator])

    return answer.status_code, answer.headers.get("content-range"), asyncio.run(whole())


def test_what_lies_in_a_bucket_is_shown_and_cut_as_what_lies_on_disk(
    s3: None, tmp_path: Path
) -> None:
    on_disk, in_bucket = str(tmp_path / "a.mp4"), "s3://media/tapes/a.mp4"
    Path(on_disk).write_bytes(made(frames=200))
    bucket = fsspec.filesystem("s3")
    bucket.mkdir("media")
    bucket.put_file(on_disk, in_bucket)
    for header in (None, "bytes=100-1999", "bytes=2000-", "bytes=-77"):
        assert served(in_bucket, header) == served(on_disk, header)
    with closing(Decoders(1)) as decoders:
        assert decoders.picture(in_bucket, 3.3, 64) == decoders.picture(on_disk, 3.3, 64)
        assert decoders.preview(in_bucket, 2, 4) == decoders.preview(on_disk, 2, 4)
    copies = [tmp_path / "of-disk.mp4", tmp_path / "of-bucket.mp4"]
    for uri, copy in zip((on_disk, in_bucket), copies, strict=True):
        cut(uri, 2, 4, copy)
    assert copies[0].read_bytes() == copies[1].read_bytes()
