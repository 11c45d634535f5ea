"""Tables in buckets: what is done bucket by bucket gives what is done with all at once."""

import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import CONFIG, NOW, add_spans, add_videos, span, video_row

import vsearch.buckets
import vsearch.corpus
from vsearch.buckets import Buckets, together
from vsearch.config import Sampling, UserError
from vsearch.corpus import Corpus
from vsearch.coverage import Overview, video_state
from vsearch.probing import PLACES, PROBED, classify, portions
from vsearch.schema import VIDEOS, DecodeError
from vsearch.sources import Changes, Listed, compare, differences, listing, name_clock
from vsearch.tasks import missing_tasks
from vsearch.verify import verify

ROWS = pa.schema([("key", pa.string()), ("value", pa.int64())])
SMALL = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True, params=[5, 100_000], ids=["on disk", "in memory"])
def held_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it with tables of a few rows, as if they were larger than memory."""
    monkeypatch.setattr(vsearch.buckets, "HELD_ROWS", request.param)
    monkeypatch.setattr(vsearch.buckets, "BUCKETS", 7)


def in_buckets(key: str, schema: pa.Schema, *rows: dict[str, Any]) -> Buckets:
    found = Buckets(key, schema)
    for row in rows:
        found.add(pa.Table.from_pylist([row], schema=schema))
    return found


# ── buckets ──────────────────────────────────────────────────────────────────────────────────────

pieces = st.lists(st.lists(st.tuples(st.text(max_size=3), st.integers(0, 9)), max_size=7))


@SMALL
@given(pieces, pieces)
def test_rows_come_back_once_in_order_with_their_like(
    left: list[list[tuple[str, int]]], right: list[list[tuple[str, int]]]
) -> None:
    tables = []
    for side in (left, right):
        tables.append(Buckets("key", ROWS))
        for piece in side:
            rows = [{"key": key, "value": value} for key, value in piece]
            tables[-1].add(pa.Table.from_pylist(rows, schema=ROWS))
    seen: set[str] = set()
    found: list[dict[str, list[int]]] = [{}, {}]
    for both in together(*tables):
        keys = {key for table in both for key in table["key"].to_pylist()}
        assert not keys & seen
        seen |= keys
        for side, table in zip(found, both, strict=True):
            for row in table.to_pylist():
                side.setdefault(row["key"], []).append(row["value"])
    for side, rows in zip(found, (left, right), strict=True):
        wanted: dict[str, list[int]] = {}
        for key, value in (pair for piece in rows for pair in piece):
            wanted.setdefault(key, []).append(value)
        assert side == wanted
    assert [t.rows for t in tables] == [sum(map(len, side)) for side in (left, right)]


def test_what_lay_on_disk_is_gone_with_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    table = in_buckets("key", ROWS, *({"key": str(n), "value": n} for n in range(20)))
    assert bool(list(tmp_path.iterdir())) == table.spilled
    del table
    assert not list(tmp_path.iterdir())


# ── sources ──────────────────────────────────────────────────────────────────────────────────────

names = st.sampled_from("abcdefgh")
entries = st.builds(
    lambda name, size, mark, tags, source: Listed(
        f"/{source}/{name}_20200102.mp4", size, mark, NOW, f"/{source}", tags
    ),
    names,
    st.integers(1, 2),
    st.sampled_from(["m1", "m2"]),
    st.sampled_from([{}, {"camera": "1"}, {"camera": "2"}]),
    st.sampled_from("xy"),
)
known_rows = st.builds(
    lambda name, folder, **values: video_row(name, uri=f"/{folder}/{name}_20200102.mp4", **values),
    names,
    st.sampled_from("xyz"),
    size_bytes=st.integers(1, 2),
    etag=st.sampled_from(["m1", "m2", None]),
    status=st.sampled_from(["ok", "failed", "unreadable", "gone"]),
    tags=st.sampled_from([{}, {"camera": "1"}]),
    recorded_at_source=st.sampled_from(["container", "name", "mtime"]),
)


@SMALL
@given(
    st.lists(entries, max_size=12),
    st.lists(known_rows, max_size=12, unique_by=lambda row: row["uri"]),
    st.sets(st.sampled_from(["/x", "/y", "/[x]/*.mp4"])),
    st.booleans(),
    st.sampled_from([None, "%Y%m%d"]),
)
def test_differences_are_those_of_a_comparison_at_once(
    listed: list[Listed],
    known: list[dict[str, Any]],
    sync: set[str],
    retry: bool,
    pattern: str | None,
) -> None:
    """Each URI's entries come one after another; the last of them that has tags counts, else the first."""
    once: dict[str, Listed] = {}
    for entry in listed:
        if entry.uri not in once or entry.tags:
            once[entry.uri] = entry
    here = [row for row in known if row["status"] != "gone"]
    wanted = compare(list(once.values()), here, sync, retry, name_clock(pattern))
    rows = [vars(entry) | {"tags": list(entry.tags.items())} for entry in listed]
    table = in_buckets("uri", vsearch.sources.LISTED, *rows)
    found = list(differences(table, in_buckets("uri", VIDEOS, *known), sync, retry, pattern))
    [(changes, to_probe)] = list(portions(found))
    assert changes.unchanged == wanted.unchanged
    assert sorted(changes.probe, key=lambda e: e.uri) == sorted(wanted.probe, key=lambda e: e.uri)
    for part in ("relabel", "gone"):
        uris = [sorted(row["uri"] for row in getattr(c, part)) for c in (changes, wanted)]
        assert uris[0] == uris[1]
    assert {r["uri"] for r in to_probe} == {e.uri for e in wanted.probe} & {r["uri"] for r in here}


