import json
import os
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import NOW, video_row

from vsearch.config import UserError
from vsearch.sources import Changes, Listed, compare, list_videos, name_clock


@dataclass
class Place:
    """A folder of files, which another program than the one under test puts there."""

    url: str
    fs: Any
    puts: int = 0

    def put(self, name: str, data: bytes = b"video") -> str:
        uri = f"{self.url}/{name}"
        path = self.fs._strip_protocol(uri)
        if not uri.startswith("s3:"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.fs.pipe_file(path, data)
        if not uri.startswith("s3:"):
            self.puts += 1  # two writes may be nearer than the clock of the disk can tell
            os.utime(path, (1_700_000_000 + self.puts,) * 2)
        return uri


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "disk":
        return Place(str(tmp_path / "place"), fsspec.filesystem("file"))
    request.getfixturevalue("s3")
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    bucket = f"b{os.urandom(6).hex()}"
    fs.mkdir(bucket)
    return Place(f"s3://{bucket}/place", fs)


def uris(listed: list[Listed]) -> list[str]:
    return [entry.uri for entry in listed]


# ── folders, globs, files ────────────────────────────────────────────────────────────────────────


def test_a_folder_gives_its_videos_at_any_depth(place: Place) -> None:
    for name in ("b.MP4", "a.mkv", "deep/er/c.webm", "notes.txt", "mp4", "d.mp4.part"):
        place.put(f"videos/{name}", name.encode())
    place.put("videos-2/z.mp4")
    for source in (f"{place.url}/videos", f"{place.url}/videos/"):
        listed = list_videos([source])
        assert uris(listed) == [
            f"{place.url}/videos/{name}" for name in ("a.mkv", "b.MP4", "deep/er/c.webm")
        ]
        assert [entry.size_bytes for entry in listed] == [5, 5, 14]
        assert all(entry.source == f"{place.url}/videos" for entry in listed)
        assert all(entry.mark and entry.modified_at.tzinfo for entry in listed)
        assert all(entry.tags == {} and entry.reason is None for entry in listed)


def test_a_glob_gives_the_files_that_it_matches(place: Place) -> None:
    for name in ("a1.mp4", "a2.mp4", "a10.mp4", "b1.mp4", "deep/a3.mp4", "a4.data"):
        place.put(name)
    matches = {
        "a?.mp4": ["a1.mp4", "a2.mp4"],
        "a[13-9].*": ["a1.mp4", "a4.data"],
        "*/a*.mp4": ["deep/a3.mp4"],
        "**/a*.mp4": ["a1.mp4", "a10.mp4", "a2.mp4", "deep/a3.mp4"],
    }
    for glob, names in matches.items():
        listed = list_videos([f"{place.url}/{glob}"])
        assert uris(listed) == [f"{place.url}/{name}" for name in names]
        assert {entry.source for entry in listed} == {f"{place.url}/{glob}"}


def test_a_file_is_taken_whatever_its_name(place: Place) -> None:
    uri = place.put("recording without suffix")
    [entry] = list_videos([uri])
    assert (entry.uri, entry.source, entry.size_bytes) == (uri, uri, 5)


def test_what_lies_at_several_sources_is_listed_once(place: Place) -> None:
    names = [place.put(f"{name}.mp4") for name in "abc"]
    listed = list_videos([f"{place.url}/b.mp4", place.url, f"{place.url}/*.mp4", place.url])
    assert uris(listed) == names


def test_a_mark_is_of_the_content_and_not_of_the_way_to_it(place: Place) -> None:
    uri = place.put("a.mp4", b"one")
    csv = place.put("list.csv", b"uri\na.mp4\n")
    ways = [uri, place.url, f"{place.url}/*.mp4", csv]
    before = {list_videos([way])[0].mark for way in ways}
    place.put("a.mp4", b"two")
    after = {list_videos([way])[0].mark for way in ways}
    assert len(before) == len(after) == 1 and before != after


def test_what_came_since_the_last_listing_is_seen(place: Place) -> None:
    place.put("a.mp4")
    ways = [place.url, f"{place.url}/*.mp4"]
    assert [len(list_videos([way])) for way in ways] == [1, 1]
    ways += [place.put("b.mp4"), place.put("list.csv", b"uri\nb.mp4\na.mp4\n")]
    found = [list_videos([way]) for way in ways]
    assert [len(listed) for listed in found] == [2, 2, 1, 2]
    assert not any(entry.reason for listed in found for entry in listed)


def test_names_may_hold_what_a_glob_is_made_of(place: Place) -> None:
    names = ["cam[1]/a*.mp4", "cam[1]/b?.mp4", "cam[1]/[c].mp4"]
    by_name = {name: place.put(name) for name in names}
    place.put("cam1/aa.mp4")
    assert uris(list_videos([f"{place.url}/cam[1]"])) == sorted(by_name.values())
    for uri in by_name.values():
        [entry] = list_videos([uri])
        assert (entry.uri, entry.source) == (uri, uri)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("texts", "No videos found at"),
        ("*.mov", "No videos found at"),
        ("nowhere", "There is nothing at"),
        ("nowhere/a.mp4", "There is nothing at"),
        ("nowhere.csv", "There is nothing at"),
    ],
)
def test_a_source_with_nothing_is_one_sentence(place: Place, source: str, message: str) -> None:
    place.put("a.mp4")
    place.put("texts/notes.txt")
    url = f"{place.url}/{source}"
    with pytest.raises(UserError, match=f"^{message} {re.escape(url)}\\.$"):
        list_videos([place.url, url])


