"""The fused space through the public build and engine, and spaces side by side against published
indexes, on a small world of known truth.
"""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from archive import video_row
from clips import straight_frames
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load

import vsearch
from vsearch import spaces
from vsearch.build_index import build_index
from vsearch.cli import main
from vsearch.config import PRESETS, CorpusConfig, UserError
from vsearch.corpus import Corpus
from vsearch.encoders import Encoders
from vsearch.fusion import ALPHAS
from vsearch.projector import Projector, projection_loss
from vsearch.query import Term
from vsearch.schema import VIDEOS, SpanRecord, frames_schema
from vsearch.snapshots import Snapshots
from vsearch.spaces import Comparison
from vsearch.verify import verify
from vsearch.video import decode, probe

EVERY = 6
"""Of the frames of the world so many become one: four a second."""


def add_world_video(corpus: Corpus, encoders: Encoders, path: Path) -> tuple[Any, Any]:
    """Adds a video with a part of its frames, without Ray; gives their vectors."""
    with path.open("rb") as file:
        decoded = list(decode(file, probe(file), encoders.input_px, threads=1))
    pts_s = np.concatenate([span.pts_s for span in decoded])[::EVERY]
    pixels = np.concatenate([span.pixels for span in decoded])[::EVERY]
    dino, clip = encoders.embed(pixels)
    count, name = len(pts_s), path.stem
    columns = [
        pa.array([name] * count),
        pa.array([f"{name}-0"] * count),
        pa.array([0] * count, pa.int32()),
        pa.array(range(count), pa.int32()),
        pa.array(pts_s.astype(np.float64)),
        *(
            pa.FixedSizeListArray.from_arrays(pa.array(v.reshape(-1)), v.shape[1])
            for v in (dino, clip)
        ),
    ]
    table = pa.table(columns, schema=frames_schema(dino.shape[1], clip.shape[1]))
    record = SpanRecord(name, f"{name}-0", 0, count, float(pts_s[-1]), True, embedded=count)
    corpus.add_frames(table, [record])
    row = video_row(name, uri=str(path), span_s=1000.0)
    corpus.add_videos(pa.Table.from_pylist([row], schema=VIDEOS))
    return dino, clip


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return Encoders(PRESETS["demo"], "cpu")


