"""What of a video is embedded, and what is not and why: so that 'not found' can be told from 'not
indexed'. Pure arithmetic on the rows of `videos` and the records of spans.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vsearch.sampling import grid_origin_s
from vsearch.schema import DecodeError, SpanRecord


@dataclass(frozen=True)
class VideoState:
    """One video and what is embedded of it.

    `status` is indexed, partial, failed or pending; `reason` says why it is not indexed in full.
    Times are seconds as a player shows them. `expected_s` is how much there should be, `indexed_s`
    how much there is, `gaps` what lies between; `expected_s` is None as long as nothing tells it.
    `errors` are those of decoding. `quarantined` videos killed their decoder in each of `attempts`
    attempts. `copies` are further URIs of the same content.
    """

    uri: str
    video_id: str
    status: str
    reason: str | None
    frames: int
    duration_s: float | None
    zero_s: float
    recorded_at: datetime
    recorded_at_source: str
    ingested_at: datetime
    copies: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    expected_s: float | None = None
    indexed_s: float = 0.0
    gaps: list[tuple[float, float]] = field(default_factory=list)
    errors: list[DecodeError] = field(default_factory=list)
    attempts: int = 1
    quarantined: bool = False
    embedded: int = 0
    decode_s: float = 0.0
    encode_s: float = 0.0


STATUSES = ("indexed", "partial", "failed", "pending")
CLOCKS = ("container", "name", "mtime", "ingest")
"""Where a recording time may come from, the most trusted first."""


def video_state(
    rows: list[dict[str, Any]], spans: list[SpanRecord], fps: float | None
) -> VideoState:
    """The state of one content, from the rows of all its places, also those that are gone (one at
    least is not), and its stored spans. `fps` is the sampling's.
    """
    # A copy found later, or a move, does not make a recording younger.
    clock = min(rows, key=lambda r: (CLOCKS.index(r["recorded_at_source"]), r["recorded_at"]))
    rows = [row for row in rows if row["status"] != "gone"]
    # A copy that cannot be read does not hide one that can.
    row = max(rows, key=lambda r: (r["status"] == "ok", r["ingested_at"], r["uri"]))
    spans = sorted(spans, key=lambda span: span.span)
    frames = sum(span.frames for span in spans)
    errors = [error for span in spans for error in span.errors]
    whole = _is_whole(spans)
    extent = _extent(row, spans)
    gaps = _gaps(row, spans, extent, fps) if extent else []
    status, reason = "indexed", None
    if row["status"] != "ok":
        status, reason = "failed", row["reason"]
    elif not whole:
        status, reason = "pending", f"{len(spans)} of about {row['expected_spans']} spans embedded"
    elif frames == 0:
        status, reason = "failed", errors[0].reason if errors else "no frame can be decoded"
    elif errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        status = "partial"
        reason = f"{errors[0].reason} at {errors[0].at_s - row['zero_s']:.3f} s{more}"
    elif lacking_s := _lacking_s(row, spans, fps):
        status = "partial"
        reason = f"the pictures end {lacking_s:.1f} s before the {row['duration_s']:.1f} s claimed"
    zero_s = row["zero_s"] or 0.0
    expected_s = extent[1] - extent[0] if extent else None
    return VideoState(
        uri=row["uri"],
        video_id=row["video_id"],
        status=status,
        reason=reason,
        frames=frames,
        duration_s=row["duration_s"],
        zero_s=zero_s,
        recorded_at=clock["recorded_at"],
        recorded_at_source=clock["recorded_at_source"],
        ingested_at=row["ingested_at"],
        copies=sorted(r["uri"] for r in rows if r is not row),
        tags={name: value for r in rows for name, value in r["tags"].items()} | row["tags"],
        expected_s=expected_s,
        indexed_s=max(0.0, expected_s - sum(b - a for a, b in gaps)) if expected_s else 0.0,
        gaps=[(a - zero_s, b - zero_s) for a, b in gaps],
        errors=[DecodeError(e.at_s - zero_s, e.reason) for e in errors],
        attempts=max([row["attempts"], *(span.attempts for span in spans)]),
        quarantined=any(span.quarantined for span in spans) or row["quarantined"],
        embedded=sum(span.embedded for span in spans),
        decode_s=sum(span.decode_s for span in spans),
        encode_s=sum(span.encode_s for span in spans),
    )


def _is_whole(spans: list[SpanRecord]) -> bool:
    return any(span.ended for span in spans) and len(spans) > max(
        (span.span for span in spans if span.ended), default=0
    )


def _last_pts_s(spans: list[SpanRecord]) -> float | None:
    return max((s.last_pts_s for s in spans if s.last_pts_s is not None), default=None)


def _extent(row: dict[str, Any], spans: list[SpanRecord]) -> tuple[float, float] | None:
    """(from, to) of the video in stream time: what its header claims, else what was found. A header
    that claims less than there is gives way.
    """
    start_s, last_s = row["start_s"], _last_pts_s(spans)
    if start_s is None:
        return None
    ends = [last_s + 1 / (row["fps"] or 25.0)] if last_s is not None else []
    if row["duration_s"] is not None:
        ends.append(start_s + row["duration_s"])
    return (start_s, max(start_s, *ends)) if ends else None


def _lacking_s(row: dict[str, Any], spans: list[SpanRecord], fps: float | None) -> float:
    """How much sooner the pictures end than the header claims; 0 for what rounding, or the sound
    behind the last picture, explains.
    """
    last_s = _last_pts_s(spans)
    if not row["duration_s"] or last_s is None:
        return 0.0
    lacking_s: float = row["start_s"] + row["duration_s"] - last_s
    allowed_s = max(2.0, 0.05 * row["duration_s"]) + (1 / fps if fps else 0)
    return lacking_s if lacking_s > allowed_s else 0.0


def _gaps(
    row: dict[str, Any],
    spans: list[SpanRecord],
    extent: tuple[float, float],
    fps: float | None,
) -> list[tuple[float, float]]:
    """The stretches of `extent` without frames: spans that lack or are quarantined, what was lost to
    errors, where reading stopped before the end, and a tail that never came. Overlaps are merged.
    """
    start_s, end_s = extent
    origin_s = grid_origin_s(start_s, row["span_s"])
    ended = [span.span for span in spans if span.ended]
    there = {span.span for span in spans if not span.quarantined}
    known = max([row["expected_spans"] - 1, *(span.span for span in spans)])
    last = max(ended) if _is_whole(spans) else known
    found = [
        (origin_s + k * row["span_s"], origin_s + (k + 1) * row["span_s"])
        for k in range(last + 1)
        if k not in there
    ]
    found += [gap for span in spans for gap in span.gaps]
    for number in ended:
        if any(span.frames for span in spans if span.span > number):  # it was not the end
            stopped_s = _last_pts_s([span for span in spans if span.span <= number])
            from_s = start_s if stopped_s is None else stopped_s
            found.append((from_s, origin_s + (number + 1) * row["span_s"]))
    if not ended:  # a header may claim more than the spans that are expected
        found.append((origin_s + (last + 1) * row["span_s"], end_s))
    last_s = _last_pts_s(spans)
    if last_s is None:
        found = [extent]
    elif ended and (_lacking_s(row, spans, fps) or any(s.quarantined and s.ended for s in spans)):
        found.append((last_s, end_s))
    merged: list[tuple[float, float]] = []
    for a, b in sorted(found):
        a, b = max(a, start_s), min(b, end_s)
        if b <= a:
            continue
        if merged and a <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return merged


def plainly_indexed(rows: pa.Table, spans: pa.Table, fps: float | None) -> pa.Table:
    """Of videos that `video_state` would find indexed in full, without gap, error or copy: `video_id`
    and what an `Overview` sums. `rows` are the places of contents, `spans` rows of `SPANS`, of a video
    that is told by one (see `Corpus.overview`). Only those that columns tell.
    """
    once = rows.group_by("content").aggregate([("uri", "count")])
    once = once.filter(pc.equal(once["uri_count"], 1))["content"].combine_chunks()
    ids = spans.group_by("video_id").aggregate([("span", "count")])
    single = ids.filter(pc.equal(ids["span_count"], 1))["video_id"].combine_chunks()
    whole = pc.and_(pc.equal(spans["span"], 0), spans["ended"])
    faults = pc.add(pc.list_value_length(spans["errors"]), pc.list_value_length(spans["gaps"]))
    whole = pc.and_(whole, pc.and_(pc.equal(faults, 0), pc.invert(spans["quarantined"])))
    spans = spans.filter(pc.and_(whole, pc.is_in(spans["video_id"], single)))
    rows = rows.filter(pc.is_in(rows["content"], once))
    told = ["content", "uri", "status", "quarantined", "start_s", "duration_s", "fps"]
    found = ["video_id", "frames", "embedded", "last_pts_s", "decode_s", "encode_s"]
    videos = rows.select(told).join(spans.select(found), "content", "video_id", "inner")
    end_s = pc.add(videos["start_s"], videos["duration_s"])
    found_s = pc.add(videos["last_pts_s"], pc.divide(1.0, videos["fps"]))
    expected_s = pc.subtract(
        pc.max_element_wise(end_s, found_s, skip_nulls=False), videos["start_s"]
    )
    allowed_s = pc.max_element_wise(2.0, pc.multiply(videos["duration_s"], 0.05))
    allowed_s = pc.add(allowed_s, 1 / fps if fps else 0.0)
    conditions = [
        pc.equal(videos["status"], "ok"),
        pc.invert(videos["quarantined"]),
        pc.greater(videos["frames"], 0),
        pc.greater(videos["fps"], 0.0),
        pc.greater(videos["duration_s"], 0.0),
        pc.greater_equal(expected_s, 0.0),
        pc.less_equal(pc.subtract(end_s, videos["last_pts_s"]), allowed_s),
    ]
    sums = {"expected_s": expected_s, "indexed_s": expected_s}
    columns = {n: sums[n] if n in sums else videos[n] for n in _SUMMED}
    plain = pa.table({"video_id": videos["content"], "uri": videos["uri"], **columns})
    return plain.filter(pc.fill_null(reduce(pc.and_, conditions), False))


class Overview:
    """What there is to say of any number of videos: sums over them, how many embedded ones the index
    does not hold, and those to show, at most `most`: first the ones that are not indexed in full.
    `indexed` is what `Snapshots.indexed` tells of the snapshot in use.
    """

    def __init__(
        self,
        states: Iterable[VideoState] = (),
        indexed: dict[str, Any] | None = None,
        only_flawed: bool = False,
        most: int | None = None,
    ) -> None:
        self.indexed = indexed
        self._in_index: frozenset[str] = indexed["videos"] if indexed else frozenset()
        self._only_flawed, self._most = only_flawed, most
        self.videos = dict.fromkeys(("total", *STATUSES, "quarantined"), 0)
        self.sums: dict[str, Any] = dict.fromkeys(_SUMMED, 0)
        self.not_in_index = 0
        self.listable = 0
        self._shown: list[VideoState] = []
        for state in states:
            self.add(state)

    def add(self, state: VideoState) -> None:
        self.videos["total"] += 1
        self.videos[state.status] += 1
        self.videos["quarantined"] += state.quarantined
        for name in _SUMMED:
            self.sums[name] += getattr(state, name) or 0
        self.not_in_index += bool(state.frames) and state.video_id not in self._in_index
        if state.status != "indexed" or not self._only_flawed:
            self.listable += 1
            self._shown.append(state)
            if self._most is not None and len(self._shown) > 2 * self._most:
                self._shown = self.shown()

    def add_sums(self, videos: pa.Table) -> None:
        """Adds videos that are indexed in full without making states of them: `video_id` and what is
        summed. They are not shown.
        """
        self.videos["total"] += videos.num_rows
        self.videos["indexed"] += videos.num_rows
        for name in _SUMMED:
            self.sums[name] += pc.sum(videos[name]).as_py() or 0
        ids = videos["video_id"].to_pylist() if self._in_index else []
        missing = sum(video_id not in self._in_index for video_id in ids)
        self.not_in_index += missing if self._in_index else videos.num_rows
        self.listable += 0 if self._only_flawed else videos.num_rows

    def shown(self) -> list[VideoState]:
        """The videos to show, sorted by URI, those first that are not indexed in full."""
        return sorted(self._shown, key=lambda s: (s.status == "indexed", s.uri))[: self._most]

    def totals(self) -> dict[str, Any]:
        """How many videos there are, by status, and the sums over all of them."""
        return {"videos": self.videos, **self.sums}

    def video(self, state: VideoState) -> dict[str, Any]:
        """A video for machines."""
        return {
            **asdict(state),
            "recorded_at": state.recorded_at.isoformat(),
            "ingested_at": state.ingested_at.isoformat(),
            "in_index": state.video_id in self._in_index,
        }

    def to_dict(self) -> dict[str, Any]:
        """All but the single videos for machines."""
        flawed = [state for state in self.shown() if state.status != "indexed"]
        return {
            **self.totals(),
            **{
                name: [{"video": s.uri, "reason": s.reason} for s in flawed if s.status == name]
                for name in ("failed", "partial", "pending")
            },
            "index": self.indexed and {**self.indexed, "videos": len(self._in_index)},
        }


_SUMMED = ("frames", "embedded", "expected_s", "indexed_s", "decode_s", "encode_s")


def totals(states: Iterable[VideoState]) -> dict[str, Any]:
    """How many videos there are, by status, and the sums over all of them."""
    return Overview(states, only_flawed=True).totals()


def as_dict(states: list[VideoState], indexed: dict[str, Any] | None) -> dict[str, Any]:
    """The coverage of a corpus for machines. `indexed` is what `Snapshots.indexed` tells of the current
    snapshot.
    """
    told = Overview(states, indexed, only_flawed=True)
    return {**told.to_dict(), "per_video": [told.video(state) for state in states]}


def json_parts(
    states: Iterable[VideoState],
    indexed: dict[str, Any] | None,
    projector: dict[str, Any] | None = None,
) -> Iterator[str]:
    """As `as_dict`, with what `drift.told` tells of the projector, the text of its JSON in parts: memory
    does not hold all videos.
    """
    told = Overview((), indexed, only_flawed=True)
    yield '{"per_video": ['
    for number, state in enumerate(states):
        told.add(state)
        yield (", " if number else "") + json.dumps(told.video(state))
    yield "], " + json.dumps({**told.to_dict(), "projector": projector})[1:]