def test_a_file_on_disk_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("videos/a.mp4", "lists/b.mp4"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"video")
    (tmp_path / "lists/list.csv").write_text("uri\n../videos/a.mp4\n./b.mp4\n")
    monkeypatch.chdir(tmp_path / "lists")
    sources = ["../videos", "../videos/*.mp4", f"{tmp_path}/lists/../videos/a.mp4", "list.csv"]
    listed = list_videos(sources)
    assert uris(listed) == [f"{tmp_path}/lists/b.mp4", f"{tmp_path}/videos/a.mp4"]
    known = [video_row(uri=f"{tmp_path}/videos/gone.mp4", source="")]
    assert compare([], known, ["../videos"]).gone == known


def test_behind_a_link_the_parent_folder_is_that_of_its_target(tmp_path: Path) -> None:
    for name in ("real/folder", "links"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "real/a.mp4").write_bytes(b"video")
    (tmp_path / "links/link").symlink_to(tmp_path / "real/folder")
    [entry] = list_videos([f"{tmp_path}/links/link/../a.mp4"])
    assert Path(entry.uri).read_bytes() == b"video"


# ── lists ────────────────────────────────────────────────────────────────────────────────────────

ROWS: list[dict[str, Any]] = [
    {"uri": "a.mp4", "camera": "007", "day": "2024-05-06", "note": 'Tür, "links"'},
    {"uri": "deep/b.mp4", "camera": "NA", "day": "", "note": "true"},
    {"uri": "missing.mp4", "camera": "1.10", "day": None, "note": "2024-05-06T07:08:09Z"},
]
TAGS = [
    {"camera": "007", "day": "2024-05-06", "note": 'Tür, "links"'},
    {"camera": "NA", "note": "true"},
    {"camera": "1.10", "note": "2024-05-06T07:08:09Z"},
]


def csv_of(rows: list[dict[str, Any]]) -> bytes:
    def field(value: Any) -> str:
        return '"{}"'.format(str(value).replace('"', '""')) if value else ""

    lines = [",".join(rows[0]), *(",".join(field(v) for v in row.values()) for row in rows)]
    return "\r\n".join(lines).encode("utf-8-sig")


def jsonl_of(rows: list[dict[str, Any]]) -> bytes:
    return "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


WRITERS = {"csv": csv_of, "jsonl": jsonl_of, "parquet": parquet_of}
lists = pytest.mark.parametrize("kind", list(WRITERS))


@lists
def test_a_list_gives_files_with_tags_as_they_are_written(place: Place, kind: str) -> None:
    place.put("lists/a.mp4")
    place.put("lists/deep/b.mp4")
    source = place.put(f"lists/list.{kind.upper()}", WRITERS[kind](ROWS))
    listed = list_videos([source])
    assert uris(listed) == [f"{place.url}/lists/{row['uri']}" for row in ROWS]
    assert [entry.tags for entry in listed] == TAGS
    assert {entry.source for entry in listed} == {source}
    assert [entry.reason for entry in listed] == [None, None, "there is no such file"]
    assert [entry.size_bytes for entry in listed] == [5, 5, 0]
    assert bool(listed[0].mark) and listed[2].mark == ""


