"""The parts of a snapshot, each made by one task: rows of a shard, quantizer, queries, codes of a shard.

Each function finds its part by its key if it is finished, else makes and stores it; it gives the
part's entry for the manifest. None of them knows of the others, or of Ray. FAISS and torch are loaded
by those that use them: who only starts the tasks does without.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vsearch import confidence, recall
from vsearch.corpus import Corpus, vector_matrix
from vsearch.moments import Gaps, moments_of, shots_of
from vsearch.schema import ROWS
from vsearch.snapshots import Content, Snapshots, Spans, key_of

Entry = dict[str, Any]

TEST_SHARE = 0.05
"""This share of the rows is not trained on: it tells how well a quantizer fits videos that are new."""

FLAT: Entry = dict.fromkeys(("codes_file", "cells_file", "probe_file", "mean_cosine", "made_with"))
"""What the entry of a shard without codes says of them."""


@dataclass(frozen=True)
class Recipe:
    """What rows are made of: `projector` is the version of the one in use, None for CLIP's own
    vectors; `alike` the bound of a moment, None for a row a frame; `cut` that between shots.
    """

    projector: str | None
    alike: float | None
    cut: float


@dataclass(frozen=True)
class Piece:
    """A stored span in a shard: its frames start at `offset`."""

    file: str
    span_id: str
    video_id: str
    offset: int
    frames: int


def pieces_of(group: list[Content], spans: Spans) -> list[Piece]:
    """The place of every span that has frames in its shard: by video, then by time."""
    pieces: list[Piece] = []
    offset = 0
    for content in group:
        for file, span in spans[content.video_id]:
            if span.frames:
                pieces.append(Piece(file, span.span_id, content.video_id, offset, span.frames))
                offset += span.frames
    return pieces


def shard_rows(
    corpus_url: str, key: str, pieces: list[Piece], gaps: dict[str, Gaps], recipe: Recipe
) -> Entry:
    """Writes a shard's vectors and rows; gives their entry. `gaps` are those of each video, in stream
    time.
    """
    corpus = Corpus(corpus_url)
    snapshots = Snapshots(corpus)
    if found := snapshots.part(key):
        return found
    config = corpus.config
    frames = sum(piece.frames for piece in pieces)
    pts_s = np.empty(frames, np.float64)
    with tempfile.TemporaryDirectory() as folder:
        of_frames, dino = (
            np.memmap(f"{folder}/{name}", np.float16, mode="w+", shape=(frames, dim))
            for name, dim in (("frames", config.clip.dim), ("dino", config.dino.dim))
        )
        for piece, times, part, seen in _read(corpus, pieces, recipe.projector):
            place = slice(piece.offset, piece.offset + piece.frames)
            of_frames[place], dino[place], pts_s[place] = part, seen, times
        table, mean = _write_rows(
            pieces, gaps, pts_s, of_frames, dino, recipe, Path(folder) / "vectors"
        )
        pq.write_table(table, f"{folder}/rows", compression="zstd")
        return snapshots.finish(
            key,
            {
                "rows": table.num_rows,
                "frames": frames,
                "mean": mean,
                "vectors_file": snapshots.put(key, ".f16", Path(folder) / "vectors"),
                "rows_file": snapshots.put(key, ".parquet", Path(folder) / "rows"),
            },
        )


def _write_rows(
    pieces: list[Piece],
    gaps: dict[str, Gaps],
    pts_s: Any,
    of_frames: Any,
    dino: Any,
    recipe: Recipe,
    path: Path,
) -> tuple[pa.Table, list[float]]:
    """Writes the vectors of the rows; gives the rows, and the mean of the frames' vectors."""
    videos = list(dict.fromkeys(piece.video_id for piece in pieces))
    total = np.zeros(of_frames.shape[1], np.float64)
    tables = []
    with path.open("wb") as file:
        for number, (first, stop) in enumerate(pairwise(_edges(pieces))):
            mine = slice(first, stop)
            shots = shots_of(pts_s[mine], dino[mine], recipe.cut)
            for found in moments_of(
                pts_s[mine], of_frames[mine], gaps[videos[number]], recipe.alike, shots=shots
            ):
                file.write(np.ascontiguousarray(found.vectors).tobytes())
                total += np.asarray(found.vectors, np.float64).T @ found.frames
                place = np.full(len(found.frames), number, np.int32)
                video = pa.DictionaryArray.from_arrays(pa.array(place), pa.array(videos))
                columns = [
                    video, found.start_s, found.end_s, found.best_s, found.frames, found.shots
                ]  # fmt: skip
                tables.append(pa.table(columns, schema=ROWS))
    return pa.concat_tables(tables), (total / len(pts_s)).tolist()


