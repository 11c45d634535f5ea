"""Snapshots on disk and on S3: publishing, going back, taking away, and files that are damaged."""

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from archive import add_video, config, vectors_of

import vsearch
from vsearch.build_index import build_index
from vsearch.config import DamagedIndexError, UserError
from vsearch.corpus import Corpus
from vsearch.schema import SNAPSHOT_VIDEOS
from vsearch.snapshots import Snapshots, files_of
from vsearch.verify import verify


@pytest.fixture(params=["disk", "s3"])
def snapshots(request: pytest.FixtureRequest, new_url: Callable[[str], str]) -> Snapshots:
    """Those of an empty corpus."""
    corpus = Corpus(new_url(request.param))
    corpus.require(config())
    return Snapshots(corpus)


def manifest_of(parent: str | None, mark: str = "") -> dict[str, Any]:
    """The least that a manifest says."""
    empty = {"quantizer": None, "queries": None, "tuning": None, "shards": []}
    return {"format_version": 2, "parent": parent, "mark": mark, **empty}


def publish(snapshots: Snapshots, parent: str | None, mark: str = "") -> str:
    table = pa.Table.from_pylist([], schema=SNAPSHOT_VIDEOS)
    return snapshots.publish(manifest_of(parent, mark), table)


def test_what_is_published_is_in_use_and_listed(snapshots: Snapshots) -> None:
    assert snapshots.current is None and snapshots.indexed() is None
    with pytest.raises(UserError, match="no index yet"):
        snapshots.require_current()
    first = publish(snapshots, None)
    second = publish(snapshots, first)
    assert snapshots.current == second and snapshots.versions() == sorted([first, second])
    assert snapshots.manifest(first)["parent"] is None
    assert snapshots.manifest(second)["parent"] == first
    with pytest.raises(UserError, match="no snapshot elsewhere"):
        snapshots.manifest("elsewhere")


@pytest.mark.parametrize("first", [True, False])
def test_of_many_publishers_at_once_one_wins(snapshots: Snapshots, first: bool) -> None:
    parent = None if first else publish(snapshots, None)
    together = threading.Barrier(6)

    def run(number: int) -> str:
        own = Snapshots(Corpus(snapshots.corpus.url))
        together.wait()
        try:
            return publish(own, parent, str(number))
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(6) as pool:
        ended = list(pool.map(run, range(6)))
    won = [text for text in ended if "Another build" not in text]
    assert len(won) == 1 and snapshots.current == won[0]
    assert sorted(snapshots.versions()) == sorted({*won, *([parent] if parent else [])})


def test_a_rollback_goes_to_the_parent_or_where_it_is_told(snapshots: Snapshots) -> None:
    first = publish(snapshots, None)
    with pytest.raises(UserError, match="is the first"):
        snapshots.roll_back()
    second = publish(snapshots, first)
    third = publish(snapshots, second)
    assert snapshots.roll_back() == second == snapshots.current
    assert snapshots.roll_back(third) == third == snapshots.current
    with pytest.raises(UserError, match="no snapshot"):
        snapshots.roll_back("nowhere")
    snapshots.corpus.remove(f"index/{snapshots.manifest(first)['videos']['name']}")
    with pytest.raises(UserError, match="no longer whole"):
        snapshots.roll_back(first)
    assert snapshots.current == third


def test_what_no_kept_snapshot_needs_goes_after_the_grace_period(snapshots: Snapshots) -> None:
    versions = [publish(snapshots, None)]
    for _ in range(2):
        versions.append(publish(snapshots, versions[-1]))
    snapshots.corpus.write("index/parts/0123-left.f16", b"by a build that was cut off")
    assert snapshots.collect(keep=1) == []
    would = snapshots.collect(keep=2, grace_s=0, dry_run=True)
    assert len(snapshots.versions()) == 3
    assert snapshots.collect(keep=2, grace_s=0) == would
    gone = versions[0]
    assert set(snapshots.versions()) == set(versions) - {gone}
    assert f"index/{gone}/manifest.json" in would and "index/parts/0123-left.f16" in would
    assert len(would) == 3  # and its table of videos
    for version in snapshots.versions():
        assert snapshots.videos(snapshots.manifest(version)).num_rows == 0
    with pytest.raises(UserError, match="At least one"):
        snapshots.collect(keep=0)


def test_a_part_is_made_once(snapshots: Snapshots) -> None:
    assert snapshots.part("abc") is None
    first = snapshots.finish("abc", {"rows": 1})
    assert snapshots.finish("abc", {"rows": 2}) == first == snapshots.part("abc")
    snapshots.corpus.write("index/parts/abc.json", b"{")
    with pytest.raises(DamagedIndexError, match=r"abc\.json"):
        snapshots.part("abc")


# ── damage ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with an index that has every kind of file: a coded shard and a quantizer."""
    corpus = Corpus(str(tmp_path_factory.mktemp("whole") / "corpus"))
    for name in ("a", "b", "c"):
        add_video(corpus, name)
    build_index(corpus.url, "ivfpq", "clip", "frames", min_recall=0.3)
    return Path(corpus.url)


def kinds_of(folder: Path) -> dict[str, str]:
    """The files that a reader of the current snapshot needs, by kind."""
    snapshots = Snapshots(Corpus(str(folder)))
    manifest = snapshots.current_manifest()
    assert manifest
    (shard,) = manifest["shards"]
    return {
        "pointer": "index/CURRENT",
        "manifest": f"index/{manifest['version']}/manifest.json",
        "videos": f"index/{manifest['videos']['name']}",
        "vectors": f"index/{shard['vectors_file']['name']}",
        "rows": f"index/{shard['rows_file']['name']}",
        "codes": f"index/{shard['codes_file']['name']}",
    }


