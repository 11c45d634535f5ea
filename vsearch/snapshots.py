"""Snapshots of the index: immutable versions, made of parts that they share, and one pointer.

    index/CURRENT                     the version in use, swapped last
    index/<version>/manifest.json     what the snapshot is made of, with SHA-256 of every file
    index/<version>/videos.parquet    where each video lives, and in which shard its rows count
    index/parts/<key>.json            a finished part: its key says what it was made from
    index/parts/<key>-*               its files

A version ends in the SHA-256 of its manifest, so nothing of a snapshot can change unseen. A part is
made once: a build that was killed, or that follows another, finds it by its key. Of two that make the
same part at once, the first to finish it counts.
"""

import hashlib
import json
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vsearch.config import GRACE_HOURS, KEPT_SNAPSHOTS, DamagedIndexError, UserError
from vsearch.corpus import Corpus
from vsearch.coverage import VideoState
from vsearch.schema import SNAPSHOT_VIDEOS, SpanRecord
from vsearch.storage import persist, sha256

FORMAT_VERSION = 2
MOST_DEAD = 0.2
"""A shard with a larger share of dead frames is made anew, without them."""

SMALL_SHARDS = 8
"""When there would be more shards under a quarter of the full size, these are made one."""

GROWING_FRAMES = 100_000
"""A flat shard up to this size takes in what is new, rather than have another beside it."""


class UnreadableSnapshotError(DamagedIndexError):
    """The manifest of a snapshot is damaged, or of a former format."""


@dataclass(frozen=True)
class Content:
    """A video as rows are made from it: other frames, or other gaps between them, are another
    generation.
    """

    video_id: str
    generation: str
    frames: int


@dataclass(frozen=True)
class StoredShard:
    """A shard of a snapshot: `number` in its manifest, frames in all, and what counts in it."""

    number: int
    frames: int
    flat: bool
    contents: frozenset[Content]


def deal(
    videos: Sequence[Content], stored: Sequence[StoredShard], most_frames: int
) -> tuple[list[StoredShard], list[list[Content]]]:
    """(the shards that stay, contents of the new ones). A video is never divided; a shard holds at
    most `most_frames`, unless one video alone has more.
    """
    now = set(videos)
    kept = [
        shard
        for shard in stored
        if (live := sum(c.frames for c in shard.contents & now))
        and live >= (1 - MOST_DEAD) * shard.frames
    ]

    def loose() -> list[Content]:
        placed = frozenset[Content]().union(*(shard.contents for shard in kept))
        return [video for video in videos if video not in placed]

    if loose():
        kept = [shard for shard in kept if not (shard.flat and shard.frames <= GROWING_FRAMES)]
        small = [shard for shard in kept if shard.frames < most_frames / 4]
        if len(small) >= SMALL_SHARDS:
            kept = [shard for shard in kept if shard not in small]
    new: list[list[Content]] = []
    frames = 0
    for video in loose():
        if not new or frames + video.frames > most_frames:
            new.append([])
            frames = 0
        new[-1].append(video)
        frames += video.frames
    return kept, new


def key_of(*made_from: Any) -> str:
    """The key of a part, from all that it is made from (anything JSON can tell)."""
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]


Spans = dict[str, list[tuple[str, SpanRecord]]]


def spans_by_video(corpus: Corpus) -> Spans:
    """The spans of each video that has frames, in time order, with the files that they are in."""
    found: Spans = {}
    for file, span in corpus.spans().values():
        found.setdefault(span.video_id, []).append((file, span))
    return {
        video: sorted(spans, key=lambda s: s[1].span)
        for video, spans in found.items()
        if any(span.frames for _, span in spans)
    }


def gaps_of(state: VideoState) -> list[tuple[float, float]]:
    """The gaps of a video in stream time, as its frames are timed."""
    return [(a + state.zero_s, b + state.zero_s) for a, b in state.gaps]


def content_of(video_id: str, spans: Spans) -> Content:
    """What rows of a video would be made from now. Spans without frames count as well: one that is
    stored tells that the picture before it stood, one that is not makes a gap.
    """
    mine = [span for _, span in spans[video_id]]
    generation = key_of([[s.span_id, s.attempts, s.ended, s.quarantined, s.gaps] for s in mine])
    return Content(video_id, generation, sum(span.frames for span in mine))


