"""The tiny world's easy scenes: what can be in one, and how a frame of it is drawn.

A scene is one setting (a textured background) with at most one group of equal objects. Everything
about it follows from its fields, so the truth of a frame is known exactly: it is a `View`. Drawing is
done at `FRAME_PX` and is deterministic: the same scene and time give the same pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

FRAME_PX = 192
"""Width and height of every frame of the world, in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "orange": (245, 135, 25),
    "yellow": (250, 225, 45),
    "green": (40, 165, 60),
    "blue": (40, 90, 220),
    "purple": (135, 50, 175),
    "pink": (250, 135, 190),
    "brown": (125, 75, 40),
    "white": (245, 245, 245),
    "black": (22, 22, 28),
}

Pixels = NDArray[np.uint8]
Field = NDArray[np.float32]
Point = tuple[float, float]

TINY, SMALL, LARGE = 0.08, 0.2, 0.27
"""Radii: an object on its own is tiny or small below, large above these."""

LAYOUTS: dict[int, list[Point]] = {  # where the members of a group stand, in units of its spread
    1: [(0.0, 0.0)],
    2: [(-1.0, 0.0), (1.0, 0.0)],
    3: [(-1.0, 0.9), (1.0, 0.9), (0.0, -0.9)],
    4: [(-1.0, -1.0), (1.0, -1.0), (-1.0, 1.0), (1.0, 1.0)],
    5: [(-1.0, 1.0), (1.0, 1.0), (-2.0, -1.0), (0.0, -1.0), (2.0, -1.0)],
}


@dataclass(frozen=True)
class Group:
    """Equal objects that stand together. Lengths are fractions of the frame, y points downwards."""

    kind: str
    colour: str
    count: int
    radius: float
    centre: Point

    @property
    def spread(self) -> float:
        """Half the distance of two neighbours."""
        return self.radius * 1.15

    @property
    def reach(self) -> Point:
        """How far the group reaches from its centre, sideways and up or down."""
        x, y = (max(axis) for axis in zip(*LAYOUTS[self.count], strict=True))
        return self.radius + x * self.spread, self.radius + y * self.spread

    def centres(self) -> list[Point]:
        """Where the centres of its objects are."""
        (x, y), spread = self.centre, self.spread
        return [(x + dx * spread, y + dy * spread) for dx, dy in LAYOUTS[self.count]]


@dataclass(frozen=True)
class View:
    """What is to be seen at one time. Without a setting nothing is: the picture is black or white.

    `acting` is the group that does `action` at this time; it is not among `groups` while it is less
    than half there.
    """

    setting: str | None
    groups: tuple[Group, ...] = ()
    dark: bool = False
    action: str | None = None
    acting: Group | None = None


@dataclass(frozen=True)
class Scene:
    """One shot of the world. Lengths are fractions of the frame, speeds fractions per second."""

    setting: str
    kind: str | None
    colour: str | None
    count: int
    radius: float
    centre: Point
    velocity: Point
    pan_per_s: float
    light: float
    light_per_s: float
    noise_sigma: float
    duration_s: float
    texture_seed: int

    def __post_init__(self) -> None:
        if self.setting not in SETTINGS:
            raise ValueError(f"unknown setting {self.setting!r}")
        if (self.kind is None) != (self.count == 0) or (self.colour is None) != (self.count == 0):
            raise ValueError("a scene has objects of one kind and colour, or none at all")

    @property
    def pair(self) -> tuple[str, str] | None:
        """(colour, kind), or None for a scene without objects."""
        return (self.colour, self.kind) if self.colour and self.kind else None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(colour, kind) of each of its groups."""
        return [self.pair] if self.pair else []

    def drawn(self, time_s: float) -> list[tuple[Group, float]]:
        """What is drawn at `time_s` after the start, with its opacity: the group moves as one and
        bounces off the frame's edges."""
        if not (self.colour and self.kind):
            return []
        group = Group(self.kind, self.colour, self.count, self.radius, (0.0, 0.0))
        x, y = (
            _bounce(start, speed * time_s, reach)
            for start, speed, reach in zip(self.centre, self.velocity, group.reach, strict=True)
        )
        return [(replace(group, centre=(x, y)), 1.0)]

    def view(self, time_s: float) -> View:
        """What is to be seen at `time_s` after the start."""
        groups = tuple(group for group, _ in self.drawn(time_s))
        return View(self.setting, groups, is_dark(self.light, self.setting))

    def stretches(self) -> list[tuple[float, float, View]]:
        """(start_s, end_s, what is to be seen), one after another: only places change within one."""
        return [(0.0, self.duration_s, self.view(0.0))]