@pytest.fixture(scope="module")
def corpus(world: Path, encoders: Encoders, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Three of the four videos of the world, with a projector that was trained on them."""
    corpus = Corpus(str(tmp_path_factory.mktemp("corpus")))
    corpus.require(CorpusConfig(encoders.dino.record, encoders.clip.record, encoders.input_px))
    pairs = [add_world_video(corpus, encoders, path) for path in sorted(world.glob("*.mp4"))[:3]]
    dino, clip = (torch.from_numpy(np.concatenate(v)).float() for v in zip(*pairs, strict=True))
    torch.manual_seed(0)
    projector = Projector(dino.shape[1], clip.shape[1], hidden=256)
    projector.standardise_by(dino.mean(0), dino.std(0))
    optimizer = torch.optim.Adam(projector.parameters(), 1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        projection_loss(projector(dino), clip, 0.5, 0.07).backward()
        optimizer.step()
    weights, sizes = projector.to_bytes()
    corpus.write("projector/v1/model.safetensors", weights)
    corpus.write("projector/v1/config.json", sizes)
    return corpus


@pytest.fixture(scope="module")
def truth(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sentences of the world, two of them as a pair, one hostile."""
    lines = [json.loads(line) for line in (world / "truth.jsonl").read_text().splitlines()]
    here = {path.name for path in sorted(world.glob("*.mp4"))[:3]}
    lines = [line for line in lines if all(m["video"] in here for m in line["moments"])]
    single = [line for line in lines if line["group"] in ("seen", "unseen")]
    for line in single[:2]:
        line["pair"] = 1
    single[1]["terms"] = [{"text": single[1]["query"]}, {"text": "a tree", "weight": -0.5}]
    hostile = {"query": "<script>alert('x')</script> & \"so\"", "group": "<b>"}
    gone = {"video": "<gone>.mp4", "start_s": 0, "end_s": 1}
    path = tmp_path_factory.mktemp("truth") / "truth.jsonl"
    lines.append(hostile | {"moments": [gone]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str
) -> dict[str, Any]:
    """The JSON that a command prints."""
    monkeypatch.setattr("sys.argv", ["vsearch", *words, "--json"])
    main()
    printed: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return printed


def frames_of(corpus: Corpus) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(projected, CLIP's) unit vectors of all frames by video and time, in plain NumPy."""
    tables = [table for name in corpus.files("frames") for table in corpus.frames(name)]
    table = pa.concat_tables(tables).sort_by([("video_id", "ascending"), ("pts_s", "ascending")])
    dino, clip = (np.array(table[name].to_pylist(), np.float64) for name in ("dino", "clip"))
    weights = load(corpus.read("projector/v1/model.safetensors"))
    w = {name: tensor.numpy().astype(np.float64) for name, tensor in weights.items()}
    inner = ((dino - w["mean"]) / w["std"]) @ w["net.0.weight"].T + w["net.0.bias"]
    erf = torch.erf(torch.from_numpy(inner / np.sqrt(2))).numpy()
    out = (inner * (1 + erf) / 2) @ w["net.2.weight"].T + w["net.2.bias"]
    return out / np.linalg.norm(out, axis=1, keepdims=True), clip


def test_rows_of_the_fused_space_are_the_formula(corpus: Corpus) -> None:
    summary = build_index(corpus.url, space="fused", alpha=0.3, rows="frames")
    engine = vsearch.open(corpus.url)
    assert (summary.space, summary.alpha, engine.manifest["alpha"]) == ("fused", 0.3, 0.3)
    projected, clip = frames_of(corpus)
    fused = 0.3 * projected + 0.7 * clip
    fused /= np.linalg.norm(fused, axis=1, keepdims=True)
    (shard,) = engine.index.shards
    np.testing.assert_allclose(np.asarray(shard.vectors, np.float64), fused, atol=2e-3)
    found = verify(corpus.url)
    assert not found.damaged


def test_a_picture_finds_its_own_frame_in_the_fused_space(corpus: Corpus, world: Path) -> None:
    build_index(corpus.url, space="fused", alpha=0.5, rows="frames")
    engine = vsearch.open(corpus.url)
    for path in sorted(world.glob("*.mp4"))[:3]:
        frames = list(straight_frames(path))
        for number in (0, EVERY * (len(frames) // EVERY // 2)):
            picture = frames[number].to_ndarray(format="rgb24")
            at_s = float(frames[number].pts * frames[number].time_base)
            own = engine.vector_at(path.stem, at_s + 1e-3)
            asked = engine.picture_encoder.encode(picture)
            assert own is not None and own @ asked >= 0.99
            best = engine.search([Term(picture=picture)], limit=1)[0]
            assert best.video == str(path) and best.start_s <= at_s + 1e-6 < best.end_s


def test_alpha_is_tuned_recorded_and_kept(
    corpus: Corpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(corpus.url, space="clip")  # so that there is no α to keep
    first = build_index(corpus.url, space="fused")
    manifest = Snapshots(corpus).manifest(first.snapshot)
    curve = dict(map(tuple, manifest["fusion"]["curve"]))
    assert tuple(curve) == ALPHAS and manifest["fusion"]["pairs"] > 100
    assert first.alpha == manifest["alpha"] == max(curve, key=lambda alpha: curve[alpha])
    assert not build_index(corpus.url, space="fused").new
    assert build_index(corpus.url) == build_index(corpus.url, space="fused")  # as it is
    # Another α makes other rows, and stays until something else is asked for.
    chosen = build_index(corpus.url, space="fused", alpha=0.77)
    assert chosen.new and chosen.shards_new == 1
    again = build_index(corpus.url, space="fused")
    assert not again.new and again.alpha == 0.77
    listed = run(capsys, monkeypatch, "snapshots", "--corpus", corpus.url)["snapshots"]
    assert [(s["space"], s["alpha"]) for s in listed][-2:] == [
        ("fused", first.alpha),
        ("fused", 0.77),
    ]
    retrained = build_index(corpus.url, space="fused", retrain=True)
    assert retrained.alpha == first.alpha and not verify(corpus.url).damaged


def test_new_videos_are_fused_as_the_others(
    world: Path, encoders: Encoders, corpus: Corpus, tmp_path: Path
) -> None:
    grown = Corpus(str(tmp_path))
    grown.require(corpus.config)
    for name in ("model.safetensors", "config.json"):
        grown.write(f"projector/v1/{name}", corpus.read(f"projector/v1/{name}"))
    first, *others = sorted(world.glob("*.mp4"))
    add_world_video(grown, encoders, first)
    alpha = build_index(grown.url, space="fused", rows="frames").alpha
    for path in others:
        add_world_video(grown, encoders, path)
    summary = build_index(grown.url, space="fused", rows="frames")
    assert summary.new and summary.alpha == alpha
    projected, clip = frames_of(grown)
    fused = alpha * projected + (1 - alpha) * clip
    fused /= np.linalg.norm(fused, axis=1, keepdims=True)
    shards = vsearch.open(grown.url).index.shards
    rows = np.concatenate([np.asarray(shard.vectors, np.float64) for shard in shards])
    np.testing.assert_allclose(rows, fused, atol=2e-3)


@pytest.mark.parametrize("rows", ["moments", "frames"])
def test_side_by_side_gives_the_figures_of_published_indexes(
    rows: str,
    corpus: Corpus,
    truth: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ("evaluate", "--queries", str(truth), "--corpus", corpus.url)
    published = {}
    for space in ("clip", "fused", "projected"):
        alpha = 0.4 if space == "fused" else None
        build_index(corpus.url, space=space, alpha=alpha, rows=rows)
        published[space] = run(capsys, monkeypatch, *asked)
    before = sorted(Path(corpus.url).rglob("*"))
    found = run(
        capsys, monkeypatch, *asked, "--spaces", "random,clip,projected,fused", "--alpha", "0.4"
    )["spaces"]
    assert sorted(Path(corpus.url).rglob("*")) == before
    assert {space: found[space] for space in published} == published
    assert found["projected"]["R1@0.5"] > 0.5 > found["random"]["R1@0.5"]
    assert {"mAP@0.75", "NDCG@10", "boundary-error-s", "FPR", "negation", "AUROC"} <= set(
        published["projected"]
    )


def test_the_floor_is_the_same_every_time_and_knows_nothing(corpus: Corpus) -> None:
    rows = []
    for _ in range(2):
        with Comparison(corpus.url).engine("random") as engine:
            rows.append(np.array(engine.index.shards[0].vectors, np.float32))
    np.testing.assert_array_equal(*rows)
    build_index(corpus.url)
    trained = np.asarray(vsearch.open(corpus.url).index.shards[0].vectors, np.float32)
    assert len(trained) != len(rows[0]) or not np.allclose(trained, rows[0], atol=0.1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--spaces", "projected,dino"], "There is no space 'dino'"),
        (["--spaces", "clip,clip"], "Name each space to compare once"),
        (["--spaces", "clip", "--alpha", "0.3"], "--alpha is for the fused space"),
        (["--alpha", "0.3"], "--alpha is for --spaces"),
        (["--spaces", "clip", "--snapshot", "x"], "give one of them"),
        (["--spaces", "clip"], "up to 10 frames"),
    ],
)
def test_a_mistake_is_one_sentence(
    options: list[str],
    said: str,
    corpus: Corpus,
    truth: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spaces, "MOST_FRAMES", 10)
    asked = ["evaluate", "--queries", str(truth), "--corpus", corpus.url]
    monkeypatch.setattr("sys.argv", ["vsearch", *asked, *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


def test_a_corpus_with_few_pairs_has_no_fused_space(encoders: Encoders, tmp_path: Path) -> None:
    corpus = Corpus(str(tmp_path))
    corpus.require(
        CorpusConfig(encoders.dino.record, encoders.clip.record, encoders.input_px, pairs=0.5)
    )
    with pytest.raises(UserError, match=r"--pairs.*fused space cannot be had"):
        build_index(corpus.url, space="fused")


def test_a_space_that_cannot_be_had_is_told_before_any_is_asked(
    encoders: Encoders,
    world: Path,
    truth: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    corpus = Corpus(str(tmp_path))
    corpus.require(CorpusConfig(encoders.dino.record, encoders.clip.record, encoders.input_px))
    add_world_video(corpus, encoders, min(world.glob("*.mp4")))
    asked: list[str] = []
    monkeypatch.setattr(Comparison, "engine", lambda self, space: asked.append(space))
    words = ["evaluate", "--queries", str(truth), "--corpus", corpus.url]
    monkeypatch.setattr("sys.argv", ["vsearch", *words, "--spaces", "clip,projected"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and asked == []
    assert "has no projector yet" in " ".join(capsys.readouterr().err.split())


class Page(HTMLParser):
    """What a browser would make of a page: its elements, its text, its pictures."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_shows_the_worst_queries_with_pictures(
    corpus: Corpus,
    truth: Path,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "report.html"
    asked = ("evaluate", "--queries", str(truth), "--corpus", corpus.url, "--html", str(path))
    figures = run(capsys, monkeypatch, *asked, "--spaces", "clip,random")["spaces"]
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert "script" not in page.elements and page.elements.count("main") == 1
    assert "<script>alert('x')</script> & \"so\"" in page.texts and "<b>" in page.texts
    assert any("<gone>.mp4" in text for text in page.texts)
    assert "no picture: this video is not in the corpus" in page.texts
    # Nothing is fetched from anywhere, and every picture is one.
    assert page.links and all(link.startswith("data:image/jpeg;base64,") for link in page.links)
    assert not re.search(r"https?://|url\(", source)
    for link in page.links:
        with Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))) as image:
            image.load()
            assert image.format == "JPEG" and 0 < image.width <= 160
    for space in ("clip", "random"):
        low, high = figures[space]["intervals"]["mAP"]
        assert f"{figures[space]['mAP']:.3f}" in page.texts
        assert f"{low:.3f} … {high:.3f}" in page.texts


def test_a_video_that_is_gone_leaves_a_page_that_says_so(
    corpus: Corpus,
    truth: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(*_: object) -> bytes:
        raise FileNotFoundError("No such file: <here>")

    monkeypatch.setattr("vsearch.decoder.Decoders.picture", gone)
    path = tmp_path / "report.html"
    run(capsys, monkeypatch, "evaluate", "--queries", str(truth), "--corpus", corpus.url,
        "--html", str(path))  # fmt: skip
    page = Page(path.read_text(encoding="utf-8"))
    assert "no picture: No such file: <here>" in page.texts and not page.links


def test_a_page_that_has_no_place_is_refused_before_anything_is_asked(
    corpus: Corpus, truth: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = str(truth.parent / "nowhere" / "report.html")
    words = ["evaluate", "--queries", str(truth), "--corpus", corpus.url, "--html", page]
    monkeypatch.setattr("sys.argv", ["vsearch", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "cannot be written: there is no folder" in " ".join(capsys.readouterr().err.split())
