"""The parts of a snapshot, each made by one task: rows of a shard, quantizer, queries, codes of a shard.

Each function finds its part by its key if it is finished, else makes and stores it; it gives the
part's entry for the manifest. None of them knows of the others, or of Ray. FAISS and torch are loaded
by those that use them: who only starts the tasks does without.
"""

import json
import math
import tempfile
from collections.abc import Iterator
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

from vsearch import confidence, fusion, recall
from vsearch.config import TrainConfig, UserError
from vsearch.corpus import Corpus, newest_projector, vector_matrix
from vsearch.moments import Gaps, moments_of, shots_of
from vsearch.sampling import split_videos
from vsearch.schema import ROWS
from vsearch.snapshots import Content, Snapshots, Spans, key_of
from vsearch.storage import open_url

Entry = dict[str, Any]

TEST_SHARE = 0.05
"""This share of the rows is not trained on: it tells how well a quantizer fits videos that are new."""

SENTENCES = Path(__file__).parent / "sentences.txt"
"""General sentences, one a line: the text queries on which recall is measured by default."""

TUNING_VIDEOS = 10
"""Fewer videos show too little for α to be tuned on them alone."""

TUNING_SPANS = 200
TUNING_PAIRS = 100
"""α is tuned on at most so many spans, and pairs of frames of each."""

FLAT: Entry = dict.fromkeys(("codes_file", "cells_file", "probe_file", "mean_cosine", "made_with"))
"""What the entry of a shard without codes says of them."""


@dataclass(frozen=True)
class Recipe:
    """What rows are made of: `projector` is the version of the one in use, None for CLIP's own
    vectors; `alike` the bound of a moment, None for a row a frame; `cut` that between shots; `alpha` the
    projected share of a fused vector, None where nothing is fused. `method` numbers what `shard_rows`
    does with all that: rows of another one do not go on in a new snapshot.
    """

    projector: str | None
    alike: float | None
    cut: float
    alpha: float | None = None
    method: int = 1


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
    corpus_url: str,
    key: str,
    pieces: list[Piece],
    gaps: dict[str, Gaps],
    recipe: Recipe,
    frames_url: str | None = None,
) -> Entry:
    """Writes a shard's vectors and rows; gives their entry. `gaps` are those of each video, in stream
    time. `frames_url` is the corpus that has the frames, where that is another one.
    """
    corpus = Corpus(corpus_url)
    stored = Corpus(frames_url) if frames_url else corpus
    snapshots = Snapshots(corpus)
    if found := snapshots.part(key):
        return found
    columns, vectors_of = fusion.mapping(corpus, recipe.projector, recipe.alpha)
    config = corpus.config
    frames = sum(piece.frames for piece in pieces)
    pts_s = np.empty(frames, np.float64)
    with tempfile.TemporaryDirectory() as folder:
        of_frames, dino = (
            np.memmap(f"{folder}/{name}", np.float16, mode="w+", shape=(frames, dim))
            for name, dim in (("frames", config.clip.dim), ("dino", config.dino.dim))
        )
        for piece, times, (seen, *vectors) in _read(stored, pieces, ["dino", *columns]):
            place = slice(piece.offset, piece.offset + piece.frames)
            of_frames[place], dino[place], pts_s[place] = vectors_of(*vectors), seen, times
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


def _read(
    corpus: Corpus, pieces: list[Piece], columns: list[str]
) -> Iterator[tuple[Piece, Any, list[Any]]]:
    """(piece, times (n,), the vectors (n, …) of each column) of each span; a column may come twice."""
    by_file: dict[str, dict[str, Piece]] = {}
    for piece in pieces:
        by_file.setdefault(piece.file, {})[piece.span_id] = piece
    for file, wanted in by_file.items():
        table = pa.concat_tables(corpus.frames(file, ["span_id", "pts_s", *dict.fromkeys(columns)]))
        ids = table["span_id"].to_numpy(zero_copy_only=False)
        for span, piece in wanted.items():
            rows = np.flatnonzero(ids == span)
            if len(rows) != piece.frames:
                raise RuntimeError(
                    f"{file} holds {len(rows)} frames of span {span}, not {piece.frames}"
                )
            part = table.take(pa.array(rows))
            yield piece, part["pts_s"].to_numpy(), [vector_matrix(part[c]) for c in columns]


