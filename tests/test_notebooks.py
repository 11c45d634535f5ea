"""The notebooks as a user runs them, in a kernel: with their one line changed to another corpus, and as
they stand. What they draw is compared with the files of the index, by plain loops.
"""

import json
import re
from pathlib import Path
from typing import Any

import av
import nbformat
import numpy as np
import pyarrow.parquet as pq
import pytest
from nbclient import NotebookClient
from numpy.typing import NDArray

import vsearch
from vsearch.encoders import ClipEncoder
from vsearch.evaluate import read_queries
from vsearch.snapshots import Snapshots
from vsearch.spaces import Comparison

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = {
    "quickstart": {"coverage", "confidence"},
    "look_inside": {"timeline", "similar", "map", "scored"},
    "spaces": {"intervals", "groups", "differences", "agreement"},
}
"""Of each notebook the cells that plot."""
THE_LINE = re.compile(r"^CORPUS\b.*$", re.MULTILINE)
QUERY = "a red car"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A smaller corpus of the demo."""
    return vsearch.demo_corpus(str(tmp_path_factory.mktemp("corpus")), seed=11, videos=4)


@pytest.fixture(scope="module")
def truth(corpus: str) -> Path:
    return Path(corpus) / "world-11-4" / "truth.jsonl"


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def run(name: str, folder: Path, line: str | None = None, tell: str = "{}") -> tuple[Any, Any]:
    """A notebook after it ran in a folder, with `line` as its one line, and the values in `tell`."""
    notebook = read(name)
    if line is not None:
        first = next(cell for cell in notebook.cells if cell.cell_type == "code")
        first.source, changed = THE_LINE.subn(lambda _: line, first.source)
        assert changed == 1
    code = f"import json\nprint(json.dumps({tell}, default=lambda array: array.tolist()))"
    notebook.cells.append(nbformat.v4.new_code_cell(code, id="told"))
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
    cells = {cell.id: cell for cell in notebook.cells}
    return cells, json.loads(cells["told"].outputs[-1].text)


def plotted(cells: Any) -> set[str]:
    """The cells that drew a plot."""
    outputs = {name: getattr(cell, "outputs", []) for name, cell in cells.items()}
    return {
        name
        for name, shown in outputs.items()
        if any("image/png" in output.get("data", {}) for output in shown)
    }


def pictures(cell: Any) -> int:
    """How many JPEGs the answers of a cell show."""
    shown = (output.get("data", {}).get("text/html", "") for output in cell.outputs)
    return sum(html.count("data:image/jpeg;base64,") for html in shown)


class Rows:
    """The rows of an index, as they lie on storage."""

    def __init__(self, corpus: str) -> None:
        engine = vsearch.open(corpus)
        (shard,) = engine.manifest["shards"]
        path = Snapshots(engine.corpus).path
        table = pq.read_table(path(shard["rows_file"]))
        self.ids = np.array(table["video_id"].to_pylist())
        self.start_s, self.end_s, self.best_s = (
            table[name].to_numpy() for name in ("start_s", "end_s", "best_s")
        )
        self.frames = table["frames"].to_numpy()
        self.shots = table["shot"].to_numpy()
        halves = np.fromfile(path(shard["vectors_file"]), np.float16)
        self.vectors = halves.reshape(table.num_rows, -1).astype(np.float64)
        assert all(video["zero_s"] == 0 for video in engine.videos)


def iou(a: Any, b: Any) -> float:
    """Temporal IoU of (video, start_s, end_s)."""
    shared = max(0.0, min(a[2], b[2]) - max(a[1], b[1])) if a[0] == b[0] else 0.0
    return shared / (a[2] - a[1] + b[2] - b[1] - shared)


def first_answers(search: Any, texts: list[str]) -> list[tuple[str, float, float]]:
    found = [search(text, 50)[0] for text in texts]
    return [(Path(s.video).name, s.start_s, s.end_s) for s in found]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_kept_without_outputs_and_have_one_line_to_change(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert not any(cell.metadata for cell in notebook.cells)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids) and all(re.fullmatch("[a-z]+", each) for each in ids)
    assert len(THE_LINE.findall(code[0].source)) == 1
    assert NOTEBOOKS[name] < set(ids)
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NOTEBOOKS)


@pytest.mark.long
def test_quickstart(corpus: str, tmp_path: Path) -> None:
    tell = "{'first': results.to_dict(), 'table': table.to_dict('list'), 'clips': list(map(str, clips))}"
    cells, told = run("quickstart", tmp_path, f"CORPUS = {corpus!r}", tell)
    assert plotted(cells) == NOTEBOOKS["quickstart"]
    engine = vsearch.open(corpus)
    expected = engine.search(QUERY, limit=5)
    assert told["first"]["segments"] == [segment.to_dict() for segment in expected]
    assert [pictures(cells[name]) for name in ("search", "composed", "terms")] == [5, 5, 5]
    assert "are hidden" in cells["hidden"].outputs[0].data["text/html"]
    assert min(told["table"]["confidence"]) >= 0.95
    assert set(told["table"]["query"]) & {"a beach", "a starry night"}
    assert len(told["clips"]) == 3
    for clip, segment in zip(told["clips"], expected, strict=False):
        with av.open(str(tmp_path / clip)) as file:
            assert file.duration / av.time_base >= segment.end_s - segment.start_s - 0.05
    assert "video/mp4" in cells["play"].outputs[0].data["text/html"]


@pytest.mark.long
def test_look_inside(corpus: str, tmp_path: Path) -> None:
    names = ("scores", "edges_s", "peak", "ids", "at_s", "points", "share", "likeness")
    tell = (
        f"{{{', '.join(f'{name!r}: {name}' for name in names)}, 'best': vars(best), "
        "'shots': shots.to_dict('list'), 'near': [*map(vars, neighbours)]}"
    )
    cells, told = run("look_inside", tmp_path, f"CORPUS = {corpus!r}", tell)
    assert plotted(cells) == NOTEBOOKS["look_inside"]
    assert pictures(cells["neighbours"]) == len(told["near"]) == 6

    rows, best = Rows(corpus), told["best"]
    text: NDArray[np.float64] = ClipEncoder("demo/clip").encode_text([QUERY])[0].astype(np.float64)
    scores = rows.vectors @ text
    mine = np.flatnonzero(rows.ids == best["video_id"])
    within = (rows.start_s[mine] >= best["start_s"] - 1e-6) & (
        rows.end_s[mine] <= best["end_s"] + 1e-6
    )
    # The best answer shows its strongest row, and the timeline peaks at that of its whole video.
    top = max(mine[within], key=lambda row: scores[row])
    assert best["best_s"] == pytest.approx(rows.best_s[top])
    assert scores[top] > scores.max() - 0.1  # answers are ranked by their mean
    peak = max(mine, key=lambda row: scores[row])
    edges = np.array(told["edges_s"])
    step = slice(told["peak"], told["peak"] + 2)
    assert edges[step][0] < rows.end_s[peak] and edges[step][1] > rows.start_s[peak]
    for low, high, score in zip(edges[:-1], edges[1:], told["scores"], strict=True):
        there = [r for r in mine if rows.start_s[r] < high - 1e-6 and rows.end_s[r] > low + 1e-6]
        if there:
            assert score == pytest.approx(max(scores[there]), abs=2e-3)
    # Shots and moments.
    firsts = [r for r in mine if r == mine[0] or rows.shots[r] != rows.shots[r - 1]]
    assert told["shots"]["start_s"] == pytest.approx(rows.start_s[firsts].tolist())
    assert sum(told["shots"]["moments"]) == len(mine)
    assert sum(told["shots"]["frames"]) == rows.frames[mine].sum()
    # What is near: the moment itself, then the strongest row outside of the answer that holds it.
    alike = rows.vectors @ (rows.vectors[top] / np.linalg.norm(rows.vectors[top]))
    itself, other = told["near"][:2]
    assert (itself["video_id"], itself["best_s"]) == (
        rows.ids[top],
        pytest.approx(rows.best_s[top]),
    )
    inside = (
        (rows.ids == itself["video_id"])
        & (rows.start_s >= itself["start_s"] - 1e-6)
        & (rows.end_s <= itself["end_s"] + 1e-6)
    )
    outside = np.where(inside, -1, alike)
    found = (rows.ids == other["video_id"]) & (np.abs(rows.best_s - other["best_s"]) < 1e-6)
    assert outside[found].max() > outside.max() - 0.1  # segments are ranked by their mean
    # The map, by the eigenvectors of the covariance.
    centred = rows.vectors - rows.vectors.mean(axis=0)
    spread, axes = np.linalg.eigh(centred.T @ centred)
    order = np.lexsort((told["at_s"], told["ids"]))
    own = np.lexsort((rows.best_s, rows.ids))
    points = np.array(told["points"])[order]
    assert told["share"] == pytest.approx((spread[::-1] / spread.sum())[:2].tolist(), abs=1e-4)
    np.testing.assert_allclose(
        np.abs(points), np.abs(centred[own] @ axes[:, ::-1][:, :2]), atol=2e-3
    )
    np.testing.assert_allclose(np.array(told["likeness"])[order], scores[own], atol=2e-3)


@pytest.mark.long
def test_spaces(corpus: str, truth: Path, tmp_path: Path) -> None:
    line = f"CORPUS, QUERIES = {corpus!r}, {str(truth)!r}"
    tell = (
        "{'figures': [one.figures for one in judged], 'agreement': agreement, "
        "'mean': mean, 'low': low, 'high': high}"
    )
    cells, told = run("spaces", tmp_path, line, tell)
    assert plotted(cells) == NOTEBOOKS["spaces"]
    figures = {one["space"]: one for one in told["figures"]}
    queries = read_queries(str(truth))
    texts = [query.text for query in queries]
    answers = {"fused": first_answers(vsearch.open(corpus).search, texts)}  # the index in use
    for space in ("projected", "clip"):
        with Comparison(corpus).engine(space) as engine:
            answers[space] = first_answers(engine.search, texts)
    for space, firsts in answers.items():
        right = [
            max(iou(first, (m.video, m.start_s, m.end_s)) for m in query.moments) >= 0.5
            for query, first in zip(queries, firsts, strict=True)
            if query.moments
        ]
        assert figures[space]["R1@0.5"] == pytest.approx(np.mean(right), abs=1e-4)
    assert figures["random"]["mAP"] < 0.5 < figures["clip"]["mAP"]
    pairs = zip(answers["projected"], answers["clip"], strict=True)
    same = [iou(a, b) >= 0.5 for a, b in pairs]
    assert told["agreement"][0][1] == told["agreement"][1][0] == pytest.approx(np.mean(same))
    assert [told["agreement"][n][n] for n in range(4)] == [1, 1, 1, 1]
    gains = [one["mAP"] - figures["clip"]["mAP"] for one in told["figures"]]
    assert told["mean"] == pytest.approx(gains, abs=2e-4)
    low, mean, high = (np.array(told[name]) for name in ("low", "mean", "high"))
    assert (low <= mean).all() and (mean <= high).all()


@pytest.mark.long
def test_spaces_without_sentences_of_known_truth(corpus: str, tmp_path: Path) -> None:
    line = f"CORPUS, QUERIES = {corpus!r}, None"
    cells, told = run("spaces", tmp_path, line, "agreement")
    assert plotted(cells) == {"intervals", "agreement"}
    assert np.array(told).shape == (4, 4)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_line_as_it_stands_makes_the_corpus_of_the_demo(tmp_path: Path) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    cells, told = run("quickstart", folder, tell="[len(states), engine.rows, CORPUS]")
    assert plotted(cells) == NOTEBOOKS["quickstart"]
    assert told[0] == 20 and told[1] > 500 and told[2] == "../demo-archive"
    # What the notebook about spaces reads lies there too.
    (line,) = THE_LINE.findall(next(c for c in read("spaces").cells if c.id == "corpus").source)
    assert len(read_queries(str(folder / line.split('"')[-2]))) > 100