def videos_table(
    states: Sequence[VideoState], contents: Sequence[Content], shards: Mapping[Content, int]
) -> pa.Table:
    """The videos of a snapshot, as `SNAPSHOT_VIDEOS`, by the shards that their rows are in."""
    rows = [
        {
            **asdict(content),
            "shard": shards[content],
            **{name: getattr(state, name) for name in _STATE_COLUMNS},
            "tags": sorted(state.tags.items()),
        }
        for state, content in zip(states, contents, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=SNAPSHOT_VIDEOS)


_STATE_COLUMNS = ("uri", "copies", "zero_s", "duration_s", "recorded_at", "recorded_at_source")


class Snapshots:
    """The snapshots of a corpus' index. `current` names the one in use, None when there is none."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    @property
    def current(self) -> str | None:
        try:
            return self.corpus.read("index/CURRENT").decode(errors="replace").strip()
        except FileNotFoundError:
            return None

    def require_current(self) -> str:
        """The version in use; raises `UserError` when there is none yet."""
        if (version := self.current) is None:
            self.corpus.config  # noqa: B018  says so if there is no corpus at all
            raise UserError(
                f"The corpus at {self.corpus.url} has no index yet: run 'vsearch build' or 'vsearch "
                f"index' first."
            )
        return version

    def manifest(self, version: str) -> dict[str, Any]:
        """What a snapshot is made of. Raises `UserError` if there is no such snapshot, if it is
        damaged, or of another format.
        """
        name = f"index/{version}/manifest.json"
        try:
            data = self.corpus.read(name)
        except (FileNotFoundError, ValueError):
            raise UserError(
                f"The corpus at {self.corpus.url} has no snapshot {version}: 'vsearch snapshots' lists "
                f"those that it has, 'vsearch rollback VERSION' goes to one."
            ) from None
        if not version.endswith(hashlib.sha256(data).hexdigest()[:12]):
            try:
                found = json.loads(data).get("format_version")
            except (ValueError, AttributeError):
                found = FORMAT_VERSION
            if found != FORMAT_VERSION:
                raise UnreadableSnapshotError(
                    f"Snapshot {version} has format {found}, this version of vsearch reads format "
                    f"{FORMAT_VERSION}: run 'vsearch index'."
                )
            raise UnreadableSnapshotError(
                f"{name} is damaged: its SHA-256 is not the version's; run 'vsearch index' or 'vsearch "
                f"rollback VERSION'."
            )
        manifest: dict[str, Any] = json.loads(data)
        return manifest | {"version": version}

    def current_manifest(self) -> dict[str, Any] | None:
        """The manifest of the snapshot in use, None when there is none yet."""
        version = self.current
        return None if version is None else self.manifest(version)

    def versions(self) -> list[str]:
        """All snapshots, the oldest first."""
        return [name for name in self.corpus.folders("index") if name != "parts"]

    def videos(self, manifest: dict[str, Any]) -> pa.Table:
        """The videos of a snapshot, as `schema.SNAPSHOT_VIDEOS`."""
        return pq.read_table(self.path(manifest["videos"]))

    def indexed(self) -> dict[str, Any] | None:
        """What the snapshot in use holds: `snapshot`, `kind`, `space`, `projector` (its version, None
        without one), `rows`, `frames`, and `videos`, the set of their ids. None when there is none yet.
        """
        manifest = self.current_manifest()
        if manifest is None:
            return None
        ids = pq.read_table(self.path(manifest["videos"]), columns=["video_id"])["video_id"]
        return {
            "snapshot": manifest["version"],
            **{name: manifest[name] for name in ("kind", "space", "projector", "rows", "frames")},
            "videos": frozenset(ids.to_pylist()),
        }

    # ── parts ────────────────────────────────────────────────────────────────────────────────────

    def part(self, key: str) -> dict[str, Any] | None:
        """A finished part, None if there is none."""
        try:
            found: dict[str, Any] = json.loads(self.corpus.read(f"index/parts/{key}.json"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DamagedIndexError(f"index/parts/{key}.json is damaged: {error}") from error
        return found

    def finish(self, key: str, entry: dict[str, Any]) -> dict[str, Any]:
        """Makes a part count, unless another build was first; gives the one that counts."""
        entry = {"key": key, **entry}
        if self.corpus.write_new(f"index/parts/{key}.json", json.dumps(entry).encode()):
            return entry
        return self.part(key) or entry

    def put(self, key: str, suffix: str, path: Path) -> dict[str, Any]:
        """Moves a local file to the parts; gives its entry: name, SHA-256 and size."""
        name = f"parts/{key}-{uuid.uuid4().hex[:8]}{suffix}"
        entry = {"name": name, "sha256": sha256(path), "size_bytes": path.stat().st_size}
        self.corpus.put(str(path), f"index/{name}")
        return entry

    # ── files ────────────────────────────────────────────────────────────────────────────────────

    def path(self, entry: dict[str, Any]) -> Path:
        """A file on this machine's disk, checked against its SHA-256; one from object storage is kept
        for the next time.
        """
        name = f"index/{entry['name']}"
        local = self.corpus.local_path(name)
        try:
            path = Path(local) if local else self.corpus.fetch(name, entry["sha256"])
            if path.stat().st_size == entry["size_bytes"] and sha256(path) == entry["sha256"]:
                return path
        except FileNotFoundError:
            raise DamagedIndexError(f"{name} is missing") from None
        if not local:
            path.unlink(missing_ok=True)  # the copy may be what is damaged
        raise DamagedIndexError(f"{name} is damaged: its SHA-256 is not the manifest's")

    @contextmanager
    def borrowed(self, entry: dict[str, Any]) -> Iterator[Path]:
        """As `path`, for as long as it is needed: a copy from object storage is not kept."""
        if self.corpus.local_path(""):
            yield self.path(entry)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(entry["name"]).name
            remote = self.corpus.path(f"index/{entry['name']}")
            persist(partial(self.corpus.fs.get_file, remote, str(path)))
            if sha256(path) != entry["sha256"]:
                raise DamagedIndexError(f"index/{entry['name']} is damaged")
            yield path

    # ── publish, roll back, collect ──────────────────────────────────────────────────────────────

    def publish(self, manifest: dict[str, Any], videos: pa.Table) -> str:
        """Publishes a snapshot after `manifest["parent"]`; returns its version. Raises `UserError` if
        another was published since then, and changes nothing.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "videos.parquet"
            pq.write_table(videos, path, compression="zstd")
            manifest = manifest | {"videos": self.put("videos", ".parquet", path)}
        for entry in files_of(manifest):
            if not self.corpus.exists(f"index/{entry['name']}"):
                raise UserError(
                    f"index/{entry['name']} was taken away while this snapshot was built: build again."
                )
        data = (json.dumps(manifest, indent=1) + "\n").encode()
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]  # versions sort by time
        version = f"{stamp}-{hashlib.sha256(data).hexdigest()[:12]}"
        self.corpus.write(f"index/{version}/manifest.json", data)
        parent = manifest["parent"]
        try:
            self._point_to(version, None if parent is None else f"{parent}\n".encode())
        except UserError:
            self.corpus.remove_folder(f"index/{version}")
            raise
        return version

    def _point_to(self, version: str, instead_of: bytes | None) -> None:
        if not self.corpus.swap("index/CURRENT", instead_of, f"{version}\n".encode()):
            raise UserError(
                f"Another build published snapshot {self.current} meanwhile: nothing was changed; run "
                f"the same again."
            )

    def roll_back(self, version: str | None = None) -> str:
        """Makes an earlier snapshot the one in use: the one named, else the current one's parent."""
        current = self.require_current()
        pointer = self.corpus.read("index/CURRENT")
        version = version or self.manifest(current)["parent"]
        if version is None:
            raise UserError(f"Snapshot {current} is the first: there is none to go back to.")
        for entry in files_of(self.manifest(version)):
            if not self.corpus.exists(f"index/{entry['name']}"):
                raise UserError(
                    f"Snapshot {version} is no longer whole: {entry['name']} is missing."
                )
        self._point_to(version, pointer)
        return version

    def collect(
        self, keep: int = KEPT_SNAPSHOTS, grace_s: float = GRACE_HOURS * 3600, dry_run: bool = False
    ) -> list[str]:
        """Takes away what no kept snapshot needs and is older than the grace period; gives the names.
        Kept are the snapshot in use, the `keep` − 1 before it, and every one younger than that.
        """
        if keep < 1:
            raise UserError(f"At least one snapshot must be kept, not {keep}.")
        before = datetime.now(UTC) - timedelta(seconds=grace_s)
        current, versions = self.require_current(), self.versions()
        earlier = [version for version in versions if version < current]
        kept = {current, *earlier[len(earlier) - (keep - 1) :]} if keep > 1 else {current}
        kept |= {v for v in versions if self._is_young(f"index/{v}/manifest.json", before)}
        needed: set[str] = set()
        for version in kept:
            manifest = self.manifest(version)
            for entry in files_of(manifest):
                needed |= {entry["name"], entry["name"].partition("-")[0] + ".json"}
        gone = [f"index/{version}/manifest.json" for version in versions if version not in kept]
        gone += [
            name
            for name in self.corpus.files("index/parts", "")
            if name.removeprefix("index/") not in needed and not self._is_young(name, before)
        ]
        if not dry_run:
            for name in sorted(gone, key=lambda name: not name.endswith(".json")):
                self.corpus.remove(name)
            for version in set(versions) - kept:
                self.corpus.remove_folder(f"index/{version}")
        return gone

    def _is_young(self, name: str, before: datetime) -> bool:
        try:
            return self.corpus.modified_at(name) > before
        except FileNotFoundError:
            return False


def files_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of all files that a snapshot needs."""
    found = [manifest["videos"]]
    shared = (manifest["quantizer"], manifest["queries"], manifest.get("made_up"))
    for holder in (*shared, *manifest["shards"]):
        if holder:
            found += [value for name, value in holder.items() if name.endswith("_file") and value]
    return found