def read_sentences(path: str | None = None) -> list[str]:
    """The text queries of a file, at any fsspec URL; by default the general ones."""
    try:
        with open_url(path or str(SENTENCES)) as file:
            lines = file.read().decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The sentences in {path} cannot be read: {error}.") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"{path} holds no sentences: one a line is expected.")
    return found


def projector_for(corpus: Corpus, space: str) -> str | None:
    """The version of the projector that a space needs, the newest. Raises `UserError` where the corpus
    cannot have the space.
    """
    share = corpus.config.pairs
    if space in ("clip", "fused") and share < 1:
        raise UserError(
            f"The corpus at {corpus.url} has CLIP vectors for a share of {share:g} of its spans only "
            f"(--pairs): the {space} space cannot be had, use --space projected."
        )
    if space == "clip":
        return None
    newest = newest_projector(corpus)
    if newest is None:
        raise UserError(
            f"The corpus at {corpus.url} has no projector yet: run 'vsearch train' first."
        )
    return newest[0]


def validation_pieces(
    corpus: Corpus, projector: str, videos: list[Content], spans: Spans
) -> list[Piece]:
    """Spans on which α is tuned: at most `TUNING_SPANS`, evenly of the videos that a projector was not
    trained on; of all videos, where there are fewer than `TUNING_VIDEOS` of those.
    """
    record = json.loads(corpus.read(f"projector/{projector}/config.json"))
    share = record.get("training", {}).get("validation", TrainConfig().validation)
    held_out = split_videos([content.video_id for content in videos], share)
    chosen = [content for content in videos if content.video_id in held_out]
    if len(chosen) < TUNING_VIDEOS:
        chosen = videos
    pieces = pieces_of(chosen, spans)
    few = np.linspace(0, len(pieces) - 1, min(len(pieces), TUNING_SPANS)).astype(int)
    return [pieces[place] for place in few]


def tune_alpha(corpus_url: str, projector: str, pieces: list[Piece], sentences: list[str]) -> Entry:
    """The `alpha` of a fused space, the number of `pairs` of frames that it was tuned on, and the
    `curve` that it was chosen from.
    """
    from vsearch.encoders import ClipEncoder

    corpus = Corpus(corpus_url)
    columns, project = fusion.mapping(corpus, projector, None)
    found: list[tuple[Any, ...]] = []
    for _, times, (dino, clip) in _read(corpus, pieces, [*columns, "clip"]):
        now, then = fusion.pairs(times)
        few = np.linspace(0, len(now) - 1, min(len(now), TUNING_PAIRS)).astype(int)
        if len(few):
            found.append(tuple(x[frames[few]] for frames in (now, then) for x in (dino, clip)))
    curve: list[tuple[float, float]] = []
    if found:
        text = ClipEncoder.recorded(corpus.config.clip).encode_text(sentences)
        dino, clip, dino_then, clip_then = map(np.concatenate, zip(*found, strict=True))
        curve = fusion.foretold((project(dino), clip), (project(dino_then), clip_then), text)
    count = sum(len(part[0]) for part in found)
    return {"alpha": fusion.tuned(curve), "pairs": count, "curve": curve}


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
    """The entry of the queries on which recall is measured: the vectors of the sentences, then those of
    the frames of each sample. `asked` tells what the sentences are.
    """
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


def calibration(made_up: Entry, best: list[list[float]]) -> Entry:
    """What an index tells of its scores, from the `best` that the made-up sentences have in each shard."""
    general = np.asarray(made_up["general"], np.float32)
    return confidence.Calibration.of(
        general, made_up["shares"], np.max(best, axis=0).tolist()
    ).as_json()


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
