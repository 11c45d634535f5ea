"""The query engine over one snapshot of the index, without Ray: a sentence in, segments out.

>>> import vsearch
>>> print(vsearch.open("./corpus").search("a red car on the beach"))
"""

import html
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vsearch.config import UserError
from vsearch.corpus import Corpus
from vsearch.index import DamagedIndexError, Shard, sha256
from vsearch.moments import grow

if TYPE_CHECKING:
    import pandas as pd

    from vsearch.encoders import ClipEncoder

FIRST_HITS = 200


@dataclass(frozen=True)
class Segment:
    """A stretch of one video that answers a query. Times are seconds as a player seeks; `best_s` is
    its strongest frame, `score` its mean cosine, `recorded_at` the absolute time of its start.
    """

    video: str
    start_s: float
    end_s: float
    best_s: float
    score: float
    recorded_at: str
    video_id: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Results(Sequence[Segment]):
    """The answer to one query: a sequence of segments, strongest first."""

    query: str
    snapshot: str
    took_ms: float
    segments: tuple[Segment, ...]

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
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(s.video)}<td>{clock(s.start_s)}<td>{clock(s.end_s)}<td>{s.score:.3f}</tr>"
            for s in self.segments
        )
        head = "<tr><th>video<th>from<th>to<th>score</tr>"
        return f"<b>{html.escape(self.query)}</b><table>{head}{rows}</table>"


