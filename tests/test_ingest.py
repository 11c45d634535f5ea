"""Ingestion that survives: sync, kills, poison, two at once. The oracle is an undisturbed run."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import av
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from vsearch.build_index import build_index
from vsearch.config import PRESETS, TrainConfig, UserError
from vsearch.corpus import Corpus
from vsearch.ingest import IngestSummary, ingest
from vsearch.snapshots import Snapshots
from vsearch.train import train

Row = tuple[str, int, int, float]


def make_video(
    path: Path, seed: int, seconds: float = 2, fps: int = 10, still: bool = False
) -> None:
    """A small H.264 video of drifting blobs, other ones for each seed."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 255, (12, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=fps, options={"preset": "ultrafast", "g": "20"}
        )
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(int(seconds * fps)):
            picture = base if still else np.roll(base, 2 * number, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


def stored_rows(url: str) -> list[Row]:
    """What a plain reader of the frames files sees."""
    rows: list[Row] = []
    for path in sorted(Path(url).glob("frames/*.parquet")):
        table = pq.read_table(path, columns=["video_id", "span", "frame", "pts_s"])
        rows += zip(*(column.to_pylist() for column in table.columns), strict=True)
    return rows


def assert_same_rows(found: list[Row], wanted: list[Row]) -> None:
    twice = [row for row, count in Counter(found).items() if count > 1]
    assert not twice, f"{len(twice)} rows are stored twice, such as {twice[0]}"
    assert set(found) == set(wanted)


def ingest_demo(url: str, folder: Path, **options: object) -> IngestSummary:
    return ingest(url, [str(folder)], PRESETS["demo"], **options)  # type: ignore[arg-type]


def statuses(url: str) -> dict[str, str]:
    return {Path(state.uri).name: state.status for state in Corpus(url).states()}


# ── sync ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_a_sync_makes_the_corpus_what_the_folder_is(tmp_path: Path) -> None:
    folder, url = tmp_path / "videos", str(tmp_path / "corpus")
    for number in range(100):
        make_video(folder / f"{number}.mp4", number, seconds=0.3)
    first = ingest_demo(url, folder)
    assert (first.found, first.frames) == ({"new": 100}, 300)
    ids = {Path(state.uri).name: state.video_id for state in Corpus(url).states()}
    recorded = {state.video_id: state.recorded_at for state in Corpus(url).states()}

    # A rename of all, of folder and names, decodes nothing.
    folder = folder.rename(tmp_path / "moved")
    for path in sorted(folder.iterdir()):
        path.rename(folder / f"camera-{path.name}")
    with pytest.raises(UserError, match="nothing at"):
        ingest(url, [str(tmp_path / "videos")], PRESETS["demo"], sync=True)
    both = [str(folder), str(tmp_path / "videos" / "*.mp4")]
    (tmp_path / "videos").mkdir()
    make_video(tmp_path / "videos" / "stays.mp4", 500, seconds=0.3)
    before = stored_rows(url)
    moved = ingest(url, both, PRESETS["demo"], sync=True)
    assert moved.found == {"moved": 100, "new": 1}
    assert (moved.spans, moved.frames) == (1, 3)
    assert set(before) <= set(stored_rows(url))
    states = {Path(state.uri).name: state for state in Corpus(url).states()}
    assert len(states) == 101
    assert all(states[f"camera-{name}"].video_id == video_id for name, video_id in ids.items())
    assert all(recorded.get(s.video_id, s.recorded_at) == s.recorded_at for s in states.values())

    # New, changed, copied, gone and broken files in one go; first only asked what would happen.
    make_video(folder / "new.mp4", 1000, seconds=0.3)
    make_video(folder / "camera-0.mp4", 1001, seconds=0.5)
    shutil.copy(folder / "camera-1.mp4", folder / "copy.mp4")
    (folder / "camera-2.mp4").unlink()
    (folder / "broken.mp4").write_bytes(b"no video")
    wanted = {"new": 1, "changed": 1, "copy": 1, "gone": 1, "failed": 1, "unchanged": 98}
    files = sorted(Path(url).rglob("*"))
    assert ingest_demo(url, folder, sync=True, dry_run=True).found == wanted
    assert sorted(Path(url).rglob("*")) == files
    summary = ingest_demo(url, folder, sync=True)
    assert (summary.found, summary.frames) == (wanted, 3 + 5)
    states = {Path(state.uri).name: state for state in Corpus(url).states()}
    assert "camera-2.mp4" not in states and states["broken.mp4"].status == "failed"
    assert states["camera-0.mp4"].frames == 5 and states["new.mp4"].frames == 3
    twin = states.get("copy.mp4") or states["camera-1.mp4"]
    assert {Path(uri).name for uri in (twin.uri, *twin.copies)} == {"copy.mp4", "camera-1.mp4"}
    assert len(states) == 101 + 1 - 1 + 1  # with new and broken, without camera-2

    # Answers follow with the next index.
    train(url, TrainConfig(max_epochs=1))
    build_index(url)
    indexed = Snapshots(Corpus(url)).indexed()
    assert indexed is not None
    assert indexed["videos"] == {state.video_id for state in states.values() if state.frames}
    again = ingest_demo(url, folder, sync=True)
    assert (again.found, again.probed, again.spans) == ({"unchanged": 102}, 0, 0)


def test_without_sync_nothing_leaves(tmp_path: Path) -> None:
    folder, url = tmp_path / "videos", str(tmp_path / "corpus")
    make_video(folder / "a.mp4", 0, seconds=0.3)
    make_video(folder / "b.mp4", 1, seconds=0.3)
    ingest_demo(url, folder)
    (folder / "a.mp4").unlink()
    assert ingest_demo(url, folder).found == {"unchanged": 1}
    assert statuses(url) == {"a.mp4": "indexed", "b.mp4": "indexed"}


def test_a_list_brings_tags_and_the_name_brings_the_time(tmp_path: Path) -> None:
    url = str(tmp_path / "corpus")
    make_video(tmp_path / "cam1_20240229_235958.mp4", 0, seconds=0.3)
    make_video(tmp_path / "cam2.mp4", 1, seconds=0.3)
    (tmp_path / "list.csv").write_text(
        "uri,camera,floor\ncam1_20240229_235958.mp4,door,1\ncam2.mp4,yard,\ngone.mp4,roof,3\n"
    )
    source = tmp_path / "list.csv"
    ingest_demo(url, source, time_pattern="cam1_%Y%m%d_%H%M%S")
    states = {Path(state.uri).name: state for state in Corpus(url).states()}
    first, second, gone = (states[n] for n in ("cam1_20240229_235958.mp4", "cam2.mp4", "gone.mp4"))
    assert (first.tags, second.tags) == ({"camera": "door", "floor": "1"}, {"camera": "yard"})
    assert (first.recorded_at, first.recorded_at_source) == (
        datetime(2024, 2, 29, 23, 59, 58, tzinfo=UTC),
        "name",
    )
    modified_at = (tmp_path / "cam2.mp4").stat().st_mtime
    assert second.recorded_at_source == "mtime"
    assert second.recorded_at.timestamp() == pytest.approx(modified_at, abs=1e-5)
    assert (gone.status, gone.reason) == ("failed", "there is no such file")

    source.write_text("uri,camera\ncam2.mp4,gate\n")
    summary = ingest_demo(url, source, sync=True)
    assert (summary.found, summary.probed) == ({"relabelled": 1, "gone": 2}, 0)
    [left] = Corpus(url).states()
    assert (left.tags, left.status) == ({"camera": "gate"}, "indexed")


# ── what is embedded ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.long
def test_still_stretches_and_a_sample_of_pairs_save_the_encoders_work(tmp_path: Path) -> None:
    folder, url = tmp_path / "videos", str(tmp_path / "corpus")
    for number in range(12):
        make_video(folder / f"{number}.mp4", number, seconds=1, still=number % 2 == 0)
    summary = ingest_demo(url, folder, max_change=3, pairs=0.5)
    assert summary.frames == 120
    assert 6 * 1 + 6 * 5 <= summary.embedded <= 6 * 3 + 6 * 10
    spans = [record for _, record in Corpus(url).spans().values()]
    assert 0 < sum(record.pairs for record in spans) < len(spans)
    for name in Corpus(url).files("frames"):
        for table in Corpus(url).frames(name):
            for row in table.to_pylist():
                record = next(r for r in spans if r.span_id == row["span_id"])
                assert (row["clip"] is not None) == record.pairs
                assert row["dino"] is not None
    with pytest.raises(UserError, match=r"0\.5 .*--pairs"):
        build_index(url, space="clip")
    train(url, TrainConfig(max_epochs=1))
    assert build_index(url).frames == 120
    with pytest.raises(UserError, match=r"was made with pairs 0\.5, not 1"):
        ingest_demo(url, folder, max_change=3)


# ── poison ───────────────────────────────────────────────────────────────────────────────────────


def descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def words_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class Killer(threading.Thread):
    """Sends a signal to each process below this one whose command line holds a word, again and again."""

    def __init__(self, word: str, number: int) -> None:
        super().__init__(daemon=True)
        self._word, self._number = word, number
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.02):
            for process in descendants():
                if self._word in words_of(process):
                    process.send_signal(self._number)

    def __enter__(self) -> "Killer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


