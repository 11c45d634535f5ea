"""How the projector fares on footage that came after its training: measured on a sample of each ingest,
and stored, so that it costs nothing to tell.
"""

import json
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow.compute as pc

from vsearch.config import UserError
from vsearch.corpus import Corpus, newest_projector, vector_matrix

SAMPLED_FILES = 16
"""So many of the frames files of an ingest are looked into."""

SAMPLED_FRAMES = 4096
"""So many frames of them, spread evenly, tell how an ingest is."""

LATEST = 32
"""The figures of so many ingests, the latest ones, are put together."""

DUE = 1.25
"""A training is due when projected vectors are so many times as far from CLIP's as in validation."""


@dataclass(frozen=True)
class Drift:
    """Of `frames` stored since a projector was trained, by a sample: `cosine`, the mean of projected
    vectors with CLIP's, None if CLIP saw none of them; `distance`, how far their DINO vectors lie from
    the mean of the training's in its standard deviations: the root of the mean square, 1 for the
    training itself.
    """

    frames: int
    cosine: float | None
    distance: float


def measure(corpus: Corpus, files: Iterable[str], frames: int) -> Drift | None:
    """Measures and stores what an ingest, which stored so many `frames`, means to the newest projector;
    `files` are the frames files to look into. None without a projector, or when nothing was stored.
    """
    import torch

    from vsearch.projector import load_projector, paired_metrics

    newest = newest_projector(corpus)
    names = [name for name in sorted(files) if corpus.exists(name)]  # others were settled meanwhile
    if newest is None or not names:
        return None
    model = load_projector(corpus, newest[0])
    each = SAMPLED_FRAMES // len(names)
    squares, cosines = [], []
    for name in names:
        tables = list(corpus.frames(name, ["dino", "clip"]))
        step = max(1, -(-sum(table.num_rows for table in tables) // each))
        for table in tables:
            table = table.take(np.arange(0, table.num_rows, step))
            known = pc.is_valid(table["clip"])
            paired = table.filter(known)
            with torch.inference_mode():
                dino = torch.from_numpy(vector_matrix(table["dino"])).float()
                squares += ((dino - model.mean) / model.std).square().mean(1).tolist()
                if paired.num_rows:
                    projected = model(torch.from_numpy(vector_matrix(paired["dino"])).float())
                    clip = torch.from_numpy(vector_matrix(paired["clip"])).float()
                    mean = paired_metrics(projected, clip)["cosine"]
                    cosines.append((mean, paired.num_rows))
    if not squares:
        return None
    found = Drift(frames, _mean(cosines), float(np.sqrt(np.mean(squares))))
    at = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:6]}"
    corpus.write(f"drift/{newest[0]}/{at}.json", (json.dumps(asdict(found)) + "\n").encode())
    return found


def recorded(corpus: Corpus, version: str) -> Drift | None:
    """What the latest ingests since a projector was trained amount to, by their frames; None if there
    are none.
    """
    names = corpus.files(f"drift/{version}", ".json")[-LATEST:]
    found = [read(corpus, name) for name in names]
    if not found:
        return None
    cosine = _mean([(d.cosine, d.frames) for d in found if d.cosine is not None])
    distance = _mean([(d.distance, d.frames) for d in found])
    assert distance is not None
    return Drift(sum(d.frames for d in found), cosine, distance)


def read(corpus: Corpus, name: str) -> Drift:
    """The figures of one ingest. Raises `UserError` if they are damaged."""
    try:
        return Drift(**json.loads(corpus.read(name)))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{name} of the corpus at {corpus.url} is damaged: remove it, it only tells how the projector "
            f"fared on one ingest."
        ) from error


def _mean(weighted: list[tuple[float, int]]) -> float | None:
    """The mean of (value, weight), None of nothing."""
    if not weighted:
        return None
    values, weights = zip(*weighted, strict=True)
    return float(np.average(values, weights=weights))


def is_due(metrics: dict[str, Any], drift: Drift | None) -> bool:
    """Whether a training is due, by the metrics of the projector's own validation."""
    if drift is None or drift.cosine is None:
        return False
    return 1 - drift.cosine > DUE * (1 - metrics["cosine"])


def told(corpus: Corpus) -> dict[str, Any] | None:
    """The projector in use and its drift, for machines; None without a projector."""
    newest = newest_projector(corpus)
    if newest is None:
        return None
    version, config = newest
    drift = recorded(corpus, version)
    return {
        "version": version,
        "cosine": config["metrics"]["cosine"],
        "new_frames": drift.frames if drift else 0,
        "new_cosine": drift and drift.cosine,
        "new_distance": drift and drift.distance,
        "training_due": is_due(config["metrics"], drift),
    }
