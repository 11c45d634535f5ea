"""Uploaded pictures: what is read of them, what is refused, and what it costs at most."""

import io
import itertools
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vsearch.config import UserError
from vsearch.demo.scenes import SceneRenderer, sample_scene
from vsearch.pictures import read_picture

Pixels = NDArray[np.uint8]
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True, "exact": True}}


def drawn(seed: int = 3) -> Pixels:
    """A detailed picture of uneven sides."""
    picture = SceneRenderer(sample_scene(np.random.default_rng(seed), setting="city")).frame(0.5)
    return np.asarray(Image.fromarray(picture).resize((120, 90)))


def saved(image: Image.Image | Pixels, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    image.save(buffer, form, **LOSSLESS.get(form, {}) | options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes = b"") -> bytes:
    crc = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + crc


def png(size: tuple[int, int], depth: int, colour: int, rows: list[bytes], *chunks: bytes) -> bytes:
    """A PNG file by hand; each row is preceded by its filter, which is none."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", data), chunk(b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def refusal(data: bytes) -> str:
    with pytest.raises(UserError) as refused:
        read_picture(data)
    message = str(refused.value)
    assert message[0].isupper() and message.endswith(".") and "\n" not in message
    assert not any(word in message for word in ("Error", "PIL", "Pillow", "plugin", "0x", "/"))
    return message


# ── what is read ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", LOSSLESS)
def test_every_pixel_of_a_lossless_file_is_as_it_was(form: str) -> None:
    picture = drawn()
    read = read_picture(saved(picture, form))
    assert read.dtype == np.uint8 and read.flags.writeable and read.flags.c_contiguous
    np.testing.assert_array_equal(read, picture)


@pytest.mark.parametrize(
    "data",
    [
        saved(drawn(), "JPEG", quality=92),
        saved(drawn(), "JPEG", quality=92, progressive=True),
        saved(Image.fromarray(drawn()).convert("CMYK"), "JPEG", quality=95),
        saved(drawn(), "WEBP", lossless=False, quality=90),
        saved(Image.fromarray(drawn()).quantize(256), "PNG"),
        saved(Image.fromarray(drawn()).quantize(256), "GIF"),
    ],
    ids=["JPEG", "progressive", "CMYK", "WebP", "palette", "GIF"],
)
def test_other_files_come_close(data: bytes) -> None:
    difference = np.abs(read_picture(data).astype(int) - drawn())
    assert difference.mean() < 6


def test_gray_and_bits_become_rgb() -> None:
    gray = Image.fromarray(drawn()).convert("L")
    expected = np.repeat(np.asarray(gray)[..., None], 3, 2)
    np.testing.assert_array_equal(read_picture(saved(gray, "PNG")), expected)
    bits = gray.point(lambda value: 255 * (value > 128), "1")
    expected = np.repeat(np.asarray(bits)[..., None] * np.uint8(255), 3, 2)
    np.testing.assert_array_equal(read_picture(saved(bits, "PNG")), expected)


@pytest.mark.parametrize("colour", [0, 2, 4, 6], ids=["gray", "RGB", "gray alpha", "RGBA"])
def test_of_sixteen_bits_the_upper_count(colour: int) -> None:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    values = np.random.default_rng(0).integers(0, 1 << 16, (20, 30, channels))
    if colour in (4, 6):
        values[..., -1] = 0xFFFF
    rows = [row.astype(">u2").tobytes() for row in values]
    read = read_picture(png((30, 20), 16, colour, rows))
    seen = values[..., :3] if colour in (2, 6) else np.repeat(values[..., :1], 3, 2)
    assert np.abs(read.astype(int) - seen / 257).max() <= 1


@pytest.mark.parametrize("form", LOSSLESS)
def test_what_is_transparent_lies_on_white(form: str) -> None:
    colours = drawn()
    alpha = np.random.default_rng(1).integers(0, 256, colours.shape[:2], np.uint8)
    read = read_picture(saved(np.dstack([colours, alpha]), form))
    share = alpha[..., None] / 255
    assert np.abs(read - (colours * share + 255 * (1 - share))).max() <= 1


def test_transparent_colours_and_palettes_lie_on_white() -> None:
    blank = np.zeros((20, 30), bool)
    blank[5:15, 4:22] = True
    indices = np.where(blank, 7, np.arange(30) % 5).astype(np.uint8)
    palette = Image.fromarray(indices, "P")
    palette.putpalette(np.random.default_rng(2).integers(0, 200, 768).tolist())
    gray = np.where(blank, 40, 100 + np.arange(30)).astype(np.uint8)
    wide = np.where(blank, 0x2801, 0x6400 + 256 * np.arange(30))
    rows = [row.astype(">u2").tobytes() for row in wide]
    for data in (
        saved(palette, "PNG", transparency=7),
        saved(palette, "GIF", transparency=7),
        saved(gray, "PNG", transparency=40),
        saved(np.dstack([gray] * 3), "PNG", transparency=(40, 40, 40)),
        png((30, 20), 16, 0, rows, chunk(b"tRNS", b"\x28\x01")),
    ):
        np.testing.assert_array_equal((read_picture(data) == 255).all(2), blank)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_pictures_are_turned_as_their_camera_says(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(drawn(), form, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(read_picture(data), expected)
    assert expected.shape == ((120, 90, 3) if orientation in (5, 6, 7, 8) else (90, 120, 3))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_the_first_picture_of_an_animation_counts(form: str) -> None:
    first, other = (Image.new("RGB", (30, 20), colour) for colour in ("navy", "gold"))
    data = saved(first, form, save_all=True, append_images=[other] * 3)
    np.testing.assert_array_equal(read_picture(data), np.asarray(first))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_large_picture_comes_smaller_and_looks_the_same(form: str) -> None:
    large = Image.fromarray(drawn()).resize((5200, 3900), Image.Resampling.BICUBIC)
    read = read_picture(saved(large, form))
    assert 1024 <= min(read.shape[:2]) < 2048
    assert read.shape[1] / read.shape[0] == pytest.approx(4 / 3, abs=0.01)
    again = Image.fromarray(read).resize((120, 90), Image.Resampling.BOX)
    expected = large.resize((120, 90), Image.Resampling.BOX)
    assert np.abs(np.asarray(again).astype(int) - np.asarray(expected)).mean() < 2


# ── what is refused ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", ["BMP", "TIFF", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "PDF"])
def test_other_formats_are_refused(form: str) -> None:
    assert "no JPEG, PNG, WebP or GIF" in refusal(saved(drawn(), form))


@pytest.mark.parametrize("data", [b"", b"\0", b"GIF89a", b"<svg/>", b"\xff\xd8\xff", b"RIFF"])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    refusal(data)


@pytest.mark.parametrize(
    ("size", "said"),
    [((8000, 6251), "50 megapixels"), ((2**31 - 1, 2**31 - 1), ""), ((65535, 8), "65535×8"),
     ((7, 300), "7×300"), ((0, 0), "")],
)  # fmt: skip
def test_sizes_are_judged_by_the_header(size: tuple[int, int], said: str) -> None:
    assert said in refusal(png(size, 8, 2, [b""]))


def test_more_bytes_than_16_mib_are_refused_unread() -> None:
    small = saved(drawn(), "PNG")
    assert read_picture(small.ljust(16 << 20, b"\0")).shape == (90, 120, 3)
    assert "16 MiB" in refusal(small.ljust((16 << 20) + 1, b"\0"))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_file_that_is_cut_off_is_refused(form: str) -> None:
    whole = saved(drawn(), form)
    for share in np.linspace(0, 0.95, 20):
        refusal(whole[: int(share * len(whole))])


SEEDS = [
    saved(drawn(), "JPEG"),
    saved(drawn(), "JPEG", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0"),
    saved(Image.fromarray(drawn()).convert("CMYK"), "JPEG"),
    saved(drawn(), "PNG"),
    saved(Image.fromarray(drawn()).quantize(16), "PNG", transparency=3),
    saved(Image.fromarray(drawn()), "PNG", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
    saved(np.dstack([drawn(), drawn()[..., 0]]), "WEBP"),
    saved(drawn(), "WEBP", lossless=False),
    saved(drawn(), "WEBP", save_all=True, append_images=[Image.fromarray(drawn(4))]),
    saved(Image.fromarray(drawn()).quantize(64), "GIF", transparency=3, comment=b"said"),
]  # fmt: skip
HEADS = [seed[:12] for seed in SEEDS]
Edit = tuple[float, int, bytes]


def read_or_refused(data: bytes) -> None:
    try:
        read = read_picture(data)
    except UserError as error:
        assert len(str(error)) < 120
    else:
        assert read.dtype == np.uint8 and read.ndim == 3 and read.shape[2] == 3
        assert read.shape[0] * read.shape[1] <= 50_000_000


@settings(max_examples=600)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8)), max_size=12),
    st.booleans(),
)
def test_nothing_but_a_refusal_comes_of_damaged_files(
    seed: bytes, edits: list[Edit], in_head: bool
) -> None:
    """Each edit replaces some bytes, near the beginning or anywhere, by others."""
    data = seed
    for share, gone, new in edits:
        place = int(share * (min(len(data), 700) if in_head else len(data)))
        data = data[:place] + new + data[place + gone :]
    read_or_refused(data)


@settings(max_examples=300)
@given(st.sampled_from(HEADS), st.binary(max_size=400))
@example(b"", b"")
def test_nothing_but_a_refusal_comes_of_random_bytes(head: bytes, rest: bytes) -> None:
    read_or_refused(head + rest)


# ── what it costs ────────────────────────────────────────────────────────────────────────────────

SIDE = 7000
SMALL = png((16, 16), 8, 2, [bytes(48)] * 16)
DOT = saved(Image.new("RGB", (16, 16)), "GIF")
DOT_PICTURE = DOT.index(b",", 13)


def endless_scans() -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = saved(Image.new("L", (SIDE, SIDE)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * ((10 << 20) // len(last)) + data[-2:]


def animation() -> bytes:
    """A WebP of a million tiny frames on a large canvas."""
    frame = saved(Image.new("RGB", (16, 16)), "WEBP")[12:]
    frame = bytes(6) + b"\x0f\0\0\x0f\0\0" + b"\x64\0\0\0" + frame
    frames = (b"ANMF" + struct.pack("<I", len(frame)) + frame) * ((15 << 20) // (len(frame) + 8))
    canvas = struct.pack("<I", 10) + b"\x02\0\0\0" + 2 * (SIDE - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6) + frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


def exif_of_many_values() -> bytes:
    """A JPEG whose EXIF names the same 60 KB as the value of thousands of tags."""
    tags = b"".join(struct.pack("<HHII", tag, 7, 60_000, 8) for tag in range(1, 5000))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 4999) + tags
    segment = b"\xff\xe1" + struct.pack(">H", 65_002) + exif.ljust(65_000, b"\0")
    return SEEDS[0][:2] + segment + SEEDS[0][2:]


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "PNG, RGBA": (lambda: png((SIDE, SIDE), 8, 6, [bytes(4 * SIDE)] * SIDE), "(1167, 1167, 3)"),
    "PNG, wide": (lambda: png((24000, 2047), 8, 6, [bytes(96000)] * 2047), "(2047, 24000, 3)"),
    "WebP": (lambda: saved(Image.new("RGBA", (SIDE, SIDE)), "WEBP", method=0), "(1167, 1167, 3)"),
    "WebP, animated": (animation, "(1167, 1167, 3)"),
    "PNG, claims": (lambda: png((40_000, 40_000), 1, 0, [bytes(5000)] * 40_000), "megapixels"),
    "PNG, text": (
        lambda: SMALL[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1000_000))) * 5000
        + SMALL[33:], "damaged",
    ),
    "PNG, profile": (
        lambda: SMALL[:33] + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 28))) + SMALL[33:],
        "damaged",
    ),
    "PNG, chunks": (lambda: SMALL[:33] + chunk(b"prVt") * 1_000_000 + SMALL[33:], "damaged"),
    "JPEG, scans": (endless_scans, "scans"),
    "JPEG, segments": (
        lambda: SEEDS[0][:2] + b"\xff\xe0\0\2" * 4_000_000 + SEEDS[0][2:], "damaged"
    ),
    "JPEG, EXIF": (exif_of_many_values, "(90, 120, 3)"),
    "GIF, frames": (
        lambda: DOT[:-1] + DOT[DOT_PICTURE:-1] * ((15 << 20) // len(DOT)) + b";", "(16, 16, 3)"
    ),
    "GIF, comments": (
        lambda: DOT[:DOT_PICTURE] + b"!\xfe" + b"\1x" * 8_000_000 + b"\0" + DOT[DOT_PICTURE:],
        "damaged",
    ),
}  # fmt: skip

READ_AND_TELL = """
import sys, time
from vsearch.config import UserError
from vsearch.pictures import read_picture

def peak_mib():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024

data = sys.stdin.buffer.read()
before, began = peak_mib(), time.process_time()
try:
    said = read_picture(data).shape
except UserError as error:
    said = error
print(round(peak_mib() - before), round(time.process_time() - began, 2), said, sep="|")
"""


@pytest.mark.parametrize("name", BOMBS)
def test_time_and_memory_have_a_bound_and_nothing_is_written(name: str) -> None:
    make, expected = BOMBS[name]
    data = make()
    assert len(data) <= 16 << 20
    done = subprocess.run([sys.executable, "-c", READ_AND_TELL], input=data, capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    grown_mib, took_s, said = done.stdout.decode().strip().split("|")
    assert expected in said
    assert float(grown_mib) < (1024 if said.startswith("(") else 150)
    assert float(took_s) < 10


def test_scans_that_hide_behind_markers_without_a_length_are_counted() -> None:
    """A decoder passes over TEM and restart markers, and over stuffed bytes between segments."""
    data = saved(Image.new("L", (64, 64)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    hidden = itertools.product(
        (b"\xff\x01", b"\xff\xd0", b"\xff\0", b"\xff\xff\xff"), (b"", b"\xff\xfe\0\2")
    )
    for before, after in hidden:
        assert "scans" in refusal(data[:-2] + (before + after + last) * 60 + data[-2:])
    few = data[:-2] + last * 20 + data[-2:]
    assert read_picture(few).shape == (64, 64, 3)
    behind = saved(drawn(), "JPEG") + data * 60  # pictures behind the picture are not looked at
    assert read_picture(behind).shape == (90, 120, 3)


def test_a_jpeg_with_another_behind_it_is_judged_as_any() -> None:
    """As cameras write them, with an index of the pictures in the first (CIPA DC-007)."""
    several = {"save_all": True, "append_images": [Image.fromarray(drawn(4))]}
    data = saved(drawn(), "MPO", quality=92, **several)
    np.testing.assert_array_equal(
        read_picture(data), read_picture(saved(drawn(), "JPEG", quality=92))
    )
    data = saved(drawn(), "MPO", progressive=True, **several)
    end = data.index(b"\xff\xd9")
    last = data[data.rindex(b"\xff\xda", 0, end) : end]
    assert "scans" in refusal(data[:end] + last * 60 + data[end:])
