"""What an ingest will cost, before it is begun: from a listing and a look into a sample of the videos.

>>> from vsearch.plan import Machines, plan
>>> made = plan(["s3://archive/2026"], Machines(gpus=8, gpu_type="l4", cores=128))
>>> made.total("hours"), made.bottleneck

The constants stand in `vsearch.laws`. A total is estimated by strata of file size, with the ratio to
the bytes, which are known of all files: what a large file holds is not guessed from small ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa

from vsearch import laws
from vsearch.buckets import together
from vsearch.config import PRESETS, EncoderNames, Sampling, UserError
from vsearch.probing import video_row
from vsearch.sources import Listed, each_once, listing, once

SAMPLE = 200
CONFIDENCE = 0.95
HOUR_S = 3600.0
DAY_H = 24.0
Row = dict[str, Any]


@dataclass(frozen=True)
class Machines:
    """What an ingest would run on: GPUs of one type (none: the cores embed too), and cores."""

    gpus: int = 0
    gpu_type: str | None = None
    cores: int = 16

    def __post_init__(self) -> None:
        known = ", ".join(laws.GPU_TFLOPS)
        if self.gpus < 0 or self.cores < 1:
            raise UserError("An ingest needs at least one core, and no negative number of GPUs.")
        if self.gpus and self.gpu_type is None:
            raise UserError(f"Say which GPUs they are: --gpu-type {known}.")
        if self.gpu_type is not None and self.gpu_type not in laws.GPU_TFLOPS:
            raise UserError(f"Nothing is known of the GPU {self.gpu_type!r}; known are {known}.")


@dataclass(frozen=True)
class Prices:
    """What machines and storage cost, in any currency: None where it is not given."""

    gpu_hour: float | None = None
    core_hour: float | None = None
    gb_month: float | None = None

    def __post_init__(self) -> None:
        if any(price is not None and price < 0 for price in vars(self).values()):
            raise UserError("A price cannot be negative.")


@dataclass(frozen=True)
class Figure:
    """A total with its interval, at `CONFIDENCE`, of what the sample leaves open; `basis` tells what it
    rests on: listed, sampled, counted, measured, derived. The interval is none of the laws'.
    """

    name: str
    label: str
    value: float
    low: float
    high: float
    unit: str
    basis: str
    law: str = ""


@dataclass(frozen=True)
class Plan:
    """The figures of an ingest. `files` were listed and `sampled` looked into, of which `failed` are no
    videos and `unknown` do not say how long they are, or could not be read.
    """

    files: int
    sampled: int
    failed: int
    unknown: int
    figures: list[Figure]
    bottleneck: str
    notes: list[str] = field(default_factory=list)

    def total(self, name: str) -> Figure:
        """The figure of a name; raises `KeyError` where there is none."""
        return {figure.name: figure for figure in self.figures}[name]


def plan(
    sources: list[str],
    machines: Machines | None = None,
    names: EncoderNames = PRESETS["base"],
    fps: float | None = None,
    pairs: float = 1.0,
    prices: Prices | None = None,
    sample: int = SAMPLE,
    look: Callable[[Listed], Row] | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """What the ingest of `sources` would cost. `look` gives what is found in a file as a row of
    `schema.VIDEOS`, a probe if none is given; about `sample` files are looked into, all of them if
    there are no more. Raises `UserError` for sources that cannot be listed, or encoders whose cost is
    not known.
    """
    sampling = Sampling(fps=fps)
    machines, prices = machines or Machines(), prices or Prices()
    for name in (names.dino, names.clip):
        if name not in laws.ENCODERS:
            known = ", ".join(laws.ENCODERS)
            raise UserError(f"What {name} costs is not known; known are {known}.")
    look = look or (lambda entry: video_row(entry, 0, sampling, lambda uri: None))
    strata = _strata(sources, sample)
    chosen = [(stratum, entry) for stratum in strata for entry in stratum.chosen]
    failed = unknown = 0
    for done, (stratum, entry) in enumerate(chosen, 1):
        row = look(entry)
        if row["status"] == "failed":
            failed += 1
            stratum.looks.append((entry.size_bytes, None))
        elif row["status"] != "ok" or not row.get("duration_s"):
            unknown += 1
        else:
            stratum.looks.append((entry.size_bytes, row))
        report(done, len(chosen))
    if not any(row for stratum in strata for _, row in stratum.looks):
        raise UserError("None of the files that were looked into is a video that tells its length.")
    work = _Work(names, sampling, pairs, machines)
    figures, bottleneck = _figures(strata, work, machines, prices)
    return Plan(
        files=sum(stratum.files for stratum in strata),
        sampled=len(chosen),
        failed=failed,
        unknown=unknown,
        figures=figures,
        bottleneck=bottleneck,
        notes=_notes(machines, unknown),
    )


# ── the sample ───────────────────────────────────────────────────────────────────────────────────


@dataclass
class Stratum:
    """Files of about one size: how many there are and their bytes, those to look into, and what was
    found, by size; None for what is no video.
    """

    files: int
    size_bytes: int
    chosen: list[Listed] = field(default_factory=list)
    looks: list[tuple[int, Row | None]] = field(default_factory=list)


def _strata(sources: list[str], sample: int) -> list[Stratum]:
    """The files by size, each stratum up to four times as large as the one before, with a random sample
    of each: as many as its share of the bytes, two at least. The same listing gives the same sample.
    """
    rng = np.random.default_rng(0)
    totals: dict[int, list[int]] = {}
    drawn: dict[int, pa.Table] = {}
    for (table,) in together(listing(sources)):
        table = once(table)
        sizes = np.maximum(table["size_bytes"].to_numpy(), 1)
        numbers = (np.log2(sizes) // 2).astype(int)
        table = table.append_column("lot", pa.array(rng.random(len(sizes))))
        for number in np.unique(numbers):
            mine = numbers == number
            known = totals.setdefault(int(number), [0, 0])
            known[0] += int(mine.sum())
            known[1] += int(sizes[mine].sum())
            held = [drawn[number]] if number in drawn else []
            lots = pa.concat_tables([*held, table.filter(pa.array(mine))]).sort_by("lot")
            drawn[number] = lots.slice(0, sample)
    everything = sum(size for _, size in totals.values())
    files = sum(count for count, _ in totals.values())
    strata = []
    for number, (count, size) in sorted(totals.items()):
        wanted = count if files <= sample else max(2, round(sample * size / everything))
        table = drawn[number].slice(0, min(count, wanted)).drop_columns("lot")
        strata.append(Stratum(count, size, each_once(table)))
    return strata


@dataclass(frozen=True)
class Estimate:
    """A total and its interval at `CONFIDENCE`."""

    value: float
    low: float
    high: float

    def __mul__(self, factor: float) -> "Estimate":
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


def estimate(strata: list[Stratum], amount: Callable[[Row], float]) -> Estimate:
    """The total of what `amount` gives of each video, by the separate ratio estimator: a stratum's
    bytes by what its sample has for each of its own. Of a stratum that was looked into as a whole it
    is exact. A stratum without a look is taken for the mean of the others.
    """
    value = variance = 0.0
    looks = [(size, amount(row) if row else 0.0) for s in strata for size, row in s.looks]
    usual = sum(y for _, y in looks) / sum(size for size, _ in looks)
    for stratum in strata:
        found = [(size, amount(row) if row else 0.0) for size, row in stratum.looks]
        count = len(found)
        if count == stratum.files:
            value += sum(y for _, y in found)
            continue
        ratio = sum(y for _, y in found) / sum(x for x, _ in found) if found else usual
        value += ratio * stratum.size_bytes
        rest = [y - ratio * x for x, y in found]
        # One look tells nothing of how much they differ: then as much as the total itself.
        spread = (
            sum(r * r for r in rest) / (count - 1)
            if count > 1
            else (ratio * _mean_size(stratum)) ** 2
        )
        variance += stratum.files**2 * (1 - count / stratum.files) * spread / max(1, count)
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt(variance)
    return Estimate(value, max(0.0, value - reach), value + reach)


def _mean_size(stratum: Stratum) -> float:
    return stratum.size_bytes / stratum.files


# ── the arithmetic ───────────────────────────────────────────────────────────────────────────────


class _Work:
    """What one video costs: each method gives an amount from a row of `schema.VIDEOS`."""

    def __init__(
        self, names: EncoderNames, sampling: Sampling, pairs: float, machines: Machines
    ) -> None:
        dino, clip = laws.ENCODERS[names.dino], laws.ENCODERS[names.clip]
        self._fps = sampling.fps
        self.gflop = dino.gflop + pairs * clip.gflop
        self.frame_bytes = (
            2 * (dino.dim + pairs * clip.dim) * laws.FRAME_BYTES_PER_VECTOR_BYTE.value
        )
        self.index_dim = clip.dim
        if machines.gpus:
            tflops = laws.GPU_TFLOPS[str(machines.gpu_type)].value
            self.frames_s = 1000 * tflops * laws.GPU_UTILISATION.value / self.gflop
        else:
            self.frames_s = laws.CORE_GFLOP_S.value / self.gflop

    def hours(self, row: Row) -> float:
        return float(row["duration_s"]) / HOUR_S

    def source_frames(self, row: Row) -> float:
        return float(row["duration_s"] * (row["fps"] or laws.USUAL_FPS))

    def frames(self, row: Row) -> float:
        """Those that are kept."""
        native = self.source_frames(row)
        return native if self._fps is None else min(native, row["duration_s"] * self._fps)

    def decode_core_h(self, row: Row) -> float:
        megapixels = row["width"] * row["height"] / 1e6
        codec = row["codec"] if row["codec"] in laws.DECODE_S_PER_MP else laws.OTHER_CODEC
        decode_s = self.source_frames(row) * megapixels * laws.DECODE_S_PER_MP[codec].value
        each_s = laws.KEEP_S_PER_FRAME.value + megapixels * laws.KEEP_S_PER_MP.value
        return (decode_s + self.frames(row) * each_s) / HOUR_S

    def spans(self, row: Row) -> float:
        return float(row["expected_spans"])


def _figures(
    strata: list[Stratum], work: _Work, machines: Machines, prices: Prices
) -> tuple[list[Figure], str]:
    files = sum(stratum.files for stratum in strata)
    read_bytes = sum(stratum.size_bytes for stratum in strata)
    found: list[Figure] = []

    def add(
        name: str, label: str, value: Estimate, unit: str, basis: str, law: str = ""
    ) -> Estimate:
        found.append(Figure(name, label, value.value, value.low, value.high, unit, basis, law))
        return value

    def exactly(value: float) -> Estimate:
        return Estimate(value, value, value)

    add("files", "files", exactly(files), "", "listed")
    add("read_bytes", "bytes to read", exactly(read_bytes), "B", "listed")
    add("hours", "video", estimate(strata, work.hours), "h", "sampled")
    frames = add("frames", "frames to embed", estimate(strata, work.frames), "", "sampled")
    spans = add("spans", "spans", estimate(strata, work.spans), "", "sampled")
    decode_h = add(
        "decode_core_h", "decoding", estimate(strata, work.decode_core_h), "core-h", "measured",
        f"{laws.DECODE_S_PER_MP['h264'].value * 1000:g} ms/megapixel of H.264, and so on by codec",
    )  # fmt: skip
    embed_h = frames * (1 / work.frames_s / HOUR_S)
    if machines.gpus:
        tflops = laws.GPU_TFLOPS[str(machines.gpu_type)].value
        law = f"{work.frames_s:,.0f} frames/s: {work.gflop:.0f} GFLOP each, "
        law += f"{laws.GPU_UTILISATION.value:.0%} of {tflops:g} TFLOP/s"
        add("gpu_h", f"embedding on {machines.gpu_type}", embed_h, "GPU-h", "derived", law)
        stages = {
            "decoding": decode_h * (1 / machines.cores),
            "embedding": embed_h * (1 / machines.gpus),
        }
        cores = exactly(decode_h.value / embed_h.value if embed_h.value else 0.0)
        add(
            "cores_per_gpu",
            "cores to keep a GPU busy",
            cores,
            "",
            "derived",
            "decoding by embedding",
        )
    else:
        law = f"{work.frames_s:.2g} frames/s a core: {work.gflop:.0f} GFLOP each"
        add("embed_core_h", "embedding on cores", embed_h, "core-h", "measured", law)
        stages = {"both": _sum(decode_h, embed_h) * (1 / machines.cores)}
    wall_h = max(stages.values(), key=lambda stage: stage.value)
    bottleneck = max(stages, key=lambda name: stages[name].value)
    if bottleneck == "both":
        bottleneck = "decoding" if decode_h.value > embed_h.value else "embedding"
    basis = "derived" if machines.gpus and bottleneck == "embedding" else "measured"
    what = f"{machines.gpus} GPUs, " if machines.gpus else ""
    add(
        "days", f"days with {what}{machines.cores} cores", wall_h * (1 / DAY_H), "days", basis,
        f"{bottleneck} is the bottleneck",
    )  # fmt: skip
    rate = read_bytes / (wall_h.value * HOUR_S) if wall_h.value else 0.0
    add("read_bytes_s", "to read meanwhile", exactly(rate), "B/s", basis)
    stored = add(
        "frames_bytes", "frames on storage", frames * work.frame_bytes, "B", "measured",
        f"{work.frame_bytes:,.0f} B a frame",
    )  # fmt: skip
    requests = exactly(
        math.ceil(files / laws.LISTED_PER_REQUEST.value)
        + files * laws.PROBE_REQUESTS.value
        + read_bytes / laws.RANGE_BYTES.value
    )
    add(
        "read_requests",
        "requests to the sources",
        requests,
        "",
        "measured",
        "listing, probes, ranges",
    )
    add(
        "frames_files", "frames files", spans * (1 / laws.SPANS_PER_FILE.value), "", "counted",
        f"{laws.SPANS_PER_FILE.value:g} spans each",
    )  # fmt: skip
    rows = add(
        "rows", "rows of the index", frames * (1 / laws.FRAMES_PER_ROW.value), "", "measured",
        f"{laws.FRAMES_PER_ROW.value:g} frames a moment in drawn worlds; at most a row a frame",
    )  # fmt: skip
    dim = work.index_dim
    coded = rows.value > laws.FLAT_ROWS.value  # a flat index holds its vectors, and no codes
    ram = dim / 4 + laws.ROW_RAM_BYTES.value if coded else 2 * dim
    disk = 2 * dim + laws.ROW_DISK_BYTES.value + (dim / 4 if coded else 0)
    add("index_ram_bytes", "memory of the index", rows * ram, "B", "measured", f"{ram:g} B a row")
    kept = add("index_bytes", "index on storage", rows * disk, "B", "measured", f"{disk:g} B a row")
    if prices.gpu_hour is not None or prices.core_hour is not None:
        each = machines.gpus * (prices.gpu_hour or 0) + machines.cores * (prices.core_hour or 0)
        law = "the time by all machines, busy or not"
        add("cost", "cost of the machines", wall_h * each, "", basis, law)
    if prices.gb_month is not None:
        month = _sum(stored, kept) * (prices.gb_month / 1e9)
        add("cost_month", "cost of the storage, a month", month, "", "measured", "frames and index")
    return found, bottleneck


def _sum(a: Estimate, b: Estimate) -> Estimate:
    """Of two that rest on one sample: they err together."""
    return Estimate(a.value + b.value, a.low + b.low, a.high + b.high)


def _notes(machines: Machines, unknown: int) -> list[str]:
    notes = [
        f"Intervals are those of the sample alone ({CONFIDENCE:.0%}); what is measured was so on one "
        f"machine, and yours differs."
    ]
    if machines.gpus:
        notes.append("What is derived was measured on no GPU: trust it to a factor of two.")
    if unknown:
        notes.append(
            f"{unknown} of the sample do not tell how long they are: taken for the others."
        )
    return notes