def is_dark(light: float, setting: str) -> bool:
    """Whether a setting under that much light (1: as it is painted) counts as being in low light."""
    return light < 0.5 or setting == "night"


def held_out(colour: str, kind: str) -> bool:
    """Whether the pair is kept out of the training of the shipped models: one pair in six, spread
    so that every colour and every kind is still seen in other pairs.
    """
    return (list(COLOURS).index(colour) + list(KINDS).index(kind)) % 6 == 0


def sample_scene(
    rng: np.random.Generator,
    pair: tuple[str, str] | None = None,
    setting: str | None = None,
    empty: bool = False,
) -> Scene:
    """A random scene; `pair` and `setting` fix what is in it, `empty` leaves the objects out."""
    setting = setting or str(rng.choice(list(SETTINGS)))
    if empty:
        count, colour, kind = 0, None, None
    else:
        colour, kind = pair or (str(rng.choice(list(COLOURS))), str(rng.choice(list(KINDS))))
        count = int(rng.choice([1, 2, 3], p=[0.7, 0.18, 0.12]))
    low, high = {0: (0.0, 0.0), 1: (0.15, 0.34), 2: (0.14, 0.2), 3: (0.12, 0.16)}[count]
    angle = rng.uniform(0, 2 * np.pi)
    speed = rng.uniform(0.05, 0.45) if rng.random() < 0.8 else 0.0
    return Scene(
        setting=setting,
        kind=kind,
        colour=colour,
        count=count,
        radius=float(rng.uniform(low, high)),
        centre=(float(rng.uniform(0, 1)), float(rng.uniform(0, 1))),
        velocity=(float(speed * np.cos(angle)), float(speed * np.sin(angle))),
        pan_per_s=float(rng.uniform(-0.06, 0.06)) if rng.random() < 0.6 else 0.0,
        light=float(rng.uniform(0.85, 1.1)),
        light_per_s=float(rng.uniform(-0.03, 0.03)),
        noise_sigma=float(rng.uniform(0, 6)),
        duration_s=float(rng.uniform(2, 8)),
        texture_seed=int(rng.integers(2**31)),
    )


class SceneRenderer:
    """Draws the frames of one scene: background and sprites are made once, frames are composed."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._rng = np.random.default_rng(scene.texture_seed)
        self._background = self._draw_background()
        self._noise = self._rng.standard_normal((FRAME_PX * 2, FRAME_PX * 2, 1), np.float32)
        self._shades = {pair: self._shade(pair[0]) for pair in scene.pairs}
        self._sprites: dict[tuple[str, str], Image.Image] = {}

    def frame(self, time_s: float) -> Pixels:
        """The picture at `time_s` after the scene's start, uint8 (FRAME_PX, FRAME_PX, 3) RGB."""
        return self._rounded(self._lit(time_s) + self._grain(time_s))

    def _lit(self, time_s: float) -> Field:
        """Background and objects under the scene's light."""
        picture = self._background_at(time_s)
        for group, opacity in self.scene.drawn(time_s):
            sprite = self._sprite(group, opacity)
            for x, y in group.centres():
                side = sprite.width
                corner = (round(x * FRAME_PX - side / 2), round(y * FRAME_PX - side / 2))
                picture.paste(sprite, corner, sprite)
        light = self.scene.light + self.scene.light_per_s * time_s
        return np.asarray(picture, np.float32) * np.float32(light)

    def _grain(self, time_s: float) -> Field | np.float32:
        """Noise: a window of one field, because fresh Gaussian noise would cost more than the drawing."""
        if not self.scene.noise_sigma:
            return np.float32(0)
        row, column = np.random.default_rng(int(time_s * 1e6)).integers(0, FRAME_PX, 2)
        window = self._noise[row : row + FRAME_PX, column : column + FRAME_PX]
        return np.float32(self.scene.noise_sigma) * window

    def _rounded(self, pixels: Field) -> Pixels:
        return np.clip(pixels, 0, 255).astype(np.uint8)

    def _draw_background(self) -> Pixels:
        pan_px = int(abs(self.scene.pan_per_s) * self.scene.duration_s * FRAME_PX) + 1
        return SETTINGS[self.scene.setting](self._rng, FRAME_PX, FRAME_PX + pan_px)

    def _background_at(self, time_s: float) -> Image.Image:
        scene = self.scene
        spare_px = self._background.shape[1] - FRAME_PX
        travelled_px = min(int(abs(scene.pan_per_s) * time_s * FRAME_PX), spare_px)
        left = travelled_px if scene.pan_per_s >= 0 else spare_px - travelled_px
        return Image.fromarray(self._background[:, left : left + FRAME_PX])

    def _shade(self, colour: str) -> tuple[int, int, int]:
        """The colour as it is in this scene."""
        jitter = self._rng.integers(-10, 11, 3)
        red, green, blue = np.clip(np.array(COLOURS[colour]) + jitter, 0, 255).tolist()
        return red, green, blue

    def _sprite(self, group: Group, opacity: float) -> Image.Image:
        """The picture of one object of the group."""
        pair, radius_px = (group.colour, group.kind), round(group.radius * FRAME_PX)
        if pair not in self._sprites or self._sprites[pair].width != 2 * radius_px:
            self._sprites[pair] = draw_object(group.kind, self._shades[pair], radius_px)
        sprite = self._sprites[pair]
        if opacity < 1:
            sprite = sprite.copy()
            sprite.putalpha(sprite.getchannel("A").point(lambda alpha: round(alpha * opacity)))
        return sprite