def test_a_large_portion_is_given_out_before_all_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vsearch.probing.PORTION_FILES", 3)
    files = [Listed(f"/v/{n}.mp4", 1, "m", NOW, "/v") for n in range(7)]
    each = ((Changes([file], [], [], 1), []) for file in files)
    sizes = [(len(c.probe), c.unchanged) for c, _ in portions(each)]
    assert sizes == [(3, 3), (3, 3), (1, 1)]


def test_moves_and_copies_are_told_across_buckets() -> None:
    known = [video_row(n, uri=f"/v/{n}.mp4") for n in ("stays", "moves", "goes", "changes")]
    known += [video_row("was", uri="/v/was.mp4", status="gone"), video_row("", uri="/v/bad.mp4")]
    looks = [
        ("/v/moved.mp4", "moves", "ok", None),
        ("/v/copied.mp4", "stays", "ok", None),
        ("/v/again.mp4", "was", "ok", None),
        ("/v/changes.mp4", "other", "ok", "changes"),
        ("/v/touched.mp4", "same", "ok", "same"),
        ("/v/twin1.mp4", "twin", "ok", None),
        ("/v/twin2.mp4", "twin", "ok", None),
        ("/v/bad.mp4", "", "failed", ""),
    ]
    probed = [
        dict(zip(("uri", "video_id", "status", "before"), look, strict=True)) for look in looks
    ]
    gone = [{"uri": f"/v/{name}.mp4", "video_id": name} for name in ("moves", "goes")]
    found = classify(
        in_buckets("uri", VIDEOS, *known),
        in_buckets("video_id", PROBED, *probed),
        in_buckets("video_id", PLACES, *gone),
    )
    assert {uri.removeprefix("/v/").removesuffix(".mp4"): kind for uri, kind in found} == {
        "moved": "moved",
        "copied": "copy",
        "again": "new",
        "changes": "changed",
        "touched": "unchanged",
        "twin1": "new",
        "twin2": "copy",
        "bad": "failed",
        "goes": "gone",
    }


# ── the corpus ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def corpus(tmp_path: Path) -> Iterator[Corpus]:
    """Thirty videos: whole, half embedded, without spans, with two attempts at one, copied, gone."""
    made = Corpus(str(tmp_path / "corpus"))
    made.require(CONFIG)
    for n in range(30):
        name = f"v{n:02d}"
        add_videos(made, video_row(name, ingested_at=NOW.replace(hour=1), etag="old"))
        add_videos(made, video_row(name, status="gone" if n % 7 == 3 else "ok"))
        if n % 5 == 0:
            add_videos(made, video_row(name, uri=f"/copies/{name}.mp4"))
        if n % 3 < 2:
            add_spans(made, span(0, name), *([span(1, name, ended=True)] if n % 3 else []))
        if n % 4 == 0:
            add_spans(made, span(0, name, attempts=2, frames=4))
    yield made


def uris_and_status(corpus: Corpus) -> list[tuple[str, str, int, list[str]]]:
    return [(s.uri, s.status, s.frames, s.copies) for s in Corpus(corpus.url).states()]


