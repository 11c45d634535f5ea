"""Made-up vectors for benchmarks of the index, with what makes those of CLIP hard to search.

Frames: the frames of a shot are alike, shots of a topic less so, and all images share an offset, so
two images that have nothing to do with each other still have a cosine of about 0.5. What varies has
a decaying spectrum (the i-th variance goes as 1/i), so few of the 512 dimensions matter, and it is
turned at random, so that no code for pairs of dimensions profits from their order.

Sentences: CLIP puts texts in another place than images, the modality gap (Liang et al. 2022, "Mind
the gap"). A sentence is therefore mostly an offset that no image has, with a small part of the
meaning of one shot and its topic, and a part that is its own. Its cosine to the best frames is about
0.3, and the best are spread over many shots and cells of the index: an index that is tuned on frames
as queries finds too little for sentences.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

DIM = 512
BLOCK = 1 << 16
TOPICS = 400
FRAMES_A_SHOT = 300
FRAMES_A_BEND = 50
"""So many frames lie between two points through which a shot drifts."""

OFFSET, TOPIC, SHOT, DRIFT, NOISE = 0.5, 0.175, 0.175, 0.11, 0.04
"""Shares of a frame's squared length: its neighbour in time has a cosine of 1 − NOISE, a far frame of
its shot one of about OFFSET + TOPIC + SHOT, one of its topic OFFSET + TOPIC, any other OFFSET.
"""

GAP, NEAR_IMAGES, MEANING, OWN, OWN_NOISE = 0.68, 0.04, 0.06, 0.12, 0.10
"""Shares of a sentence's squared length: the offset of texts, that of images, the meaning of a shot
and its topic, what is its own among the meanings of images, and outside of them.
"""


def unit(vectors: NDArray[np.floating]) -> Vectors:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class World:
    """What frames and sentences have in common: `basis` (dim, dim) turns normal numbers into meanings,
    `topics` (n, dim) are known ones, `images` and `texts` (dim,) the offsets of the two modalities.
    """

    basis: Vectors
    topics: Vectors
    images: Vectors
    texts: Vectors

    def meanings(self, rng: np.random.Generator, count: int) -> Vectors:
        """Random meanings (count, dim), of squared length 1 on average."""
        return rng.standard_normal((count, DIM), np.float32) @ self.basis


def world(seed: int, topics_seed: int = 0) -> World:
    """Worlds of one seed differ in their topics alone, if `topics_seed` does."""
    rng = np.random.default_rng([seed, 0])
    variances = 1 / np.arange(1, DIM + 1)
    turned, _ = np.linalg.qr(rng.standard_normal((DIM, DIM)))
    basis = (np.sqrt(variances / variances.sum())[:, None] * turned).astype(np.float32)
    images, texts = unit(rng.standard_normal((2, DIM)))
    texts = unit(texts - (texts @ images) * images)
    numbers = np.random.default_rng([seed, 1, topics_seed]).standard_normal((TOPICS, DIM))
    return World(basis, numbers.astype(np.float32) @ basis, images, texts)


def write_frames(world: World, rows: int, path: Path, seed: int) -> None:
    """Writes unit vectors float16 (rows, DIM), block by block, each from its own seed."""
    vectors = np.memmap(path, np.float16, mode="w+", shape=(rows, DIM))
    for number, start in enumerate(range(0, rows, BLOCK)):
        rng = np.random.default_rng([seed, 2, number])
        size = min(BLOCK, rows - start)
        filled = 0
        while filled < size:
            drawn = shot(world, rng)[: size - filled]
            vectors[start + filled : start + filled + len(drawn)] = drawn
            filled += len(drawn)
    vectors.flush()


def shot(world: World, rng: np.random.Generator) -> Vectors:
    """Unit vectors of the frames of one shot: they drift on straight lines between random points around
    its centre.
    """
    frames = int(rng.integers(FRAMES_A_SHOT // 3, FRAMES_A_SHOT * 5 // 3))
    topic = world.topics[rng.integers(len(world.topics))]
    centre = np.sqrt(OFFSET) * world.images + np.sqrt(TOPIC) * topic
    centre += np.sqrt(SHOT) * world.meanings(rng, 1)[0]
    bends = world.meanings(rng, frames // FRAMES_A_BEND + 2)
    place, rest = np.divmod(np.arange(frames) / FRAMES_A_BEND, 1)
    before, weight = place.astype(int), rest[:, None].astype(np.float32)
    drift = (1 - weight) * bends[before] + weight * bends[before + 1]
    noise = rng.standard_normal((frames, DIM), np.float32) / np.sqrt(DIM)
    return unit(centre + np.sqrt(DRIFT) * drift + np.sqrt(NOISE) * noise)


def sentences(world: World, count: int, seed: int) -> Vectors:
    """Unit vectors (count, DIM) of sentences about the world's topics."""
    rng = np.random.default_rng([seed, 3])
    topics = world.topics[rng.integers(len(world.topics), size=count)]
    meanings = (topics + world.meanings(rng, count)) / np.sqrt(2)
    noise = rng.standard_normal((count, DIM), np.float32) / np.sqrt(DIM)
    return unit(
        np.sqrt(GAP) * world.texts
        + np.sqrt(NEAR_IMAGES) * world.images
        + np.sqrt(MEANING) * meanings
        + np.sqrt(OWN) * world.meanings(rng, count)
        + np.sqrt(OWN_NOISE) * noise
    )


def frame_queries(path: Path, rows: int, count: int, seed: int) -> Vectors:
    """Unit vectors (count, DIM) near frames, as those of other pictures of the same thing are."""
    rng = np.random.default_rng([seed, 4])
    vectors = np.memmap(path, np.float16, mode="r", shape=(rows, DIM))
    chosen = vectors[np.sort(rng.choice(rows, count, replace=False))].astype(np.float32)
    return unit(chosen + 0.3 * unit(rng.standard_normal((count, DIM))))