def _bounce(start: float, travelled: float, reach: float) -> float:
    """Position in [reach, 1 − reach] of a point that set out at `start` (a fraction of that range)
    and is reflected at its ends.
    """
    width = 1 - 2 * reach
    phase = (start * width + travelled) % (2 * width)
    return reach + (phase if phase <= width else 2 * width - phase)


# ── objects ──────────────────────────────────────────────────────────────────────────────────────
# Each drawer works in coordinates from −1 to 1 (y downwards) and returns the parts of one object:
# polygons, or ellipses as (left, top, right, bottom), filled with the object's own colour or with
# one of the fixed colours below.

_OWN, _DARK, _GLASS, _WOOD, _PALE = "own", (40, 40, 45), (190, 225, 240), (120, 80, 50), (235,) * 3
Part = tuple[str, list[Point], object]


def _regular(points: int, inner: float, turn: float) -> list[Point]:
    """A star of `points` points; `inner` is the ratio of inner to outer radius."""
    angles = np.arange(2 * points) * np.pi / points + turn
    radii = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return [
        (float(r * np.cos(a)), float(r * np.sin(a))) for a, r in zip(angles, radii, strict=True)
    ]


def _heart() -> list[Point]:
    t = np.linspace(0, 2 * np.pi, 60)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [(float(a / 17), float(-b / 17)) for a, b in zip(x, y, strict=True)]


def _half_disc() -> list[Point]:
    t = np.linspace(np.pi, 2 * np.pi, 40)
    return [(float(np.cos(a)), float(np.sin(a) * 0.95 + 0.1)) for a in t]


