import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from faulty_s3 import FaultyS3, faulty_s3, send
from hypothesis import settings
from records import CONFIG

from vsearch.corpus import Corpus
from vsearch.demo.world import make_world

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
settings.register_profile("busy", deadline=None)  # other work on the machine must not fail a test
settings.load_profile("busy")
SHARED_VIDEOS = Path(__file__).parents[2] / "shared" / "videos"


@pytest.fixture(scope="session")
def shared_videos() -> Path:
    """The folder of real test videos, which lies beside the repository."""
    if not (SHARED_VIDEOS / "manifest.csv").is_file():
        reason = f"the real test videos are not at {SHARED_VIDEOS}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return SHARED_VIDEOS


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world of known truth: videos, `truth.jsonl`, `shots.jsonl`."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, seed=11, videos=4, scenes_per_video=3)
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server that speaks the real protocol over HTTP."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def s3(s3_server: str) -> Iterator[None]:
    """s3:// URLs lead to the server: the environment names it."""
    s3_class = fsspec.get_filesystem_class("s3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", s3_server)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3_class.clear_instance_cache()
        yield
        s3_class.clear_instance_cache()


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultyS3]:
    """A proxy without faults, at which s3:// URLs lead. The client below does not repeat requests of
    its own (but s3fs does), so that what is seen is ours, and fast.
    """
    with faulty_s3(s3_server) as proxy:
        for name, value in {
            "AWS_ENDPOINT_URL": proxy.address,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_CONFIG_FILE": str(tmp_path / "none"),
        }.items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield proxy
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def bucket(proxy: FaultyS3, request: pytest.FixtureRequest) -> str:
    """An empty bucket, named by the test: its faults are the same in each run."""
    name = f"b{zlib.crc32(request.node.nodeid.encode())}"
    send("PUT", name)
    proxy.forget()
    return name


@pytest.fixture
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """Gives the URL for a new corpus, on "disk" or on "s3", there in a bucket of its own."""

    def new_url(kind: str) -> str:
        if kind == "disk":
            return str(tmp_path / "corpus")
        request.getfixturevalue("s3")
        bucket = f"b{os.urandom(6).hex()}"
        fsspec.filesystem("s3").mkdir(bucket)
        return f"s3://{bucket}/archive/corpus"

    return new_url


@pytest.fixture(params=["disk", "s3"])
def corpus(request: pytest.FixtureRequest, new_url: Callable[[str], str]) -> Corpus:
    """An empty corpus with its configuration, on disk and on S3."""
    corpus = Corpus(new_url(request.param))
    corpus.require(CONFIG)
    return corpus