@pytest.mark.long
def test_what_crashes_its_decoder_is_quarantined_and_can_be_tried_again(tmp_path: Path) -> None:
    folder, url = tmp_path / "videos", str(tmp_path / "corpus")
    make_video(folder / "a.mp4", 0, seconds=70, fps=5)
    make_video(folder / "b.mp4", 1)
    shutil.copytree(folder, tmp_path / "more")
    with Killer("vsearch.decoder", signal.SIGSEGV):
        summary = ingest_demo(url, folder)
    assert summary.found == {"failed": 2}
    for state in Corpus(url).states():
        assert (state.status, state.quarantined, state.attempts) == ("failed", True, 2)
        assert "after 2 attempts: the decoder crashed (SIGSEGV)" in (state.reason or "")
    assert ingest_demo(url, folder).probed == 0  # not again and again
    assert ingest_demo(url, folder, retry_failed=True).found == {"new": 2}
    assert statuses(url) == {"a.mp4": "indexed", "b.mp4": "indexed"}
    truth = stored_rows(url)

    # Headers that can be read, pictures that cannot.
    url = str(tmp_path / "other")
    ingest(url, [str(folder / "b.mp4")], PRESETS["demo"])

    def poison_after_probe(progress: object) -> None:
        if getattr(progress, "stage", "") == "embed" and not killer.is_alive():
            killer.start()

    killer = Killer("vsearch.decoder", signal.SIGSEGV)
    try:
        ingest(url, [str(folder / "a.mp4")], PRESETS["demo"], report=poison_after_probe)
    finally:
        killer.__exit__()
    lost = {Path(s.uri).name: s for s in Corpus(url).states()}["a.mp4"]
    assert lost.quarantined and lost.errors and lost.status in ("partial", "failed")
    assert lost.expected_s is not None
    assert lost.indexed_s + sum(b - a for a, b in lost.gaps) == pytest.approx(lost.expected_s)
    ingest(url, [str(folder)], PRESETS["demo"], retry_failed=True)
    assert statuses(url) == {"a.mp4": "indexed", "b.mp4": "indexed"}
    assert_same_rows(stored_rows(url), truth)