def clock(seconds: float) -> str:
    """`1:02:03.4`, or `2:03.4` under an hour."""
    tenths = round(max(0.0, seconds) * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    text = f"{minutes:02d}:{rest / 10:04.1f}" if hours else f"{minutes}:{rest / 10:04.1f}"
    return f"{hours}:{text}" if hours else text


@dataclass(frozen=True)
class _Timeline:
    """A loaded shard with its rows: `video` (rows,) int32, `start_s`, `end_s` (rows,) float64, and
    for each video number the rows that are its own.
    """

    shard: Shard
    video: NDArray[np.int32]
    start_s: NDArray[np.float64]
    end_s: NDArray[np.float64]


class Engine:
    """Searches one snapshot of a corpus' index; it never changes while the engine lives."""

    def __init__(self, corpus_url: str, snapshot: str | None = None) -> None:
        self.corpus = Corpus(corpus_url)
        self.snapshot = snapshot or current_snapshot(self.corpus)
        name = f"index/{self.snapshot}/manifest.json"
        try:
            self.manifest: dict[str, Any] = json.loads(self.corpus.read(name))
        except FileNotFoundError:
            raise UserError(
                f"The corpus at {corpus_url} has no snapshot {self.snapshot}."
            ) from None
        self._mean = np.asarray(self.manifest["mean"], np.float32)
        self.videos = pq.read_table(self._file(self.manifest["videos"])).to_pylist()
        self._timelines = [self._load(entry) for entry in self.manifest["shards"]]

    @property
    def rows(self) -> int:
        return sum(timeline.shard.rows for timeline in self._timelines)

    def search(self, query: str, limit: int = 10, max_gap_s: float = 1.0) -> Results:
        """The `limit` strongest segments for a sentence. Neighbouring frames that answer about
        equally well, with gaps of at most `max_gap_s` seconds, make one segment.
        """
        if not query.strip():
            raise UserError("The query is empty: type what the moment should show.")
        began = time.perf_counter()
        vector = self.encoder.encode_text([query])[0]
        segments = self.search_vector(vector, limit, max_gap_s)
        took_ms = (time.perf_counter() - began) * 1000
        return Results(query, self.snapshot, took_ms, tuple(segments))

    def search_vector(
        self, vector: NDArray[np.float32], limit: int, max_gap_s: float = 1.0
    ) -> list[Segment]:
        """As `search`, for a unit vector (dim,) of CLIP's space."""
        if limit < 1:
            raise UserError(f"The limit must be at least 1, not {limit}.")
        if max_gap_s < 0:
            raise UserError(f"The largest gap must not be negative: {max_gap_s}.")
        background = float(self._mean @ vector)
        taken = [np.zeros(timeline.shard.rows, bool) for timeline in self._timelines]
        found: list[Segment] = []
        hits = FIRST_HITS
        while True:
            scores, parts, rows = self._hits(vector, hits)
            place = 0
            while (place := _next_free(taken, parts, rows, place)) < len(rows):
                # A segment's score is a mean, so no more than its peak: weaker peaks cannot matter.
                strong = sorted((segment.score for segment in found), reverse=True)[:limit]
                if len(strong) == limit and scores[place] <= strong[-1]:
                    break
                part, row = int(parts[place]), int(rows[place])
                found.append(self._grow(vector, part, row, background, max_gap_s, taken[part]))
            # Many hits may lie in few segments: ask for more until there are enough, or no more.
            if len(found) >= limit or hits >= self.rows:
                return sorted(found, key=lambda segment: -segment.score)[:limit]
            hits *= 4

    def _hits(
        self, vector: NDArray[np.float32], hits: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """(scores, shards, rows) of the strongest hits over all shards, strongest first."""
        answers = [timeline.shard.search(vector, hits) for timeline in self._timelines]
        scores = np.concatenate([part for part, _ in answers])
        rows = np.concatenate([part for _, part in answers])
        shards = np.repeat(np.arange(len(answers)), [len(part) for part, _ in answers])
        order = np.argsort(-scores, kind="stable")[:hits]
        return scores[order], shards[order], rows[order]

    def _grow(
        self,
        vector: NDArray[np.float32],
        part: int,
        row: int,
        background: float,
        max_gap_s: float,
        taken: NDArray[np.bool_],
    ) -> Segment:
        """The segment around a row; marks its rows as taken."""
        timeline = self._timelines[part]
        number = timeline.video[row]
        lowest, highest = np.searchsorted(timeline.video, [number, number + 1])
        stretch = grow(
            row,
            int(lowest),
            int(highest),
            partial(timeline.shard.scores, vector),
            timeline.start_s,
            timeline.end_s,
            background,
            max_gap_s,
            taken,
        )
        taken[stretch.first : stretch.last + 1] = True
        return self._segment(timeline, stretch.first, stretch.last, stretch.best, stretch.score)

    def _segment(
        self, timeline: _Timeline, first: int, last: int, best: int, score: float
    ) -> Segment:
        video = self.videos[int(timeline.video[best])]
        start_s = float(timeline.start_s[first]) - video["zero_s"]
        recorded_at: datetime = video["recorded_at"] + timedelta(seconds=start_s)
        return Segment(
            video=video["uri"],
            start_s=round(start_s, 6),
            end_s=round(float(timeline.end_s[last]) - video["zero_s"], 6),
            best_s=round(float(timeline.start_s[best]) - video["zero_s"], 6),
            score=round(score, 6),
            recorded_at=recorded_at.isoformat(),
            video_id=video["video_id"],
        )

    @cached_property
    def encoder(self) -> "ClipEncoder":
        """CLIP, loaded at the first query; refused if its weights are not the corpus'."""
        from vsearch.encoders import ClipEncoder

        recorded = self.corpus.config.clip
        encoder = ClipEncoder(recorded.model)
        if encoder.record != recorded:
            raise UserError(
                f"The weights of {recorded.model} ({encoder.record.revision}) are not those that the "
                f"corpus was made with ({recorded.revision})."
            )
        return encoder

    def _load(self, entry: dict[str, Any]) -> _Timeline:
        rows = pq.read_table(self._file(entry["rows_file"]))
        ivf = entry.get("faiss_file")
        shard = Shard(
            self._file(entry["vectors_file"]),
            entry["rows"],
            self.manifest["dim"],
            self._file(ivf) if ivf else None,
            self.manifest["nprobe"],
        )
        if rows.num_rows != shard.rows:
            raise DamagedIndexError(f"{entry['rows_file']['name']} does not fit its vectors")
        return _Timeline(
            shard,
            rows["video"].to_numpy(),
            rows["start_s"].to_numpy(),
            rows["end_s"].to_numpy(),
        )

    def _file(self, entry: dict[str, Any]) -> Path:
        """A file of the snapshot on this machine's disk, checked against its SHA-256."""
        name = f"index/{self.snapshot}/{entry['name']}"
        local = self.corpus.local_path(name)
        path = Path(local) if local else self.corpus.fetch(name, entry["sha256"])
        if not path.exists():
            raise DamagedIndexError(f"{name} is missing")
        if sha256(path) != entry["sha256"]:
            raise DamagedIndexError(f"{name} is damaged: its SHA-256 is not the manifest's")
        return path


def _next_free(
    taken: list[NDArray[np.bool_]],
    parts: NDArray[np.int64],
    rows: NDArray[np.int64],
    place: int,
    piece: int = 1024,
) -> int:
    """The first place at or after `place` whose row no segment has taken, len(rows) if there is none."""
    while place < len(rows):
        stop = place + piece
        used = np.empty(len(rows[place:stop]), bool)
        for part, mask in enumerate(taken):
            mine = parts[place:stop] == part
            used[mine] = mask[rows[place:stop][mine]]
        free = np.flatnonzero(~used)
        if len(free):
            return place + int(free[0])
        place = stop
    return len(rows)


def current_snapshot(corpus: Corpus) -> str:
    """The version that `index/CURRENT` names."""
    try:
        return corpus.read("index/CURRENT").decode().strip()
    except FileNotFoundError:
        corpus.config  # noqa: B018  says so if there is no corpus at all
        raise UserError(
            f"The corpus at {corpus.url} has no index yet: run 'vsearch build' or 'vsearch index' first."
        ) from None
