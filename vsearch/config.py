"""What a corpus is made with: encoders, sampling. Checked on construction; no heavy imports."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

FORMAT_VERSION = 2
"""Of the corpus on storage."""

_PLACES = [
    home / "demo" / "models"
    for home in (
        Path(__file__).parent,
        *(Path(folder, "vsearch").absolute() for folder in sys.path),
    )
]
DEMO_MODELS = next((place for place in _PLACES if place.is_dir()), _PLACES[0])
"""Code that was sent to a cluster comes without them: then those of the package that is installed there
are meant."""

MIN_CONFIDENCE = 0.95
"""What people are shown at first is at least so sure."""

MIN_RECALL = 0.97
"""Mean recall@200 on text queries that an index must reach to be published."""

KEPT_SNAPSHOTS = 3
"""So many snapshots stay when others are taken away: the one in use and those before it."""

GRACE_HOURS = 24.0
"""What is younger is never taken away: a build may be about to use it, a reader may be reading it."""


class UserError(Exception):
    """A mistake that the user can mend: its message is one clear sentence that says how. A command
    that meets it ends with `exit_code`.
    """

    exit_code = 2


class DamagedIndexError(UserError):
    """A file of a snapshot is not what its manifest says."""


@dataclass(frozen=True)
class EncoderNames:
    """Which pretrained encoders to load.

    `dino` is a transformers name (`facebook/…`, `timm/…`) or a folder. `clip` is
    `ARCHITECTURE:PRETRAINED` as open_clip lists them (`ViT-B-16:laion2b_s34b_b88k`, where PRETRAINED
    may be a checkpoint file), `hf-hub:…`, or a folder. A name that starts with `demo/` means the
    models that come with the package.
    """

    dino: str
    clip: str

    def __post_init__(self) -> None:
        for role in ("dino", "clip"):
            if not getattr(self, role):
                raise UserError(f"The name of the {role.upper()} model is empty.")
        # A relative path would mean another place to a worker, and to a later search.
        architecture, _, weights = self.clip.partition(":")
        if weights and Path(weights).is_file():
            object.__setattr__(self, "clip", f"{architecture}:{Path(weights).absolute()}")
        for role in ("dino", "clip"):
            if Path(getattr(self, role)).is_dir():
                object.__setattr__(self, role, str(Path(getattr(self, role)).absolute()))


PRESETS = {
    "demo": EncoderNames(dino="demo/dino", clip="demo/clip"),
    "base": EncoderNames(
        dino="facebook/dinov3-vitb16-pretrain-lvd1689m", clip="ViT-B-16:laion2b_s34b_b88k"
    ),
    "open": EncoderNames(dino="facebook/dinov2-base", clip="ViT-B-16:laion2b_s34b_b88k"),
}
"""`base` is the article's pair (DINOv3 needs its licence accepted); `open` needs no licence."""


def encoder_names(preset: str, dino: str | None = None, clip: str | None = None) -> EncoderNames:
    """A preset with one or both of its models replaced."""
    if preset not in PRESETS:
        known = ", ".join(PRESETS)
        raise UserError(f"There is no model preset {preset!r}; choose one of {known}.")
    names = PRESETS[preset]
    return EncoderNames(dino=dino or names.dino, clip=clip or names.clip)


def local_folder(name: str) -> Path | None:
    """The folder that a model name stands for, or None for a name on a hub."""
    path = DEMO_MODELS / name.removeprefix("demo/") if name.startswith("demo/") else Path(name)
    return path if path.is_dir() else None


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are embedded, and how a video is cut into spans.

    `fps` is the highest number of frames a second, None for all of them. `span_s` is the longest
    span in seconds; spans get shorter for high frame rates so that one holds at most about
    `span_frames` frames. A frame that differs by at most `max_change` gray levels (see
    `sampling.change`) from the last embedded one shares its vectors; None embeds every frame.
    """

    fps: float | None = None
    span_s: float = 20.0
    span_frames: int = 512
    max_change: float | None = None

    def __post_init__(self) -> None:
        if self.fps is not None and not 0.001 <= self.fps <= 1000:
            raise UserError(f"--fps must lie between 0.001 and 1000, not {self.fps:g}.")
        if self.span_s <= 0 or self.span_frames < 1:
            raise UserError("The length of a span must be positive.")
        if self.max_change is not None and not 0 <= self.max_change <= 255:
            raise UserError(f"--max-change must lie between 0 and 255, not {self.max_change:g}.")


def check_pairs(pairs: float) -> None:
    """Raises `UserError` for a share of the spans that cannot be."""
    if not 0 < pairs <= 1:
        raise UserError(f"--pairs must lie above 0 and not above 1, not {pairs:g}.")


def check_index_options(
    kind: str = "auto",
    space: str | None = None,
    rows: str | None = None,
    min_recall: float = MIN_RECALL,
    alpha: float | None = None,
) -> None:
    """Raises `UserError` for an index that cannot be made. A space or rows of None are yet to be known."""
    for name, value, known in (
        ("kind", kind, ("auto", "flat", "ivfpq")),
        ("space", space, ("projected", "clip", "fused")),
        ("rows", rows, ("moments", "frames")),
    ):
        if value not in (None, *known):
            raise UserError(f"There is no --{name} {value!r}; choose one of {', '.join(known)}.")
    if not 0 < min_recall <= 1:
        raise UserError(f"--min-recall must lie above 0 and not above 1, not {min_recall:g}.")
    if alpha is not None:
        check_alpha(alpha)
        if space not in (None, "fused"):
            raise UserError(f"--alpha is for --space fused, not for {space}.")


def space_name(space: str, alpha: float | None) -> str:
    """A space for people, with the projected share where it is fused."""
    return space if alpha is None else f"{space} (α {alpha:g})"


def check_alpha(alpha: float) -> None:
    """Raises `UserError` for a share of the projected vector that cannot be."""
    if not 0 <= alpha <= 1:
        raise UserError(f"--alpha must lie between 0 and 1, not {alpha:g}.")


@dataclass(frozen=True)
class Encoder:
    """An encoder as recorded in a corpus: what made its vectors, and how long they are."""

    model: str
    revision: str
    dim: int


@dataclass(frozen=True)
class CorpusConfig:
    """The contents of `corpus.json`: fixed when a corpus is made, compared at every later use.
    `pairs` is the share of spans that are embedded with CLIP too; the others have DINO alone.
    """

    dino: Encoder
    clip: Encoder
    input_px: int
    sampling: Sampling = field(default_factory=Sampling)
    pairs: float = 1.0
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_pairs(self.pairs)


@dataclass(frozen=True)
class TrainConfig:
    """How the projector is trained; `batch_size` is per worker, `validation` a share of videos."""

    hidden: int = 2048
    info_nce_weight: float = 0.5
    temperature: float = (
        0.2  # the article's 0.07 drives scenes apart that are alike: docs/training.md
    )
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch_size: int = 1024
    max_epochs: int = 60
    patience: int = 6
    validation: float = 0.1
    max_pairs: int = 4_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.validation < 1:
            raise UserError(
                f"The validation share must lie between 0 and 1, not {self.validation}."
            )
        if min(self.hidden, self.batch_size, self.max_epochs, self.patience, self.max_pairs) < 1:
            raise UserError("Sizes, epochs and patience of the training must be at least 1.")
