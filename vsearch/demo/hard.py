"""The tiny world's hard scenes: what real footage has and the easy ones lack.

A second group of objects in relation to the first, counts up to five, tiny objects, low light, an
action, a slow change of setting, a stretch without motion, flashes and fades. What happens in a scene
is told by its fields, in seconds of the scene; `HardScene.stretches` derives the truth from them.
"Moving" and "left" are meant as seen in the picture, whatever the background does.
"""

import itertools
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vsearch.demo.scenes import (
    FRAME_PX,
    LARGE,
    SETTINGS,
    SMALL,
    TINY,
    Group,
    Pixels,
    Point,
    Scene,
    SceneRenderer,
    View,
    is_dark,
)

VEILED = 0.85
"""From this opacity on a flash or fade hides everything."""
VEILS = {"black": 0, "white": 255}
MOVES: dict[str, Point] = {
    "moves left": (-1.0, 0.0),
    "moves right": (1.0, 0.0),
    "moves up": (0.0, -1.0),
    "moves down": (0.0, 1.0),
}
ACTIONS = (*MOVES, "appears", "disappears", "grows", "shrinks")
RELATIONS: dict[str, Point] = {  # where the second group is, seen from the first
    "left of": (1.0, 0.0),
    "right of": (-1.0, 0.0),
    "above": (0.0, 1.0),
    "below": (0.0, -1.0),
}
MANNERS = ("dissolve", "pan left", "pan right")


@dataclass(frozen=True)
class Action:
    """What the first group does in [start_s, end_s). `amount` is how far it moves, as a fraction of the
    frame, or what its radius is multiplied by; it means nothing to what appears or disappears."""

    name: str
    start_s: float
    end_s: float
    amount: float

    def progress(self, time_s: float) -> float:
        return _ramp(time_s, self.start_s, self.end_s)


@dataclass(frozen=True)
class Change:
    """A slow way from the scene's setting to another; each is the dominant one for half of it."""

    into: str
    manner: str
    start_s: float
    end_s: float

    @property
    def middle_s(self) -> float:
        return (self.start_s + self.end_s) / 2

    def share(self, time_s: float) -> float:
        """How much of the picture's background is the new setting's."""
        return _ramp(time_s, self.start_s, self.end_s)


@dataclass(frozen=True)
class Veil:
    """Black or white over everything: opaque in [start_s, end_s), coming and going in `ramp_s`."""

    colour: str
    start_s: float
    end_s: float
    ramp_s: float

    def opacity(self, time_s: float) -> float:
        coming = _ramp(time_s, self.start_s - self.ramp_s, self.start_s)
        return coming - _ramp(time_s, self.end_s, self.end_s + self.ramp_s)

    def hides(self) -> Point:
        """From when to when nothing is to be seen."""
        slack_s = (1 - VEILED) * self.ramp_s
        return self.start_s - slack_s, self.end_s + slack_s


Event = TypeVar("Event", Action | None, Change | None, Veil | None)


def _ramp(time_s: float, start_s: float, end_s: float) -> float:
    return min(1.0, max(0.0, (time_s - start_s) / (end_s - start_s)))


