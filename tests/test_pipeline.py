"""The whole path on its real engines: a small world of known truth, and the real clips."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from email.message import Message
from pathlib import Path

import av
import numpy as np
import opentimelineio as otio
import pyarrow.parquet as pq
import pytest
from head import free_ports

import vsearch
from vsearch import runtime
from vsearch.build_index import build_index
from vsearch.config import PRESETS, TrainConfig, UserError
from vsearch.corpus import Corpus, newest_projector
from vsearch.evaluate import evaluate, read_queries
from vsearch.index import exact_search
from vsearch.ingest import ingest
from vsearch.sampling import split_videos
from vsearch.train import train
from vsearch.video import decode, probe

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(world, tmp_path_factory):
    """A corpus of the world with a projector and an index."""
    url = str(tmp_path_factory.mktemp("corpus"))
    ingest(url, [str(world)], PRESETS["demo"])
    train(url, TrainConfig(max_epochs=8))
    build_index(url)
    return url


def stored_frames(url: str) -> set[tuple[str, float]]:
    corpus = Corpus(url)
    counted = corpus.spans()
    found = []
    for name in corpus.files("frames"):
        for table in corpus.frames(name, ["video_id", "span_id", "pts_s"]):
            found += [
                (row["video_id"], row["pts_s"])
                for row in table.to_pylist()
                if counted[row["span_id"]][0] == name
            ]
    assert len(found) == len(set(found))
    return set(found)


def test_every_frame_of_every_video_is_stored_once_with_its_time(built, world):
    expected = set()
    for row in Corpus(built).videos():
        with open(row["uri"], "rb") as file:
            for span in decode(file, probe(file), 64):
                expected |= {(row["video_id"], float(t)) for t in span.pts_s}
    assert stored_frames(built) == expected


def test_frames_files_are_plain_parquet_with_unit_clip_vectors(built):
    corpus = Corpus(built)
    table = pq.read_table(corpus.local_path(corpus.files("frames")[0]))
    assert {"video_id", "span", "frame", "pts_s", "dino", "clip"} <= set(table.column_names)
    clip = np.stack(table["clip"].to_numpy(zero_copy_only=False)).astype(np.float32)
    assert clip.shape == (table.num_rows, corpus.config.clip.dim)
    np.testing.assert_allclose(np.linalg.norm(clip, axis=1), 1, atol=2e-3)


def test_a_repeated_build_does_nothing(built, world):
    before = sorted(Path(built).rglob("*"))
    summary = ingest(built, [str(world)], PRESETS["demo"])
    assert (summary.probed, summary.spans, summary.frames) == (0, 0, 0)
    assert not train(built, TrainConfig(max_epochs=8)).new
    assert not build_index(built).new
    assert sorted(Path(built).rglob("*")) == before


def test_only_what_is_missing_is_done_again(world, tmp_path):
    url = str(tmp_path)
    ingest(url, [str(world)], PRESETS["demo"])
    whole = stored_frames(url)
    corpus = Corpus(url)
    lost = corpus.files("frames")[0]
    spans_lost = sum(name == lost for name, _ in corpus.spans().values())
    Path(corpus.local_path(lost)).unlink()
    assert {state.status for state in corpus.states()} & {"pending"}
    summary = ingest(url, [str(world)], PRESETS["demo"])
    assert summary.spans == spans_lost
    assert stored_frames(url) == whole


def test_other_sampling_is_refused_and_changes_nothing(built, world):
    before = sorted(Path(built).rglob("*"))
    with pytest.raises(UserError, match="2 frames a second"):
        ingest(built, [str(world)], PRESETS["demo"], fps=2)
    assert sorted(Path(built).rglob("*")) == before


def test_a_lower_rate_keeps_the_first_frame_of_each_interval(world, tmp_path):
    ingest(str(tmp_path), [str(world)], PRESETS["demo"], fps=2)
    for row in Corpus(str(tmp_path)).videos():
        times = sorted(t for video, t in stored_frames(str(tmp_path)) if video == row["video_id"])
        with open(row["uri"], "rb") as file:
            every = [float(t) for span in decode(file, probe(file), 64) for t in span.pts_s]
        first = {}
        for t in every:
            first.setdefault(int(t * 2), t)
        assert times == sorted(first.values())


def test_answers_are_those_of_an_exact_scan(built):
    engine = vsearch.open(built)
    vector = engine.encoder.encode_text(["a red car"])[0]
    (shard,) = engine.index.shards
    scores, rows = exact_search(np.asarray(shard.vectors), vector[None], 1)
    entry = engine.manifest["shards"][0]["rows_file"]["name"]
    row = pq.read_table(f"{built}/index/{entry}").slice(rows[0, 0], 1).to_pylist()[0]
    segments = engine.search_vector(vector, limit=5)
    # A segment ranks by its mean, so that around the best row need not be the first.
    assert any((s.video_id, s.best_s) == (row["video_id"], row["best_s"]) for s in segments)
    assert all(s.score <= scores[0, 0] + 1e-5 for s in segments)


def test_shards_and_ivfpq_give_the_answers_of_one_flat_shard(built, world):
    flat = vsearch.open(built, build_index(built, rows="frames").snapshot)
    third = flat.rows // 3
    sharded = vsearch.open(built, build_index(built, rows="frames", shard_frames=third).snapshot)
    assert len(sharded.manifest["shards"]) >= 3
    quantised = vsearch.open(built, build_index(built, kind="ivfpq", rows="frames").snapshot)
    assert quantised.manifest["kind"] == "ivfpq"
    for query in read_queries(str(world / "truth.jsonl"))[:8]:
        expected = [(s.video, s.start_s, s.end_s) for s in flat.search(query.text, 3)]
        for engine in (sharded, quantised):
            assert [(s.video, s.start_s, s.end_s) for s in engine.search(query.text, 3)] == expected
    build_index(built, rows="moments")


def test_limit_counts_segments(built):
    engine = vsearch.open(built)
    results = engine.search("a video", limit=9)
    assert len(results) == 9
    assert [s.score for s in results] == sorted((s.score for s in results), reverse=True)
    taken: dict[str, list[tuple[float, float]]] = {}
    for s in results:
        assert s.start_s <= s.best_s < s.end_s
        assert all(s.end_s <= a or b <= s.start_s for a, b in taken.get(s.video, []))
        taken.setdefault(s.video, []).append((s.start_s, s.end_s))


def test_results_print_and_become_a_frame(built):
    results = vsearch.open(built).search("a beach", limit=2)
    assert "a beach" in str(results) and results[0].video in str(results)
    frame = results.to_pandas()
    assert list(frame["start_s"]) == [s.start_s for s in results]


def test_clip_space_finds_the_true_moments(built, world):
    """CLIP's own space is the most that a projector trained on twelve scenes could be held to."""
    engine = vsearch.open(built, build_index(built, space="clip").snapshot)
    queries = [q for q in read_queries(str(world / "truth.jsonl")) if q.group in ("seen", "unseen")]
    assert evaluate(engine.search, queries)["R1@0.5"] >= 0.8
    build_index(built, space="projected")


