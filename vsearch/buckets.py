"""Tables that may be larger than memory, worked on bucket by bucket: rows whose keys hash alike.

Two tables in buckets of the same key are compared, joined or grouped one bucket at a time. A small
table stays in memory as one bucket, so that small work knows nothing of this.
"""

import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

BUCKETS = 256
HELD_ROWS = 100_000
"""So many rows stay in memory; each time that so many have come they are written to disk."""


class Buckets:
    """Rows by the hash of their column `key` (strings), in the order in which they were added. What
    memory does not hold lies in this machine's temporary folder as long as the object lives.
    """

    def __init__(self, key: str, schema: pa.Schema) -> None:
        self.key, self.schema = key, schema
        self.rows = 0
        self._held: list[pa.Table] = []
        self._held_rows = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._runs: list[Path] = []

    def add(self, table: pa.Table) -> None:
        """Takes rows of the schema."""
        self._held.append(table.cast(self.schema))
        self._held_rows += table.num_rows
        self.rows += table.num_rows
        if self._held_rows >= HELD_ROWS:
            self.spill()

    @property
    def spilled(self) -> bool:
        return bool(self._runs)

    def held(self) -> pa.Table:
        """The rows that are in memory."""
        return pa.concat_tables([self.schema.empty_table(), *self._held])

    def spill(self) -> None:
        """Writes what is in memory to a file, sorted by bucket: a record batch for each."""
        if not self._held_rows:
            return
        rows = pa.concat_batches(self.held().to_batches())
        numbers = _bucket_of(rows[self.key])
        rows = rows.take(np.argsort(numbers, kind="stable"))
        ends = np.bincount(numbers, minlength=BUCKETS).cumsum()
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="vsearch-")
        path = Path(self._folder.name) / f"{len(self._runs)}.arrow"
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with (
            pa.OSFile(str(path), "wb") as file,
            pa.ipc.new_file(file, self.schema, options=options) as run,
        ):
            for start, end in zip([0, *ends], ends, strict=False):
                run.write_batch(rows.slice(start, end - start))
        self._runs.append(path)
        self._held, self._held_rows = [], 0

    def bucket(self, number: int) -> pa.Table:
        """The rows of one of the `BUCKETS` buckets of a table that is all on disk."""
        batches = []
        for path in self._runs:  # opened each time: there may be more than a process may hold open
            with pa.OSFile(str(path)) as file:
                batches.append(pa.ipc.open_file(file).get_batch(number))
        return pa.Table.from_batches(batches, self.schema)


def together(*tables: Buckets) -> Iterator[tuple[pa.Table, ...]]:
    """Bucket by bucket, the rows of each of the tables whose keys hash alike: all at once if memory
    holds all of them.
    """
    if not any(table.spilled for table in tables):
        yield tuple(table.held() for table in tables)
        return
    for table in tables:
        table.spill()
    for number in range(BUCKETS):
        yield tuple(table.bucket(number) for table in tables)


def _bucket_of(keys: pa.Array) -> NDArray[np.intp]:
    # Not Python's hash: that of a string differs from process to process.
    texts = keys.cast(pa.binary()).to_pylist()
    return np.fromiter(map(zlib.crc32, texts), np.intp, len(texts)) % BUCKETS