@dataclass(frozen=True)
class HardScene(Scene):
    """A scene with events. Its objects stay where they are, but for a slight `sway` and the action.

    `second` is another group, whose centre is given as seen from the first one's. From `still_s` on
    the picture stands still: identical to the last bit, or with fresh noise if `still_noise`.
    """

    second: Group | None = None
    sway: float = 0.0
    action: Action | None = None
    change: Change | None = None
    veil: Veil | None = None
    still_s: float | None = None
    still_noise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.action and self.action.name in MOVES and self.second:
            raise ValueError("what moves is alone, or the relation to the other would not last")
        if self.velocity != (0, 0):
            raise ValueError("objects of a hard scene move by an action only")
        if any(low > high for low, high in self._room()):
            raise ValueError("the objects do not fit into the frame")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        second = [(self.second.colour, self.second.kind)] if self.second else []
        return super().pairs + second

    def clock(self, time_s: float) -> float:
        """The time of which the picture is shown."""
        return time_s if self.still_s is None else min(time_s, self.still_s)

    def drawn(self, time_s: float) -> list[tuple[Group, float]]:
        if not (self.kind and self.colour):
            return []
        time_s = self.clock(time_s)
        turn = 2 * np.pi * time_s / 3
        swayed = (self.sway * float(np.sin(turn)), self.sway * float(np.cos(turn)))
        x, y = (
            low + place * (high - low) + moved
            for place, moved, (low, high) in zip(self.centre, swayed, self._room(), strict=True)
        )
        dx, dy = self._travelled(time_s)
        scale, opacity = self._size(time_s), self._opacity(time_s)
        first = Group(self.kind, self.colour, self.count, self.radius * scale, (x + dx, y + dy))
        drawn = [(first, opacity)] if opacity else []
        if self.second:
            (across, down) = self.second.centre
            drawn.append((replace(self.second, centre=(x + across, y + down)), 1.0))
        return drawn

    def view(self, time_s: float) -> View:
        if self.veil and self.veil.hides()[0] <= time_s < self.veil.hides()[1]:
            return View(None)
        changed = self.change is not None and time_s >= self.change.middle_s
        setting = self.change.into if self.change and changed else self.setting
        groups = self.drawn(time_s)
        action, acting = None, None
        if self.action and self.action.start_s <= time_s < self.action.end_s:
            action, acting = self.action.name, groups[0][0] if groups else None
        there = tuple(group for group, opacity in groups if opacity >= 0.5)
        return View(setting, there, is_dark(self.light, setting), action, acting)

    def stretches(self) -> list[tuple[float, float, View]]:
        edges = {0.0, self.duration_s}
        if self.veil:
            edges |= {*self.veil.hides()}
        if self.change:
            edges |= {self.change.middle_s}
        if self.action:
            action, seconds = self.action, self.action.end_s - self.action.start_s
            edges |= {action.start_s, action.end_s}
            edges |= {action.start_s + share * seconds for share in self._turning_points()}
        times = sorted(edge for edge in edges if 0 <= edge <= self.duration_s)
        return [
            (start_s, end_s, self.view((start_s + end_s) / 2))
            for start_s, end_s in itertools.pairwise(times)
        ]

    def on_grid(self, fps: int) -> "HardScene":
        """The same scene with its events at whole frames."""
        return replace(
            self,
            duration_s=_snapped(self.duration_s, fps),
            action=_on_grid(self.action, fps),
            change=_on_grid(self.change, fps),
            veil=_on_grid(self.veil, fps),
            still_s=None if self.still_s is None else _snapped(self.still_s, fps),
        )

    def _room(self) -> list[Point]:
        """Lowest and highest place of the first group's centre at which all stays in the frame, for x
        and y."""
        first = Group(
            "", "", max(self.count, 1), self.radius * max(1.0, self._size(np.inf)), (0, 0)
        )
        boxes = [((0.0, 0.0), first.reach), (self._travelled(np.inf), first.reach)]
        if self.second:
            boxes.append((self.second.centre, self.second.reach))
        return [
            (
                self.sway - min(centre[axis] - reach[axis] for centre, reach in boxes),
                1 - self.sway - max(centre[axis] + reach[axis] for centre, reach in boxes),
            )
            for axis in (0, 1)
        ]

    def _travelled(self, time_s: float) -> Point:
        if not self.action or self.action.name not in MOVES:
            return 0.0, 0.0
        far = self.action.amount * self.action.progress(time_s)
        x, y = MOVES[self.action.name]
        return x * far, y * far

    def _size(self, time_s: float) -> float:
        if not self.action or self.action.name not in ("grows", "shrinks"):
            return 1.0
        return 1 + (self.action.amount - 1) * self.action.progress(time_s)

    def _opacity(self, time_s: float) -> float:
        if not self.action or self.action.name not in ("appears", "disappears"):
            return 1.0
        there = self.action.progress(time_s)
        return there if self.action.name == "appears" else 1 - there

    def _turning_points(self) -> list[float]:
        """The shares of the action after which what is there, or is called tiny, small or large,
        changes."""
        if not self.action or self.action.name in MOVES:
            return []
        if self.action.name in ("appears", "disappears"):
            return [0.5]
        grown = self.radius * (self.action.amount - 1)
        shares = [(radius - self.radius) / grown for radius in (TINY, SMALL, LARGE)]
        return [share for share in shares if 0 < share < 1]


def relation(one: Group, other: Group) -> str:
    """Where `one` is, seen from `other`: the name in RELATIONS that fits best."""
    x, y = other.centre[0] - one.centre[0], other.centre[1] - one.centre[1]
    return max(RELATIONS, key=lambda name: RELATIONS[name][0] * x + RELATIONS[name][1] * y)


def _snapped(time_s: float, fps: int) -> float:
    return round(time_s * fps) / fps


def _on_grid(event: Event, fps: int) -> Event:
    if event is None:
        return event
    start_s, end_s = _snapped(event.start_s, fps), _snapped(event.end_s, fps)
    return replace(event, start_s=start_s, end_s=end_s)


def opposite(name: str) -> str:
    """Of a relation."""
    x, y = RELATIONS[name]
    return next(other for other, side in RELATIONS.items() if side == (-x, -y))


def mirrored(view: View) -> View:
    """What is to be seen in the mirrored picture."""

    def turned(group: Group) -> Group:
        return replace(group, centre=(1 - group.centre[0], group.centre[1]))

    sides = {"moves left": "moves right", "moves right": "moves left"}
    return replace(
        view,
        groups=tuple(turned(group) for group in view.groups),
        action=sides.get(view.action, view.action) if view.action else None,
        acting=turned(view.acting) if view.acting else None,
    )