# ── kills ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos for some seconds of work, the longest in several runs."""
    folder = tmp_path_factory.mktemp("archive")
    for number in range(40):
        make_video(folder / f"{number}.mp4", number, seconds=3, fps=20)
    make_video(folder / "long.mp4", 100, seconds=200, fps=6)
    return folder


@pytest.fixture(scope="module")
def undisturbed(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("undisturbed")
    ingest_demo(str(url), archive)
    return url


def new_corpus(undisturbed: Path, url: Path) -> str:
    """An empty corpus with the same encoders and sampling."""
    url.mkdir(parents=True)
    shutil.copy(undisturbed / "corpus.json", url)
    return str(url)


def command(archive: Path, url: str) -> list[str]:
    words = ["ingest", str(archive), "--models", "demo", "--corpus", url]
    return [sys.executable, "-m", "vsearch.cli", *words]


VICTIMS: dict[str, Callable[[str], bool]] = {
    "driver": lambda words: "vsearch.cli" in words,
    "raylet": lambda words: "raylet/raylet" in words,
    "gcs": lambda words: "gcs_server" in words,
    "decode worker": lambda words: "ray::" in words and "_decode_run" in words,
    "embedding actor": lambda words: "ray::" in words and "_Embedder" in words,
    "decoder": lambda words: "vsearch.decoder" in words,
    "any worker": lambda words: "ray::Map" in words or "vsearch.decoder" in words,
}
HEAD = ("driver", "raylet", "gcs")
"""Those take the whole ingest with them: it runs in a process of its own."""


def tree_of(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def kill_one(pid: int, who: str, url: str, over: Callable[[], bool]) -> str | None:
    """Waits until the embedding begins or, in most cases, until a first file is stored, and a random
    time longer; kills one process below `pid` and returns the beginning of its command line, None if
    it was too late.
    """
    stored = random.random() < 0.7

    def begun() -> bool:
        if stored:
            return any(Path(url).glob("frames/*.parquet"))
        return any("_Embedder" in words_of(process) for process in tree_of(pid))

    while not over() and not begun():
        time.sleep(0.05)
    time.sleep(random.uniform(0, 3 if stored else 10))
    while not over():
        tree = tree_of(pid)
        victims = [process for process in tree if VICTIMS[who](words_of(process))]
        if victims:
            victim = random.choice(victims)
            words = words_of(victim)
            victim.kill()
            return words[:60].strip()
        who = "any worker" if who not in HEAD else who  # decoding, say, is over already
        time.sleep(0.01)
    return None


def killed_process(who: str, archive: Path, url: str) -> tuple[str | None, object]:
    with open(os.devnull, "wb") as nowhere:
        started = subprocess.Popen(command(archive, url), stdout=nowhere, stderr=nowhere)
        killed = kill_one(started.pid, who, url, lambda: started.poll() is not None)
        return killed, started.wait(timeout=300)


def killed_worker(who: str, archive: Path, url: str) -> tuple[str | None, object]:
    killed: list[str | None] = []
    thread = threading.Thread(
        target=lambda: killed.append(kill_one(os.getpid(), who, url, done.is_set))
    )
    done = threading.Event()
    thread.start()
    try:
        code: object = ingest_demo(url, archive).frames
    except Exception as error:
        code = error
    done.set()
    thread.join()
    return killed[0], code


def one_kill(who: str, seed: int, archive: Path, undisturbed: Path, url: str) -> str:
    """One disturbed run and its repetition; returns a line about it."""
    random.seed(seed)
    began = time.monotonic()
    disturb = killed_process if who in HEAD else killed_worker
    killed, code = disturb(who, archive, url)
    assert killed is not None
    partly = set(stored_rows(url))
    again = ingest_demo(url, archive)
    whole = stored_rows(str(undisturbed))
    assert again.frames <= len(whole) - len(partly)  # what was stored is not done again
    assert_same_rows(stored_rows(url), whole)
    assert set(statuses(url).values()) == {"indexed"}
    return (
        f"{who}: killed {killed!r}, then {code!r}, {len(partly)} rows stored, {again.frames} done by the "
        f"repetition, {time.monotonic() - began:.0f} s"
    )


@pytest.mark.long
@pytest.mark.parametrize(("who", "seed"), [("driver", 1), ("embedding actor", 2)])
def test_a_killed_ingest_is_completed_by_its_repetition(
    who: str, seed: int, archive: Path, undisturbed: Path, tmp_path: Path
) -> None:
    print(one_kill(who, seed, archive, undisturbed, new_corpus(undisturbed, tmp_path / "c")))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10, 31))
def test_many_kills(seed: int, archive: Path, undisturbed: Path, tmp_path: Path) -> None:
    who = list(VICTIMS)[seed % len(VICTIMS)]
    print(one_kill(who, seed, archive, undisturbed, new_corpus(undisturbed, tmp_path / "c")))


@pytest.mark.long
def test_two_ingests_at_once_do_no_harm(archive: Path, undisturbed: Path, tmp_path: Path) -> None:
    url = new_corpus(undisturbed, tmp_path / "c")
    both = [
        subprocess.Popen(command(archive, url), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for started in both:
        _, said = started.communicate(timeout=300)
        assert started.returncode == 0, said.decode()[-3000:]
    Corpus(url).settle()
    assert_same_rows(stored_rows(url), stored_rows(str(undisturbed)))