@lists
def test_a_list_may_name_files_by_their_full_address(place: Place, kind: str) -> None:
    uri = place.put("videos/a.mp4")
    source = place.put(f"lists/list.{kind}", WRITERS[kind]([{"uri": uri}]))
    [entry] = list_videos([source])
    assert (entry.uri, entry.tags, entry.reason) == (uri, {}, None)


@lists
def test_of_a_file_listed_twice_the_last_tags_count(place: Place, kind: str) -> None:
    place.put("a.mp4")
    rows = [{"uri": "a.mp4", "n": tag} for tag in ("1", "2", "")]
    source = place.put(f"list.{kind}", WRITERS[kind](rows))
    for sources in ([source], [source, place.url], [place.url, source]):
        [entry] = list_videos(sources)
        assert entry.tags == {"n": "2"}


@lists
def test_a_list_without_a_column_uri_is_refused(place: Place, kind: str) -> None:
    source = place.put(f"list.{kind}", WRITERS[kind]([{"url": "a.mp4"}]))
    with pytest.raises(UserError, match=r"^The list .* has no column 'uri'\.$"):
        list_videos([source])


@lists
def test_a_list_that_names_nothing_is_refused(place: Place, kind: str) -> None:
    source = place.put(f"list.{kind}", WRITERS[kind]([{"uri": "", "n": "1"}]))
    with pytest.raises(UserError, match="No videos found at"):
        list_videos([source])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.csv", b"uri,n\na.mp4,1,2\n"),
        ("list.csv", b"uri\n\xff\xfe.mp4\n"),
        ("list.jsonl", b'{"uri": "a.mp4"}\n{"uri": '),
        ("list.jsonl", b'["a.mp4"]'),
        ("list.parquet", b"PAR1"),
    ],
    ids=["uneven", "no text", "cut", "no object", "no table"],
)
def test_a_damaged_list_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^The list {tmp_path}/{name} cannot be read: "):
        list_videos([f"{tmp_path}/{name}"])


def test_values_of_other_types_become_text(tmp_path: Path) -> None:
    row = {"uri": "a.mp4", "number": 7, "share": 0.5, "none": None}
    for kind in ("jsonl", "parquet"):
        (tmp_path / f"list.{kind}").write_bytes(WRITERS[kind]([row]))
        [entry] = list_videos([f"{tmp_path}/list.{kind}"])
        assert entry.tags == {"number": "7", "share": "0.5"}


# ── addresses ────────────────────────────────────────────────────────────────────────────────────

SECRETS = [
    "s3://user:geheim@bucket/videos",
    "https://geheim@host/a.mp4",
    "https://host/a.mp4?X-Amz-Signature=geheim&part=1",
    "https://host/a.mp4?part=1&sig=geheim",
    "simplecache::https://user:geheim@host/a.mp4",
]


@pytest.mark.parametrize("url", SECRETS)
def test_an_address_with_a_secret_is_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"uri\n{url}\n")
    for source in (url, f"{tmp_path}/list.csv"):
        with pytest.raises(UserError, match="carries a secret") as refused:
            list_videos([source])
        assert "geheim" not in str(refused.value)


@pytest.mark.parametrize("url", ["nope://bucket/videos", "s4://x/*.mp4", "nope://x/list.csv"])
def test_an_unknown_protocol_is_one_sentence(url: str) -> None:
    with pytest.raises(UserError, match=f"{re.escape(url)}.*cannot be used"):
        list_videos([url])


# ── comparing ────────────────────────────────────────────────────────────────────────────────────


def listed(name: str = "a", **values: Any) -> Listed:
    """A file as `video_row(name)` knows it."""
    return replace(Listed(f"/videos/{name}.mp4", 1000, "m1", NOW, "/videos"), **values)


def test_nothing_is_to_do_about_what_is_as_it_was() -> None:
    known = [video_row(name) for name in "abc"] + [video_row("bad", status="failed")]
    here = [listed(name) for name in ("a", "b", "bad")]
    assert compare(here, known) == Changes([], [], [], unchanged=3)


def test_new_and_changed_files_are_looked_into() -> None:
    here = [
        listed("new"),
        listed("bigger", size_bytes=1001),
        listed("newer", mark="m2"),
        listed("same"),
        listed("missing", size_bytes=0, mark="", reason="there is no such file"),
    ]
    known = [video_row(n) for n in ("bigger", "newer", "same", "missing", "elsewhere")]
    changes = compare(here, known)
    assert changes == Changes([here[0], here[1], here[2], here[4]], [], [], unchanged=1)


