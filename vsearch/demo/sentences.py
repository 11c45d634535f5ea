"""The tiny world's language: sentences about scenes, and which scenes make a sentence true."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vsearch.demo.scenes import Scene

KIND_NOUNS: dict[str, list[tuple[str, str]]] = {
    "ball": [("ball", "balls"), ("sphere", "spheres")],
    "triangle": [("triangle", "triangles")],
    "star": [("star", "stars")],
    "heart": [("heart", "hearts")],
    "ring": [("ring", "rings"), ("hoop", "hoops")],
    "cross": [("cross", "crosses"), ("plus sign", "plus signs")],
    "car": [("car", "cars"), ("automobile", "automobiles")],
    "house": [("house", "houses"), ("cottage", "cottages")],
    "tree": [("tree", "trees")],
    "boat": [("boat", "boats"), ("sailing ship", "sailing ships")],
    "fish": [("fish", "fish")],
    "umbrella": [("umbrella", "umbrellas"), ("parasol", "parasols")],
}
COLOUR_WORDS: dict[str, list[str]] = {
    "red": ["red", "crimson"],
    "orange": ["orange"],
    "yellow": ["yellow"],
    "green": ["green"],
    "blue": ["blue"],
    "purple": ["purple", "violet"],
    "pink": ["pink"],
    "brown": ["brown"],
    "white": ["white"],
    "black": ["black"],
}
PLACES: dict[str, list[tuple[str, str]]] = {  # (adverbial, noun)
    "beach": [("on the beach", "a beach"), ("at the seaside", "the seaside")],
    "forest": [("in the forest", "a forest"), ("in the woods", "the woods")],
    "desert": [("in the desert", "a desert"), ("among the sand dunes", "sand dunes")],
    "snow": [("in the snow", "snow"), ("in a snowy field", "a snowy winter field")],
    "city": [("in the city", "a city"), ("in a street with tall buildings", "tall buildings")],
    "meadow": [("in a meadow", "a meadow"), ("on the grass", "green grass with flowers")],
    "night": [("at night", "the night sky"), ("under the stars", "a starry night")],
    "kitchen": [("in the kitchen", "a kitchen"), ("before a tiled wall", "a tiled wall")],
    "underwater": [("under water", "the sea under water"), ("beneath the waves", "deep water")],
    "brick wall": [("in front of a brick wall", "a brick wall"), ("before bricks", "red bricks")],
}
NUMBERS = {1: "one", 2: "two", 3: "three"}

TRAINING_TEMPLATES = (
    "{thing} {place}",
    "a photo of {thing} {place}",
    "there is {thing} {place}",
    "{place} there is {thing}",
    "a video of {thing} {place}",
)
HELD_OUT_TEMPLATES = (
    "can you find {thing} {place}?",
    "i am looking for {thing} {place}",
    "the moment with {thing} {place}",
    "show me {thing} {place}",
)
SETTING_TEMPLATES = ("{noun}", "a view of {noun}", "a video of {noun}", "{place}")
NOWHERE = (
    "a giraffe eating leaves",
    "two people shaking hands",
    "an astronaut floating in a spaceship",
    "a chef cutting onions",
    "a goalkeeper catches the ball in a stadium",
    "a rocket taking off",
    "a violin concert",
    "a dentist at work",
)
"""Sentences that nothing in the world matches."""


@dataclass(frozen=True)
class Mention:
    """What a sentence says of a scene; None is what it leaves open."""

    colour: str | None = None
    kind: str | None = None
    count: int | None = None
    size: str | None = None
    setting: str | None = None
    empty: bool = False

    def matches(self, scene: Scene) -> bool:
        return (
            self.colour in (None, scene.colour)
            and self.kind in (None, scene.kind)
            and self.count in (None, scene.count)
            and self.size in (None, size_of(scene))
            and self.setting in (None, scene.setting)
            and (not self.empty or scene.count == 0)
        )


def size_of(scene: Scene) -> str | None:
    """'small', 'large', or None for what is neither or not alone."""
    if scene.count != 1 or 0.2 <= scene.radius <= 0.27:
        return None
    return "small" if scene.radius < 0.2 else "large"


def full_mention(scene: Scene) -> Mention:
    """Colour, kind and setting of a scene: what identifies it in a small world."""
    return Mention(scene.colour, scene.kind, setting=scene.setting, empty=scene.count == 0)


def random_mention(scene: Scene, rng: np.random.Generator) -> Mention:
    """A random true statement about a scene, most often its colour, kind and setting together."""
    setting = scene.setting if rng.random() < 0.7 else None
    if scene.count == 0:
        return Mention(setting=scene.setting, empty=bool(rng.random() < 0.5))
    draw = rng.random()
    if draw < 0.06:
        return Mention(setting=scene.setting)
    if draw < 0.12:
        return Mention(kind=scene.kind, setting=setting)
    if draw < 0.18:
        return Mention(colour=scene.colour, setting=setting)
    count = scene.count if scene.count > 1 or rng.random() < 0.1 else None
    if scene.count > 1 and rng.random() < 0.3:
        count = None
    size = size_of(scene) if rng.random() < 0.35 else None
    return Mention(scene.colour, scene.kind, count, size, setting)


def sentence(
    mention: Mention,
    rng: np.random.Generator,
    templates: Sequence[str] = TRAINING_TEMPLATES,
    paraphrase: bool = True,
) -> str:
    """Words for a mention; without `paraphrase` the first word of each list of synonyms is used."""

    def choose(words: Sequence[Any]) -> Any:
        return words[int(rng.integers(len(words)))] if paraphrase else words[0]

    place, noun = choose(PLACES[mention.setting]) if mention.setting else ("", "")
    if mention.colour is None and mention.kind is None:
        if mention.empty:
            return str(rng.choice([f"nothing but {noun}", f"{noun} and nothing else"]))
        return str(rng.choice(SETTING_TEMPLATES)).format(place=place, noun=noun)
    template = templates[int(rng.integers(len(templates)))]
    return " ".join(template.format(thing=_thing(mention, choose), place=place).split())


def _thing(mention: Mention, choose: Callable[[Sequence[Any]], Any]) -> str:
    colour = choose(COLOUR_WORDS[mention.colour]) if mention.colour else ""
    if mention.kind is None:
        return f"something {colour}"
    singular, plural = choose(KIND_NOUNS[mention.kind])
    many = (mention.count or 1) > 1
    words = [mention.size or "", colour, plural if many else singular]
    phrase = " ".join(word for word in words if word)
    if mention.count:
        return f"{NUMBERS[mention.count]} {phrase}"
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
