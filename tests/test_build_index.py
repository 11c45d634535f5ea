"""From frames to snapshots: what an update does and leaves alone, on random vectors."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray
from archive import SHOT, add_rows, add_video, config, vectors_of, video_row

import vsearch
from vsearch import build_index as stage
from vsearch import parts
from vsearch.build_index import IndexSummary, build_index
from vsearch.config import UserError
from vsearch.corpus import Corpus
from vsearch.filters import Filter
from vsearch.recall import RecallError
from vsearch.snapshots import Snapshots
from vsearch.verify import verify

NAMES = [f"v{n}" for n in range(10)]


@pytest.fixture
def corpus(request: pytest.FixtureRequest, new_url: Callable[[str], str]) -> Iterator[Corpus]:
    """Ten videos of 400 frames, on S3 where a test says so."""
    kind = getattr(request, "param", "disk")
    corpus = Corpus(new_url(kind))
    if kind == "s3":
        ray.shutdown()  # workers have the environment in which Ray was started
    for name in NAMES:
        add_video(corpus, name)
    yield corpus
    if kind == "s3":
        ray.shutdown()


on_disk_and_s3 = pytest.mark.parametrize(
    "corpus", ["disk", pytest.param("s3", marks=pytest.mark.long)], indirect=True
)


def build(corpus: Corpus, **options: Any) -> IndexSummary:
    return build_index(corpus.url, **{"space": "clip", "rows": "frames", **options})


def shards_of(corpus: Corpus) -> list[dict[str, Any]]:
    manifest = Snapshots(corpus).current_manifest()
    assert manifest
    found: list[dict[str, Any]] = manifest["shards"]
    return found


def answers(corpus: Corpus, count: int = 5) -> list[list[tuple[str, float, float, float]]]:
    """What the current snapshot says to some frames of the videos."""
    engine = vsearch.open(corpus.url)
    found = []
    for name in NAMES:
        for segment in [vectors_of(f"{name}1", 400)[57].astype(np.float32)]:
            hits = engine.search_vector(segment, count)
            found.append([(s.video, s.start_s, s.end_s, s.score) for s in hits])
    return found


def found_in(corpus: Corpus, name: str, frame: int = 57, attempts: int = 1) -> str:
    """The video that answers a frame of another."""
    query = vectors_of(f"{name}{attempts}", 400)[frame].astype(np.float32)
    return vsearch.open(corpus.url).search_vector(query, 1)[0].video


def test_a_repeated_build_does_nothing_and_a_snapshot_is_whole(corpus: Corpus) -> None:
    first = build(corpus)
    assert (first.new, first.kind, first.rows, first.frames) == (True, "flat", 4000, 4000)
    before = sorted(Path(corpus.url).rglob("*"))
    again = build(corpus)
    assert not again.new and again.snapshot == first.snapshot
    assert sorted(Path(corpus.url).rglob("*")) == before
    assert not verify(corpus.url).damaged and not verify(corpus.url).orphans


def test_a_segment_ends_at_a_cut_that_dino_sees(corpus: Corpus) -> None:
    direction = np.random.default_rng(1).standard_normal(config().clip.dim)
    direction /= np.linalg.norm(direction)
    dino = np.repeat(np.eye(8, dtype=np.float16)[:2], [150, 250], axis=0)
    add_video(corpus, "whole", towards=direction)
    add_video(corpus, "cut", towards=direction, dino=dino)
    for rows in ("frames", "moments"):
        build(corpus, rows=rows)
        found = vsearch.open(corpus.url).search_vector(direction.astype(np.float32), 20)
        mine = {
            name: [s for s in found if s.video == f"/videos/{name}.mp4"]
            for name in ("whole", "cut")
        }
        assert [(s.start_s, s.end_s) for s in mine["whole"]] == [(0.0, 40.0)]
        assert sorted((s.start_s, s.end_s) for s in mine["cut"]) == [(0.0, 15.0), (15.0, 40.0)]
    assert not verify(corpus.url).damaged


def made_up_of(corpus: Corpus) -> tuple[float, float]:
    """Mean and deviation of what made-up sentences keep of their best score, from all vectors."""
    bank = parts.SENTENCES.read_text().split("\n")
    bank = [text.strip() for text in bank if text.strip()]
    third = len(bank) // 3
    texts = [f"{text}, {bank[(n + third) % len(bank)]}" for n, text in enumerate(bank)]
    encoder = vsearch.open(corpus.url).encoder
    asked, known = (encoder.encode_text(t).astype(np.float64) for t in (texts, bank))
    shared = known.mean(0) / np.linalg.norm(known.mean(0))
    rows = [np.asarray(s.vectors, np.float64) for s in vsearch.open(corpus.url).index.shards]
    best = (asked @ np.concatenate(rows).T).max(1)
    kept = best * np.sqrt(1 - np.maximum(asked @ shared, 0) ** 2)
    return float(kept.mean()), float(kept.std())


def test_an_index_knows_what_made_up_sentences_score_and_an_update_asks_new_shards_only(
    corpus: Corpus,
) -> None:
    build(corpus, shard_frames=800, kind="ivfpq", min_recall=0.1)
    parts = shards_of(corpus)
    for expected_new in (False, True):
        if expected_new:
            add_video(corpus, "more")
            build(corpus, shard_frames=800, kind="ivfpq", min_recall=0.1)
        manifest = Snapshots(corpus).current_manifest()
        assert manifest
        told = manifest["calibration"]
        assert (told["mean"], told["deviation"]) == pytest.approx(made_up_of(corpus), abs=1e-4)
        assert not verify(corpus.url).damaged and not verify(corpus.url).orphans
    assert all(shard in shards_of(corpus) for shard in parts)
    Snapshots(corpus).collect(keep=1, grace_s=0)
    assert vsearch.open(corpus.url).search("a boat")[0].confidence is not None
    assert not build(corpus, shard_frames=800, kind="ivfpq", min_recall=0.1).new


def test_a_moment_stands_for_the_frames_of_a_shot(corpus: Corpus) -> None:
    summary = build(corpus, rows="moments")
    assert summary.frames == 4000 and summary.rows == 4000 / SHOT
    query = vectors_of("v31", 400)[57].astype(np.float32)
    best = vsearch.open(corpus.url).search_vector(query, 1)[0]
    assert best.video == "/videos/v3.mp4" and 5.0 <= best.best_s < 6.0
    assert best.start_s % 1 == best.end_s % 1 == 0  # a shot lasts a second


def extents_of(corpus: Corpus, video: str) -> tuple[list[float], list[float]]:
    """When the rows of a video begin and end."""
    (shard,) = shards_of(corpus)
    rows = pq.read_table(Snapshots(corpus).path(shard["rows_file"]))
    mine = rows.filter(pc.equal(rows["video_id"].cast(pa.string()), video))
    return mine["start_s"].to_pylist(), mine["end_s"].to_pylist()


def test_a_picture_lasts_until_the_next_unless_a_span_between_them_lacks(corpus: Corpus) -> None:
    """A slide that stands from second 9 to second 49.9, over a span that holds no frame of its own."""
    times_s = np.append(np.arange(100), 499 + np.arange(10)) / 10
    starts_s, ends_s = [*range(10), 49.9], [*range(1, 10), 49.9, pytest.approx(50.9)]
    add_video(corpus, "slides", len(times_s), times_s=times_s)
    build(corpus, rows="moments")
    assert extents_of(corpus, "slides") == (starts_s, ends_s)
    query = vectors_of("slides1", len(times_s))[95].astype(np.float32)
    best = vsearch.open(corpus.url).search_vector(query, 1)[0]
    assert (best.video_id, best.start_s, best.end_s) == ("slides", 9.0, 49.9)
    # The same, but nobody knows what the span between them holds.
    add_video(corpus, "half", len(times_s), times_s=times_s, lacking=[1])
    build(corpus, rows="moments")
    known_s = [*range(1, 10), 20.0, pytest.approx(50.9)]
    assert extents_of(corpus, "half") == (starts_s, known_s)
    # Then it comes, without a frame: that alone makes the rows anew.
    add_video(corpus, "half", len(times_s), times_s=times_s)
    build(corpus, rows="moments")
    assert extents_of(corpus, "half") == (starts_s, ends_s)


def test_new_videos_leave_the_shards_and_the_quantizer_as_they_are(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "FLAT_ROWS", 1000)
    build(corpus)
    manifest = Snapshots(corpus).current_manifest()
    assert manifest and manifest["kind"] == "ivfpq" and manifest["tuning"]["setting"]
    add_video(corpus, "new")
    summary = build(corpus)
    after = Snapshots(corpus).current_manifest()
    assert after and (summary.shards, summary.shards_new, summary.warnings) == (2, 1, [])
    assert after["shards"][0] == manifest["shards"][0]
    assert after["quantizer"] == manifest["quantizer"]
    assert after["shards"][1]["codes_file"] is None  # few rows are searched exactly
    assert found_in(corpus, "new") == "/videos/new.mp4"
    assert found_in(corpus, "v4") == "/videos/v4.mp4"
    # The small shard takes in what comes next, rather than have another one beside it.
    add_video(corpus, "newer")
    assert build(corpus).shards == 2
    assert found_in(corpus, "new") == "/videos/new.mp4"
    assert found_in(corpus, "newer") == "/videos/newer.mp4"
    # As much as the flat limit is coded with the same quantizer.
    for name in ("big1", "big2"):
        add_video(corpus, name)
    assert build(corpus).kind == "ivfpq"
    assert all(shard["codes_file"] for shard in shards_of(corpus))
    assert not verify(corpus.url).damaged


def test_a_removed_video_is_gone_at_once_and_its_shard_stays(corpus: Corpus) -> None:
    build(corpus)
    shard = shards_of(corpus)[0]
    add_rows(corpus, video_row("v4", status="gone"))
    summary = build(corpus)
    assert shards_of(corpus) == [shard] and summary.frames == 3600
    assert all(video != "/videos/v4.mp4" for hits in answers(corpus, 30) for video, *_ in hits)
    assert vsearch.open(corpus.url).rows == 3600
    assert not verify(corpus.url).damaged


def test_a_shard_with_many_dead_rows_is_made_anew(corpus: Corpus) -> None:
    build(corpus)
    for name in ("v1", "v2", "v3"):
        add_rows(corpus, video_row(name, status="gone"))
    summary = build(corpus)
    (shard,) = shards_of(corpus)
    assert summary.shards_new == 1 and shard["frames"] == shard["rows"] == 2800


def test_rows_made_in_another_way_are_made_anew(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(corpus)
    old = shards_of(corpus)
    monkeypatch.setattr(stage.parts, "Recipe", partial(parts.Recipe, method=0))
    summary = build(corpus)
    assert summary.new and summary.shards_new == 1
    assert shards_of(corpus)[0]["key"] != old[0]["key"]
    assert not build(corpus).new


def test_replaced_content_answers_in_place_of_the_old(corpus: Corpus) -> None:
    build(corpus)
    add_video(corpus, "v4", attempts=2)  # its frames were made again, and are others
    build(corpus)
    assert found_in(corpus, "v4", attempts=2) == "/videos/v4.mp4"
    best = vsearch.open(corpus.url).search_vector(vectors_of("v41", 400)[57].astype(np.float32), 1)[
        0
    ]
    assert best.score < 0.9


def test_a_rename_makes_no_rows(corpus: Corpus) -> None:
    build(corpus)
    shard = shards_of(corpus)[0]
    add_rows(corpus, video_row("v4", status="gone"), video_row("moved", content="v4"))
    summary = build(corpus)
    assert summary.new and summary.shards_new == 0 and shards_of(corpus) == [shard]
    assert found_in(corpus, "v4") == "/videos/moved.mp4"


@pytest.mark.long
def test_many_shards_answer_as_one(corpus: Corpus) -> None:
    build(corpus, kind="ivfpq", min_recall=0.5)
    one = answers(corpus)
    summary = build(corpus, kind="ivfpq", min_recall=0.5, shard_frames=500)
    assert summary.shards == 10
    manifest = Snapshots(corpus).current_manifest()
    assert manifest and len({shard["key"] for shard in manifest["shards"]}) == 10
    for ours, theirs in zip(answers(corpus), one, strict=True):
        assert ours[0] == theirs[0]


@pytest.mark.long
def test_what_is_unlike_the_old_is_warned_of_and_retrained(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "FLAT_ROWS", 1000)
    away = np.random.default_rng(5).standard_normal(config().clip.dim)
    build(corpus, min_recall=0.5)
    old = Snapshots(corpus).current_manifest()
    for name in ("far1", "far2", "far3", "far4"):
        add_video(corpus, name, towards=away / np.linalg.norm(away))
    summary = build(corpus, min_recall=0.5)
    assert any("--retrain" in warning and "unlike" in warning for warning in summary.warnings)
    again = build(corpus, min_recall=0.5, retrain=True)
    new = Snapshots(corpus).current_manifest()
    assert old and new and again.new and not again.warnings
    assert new["quantizer"]["key"] != old["quantizer"]["key"]
    assert new["shards"][0]["vectors_file"] == old["shards"][0]["vectors_file"]  # none made again
    assert all(shard["codes_file"] for shard in new["shards"])


def test_below_the_recall_asked_for_nothing_is_published(corpus: Corpus, tmp_path: Path) -> None:
    published = build(corpus).snapshot
    sentences = tmp_path / "ours.txt"
    sentences.write_text("a red car\n\nsomebody at the door\n")
    monkey = {"kind": "ivfpq", "queries": str(sentences), "min_recall": 1.0}
    try:
        summary = build(corpus, **monkey)
    except RecallError as error:
        assert error.exit_code == 3 and "--retrain" in str(error)
        assert Snapshots(corpus).current == published
    else:  # so few rows can be found in full; then the contract was kept
        manifest = Snapshots(corpus).manifest(summary.snapshot)
        assert manifest["tuning"]["text_queries"] == 2
        setting = manifest["tuning"]["setting"]
        (point,) = [
            p
            for p in manifest["tuning"]["curve"]
            if (p["nprobe"], p["per_hit"]) == (setting["nprobe"], setting["per_hit"])
        ]
        assert point["recall_200_text"] == 1.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "magic"}, "--kind 'magic'"),
        ({"rows": "seconds"}, "--rows 'seconds'"),
        ({"space": "projected"}, "vsearch train"),
        ({"space": "fused"}, "vsearch train"),
        ({"alpha": 0.3}, "--alpha is for --space fused"),
        ({"space": "fused", "alpha": 1.5}, "--alpha must lie between 0 and 1"),
        ({"min_recall": 1.5}, "--min-recall"),
        ({"queries": "/nowhere.txt"}, "/nowhere.txt"),
    ],
)
def test_a_mistake_is_one_sentence(corpus: Corpus, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(corpus, **options)


def test_the_command_ends_with_3_where_recall_is_lacking(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vsearch import cli, recall

    def lacking(points: object, min_recall: float) -> None:
        raise RecallError(f"No setting reaches {min_recall}.")

    monkeypatch.setattr(recall, "cheapest", lacking)
    words = ["index", "--corpus", corpus.url, "--space", "clip", "--rows", "frames"]
    monkeypatch.setattr("sys.argv", ["vsearch", *words, "--kind", "ivfpq"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 3 and "No setting reaches 0.97" in capsys.readouterr().err
    assert Snapshots(corpus).current is None


@on_disk_and_s3
def test_of_two_builders_at_once_one_wins(corpus: Corpus) -> None:
    build(corpus)
    add_video(corpus, "new")
    won: list[str] = []

    def meanwhile(name: str, done: int, total: int) -> None:
        if not won:
            won.append("")
            won[0] = build(corpus, rows="moments").snapshot

    with pytest.raises(UserError, match="Another build published"):
        build(corpus, report=meanwhile)
    assert Snapshots(corpus).current == won[0]
    assert len(Snapshots(corpus).versions()) == 2
    assert not verify(corpus.url).damaged
    assert found_in(corpus, "new") == "/videos/new.mp4"


def test_after_a_rollback_the_answers_are_the_old_ones(corpus: Corpus) -> None:
    first = build(corpus)
    expected = answers(corpus)
    old = vsearch.open(corpus.url)
    add_rows(corpus, *(video_row(name, status="gone") for name in NAMES[:5]))
    add_video(corpus, "new")
    build(corpus)
    assert answers(corpus) != expected
    assert Snapshots(corpus).roll_back() == first.snapshot
    assert answers(corpus) == expected
    Snapshots(corpus).roll_back(Snapshots(corpus).versions()[-1])
    build(corpus, rows="moments")
    Snapshots(corpus).collect(keep=1, grace_s=0)
    # A reader that has the old snapshot open goes on; it cannot be opened any more.
    query = vectors_of("v41", 400)[57].astype(np.float32)
    assert old.search_vector(query, 1)[0].video == "/videos/v4.mp4"
    with pytest.raises(UserError, match="no snapshot"):
        vsearch.open(corpus.url, first.snapshot)
    assert len(Snapshots(corpus).versions()) == 1
    found = verify(corpus.url)
    assert not found.damaged and not found.orphans


def test_a_damaged_index_is_made_anew_when_asked(corpus: Corpus) -> None:
    build(corpus)
    expected = answers(corpus)
    vectors = Path(corpus.url) / "index" / shards_of(corpus)[0]["vectors_file"]["name"]
    vectors.write_bytes(b"damaged")
    assert not build(corpus).new
    with pytest.raises(UserError, match=vectors.name):
        vsearch.open(corpus.url)
    assert build(corpus, rebuild=True).new
    assert answers(corpus) == expected
    # A manifest that cannot be read is replaced by the next build as it is.
    manifest = Path(corpus.url) / "index" / Snapshots(corpus).require_current() / "manifest.json"
    manifest.write_text('{"format_version": 1}')
    with pytest.raises(UserError, match="has format 1"):
        vsearch.open(corpus.url)
    assert build(corpus, rebuild=True).new
    assert answers(corpus) == expected


KILLED = """
import json, os, sys
from vsearch.build_index import build_index

