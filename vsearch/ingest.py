"""Videos to frames: list → probe → plan → decode → embed → Parquet, streamed by Ray Data.

What is on storage is the truth: the plan is what the corpus should hold minus what it holds, so a
repeated ingest does only what is missing.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, TaskPoolStrategy

from vsearch import runtime
from vsearch.buckets import Buckets, together
from vsearch.config import CorpusConfig, EncoderNames, Sampling, UserError
from vsearch.corpus import Corpus, newest_projector
from vsearch.decoder import ATTEMPTS, DecoderDiedError, own_decoder
from vsearch.drift import SAMPLED_FILES, Drift
from vsearch.placement import Limits, anywhere, ingest_words, plan_ingest, prefer
from vsearch.probing import PLACES, PROBED, classify, portions, probe_files, probe_tasks
from vsearch.sampling import SpanRun, has_pairs, span_id
from vsearch.schema import VIDEOS, DecodeError, SpanRecord, frames_schema
from vsearch.sources import Listed, differences, listing, name_clock
from vsearch.tasks import TASKS, missing_tasks
from vsearch.video import DecodedSpan, VideoError

SPANS_PER_FILE = 16
PORTION_TASKS = 20_000
"""So many tasks are given to Ray at a time."""
SPANS_LOST = 2
"""After so many quarantined spans in one run the rest of the run is quarantined untried: what a
poisoned file can cost has a bound."""


@dataclass(frozen=True)
class Progress:
    """How far an ingest is. `stage` is probe or embed, `done` and `total` count files or (about)
    spans; the rest is of the embedding: videos finished of those that lacked something, seconds of
    video and frames stored, frames that went through the encoders, seconds of work by stage and the
    number of workers that each has.
    """

    stage: str
    done: int
    total: int
    videos: int = 0
    videos_total: int = 0
    video_s: float = 0.0
    frames: int = 0
    embedded: int = 0
    decode_s: float = 0.0
    encode_s: float = 0.0
    decoders: int = 1
    encoders: int = 1

    @property
    def bottleneck(self) -> str:
        """The stage whose workers had more to do."""
        decoding = self.decode_s / self.decoders
        return "decoding" if decoding > self.encode_s / self.encoders else "embedding"


@dataclass(frozen=True)
class IngestSummary:
    """What one ingest did, or would do. `videos` counts the files at the sources; `found` tells how
    many of them are new, changed, moved, copy, relabelled (other tags or recording time only),
    unchanged, failed or unreadable, and how many known ones are gone. `unread` says of which videos a
    part could not be read now, and why: it stays pending. `drift` tells how the newest projector fares
    on what was stored, None without one.
    """

    videos: int
    found: dict[str, int]
    probed: int
    spans: int = 0
    frames: int = 0
    embedded: int = 0
    video_s: float = 0.0
    unread: list[str] = field(default_factory=list)
    listing: list[tuple[str, str]] = field(default_factory=list)
    drift: Drift | None = None


Report = Callable[[Progress], None]
Announce = Callable[[str], None]


def ingest(
    corpus_url: str,
    sources: list[str],
    encoders: EncoderNames,
    fps: float | None = None,
    max_change: float | None = None,
    pairs: float = 1.0,
    sync: bool = False,
    retry_failed: bool = False,
    time_pattern: str | None = None,
    dry_run: bool = False,
    limits: Limits | None = None,
    report: Report = lambda progress: None,
    announce: Announce = lambda line: None,
) -> IngestSummary:
    """Embeds what the corpus lacks of the videos at `sources` (see `sources.list_videos`). With `sync`,
    what is no longer at these sources leaves the corpus. With `retry_failed`, failed videos and spans
    with errors are tried again. `time_pattern` is strptime's, for recording times in file names.
    `dry_run` reads and compares, but changes nothing. `announce` gets a line about what the embedding
    runs on, when it begins. Raises `UserError` for a source that cannot be read or a corpus made
    otherwise.
    """
    sampling = Sampling(fps=fps, max_change=max_change)
    name_clock(time_pattern)  # a pattern that cannot be used is refused before anything is done
    listed = listing(sources, complete=sync)  # what cannot be seen is not gone
    corpus = Corpus(corpus_url)
    runtime.connect()
    with runtime.user_errors():
        if not dry_run:
            _require(corpus, encoders, sampling, pairs)
        known = corpus.findings() if corpus.exists("corpus.json") else Buckets("uri", VIDEOS)
        probed, gone = Buckets("video_id", PROBED), Buckets("video_id", PLACES)
        notes = Buckets("uri", VIDEOS)
        found: list[tuple[str, str]] = []
        counts: Counter[str] = Counter()
        for changes, rows in portions(
            differences(listed, known, sources if sync else (), retry_failed, time_pattern)
        ):
            look = _probe(corpus, changes.probe, rows, sampling, time_pattern, dry_run, report)
            before = {row["uri"]: row["video_id"] for row in rows}
            probed.add(_rows([r | {"before": before.get(r["uri"])} for r in look], PROBED))
            gone.add(_rows(changes.gone, PLACES))
            now = {"ingested_at": datetime.now(UTC)}
            notes.add(_rows([row | now for row in changes.relabel], VIDEOS))
            notes.add(_rows([row | now | {"status": "gone"} for row in changes.gone], VIDEOS))
            counts.update(unchanged=changes.unchanged, relabelled=len(changes.relabel))
            if dry_run:
                found += [(row["uri"], "relabelled") for row in changes.relabel]
        for uri, kind in classify(known, probed, gone):
            counts[kind] += 1
            if dry_run:
                found.append((uri, kind))
        summary = IngestSummary(
            videos=sum(counts.values()) - counts["gone"],
            found={kind: number for kind, number in counts.items() if number},
            probed=probed.rows,
            listing=sorted(found),
        )
        if dry_run:
            return summary
        for (table,) in together(notes):
            if table.num_rows:
                corpus.add_videos(table)
        corpus.tidy()
        corpus.enter()
        some = _Sample(SAMPLED_FILES)
        done, unread = _embed_missing(
            corpus, listed, retry_failed, limits or Limits(), some, report, announce
        )
        corpus.settle()
        corpus.enter()
        drift = None
        if some.taken and newest_projector(corpus):
            measure = _measure_drift.options(**prefer("index", runtime.nodes()))
            drift = ray.get(measure.remote(corpus.url, some.taken, done.frames))
    return replace(
        summary,
        spans=done.done,
        frames=done.frames,
        embedded=done.embedded,
        video_s=done.video_s,
        unread=unread,
        drift=drift,
    )


@ray.remote(num_cpus=1)
def _measure_drift(corpus_url: str, files: list[str], frames: int) -> Drift | None:
    from vsearch.drift import measure

    return measure(Corpus(corpus_url), files, frames)


class _Sample:
    """At most `most` of any number of names, each as likely as the others (reservoir sampling)."""

    def __init__(self, most: int) -> None:
        self.taken: list[str] = []
        self._most, self._seen, self._rng = most, 0, random.Random(0)

    def add(self, name: str) -> None:
        self._seen += 1
        if len(self.taken) < self._most:
            self.taken.append(name)
        elif (place := self._rng.randrange(self._seen)) < self._most:
            self.taken[place] = name


def _require(corpus: Corpus, names: EncoderNames, sampling: Sampling, pairs: float) -> None:
    if not corpus.exists("corpus.json"):
        describe = _describe.options(**prefer("embed", runtime.nodes()))
        corpus.require(ray.get(describe.remote(names, sampling, pairs)))
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
    corpus.require(CorpusConfig(found.dino, found.clip, found.input_px, sampling, float(pairs)))


@ray.remote(num_cpus=1)
def _describe(names: EncoderNames, sampling: Sampling, pairs: float) -> CorpusConfig:
    from vsearch.encoders import Encoders

    loaded = Encoders(names, device="cpu")
    return CorpusConfig(
        loaded.dino.record, loaded.clip.record, loaded.input_px, sampling, float(pairs)
    )


# ── probe ────────────────────────────────────────────────────────────────────────────────────────


def _probe(
    corpus: Corpus,
    new: list[Listed],
    known: list[dict[str, Any]],
    sampling: Sampling,
    time_pattern: str | None,
    dry_run: bool,
    report: Report,
) -> list[dict[str, Any]]:
    """Looks into files and stores a row for each, good or bad (none when `dry_run`); gives their
    `uri`, `video_id` and `status`.
    """
    tasks = probe_tasks(new, known)
    chunk = max(1, min(64, len(new) // (2 * runtime.cpus())))
    tables = [pa.table({"task": tasks[i : i + chunk]}) for i in range(0, len(new), chunk)]
    found: list[dict[str, Any]] = []
    report(Progress("probe", 0, len(new)))
    if tables:
        probing = ray.data.from_arrow(tables).map_batches(
            probe_files,
            fn_args=(None if dry_run else corpus.url, sampling, time_pattern),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
            **prefer("decode", runtime.nodes()),
        )
        for batch in probing.iter_batches(batch_size=None, batch_format="pyarrow"):
            found += batch.to_pylist()
            report(Progress("probe", len(found), len(new)))
    return found


def _rows(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=schema)


# ── decode, embed, store ─────────────────────────────────────────────────────────────────────────


def _embed_missing(
    corpus: Corpus,
    listed: Buckets,
    retry: bool,
    limits: Limits,
    some: _Sample,
    report: Report,
    announce: Announce,
) -> tuple[Progress, list[str]]:
    tasks = missing_tasks(corpus, listed, retry, runtime.cpus())
    planned: Counter[str] = Counter()
    for (table,) in together(tasks):
        for task in table.select(["video_id", "spans"]).to_pylist():
            planned[task["video_id"]] += task["spans"]
    progress = Progress("embed", 0, sum(planned.values()), videos_total=len(planned))
    report(progress)
    unread: list[str] = []
    for portion in _portions(tasks):
        progress = _embed(
            corpus, portion, planned, progress, unread, limits, some, report, announce
        )
    return progress, unread


def _portions(tasks: Buckets) -> Iterator[list[dict[str, Any]]]:
    held: list[dict[str, Any]] = []
    for (table,) in together(tasks):
        held += table.to_pylist()
        while len(held) >= PORTION_TASKS:
            yield held[:PORTION_TASKS]
            held = held[PORTION_TASKS:]
    if held:
        yield held


def _embed(
    corpus: Corpus,
    tasks: list[dict[str, Any]],
    planned: Counter[str],
    progress: Progress,
    unread: list[str],
    limits: Limits,
    some: _Sample,
    report: Report,
    announce: Announce,
) -> Progress:
    """Decodes, embeds and stores what the tasks say; gives the progress after that, and `some` of the
    files.
    """
    expected = progress.total
    config = corpus.config
    nodes = runtime.nodes()
    plan = plan_ingest(nodes, limits)
    sizes = runtime.gpu_memories(nodes) if plan.encoder_gpus else []
    announce(ingest_words(nodes, plan, limits.batch, sizes))
    pipeline = (
        ray.data.from_arrow([pa.Table.from_pylist([task], schema=TASKS) for task in tasks])
        .map_batches(  # 1 run of spans → its spans
            _decode_run,
            fn_args=(config,),
            batch_size=None,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(limits.decoders),
            num_cpus=1,
            **prefer("decode", nodes),
        )
        .map_batches(  # 1 : 1
            _Embedder,
            fn_constructor_args=(
                config,
                None if plan.encoder_gpus else "cpu",
                limits.batch,
                plan.encoder_threads,
            ),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=1,
                max_size=plan.most_encoders,
                initial_size=plan.encoders,
            ),
            num_cpus=plan.encoder_cpus,
            num_gpus=plan.encoder_gpus,
            memory=plan.encoder_memory,
            **prefer("embed", nodes),
        )
        .map_batches(  # spans → one file
            _store,
            fn_args=(corpus.url, config),
            batch_size=SPANS_PER_FILE,
            batch_format="pyarrow",
            num_cpus=0,
            **anywhere(nodes),
        )
    )
    encoders = plan.encoders if plan.encoder_gpus else plan.most_encoders
    progress = replace(progress, decoders=plan.decoders, encoders=encoders)
    for batch in pipeline.iter_batches(batch_size=None, batch_format="pyarrow"):
        unread += batch["problem"].drop_null().to_pylist()
        videos = batch["video_id"].drop_null().to_pylist()
        for name in batch["file"].drop_null().unique().to_pylist():
            some.add(name)
        for video_id in videos:
            planned[video_id] -= 1
        sums = {name: sum(batch[name].drop_null().to_pylist()) for name in _SUMS}
        done = progress.done + len(videos)
        progress = replace(
            progress,
            done=done,
            total=max(done, expected),
            videos=sum(left <= 0 for left in planned.values()),
            **{name: getattr(progress, name) + value for name, value in sums.items()},
        )
        report(progress)
    return progress


# From here on a row is a span; or a file that can no longer be read, which has its `problem` alone.
_DECODED = pa.schema(
    [
        ("problem", pa.string()),
        ("record", pa.string()),  # JSON
        ("pts_s", pa.list_(pa.float64())),
        ("picture", pa.list_(pa.int32())),
        ("shape", pa.list_(pa.int64())),
        ("pixels", pa.large_binary()),
    ]
)
_PIXELS = _DECODED.get_field_index("pixels")
_EMBEDDED = pa.schema(
    [
        *[_DECODED.field(name) for name in ("problem", "record", "pts_s", "picture")],
        ("dino", pa.large_binary()),
        ("clip", pa.large_binary()),
    ]
)
_STORED = pa.schema(
    [
        ("problem", pa.string()),
        ("file", pa.string()),
        ("video_id", pa.string()),
        ("frames", pa.int64()),
        ("embedded", pa.int64()),
        ("video_s", pa.float64()),
        ("decode_s", pa.float64()),
        ("encode_s", pa.float64()),
    ]
)
_SUMS = ("frames", "embedded", "video_s", "decode_s", "encode_s")


def _made_with(config: CorpusConfig) -> str:
    return f"{config.dino.revision}|{config.clip.revision}|{config.sampling}"


def _decode_run(batch: pa.Table, config: CorpusConfig) -> Iterator[pa.Table]:
    """One row a span: its record, as far as decoding knows it, its times and its pixels. Of a file
    that can no longer be read, the spans before that and a row with the `problem`: what is lacking
    stays pending, and the next ingest tries it again.
    """
    for task in batch.to_pylist():
        try:
            for span, decode_s, attempts, quarantined in _spans_of(task, config):
                if span.number in task["done"]:
                    continue
                pts_s = [float(t) for t in span.pts_s]
                name = span_id(task["video_id"], _made_with(config), span.number)
                record = SpanRecord(
                    video_id=task["video_id"],
                    span_id=name,
                    span=span.number,
                    frames=len(pts_s),
                    last_pts_s=max(pts_s, default=None),
                    ended=span.ended,
                    embedded=len(span.pixels) if pts_s else 0,
                    pairs=has_pairs(name, config.pairs),
                    errors=span.errors,
                    gaps=[(float(a), float(b)) for a, b in span.gaps],
                    attempts=task["tried"] + attempts,
                    quarantined=quarantined,
                    decode_s=round(decode_s, 4),
                )
                row = {
                    "record": json.dumps(asdict(record)),
                    "pts_s": pts_s,
                    "picture": span.picture,
                    "shape": list(span.pixels.shape),
                }
                table = pa.Table.from_pylist([row], schema=_DECODED)
                yield table.set_column(_PIXELS, _DECODED.field(_PIXELS), _not_copied(span.pixels))
        except (VideoError, OSError) as error:
            problem = {"problem": f"{task['uri']}: {error}"}
            yield pa.Table.from_pylist([problem], schema=_DECODED)


def _not_copied(pixels: NDArray[np.uint8]) -> pa.LargeBinaryArray:
    """An array of one value, which lies where the pixels lie."""
    ends = pa.array([0, pixels.nbytes], pa.int64()).buffers()[1]
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(pixels)])


def _spans_of(
    task: dict[str, Any], config: CorpusConfig
) -> Iterator[tuple[DecodedSpan, float, int, bool]]:
    """(span, seconds of decoding, attempts, quarantined) of the spans of a run. A span that kills its
    decoder is tried again, then quarantined. Raises what the decoder raises when the file cannot be
    read now.
    """
    first, stop, tries, lost = task["first"], task["stop"], 0, 0
    while stop is None or first < stop:
        try:
            spans = own_decoder().decode(
                task["uri"],
                (task["size_bytes"], task["mark"]),
                config.input_px,
                config.sampling,
                SpanRun(first, stop),
            )
            for span, seconds in spans:
                yield span, seconds, tries + 1, False
                first, tries = span.number + 1, 0
            return
        except DecoderDiedError as error:
            tries += 1
            if tries < ATTEMPTS:
                continue
            lost += 1
            # Behind it only a seek leads on; an open run, or too much lost, ends here.
            over = stop is None or not task["seekable"] or lost == SPANS_LOST
            for number in range(first, first + 1 if stop is None or not over else stop):
                at_s = task["origin_s"] + number * task["span_s"]
                reason = f"quarantined after {tries} attempts: {error}"
                yield (
                    DecodedSpan(number, errors=[DecodeError(at_s, reason)], ended=stop is None),
                    0.0,
                    tries,
                    True,
                )
            if over:
                return
            first, tries = first + 1, 0


class _Embedder:
    """The actor that holds both encoders. Without a GPU they compute in so many `threads`."""

    def __init__(
        self, config: CorpusConfig, device: str | None, batch: int | None, threads: int
    ) -> None:
        # Imported here: the workers that probe, decode and store do without torch.
        from vsearch.encoders import Encoders

        self._threads = threads
        names = EncoderNames(config.dino.model, config.clip.model)
        self._encoders = Encoders(names, device, batch)
        for part in ("dino", "clip"):
            loaded, recorded = getattr(self._encoders, part).record, getattr(config, part)
            if loaded != recorded:
                raise UserError(
                    f"The weights of {loaded.model} ({loaded.revision}) are not those that the "
                    f"corpus was made with ({recorded.revision})."
                )

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The same rows with vectors in place of pixels."""
        import torch

        # Ray has set it to 1. It counts for the thread that sets it, and this is not that of `__init__`.
        torch.set_num_threads(self._threads)
        rows = batch.select(["problem", "record", "pts_s", "picture"]).to_pylist()
        for i, row in enumerate(rows):
            if row["problem"] is not None:
                continue
            began = time.monotonic()
            record = json.loads(row["record"])
            shape = batch["shape"][i].as_py()
            pixels = np.frombuffer(batch["pixels"][i].as_buffer(), np.uint8).reshape(shape)
            dino, clip = self._encoders.embed(pixels, with_clip=record["pairs"])
            row["dino"] = dino.tobytes()
            row["clip"] = None if clip is None else clip.tobytes()
            record["encode_s"] = round(time.monotonic() - began, 4)
            row["record"] = json.dumps(record)
        return pa.Table.from_pylist(rows, schema=_EMBEDDED)