class HardRenderer(SceneRenderer):
    """Draws the frames of a hard scene."""

    scene: HardScene

    def frame(self, time_s: float) -> Pixels:
        shown_s = self.scene.clock(time_s)
        grain = self._grain(time_s if self.scene.still_noise else shown_s)
        pixels = self._lit(shown_s) + grain
        veil = self.scene.veil
        if veil and (opacity := veil.opacity(time_s)):
            pixels = pixels.clip(0, 255) * np.float32(1 - opacity) + VEILS[veil.colour] * opacity
        return self._rounded(pixels)

    def _draw_background(self) -> Pixels:
        background = super()._draw_background()
        if self.scene.change:
            after = SETTINGS[self.scene.change.into](self._rng, FRAME_PX, FRAME_PX)
            pair = [background[:, :FRAME_PX], after]
            background = np.concatenate(pair[::-1] if self._leftwards() else pair, axis=1)
        return background

    def _background_at(self, time_s: float) -> Image.Image:
        change = self.scene.change
        if not change:
            return super()._background_at(time_s)
        share = change.share(time_s)
        if change.manner == "dissolve":
            before, after = np.split(self._background.astype(np.float32), 2, axis=1)
            mixed: NDArray[np.float32] = before + (after - before) * np.float32(share)
            return Image.fromarray(self._rounded(mixed))
        left = round((1 - share if self._leftwards() else share) * FRAME_PX)
        return Image.fromarray(self._background[:, left : left + FRAME_PX])

    def _leftwards(self) -> bool:
        return self.scene.change is not None and self.scene.change.manner == "pan left"


def renderer(scene: Scene) -> SceneRenderer:
    """The renderer for a scene, easy or hard."""
    return HardRenderer(scene) if isinstance(scene, HardScene) else SceneRenderer(scene)


# ── random scenes ────────────────────────────────────────────────────────────────────────────────
RADII = {1: (0.1, 0.3), 2: (0.1, 0.17), 3: (0.09, 0.15), 4: (0.09, 0.14), 5: (0.085, 0.12)}
RADII_OF_TWO = {1: (0.1, 0.16), 2: (0.085, 0.1), 3: (0.085, 0.1)}
WIDEST = 0.94
"""How much of the frame two groups take at most, so that there is room to sway."""


@dataclass(frozen=True)
class Cast:
    """What is to be in a scene: (colour, kind) of up to two groups. What is open is left to chance;
    `count` is the first group's."""

    pairs: tuple[tuple[str, str], ...]
    count: int | None = None
    relation: str | None = None
    action: str | None = None


def sample_hard_scene(
    rng: np.random.Generator, cast: Cast, setting: str | None = None
) -> HardScene:
    """A random hard scene of that cast."""
    setting = setting or str(rng.choice(list(SETTINGS)))
    event = "action" if cast.action else _event(rng, cast)
    action = (cast.action or _action(rng, len(cast.pairs))) if event == "action" else None
    first, amount = _first(rng, cast, action) if cast.pairs else (None, 0.0)
    second = _second(rng, cast, first, max(amount, 1.0)) if first and cast.pairs[1:] else None
    scene = HardScene(
        setting=setting,
        kind=first.kind if first else None,
        colour=first.colour if first else None,
        count=first.count if first else 0,
        radius=first.radius if first else 0.0,
        second=second,
        centre=(float(rng.uniform(0, 1)), float(rng.uniform(0, 1))),
        velocity=(0.0, 0.0),
        sway=float(rng.uniform(0, 0.015)),
        pan_per_s=float(rng.uniform(-0.05, 0.05)) if rng.random() < 0.5 else 0.0,
        light=float(rng.uniform(0.85, 1.1)),
        light_per_s=float(rng.uniform(-0.02, 0.02)),
        noise_sigma=float(rng.uniform(0, 6)),
        duration_s=float(rng.uniform(2.5, 7)),
        texture_seed=int(rng.integers(2**31)),
    )
    if rng.random() < 0.15 and setting != "night" and event != "change":
        scene = replace(scene, light=float(rng.uniform(0.2, 0.33)), light_per_s=0.0)
    if action:
        return _with_action(rng, scene, action, amount)
    if event == "change" and setting != "night":
        return _with_change(rng, scene)
    if event == "veil":
        return _with_veil(rng, scene)
    if event == "still":
        still_s = scene.duration_s * float(rng.choice([0, rng.uniform(0.2, 0.6)]))
        return replace(scene, still_s=still_s, still_noise=bool(rng.random() < 0.5))
    return scene