def test_two_workers_train_one_projector(built):
    config = TrainConfig(max_epochs=15, batch_size=64, seed=5)
    summary = train(built, config, workers=2)
    assert summary.new and summary.metrics["cosine"] > 0.2
    held_out = split_videos([row["video_id"] for row in Corpus(built).videos()], config.validation)
    counted = {v for v, _ in stored_frames(built)}
    assert held_out and held_out < counted
    total = sum(video not in held_out for video, _ in stored_frames(built))
    assert summary.metrics["train_pairs"] == total


def test_a_damaged_snapshot_is_named_and_refused(built, tmp_path):
    from vsearch.config import DamagedIndexError

    snapshot = build_index(built).snapshot
    (shard,) = vsearch.open(built, snapshot).manifest["shards"]
    path = Path(built) / "index" / shard["vectors_file"]["name"]
    good = path.read_bytes()
    try:
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(DamagedIndexError, match=path.name):
            vsearch.open(built)
    finally:
        path.write_bytes(good)


@pytest.mark.long
def test_real_clips_agree_with_the_manifest(shared_videos, tmp_path):
    ingest(str(tmp_path), [str(shared_videos)], PRESETS["demo"])
    states = {Path(state.uri).name: state for state in Corpus(str(tmp_path)).states()}
    with (shared_videos / "manifest.csv").open() as file:
        manifest = list(csv.DictReader(file))
    assert set(states) == {row["file"] for row in manifest}
    status = {"yes": "indexed", "with errors": "partial", "no": "failed"}
    for row in manifest:
        state = states[row["file"]]
        assert state.status == status[row["decodes"]], (row["file"], state)
        assert state.frames == int(row["frames"] or 0), row["file"]
        assert bool(state.reason) == (row["decodes"] != "yes"), row["file"]
    assert Counter(s.status for s in states.values()) == {"indexed": 42, "partial": 2, "failed": 8}


@pytest.mark.long
def test_a_training_that_was_cut_off_goes_on_at_its_last_checkpoint(built, tmp_path):
    url = str(tmp_path / "corpus")
    shutil.copytree(built, url, ignore=shutil.ignore_patterns("projector", "index"))
    config = TrainConfig(max_epochs=1500, patience=1500)
    program = (
        "from vsearch.config import TrainConfig; from vsearch.train import train; "
        f"train({url!r}, TrainConfig(max_epochs=1500, patience=1500))"
    )
    started = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 240
    while not list(Path(url).glob("projector/.runs/*/checkpoint*/state.json")):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.5)
    time.sleep(3)  # until Ray Train has noted it
    started.kill()
    started.wait()
    assert newest_projector(Corpus(url)) is None
    summary = train(url, config)
    assert summary.new and summary.metrics["epochs"] == 1500
    assert summary.metrics["resumed_at_epoch"] > 0


