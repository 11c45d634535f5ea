"""The query engine over one snapshot of the index, without Ray: a sentence in, segments out.

>>> import vsearch
>>> print(vsearch.open("./corpus").search("a red car on the beach"))
"""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vsearch.confidence import Calibration, Scale
from vsearch.config import DamagedIndexError, UserError
from vsearch.corpus import Corpus
from vsearch.filters import Filter, Seconds
from vsearch.gallery import gallery
from vsearch.index import Index, Shard, one_thread
from vsearch.moments import Moments, clock
from vsearch.query import Term, compose, described, terms_of
from vsearch.segments import Grown, ShardRows, Sight, times_more
from vsearch.sizing import Setting
from vsearch.snapshots import Snapshots

if TYPE_CHECKING:
    import pandas as pd

    from vsearch.clips import Cut
    from vsearch.encoders import ClipEncoder
    from vsearch.pictures import PictureEncoder

FIRST_HITS = 1000
SURE_HITS = 200
"""So many hits at least are found with the recall that the index was tuned to; those behind them show
segments of many rows, of which one is enough.
"""
SAMPLED_ROWS = 4096
"""So many rows tell how far the scores of a query spread."""


@dataclass(frozen=True)
class Segment:
    """A stretch of one video that answers a query. Times are seconds as a player seeks; `best_s` is
    its strongest frame, `score` its mean cosine, `recorded_at` the absolute time of its start.
    `confidence` (0 to 1) is the share of made-up sentences whose best row scores less, see
    `vsearch.confidence`; None where a picture or a moment is looked for, and in snapshots of before.
    """

    video: str
    start_s: float
    end_s: float
    best_s: float
    score: float
    recorded_at: str
    video_id: str
    confidence: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Found:
    """Segments, strongest first; whether there are `more`; how long each step took, in seconds:
    `search` (candidates), `rerank` (their exact scores), `group` (segments of them).
    """

    segments: tuple[Segment, ...]
    more: bool
    took_s: dict[str, float]


@dataclass(frozen=True)
class Timeline:
    """How a video answers a query all along: `scores[i]` is the best score within `step_s` seconds from
    `start_s + i · step_s` on (as a player shows them), None where nothing of it is indexed.
    """

    start_s: float
    step_s: float
    scores: tuple[float | None, ...]


@dataclass(frozen=True)
class Results(Sequence[Segment]):
    """The answer to one query: a sequence of segments, strongest first. `background` is the query's
    mean score over the index, what anything at all scores; `more` tells that there are others.
    `hidden` counts the segments that the limit has room for but that are not sure enough;
    `hidden_more` tells that there are others as weak. `picture` gives a JPEG of a segment's best frame,
    for a notebook to show.
    """

    query: str
    snapshot: str
    took_ms: float
    segments: tuple[Segment, ...]
    background: float = 0.0
    more: bool = False
    took_s: dict[str, float] = field(default_factory=dict)
    hidden: int = 0
    hidden_more: bool = False
    picture: Callable[[Segment], bytes] | None = field(default=None, repr=False, compare=False)

    @property
    def hidden_note(self) -> str:
        """What is hidden, in a sentence; nothing if nothing is."""
        if not self.hidden:
            return ""
        matches = f"{self.hidden} weak match{'es' if self.hidden > 1 else ''}"
        some = f"{matches}, and more," if self.hidden_more else matches
        verb = "is" if self.hidden == 1 and not self.hidden_more else "are"
        first = "" if self.segments else "Nothing in the archive matches well; "
        return f"{first}{some} {verb} hidden."

    @overload
    def __getitem__(self, place: int) -> Segment: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Segment, ...]: ...
    def __getitem__(self, place: int | slice) -> Segment | tuple[Segment, ...]:
        return self.segments[place]

    def __len__(self) -> int:
        return len(self.segments)

    def to_dict(self) -> dict[str, Any]:
        """The JSON contract of `search`."""
        return {
            "query": self.query,
            "snapshot": self.snapshot,
            "took_ms": round(self.took_ms, 2),
            "took": {f"{step}_ms": round(s * 1000, 2) for step, s in self.took_s.items()},
            "background": round(self.background, 6),
            "hidden": self.hidden,
            "hidden_more": self.hidden_more,
            "segments": [segment.to_dict() for segment in self.segments],
        }

    def to_pandas(self) -> "pd.DataFrame":
        import pandas as pd

        columns = list(Segment.__dataclass_fields__)
        return pd.DataFrame([segment.to_dict() for segment in self.segments], columns=columns)

    def __str__(self) -> str:
        lines = [f"{self.query!r}: {len(self)} segments in {self.took_ms:.0f} ms"]
        for place, s in enumerate(self.segments, 1):
            lines.append(
                f"{place:3d}.  {clock(s.start_s)} – {clock(s.end_s)}  {s.score:5.3f}  {s.video}"
            )
        return "\n".join([*lines, *filter(None, [self.hidden_note])])

    def _repr_html_(self) -> str:
        return gallery(self.query, self.segments, self.picture, self.hidden_note)


