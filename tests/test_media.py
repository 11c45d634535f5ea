from pathlib import Path

import pytest
from botocore.exceptions import EndpointConnectionError
from fastapi import HTTPException

from vsearch import media


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
