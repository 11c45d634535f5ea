"""The index: shards of vectors in fp16, the large ones with IVF-PQ codes over them.

A flat shard is scanned exactly. IVF-PQ codes propose candidates, which are scored exactly from the
memory-mapped fp16 vectors; so every score is exact, and only recall can differ. All vectors are unit
vectors, a score is their inner product: the cosine.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from vsearch.config import DamagedIndexError
from vsearch.sizing import ROWS_PER_CELL, Setting

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]

SCANNED_ROWS = 10_000
"""Where a filter leaves no more rows than this, they are scanned: that is exact, and about as fast."""

ITERATIONS = 6
"""Of k-means, for the centroids."""

LEAST_PER_HIT = 2
"""So many candidates are scored exactly for each hit at least."""

LARGEST_FILE_BYTES = 1 << 40
faiss.set_deserialization_vector_byte_limit(LARGEST_FILE_BYTES)


def train_quantizer(sample: Vectors, nlist: int) -> bytes:
    """A trained, empty IVF-PQ index, serialised: `nlist` cells by spherical k-means, and 4-bit codes
    of two dimensions each. `sample` is float32 (n, dim). k-means runs on a GPU where there is one.
    """
    dim = sample.shape[1]
    kmeans = faiss.Kmeans(
        dim,
        nlist,
        niter=ITERATIONS,
        spherical=True,
        gpu=bool(faiss.get_num_gpus()),
        min_points_per_centroid=1,
        max_points_per_centroid=ROWS_PER_CELL,
        seed=0,
    )
    kmeans.train(sample)
    index = faiss.index_factory(dim, f"IVF{nlist},PQ{dim // 2}x4", faiss.METRIC_INNER_PRODUCT)
    index.cp.spherical = True
    index.quantizer.add(kmeans.centroids)  # with its centroids there, only the codes are trained
    index.do_polysemous_training = False  # an order of the codes that only Hamming distances use
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # in many tiny clusterings threads wait for each other mostly
    index.train(sample)
    faiss.omp_set_num_threads(threads)
    data: bytes = faiss.serialize_index(index).tobytes()
    return data


def _load(data: bytes) -> Any:
    return faiss.deserialize_index(np.frombuffer(data, np.uint8))


def _coarse(index: Any) -> Any:
    """The centroids of an IVF index, on a GPU where there is one."""
    if faiss.get_num_gpus():
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index.quantizer)
    return index.quantizer


def encode(quantizer: bytes, vectors: NDArray[np.float16], path: Path) -> tuple[float, Rows]:
    """Writes the codes of a shard, its rows in order, to a file that FAISS can memory-map; gives what
    `fit` gives.
    """
    index = _load(quantizer)
    found = _fit(index, vectors, add=True)
    faiss.write_index(index, str(path))
    return found


def fit(quantizer: bytes, vectors: NDArray[np.float16]) -> tuple[float, Rows]:
    """How well a quantizer fits vectors: their mean cosine to the centroid of their cell, and how many
    there are in each cell (nlist,).
    """
    return _fit(_load(quantizer), vectors, add=False)


def _fit(
    index: Any, vectors: NDArray[np.float16], add: bool, batch: int = 65536
) -> tuple[float, Rows]:
    coarse = _coarse(index)
    total, filled = 0.0, np.zeros(index.nlist, np.int64)
    for start in range(0, len(vectors), batch):
        part = np.asarray(vectors[start : start + batch], np.float32)
        cosines, cells = coarse.search(part, 1)
        total += float(cosines.sum(dtype=np.float64))
        cells = np.ascontiguousarray(cells[:, 0])
        filled += np.bincount(cells, minlength=index.nlist)
        if add:
            index.add_core(len(part), faiss.swig_ptr(part), None, faiss.swig_ptr(cells))
    return total / max(1, len(vectors)), filled


def imbalance(filled: Rows) -> float:
    """How unevenly vectors fill the cells (nlist,): 1 is even; FAISS's imbalance factor."""
    counts = filled.astype(np.float64)
    return float(len(counts) * (counts**2).sum() / max(1.0, counts.sum() ** 2))