def _event(rng: np.random.Generator, cast: Cast) -> str:
    shares = {1: [0.4, 0.15, 0.15, 0.15, 0.15], 2: [0.15, 0.2, 0.15, 0.2, 0.3]}
    alone = len(cast.pairs) if cast.count in (None, 1) else 0  # several objects do nothing together
    chances = shares.get(alone, [0, 0.3, 0.2, 0.2, 0.3])
    return str(rng.choice(["action", "change", "veil", "still", "none"], p=chances))


def _action(rng: np.random.Generator, groups: int) -> str:
    """Any action of a group that is alone; beside another one, those that leave it in its place."""
    if groups == 1 and rng.random() < 0.6:
        return str(rng.choice(list(MOVES)))
    return str(rng.choice(ACTIONS[len(MOVES) :]))


def _first(rng: np.random.Generator, cast: Cast, action: str | None) -> tuple[Group, float]:
    """The first group at the scene's start, and the amount of its action."""
    alone, amount = len(cast.pairs) == 1, 0.0
    if action in ("grows", "shrinks"):
        count, radius = 1, float(rng.uniform(0.085, 0.105))
        amount = float(rng.uniform(1.8, 2.6 if alone else 2.0))
        radius, amount = (radius, amount) if action == "grows" else (radius * amount, 1 / amount)
    elif action in MOVES:
        count, radius, amount = 1, float(rng.uniform(0.09, 0.14)), float(rng.uniform(0.35, 0.55))
    else:
        count = 1 if action else cast.count or _number(rng, 5 if alone else 3)
        radius = float(rng.uniform(*(RADII if alone else RADII_OF_TWO)[count]))
        if count == 1 and alone and rng.random() < 0.3:
            radius = float(rng.uniform(0.05, 0.075))
    colour, kind = cast.pairs[0]
    return Group(kind, colour, count, radius, (0.0, 0.0)), amount


def _second(rng: np.random.Generator, cast: Cast, first: Group, grown: float) -> Group:
    """Another group beside the first, which grows to `grown` times its size."""
    (colour, kind), count = cast.pairs[1], _number(rng, 3)
    second = Group(kind, colour, count, float(rng.uniform(*RADII_OF_TWO[count])), (0.0, 0.0))
    x, y = RELATIONS[cast.relation or str(rng.choice(list(RELATIONS)))]
    axis = 0 if x else 1
    near = first.reach[axis] * grown + second.reach[axis]
    far = near + float(rng.uniform(0.02, min(0.12, WIDEST - 2 * near)))
    aside = float(rng.uniform(-0.04, 0.04))
    return replace(second, centre=(x * far, aside) if x else (aside, y * far))


def _number(rng: np.random.Generator, most: int) -> int:
    chances = np.array([0.6, 0.17, 0.12, 0.06, 0.05][:most])
    return int(rng.choice(np.arange(1, most + 1), p=chances / chances.sum()))


def _with_action(rng: np.random.Generator, scene: HardScene, name: str, amount: float) -> HardScene:
    start_s = float(rng.uniform(1, 2.5))
    end_s = start_s + float(rng.uniform(1.5, 3))
    action = Action(name, start_s, end_s, amount)
    return replace(
        scene, action=action, duration_s=end_s + float(rng.uniform(1, 2.5)), pan_per_s=0.0
    )


def _with_change(rng: np.random.Generator, scene: HardScene) -> HardScene:
    # Half way into the night it would neither be light nor dark.
    into = str(rng.choice([name for name in SETTINGS if name not in (scene.setting, "night")]))
    start_s = float(rng.uniform(1.5, 3))
    end_s = start_s + float(rng.uniform(2.5, 5))
    change = Change(into, str(rng.choice(MANNERS)), start_s, end_s)
    return replace(
        scene, change=change, duration_s=end_s + float(rng.uniform(1.5, 3)), pan_per_s=0.0
    )


def _with_veil(rng: np.random.Generator, scene: HardScene) -> HardScene:
    """A flash, a fade from or to black, or a dip to black in between."""
    draw, length_s = rng.random(), float(rng.uniform(0.2, 0.6))
    ramp_s, whole_s = float(rng.uniform(0.5, 1.2)), max(scene.duration_s, 4.0)
    if draw < 0.35:
        start_s = whole_s * float(rng.uniform(0.3, 0.7))
        veil = Veil("white", start_s, start_s + float(rng.uniform(0.1, 0.25)), 0.06)
    elif draw < 0.55:
        veil = Veil("black", 0.0, length_s, ramp_s)
    elif draw < 0.75:
        veil = Veil("black", whole_s - length_s, whole_s, ramp_s)
    else:
        whole_s += 2.0
        start_s = whole_s * float(rng.uniform(0.35, 0.5))
        veil = Veil("black", start_s, start_s + float(rng.uniform(1, 2)), ramp_s)
    return replace(scene, veil=veil, duration_s=whole_s)