@pytest.mark.parametrize(
    ("status", "retry", "again"),
    [
        ("unreadable", False, True),
        ("unreadable", True, True),
        ("failed", False, False),
        ("failed", True, True),
        ("ok", True, False),
    ],
)
def test_what_could_not_be_read_is_tried_again(status: str, retry: bool, again: bool) -> None:
    here = [listed()]
    changes = compare(here, [video_row(status=status)], retry_failed=retry)
    assert changes == Changes(here if again else [], [], [], unchanged=0 if again else 1)


def test_other_tags_change_a_row_and_nothing_else() -> None:
    known = [video_row(name, tags={"camera": "1"}) for name in "abc"]
    here = [listed("a", tags={"camera": "2"}), listed("b", tags={"camera": "1"}), listed("c")]
    changes = compare(here, known)
    assert changes == Changes([], [known[0] | {"tags": {"camera": "2"}}], [], unchanged=2)


@pytest.mark.parametrize(
    ("source", "uri", "relabelled"),
    [
        ("mtime", "/v/cam_20200102.mp4", True),
        ("ingest", "/v/cam_20200102.mp4", True),
        ("name", "/v/cam_20200102.mp4", True),
        ("name", "/v/cam_20240506.mp4", False),
        ("mtime", "/v/cam_20240506.mp4", True),
        ("container", "/v/cam_20200102.mp4", False),
        ("mtime", "/v/cam.mp4", False),
    ],
)
def test_a_recording_time_in_the_name_goes_before_all_but_the_container(
    source: str, uri: str, relabelled: bool
) -> None:
    day = NOW.replace(hour=0, minute=0, second=0)
    row = video_row(uri=uri, recorded_at=day, recorded_at_source=source, tags={"n": "1"})
    changes = compare([listed(uri=uri)], [row], time_of=name_clock("%Y%m%d"))
    if not relabelled:
        assert changes == Changes([], [], [], unchanged=1)
        return
    at = name_clock("%Y%m%d")(uri)
    assert changes == Changes(
        [], [row | {"recorded_at": at, "recorded_at_source": "name"}], [], unchanged=0
    )


def test_tags_and_recording_time_change_together() -> None:
    row = video_row("20200102", recorded_at_source="mtime")
    entry = listed("20200102", tags={"n": "1"})
    [changed] = compare([entry], [row], time_of=name_clock("%Y%m%d")).relabel
    wanted = {"recorded_at": datetime(2020, 1, 2, tzinfo=UTC), "recorded_at_source": "name"}
    assert changed == row | wanted | {"tags": {"n": "1"}}


KNOWN = [
    "/a/b/1.mp4",
    "/a/b/deep/2.mp4",
    "/a/bc/3.mp4",
    "/a/b1.mp4",
    "/other/4.mp4",
    "s3://bucket/b/5.mp4",
    "s3://bucket/bc/6.mp4",
]


@pytest.mark.parametrize(
    ("sources", "gone"),
    [
        ([], []),
        (["/a/b"], [0, 1]),
        (["/a/b/"], [0, 1]),
        (["/a/b", "/other"], [0, 1, 4]),
        (["/a/b/*.mp4"], [0]),
        (["/a/b/**/*.mp4"], [0, 1]),
        (["/a/b?.mp4"], [3]),
        (["/a/b*/*.mp4"], [0, 2]),
        (["s3://bucket/b"], [5]),
        (["s3://bucket/b*/*"], [5, 6]),
        (["/lists/x.csv"], []),
    ],
)
def test_what_is_gone_lies_at_a_source_of_the_sync(sources: list[str], gone: list[int]) -> None:
    known = [video_row(uri=uri, source="") for uri in KNOWN]
    assert compare([], known, sources).gone == [known[number] for number in gone]
    here = [listed(uri=uri) for uri in KNOWN]
    assert compare(here, known, sources) == Changes([], [], [], unchanged=len(KNOWN))


def test_what_a_list_no_longer_names_is_gone() -> None:
    known = [
        video_row("a", source="/lists/x.csv"),
        video_row("b", source="/lists/x.csv"),
        video_row("c", source="/lists/y.csv"),
    ]
    changes = compare([listed("a", source="/lists/x.csv")], known, ["/lists/x.csv"])
    assert changes == Changes([], [], [known[1]], unchanged=1)