def run_cli(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vsearch.cli", *words],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip


@pytest.mark.long
def test_the_whole_path_on_object_storage_that_fails_now_and_then(
    built, world, tmp_path, s3_server
):
    """Videos and corpus in a bucket, on an S3 server over HTTP; one request in twenty is spoiled."""
    import s3fs
    from faulty_s3 import faulty_s3

    bucket = s3fs.S3FileSystem(key="key", secret="very-secret", endpoint_url=s3_server)
    bucket.mkdir("archive")
    videos = sorted(world.glob("*.mp4"))
    for video in videos:
        bucket.put_file(str(video), f"archive/videos/{video.name}")
    corpus = ("--corpus", "s3://archive/corpus")
    with faulty_s3(s3_server, share=0.05) as proxy:
        environment = {
            "AWS_ENDPOINT_URL": proxy.address,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "very-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "HOME": str(tmp_path),
        }
        build = ("build", "s3://archive/videos", *corpus, "--models", "demo")
        done = run_cli(*build, **environment)
        assert done.returncode == 0, done.stderr
        said = run_cli("status", *corpus, "--json", **environment)
        asked = ("search", "a tree", *corpus, "--min-confidence", "0", "--json")
        answer = json.loads(run_cli(*asked, **environment).stdout)
        assert sum(proxy.injected.values()) > 0
    status = json.loads(said.stdout)
    assert status["videos"]["indexed"] == len(videos)
    assert answer["segments"][0]["video"].startswith("s3://archive/videos/")
    found = []
    for name in bucket.glob("archive/corpus/frames/*.parquet"):
        with bucket.open(name) as file:
            table = pq.read_table(file, columns=["video_id", "pts_s"])
        found += zip(table["video_id"].to_pylist(), table["pts_s"].to_pylist(), strict=True)
    assert len(found) == len(set(found))
    assert set(found) == stored_frames(built)
    for name in bucket.find("archive/corpus"):
        assert b"very-secret" not in bucket.cat_file(name)
    assert "very-secret" not in done.stdout + done.stderr + said.stdout + said.stderr


def test_cli_json_contracts(built, world):
    asked = ("search", "a tree", "--corpus", built, "--json", "--min-confidence")
    answer = json.loads(run_cli(*asked, "0").stdout)
    told = {"query", "snapshot", "took_ms", "took", "background", "segments"}
    assert set(answer) == told | {"hidden", "hidden_more"}
    wanted = {"video", "start_s", "end_s", "best_s", "score", "recorded_at", "confidence"}
    assert answer["segments"] and wanted <= set(answer["segments"][0])
    least = answer["segments"][1]["confidence"]
    fewer = json.loads(run_cli(*asked, str(least)).stdout)
    sure = [s for s in answer["segments"] if s["confidence"] >= least]
    assert fewer["segments"] == sure
    assert fewer["hidden"] == len(answer["segments"]) - len(sure) > 0
    status = json.loads(run_cli("status", "--corpus", built, "--json").stdout)
    assert status["videos"]["total"] == status["videos"]["indexed"] == 4
    assert status["frames"] == len(stored_frames(built)) and status["failed"] == []
    figures = json.loads(
        run_cli(
            "evaluate", "--queries", str(world / "truth.jsonl"), "--corpus", built, "--json"
        ).stdout
    )
    assert {"queries", "R1@0.5", "R1@0.7", "R5@0.5", "mAP@0.5"} <= set(figures)


def test_where_nothing_matches_well_it_is_said_and_the_way_to_the_rest(built):
    asked = ("search", "a giraffe eating leaves", "--corpus", built, "--limit", "3")
    done = run_cli(*asked)
    assert done.returncode == 0
    said = " ".join(done.stderr.split())
    assert "Nothing in the archive matches well; 3 weak matches, and more, are hidden." in said
    assert "--min-confidence 0" in said and ".mp4" not in done.stdout
    everything = run_cli(*asked, "--min-confidence", "0", "--format", "csv")
    assert everything.stdout.count(".mp4") == 3 and "weak" not in everything.stderr


def test_what_was_found_is_handed_out_as_files_and_lists(built, tmp_path):
    asked = ("search", "a tree", "--corpus", built, "--limit", "3", "--min-confidence", "0")
    folder = tmp_path / "found" / "trees"
    done = run_cli(*asked, "--format", "csv", "--clips", str(folder))
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert len(rows) == 3
    names = [
        f"{row['place']:0>2}-{Path(row['video']).stem}-{float(row['start_s']):06.1f}s.mp4"
        for row in rows
    ]
    assert sorted(path.name for path in folder.iterdir()) == names
    for row, name in zip(rows, names, strict=True):
        [line] = [line for line in done.stderr.splitlines() if name in line]
        assert "video copied" in line and "no sound" in line
        with av.open(str(folder / name)) as clip:
            lasts_s = clip.duration / av.time_base
        early = re.search(r"([0-9.]+) s earlier", line)
        wanted_s = float(row["end_s"]) - float(row["start_s"]) + float(early[1] if early else 0)
        assert lasts_s == pytest.approx(wanted_s, abs=0.25)
    urls = [row["video"] for row in rows]
    text = run_cli(*asked, "--format", "otio").stdout
    timeline = otio.adapters.read_from_string(text, "otio_json")
    assert [clip.media_reference.target_url for clip in timeline.find_clips()] == urls
    edl = run_cli(*asked, "--format", "edl").stdout
    assert re.findall(r"^\* FROM CLIP: (.*)$", edl, re.MULTILINE) == urls


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("search", "x", "--corpus", "CORPUS", "--format", "xml"), "no format 'xml'"),
        (("search", "x", "--corpus", "/nowhere"), "no corpus at /nowhere"),
        (("ingest", "/nowhere", "--models", "demo"), "nothing at /nowhere"),
        (("ingest", ".", "--models", "huge"), "no model preset"),
        (("search", " ", "--corpus", "CORPUS"), "query is empty"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(words, said, built):
    done = run_cli(*(built if word == "CORPUS" else word for word in words))
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def lowered(headers: Message) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def get(address: str, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    try:
        request = urllib.request.Request(address, headers=headers or {})
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, lowered(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, lowered(error.headers), error.read()


@pytest.fixture(scope="module")
def service(built):
    from ray import serve

    from vsearch.serve import ServeArgs, start

    (port,) = free_ports(1)
    yield start(ServeArgs(corpus=built), port=port).rstrip("/")
    serve.shutdown()


def test_service_answers_as_the_engine_does(service, built):
    status, _, body = get(f"{service}/v1/search?q=a+green+house&limit=4")
    answer = json.loads(body)
    expected = vsearch.open(built).search("a green house", limit=4).to_dict()
    assert status == 200
    assert answer["segments"] == [
        segment
        | {"score": pytest.approx(segment["score"], abs=1e-5)}
        | {"confidence": pytest.approx(segment["confidence"], abs=1e-3)}
        for segment in expected["segments"]
    ]
    assert answer["snapshot"] == expected["snapshot"]


@pytest.mark.parametrize("query", ["", "?q=", "?q=x&limit=0", "?q=x&limit=many", "?q=%20"])
def test_service_refuses_bad_queries(service, query):
    status, _, body = get(f"{service}/v1/search{query}")
    assert status == 422 and b"Traceback" not in body


def test_service_streams_ranges_of_the_videos_of_the_corpus_only(service, world, built):
    segment = vsearch.open(built).search("a star", limit=1)[0]
    whole = Path(segment.video).read_bytes()
    address = f"{service}/v1/videos/{segment.video_id}/media"
    assert get(address)[2] == whole
    for header, part in (("10-99", whole[10:100]), ("100-", whole[100:]), ("-50", whole[-50:])):
        status, headers, body = get(address, {"Range": f"bytes={header}"})
        assert status == 206 and body == part
        assert headers["content-range"].endswith(f"/{len(whole)}")
    assert get(address, {"Range": f"bytes={len(whole)}-"})[0] == 416
    assert get(f"{service}/v1/videos/{'0' * 32}/media")[0] == 404
    assert get(f"{service}/v1/videos/..%2F..%2Fetc%2Fpasswd/media")[0] == 404


def test_service_gives_the_page_and_its_parts(service):
    status, headers, body = get(f"{service}/")
    assert status == 200 and b"<form" in body
    assert "default-src 'self'" in headers["content-security-policy"]
    assert all(get(f"{service}/{name}")[0] == 200 for name in ("app.js", "style.css", "icon.svg"))
    assert get(f"{service}/index.py")[0] == 404


def test_projector_folder_is_safetensors_and_json(built):
    from safetensors import safe_open

    corpus = Corpus(built)
    version, config = newest_projector(corpus)
    with safe_open(corpus.local_path(f"projector/{version}/model.safetensors"), "pt") as weights:
        assert weights.get_slice("net.0.weight").get_shape() == [2048, config["in_dim"]]
    assert {"cosine", "recall@1"} <= set(config["metrics"])


def test_runtime_brings_a_users_mistake_back_from_a_worker():
    import ray

    runtime.connect()

    @ray.remote
    def fails() -> None:
        raise UserError("so it is")

    with pytest.raises(UserError, match="so it is"), runtime.user_errors():
        ray.get(fails.remote())
