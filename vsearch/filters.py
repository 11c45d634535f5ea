"""Which rows of the index a query may find: by video, path, tag, time in the video, time of recording."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vsearch.config import UserError

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Filter:
    """What moments must satisfy, all of it at once; what is not given does not matter.

    A video is one of `videos` (ids or URIs), its URI, or that of a copy, matches one of the globs
    `paths`, and it carries all `tags`. A moment overlaps the seconds `from_s` … `to_s` of its video
    (as a player shows them), and the time `after` … `before` (without a zone: UTC) of its recording.
    """

    videos: Sequence[str] = ()
    paths: Sequence[str] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    from_s: float | None = None
    to_s: float | None = None
    after: datetime | None = None
    before: datetime | None = None

    def __post_init__(self) -> None:
        for name in ("videos", "paths"):
            if isinstance(getattr(self, name), str):  # whose letters would be taken one by one
                object.__setattr__(self, name, (getattr(self, name),))
        for name in ("from_s", "to_s"):
            value = getattr(self, name)
            if value is not None and math.isnan(value):
                raise UserError(f"{name} must be a number of seconds.")
        if self.from_s is not None and self.to_s is not None and self.from_s >= self.to_s:
            raise UserError(
                f"The stretch of the video is empty: it begins at {self.from_s:g} s and ends at "
                f"{self.to_s:g} s."
            )
        for name in ("after", "before"):
            at = getattr(self, name)
            if at is not None and at.tzinfo is None:
                object.__setattr__(self, name, at.replace(tzinfo=UTC))
        if self.after and self.before and self.after >= self.before:
            raise UserError(
                f"The time of recording is empty: after {self.after} and before {self.before}."
            )

    def windows(self, videos: Sequence[Mapping[str, Any]]) -> tuple[Seconds, Seconds]:
        """(from, to) of each video in seconds as a player shows them, ±∞ where nothing bounds it, NaN
        for a video that is out. `videos` are rows of `schema.SNAPSHOT_VIDEOS`.
        """
        first = np.full(len(videos), -math.inf if self.from_s is None else self.from_s, np.float64)
        last = np.full(len(videos), math.inf if self.to_s is None else self.to_s, np.float64)
        if not (self.videos or self.paths or self.tags or self.after or self.before):
            return first, last  # no video is looked at: there may be many
        for number, video in enumerate(videos):
            if not self._admits(video):
                first[number] = last[number] = math.nan
                continue
            if self.after:
                away_s = (self.after - video["recorded_at"]).total_seconds()
                first[number] = max(first[number], away_s)
            if self.before:
                away_s = (self.before - video["recorded_at"]).total_seconds()
                last[number] = min(last[number], away_s)
            if first[number] >= last[number]:
                first[number] = last[number] = math.nan
        return first, last

    def _admits(self, video: Mapping[str, Any]) -> bool:
        uris = [video["uri"], *video["copies"]]
        if self.videos and not {video["video_id"], *uris} & set(self.videos):
            return False
        if self.paths and not any(fnmatchcase(u, glob) for u in uris for glob in self.paths):
            return False
        tags = dict(video["tags"])
        return all(tags.get(name) == value for name, value in self.tags.items())