KINDS: dict[str, list[Part]] = {
    "ball": [("ellipse", [(-0.95, -0.95), (0.95, 0.95)], _OWN)],
    "triangle": [("polygon", [(0, -0.95), (0.98, 0.85), (-0.98, 0.85)], _OWN)],
    "star": [("polygon", _regular(5, 0.42, -np.pi / 2), _OWN)],
    "heart": [("polygon", _heart(), _OWN)],
    "ring": [("ring", [(-0.95, -0.95), (0.95, 0.95)], _OWN)],
    "cross": [
        (
            "polygon",
            [
                (-0.3, -0.95),
                (0.3, -0.95),
                (0.3, -0.3),
                (0.95, -0.3),
                (0.95, 0.3),
                (0.3, 0.3),
                (0.3, 0.95),
                (-0.3, 0.95),
                (-0.3, 0.3),
                (-0.95, 0.3),
                (-0.95, -0.3),
                (-0.3, -0.3),
            ],
            _OWN,
        )
    ],
    "car": [
        ("polygon", [(-0.5, -0.5), (0.35, -0.5), (0.65, 0.0), (-0.75, 0.0)], _OWN),
        ("polygon", [(-0.42, -0.4), (-0.02, -0.4), (-0.02, -0.05), (-0.58, -0.05)], _GLASS),
        ("polygon", [(0.06, -0.4), (0.3, -0.4), (0.5, -0.05), (0.06, -0.05)], _GLASS),
        ("polygon", [(-1, -0.05), (0.98, -0.05), (0.98, 0.45), (-1, 0.45)], _OWN),
        ("ellipse", [(-0.75, 0.2), (-0.25, 0.7)], _DARK),
        ("ellipse", [(0.25, 0.2), (0.75, 0.7)], _DARK),
    ],
    "house": [
        ("polygon", [(-0.75, -0.1), (0.75, -0.1), (0.75, 0.95), (-0.75, 0.95)], _OWN),
        ("polygon", [(0, -0.98), (0.98, -0.08), (-0.98, -0.08)], _OWN),
        ("polygon", [(-0.18, 0.35), (0.18, 0.35), (0.18, 0.95), (-0.18, 0.95)], _DARK),
        ("polygon", [(-0.6, 0.1), (-0.3, 0.1), (-0.3, 0.4), (-0.6, 0.4)], _GLASS),
        ("polygon", [(0.3, 0.1), (0.6, 0.1), (0.6, 0.4), (0.3, 0.4)], _GLASS),
    ],
    "tree": [
        ("polygon", [(-0.15, 0.3), (0.15, 0.3), (0.15, 0.98), (-0.15, 0.98)], _WOOD),
        ("ellipse", [(-0.85, -0.45), (0.05, 0.45)], _OWN),
        ("ellipse", [(-0.05, -0.45), (0.85, 0.45)], _OWN),
        ("ellipse", [(-0.55, -0.98), (0.55, 0.15)], _OWN),
    ],
    "boat": [
        ("polygon", [(-0.98, 0.35), (0.98, 0.35), (0.6, 0.9), (-0.6, 0.9)], _OWN),
        ("polygon", [(-0.06, -0.95), (0.04, -0.95), (0.04, 0.35), (-0.06, 0.35)], _WOOD),
        ("polygon", [(0.08, -0.9), (0.8, 0.2), (0.08, 0.2)], _OWN),
        ("polygon", [(-0.1, -0.65), (-0.1, 0.2), (-0.62, 0.2)], _PALE),
    ],
    "fish": [
        ("polygon", [(0.35, 0), (0.98, -0.55), (0.98, 0.55)], _OWN),
        ("ellipse", [(-0.98, -0.5), (0.6, 0.5)], _OWN),
        ("ellipse", [(-0.72, -0.22), (-0.46, 0.04)], _DARK),
    ],
    "umbrella": [
        ("polygon", _half_disc(), _OWN),
        ("polygon", [(-0.05, 0.1), (0.05, 0.1), (0.05, 0.9), (-0.05, 0.9)], _DARK),
        ("polygon", [(-0.35, 0.75), (0.05, 0.75), (0.05, 0.9), (-0.35, 0.9)], _DARK),
    ],
}


def draw_object(kind: str, rgb: tuple[int, int, int], radius_px: int) -> Image.Image:
    """An RGBA sprite of 2·`radius_px` pixels a side, antialiased by drawing it four times larger."""
    side = 8 * radius_px
    half = side / 2
    sprite = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    pen = ImageDraw.Draw(sprite)
    dark = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] < 90
    outline = (225, 225, 225) if dark else (30, 30, 30)
    width = max(2, round(side * 0.02))
    for shape, points, fill in KINDS[kind]:
        pixels = [(half + x * (half - 2), half + y * (half - 2)) for x, y in points]
        colour = rgb if fill == _OWN else fill
        if shape == "polygon":
            pen.polygon(pixels, fill=colour, outline=outline, width=width)  # type: ignore[arg-type]
        elif shape == "ellipse":
            pen.ellipse(pixels, fill=colour, outline=outline, width=width)  # type: ignore[arg-type]
        else:
            band = round(side * 0.17)
            pen.ellipse(pixels, outline=outline, width=band)
            (left, top), (right, bottom) = pixels
            inside = (left + width, top + width, right - width, bottom - width)
            pen.ellipse(inside, outline=rgb, width=band - 2 * width)
    return sprite.resize((2 * radius_px, 2 * radius_px), Image.Resampling.BOX)


