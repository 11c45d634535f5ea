"""Spaces of a corpus side by side: each is indexed in a folder of its own, exactly, and published
nowhere. Rows, segments and scores are made by what makes those of a published index.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from vsearch.config import UserError, check_alpha
from vsearch.corpus import Corpus
from vsearch.moments import ALIKE, CUT
from vsearch.parts import (
    FLAT,
    Recipe,
    best_scores,
    calibration,
    made_up_sentences,
    pieces_of,
    projector_for,
    read_sentences,
    shard_rows,
    tune_alpha,
    validation_pieces,
)
from vsearch.search import Engine
from vsearch.snapshots import Snapshots, content_of, gaps_of, spans_by_video, videos_table

SPACES = ("projected", "clip", "fused", "random")
"""What can be compared; `random` is a projector of the same form that has learnt nothing: the floor."""
MOST_FRAMES = 2_000_000
"""So many frames are 2 GB a space on disk, and at most as much in memory, where vectors have 512
dimensions; DINO's, of 768, take 3 GB more on disk while the rows are made."""
RANDOM_SEED = 0


def check_spaces(names: Sequence[str], alpha: float | None = None) -> None:
    """Raises `UserError` for spaces that cannot be compared."""
    for name in names:
        if name not in SPACES:
            raise UserError(f"There is no space {name!r}; choose of {', '.join(SPACES)}.")
    if not names or len(set(names)) < len(names):
        raise UserError("Name each space to compare once.")
    if alpha is not None:
        check_alpha(alpha)
        if "fused" not in names:
            raise UserError("--alpha is for the fused space, which is not among those asked for.")


class Comparison:
    """The embedded frames of a corpus as they are now, to be looked at in one space after another.
    Raises `UserError` where there are too many of them, or none.
    """

    def __init__(self, corpus_url: str, alpha: float | None = None) -> None:
        """Without `alpha` that of the fused space is the one in use, or tuned as a build would."""
        self._corpus = corpus = Corpus(corpus_url)
        self._spans = spans_by_video(corpus)
        self._states = [state for state in corpus.states() if state.video_id in self._spans]
        self._contents = [content_of(state.video_id, self._spans) for state in self._states]
        self._alpha = alpha
        self._manifest = Snapshots(corpus).current_manifest()
        frames = sum(content.frames for content in self._contents)
        if not frames:
            raise UserError(f"The corpus at {corpus_url} holds no frames yet: ingest videos first.")
        if frames > MOST_FRAMES:
            raise UserError(
                f"Spaces are compared side by side up to {MOST_FRAMES:,} frames, and the corpus at "
                f"{corpus_url} has {frames:,}: build an index of each with 'vsearch index --space', and "
                f"evaluate each with --snapshot."
            )

    @contextmanager
    def engine(self, space: str) -> Iterator[Engine]:
        """What searches the frames in a space, as long as it is needed."""
        recipe = self.recipe(space)
        with tempfile.TemporaryDirectory(prefix="vsearch-spaces-") as folder:
            scratch = Corpus(folder)
            scratch.write("corpus.json", self._corpus.read("corpus.json"))
            if recipe.projector is not None:
                self._copy_projector(scratch, recipe.projector, space == "random")
            shard = shard_rows(
                scratch.url,
                space,
                pieces_of(self._contents, self._spans),
                {state.video_id: gaps_of(state) for state in self._states},
                recipe,
                self._corpus.url,
            )
            made_up = made_up_sentences(scratch.url, "made-up", read_sentences())
            best = best_scores(scratch.url, shard, made_up)
            manifest = {
                "parent": None,
                "kind": "flat",
                "space": space,
                "projector": recipe.projector,
                "alpha": recipe.alpha,
                "dim": scratch.config.clip.dim,
                "mean": shard["mean"],
                "quantizer": None,
                "queries": None,
                "tuning": None,
                "calibration": calibration(made_up, [best]),
                "shards": [shard | FLAT],
            }
            places = dict.fromkeys(self._contents, 0)
            table = videos_table(self._states, self._contents, places)
            yield Engine(folder, Snapshots(scratch).publish(manifest, table))

    def recipe(self, space: str) -> Recipe:
        """What the rows of a space are made of: moments as in the snapshot in use, if there is one."""
        projector = projector_for(self._corpus, space)
        alike = self._manifest["alike"] if self._manifest else ALIKE
        recipe = Recipe(projector, alike, CUT)
        if space != "fused" or projector is None:
            return recipe
        return replace(recipe, alpha=self._share(projector))

    def _share(self, projector: str) -> float:
        """α of the fused space."""
        if self._alpha is None:
            used = self._manifest or {}
            known = used.get("alpha") if used.get("projector") == projector else None
            if known is None:
                pieces = validation_pieces(self._corpus, projector, self._contents, self._spans)
                known = tune_alpha(self._corpus.url, projector, pieces, read_sentences())["alpha"]
            self._alpha = float(known)
        return self._alpha

    def _copy_projector(self, scratch: Corpus, version: str, random: bool) -> None:
        """Puts a projector into another corpus, or one of its form that has learnt nothing."""
        from vsearch.projector import Projector, untrained

        files = [f"projector/{version}/{name}" for name in ("model.safetensors", "config.json")]
        weights, config = (self._corpus.read(name) for name in files)
        if random:
            weights, _ = untrained(Projector.from_bytes(weights, config), RANDOM_SEED).to_bytes()
        scratch.write(files[0], weights)
        scratch.write(files[1], config)