def _edges(pieces: list[Piece]) -> list[int]:
    """The frames at which videos begin, and the end of the last."""
    firsts: dict[str, int] = {}
    for piece in pieces:
        firsts.setdefault(piece.video_id, piece.offset)
    return [*firsts.values(), pieces[-1].offset + pieces[-1].frames]


def _projection(
    corpus: Corpus, projector: str | None
) -> tuple[str, Callable[[NDArray[np.float16]], NDArray[np.float16]]]:
    if projector is None:
        return "clip", lambda vectors: vectors
    from vsearch.projector import projection

    return projection(corpus, projector)


def _read(
    corpus: Corpus, pieces: list[Piece], projector: str | None
) -> Iterator[tuple[Piece, Any, Any, Any]]:
    """(piece, times (n,), vectors (n, dim), DINO's vectors (n, dino dim)) of each span."""
    column, project = _projection(corpus, projector)
    by_file: dict[str, dict[str, Piece]] = {}
    for piece in pieces:
        by_file.setdefault(piece.file, {})[piece.span_id] = piece
    for file, wanted in by_file.items():
        table = pa.concat_tables(corpus.frames(file, sorted({"span_id", "pts_s", "dino", column})))
        ids = table["span_id"].to_numpy(zero_copy_only=False)
        for span, piece in wanted.items():
            rows = np.flatnonzero(ids == span)
            if len(rows) != piece.frames:
                raise RuntimeError(
                    f"{file} holds {len(rows)} frames of span {span}, not {piece.frames}"
                )
            part = table.take(pa.array(rows))
            dino = vector_matrix(part["dino"])
            vectors = dino if column == "dino" else vector_matrix(part[column])
            yield piece, part["pts_s"].to_numpy(), project(vectors), dino


def shard_sample(corpus_url: str, shard: Entry, count: int) -> tuple[Any, Any]:
    """(at most `count` vectors, some others for a test), float32, evenly drawn from the shard. Those
    for the test are of its last videos, of which the first ones have none: neighbours are alike.
    """
    with _vectors(Snapshots(Corpus(corpus_url)), shard) as vectors:
        first = max(1, math.floor(len(vectors) * (1 - TEST_SHARE)))
        parts = ((0, first, count), (first, len(vectors), math.ceil(count * TEST_SHARE)))
        train, test = (
            np.asarray(vectors[np.linspace(a, b - 1, min(n, b - a)).astype(np.int64)], np.float32)
            for a, b, n in parts
        )
        return train, test


@contextmanager
def _vectors(snapshots: Snapshots, shard: dict[str, Any]) -> Iterator[Any]:
    """The vectors of a shard, memory-mapped: float16 (rows, dim)."""
    with snapshots.borrowed(shard["vectors_file"]) as path:
        yield np.memmap(path, np.float16, mode="r").reshape(shard["rows"], -1)


def train(corpus_url: str, key: str, nlist: int, rows: int, *sample: tuple[Any, Any]) -> Entry:
    """Trains the quantizer; gives its entry, with the mean cosine of videos that it has not seen to its
    centroids.
    """
    from vsearch.index import fit, train_quantizer

    snapshots = Snapshots(Corpus(corpus_url))
    if found := snapshots.part(key):
        return found
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantizer"
        train, test = (np.concatenate(parts) for parts in zip(*sample, strict=True))
        trained = train_quantizer(train, nlist)
        path.write_bytes(trained)
        entry = {
            "nlist": nlist,
            "rows": rows,
            "mean_cosine": fit(trained, test)[0],
            "quantizer_file": snapshots.put(key, ".faiss", path),
        }
    return snapshots.finish(key, entry)


def encode_queries(
    corpus_url: str, key: str, asked: str, sentences: list[str], *sample: tuple[Any, Any]
) -> Entry:
    from vsearch.encoders import ClipEncoder

    corpus = Corpus(corpus_url)
    snapshots = Snapshots(corpus)
    if found := snapshots.part(key):
        return found
    text = ClipEncoder.recorded(corpus.config.clip).encode_text(sentences)
    vectors = np.concatenate([text, *(frames for frames, _ in sample)]).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "queries.npy"
        np.save(path, vectors, allow_pickle=False)
        entry = {"asked": asked, "text": len(text), "frames": len(vectors) - len(text)}
        return snapshots.finish(key, entry | {"queries_file": snapshots.put(key, ".npy", path)})


