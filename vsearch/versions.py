"""The snapshots that a service has loaded: a new one is loaded beside the old, then takes its place."""

import logging
import threading
import time

from vsearch.config import UserError
from vsearch.corpus import Corpus
from vsearch.search import Engine
from vsearch.snapshots import Snapshots

KEPT_S = 120.0
"""So long an earlier snapshot still answers, for queries and pages of results that began with it."""

RETRY_S = 60.0
"""A snapshot that cannot be loaded is tried again after so long."""


class Versions:
    """At most two snapshots of a corpus, in memory as far as their shards differ. Thread-safe."""

    def __init__(self, corpus_url: str, part: slice = slice(None)) -> None:
        self._corpus_url, self._part = corpus_url, part
        self._snapshots = Snapshots(Corpus(corpus_url))
        self._loading = threading.Lock()
        self._failed: tuple[str | None, float] = None, 0.0
        self.problem: str | None = None
        """Why the snapshot in use on storage is not the one that answers, if it is so."""
        self._engines: list[Engine] = [Engine(corpus_url, part=part)]
        self._changed_at = time.monotonic()

    @property
    def current(self) -> Engine:
        return self._engines[0]

    @property
    def loaded(self) -> list[Engine]:
        """The current one first."""
        return list(self._engines)

    def get(self, snapshot: str) -> Engine | None:
        """The engine of a snapshot, None if it is not loaded."""
        return next((engine for engine in self._engines if engine.snapshot == snapshot), None)

    def load(self) -> Engine | None:
        """Loads the snapshot that is now in use on storage, beside the current; None if that is the
        current, or cannot be loaded (then `problem` says why).
        """
        with self._loading:
            wanted = self._snapshots.require_current()
            if wanted == self.current.snapshot:
                self.problem = None
                return None
            if (known := self.get(wanted)) is not None:
                return known
            failed, failed_at = self._failed
            if failed == wanted and time.monotonic() - failed_at < RETRY_S:
                return None
            try:
                return Engine(self._corpus_url, wanted, self._part, like=self.current)
            except UserError as error:
                # What is loaded goes on to answer; the status tells that it is not the newest.
                self._failed = wanted, time.monotonic()
                self.problem = f"Snapshot {wanted} cannot be loaded: {error}"
                logging.getLogger("ray.serve").error(self.problem)
                return None

    def take(self, engine: Engine) -> None:
        """Makes a loaded snapshot the current one; the one before stays for a while."""
        with self._loading:
            if engine.snapshot == self.current.snapshot:
                return
            self.problem, self._failed = None, (None, 0.0)
            self._engines = [engine, self.current]
            self._changed_at = time.monotonic()

    def forget(self) -> None:
        """Lets the earlier snapshot go when its time is over. A query that still uses it keeps it."""
        with self._loading:
            if time.monotonic() - self._changed_at > KEPT_S:
                self._engines = self._engines[:1]