def expected_states() -> list[tuple[str, str, int, list[str]]]:
    found = []
    for n in range(30):
        uri, copy = f"/videos/v{n:02d}.mp4", f"/copies/v{n:02d}.mp4"
        places = [uri] * (n % 7 != 3) + [copy] * (n % 5 == 0)
        spans = {0: 5, 1: 5} if n % 3 == 1 else {0: 5} if n % 3 == 0 else {}
        spans |= {0: 4} if n % 4 == 0 else {}
        if places:
            status = "indexed" if 1 in spans else "pending"
            found.append((max(places), status, sum(spans.values()), sorted(places)[:-1]))
    return sorted(found)


def test_states_are_those_of_each_video_alone(corpus: Corpus) -> None:
    assert uris_and_status(corpus) == expected_states()


span_values = st.fixed_dictionaries(
    {},
    optional={
        "ended": st.just(True),
        "errors": st.just([DecodeError(1.0, "damaged")]),
        "gaps": st.just([(1.0, 2.0)]),
        "quarantined": st.just(True),
        "attempts": st.just(2),
        "frames": st.sampled_from([0, 3]),
        "last_pts_s": st.sampled_from([None, 1.0, 99.0]),
    },
)
row_values = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(["failed", "unreadable", "gone"]),
        "duration_s": st.sampled_from([None, 0.0, 4.0, 300.0]),
        "start_s": st.sampled_from([1.5, -2.0]),
        "fps": st.sampled_from([None, 0.0, 10.0]),
        "expected_spans": st.integers(1, 4),
        "quarantined": st.just(True),
    },
)
contents = st.lists(
    st.tuples(
        st.one_of(st.just({}), row_values),
        st.one_of(
            st.just({0: {}, 1: {"ended": True}}),
            st.dictionaries(st.integers(0, 3), span_values, max_size=3),
        ),
        st.booleans(),
    ),
    max_size=8,
)


@SMALL
@given(contents, st.booleans(), st.sampled_from([None, 2]), st.sampled_from([None, 0, 2]))
def test_states_and_their_overview_are_those_of_each_video_alone(
    tmp_path: Path,
    videos: list[tuple[dict[str, Any], dict[int, dict[str, Any]], bool]],
    only_flawed: bool,
    fps: float | None,
    most: int | None,
) -> None:
    corpus = Corpus(str(tmp_path / uuid.uuid4().hex))
    corpus.require(replace(CONFIG, sampling=Sampling(fps=fps)))
    wanted = []
    for number, (values, spans, copied) in enumerate(videos):
        rows = [video_row(str(number), **values)]
        if copied:
            rows.append(video_row(str(number), uri=f"/copies/{number}.mp4"))
        add_videos(corpus, *rows)
        records = [span(n, str(number), **given) for n, given in spans.items()]
        for record in records:
            add_spans(corpus, record)
        if any(row["status"] != "gone" for row in rows):
            wanted.append(video_state(rows, records, fps))
    wanted.sort(key=lambda state: state.uri)
    assert corpus.states() == wanted
    index = {"videos": frozenset("024"), "frames": 1}
    told, alone = (
        corpus.overview(index, only_flawed, most),
        Overview(wanted, index, only_flawed, most),
    )
    assert told.videos == alone.videos and told.sums == pytest.approx(alone.sums)
    assert (told.not_in_index, told.listable) == (alone.not_in_index, alone.listable)
    assert told.shown() == alone.shown()


def test_tasks_are_for_what_is_missing_of_what_is_listed(corpus: Corpus) -> None:
    listed = [
        vars(Listed(f"/videos/v{n:02d}.mp4", 1000, "m1", NOW, "/videos")) | {"tags": []}
        for n in range(20)
    ]
    tasks = missing_tasks(corpus, in_buckets("uri", vsearch.sources.LISTED, *listed), False, 1)
    found = {
        task["video_id"]: (task["first"], task["stop"], task["spans"])
        for (table,) in together(tasks)
        for task in table.to_pylist()
    }
    wanted = {}
    for n in range(20):
        if n % 7 != 3 and n % 3 != 1:
            first = 1 if n % 3 == 0 or n % 4 == 0 else 0
            wanted[f"v{n:02d}"] = (first, None, 2 - first)
    assert found == wanted