def sure(
    segments: Sequence[Segment], scale: Scale | None, min_confidence: float
) -> tuple[Segment, ...]:
    """Segments, strongest first, with their confidence; without those that are less sure."""
    if scale is None:
        return tuple(segments)
    told = (replace(s, confidence=round(scale.confidence(s.score), 6)) for s in segments)
    return tuple(s for s in told if s.confidence is None or s.confidence >= min_confidence)


class Shown(NamedTuple):
    """What `Results` tells of segments and of how sure they are: see there."""

    segments: tuple[Segment, ...]
    more: bool
    hidden: int
    hidden_more: bool


def shown(
    segments: Sequence[Segment], more: bool, scale: Scale | None, min_confidence: float
) -> Shown:
    """Of segments, strongest first, with or without `more` behind them: those that are sure enough. All
    that follows one that is hidden is as weak.
    """
    told = sure(segments, scale, min_confidence)
    hidden = len(segments) - len(told)
    return Shown(told, more and not hidden, hidden, more and hidden > 0)


class Engine:
    """Searches one snapshot of a corpus' index, or a `part` of its shards; it never changes while the
    engine lives. What `like` has loaded of the same files is shared.
    """

    def __init__(
        self,
        corpus_url: str,
        snapshot: str | None = None,
        part: slice = slice(None),
        like: "Engine | None" = None,
    ) -> None:
        self.corpus = Corpus(corpus_url)
        self._snapshots = Snapshots(self.corpus)
        self.snapshot = snapshot or self._snapshots.require_current()
        self.manifest = self._snapshots.manifest(self.snapshot)
        self._mean = np.asarray(self.manifest["mean"], np.float32)
        told = self.manifest.get("calibration")  # snapshots of before lack it
        self._calibration = Calibration.from_json(told) if told else None
        table = self._snapshots.videos(self.manifest)
        self.videos: list[dict[str, Any]] = [
            row | {"tags": dict(row["tags"])} for row in table.to_pylist()
        ]
        self.numbers = {video["video_id"]: n for n, video in enumerate(self.videos)}
        shards = range(len(self.manifest["shards"]))[part]
        self._files: dict[str, Shard] = {}
        known = like._files if like else {}
        with ThreadPoolExecutor() as pool:  # most of it is the SHA-256 of the files
            loaded = list(pool.map(partial(self._load, known=known), shards))
        self._timelines = [timeline for _, timeline in loaded]
        tuning = self.manifest["tuning"]
        self.index = Index(
            [shard for shard, _ in loaded], Setting(**tuning["setting"]) if tuning else None
        )
        self._live = [timeline.numbers[timeline.video] >= 0 for timeline in self._timelines]
        self._all_live = all(mask.all() for mask in self._live)

    @property
    def rows(self) -> int:
        """Rows that count."""
        return sum(int(np.count_nonzero(mask)) for mask in self._live)

    def search(
        self,
        query: str | Sequence[Term],
        limit: int = 10,
        max_gap_s: float = 1.0,
        where: Filter | None = None,
        min_score: float | None = None,
        without: Sequence[str] = (),
        min_confidence: float = 0.0,
    ) -> Results:
        """The `limit` strongest segments for a sentence, or for several terms, of what `where` admits.
        Neighbouring frames of a shot that answer about equally well, with gaps of at most `max_gap_s`
        seconds, make one segment; those that score under `min_score` are left out, those less sure than
        `min_confidence` hidden and counted.
        """
        if not 0 <= min_confidence <= 1:
            raise UserError(f"The least confidence lies between 0 and 1, not at {min_confidence}.")
        terms = terms_of(query, without)
        _ = self.encoder  # the first query loads it, which is no part of an answer's time
        began = time.perf_counter()
        vector, scale = self._composed(terms)
        encoded_s = time.perf_counter() - began
        found = self.find(vector, limit, max_gap_s, where, min_score)
        told = shown(found.segments, found.more, scale, min_confidence)
        return Results(
            query=query if isinstance(query, str) and len(terms) == 1 else described(terms),
            snapshot=self.snapshot,
            took_ms=(time.perf_counter() - began) * 1000,
            background=self.background(vector),
            took_s={"encode": encoded_s, **found.took_s},
            picture=lambda segment: self.picture(segment.video_id, segment.best_s),
            **told._asdict(),
        )

    def vector(
        self, query: str | Sequence[Term], without: Sequence[str] = ()
    ) -> NDArray[np.float32]:
        """The unit vector (dim,) that a query is searched with, as `search` takes it."""
        return self._composed(terms_of(query, without))[0]

    def _composed(self, terms: Sequence[Term]) -> tuple[NDArray[np.float32], Scale | None]:
        """The one vector of all terms, and the scale of its scores."""
        vectors = [self._vector(term, self.encoder) for term in terms]
        spreads = self.spreads(vectors) if len(vectors) > 1 else [1.0]
        vector = compose(vectors, [term.weight for term in terms], spreads)
        return vector, self.scale(terms, vectors, spreads)

    def scale(
        self,
        terms: Sequence[Term],
        vectors: Sequence[NDArray[np.float32]],
        spreads: Sequence[float],
    ) -> Scale | None:
        """How scores of a query become confidence; None where they cannot. The same on every part."""
        if self._calibration is None:
            return None
        means = [self.background(vector) for vector in vectors]
        return self._calibration.scale(terms, vectors, spreads, means)

    def _vector(self, term: Term, encoder: "ClipEncoder") -> NDArray[np.float32]:
        if term.text is not None:
            return encoder.encode_text([term.text])[0]
        if term.picture is not None:
            return self.picture_encoder.encode(term.picture)
        assert term.video_id is not None and term.at_s is not None
        found = self.vector_at(term.video_id, term.at_s)
        if found is None:
            raise UserError(f"Nothing of {term.video_id} is indexed at {term.at_s:g} s.")
        return found

    def background(self, vector: NDArray[np.float32]) -> float:
        """The mean score of a query over the whole index."""
        return float(self._mean @ vector)

    def spreads(self, vectors: Sequence[NDArray[np.float32]]) -> list[float]:
        """The standard deviation of each query's scores over the rows of the engine."""
        if not len(self._sample):
            return [1.0] * len(vectors)
        scores = self._sample @ np.stack(vectors).T
        return [float(value) for value in scores.std(axis=0)]

    @cached_property
    def _sample(self) -> NDArray[np.float32]:
        """Vectors (n, dim), evenly from all rows."""
        step = max(1, self.index.rows // SAMPLED_ROWS)
        parts = [np.asarray(shard.vectors[::step], np.float32) for shard in self.index.shards]
        return np.concatenate(parts) if parts else np.zeros((0, self.manifest["dim"]), np.float32)

    def vector_at(self, video_id: str, at_s: float) -> NDArray[np.float32] | None:
        """The unit vector (dim,) of the row that stands for a second of a video (as a player shows it),
        or that is next to it; None where the video is not in the engine.
        """
        found = self._rows_of(video_id)
        if found is None:
            return None
        part, rows, starts, ends = found
        away_s = np.maximum(starts - at_s, at_s - ends).clip(min=0)
        row = rows.start + int(np.argmin(away_s))
        vector = np.asarray(self.index.shards[part].vectors[row], np.float32)
        return vector / np.linalg.norm(vector)

    def moments(self, video_id: str) -> Moments | None:
        """The rows of a video, times as a player shows them; None where it is not in the engine. A video
        of a snapshot from before there were shots is one shot.
        """
        found = self._rows_of(video_id)
        if found is None:
            return None
        part, rows, starts, ends = found
        timeline = self._timelines[part]
        shots = timeline.shot[rows] - timeline.shot[rows.start]
        return Moments(
            self.index.shards[part].vectors[rows],
            starts,
            ends,
            timeline.best_s[rows],
            timeline.frames[rows],
            shots.astype(np.int32),
        )

    def picture(self, video_id: str, at_s: float, width_px: int = 320) -> bytes:
        """A JPEG of what a player shows at a second of a video of the index, at most so wide; decoded in
        a process of its own. Raises `UserError` for a video that is not there, and as `Decoder.picture`.
        """
        from vsearch.decoder import own_decoder

        video = self._video(video_id)
        return own_decoder().picture(video["uri"], at_s + video["zero_s"], width_px)

    def cut(self, segment: Segment, target: Path) -> "Cut":
        """Writes a segment to a file, as `clips.cut` does."""
        from vsearch.clips import cut

        zero_s = self._video(segment.video_id)["zero_s"]
        return cut(segment.video, segment.start_s + zero_s, segment.end_s + zero_s, target)

    def _video(self, video_id: str) -> dict[str, Any]:
        if video_id not in self.numbers:
            raise UserError(f"There is no video {video_id} in the index.")
        return self.videos[self.numbers[video_id]]

    def timeline(self, video_id: str, vector: NDArray[np.float32], steps: int) -> Timeline | None:
        """How a video answers a query (dim,), in at most `steps` steps; None where it is not in the
        engine.
        """
        found = self._rows_of(video_id)
        if found is None:
            return None
        part, rows, starts, ends = found
        with one_thread():
            scores = self.index.shards[part].scores(vector, rows.start, rows.stop)
        start_s = min(0.0, float(starts.min()))
        duration_s = self.videos[self.numbers[video_id]]["duration_s"] or 0.0
        step_s = max((max(float(ends.max()), duration_s) - start_s) / steps, 1e-3)
        best = np.full(steps, -math.inf)
        # A row covers each step that it overlaps.
        first = np.floor((starts - start_s) / step_s + 1e-9).astype(np.int64).clip(0, steps - 1)
        last = np.ceil((ends - start_s) / step_s - 1e-9).astype(np.int64).clip(1, steps) - 1
        long = np.maximum(last - first, 0) + 1
        places = np.repeat(first - np.cumsum(long) + long, long) + np.arange(long.sum())
        np.maximum.at(best, places, np.repeat(scores, long))
        values = tuple(round(float(v), 6) if v > -math.inf else None for v in best)
        return Timeline(start_s, step_s, values)

    def _rows_of(self, video_id: str) -> tuple[int, slice, Seconds, Seconds] | None:
        """The part and the rows of a video, with the starts and ends of the rows."""
        wanted = self.numbers.get(video_id, -1)
        for part, timeline in enumerate(self._timelines):
            (places,) = np.nonzero(timeline.numbers == wanted)
            if wanted >= 0 and len(places):
                low, high = np.searchsorted(timeline.video, [places[0], places[0] + 1])
                rows = slice(int(low), int(high))
                return part, rows, timeline.start_s[rows], timeline.end_s[rows]
        return None

    def search_vector(
        self,
        vector: NDArray[np.float32],
        limit: int,
        max_gap_s: float = 1.0,
        where: Filter | None = None,
    ) -> list[Segment]:
        """As `search`, for a unit vector (dim,) of CLIP's space."""
        return list(self.find(vector, limit, max_gap_s, where).segments)

    def find(
        self,
        vector: NDArray[np.float32],
        limit: int,
        max_gap_s: float = 1.0,
        where: Filter | None = None,
        min_score: float | None = None,
    ) -> Found:
        """As `search`, for a unit vector (dim,) of CLIP's space; tells whether there are more."""
        with one_thread():
            return self._find(vector, limit, max_gap_s, where, min_score)

    def _find(
        self,
        vector: NDArray[np.float32],
        limit: int,
        max_gap_s: float,
        where: Filter | None,
        min_score: float | None,
    ) -> Found:
        if limit < 1:
            raise UserError(f"The limit must be at least 1, not {limit}.")
        if not max_gap_s >= 0:
            raise UserError(f"The largest gap must not be negative: {max_gap_s}.")
        began = time.perf_counter()
        took_s = {"search": 0.0, "rerank": 0.0}
        background = self.background(vector)
        windows = (where or Filter()).windows(self.videos)
        allowed = self._allowed(windows) if where else self._live
        rows_left = sum(int(np.count_nonzero(mask)) for mask in allowed)
        taken = ~np.concatenate([np.zeros(0, bool), *allowed])
        sight = Sight(self.index.shards, self._timelines, vector, taken)
        masks = None if where is None and self._all_live else allowed
        least = -math.inf if min_score is None else min_score
        # One more than asked for tells whether there are more.
        grown = Grown(sight, background, max_gap_s, least, limit + 1)
        hits = max(FIRST_HITS, limit + 1)
        sure = max(SURE_HITS, limit + 1)
        while rows_left:
            scores, parts, rows = self.index.search(vector, hits, masks, took_s, sure)
            grown.add(sight.starts[parts] + rows, scores)
            # Many hits may lie in few segments, and a segment may score less than a hit that was not
            # fetched: ask for more until neither matters, or there are no more.
            if hits >= rows_left or (len(scores) and not grown.may_be_peak(scores[-1:])[0]):
                break
            hits = math.ceil(hits * times_more(scores, max(least, grown.bar)))
        best = grown.best()
        segments = tuple(self._segment(sight.starts, *one, windows) for one in best[:limit])
        took_s["group"] = time.perf_counter() - began - sum(took_s.values())
        return Found(segments, len(best) > limit, took_s)

    def _allowed(self, windows: tuple[Seconds, Seconds]) -> list[NDArray[np.bool_]]:
        """For each shard, the rows (n,) that count and overlap the window of their video."""
        masks = []
        for timeline, live in zip(self._timelines, self._live, strict=True):
            first, last = (bound[timeline.numbers][timeline.video] for bound in windows)
            masks.append(live & (timeline.end_s > first) & (timeline.start_s < last))
        return masks

    def _segment(
        self,
        starts: NDArray[np.int64],
        first: int,
        last: int,
        best: int,
        score: float,
        windows: tuple[Seconds, Seconds],
    ) -> Segment:
        """A segment from rows counted over all shards, as far as it lies in the window of its video."""
        part = int(np.searchsorted(starts, best, side="right")) - 1
        timeline, before = self._timelines[part], starts[part]
        number = int(timeline.numbers[timeline.video[best - before]])
        video, from_s, to_s = self.videos[number], windows[0][number], windows[1][number]
        start_s = max(float(timeline.start_s[first - before]), from_s)
        end_s = min(float(timeline.end_s[last - before]), to_s)
        best_s = min(max(float(timeline.best_s[best - before]), start_s), end_s)
        recorded_at: datetime = video["recorded_at"] + timedelta(seconds=start_s)
        return Segment(
            video=video["uri"],
            start_s=round(start_s, 6),
            end_s=round(end_s, 6),
            best_s=round(best_s, 6),
            score=score,
            recorded_at=recorded_at.isoformat(),
            video_id=video["video_id"],
        )

    @cached_property
    def encoder(self) -> "ClipEncoder":
        """CLIP, loaded at the first query; refused if its weights are not the corpus'."""
        from vsearch.encoders import ClipEncoder

        return ClipEncoder.recorded(self.corpus.config.clip)

    @cached_property
    def picture_encoder(self) -> "PictureEncoder":
        """What turns pictures into vectors of the index' space, loaded at the first one."""
        from vsearch.pictures import PictureEncoder

        projector, alpha = self.manifest["projector"], self.manifest.get("alpha")
        clip = self.encoder if projector is None or alpha is not None else None
        return PictureEncoder(self.corpus, projector, clip, alpha)

    def _load(self, number: int, known: dict[str, Shard]) -> tuple[Shard, ShardRows]:
        entry = self.manifest["shards"][number]
        path = self._snapshots.path
        codes = entry["codes_file"]
        name = f"{entry['vectors_file']['sha256']} {codes['sha256'] if codes else ''}"
        shard = known.get(name) or Shard(
            path(entry["vectors_file"]),
            entry["rows"],
            self.manifest["dim"],
            path(codes) if codes else None,
        )
        self._files[name] = shard
        rows = pq.read_table(path(entry["rows_file"]))
        if rows.num_rows != shard.rows:
            raise DamagedIndexError(f"{entry['rows_file']['name']} does not fit its vectors")
        counted = {
            video["video_id"]: n for n, video in enumerate(self.videos) if video["shard"] == number
        }
        ids = rows["video_id"].unify_dictionaries().combine_chunks()
        video = ids.indices.to_numpy()
        numbers = np.array([counted.get(v, -1) for v in ids.dictionary.to_pylist()], np.int64)
        zeros = np.array([self.videos[n]["zero_s"] if n >= 0 else 0.0 for n in numbers])[video]
        start_s, end_s, best_s = (
            rows[name].to_numpy() - zeros for name in ("start_s", "end_s", "best_s")
        )
        frames = rows["frames"].to_numpy()
        shots = _shots(video, rows)
        return shard, ShardRows(video, shots, numbers, start_s, end_s, best_s, frames)


def _shots(video: NDArray[np.int32], rows: pa.Table) -> NDArray[np.int64]:
    """The shot of each row, counted over all videos; a video is one shot where that is not known."""
    begins = np.diff(video, prepend=video[:1]) != 0
    if "shot" in rows.column_names:
        shot = rows["shot"].to_numpy()
        begins |= np.diff(shot, prepend=shot[:1]) != 0
    return np.cumsum(begins, dtype=np.int64)
