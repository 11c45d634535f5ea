"""Frames to a snapshot of the index: project → quantise → shards → publish, as Ray tasks."""

import hashlib
import json
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from vsearch import runtime
from vsearch.config import UserError
from vsearch.corpus import Corpus, newest_projector, vector_matrix
from vsearch.coverage import VideoState
from vsearch.index import FLAT_ROWS, IvfPq, fill, sha256, train_quantizer
from vsearch.schema import ROWS, SpanRecord

SPACES = ("projected", "clip")
KINDS = ("auto", "flat", "ivfpq")
SHARD_ROWS = 5_000_000
TRAINING_ROWS_PER_CELL = 100


@dataclass(frozen=True)
class IndexSummary:
    """The snapshot in use afterwards; `new` tells whether it was built now."""

    snapshot: str
    new: bool
    kind: str
    space: str
    rows: int
    shards: int


@dataclass(frozen=True)
class _Piece:
    """A stored span in a shard: its rows start at `offset`."""

    file: str
    span_id: str
    video: int
    offset: int
    frames: int


def build_index(
    corpus_url: str,
    kind: str = "auto",
    space: str = "projected",
    shard_rows: int = SHARD_ROWS,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> IndexSummary:
    """Builds and publishes a snapshot of all embedded frames, unless the current one is that already.
    `space` is 'projected' (DINO through the newest projector) or 'clip' (CLIP's image vectors).
    """
    if kind not in KINDS:
        raise UserError(f"There is no index kind {kind!r}; choose one of {', '.join(KINDS)}.")
    if space not in SPACES:
        raise UserError(f"There is no space {space!r}; choose one of {', '.join(SPACES)}.")
    corpus = Corpus(corpus_url)
    config = corpus.config
    if space == "clip" and config.pairs < 1:
        raise UserError(
            f"The corpus at {corpus_url} has CLIP vectors for a share of {config.pairs:g} of its spans "
            f"only (--pairs): the clip space cannot be had, use --space projected."
        )
    projector = None
    if space == "projected":
        newest = newest_projector(corpus)
        if newest is None:
            raise UserError(
                f"The corpus at {corpus_url} has no projector yet: run 'vsearch train' first."
            )
        projector = newest[0]
    spans = corpus.spans()
    videos = [s for s in corpus.states() if s.frames]
    shards = _shards(spans, videos, shard_rows)
    rows = sum(piece.frames for shard in shards for piece in shard)
    if not rows:
        raise UserError(f"The corpus at {corpus_url} holds no frames yet: ingest videos first.")
    kind = ("flat" if rows <= FLAT_ROWS else "ivfpq") if kind == "auto" else kind
    shape = IvfPq.for_rows(rows) if kind == "ivfpq" else None
    uris = sorted((video.uri, video.video_id) for video in videos)
    stored = sorted((name, record.attempts) for name, (_, record) in spans.items())
    built_from = hashlib.sha256(
        json.dumps([stored, uris, projector, space, kind, shard_rows]).encode()
    ).hexdigest()
    current = corpus.current_manifest()
    if current and current["built_from"] == built_from:
        return IndexSummary(current["version"], False, kind, space, rows, len(shards))

    runtime.connect()
    gpus = 1 if projector and runtime.gpus() else 0
    version = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
    with runtime.user_errors():
        quantizer = (
            _train.options(num_gpus=gpus).remote(corpus.url, shards, projector, shape, rows)
            if shape
            else None
        )
        jobs = [
            _build_shard.options(num_gpus=gpus).remote(
                corpus.url, version, number, shard, projector, quantizer
            )
            for number, shard in enumerate(shards)
        ]
        report(0, len(jobs))
        waiting = list(jobs)
        while waiting:
            _, waiting = ray.wait(waiting)
            report(len(jobs) - len(waiting), len(jobs))
        entries, sums = zip(*ray.get(jobs), strict=True)
    manifest = {
        "format_version": 1,
        "version": version,
        "parent": current["version"] if current else None,
        "created_at": datetime.now(UTC).isoformat(),
        "kind": kind,
        "space": space,
        "projector": projector,
        "encoders": {"dino": asdict(config.dino), "clip": asdict(config.clip)},
        "dim": config.clip.dim,
        "rows": rows,
        "nlist": shape.nlist if shape else 0,
        "nprobe": shape.nprobe if shape else 0,
        "mean": (np.sum(sums, axis=0) / rows).tolist(),
        "videos": _put_table(corpus, version, "videos.parquet", _videos_table(videos)),
        "shards": list(entries),
        "built_from": built_from,
    }
    corpus.write(f"index/{version}/manifest.json", (json.dumps(manifest) + "\n").encode())
    corpus.write("index/CURRENT", f"{version}\n".encode())
    return IndexSummary(version, True, kind, space, rows, len(shards))


def _shards(
    spans: dict[str, tuple[str, SpanRecord]], videos: list[VideoState], shard_rows: int
) -> list[list[_Piece]]:
    """Videos dealt to shards of at most `shard_rows` rows (a video is never divided), and the place
    of every span in its shard: by video, then by time.
    """
    by_video: dict[str, list[tuple[str, SpanRecord]]] = {}
    for file, span in spans.values():
        if span.frames:
            by_video.setdefault(span.video_id, []).append((file, span))
    shards: list[list[_Piece]] = []
    offset = 0
    for number, video in enumerate(videos):
        stored = sorted(by_video[video.video_id], key=lambda entry: entry[1].span)
        frames = sum(span.frames for _, span in stored)
        if not shards or offset + frames > shard_rows:
            shards.append([])
            offset = 0
        for file, span in stored:
            shards[-1].append(_Piece(file, span.span_id, number, offset, span.frames))
            offset += span.frames
    return shards


@ray.remote(num_cpus=1)
def _train(
    corpus_url: str, shards: list[list[_Piece]], projector: str | None, shape: IvfPq, rows: int
) -> Any:
    """The quantizer, trained on rows drawn evenly over all videos."""
    project = _projection(Corpus(corpus_url), projector)
    share = min(1.0, TRAINING_ROWS_PER_CELL * shape.nlist / rows)
    rng = np.random.default_rng(0)
    sample = []
    for _, _, vectors in _read(
        Corpus(corpus_url), [p for shard in shards for p in shard], project, share, rng
    ):
        sample.append(vectors)
    return train_quantizer(np.concatenate(sample).astype(np.float32), shape)


@ray.remote(num_cpus=1)
def _build_shard(
    corpus_url: str,
    version: str,
    number: int,
    pieces: list[_Piece],
    projector: str | None,
    quantizer: Any,
) -> tuple[dict[str, Any], Any]:
    """Writes one shard's files; gives its entry in the manifest and the sum of its vectors."""
    corpus = Corpus(corpus_url)
    dim = corpus.config.clip.dim
    rows = sum(piece.frames for piece in pieces)
    pts_s = np.empty(rows, np.float64)
    video = np.empty(rows, np.int32)
    total = np.zeros(dim, np.float64)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors"
        vectors = np.memmap(path, np.float16, mode="w+", shape=(rows, dim))
        for piece, times, part in _read(corpus, pieces, _projection(corpus, projector)):
            place = slice(piece.offset, piece.offset + piece.frames)
            vectors[place], pts_s[place], video[place] = part, times, piece.video
            total += part.sum(0, dtype=np.float64)
        vectors.flush()
        entry: dict[str, Any] = {"rows": rows}
        if quantizer is not None:
            faiss_path = Path(folder) / "faiss"
            faiss_path.write_bytes(fill(quantizer, vectors))
            entry["faiss_file"] = _put(corpus, version, f"shard-{number:05d}.faiss", faiss_path)
        entry["vectors_file"] = _put(corpus, version, f"vectors-{number:05d}.f16", path)
    table = pa.table({"video": video, "start_s": pts_s, "end_s": _ends(pts_s, video)}, schema=ROWS)
    entry["rows_file"] = _put_table(corpus, version, f"rows-{number:05d}.parquet", table)
    return entry, total


def _ends(pts_s: Any, video: Any) -> Any:
    """When each frame gives way to the next; the last of a video, and one before a hole, lasts as
    long as the video's frames usually do.
    """
    ends = np.empty_like(pts_s)
    for first, stop in _stretches(video):
        times = pts_s[first:stop]
        steps = np.diff(times)
        usual = float(np.median(steps[steps > 0])) if (steps > 0).any() else 0.04
        lasting = np.append(steps, usual)
        ends[first:stop] = times + np.where((lasting <= 0) | (lasting > 5 * usual), usual, lasting)
    return ends


def _stretches(video: Any) -> list[tuple[int, int]]:
    edges = [0, *(np.flatnonzero(np.diff(video)) + 1).tolist(), len(video)]
    return list(pairwise(edges))


def _projection(corpus: Corpus, projector: str | None) -> Callable[[pa.Table], Any]:
    """Frames (a table) → unit vectors float16 (n, dim)."""
    if projector is None:
        return lambda table: vector_matrix(table["clip"])
    import torch

    from vsearch.projector import Projector

    device = "cuda" if ray.get_gpu_ids() else "cpu"
    model = Projector.from_bytes(
        corpus.read(f"projector/{projector}/model.safetensors"),
        corpus.read(f"projector/{projector}/config.json"),
    ).to(device)

    @torch.inference_mode()
    def project(table: pa.Table) -> Any:
        dino = torch.from_numpy(vector_matrix(table["dino"])).to(device).float()
        return torch.nn.functional.normalize(model(dino), dim=-1).half().cpu().numpy()

    return project


def _read(
    corpus: Corpus,
    pieces: list[_Piece],
    project: Callable[[pa.Table], Any],
    share: float = 1.0,
    rng: np.random.Generator | None = None,
) -> Any:
    """(piece, times (n,), vectors (n, dim)) of each span; with a `share` below 1 of a random part
    of its frames.
    """
    by_file: dict[str, dict[str, _Piece]] = {}
    for piece in pieces:
        by_file.setdefault(piece.file, {})[piece.span_id] = piece
    for file, wanted in by_file.items():
        columns = ["span_id", "frame", "pts_s", "dino" if project.__name__ == "project" else "clip"]
        table = pa.concat_tables(corpus.frames(file, columns))
        ids = table["span_id"].to_numpy(zero_copy_only=False)
        for span, piece in wanted.items():
            rows = np.flatnonzero(ids == span)
            if len(rows) != piece.frames:
                raise RuntimeError(
                    f"{file} holds {len(rows)} frames of span {span}, not {piece.frames}"
                )
            if rng is not None and share < 1:
                rows = rows[rng.random(len(rows)) < share]
            if len(rows):
                part = table.take(pa.array(rows))
                yield piece, part["pts_s"].to_numpy(), project(part)


def _videos_table(videos: list[VideoState]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "uri": v.uri,
                "video_id": v.video_id,
                "zero_s": v.zero_s,
                "duration_s": v.duration_s,
                "recorded_at": v.recorded_at,
                "recorded_at_source": v.recorded_at_source,
            }
            for v in videos
        ]
    )


def _put(corpus: Corpus, version: str, name: str, path: Path) -> dict[str, Any]:
    entry = {"name": name, "sha256": sha256(path), "size_bytes": path.stat().st_size}
    corpus.put(str(path), f"index/{version}/{name}")
    return entry


def _put_table(corpus: Corpus, version: str, name: str, table: pa.Table) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        pq.write_table(table, path, compression="zstd")
        return _put(corpus, version, name, path)