def shard_codes(
    corpus_url: str,
    shard: Entry,
    quantizer: Entry,
    queries: Entry,
    coded: bool,
) -> Entry:
    """The entry of a shard with its codes, what they recall, and how well the quantizer fits it."""
    from vsearch.index import Shard, encode, fit

    snapshots = Snapshots(Corpus(corpus_url))
    codes_key = key_of("codes", shard["key"], quantizer["key"])
    codes = snapshots.part(codes_key)
    coded = coded or bool(shard.get("codes_file"))
    if not coded:
        with _vectors(snapshots, shard) as vectors:
            trained = snapshots.path(quantizer["quantizer_file"]).read_bytes()
            return shard | FLAT | {"mean_cosine": fit(trained, vectors)[0]}
    with tempfile.TemporaryDirectory() as folder, _vectors(snapshots, shard) as vectors:
        path = Path(folder) / "codes"
        if codes is None:
            trained = snapshots.path(quantizer["quantizer_file"]).read_bytes()
            mean_cosine, filled = encode(trained, vectors, path)
            np.save(f"{folder}/cells.npy", filled, allow_pickle=False)
            codes = snapshots.finish(
                codes_key,
                {
                    "mean_cosine": mean_cosine,
                    "codes_file": snapshots.put(codes_key, ".faiss", path),
                    "cells_file": snapshots.put(codes_key, ".npy", Path(folder) / "cells.npy"),
                },
            )
        probe_key = key_of("probe", codes_key, queries["key"])
        probe = snapshots.part(probe_key)
        if probe is None:
            asked = np.load(snapshots.path(queries["queries_file"]), allow_pickle=False)
            with snapshots.borrowed(codes["codes_file"]) as codes_path:
                rows, dim = vectors.shape
                opened = Shard(Path(vectors.filename), rows, dim, codes_path)
                found = recall.probe(opened, asked)
            np.savez(f"{folder}/probe.npz", **found.arrays())
            file = snapshots.put(probe_key, ".npz", Path(folder) / "probe.npz")
            probe = snapshots.finish(probe_key, {"probe_file": file})
    made = {name: value for name, value in (codes | probe).items() if name != "key"}
    return shard | made


def made_up_sentences(corpus_url: str, key: str, sentences: list[str]) -> Entry:
    """The entry of made-up sentences: their vectors, what each has of its own, and the direction that
    all `sentences` share.
    """
    from vsearch.encoders import ClipEncoder

    corpus = Corpus(corpus_url)
    snapshots = Snapshots(corpus)
    if found := snapshots.part(key):
        return found
    encoder = ClipEncoder.recorded(corpus.config.clip)
    direction = confidence.general(encoder.encode_text(sentences))
    asked = encoder.encode_text(confidence.made_up(sentences))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sentences.npy"
        np.save(path, asked, allow_pickle=False)
        entry = {
            "general": direction.astype(np.float64).tolist(),
            "shares": confidence.own_share(asked, direction).astype(np.float64).tolist(),
            "sentences_file": snapshots.put(key, ".npy", path),
        }
        return snapshots.finish(key, entry)


def best_scores(corpus_url: str, shard: Entry, made_up: Entry) -> list[float]:
    """The score of a shard's best row for each made-up sentence, exactly."""
    from vsearch.index import exact_search

    snapshots = Snapshots(Corpus(corpus_url))
    asked = np.load(snapshots.path(made_up["sentences_file"]), allow_pickle=False)
    with _vectors(snapshots, shard) as vectors:
        scores, _ = exact_search(vectors, asked, 1)
    return [round(score, 5) for score in scores[:, 0].tolist()]


def measure(
    corpus_url: str, shards: list[Entry], sentences: int
) -> tuple[list[recall.Point], float]:
    """What each setting gives on all shards with codes together, and how unevenly their cells are
    filled. Of the queries that the shards were asked the first `sentences` are text.
    """
    from vsearch.index import imbalance

    snapshots = Snapshots(Corpus(corpus_url))
    coded = [shard for shard in shards if shard["codes_file"]]
    cells = sum(np.load(snapshots.path(s["cells_file"]), allow_pickle=False) for s in coded)
    found = reduce(add, (_probe(snapshots, shard) for shard in coded))
    return recall.curve(found, sentences), imbalance(cells)


def _probe(snapshots: Snapshots, shard: Entry) -> recall.Probe:
    with np.load(snapshots.path(shard["probe_file"]), allow_pickle=False) as arrays:
        return recall.Probe.from_arrays(arrays)
