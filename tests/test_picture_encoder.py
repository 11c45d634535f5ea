"""A picture as a query lies where the stored frame lies that shows the same."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import straight_frames
from numpy.typing import NDArray
from PIL import Image

from vsearch.config import PRESETS, CorpusConfig, Encoder, UserError
from vsearch.corpus import Corpus
from vsearch.demo.world import make_world
from vsearch.encoders import Encoders
from vsearch.pictures import PictureEncoder, read_picture
from vsearch.projector import Projector, projection
from vsearch.video import decode, probe

REAL = [
    "mdn__flower.mp4",
    "intel__car-detection.mp4",
    "media__bbb_176x144_128kbps_15fps_h263.3gp",
]
EVERY = 10
MOST = 8


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    return Encoders(PRESETS["demo"], "cpu")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, encoders: Encoders) -> Corpus:
    """With a projector of random weights, which keeps what is near near."""
    corpus = Corpus(str(tmp_path_factory.mktemp("corpus")))
    corpus.require(CorpusConfig(encoders.dino.record, encoders.clip.record, encoders.input_px))
    torch.manual_seed(0)
    projector = Projector(encoders.dino.record.dim, encoders.clip.record.dim, hidden=256)
    weights, sizes = projector.to_bytes()
    corpus.write("projector/v1/model.safetensors", weights)
    corpus.write("projector/v1/config.json", sizes)
    return corpus


@pytest.fixture(scope="module", params=["drawn", "real"])
def shown(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, encoders: Encoders
) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    """(full pictures of some frames, the same frames as ingestion scales them)."""
    if request.param == "drawn":
        world = tmp_path_factory.mktemp("world")
        make_world(world, seed=5, videos=2, scenes_per_video=2)
        videos = sorted(world.glob("*.mp4"))
    else:
        folder = request.getfixturevalue("shared_videos")
        videos = [folder / name for name in REAL]
    full: list[NDArray[np.uint8]] = []
    small: list[NDArray[np.uint8]] = []
    for video in videos:
        frames = list(straight_frames(video))[::EVERY][:MOST]
        full += [frame.to_ndarray(format="rgb24") for frame in frames]
        with video.open("rb") as file:
            spans = decode(file, probe(file), encoders.input_px, threads=1)
            pixels = [picture for span in spans for picture in span.pixels]
        small += pixels[::EVERY][: len(frames)]
    return full, small


SPACES = pytest.mark.parametrize(
    ("projector", "alpha"),
    [("v1", None), (None, None), ("v1", 0.3)],
    ids=["projected", "clip", "fused"],
)


def stored(
    corpus: Corpus,
    encoders: Encoders,
    small: list[NDArray[np.uint8]],
    projector: str | None,
    alpha: float | None,
) -> NDArray[np.float32]:
    """The rows that an index has for frames."""
    pairs = [encoders.embed(picture[None]) for picture in small]
    clip = np.concatenate([clip for _, clip in pairs]).astype(np.float32)
    if projector is None:
        return clip
    _, project = projection(corpus, projector)
    projected = project(np.concatenate([dino for dino, _ in pairs])).astype(np.float32)
    if alpha is None:
        return projected
    fused = alpha * projected + (1 - alpha) * clip
    return fused / np.linalg.norm(fused, axis=1, keepdims=True)


@SPACES
def test_the_very_frame_gives_nearly_the_stored_vector(
    corpus: Corpus,
    encoders: Encoders,
    shown: tuple[Any, Any],
    projector: str | None,
    alpha: float | None,
) -> None:
    full, small = shown
    rows = stored(corpus, encoders, small, projector, alpha)
    encoder = PictureEncoder(corpus, projector, encoders.clip, alpha)
    found = np.stack([encoder.encode(picture) for picture in full])
    assert found.dtype == np.float32 and found.shape == rows.shape
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    scores = found @ rows.T
    assert np.diag(scores).min() >= 0.99
    # Frames of other videos are further away than the frame itself.
    assert scores[0, -1] < 0.97 and scores[-1, 0] < 0.97


@SPACES
def test_a_saved_picture_of_another_size_lies_near_too(
    corpus: Corpus,
    encoders: Encoders,
    shown: tuple[Any, Any],
    projector: str | None,
    alpha: float | None,
) -> None:
    full, small = shown
    rows = stored(corpus, encoders, small, projector, alpha)
    encoder = PictureEncoder(corpus, projector, encoders.clip, alpha)
    for place in (0, len(full) - 1):
        picture = Image.fromarray(full[place])
        buffer = io.BytesIO()
        picture.resize((3 * picture.width, 3 * picture.height)).save(buffer, "JPEG", quality=90)
        assert encoder.encode(read_picture(buffer.getvalue())) @ rows[place] >= 0.97


@pytest.mark.parametrize("shape", [(8, 400), (400, 8), (9, 9), (2047, 3000), (40, 2000)])
def test_any_size_has_a_vector(corpus: Corpus, encoders: Encoders, shape: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    picture.setflags(write=False)
    encoder = PictureEncoder(corpus, "v1", encoders.clip)
    for view in (picture, picture[::-1, ::-1]):
        assert np.linalg.norm(encoder.encode(view)) == pytest.approx(1, abs=1e-5)


def test_other_weights_of_dino_are_refused(encoders: Encoders, tmp_path: Path) -> None:
    corpus = Corpus(str(tmp_path))
    other = Encoder(encoders.dino.record.model, "0123456789abcdef", encoders.dino.record.dim)
    corpus.require(CorpusConfig(other, encoders.clip.record, encoders.input_px))
    with pytest.raises(UserError, match="0123456789abcdef"):
        PictureEncoder(corpus, "v1", encoders.clip)
