from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import tenacity
from botocore import exceptions as boto
from faulty_s3 import FaultyS3, put

from vsearch import storage
from vsearch.config import UserError
from vsearch.storage import filesystem, open_url


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:geheim@bucket/a.mp4",
        "s3://AKIA:abc/geheim@bucket/a.mp4",
        "s3://AKIA:abc?geheim@bucket/a.mp4",
        "https://geheim@host/a.mp4",
        "https://user:geheim@host:8080/a.mp4",
        "sftp://user:geheim@host/a.mp4",
        "https://host/a.mp4?X-Amz-Signature=geheim&user=me@home",
        "https://host/a.mp4?sig=geheim",
        "https://host/a.mp4?Token=geheim",
        "simplecache::https://user:geheim@host/a.mp4",
        "zip://a.mp4::s3://key:geheim@bucket/a.zip",
    ],
)
def test_a_secret_in_an_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError, match="carries a secret") as refused:
        open_url(url)
    assert "geheim" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a@b.mp4",
        "s3://arn:aws:s3:us-east-1:123456789012:accesspoint/mine/a@b.mp4",
        "https://host:8080/a@b.mp4?part=1",
        "https://[::1]:8080/a@b.mp4",
    ],
)
def test_an_address_without_a_secret_is_accepted(url: str) -> None:
    filesystem(url)


@pytest.mark.parametrize(
    "url",
    ["nope://bucket/a.mp4", "http://[::1/a.mp4", "s3://b[ab]c/a.mp4", "http://me:geheim@[::1/a"],
)
def test_an_address_that_cannot_be_used_is_one_sentence(url: str) -> None:
    with pytest.raises(UserError, match="cannot be used") as refused:
        filesystem(url)
    assert "geheim" not in str(refused.value)


def test_colons_in_a_name_are_part_of_the_name(tmp_path: Path, bucket: str) -> None:
    (tmp_path / "cam::1.mp4").write_bytes(b"right")
    (tmp_path / "cam").write_bytes(b"wrong")
    put(bucket, "cam", b"wrong")
    for url in (
        f"{tmp_path}/cam::1.mp4",
        f"file://{tmp_path}/cam::1.mp4",
        put(bucket, "cam::1.mp4", b"right"),
        f"simplecache::{put(bucket, 'other.mp4', b'right')}",
    ):
        with open_url(url) as file:
            assert file.read() == b"right"


def test_profiles_of_a_configuration_file_count(
    proxy: FaultyS3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put(bucket, "a.mp4", b"data")
    (tmp_path / "config").write_text(
        f"[profile there]\nendpoint_url = {proxy.address}\nregion = us-east-1\nmax_attempts = 2\n"
        "aws_access_key_id = testing\naws_secret_access_key = testing\n"
    )
    for name in ("ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
        monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "there")
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    assert open_url(url).read() == b"data"
    proxy.forget()
    proxy.share, proxy.faults = 1.0, ("500",)
    with pytest.raises(OSError):
        open_url(url)
    assert proxy.requests.total() == 2


def test_settings_of_fsspec_count(
    proxy: FaultyS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put(bucket, "a.mp4", b"data")
    settings = {"endpoint_url": proxy.address, "key": "testing", "secret": "testing"}
    for name in ("ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    assert open_url(url).read() == b"data"


def test_a_profile_that_is_not_there_is_said_at_once(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nope")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    pauses: list[float] = []
    monkeypatch.setattr(tenacity.nap, "time", SimpleNamespace(sleep=pauses.append))
    with pytest.raises(boto.ProfileNotFound, match="nope"):
        open_url(f"s3://{bucket}/a.mp4")
    assert not pauses