@pytest.mark.parametrize("source", ["/v/cam[1].mp4", "/v/cam[1]"])
def test_a_source_whose_name_looks_like_a_glob_covers_itself_alone(source: str) -> None:
    here = source if source.endswith(".mp4") else f"{source}/a.mp4"
    near = [video_row(uri=uri, source="/v") for uri in ("/v/cam1.mp4", "/v/cam1", "/v/cam1/a.mp4")]
    changes = compare([listed(uri=here)], [video_row(uri=here), *near], [source])
    assert changes == Changes([], [], [], unchanged=1)


# ── recording times in names ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("pattern", "name", "time"),
    [
        ("%Y%m%d_%H%M%S", "cam1_20240506_070809_x.mp4", NOW),
        ("%Y%m%d_%H%M%S", "20240506_070809", NOW),
        ("cam1_%Y%m%d_%H%M%S", "s3://b/2020/cam1_20240506_070809.mp4", NOW),
        ("cam1_%Y%m%d_%H%M%S", "cam2_20240506_070809.mp4", None),
        ("%Y%m%d_%H%M%S", "/20240506_070809/a.mp4", None),
        ("%Y-%m-%dT%H.%M.%S%z", "2024-05-06T09.08.09+0200.mp4", NOW),
        ("%Y-%m-%dT%H.%M.%S%z", "2024-05-06T07.08.09Z.mp4", NOW),
        ("%d %B %Y, %I-%M-%S %p", "6 06 May 2024, 07-08-09 AM", NOW),
        ("%y%j", "x24127.mp4", NOW.replace(hour=0, minute=0, second=0)),
        ("%Y%m%d", "99999999_20241340_20240506.mp4", NOW.replace(hour=0, minute=0, second=0)),
        ("%Y%m%d", "99999999.mp4", None),
        ("%Y%m%d", "2024.mp4", None),
        (
            "[cam.1] (%Y+%m+%d)?",
            "x[cam.1] (2024+05+06)?.mp4",
            NOW.replace(hour=0, minute=0, second=0),
        ),
        ("[cam.1] (%Y+%m+%d)?", "xcam31 2024+05+06.mp4", None),
        ("100%%_%Y", "100%_2024.mp4", datetime(2024, 1, 1, tzinfo=UTC)),
        (None, "20240506_070809.mp4", None),
    ],
)
def test_a_recording_time_is_read_from_a_name(
    pattern: str | None, name: str, time: datetime | None
) -> None:
    assert name_clock(pattern)(name) == time


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("", "holds no year"),
        ("%m%d", "holds no year"),
        ("cam", "holds no year"),
        ("100%%Y", "holds no year"),
        ("%Y%q", "unknown directive %q"),
        ("%Y%-m", "unknown directive %-"),
        ("%Y%", "unknown directive %"),
        ("%Y-%m-%d %Y", "has %Y twice"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused_with_an_example(
    pattern: str, complaint: str
) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(repr(pattern))}.*{complaint}.*cam1_%Y%m%d"):
        name_clock(pattern)


words = st.text(st.characters(codec="utf-8", exclude_categories=["Nd"], exclude_characters="/"))
zones = st.integers(-23 * 60, 23 * 60).map(lambda m: timezone(timedelta(minutes=m)))


@given(
    words,
    words,
    st.sampled_from(
        ["%Y%m%d%H%M%S", "%Y-%m-%d %H:%M:%S", "[%d.%m.%Y]*(%I%p+%M'%S)", "%Y_%j_%H%M%S"]
    ),
    st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1), timezones=zones),
)
def test_a_time_written_with_a_pattern_is_read_back(
    before: str, after: str, pattern: str, time: datetime
) -> None:
    time = time.replace(microsecond=0)
    utc = time.replace(tzinfo=UTC)
    assert name_clock(pattern)(f"/a/{before}{time.strftime(pattern)}{after}") == utc
    zoned = f"{pattern} %z"
    assert name_clock(zoned)(f"/a/{before}{time.strftime(zoned)}{after}") == time


def test_a_folder_that_cannot_be_read_is_not_taken_for_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.mp4").write_bytes(b"x")
    (tmp_path / "b").mkdir()
    scandir = os.scandir

    def guarded(path: Any = ".") -> Any:
        if str(path).rstrip("/").endswith("/b"):  # root may read any folder
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert [Path(v.uri).name for v in list_videos([str(tmp_path)])] == ["x.mp4"]
    with pytest.raises(UserError, match="Permission denied"):
        list_videos([str(tmp_path)], complete=True)