# ── settings ─────────────────────────────────────────────────────────────────────────────────────
def _noise(
    rng: np.random.Generator, height: int, width: int, cell: float, flat: float = 1
) -> Field:
    """Smooth noise in [0, 1], float32 (height, width, 1); `cell` is its grain in pixels, `flat`
    stretches it sideways.
    """
    grid = rng.random((max(2, int(height / cell) + 2), max(2, int(width / cell / flat) + 2)))
    image = Image.fromarray(grid.astype(np.float32))
    field = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return np.clip(field, 0, 1)[..., None]


def _mix(low: tuple[int, int, int], high: tuple[int, int, int], field: Field) -> Field:
    low_rgb, high_rgb = np.array(low, np.float32), np.array(high, np.float32)
    return low_rgb + (high_rgb - low_rgb) * field


def _rows(height: int) -> Field:
    return np.linspace(0, 1, height, dtype=np.float32)[:, None, None]


def _pixels(field: NDArray[np.floating]) -> Pixels:
    return np.ascontiguousarray(np.clip(field, 0, 255).astype(np.uint8))


def _horizon(sky: Field, ground: Field, height: float) -> Field:
    cut = int(sky.shape[0] * height)
    return np.concatenate([sky[:cut], ground[cut:]])


def _beach(rng: np.random.Generator, h: int, w: int) -> Pixels:
    sky = _mix((150, 205, 245), (225, 240, 250), _rows(h)) + 0 * _noise(rng, h, w, 40)
    sea = _mix((25, 120, 165), (90, 190, 205), _noise(rng, h, w, 5, flat=6))
    sand = _mix((225, 200, 145), (245, 225, 180), _noise(rng, h, w, 3))
    line = rng.uniform(0.25, 0.4)
    return _pixels(_horizon(_horizon(sky, sea, line), sand, line + rng.uniform(0.18, 0.28)))