def exact_search(
    vectors: NDArray[np.float16], queries: Vectors, k: int, batch: int = 65536
) -> tuple[Vectors, Rows]:
    """The oracle: (scores, rows) of the k best by a scan of everything, each (n, k). Of rows with the
    same score the first count.
    """
    found = [(np.zeros(0, np.float32), np.zeros(0, np.int64)) for _ in queries]
    for start in range(0, len(vectors), batch):
        part = queries @ np.asarray(vectors[start : start + batch], np.float32).T
        for query, (scores, rows) in enumerate(found):
            better = np.arange(part.shape[1])
            if len(scores) == k:
                better = np.flatnonzero(part[query] > scores[-1])
            candidates = np.concatenate([scores, part[query][better]])
            found[query] = best_of(candidates, np.concatenate([rows, start + better]), k)
    return np.stack([scores for scores, _ in found]), np.stack([rows for _, rows in found])


def best_of(scores: Vectors, rows: Rows, k: int) -> tuple[Vectors, Rows]:
    """The k best of (scores, rows), best first; of equals the first."""
    order = best_order(scores, k)
    return scores[order], rows[order]


def best_order(scores: Vectors, k: int) -> Rows:
    """The places of the k best scores, best first; of equals the first. Few of many are not sorted with
    the others.
    """
    if len(scores) <= k:
        return np.argsort(-scores, kind="stable")
    kept = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    return kept[np.argsort(-scores[kept], kind="stable")[:k]]


@contextmanager
def one_thread() -> Iterator[None]:
    """FAISS works in the calling thread alone. A query has many short steps, in which threads would wait
    for each other most of the time; many queries run side by side.
    """
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # counts for this thread only
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