def _store(batch: pa.Table, corpus_url: str, config: CorpusConfig) -> pa.Table:
    """Writes whole spans as one frames file; gives what each of them adds, and passes problems on."""
    schema = frames_schema(config.dino.dim, config.clip.dim)
    records, tables, stored = [], [], []
    for row in batch.to_pylist():
        if row["problem"] is not None:
            stored.append({"problem": row["problem"]})
            continue
        record = SpanRecord.from_json(json.loads(row["record"]))
        times, count = row["pts_s"], record.frames
        columns = [
            pa.array([record.video_id] * count, pa.string()),
            pa.array([record.span_id] * count, pa.string()),
            pa.array([record.span] * count, pa.int32()),
            pa.array(range(count), pa.int32()),
            pa.array(times, pa.float64()),
            _vectors(row["dino"], config.dino.dim, row["picture"]),
            _vectors(row["clip"], config.clip.dim, row["picture"]),
        ]
        records.append(record)
        tables.append(pa.table(columns, schema=schema))
        stored.append(asdict(record) | {"video_s": max(times) - min(times) if times else 0.0})
    if records:
        file = Corpus(corpus_url).add_frames(pa.concat_tables(tables), records)
        stored = [row if "problem" in row else row | {"file": file} for row in stored]
    return pa.Table.from_pylist(stored, schema=_STORED)


def _vectors(data: bytes | None, dim: int, picture: list[int]) -> pa.FixedSizeListArray:
    """A vector for each frame, from those of the pictures; nulls where there are none."""
    if data is None:
        return pa.nulls(len(picture), pa.list_(pa.float16(), dim))
    rows = np.frombuffer(data, np.float16).reshape(-1, dim)[np.asarray(picture, np.int64)]
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1), pa.float16()), dim)