def kill_self(stage, done, total):
    if stage == sys.argv[2] and done >= int(sys.argv[3]):
        os.kill(os.getpid(), 9)

options = json.loads(sys.argv[4])
build_index(sys.argv[1], space="clip", rows="frames", report=kill_self, **options)
"""


CODED: dict[str, Any] = {"kind": "ivfpq", "min_recall": 0.5, "shard_frames": 1000}


def made_of(corpus: Corpus) -> list[dict[str, str]]:
    """The SHA-256 of the files of each shard that do not depend on how fast the machine was."""
    names = ("vectors_file", "rows_file", "codes_file", "cells_file")
    return [{name: shard[name]["sha256"] for name in names} for shard in shards_of(corpus)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What a build gives that nobody kills."""
    corpus = Corpus(str(tmp_path_factory.mktemp("undisturbed") / "corpus"))
    for name in NAMES:
        add_video(corpus, name)
    build(corpus, **CODED)
    return made_of(corpus)


@pytest.mark.long
@on_disk_and_s3
@pytest.mark.parametrize(("at", "done"), [("rows", 2), ("codes", 1)])
def test_a_killed_build_leaves_the_snapshot_and_goes_on_where_it_was(
    corpus: Corpus, undisturbed: list[dict[str, str]], at: str, done: int
) -> None:
    published, expected = build(corpus).snapshot, answers(corpus)
    before = set(corpus.files("index/parts", ".json"))
    words = [sys.executable, "-c", KILLED, corpus.url, at, str(done), json.dumps(CODED)]
    ended = subprocess.run(words, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert Snapshots(corpus).current == published and answers(corpus) == expected
    finished = {name: corpus.modified_at(name) for name in corpus.files("index/parts", ".json")}
    assert len(finished.keys() - before) >= done
    summary = build(corpus, **CODED)
    assert summary.new and summary.shards == 5
    parts = corpus.files("index/parts", "")
    assert finished.keys() < {name for name in parts if name.endswith(".json")}
    assert {name: corpus.modified_at(name) for name in finished} == finished
    for name in finished:  # nothing was made a second time
        key = name.removesuffix(".json")
        suffixes = [Path(part).suffix for part in parts if part.startswith(f"{key}-")]
        assert suffixes and len(suffixes) == len(set(suffixes))
    assert made_of(corpus) == undisturbed
    assert not verify(corpus.url).damaged


def test_filters_leave_what_satisfies_them_and_nothing_else(tmp_path: Path) -> None:
    corpus = Corpus(str(tmp_path / "corpus"))
    day = datetime(2026, 5, 1, tzinfo=UTC)
    for n, name in enumerate(NAMES):
        tags = {"site": "north" if n % 2 else "south"}
        recorded_at = day + timedelta(minutes=n)
        add_video(corpus, name, uri=f"/videos/cam{n // 5}/{name}.mp4", tags=tags,
                  recorded_at=recorded_at)  # fmt: skip
    build(corpus)
    engine = vsearch.open(corpus.url)
    query = vectors_of("v31", 400)[57].astype(np.float32)
    everything = engine.search_vector(query, 10_000)
    for where in (
        Filter(videos=["v3", "/videos/cam1/v7.mp4"]),
        Filter(paths="*/cam1/*"),
        Filter(tags={"site": "south"}),
        Filter(from_s=5, to_s=12.25),
        Filter(after=day + timedelta(minutes=3, seconds=10), before=day + timedelta(minutes=6)),
        Filter(
            paths="*/cam0/*", tags={"site": "north"}, from_s=20, after=day + timedelta(minutes=2)
        ),
        Filter(tags={"site": "nowhere"}),
    ):
        found = engine.search_vector(query, 10_000, where=where)
        covered: dict[str, float] = {}
        for s in found:
            assert where.from_s is None or s.start_s >= where.from_s
            assert where.to_s is None or s.end_s <= where.to_s
            at = datetime.fromisoformat(s.recorded_at)
            assert where.after is None or at >= where.after
            length = timedelta(seconds=s.end_s - s.start_s)
            assert where.before is None or at + length <= where.before
            covered[s.video_id] = covered.get(s.video_id, 0.0) + s.end_s - s.start_s
        # All of it is there: each video that is admitted, for as long as its window is open.
        expected = {
            video["video_id"]: max(0.0, min(40.0, last) - max(0.0, first))
            for video, first, last in zip(engine.videos, *where.windows(engine.videos), strict=True)
            if first == first
        }
        assert covered == pytest.approx({v: s for v, s in expected.items() if s > 0})
    assert {s.video_id for s in everything} == set(NAMES)
