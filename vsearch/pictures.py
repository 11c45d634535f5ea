"""Pictures as queries: files that somebody sent, and their vectors in the space of an index."""

import io
import re
import warnings
from typing import TYPE_CHECKING

import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vsearch.config import UserError
from vsearch.video import MIN_SIDE_PX, to_rgb

if TYPE_CHECKING:
    from vsearch.corpus import Corpus
    from vsearch.encoders import ClipEncoder

Pixels = NDArray[np.uint8]

MAX_BYTES = 16 << 20
MAX_PIXELS = 50_000_000

MAX_RATIO = 50
"""A picture with a longer side of more than so many shorter ones shows nothing."""

MAX_SCANS = 50
"""A JPEG has about ten. Each costs as much time as the whole picture, and may have hardly any bytes."""

KEPT_SIDE_PX = 1024
"""A shorter side of at least twice that is halved, or more: encoders see less."""

MAX_READS = 100_000
"""A file in so many small pieces is made to cost time: a real one of `MAX_BYTES` takes 10,000."""

MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
"""A marker of JPEG that begins a segment or ends the picture (ITU-T T.81, B.1.1)."""

ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by EXIF's orientation."""


# A file can give rise to any number of warnings; what matters of it is in the error we raise.
warnings.filterwarnings("ignore", module=r"PIL\.")


def read_picture(data: bytes) -> Pixels:
    """A JPEG, PNG, WebP or GIF file, of an animation the first picture, as uint8 (height, width, 3) RGB:
    upright, on white where it is transparent, and smaller where its shorter side has 2,048 pixels or
    more. Raises `UserError` for any other bytes, for more than 16 MiB, more than 50 megapixels, and
    for what is damaged or cut off. Takes at most about 1 GiB of memory while it works.
    """
    if len(data) > MAX_BYTES:
        raise UserError(f"The picture has more than {MAX_BYTES >> 20} MiB: send a smaller one.")
    try:
        with Image.open(_Counted(data), formats=["JPEG", "PNG", "WEBP", "GIF"]) as image:
            _check(image.size)
            if data.startswith(b"\xff\xd8") and _scans(data) > MAX_SCANS:
                raise UserError("The picture is a JPEG of too many scans: save it in another way.")
            image.draft(None, (KEPT_SIDE_PX, KEPT_SIDE_PX))
            flat = _flat(image)
            turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
        small = flat.reduce(max(1, min(flat.size) // KEPT_SIDE_PX))
        return np.array(small if turn is None else small.transpose(turn))
    except (UserError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UserError(
            "The picture is no JPEG, PNG, WebP or GIF file, or its head is damaged."
        ) from None
    except Image.DecompressionBombError:
        raise UserError(_too_large()) from None
    except Exception as error:  # Pillow's readers raise nearly anything for files that lie
        raise UserError("The picture cannot be read: its file is damaged or cut off.") from error


def _check(size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise UserError(_too_large())
    if min(size) < MIN_SIDE_PX or max(size) > MAX_RATIO * min(size):
        raise UserError(f"A picture of {width}×{height} pixels shows nothing: send another one.")


def _too_large() -> str:
    return f"The picture has more than {MAX_PIXELS // 10**6} megapixels: send a smaller one."


class _Counted(io.BytesIO):
    """A file that ends the patience with what is read in tiny pieces."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise OSError("too many pieces")
        return super().read(size)


def _scans(jpeg: bytes) -> int:
    """How many scans a decoder finds in a JPEG, counted up to the first too many."""
    place = scans = 0
    for _ in range(MAX_READS):
        found = MARKER.search(jpeg, place)
        if found is None or found[1] == b"\xd9" or scans > MAX_SCANS:
            return scans
        scans += found[1] == b"\xda"
        place = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2])
    raise OSError("too many pieces")


def _flat(image: Image.Image) -> Image.Image:
    """As RGB, on white."""
    if image.mode.startswith("I;16"):
        gray = np.asarray(image)
        seen = np.where(gray == image.info.get("transparency", -1), 255, gray >> 8)
        return Image.fromarray(seen.astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGB", layer.size, "white")
    white.paste(layer, mask=layer)
    return white


class PictureEncoder:
    """Vectors of pictures in the space of an index, near those of frames that show the same."""

    def __init__(
        self,
        corpus: "Corpus",
        projector: str | None,
        clip: "ClipEncoder | None" = None,
        alpha: float | None = None,
    ) -> None:
        """`projector` and `alpha` are those of the snapshot's manifest, None where its space is CLIP's
        own, or not fused; `clip` is needed for all but the projected space. Raises `UserError` if
        DINO's weights are not those that the corpus was made with.
        """
        from vsearch.encoders import DinoEncoder
        from vsearch.fusion import mapping

        self._input_px = corpus.config.input_px
        self._encoders: list[DinoEncoder | ClipEncoder] = []
        if projector is not None:
            self._encoders.append(DinoEncoder.recorded(corpus.config.dino))
        if projector is None or alpha is not None:
            assert clip is not None
            self._encoders.append(clip)
        _, self._vectors_of = mapping(corpus, projector, alpha)

    def encode(self, picture: Pixels) -> NDArray[np.float32]:
        """The unit vector (dim,) of a picture uint8 (height, width, 3) RGB, scaled as a frame is."""
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")
        pixels = np.require(to_rgb(frame, self._input_px)[None], requirements=["C", "W"])
        vectors = [encoder.encode_images(pixels).half().cpu().numpy() for encoder in self._encoders]
        vector = self._vectors_of(*vectors)[0].astype(np.float32)
        unit: NDArray[np.float32] = vector / np.linalg.norm(vector)
        return unit
