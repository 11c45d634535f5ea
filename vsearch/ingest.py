"""Videos to frames: list → probe → plan → decode → embed → Parquet, streamed by Ray Data.

What is on storage is the truth: the plan is what the corpus should hold minus what it holds, so a
repeated ingest does only what is missing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from vsearch import runtime
from vsearch.config import CorpusConfig, EncoderNames, Sampling, UserError
from vsearch.corpus import Corpus
from vsearch.sampling import SpanRun, expected_spans, missing_runs, span_grid, span_id
from vsearch.schema import VIDEOS, SpanRecord, fingerprint, frames_schema
from vsearch.video import DecodedSpan, VideoError, decode, open_url, probe, seekable

VIDEO_SUFFIXES = (
    *(".3g2", ".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg"),
    *(".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)
SPANS_PER_FILE = 16
EMBEDDER_MEMORY_BYTES = 3 << 30
"""What Ray reserves for an embedding actor: two base-size models in fp32 and their activations."""
LONGEST_RUN = 8
"""Spans that one task decodes after one seek: longer runs seek less, shorter ones spread better."""


@dataclass(frozen=True)
class Progress:
    """How far an ingest is: spans of about `spans_total`, frames embedded."""

    stage: str
    done: int
    total: int
    frames: int = 0


@dataclass(frozen=True)
class IngestSummary:
    """What one ingest did; `videos` counts the files found at the sources."""

    videos: int
    probed: int
    spans: int
    frames: int


Report = Callable[[Progress], None]


def ingest(
    corpus_url: str,
    sources: list[str],
    encoders: EncoderNames,
    fps: float | None = None,
    report: Report = lambda progress: None,
) -> IngestSummary:
    """Embeds what the corpus lacks of the videos at `sources` (folders, globs or files at any
    fsspec URL). Raises `UserError` for a source that cannot be read or a corpus made otherwise.
    """
    listed = list_videos(sources)
    runtime.connect()
    corpus = Corpus(corpus_url)
    with runtime.user_errors():
        _require(corpus, encoders, Sampling(fps=fps))
        probed = _probe_new(corpus, listed, report)
        spans, frames = _embed_missing(corpus, {uri for uri, _, _ in listed}, report)
    return IngestSummary(len(listed), probed, spans, frames)


def list_videos(sources: list[str]) -> list[tuple[str, int, str]]:
    """(uri, size in bytes, change mark) of each video, sorted and without duplicates. In folders
    files count by their suffix; what is named itself, or by a glob, counts always.
    """
    found: dict[str, tuple[int, str]] = {}
    for source in sources:
        try:
            fs, path = fsspec.url_to_fs(source)
            if any(c in path for c in "*?[") and not fs.exists(path):
                entries = list(fs.glob(path, detail=True).values())
            elif fs.isdir(path):
                everything = fs.find(path, detail=True).values()
                entries = [e for e in everything if e["name"].lower().endswith(VIDEO_SUFFIXES)]
            else:
                entries = [fs.info(path)]
        except FileNotFoundError:
            raise UserError(f"There is nothing at {source}.") from None
        except Exception as error:  # each storage has errors of its own: credentials, network, name
            raise UserError(f"{source} cannot be listed: {error}.") from error
        for entry in entries:
            if entry["type"] != "directory":
                mark = entry.get("ETag") or entry.get("mtime") or entry.get("LastModified") or ""
                found[_uri(fs, entry["name"])] = (int(entry["size"] or 0), str(mark))
    if not found:
        raise UserError(f"No videos found at {', '.join(sources)}.")
    return [(uri, *found[uri]) for uri in sorted(found)]


def _uri(fs: Any, path: str) -> str:
    local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
    return path if local else str(fs.unstrip_protocol(path))


def _require(corpus: Corpus, names: EncoderNames, sampling: Sampling) -> None:
    if not corpus.exists("corpus.json"):
        corpus.require(ray.get(_describe.remote(names, sampling)))
        return
    found = corpus.config
    for role in ("dino", "clip"):
        has, asked = getattr(found, role).model, getattr(names, role)
        if has != asked:
            raise UserError(
                f"The corpus at {corpus.url} was made with {role} {has}, not {asked}: use the same "
                f"again, or another --corpus."
            )
    # The actor compares the weights when it has loaded them.
    corpus.require(CorpusConfig(found.dino, found.clip, found.input_px, sampling))


@ray.remote(num_cpus=1)
def _describe(names: EncoderNames, sampling: Sampling) -> CorpusConfig:
    from vsearch.encoders import Encoders

    encoders = Encoders(names, device="cpu")
    return CorpusConfig(encoders.dino.record, encoders.clip.record, encoders.input_px, sampling)


# ── probe ────────────────────────────────────────────────────────────────────────────────────────


def _probe_new(corpus: Corpus, listed: list[tuple[str, int, str]], report: Report) -> int:
    known = {(row["uri"], row["size_bytes"], row["etag"]) for row in corpus.videos()}
    new = [entry for entry in listed if entry not in known]
    chunk = max(1, min(64, len(new) // (2 * runtime.cpus())))
    tables = [
        pa.table(
            dict(
                zip(
                    ("uri", "size_bytes", "etag"),
                    zip(*new[i : i + chunk], strict=True),
                    strict=True,
                )
            )
        )
        for i in range(0, len(new), chunk)
    ]
    done = 0
    report(Progress("probe", 0, len(new)))
    if tables:
        probing = ray.data.from_arrow(tables).map_batches(
            _probe_batch,
            fn_args=(corpus.url, corpus.config.sampling),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
        )
        for batch in probing.iter_batches(batch_size=None, batch_format="pyarrow"):
            done += batch.num_rows
            report(Progress("probe", done, len(new)))
    return done


def _probe_batch(batch: pa.Table, corpus_url: str, sampling: Sampling) -> pa.Table:
    """Stores a row for each file, good or bad, and passes the URIs on."""
    rows = [_video_row(**entry, sampling=sampling) for entry in batch.to_pylist()]
    Corpus(corpus_url).add_videos(pa.Table.from_pylist(rows, schema=VIDEOS))
    return batch.select(["uri"])


def _video_row(uri: str, size_bytes: int, etag: str, sampling: Sampling) -> dict[str, Any]:
    now = datetime.now(UTC)
    row: dict[str, Any] = {
        "uri": uri,
        "video_id": "",
        "size_bytes": size_bytes,
        "etag": etag,
        "recorded_at": now,
        "recorded_at_source": "ingest",
        "ingested_at": now,
        "status": "failed",
    }
    try:
        with open_url(uri) as file:
            row["video_id"] = fingerprint(file, size_bytes)
            info = probe(file)
    except VideoError as error:
        return row | {"reason": str(error)}
    except (
        OSError
    ) as error:  # no fault of the content: without its mark the next ingest tries again
        return row | {"reason": f"cannot be read: {error}", "etag": ""}
    grid = span_grid(sampling, info.fps, info.start_s)
    if info.recorded_at:
        row |= {"recorded_at": info.recorded_at, "recorded_at_source": "container"}
    return row | {
        "container": info.container,
        "codec": info.codec,
        "width": info.width,
        "height": info.height,
        "fps": info.fps,
        "start_s": float(info.start_s),
        "duration_s": info.duration_s,
        "zero_s": info.zero_s,
        "span_s": float(grid.length_s),
        "expected_spans": expected_spans(grid, info.start_s, info.duration_s),
        "status": "ok",
    }


# ── decode, embed, store ─────────────────────────────────────────────────────────────────────────


def _embed_missing(corpus: Corpus, uris: set[str], report: Report) -> tuple[int, int]:
    tasks, expected = _plan(corpus, uris)
    report(Progress("embed", 0, expected))
    if not tasks:
        return 0, 0
    config = corpus.config
    gpus, cpus, memory = runtime.gpus(), runtime.cpus(), runtime.memory_bytes()
    actors = gpus or max(1, min(cpus // 2, memory // EMBEDDER_MEMORY_BYTES))
    pipeline = (
        ray.data.from_arrow([pa.Table.from_pylist([task], schema=_TASK) for task in tasks])
        .map_batches(  # 1 run of spans → its spans
            _decode_run,
            fn_args=(config.input_px, config.sampling),
            batch_size=None,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(),
            num_cpus=1,
        )
        .map_batches(  # 1 : 1
            _Embedder,
            fn_constructor_args=(config,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors),
            # Decoding must always have a core left, and a small machine must hold one actor.
            num_cpus=1 if cpus > actors else 0,
            num_gpus=1 if gpus else 0,
            memory=min(EMBEDDER_MEMORY_BYTES, memory // 2),
        )
        .map_batches(  # spans → one file
            _store,
            fn_args=(corpus.url,),
            batch_size=SPANS_PER_FILE,
            batch_format="pyarrow",
            num_cpus=0,
        )
    )
    spans = frames = 0
    for batch in pipeline.iter_batches(batch_size=None, batch_format="pyarrow"):
        spans += batch.num_rows
        frames += sum(batch["frames"].to_pylist())
        report(Progress("embed", spans, max(spans, expected), frames))
    return spans, frames


_TASK = pa.schema(
    [
        ("uri", pa.string()),
        ("video_id", pa.string()),
        ("first", pa.int32()),
        ("stop", pa.int32()),
        ("done", pa.list_(pa.int32())),
    ]
)


def _plan(corpus: Corpus, uris: set[str]) -> tuple[list[dict[str, Any]], int]:
    """The decoding tasks for what is missing, and about how many spans they will give."""
    done: dict[str, dict[int, bool]] = {}
    for _, span in corpus.spans().values():
        done.setdefault(span.video_id, {})[span.span] = span.ended
    videos = {
        row["video_id"]: row
        for row in corpus.videos()
        if row["uri"] in uris and row["status"] == "ok"
    }
    total = sum(row["expected_spans"] for row in videos.values())
    longest = max(1, min(LONGEST_RUN, total // (4 * runtime.cpus())))
    tasks: list[dict[str, Any]] = []
    expected = 0
    for video_id, row in videos.items():
        stored = done.get(video_id, {})
        alone = seekable(row["container"])
        runs = missing_runs(
            row["expected_spans"], stored, any(stored.values()), longest if alone else 1 << 30
        )
        if runs and not alone:  # such a video is decoded from its start: then once, not run by run
            runs = [SpanRun(runs[0].first, None)]
        for run in runs:
            expected += (run.stop or max(row["expected_spans"], run.first + 1)) - run.first
            tasks.append(
                {
                    "uri": row["uri"],
                    "video_id": video_id,
                    "first": run.first,
                    "stop": run.stop,
                    "done": sorted(stored),
                }
            )
    return tasks, expected


def _spans_of(uri: str, run: SpanRun, input_px: int, sampling: Sampling) -> Iterator[DecodedSpan]:
    """The spans of a run; of a file that can no longer be read, those before that. What is lacking
    stays pending, and the next ingest tries it again."""
    try:
        with open_url(uri) as file:
            yield from decode(file, probe(file), input_px, sampling, run, threads=1)
    except (VideoError, OSError) as error:
        print(f"{uri} can no longer be read: {error}", flush=True)


def _decode_run(batch: pa.Table, input_px: int, sampling: Sampling) -> Iterator[pa.Table]:
    for task in batch.to_pylist():
        run = SpanRun(task["first"], task["stop"])
        for span in _spans_of(task["uri"], run, input_px, sampling):
            if span.number not in task["done"]:
                yield pa.table(
                    {
                        "video_id": [task["video_id"]],
                        "span": pa.array([span.number], pa.int32()),
                        "pts_s": pa.array([[float(t) for t in span.pts_s]], pa.list_(pa.float64())),
                        "shape": pa.array([list(span.pixels.shape)], pa.list_(pa.int64())),
                        "pixels": pa.array([span.pixels.data], pa.large_binary()),
                        "ended": [span.ended],
                        "errors": pa.array([span.errors], pa.list_(pa.string())),
                    }
                )


class _Embedder:
    """The actor that holds both encoders."""

    def __init__(self, config: CorpusConfig) -> None:
        # Imported here: the workers that probe, decode and store do without torch.
        from vsearch.encoders import Encoders

        self._encoders = Encoders(EncoderNames(config.dino.model, config.clip.model))
        for part in ("dino", "clip"):
            loaded, recorded = getattr(self._encoders, part).record, getattr(config, part)
            if loaded != recorded:
                raise UserError(
                    f"The weights of {loaded.model} ({loaded.revision}) are not those that the "
                    f"corpus was made with ({recorded.revision})."
                )

    def __call__(self, batch: pa.Table) -> pa.Table:
        spans = batch.num_rows
        vectors: dict[str, list[bytes]] = {"dino": [], "clip": []}
        for i in range(spans):
            shape = batch["shape"][i].as_py()
            pixels = np.frombuffer(batch["pixels"][i].as_buffer(), np.uint8).reshape(shape)
            dino, clip = self._encoders.embed(pixels)
            vectors["dino"].append(dino.tobytes())
            vectors["clip"].append(clip.tobytes())
        kept = batch.drop_columns(["pixels", "shape"])
        for name, values in vectors.items():
            kept = kept.append_column(name, pa.array(values, pa.large_binary()))
        return kept


def _store(batch: pa.Table, corpus_url: str) -> pa.Table:
    """Writes whole spans as one frames file; gives the number of frames of each."""
    corpus = Corpus(corpus_url)
    config = corpus.config
    made_with = f"{config.dino.revision}|{config.clip.revision}|{config.sampling}"
    schema = frames_schema(config.dino.dim, config.clip.dim)
    records, tables = [], []
    for row in batch.to_pylist():
        times = row["pts_s"]
        count = len(times)
        record = SpanRecord(
            video_id=row["video_id"],
            span_id=span_id(row["video_id"], made_with, row["span"]),
            span=row["span"],
            frames=count,
            last_pts_s=max(times, default=None),
            ended=row["ended"],
            errors=row["errors"],
        )
        records.append(record)
        columns = [
            pa.array([record.video_id] * count, pa.string()),
            pa.array([record.span_id] * count, pa.string()),
            pa.array([record.span] * count, pa.int32()),
            pa.array(range(count), pa.int32()),
            pa.array(times, pa.float64()),
            _vectors(row["dino"], config.dino.dim),
            _vectors(row["clip"], config.clip.dim),
        ]
        tables.append(pa.table(columns, schema=schema))
    corpus.add_frames(pa.concat_tables(tables), records)
    return pa.table({"frames": [record.frames for record in records]})


def _vectors(data: bytes, dim: int) -> pa.FixedSizeListArray:
    flat = pa.array(np.frombuffer(data, np.float16), pa.float16())
    return pa.FixedSizeListArray.from_arrays(flat, dim)
