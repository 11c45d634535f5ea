"""Type a sentence, get the moments in your video archive.

>>> import vsearch
>>> results = vsearch.open("./corpus").search("a red car on the beach")
>>> print(results)
>>> results.to_pandas()
"""

import os
from typing import TYPE_CHECKING

if not os.environ.get("RAY_ADDRESS"):
    # On one machine the workers share this very environment; Ray would start each of them through
    # `uv run`. It reads this when it is imported, so it must stand before any import of Ray.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

from vsearch.filters import Filter
from vsearch.query import Term

if TYPE_CHECKING:
    from vsearch.coverage import VideoState
    from vsearch.search import Engine

__version__ = "0.1.0"
__all__ = ["Filter", "Term", "demo_corpus", "open", "status"]


def open(corpus: str, snapshot: str | None = None) -> "Engine":
    """The query engine over a corpus' current snapshot, or over the one named."""
    from vsearch.search import Engine

    return Engine(corpus, snapshot)


def status(corpus: str) -> "list[VideoState]":
    """What of every video of a corpus is embedded, and what is not and why, sorted by URI."""
    from vsearch.corpus import Corpus

    return Corpus(corpus).states()


def demo_corpus(folder: str = "demo-archive", seed: int = 7, videos: int = 20) -> str:
    """The corpus of `vsearch demo` in a folder, which is given back; made there once, in some minutes. Its
    sentences with their true moments are in `world-SEED-VIDEOS/truth.jsonl` of the folder. Raises
    `UserError` where the folder holds another world.
    """
    from vsearch.config import PRESETS
    from vsearch.corpus import Corpus
    from vsearch.demo.world import world_beside
    from vsearch.snapshots import Snapshots

    world = world_beside(folder, seed, videos)
    if Snapshots(Corpus(folder)).current is None:
        from vsearch.build_index import build_index
        from vsearch.ingest import ingest
        from vsearch.train import train

        ingest(folder, [str(world)], PRESETS["demo"])
        train(folder)
        build_index(folder)
    return folder
