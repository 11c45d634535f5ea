"""When an index has codes, how many cells they lie in, and how far a search looks: pure arithmetic, so
that whoever only plans a build does without FAISS.
"""

import math
from dataclasses import dataclass

FLAT_ROWS = 50_000
"""Up to this many rows an exact scan is as fast as an index."""

ROWS_PER_CELL = 50
"""So many training vectors for each centroid; FAISS asks for 39 at least."""


@dataclass(frozen=True)
class Setting:
    """How far an IVF-PQ search looks: `nprobe` cells are visited, and for each hit that is asked for
    `per_hit` candidates are scored exactly.
    """

    nprobe: int
    per_hit: int


def cells_for(rows: int) -> int:
    """About 2·√rows cells, as a power of two, and never under 39 rows a cell (FAISS's minimum for
    k-means). Twice as many find no more at equal time, take longer to train, and fit new videos less
    (benchmarks/index.py).
    """
    nlist = 2 ** round(math.log2(2 * math.sqrt(max(rows, 1))))
    while nlist > 1 and rows < 39 * nlist:
        nlist //= 2
    return nlist
