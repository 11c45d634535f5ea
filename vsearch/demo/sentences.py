"""The tiny world's language: sentences about what is to be seen, and which views make one true."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from vsearch.demo.hard import ACTIONS, RELATIONS, opposite, relation
from vsearch.demo.scenes import COLOURS, KINDS, LARGE, SETTINGS, SMALL, TINY, Group, View

Value = TypeVar("Value")

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
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
RELATION_WORDS: dict[str, list[str]] = {
    "left of": ["left of", "to the left of"],
    "right of": ["right of", "to the right of"],
    "above": ["above"],
    "below": ["below", "underneath"],
    "next to": ["next to", "beside"],
    "with": ["with", "and"],
    "without": ["without", "and no"],
}
ACTION_WORDS: dict[str, list[tuple[str, str]]] = {  # (what it is doing, what it does)
    "moves left": [("moving left", "moves left"), ("going to the left", "goes to the left")],
    "moves right": [("moving right", "moves right"), ("going to the right", "goes to the right")],
    "moves up": [("moving up", "moves up"), ("rising", "rises")],
    "moves down": [("moving down", "moves down"), ("sinking", "sinks")],
    "appears": [("appearing", "appears")],
    "disappears": [("disappearing", "disappears"), ("vanishing", "vanishes")],
    "grows": [("growing", "grows"), ("becoming larger", "becomes larger")],
    "shrinks": [("shrinking", "shrinks"), ("becoming smaller", "becomes smaller")],
}
LOW_LIGHT = ["in low light", "dimly lit"]

# Which template suits a sentence follows from what it names: a thing; a thing and another; a thing
# and what it does.
TRAINING_TEMPLATES = (
    "{thing} {place}",
    "a photo of {thing} {place}",
    "there is {thing} {place}",
    "{place} there is {thing}",
    "a video of {thing} {place}",
    "{thing} {relation} {other} {place}",
    "a photo of {thing} {relation} {other} {place}",
    "there is {thing} {relation} {other} {place}",
    "{place} there is {thing} {relation} {other}",
    "{thing} {doing} {place}",
    "a video of {thing} {doing} {place}",
    "{thing} {does} {place}",
)
HELD_OUT_TEMPLATES = (
    "can you find {thing} {place}?",
    "i am looking for {thing} {place}",
    "the moment with {thing} {place}",
    "show me {thing} {place}",
    "can you find {thing} {relation} {other} {place}?",
    "i am looking for {thing} {relation} {other} {place}",
    "show me {thing} {relation} {other} {place}",
    "can you find {thing} {doing} {place}?",
    "the moment when {thing} {does} {place}",
    "show me how {thing} {does} {place}",
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
    """What a sentence says of a view; None is what it leaves open. `relation` (one of RELATION_WORDS)
    is to `other`, of which it says no more than what it is. `action` is what the thing itself does.
    """

    colour: str | None = None
    kind: str | None = None
    count: int | None = None
    size: str | None = None
    setting: str | None = None
    empty: bool = False
    dark: bool = False
    relation: str | None = None
    other: "Mention | None" = None
    action: str | None = None

    def matches(self, view: View) -> bool:
        if view.setting is None or self.setting not in (None, view.setting):
            return False
        if (self.dark and not view.dark) or (self.empty and view.groups):
            return False
        if self.action:
            doing = view.acting if view.action == self.action else None
            return doing is not None and self.describes(doing)
        if self.colour is None and self.kind is None:
            return True
        return any(self.describes(group) and self._related(group, view) for group in view.groups)

    def describes(self, group: Group) -> bool:
        """Whether the group is such a thing, wherever it is and whatever it does."""
        return (
            self.colour in (None, group.colour)
            and self.kind in (None, group.kind)
            and self.count in (None, group.count)
            and (self.size is None or self.size in sizes_of(group))
        )

    def _related(self, group: Group, view: View) -> bool:
        if not self.other:
            return True
        others = [one for one in view.groups if one != group and self.other.describes(one)]
        if self.relation == "without":
            return not others
        return any(self.relation in relations_of(group, one) for one in others)


def sizes_of(group: Group) -> tuple[str, ...]:
    """The words that are true of its size, none if it is neither small nor large or not alone."""
    if group.count != 1 or SMALL <= group.radius <= LARGE:
        return ()
    if group.radius > LARGE:
        return ("large",)
    return ("tiny", "small") if group.radius < TINY else ("small",)


def relations_of(one: Group, other: Group) -> tuple[str, ...]:
    """The relations of RELATION_WORDS in which one group is to another one of the same view."""
    name = relation(one, other)
    return (name, "next to", "with") if RELATIONS[name][0] else (name, "with")


def full_mention(view: View) -> Mention:
    """Colour and kind of the first group, and the setting: what identifies a view in an easy world."""
    if not view.groups:
        return Mention(setting=view.setting, empty=True)
    return Mention(view.groups[0].colour, view.groups[0].kind, setting=view.setting)


def random_mention(
    view: View, rng: np.random.Generator, absent: Sequence[tuple[str, str]] = ()
) -> Mention:
    """A random true statement about a view in which something is to be seen, most often colour, kind
    and setting together; of `absent` (colour, kind) it may say that there is none.
    """
    setting = view.setting if rng.random() < 0.7 else None
    dark = view.dark and bool(rng.random() < 0.4)
    if view.acting and view.action and rng.random() < 0.3:
        acting = view.acting
        return Mention(acting.colour, acting.kind, setting=setting, action=view.action, dark=dark)
    if not view.groups:
        return Mention(setting=view.setting, empty=bool(rng.random() < 0.5), dark=dark)
    first = int(rng.integers(len(view.groups)))
    group, others = view.groups[first], view.groups[:first] + view.groups[first + 1 :]
    draw = rng.random()
    if draw < 0.06:
        return Mention(setting=view.setting, dark=dark)
    if draw < 0.12:
        return Mention(kind=group.kind, setting=setting, dark=dark)
    if draw < 0.18:
        return Mention(colour=group.colour, setting=setting, dark=dark)
    mention = Mention(group.colour, group.kind, setting=setting, dark=dark)
    if others and draw < 0.7:
        return replace(mention, **_company(group, others[0], rng))
    if len(absent) and draw > 0.94:
        colour, kind = absent[int(rng.integers(len(absent)))]
        other = Mention(colour if rng.random() < 0.5 else None, kind)
        if not any(other.describes(one) for one in view.groups):
            return replace(mention, relation="without", other=other)
    count = group.count if group.count > 1 or rng.random() < 0.1 else None
    if group.count > 1 and rng.random() < 0.3:
        count = None
    sizes = sizes_of(group)
    size = str(rng.choice(sizes)) if sizes and rng.random() < 0.35 else None
    return replace(mention, count=count, size=size)


def alterations(mention: Mention, rng: np.random.Generator) -> list[Mention]:
    """The mention with one thing said differently, for each thing that it says but size, light and
    emptiness. They may still be true."""
    said: list[dict[str, Any]] = []
    for name, values in (
        ("setting", SETTINGS),
        ("colour", COLOURS),
        ("kind", KINDS),
        ("count", NUMBERS),
        ("action", ACTIONS),
    ):
        if known := getattr(mention, name):
            said.append({name: another(rng, values, known)})
    if mention.relation in RELATIONS:
        said.append({"relation": opposite(mention.relation)})
    elif mention.relation == "next to":
        said.append({"relation": ("above", "below")[int(rng.integers(2))]})
    elif mention.relation:
        said.append({"relation": "with" if mention.relation == "without" else "without"})
    if mention.other and mention.other.colour:
        thing, other = mention.colour, mention.other
        if thing and thing != other.colour:
            said.append({"colour": other.colour, "other": replace(other, colour=thing)})
        said.append({"other": replace(other, colour=another(rng, COLOURS, other.colour))})
    return [replace(mention, **changed) for changed in said]


def another(rng: np.random.Generator, values: Iterable[Value], known: Value | None) -> Value:
    """One of the values, but not the known one."""
    rest = [value for value in values if value != known]
    return rest[int(rng.integers(len(rest)))]


def _company(one: Group, other: Group, rng: np.random.Generator) -> dict[str, Any]:
    """That the one is in a relation to the other, as fields of a mention."""
    relations = relations_of(one, other)
    thing = Mention(other.colour, other.kind)
    if other.count > 1 and rng.random() < 0.3:
        thing = replace(thing, count=other.count)
    elif rng.random() < 0.2:
        thing = Mention(kind=other.kind)
    return {"relation": relations[int(rng.integers(len(relations)))], "other": thing}


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
    if mention.dark:
        light = choose(LOW_LIGHT)
        place, noun = f"{place} {light}", f"{noun} {light}"
    if mention.colour is None and mention.kind is None:
        if mention.empty:
            return str(rng.choice([f"nothing but {noun}", f"{noun} and nothing else"]))
        return str(rng.choice(SETTING_TEMPLATES)).format(place=place, noun=noun)
    suited = [template for template in templates if _suits(template, mention)]
    template = suited[int(rng.integers(len(suited)))]
    words = {"thing": _thing(mention, choose), "place": place}
    if mention.relation and mention.other:
        words["relation"] = choose(RELATION_WORDS[mention.relation])
        other = _thing(mention.other, choose)
        bare = words["relation"].endswith(" no")
        words["other"] = other.split(" ", 1)[1] if bare else other
    if mention.action:
        words["doing"], words["does"] = choose(ACTION_WORDS[mention.action])
    return " ".join(template.format(**words).split())


def _suits(template: str, mention: Mention) -> bool:
    """Whether a template has a place for the other thing, and for the action, just if there is one."""
    doing = "{doing}" in template or "{does}" in template
    return ("{other}" in template) == bool(mention.other) and doing == bool(mention.action)


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