def flipped(data: bytes) -> bytes:
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


HARM: dict[str, Callable[[bytes], bytes | None]] = {
    "flipped": flipped,
    "cut": lambda data: data[: len(data) * 2 // 3],
    "empty": lambda data: b"",
    "foreign": lambda data: b"PAR1" + os.urandom(len(data)),
    "gone": lambda data: None,
}


@pytest.fixture(params=["disk", "s3"])
def copy(
    request: pytest.FixtureRequest,
    new_url: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    whole: Path,
) -> Corpus:
    """A copy of it, and a cache of this machine that is empty."""
    url = new_url(request.param)
    fs, path = fsspec.url_to_fs(url)
    fs.put(f"{whole}/", path, recursive=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return Corpus(url)


def ask(corpus: Corpus) -> str:
    query = vectors_of("b1", 400)[57].astype(np.float32)
    return vsearch.open(corpus.url).search_vector(query, 1)[0].video


@pytest.mark.parametrize("kind", ["pointer", "manifest", "videos", "vectors", "rows", "codes"])
def test_a_damaged_file_is_named_and_refused(copy: Corpus, whole: Path, kind: str) -> None:
    assert ask(copy) == "/videos/b.mp4"
    assert not verify(copy.url).damaged
    name = kinds_of(whole)[kind]
    good = copy.read(name)
    for how, harm in HARM.items():
        bad = harm(good)
        if bad is None:
            copy.remove(name)
        else:
            copy.write(name, bad)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        if how == "gone" and kind == "pointer":
            continue  # then there is no index yet
        with pytest.raises(UserError) as refused:
            Corpus(copy.url)
            _cleared_cache()
            ask(copy)
        # A pointer names no snapshot, a manifest that is gone leaves none of its version.
        said = name if (kind, how) != ("manifest", "gone") else name.split("/")[1]
        if kind != "pointer":
            assert said in str(refused.value), how
        found = verify(copy.url).damaged
        assert found, how
        assert {name, "index/CURRENT"} & {n for n, _ in found}, how
    copy.write(name, good)
    assert ask(copy) == "/videos/b.mp4"


def _cleared_cache() -> None:
    """Files from object storage are kept on this disk; here they are to be fetched again."""
    folder = Path.home() / ".cache" / "vsearch"
    for path in folder.glob("*"):
        path.unlink()


def test_two_files_swapped_are_refused(copy: Corpus, whole: Path) -> None:
    names = kinds_of(whole)
    rows, videos = copy.read(names["rows"]), copy.read(names["videos"])
    copy.write(names["rows"], videos)
    copy.write(names["videos"], rows)
    with pytest.raises(DamagedIndexError):
        ask(copy)


def test_a_damaged_copy_on_this_disk_is_fetched_again(copy: Corpus) -> None:
    ask(copy)
    for path in (Path.home() / ".cache" / "vsearch").glob("*"):
        path.write_bytes(b"damaged")
    if copy.local_path("") is None:
        with pytest.raises(DamagedIndexError):
            ask(copy)
    for _ in range(9):  # one file after the other
        try:
            assert ask(copy) == "/videos/b.mp4"
            break
        except DamagedIndexError:
            continue
    else:
        pytest.fail("the copies stay damaged")


def test_verify_finds_what_no_reader_of_the_index_looks_at(copy: Corpus) -> None:
    frames = copy.files("frames")[0]
    good = copy.read(frames)
    copy.write(frames, flipped(good))
    assert [name for name, _ in verify(copy.url).damaged] == [frames]
    copy.write(frames, good)
    copy.write("index/parts/ffff-0.f16", b"left over")
    found = verify(copy.url)
    assert not found.damaged and found.orphans == ["index/parts/ffff-0.f16"]
    copy.write("videos/other.parquet", b"something else")
    assert [name for name, _ in verify(copy.url).damaged] == ["videos/other.parquet"]


def test_verify_compares_rows_with_the_frames_that_they_stand_for(
    tmp_path: Path, whole: Path
) -> None:
    """A snapshot whose checksums are all right, but whose rows were made from other frames."""
    corpus = Corpus(str(tmp_path / "corpus"))
    for name in ("a", "b", "c"):
        add_video(corpus, name)
    fsspec.filesystem("file").put(f"{whole}/index/", f"{tmp_path}/corpus/index", recursive=True)
    assert not verify(corpus.url).damaged
    (frames,) = [n for n in corpus.files("frames") if corpus.records(n)[0].video_id == "a"]
    table = pa.concat_tables(corpus.frames(frames))
    records = corpus.records(frames)
    place = table.schema.get_field_index("clip")
    mixed = table.set_column(
        place, table.schema.field(place), table["clip"].take(np.arange(400)[::-1])
    )
    corpus.remove(frames)
    corpus.add_frames(mixed, records)
    ((name, reason),) = verify(corpus.url).damaged
    assert "rows of video a" in reason and name.endswith(".parquet")


def test_every_file_of_a_snapshot_is_named_with_its_checksum(whole: Path) -> None:
    manifest = Snapshots(Corpus(str(whole))).current_manifest()
    assert manifest
    entries = files_of(manifest)
    assert (
        len(entries) == 9
    )  # videos, quantizer, queries, made_up; vectors, rows, codes, cells, probe
    assert all(len(entry["sha256"]) == 64 and entry["size_bytes"] > 0 for entry in entries)
    assert "pickle" not in json.dumps(manifest)