class Shard:
    """A loaded shard. `vectors` is float16 (rows, dim), memory-mapped; `codes` is the FAISS file of an
    IVF-PQ shard, already checked against its SHA-256. Without codes a shard is scanned.
    """

    def __init__(self, vectors: Path, rows: int, dim: int, codes: Path | None = None) -> None:
        if vectors.stat().st_size != rows * dim * 2:
            raise DamagedIndexError(f"{vectors} does not hold {rows} vectors of {dim} dimensions")
        self.vectors = np.memmap(vectors, np.float16, mode="r", shape=(rows, dim))
        self.rows = rows
        self.flat = codes is None
        if codes is None:
            self._index = _half_precision(self.vectors)
            return
        try:
            stored = faiss.read_index(str(codes), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise DamagedIndexError(f"{codes} is not an index that FAISS can read") from error
        if not isinstance(stored, faiss.IndexIVFPQ) or (stored.ntotal, stored.d) != (rows, dim):
            raise DamagedIndexError(f"{codes} does not hold the codes of the shard's {rows} rows")
        self._stored = stored  # the fast-scan form borrows the centroids of the stored one
        self._index = faiss.IndexIVFPQFastScan(stored)

    @property
    def nlist(self) -> int:
        return 0 if self.flat else int(self._index.nlist)

    def rows_in(self, cells: Rows) -> Rows:
        """The rows (n,) of an IVF-PQ shard that lie in some cells."""
        lists = self._stored.invlists
        sizes = [(cell, lists.list_size(cell)) for cell in cells.tolist()]
        found = [faiss.rev_swig_ptr(lists.get_ids(cell), size) for cell, size in sizes if size]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def nearest_cells(self, query: Vectors, nprobe: int) -> tuple[Vectors, Rows]:
        """(cosines, cells) of the centroids nearest to a query (dim,), each (1, nprobe)."""
        cosines, cells = self._stored.quantizer.search(query[None], nprobe)
        return cosines, cells

    def scan(self, query: Vectors, k: int, allowed: Mask | None = None) -> tuple[Vectors, Rows]:
        """(scores, rows) of the k best rows for a query (dim,), best first, exactly. `allowed` (rows,)
        says which rows may be found.
        """
        if self.flat:
            selector = None if allowed is None or allowed.all() else _selector(allowed)
            parameters = faiss.SearchParameters(sel=selector) if selector else None
            scores, rows = self._index.search(query[None], min(k, self.rows), params=parameters)
            there = rows[0] >= 0
            return scores[0][there], rows[0][there]
        chosen = np.arange(self.rows) if allowed is None else np.flatnonzero(allowed)
        return best_of(self.score(query, chosen), chosen, k)

    def candidates(
        self,
        query: Vectors,
        count: int,
        nearest: tuple[Vectors, Rows],
        allowed: Mask | None = None,
    ) -> tuple[Vectors, Rows]:
        """(estimated scores, rows) of `count` promising rows in the cells given, best first."""
        cosines, cells = nearest
        count = min(count, self.rows)
        scores = np.empty((1, count), np.float32)
        rows = np.empty((1, count), np.int64)
        selector = _selector(allowed) if allowed is not None else None
        parameters = faiss.SearchParametersIVF(nprobe=cells.shape[1], sel=selector)
        # FAISS's Python face of this method takes no parameters; the method itself does.
        pointers = map(faiss.swig_ptr, (cells, cosines, scores, rows))
        self._index.search_preassigned_c(
            1, faiss.swig_ptr(np.ascontiguousarray(query)), count, *pointers, False, parameters
        )
        there = rows[0] >= 0
        return scores[0][there], rows[0][there]

    def score(self, query: Vectors, rows: Rows, batch: int = 1024) -> Vectors:
        """Exact scores (n,) of rows (n,)."""
        parts = [
            products(query, self.vectors[rows[start : start + batch]])
            for start in range(0, len(rows), batch)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def scores(self, query: Vectors, first: int, stop: int) -> Vectors:
        """Exact scores of rows first … stop − 1."""
        return products(query, self.vectors[first:stop])


def _half_precision(vectors: NDArray[np.float16]) -> Any:
    """A flat FAISS index of float16 vectors as they are: it widens them within its inner loop."""
    index = faiss.IndexScalarQuantizer(
        vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    index.add_sa_codes(np.ascontiguousarray(vectors).view(np.uint8))
    return index


def products(query: Vectors, vectors: NDArray[np.float16]) -> Vectors:
    """Inner products (n,) of a query (dim,) with vectors (n, dim). NumPy would take five times as long,
    most of it to widen them to float32.
    """
    scores = np.empty(len(vectors), np.float32)
    if len(vectors):
        found, places = _half_precision(vectors).search(query[None], len(vectors))
        scores[places[0]] = found[0]
    return scores


def _selector(allowed: Mask) -> Any:
    bits = np.packbits(allowed, bitorder="little")
    selector = faiss.IDSelectorBitmap(bits)
    selector.bits = bits  # FAISS keeps the address alone
    return selector


class Index:
    """Shards that are searched as one; those with codes share one quantizer and one `setting`."""

    def __init__(self, shards: Sequence[Shard], setting: Setting | None = None) -> None:
        self.shards = list(shards)
        self.setting = setting
        self.rows = sum(shard.rows for shard in self.shards)
        coded = [shard for shard in self.shards if not shard.flat]
        self._router = coded[0] if coded else None

    def search(
        self,
        query: Vectors,
        k: int,
        allowed: Sequence[Mask] | None = None,
        took_s: dict[str, float] | None = None,
        sure: int | None = None,
    ) -> tuple[Vectors, Rows, Rows]:
        """(scores, shards, rows), each (n,), of about the k best rows for a query (dim,), best first.
        `allowed` says for each shard which of its rows may be found. The seconds that it takes are
        added to `search` and `rerank` (exact scores of candidates) in `took_s`. The `sure` best (all
        k if not given) are found with the recall that the setting was chosen for, of those behind them
        fewer, as only `LEAST_PER_HIT` candidates a hit are scored for these.
        """
        began = time.perf_counter()
        took_s = {"search": 0.0, "rerank": 0.0} if took_s is None else took_s
        reranked_s = took_s["rerank"]
        masks: list[Mask | None] = [None] * len(self.shards) if allowed is None else list(allowed)
        found: list[tuple[Vectors, int, Rows]] = []
        coded = [number for number, shard in enumerate(self.shards) if not shard.flat]
        if sum(_kept(self.shards[n], masks[n]) for n in coded) <= SCANNED_ROWS:
            coded = []
        for number, (shard, mask) in enumerate(zip(self.shards, masks, strict=True)):
            if number not in coded:
                scores, rows = shard.scan(query, k, mask)
                found.append((scores, number, rows))
        if coded:
            found += self._search_coded(query, k, sure or k, coded, masks, took_s)
        if not found:
            return np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64)
        scores = np.concatenate([s for s, _, _ in found])
        shards = np.repeat([n for _, n, _ in found], [len(s) for s, _, _ in found])
        rows = np.concatenate([r for _, _, r in found])
        order = best_order(scores, k)
        took_s["search"] += time.perf_counter() - began - (took_s["rerank"] - reranked_s)
        return scores[order], shards[order], rows[order]

    def _search_coded(
        self,
        query: Vectors,
        k: int,
        sure: int,
        numbers: list[int],
        masks: list[Mask | None],
        took_s: dict[str, float],
    ) -> list[tuple[Vectors, int, Rows]]:
        """Candidates of all these shards are merged before any is scored exactly: so that many shards
        answer as one would.
        """
        assert self.setting is not None
        nearest = self._cells_to_visit(query, numbers, masks)
        count = max(LEAST_PER_HIT * k, self.setting.per_hit * sure)
        parts = [self.shards[n].candidates(query, count + 1, nearest, masks[n]) for n in numbers]
        estimates = np.concatenate([estimate for estimate, _ in parts])
        if len(estimates) > count:
            # Equal estimates at the bound are left out together, as which of them FAISS gives depends
            # on the shard; only of many copies of one picture some must stay.
            bound = np.partition(estimates, -count - 1)[-count - 1]
            above = np.greater if np.count_nonzero(estimates > bound) >= k else np.greater_equal
            parts = [(e[above(e, bound)], rows[above(e, bound)]) for e, rows in parts]
        began, scored = time.perf_counter(), []
        for number, (_, rows) in zip(numbers, parts, strict=True):
            rows = np.sort(rows)  # read in the order of the file
            scored.append((self.shards[number].score(query, rows), number, rows))
        took_s["rerank"] += time.perf_counter() - began
        return scored

    def _cells_to_visit(
        self, query: Vectors, numbers: list[int], masks: list[Mask | None]
    ) -> tuple[Vectors, Rows]:
        """The nearest cells: `nprobe` of them. With a filter they are more as fewer rows are left, and
        at least so many that as many rows are seen as without: what is left may lie far from the query.
        """
        assert self.setting is not None and self._router is not None
        nlist = self._router.nlist
        nprobe = min(self.setting.nprobe, nlist)
        parts = [(self.shards[number], masks[number]) for number in numbers]
        rows = sum(shard.rows for shard, _ in parts)
        kept = sum(_kept(shard, mask) for shard, mask in parts)
        visited = min(nlist, math.ceil(nprobe * rows / kept))
        while True:
            cosines, cells = self._router.nearest_cells(query, visited)
            left = sum(
                int(np.count_nonzero(mask[shard.rows_in(cells[0])]))
                for shard, mask in parts
                if mask is not None
            )
            if kept == rows or visited == nlist or left >= nprobe * rows / nlist:
                return cosines, cells
            visited = min(nlist, 2 * visited)


def _kept(shard: Shard, mask: Mask | None) -> int:
    return shard.rows if mask is None else int(np.count_nonzero(mask))
