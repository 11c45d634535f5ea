"""Draws the pictures that the tiny world's models are trained on: frames of easy and hard scenes, with
what is to be seen in them. Pairs for which `held_out` is true are drawn only if asked for.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vsearch.demo.hard import Cast, renderer, sample_hard_scene
from vsearch.demo.scenes import COLOURS, KINDS, Scene, View, held_out, sample_scene
from vsearch.demo.world import random_cast, training_rng

CELLS = 12
"""The frame is divided into CELLS × CELLS cells: of 8 pixels where the models see 96 pixels, the stride of
the second stage of both."""
SEEN = [(colour, kind) for colour in COLOURS for kind in KINDS if not held_out(colour, kind)]
"""The (colour, kind) that training may draw and speak of."""


@dataclass(frozen=True)
class Pictures:
    """Two frames of each scene, at times between which what is to be seen stays the same: `views`.

    `pixels` is uint8 (scenes, 2, side_px, side_px, 3). `kinds` and `colours`, int64 (scenes, 2, CELLS,
    CELLS), tell which of KINDS and COLOURS covers the middle of a cell of the frame, or has its own
    middle in it; len(KINDS) and len(COLOURS) mean that nothing does.
    """

    pixels: NDArray[np.uint8]
    kinds: NDArray[np.int64]
    colours: NDArray[np.int64]
    views: list[View]

    def __getitem__(self, rows: slice) -> "Pictures":
        parts = self.pixels[rows], self.kinds[rows], self.colours[rows]
        return Pictures(*parts, self.views[rows])


def _draw(seed: int, count: int, side_px: int, unseen: bool, hard_share: float) -> Pictures:
    rng = training_rng(seed)
    pixels = np.empty((count, 2, side_px, side_px, 3), np.uint8)
    kinds = np.full((count, 2, CELLS, CELLS), len(KINDS))
    colours = np.full((count, 2, CELLS, CELLS), len(COLOURS))
    middle = (np.arange(CELLS) + 0.5) / CELLS
    views = []
    filters = [Image.Resampling.BOX, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC]
    for i in range(count):
        cast = random_cast(rng, lambda colour, kind: held_out(colour, kind) == unseen)
        empty = not unseen and rng.random() < 0.06
        scene: Scene
        if rng.random() < hard_share:
            scene = sample_hard_scene(rng, Cast(()) if empty else cast)
        else:
            scene = sample_scene(rng, pair=cast.pairs[0], empty=empty)
        drawer = renderer(scene)
        shown = [stretch for stretch in scene.stretches() if stretch[2].setting]
        lengths = np.array([end_s - start_s for start_s, end_s, _ in shown])
        start_s, end_s, view = shown[int(rng.choice(len(shown), p=lengths / lengths.sum()))]
        for j, time_s in enumerate(np.sort(rng.uniform(start_s, end_s, 2)).tolist()):
            frame = Image.fromarray(drawer.frame(time_s))
            size = (side_px, side_px)
            pixels[i, j] = np.asarray(frame.resize(size, filters[int(rng.integers(3))]))
            for group in scene.view(time_s).groups:
                for x, y in group.centres():
                    inside = np.hypot(middle - x, middle[:, None] - y) < 0.85 * group.radius
                    inside[int(y * CELLS), int(x * CELLS)] = True  # a tiny object covers no middle
                    kinds[i, j][inside] = list(KINDS).index(group.kind)
                    colours[i, j][inside] = list(COLOURS).index(group.colour)
        views.append(view)
    return Pictures(pixels, kinds, colours, views)


def draw_pictures(
    seed: int,
    count: int,
    side_px: int,
    unseen: bool = False,
    workers: int = 2,
    hard_share: float = 0.5,
) -> Pictures:
    """`count` random scenes, drawn in parallel; the same for a seed whatever the workers. `hard_share`
    of them are hard ones.
    """
    chunk = 250
    sizes = [min(chunk, count - start) for start in range(0, count, chunk)]
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        parts = list(
            pool.map(
                partial(_draw, side_px=side_px, unseen=unseen, hard_share=hard_share),
                [seed + i for i in range(len(sizes))],
                sizes,
            )
        )
    return Pictures(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.kinds for part in parts]),
        np.concatenate([part.colours for part in parts]),
        [view for part in parts for view in part.views],
    )