def _forest(rng: np.random.Generator, h: int, w: int) -> Pixels:
    leaves = _mix(
        (18, 55, 25), (75, 120, 55), 0.6 * _noise(rng, h, w, 8) + 0.4 * _noise(rng, h, w, 3)
    )
    for _ in range(int(w / 22)):
        x, trunk = int(rng.integers(0, w)), int(rng.integers(4, 11))
        leaves[int(h * rng.uniform(0.0, 0.3)) :, x : x + trunk] = (62, 44, 30)
        leaves[:, x + trunk // 2 : x + trunk // 2 + 1] += 12
    return _pixels(leaves)


def _desert(rng: np.random.Generator, h: int, w: int) -> Pixels:
    sky = _mix((250, 205, 150), (255, 235, 200), _rows(h)) + 0 * _noise(rng, h, w, 40)
    x, y = np.arange(w, dtype=np.float32)[None, :], np.arange(h, dtype=np.float32)[:, None]
    bend = rng.uniform(5, 12) * np.sin(x / rng.uniform(18, 40) + rng.uniform(0, 6))
    dunes = (0.5 + 0.5 * np.sin((y + bend) / rng.uniform(4, 7)))[..., None].astype(np.float32)
    sand = _mix((190, 115, 55), (230, 165, 95), dunes)
    return _pixels(_horizon(sky, sand, rng.uniform(0.25, 0.45)))


def _snow(rng: np.random.Generator, h: int, w: int) -> Pixels:
    sky = _mix((135, 150, 170), (190, 200, 212), _noise(rng, h, w, 40))
    ground = _mix((205, 218, 232), (240, 245, 250), _noise(rng, h, w, 16, flat=3))
    field = _horizon(sky, ground, rng.uniform(0.3, 0.45))
    for _ in range(int(w * h / 500)):
        y, x = int(rng.integers(0, h - 2)), int(rng.integers(0, w - 2))
        field[y : y + 2, x : x + 2] = 252
    return _pixels(field)


def _city(rng: np.random.Generator, h: int, w: int) -> Pixels:
    field = _mix((165, 175, 190), (205, 210, 218), _rows(h)) + 0 * _noise(rng, h, w, 40)
    road = int(h * 0.8)
    x = 0
    while x < w:
        wide, top = int(rng.integers(22, 44)), int(rng.integers(int(h * 0.05), int(h * 0.45)))
        field[top:road, x : x + wide] = rng.integers(85, 140)
        for wy in range(top + 6, road - 6, 11):
            for wx in range(x + 4, min(x + wide - 5, w), 9):
                field[wy : wy + 6, wx : wx + 5] = (
                    (240, 225, 140) if rng.random() < 0.3 else (60, 70, 85)
                )
        x += wide + int(rng.integers(0, 4))
    field[road:] = _mix((62, 62, 66), (84, 84, 88), _noise(rng, h, w, 3))[road:]
    field[road + (h - road) // 2 :, :][:2] = 215
    return _pixels(field)


def _meadow(rng: np.random.Generator, h: int, w: int) -> Pixels:
    sky = _mix((95, 165, 240), (215, 230, 250), _noise(rng, h, w, 35, flat=2) ** 2)
    grass = _mix((70, 150, 45), (150, 205, 80), _noise(rng, h, w, 3))
    field = _horizon(sky, grass, rng.uniform(0.25, 0.4))
    for _ in range(int(w / 5)):
        y, x = int(rng.integers(h // 2, h - 3)), int(rng.integers(0, w - 3))
        field[y : y + 3, x : x + 3] = (250, 245, 250) if rng.random() < 0.5 else (250, 220, 80)
    return _pixels(field)


def _night(rng: np.random.Generator, h: int, w: int) -> Pixels:
    field = _mix((8, 10, 32), (38, 40, 85), _rows(h)) + 8 * _noise(rng, h, w, 30)
    for _ in range(int(w / 2)):
        y, x = int(rng.integers(0, h - 2)), int(rng.integers(0, w - 2))
        field[y : y + 2, x : x + 2] = rng.integers(150, 255)
    return _pixels(field)


def _kitchen(rng: np.random.Generator, h: int, w: int) -> Pixels:
    tile = int(rng.integers(16, 26))
    x, y = np.arange(w)[None, :], np.arange(h)[:, None]
    checks = (((x // tile) + (y // tile)) % 2)[..., None].astype(np.float32)
    wall = _mix((150, 195, 190), (222, 238, 232), checks) + 6 * _noise(rng, h, w, 4)
    wall[((x % tile < 1) | (y % tile < 1))] = 175
    planks = (np.arange(h)[:, None] // 9 % 2)[..., None].astype(np.float32)
    floor = _mix((150, 100, 62), (180, 128, 84), 0.5 * planks + 0.5 * _noise(rng, h, w, 3, flat=8))
    return _pixels(_horizon(wall, floor, rng.uniform(0.6, 0.75)))


def _underwater(rng: np.random.Generator, h: int, w: int) -> Pixels:
    field = _mix((70, 190, 205), (5, 55, 105), _rows(h)) + 0 * _noise(rng, h, w, 40)
    x, y = np.arange(w, dtype=np.float32)[None, :], np.arange(h, dtype=np.float32)[:, None]
    rays = np.clip(np.sin((x + 0.5 * y) / rng.uniform(9, 15) + rng.uniform(0, 6)), 0, 1)
    field = field + 38 * (rays * (1 - y / h))[..., None]
    for _ in range(int(w / 8)):
        cy, cx, r = (
            int(rng.integers(6, h - 6)),
            int(rng.integers(6, w - 6)),
            int(rng.integers(2, 5)),
        )
        ring = np.hypot(x - cx, y - cy)
        field[(ring < r) & (ring > r - 1.6)] = (205, 240, 250)
    return _pixels(field)


def _brick(rng: np.random.Generator, h: int, w: int) -> Pixels:
    tall, wide = int(rng.integers(11, 16)), int(rng.integers(26, 36))
    x, y = np.arange(w)[None, :], np.arange(h)[:, None]
    shifted = x + (y // tall % 2) * (wide // 2)
    shade = rng.random((h // tall + 2, (w + wide) // wide + 2)).astype(np.float32)
    field = _mix((125, 52, 40), (172, 88, 68), shade[y // tall, shifted // wide][..., None])
    field[(y % tall < 2) | (shifted % wide < 2)] = (190, 180, 170)
    return _pixels(field + 8 * _noise(rng, h, w, 2))


SETTINGS: dict[str, Callable[[np.random.Generator, int, int], Pixels]] = {
    "beach": _beach,
    "forest": _forest,
    "desert": _desert,
    "snow": _snow,
    "city": _city,
    "meadow": _meadow,
    "night": _night,
    "kitchen": _kitchen,
    "underwater": _underwater,
    "brick wall": _brick,
}
