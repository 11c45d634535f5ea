"""One shard of the index: vectors of rows in fp16, and for large ones an IVF-PQ index over them.

A flat shard is searched exactly. An IVF-PQ shard proposes candidates, which are scored exactly from
the memory-mapped fp16 vectors; so scores are exact in both, and only recall can differ. All vectors
are unit vectors, a score is their inner product: the cosine.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from vsearch.config import UserError

Vectors = NDArray[np.float32]
FLAT_ROWS = 50_000
"""Up to this many rows an exact scan is as fast as an index."""

CANDIDATES_PER_HIT = 5
"""An IVF-PQ shard reranks this many candidates for each hit asked for."""


class DamagedIndexError(UserError):
    """A file of a snapshot is not what its manifest says."""


@dataclass(frozen=True)
class IvfPq:
    """The parameters of an IVF-PQ index: `nlist` cells of which `nprobe` are visited, and 4-bit
    codes of two dimensions each.
    """

    nlist: int
    nprobe: int

    @classmethod
    def for_rows(cls, rows: int) -> "IvfPq":
        """About 4·√rows cells, as a power of two, and never under 39 rows a cell (FAISS's minimum
        for k-means).
        """
        nlist = 2 ** round(math.log2(4 * math.sqrt(max(rows, 1))))
        while nlist > 1 and rows < 39 * nlist:
            nlist //= 2
        return cls(nlist, min(nlist, 256))


def train_quantizer(sample: Vectors, shape: IvfPq) -> NDArray[np.uint8]:
    """A trained, empty index, serialised: uint8 (bytes,). `sample` is float32 (n, dim)."""
    dim = sample.shape[1]
    index = faiss.index_factory(dim, f"IVF{shape.nlist},PQ{dim // 2}x4", faiss.METRIC_INNER_PRODUCT)
    index.cp.spherical = True
    index.train(sample)
    serialised: NDArray[np.uint8] = faiss.serialize_index(index)
    return serialised


def fill(quantizer: NDArray[np.uint8], vectors: NDArray[np.float16], batch: int = 65536) -> bytes:
    """The FAISS file of a shard: the trained index with the shard's rows added in order."""
    index = faiss.deserialize_index(quantizer)
    for start in range(0, len(vectors), batch):
        index.add(np.asarray(vectors[start : start + batch], np.float32))
    data: bytes = faiss.serialize_index(index).tobytes()
    return data


def exact_search(
    vectors: NDArray[np.float16], queries: Vectors, k: int
) -> tuple[Vectors, NDArray[np.int64]]:
    """The oracle: (scores, rows) of the k best by a scan of everything, each (n, k)."""
    scores = queries @ np.asarray(vectors, np.float32).T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, 1), rows


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Shard:
    """A loaded shard. `vectors` is float16 (rows, dim), memory-mapped; `ivf` is the FAISS file of
    an IVF-PQ shard, already checked against its SHA-256.
    """

    def __init__(self, vectors: Path, rows: int, dim: int, ivf: Path | None, nprobe: int) -> None:
        if vectors.stat().st_size != rows * dim * 2:
            raise DamagedIndexError(f"{vectors} does not hold {rows} vectors of {dim} dimensions")
        self.vectors = np.memmap(vectors, np.float16, mode="r", shape=(rows, dim))
        self.rows = rows
        self._nprobe = nprobe
        self._exact = ivf is None
        if ivf is None:
            self._index = faiss.IndexFlatIP(dim)
            self._index.add(np.asarray(self.vectors, np.float32))
            return
        stored = faiss.read_index(str(ivf))
        if stored.ntotal != rows or stored.d != dim:
            raise DamagedIndexError(f"{ivf} does not hold the shard's {rows} rows")
        self._stored = stored  # the fast-scan form borrows the coarse quantizer of the stored one
        self._index = faiss.IndexIVFPQFastScan(stored)

    def search(self, query: Vectors, k: int) -> tuple[Vectors, NDArray[np.int64]]:
        """(scores, rows) of about the k best rows for one query (dim,), best first."""
        k = min(k, self.rows)
        if self._exact:
            scores, rows = self._index.search(query[None], k)
            return scores[0], rows[0]
        wanted = min(self.rows, k * CANDIDATES_PER_HIT)
        parameters = faiss.SearchParametersIVF(nprobe=self._nprobe)
        _, found = self._index.search(query[None], wanted, params=parameters)
        candidates = np.sort(found[0][found[0] >= 0])
        exact = np.asarray(self.vectors[candidates], np.float32) @ query
        best = np.argsort(-exact, kind="stable")[:k]
        return exact[best], candidates[best]

    def scores(self, query: Vectors, first: int, stop: int) -> Vectors:
        """Exact scores of rows first … stop − 1."""
        part: Vectors = np.asarray(self.vectors[first:stop], np.float32) @ query
        return part