# ── the ledger ───────────────────────────────────────────────────────────────────────────────────


def opened(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The frames files whose footers are read from here on."""
    names: list[str] = []
    read = Corpus.records
    monkeypatch.setattr(Corpus, "records", lambda self, n: names.append(n) or read(self, n))
    return names


def test_what_the_ledger_knows_is_not_opened_again(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = corpus.spans()
    corpus.enter()
    names = opened(corpus, monkeypatch)
    other = Corpus(corpus.url)
    assert other.spans() == before and names == []
    new = add_spans(other, span(1, "v00", ended=True))
    assert other.spans().keys() - before.keys() == {"v00-1"} and names == [new]
    assert not verify(corpus.url).damaged


def test_a_frames_file_that_is_another_now_is_opened(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.enter()
    name, record = corpus.spans()["v01-1"]
    path = Path(corpus.path(name))
    table = pq.read_table(path)
    path.unlink()
    whole = [replace(span(n, "v01", ended=n == 1), decode_s=3.0) for n in range(2)]
    assert corpus.add_frames(table, whole) == name and record.decode_s == 0
    names = opened(corpus, monkeypatch)
    assert Corpus(corpus.url).spans()["v01-1"][1].decode_s == 3.0 and names == [name]


def test_a_frames_file_that_is_gone_no_longer_counts(corpus: Corpus) -> None:
    corpus.enter()
    name, _ = corpus.spans()["v01-1"]
    corpus.remove(name)
    assert not {"v01-0", "v01-1"} & Corpus(corpus.url).spans().keys()


def test_without_the_ledger_nothing_is_lost(corpus: Corpus) -> None:
    before = uris_and_status(corpus)
    corpus.enter()
    corpus.settle()
    corpus.enter()
    assert uris_and_status(corpus) == before
    corpus.remove_folder("spans")
    assert uris_and_status(corpus) == before


def test_a_damaged_ledger_is_named(corpus: Corpus) -> None:
    corpus.enter()
    [name] = corpus.files("spans")
    data = corpus.read(name)
    rows = pq.read_table(Path(corpus.path(name)))
    wrong = rows.set_column(6, rows.schema.field(6), pa.array([9] * rows.num_rows, pa.int32()))
    corpus.write_table(name, wrong)
    assert [found for found, _ in verify(corpus.url).damaged] == [name]
    corpus.write(name, data[:-30])
    with pytest.raises(UserError, match=name):
        Corpus(corpus.url).states()


def test_many_small_tables_become_one(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsearch.corpus, "MOST_SMALL", 3)
    before = uris_and_status(corpus)
    for n in range(4):
        corpus.enter()
        add_spans(corpus, span(2, f"v{n:02d}"))
    corpus.enter()
    after = uris_and_status(corpus)
    spans = corpus.spans()
    assert before != after and len(corpus.files("spans")) == 5 and len(corpus.files("videos")) > 60
    corpus.tidy()
    assert len(corpus.files("spans")) == len(corpus.files("videos")) == 1
    assert uris_and_status(corpus) == after and Corpus(corpus.url).spans() == spans
    assert not verify(corpus.url).damaged


def test_a_reader_meets_tables_that_become_one(corpus: Corpus) -> None:
    """Tables vanish between being listed and being read: their rows are in the new one."""
    before = uris_and_status(corpus)
    reader = Corpus(corpus.url)
    files = reader.files

    def list_then_tidy(folder: str, suffix: str = ".parquet") -> list[str]:
        names = files(folder, suffix)
        if len(names) > 64:
            corpus.tidy()
        return names

    reader.files = list_then_tidy  # type: ignore[method-assign]
    assert [(s.uri, s.status, s.frames, s.copies) for s in reader.states()] == before
    assert len(corpus.files("videos")) == 1


def test_a_listing_is_in_pieces_and_once(tmp_path: Path) -> None:
    for n in range(30):
        path = tmp_path / "cam" / str(n % 4) / f"{n}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(n + 1))
    found = listing([f"{tmp_path}/cam", f"{tmp_path}/cam/1/*.mp4"])
    assert found.rows == 30 + 8
    sizes = {row["uri"]: row["size_bytes"] for (t,) in together(found) for row in t.to_pylist()}
    assert sizes == {f"{tmp_path}/cam/{n % 4}/{n}.mp4": n + 1 for n in range(30)}
