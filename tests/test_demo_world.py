import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import pytest

from vsearch.cli import main
from vsearch.config import UserError
from vsearch.demo.hard import (
    ACTIONS,
    MANNERS,
    MOVES,
    RELATIONS,
    Action,
    Cast,
    Change,
    HardScene,
    Veil,
    mirrored,
    renderer,
    sample_hard_scene,
)
from vsearch.demo.scenes import (
    COLOURS,
    FRAME_PX,
    KINDS,
    SETTINGS,
    Scene,
    SceneRenderer,
    held_out,
    sample_scene,
)
from vsearch.demo.sentences import (
    ACTION_WORDS,
    COLOUR_WORDS,
    HELD_OUT_TEMPLATES,
    KIND_NOUNS,
    LOW_LIGHT,
    NOWHERE,
    NUMBERS,
    PLACES,
    RELATION_WORDS,
    TRAINING_TEMPLATES,
    Mention,
    alterations,
    full_mention,
    random_mention,
    sentence,
)
from vsearch.demo.training_pictures import CELLS, draw_pictures
from vsearch.demo.world import (
    Shot,
    hard_queries,
    make_world,
    moments,
    queries,
    random_cast,
    timeline,
    training_rng,
    twisted,
    world_rng,
    write_video,
)
from vsearch.query import terms_of

SEED = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Shot]]:
    folder = tmp_path_factory.mktemp("world")
    return folder, make_world(folder, SEED, videos=2, scenes_per_video=2)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def paper_world(seed: int, count: int) -> list[Shot]:
    """Shots that are never drawn."""
    rng = np.random.default_rng(seed)
    return [
        Shot(f"v{i // 6}.mp4", i % 6 * 4.0, i % 6 * 4.0 + 4, sample_scene(rng, empty=i % 12 == 0))
        for i in range(count)
    ]


def says(text: str, nouns: list[tuple[str, str]]) -> bool:
    return any(f" {word} " in f" {text.rstrip('?')} " for pair in nouns for word in pair)


def test_the_videos_hold_exactly_the_frames_of_the_truth(world: tuple[Path, list[Shot]]) -> None:
    folder, shots = world
    assert len({shot.video for shot in shots}) == 2
    for name in {shot.video for shot in shots}:
        own = [shot for shot in shots if shot.video == name]
        assert own[0].start_s == 0
        assert [shot.start_s for shot in own[1:]] == [shot.end_s for shot in own[:-1]]
        with av.open(str(folder / name)) as container:
            fps = container.streams.video[0].average_rate
            frames = list(container.decode(video=0))
        assert len(frames) == round(own[-1].end_s * fps)
        assert [frame.time for frame in frames] == pytest.approx(
            [i / float(fps) for i in range(len(frames))]
        )
        for shot in own:
            renderer = SceneRenderer(shot.scene)
            first, stop = round(shot.start_s * fps), round(shot.end_s * fps)
            for number in (first, stop - 1):
                drawn = renderer.frame((number - first) / fps).astype(int)
                stored = frames[number].to_ndarray(format="rgb24").astype(int)
                assert np.abs(drawn - stored).mean() < 8


def test_a_seed_gives_one_world(world: tuple[Path, list[Shot]], tmp_path: Path) -> None:
    folder, shots = world
    assert make_world(tmp_path / "again", SEED, 2, 2) == shots
    for name in ("truth.jsonl", "shots.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert make_world(tmp_path / "other", SEED + 1, 1, 1)[0].scene != shots[0].scene


def test_truth_matches_the_shots(world: tuple[Path, list[Shot]]) -> None:
    folder, shots = world
    assert lines(folder / "shots.jsonl") == json.loads(
        json.dumps([{**vars(shot), "scene": vars(shot.scene)} for shot in shots])
    )
    known = {(shot.video, shot.start_s, shot.end_s) for shot in shots}
    truth = lines(folder / "truth.jsonl")
    assert [entry["query"] for entry in truth if not entry["moments"]] == list(NOWHERE)
    for entry in truth:
        assert {(m["video"], m["start_s"], m["end_s"]) for m in entry["moments"]} <= known


def test_sentences_are_true_of_their_moments_and_of_no_other() -> None:
    shots = paper_world(1, 120)
    found = queries(shots, np.random.default_rng(0))
    groups = {entry["group"] for entry in found}
    assert groups == {"seen", "unseen", "setting", "kind", "nothing"}
    for entry in found:
        true = {(m["video"], m["start_s"]) for m in entry["moments"]}
        right = [shot for shot in shots if (shot.video, shot.start_s) in true]
        if entry["group"] in ("seen", "unseen"):
            [shot] = right
            assert held_out(shot.scene.colour, shot.scene.kind) == (entry["group"] == "unseen")
            assert says(entry["query"], KIND_NOUNS[shot.scene.kind])
            assert any(word in entry["query"] for word in COLOUR_WORDS[shot.scene.colour])
        elif entry["group"] == "kind":
            [kind] = [kind for kind in KINDS if says(entry["query"], KIND_NOUNS[kind])]
            assert right == [shot for shot in shots if shot.scene.kind == kind]
        elif entry["group"] == "setting":
            [setting] = {shot.scene.setting for shot in right}
            assert right == [shot for shot in shots if shot.scene.setting == setting]
        else:
            assert right == []


def test_half_of_the_questions_are_in_templates_kept_out_of_training() -> None:
    asked = queries(paper_world(2, 120), np.random.default_rng(0))
    starts = tuple(template.split("{")[0] for template in HELD_OUT_TEMPLATES)
    new = [e["query"].startswith(starts) for e in asked if e["group"] in ("seen", "unseen")]
    assert 0.3 < np.mean(new) < 0.7
    assert not any(e["query"].startswith(starts) for e in asked if e["group"] == "kind")
    assert not set(HELD_OUT_TEMPLATES) & set(TRAINING_TEMPLATES)


def test_every_colour_and_kind_occurs_in_and_out_of_training() -> None:
    out = {(c, k) for c in COLOURS for k in KINDS if held_out(c, k)}
    seen = {(c, k) for c in COLOURS for k in KINDS} - out
    assert len(out) * 6 == len(COLOURS) * len(KINDS)
    for pairs in (out, seen):
        assert {colour for colour, _ in pairs} == set(COLOURS)
        assert {kind for _, kind in pairs} == set(KINDS)


def test_training_never_draws_a_held_out_pair() -> None:
    trained = {
        (group.colour, group.kind)
        for view in draw_pictures(0, 300, 8, workers=1).views
        for group in view.groups
    }
    assert len(trained) > 50
    assert not any(held_out(*pair) for pair in trained)
    judged = draw_pictures(0, 30, 8, unseen=True, workers=1).views
    assert all(held_out(group.colour, group.kind) for view in judged for group in view.groups)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_said_of_a_scene_is_true(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng, empty=seed % 5 == 0)
    for mention in (full_mention(scene.view(0)), random_mention(scene.view(0), rng)):
        assert mention.matches(scene.view(0))
        text = sentence(mention, rng)
        assert "{" not in text and "  " not in text and text == text.strip()
    other = replace(scene, setting=next(s for s in SETTINGS if s != scene.setting))
    assert not full_mention(scene.view(0)).matches(other.view(0))


def test_sentences_have_the_words_asked_for() -> None:
    rng = np.random.default_rng(0)
    mention = Mention("orange", "umbrella", setting="beach")
    assert sentence(mention, rng, ("{thing} {place}",), paraphrase=False) == (
        "an orange umbrella on the beach"
    )
    many = Mention("red", "fish", count=3)
    assert sentence(many, rng, ("show {thing} {place}",), paraphrase=False) == (
        "show three red fish"
    )


@pytest.mark.parametrize("setting", sorted(SETTINGS))
def test_the_objects_are_in_the_picture_and_move(setting: str) -> None:
    scene = sample_scene(np.random.default_rng(3), pair=("pink", "star"), setting=setting)
    scene = replace(
        scene, count=1, radius=0.2, noise_sigma=0.0, velocity=(0.3, 0.0), light=1.0, light_per_s=0.0
    )
    frame = SceneRenderer(scene).frame(0.5)
    assert frame.shape == (FRAME_PX, FRAME_PX, 3)
    assert np.array_equal(frame, SceneRenderer(scene).frame(0.5))
    pink = np.abs(frame.astype(int) - COLOURS["pink"]).max(axis=2) < 25
    assert pink.mean() > 0.02
    later = np.abs(SceneRenderer(scene).frame(1.0).astype(int) - COLOURS["pink"]).max(axis=2) < 25
    assert abs(np.nonzero(pink)[1].mean() - np.nonzero(later)[1].mean()) > 5


# ── easy worlds stay as they were ────────────────────────────────────────────────────────────────
# What version 0.1 made of SEED: scenes and sentences, and the mean colours of the quarters of each
# scene's frame at half a second.
RECORDED = [
    (1106653215, 4.366667, [70.51, 182.97, 208.75, 70.07, 182.45, 208.32]),
    (81303478, 6.366667, [141.47, 197.24, 194.54, 120.52, 185.92, 194.05]),
    (673890437, 2.08, [159.78, 174.76, 196.8, 164.52, 179.09, 200.45]),
    (1814466489, 7.92, [165.07, 105.39, 92.28, 163.48, 99.81, 85.29]),
]
RECORDED_SENTENCES = [
    ("there is a blue house", "seen"),
    ("a blue star", "unseen"),
    ("the moment with a white hoop", "unseen"),
    ("snow", "setting"),
    ("on the grass", "setting"),
    ("deep water", "setting"),
    ("a video of red bricks", "setting"),
    ("a photo of a star", "kind"),
    ("a ring", "kind"),
    ("a video of a house", "kind"),
    *((text, "nothing") for text in NOWHERE),
]


def test_easy_worlds_are_what_they_were(world: tuple[Path, list[Shot]]) -> None:
    folder, shots = world
    asked = [(entry["query"], entry["group"]) for entry in lines(folder / "truth.jsonl")]
    assert asked == RECORDED_SENTENCES
    for shot, (texture_seed, end_s, means) in zip(shots, RECORDED, strict=True):
        assert type(shot.scene) is Scene
        assert shot.scene.texture_seed == texture_seed
        assert shot.end_s == pytest.approx(end_s, abs=1e-6)
        upper = SceneRenderer(shot.scene).frame(0.5)[: FRAME_PX // 2].astype(float)
        halves = upper.reshape(FRAME_PX // 2, 2, FRAME_PX // 2, 3).mean(axis=(0, 2))
        assert halves.ravel() == pytest.approx(means, abs=0.05)


# ── hard scenes, by their pixels ─────────────────────────────────────────────────────────────────
SOLID = ["ball", "star", "heart", "triangle"]
PLAIN = ["desert", "forest", "brick wall"]
"""Settings in which nothing is pink or blue."""


def is_pink(frame: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(frame.astype(float), 2, 0)
    return (red > 1.35 * green) & (blue > 1.15 * green) & (red > 50)


def is_blue(frame: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(frame.astype(float), 2, 0)
    return (blue > 1.5 * green) & (blue > 2 * red) & (blue > 30)


def middle(mask: np.ndarray) -> np.ndarray:
    """(x, y) of the middle of what is marked, in fractions of the frame."""
    rows, columns = np.nonzero(mask)
    ends = [[c.min() + c.max() + 1, r.min() + r.max() + 1] for r, c in [(rows, columns)]]
    return np.array(ends[0]) / (2 * FRAME_PX)


def islands(mask: np.ndarray, least: int = 12) -> int:
    """The number of connected regions of at least so many pixels."""
    free, found = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}, 0
    while free:
        front, size = [free.pop()], 1
        while front:
            y, x = front.pop()
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & free
            free -= near
            size += len(near)
            front += near
        found += size >= least
    return found


def calm(scene: HardScene) -> HardScene:
    """The same scene without what moves or flickers for no reason of its story."""
    return replace(scene, sway=0.0, noise_sigma=0.0, light=1.0, light_per_s=0.0, pan_per_s=0.0)


def acted(name: str, seed: int = 0) -> HardScene:
    """A calm scene in which a pink object does that."""
    rng = np.random.default_rng(seed)
    cast = Cast((("pink", SOLID[seed % 4]),), action=name)
    return calm(sample_hard_scene(rng, cast, PLAIN[seed % 3])).on_grid(25)


@pytest.mark.parametrize("seed", range(24))
def test_relations_are_those_of_the_picture(seed: int) -> None:
    rng = np.random.default_rng(seed)
    wanted = list(RELATIONS)[seed % 4]
    cast = Cast((("pink", SOLID[seed % 4]), ("blue", SOLID[seed // 6])), relation=wanted)
    scene = sample_hard_scene(rng, cast, PLAIN[seed % 3])
    scene = replace(scene, veil=None, change=None, action=None, light=1.0, noise_sigma=2.0)
    view, frame = scene.view(0.5), renderer(scene).frame(0.5)
    for picture, seen in ((frame, view), (frame[:, ::-1], mirrored(view))):
        x, y = middle(is_blue(picture)) - middle(is_pink(picture))
        true = (
            ("left of" if x > 0 else "right of")
            if abs(x) > abs(y)
            else ("above" if y > 0 else "below")
        )
        assert picture is not frame or true == wanted
        sideways = abs(x) > abs(y)
        thing, other = Mention("pink", SOLID[seed % 4]), Mention("blue", SOLID[seed // 6])
        for name in RELATION_WORDS:
            said = replace(thing, relation=name, other=other)
            expected = {"next to": sideways, "with": True, "without": False}.get(name, name == true)
            assert said.matches(seen) == expected
        back = replace(other, relation=true, other=thing)
        assert not back.matches(seen)


@pytest.mark.parametrize("count", NUMBERS)
def test_counts_and_sizes_are_those_of_the_picture(count: int) -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        cast = Cast((("pink", SOLID[seed % 4]),), count=count)
        scene = calm(replace(sample_hard_scene(rng, cast, PLAIN[seed % 3]), veil=None, action=None))
        view, pink = scene.view(0.3), is_pink(renderer(scene).frame(0.3))
        assert islands(pink) == count
        assert [Mention("pink", count=n).matches(view) for n in NUMBERS] == [
            n == count for n in NUMBERS
        ]
        wide = np.nonzero(pink.any(axis=0))[0]
        tiny = count == 1 and wide[-1] - wide[0] < 0.16 * FRAME_PX - 1
        assert Mention("pink", size="tiny").matches(view) == tiny


def test_tiny_objects_are_drawn() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_hard_scene(rng, Cast((("red", "ball"),))) for _ in range(60)]
    tiny = [
        Mention("red", size="tiny").matches(scene.view(scene.duration_s / 2)) for scene in scenes
    ]
    assert 3 < sum(tiny) < 30


@pytest.mark.parametrize("name", ACTIONS)
def test_an_action_lasts_as_long_as_the_picture_changes(name: str) -> None:
    for seed in range(2):
        scene = acted(name, seed)
        drawer = renderer(scene)
        times = np.arange(0, scene.duration_s - 1e-6, 1 / 25)
        frames = [drawer.frame(t) for t in times.tolist()]
        steps = [bool((a != b).any()) for a, b in itertools.pairwise(frames)]
        changing = times[:-1][steps]
        shots = [Shot("v.mp4", 0.0, scene.duration_s, scene)]
        [truth] = moments(Mention("pink", SOLID[seed], action=name), timeline(shots))
        assert changing[0] == pytest.approx(truth["start_s"], abs=0.13)
        assert changing[-1] + 1 / 25 == pytest.approx(truth["end_s"], abs=0.13)
        others = [Mention("pink", action=other) for other in ACTIONS if other != name]
        assert not any(moments(other, timeline(shots)) for other in others)
        first, last = is_pink(frames[0]), is_pink(frames[-1])
        if name in MOVES:
            moved = middle(last) - middle(first)
            assert moved == pytest.approx(np.array(MOVES[name]) * np.abs(moved).max(), abs=0.02)
            assert np.abs(moved).max() > 0.3
        elif name in ("appears", "disappears"):
            assert (first.any(), last.any()) == (name == "disappears", name == "appears")
            [there] = moments(Mention("pink"), timeline(shots))
            shown = [is_pink(frame).sum() > 0.9 * max(first.sum(), last.sum()) for frame in frames]
            assert there["end_s"] - there["start_s"] == pytest.approx(sum(shown) / 25, abs=1.0)
        else:
            ratio = last.sum() / first.sum()
            assert ratio > 2.5 if name == "grows" else ratio < 0.4


@pytest.mark.parametrize("manner", MANNERS)
def test_each_setting_is_the_dominant_one_when_the_truth_says_so(manner: str) -> None:
    scene = calm(sample_hard_scene(np.random.default_rng(1), Cast(()), "snow"))
    change = Change("forest", manner, 1.0, 4.0)
    scene = replace(scene, change=change, veil=None, still_s=None, duration_s=5.5)
    drawer = renderer(scene)
    means = [drawer.frame(t).mean(axis=(0, 1)) for t in np.arange(0, 5.5, 0.1).tolist()]
    shots = [Shot("v.mp4", 10.0, 15.5, scene)]
    [snow], [forest] = (
        moments(Mention(setting=setting), timeline(shots)) for setting in ("snow", "forest")
    )
    assert (snow["start_s"], forest["end_s"]) == (10.0, 15.5)
    assert snow["end_s"] == forest["start_s"]
    for number, mean in enumerate(means):
        time_s = 10 + number / 10
        if abs(time_s - snow["end_s"]) > 0.25:
            nearer = np.abs(mean - means[0]).sum() < np.abs(mean - means[-1]).sum()
            assert nearer == (time_s < snow["end_s"])
    entered = drawer.frame(2.0).astype(float) - drawer.frame(0.9)
    columns = np.abs(entered).mean(axis=(0, 2))
    if manner != "dissolve":
        side = columns[:20] if manner == "pan left" else columns[-20:]
        assert side.mean() > 60


def test_a_still_picture_is_one_picture() -> None:
    moving = sample_hard_scene(np.random.default_rng(0), Cast((("red", "car"),)), "city")
    moving = replace(moving, action=None, veil=None, change=None, pan_per_s=0.05, sway=0.01)
    for noise in (False, True):
        scene = replace(moving, duration_s=6.0, still_s=2.0, still_noise=noise, noise_sigma=4.0)
        frames = [renderer(scene).frame(t).astype(int) for t in (0.5, 1.5, 2.0, 3.3, 5.9)]
        changes = [np.abs(a - b).mean() for a, b in itertools.pairwise(frames)]
        assert min(changes[:2]) > 5.5
        if noise:
            assert min(changes[2:]) > 2 and max(changes[2:]) < 5.5  # two draws of sigma 4: 4.5
        else:
            assert max(changes[2:]) == 0


@pytest.fixture(scope="module")
def dark_and_hidden(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Shot], np.ndarray]:
    """A video of low light, a flash, a dip to black, fades and a night, and its decoded frames."""
    rng = np.random.default_rng(4)
    cast = Cast((("pink", "star"),))
    base = calm(sample_hard_scene(rng, cast, "meadow"))
    base = replace(base, duration_s=3.0, veil=None, action=None, still_s=None, change=None)
    scenes = [
        base,
        replace(base, light=0.33),
        replace(base, veil=Veil("white", 1.0, 1.2, 0.08)),
        replace(base, veil=Veil("black", 1.0, 2.0, 0.4), setting="desert"),
        replace(base, veil=Veil("black", 0.0, 0.6, 0.8), setting="beach"),
        replace(base, veil=Veil("black", 2.6, 3.0, 0.8), setting="forest"),
        replace(base, setting="night"),
    ]
    path = tmp_path_factory.mktemp("dark") / "dark.mp4"
    shots = write_video(path, scenes, 25)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    return shots, np.stack(frames).astype(float)


def test_nothing_is_to_be_seen_in_flashes_and_fades(
    dark_and_hidden: tuple[list[Shot], np.ndarray],
) -> None:
    shots, frames = dark_and_hidden
    times = np.arange(len(frames)) / 25
    contrast = frames.std(axis=(1, 2))
    for shot in shots[2:6]:
        inside = (times >= shot.start_s) & (times < shot.end_s)
        full = np.median(contrast[inside])
        seen = np.zeros(len(times), bool)
        for start_s, end_s, view in shot.scene.stretches():
            if view.setting:
                seen |= (times >= shot.start_s + start_s) & (times < shot.start_s + end_s)
        assert (contrast[inside & ~seen] < 0.3 * full).all()
        assert (contrast[inside & seen] > 0.1 * full).all()
        assert 0.05 < (inside & ~seen).sum() / 25 < 1.3
    flashed = moments(Mention(setting="meadow"), timeline(shots))
    assert [(m["start_s"], m["end_s"]) for m in flashed] == [(0.0, 9.0)]
    dipped = moments(Mention(setting="desert"), timeline(shots))
    assert [(m["start_s"], m["end_s"]) for m in dipped] == [
        (9.0, pytest.approx(9.94)),
        (pytest.approx(11.06), 12.0),
    ]


def test_low_light_is_dark(dark_and_hidden: tuple[list[Shot], np.ndarray]) -> None:
    shots, frames = dark_and_hidden
    light, dim, *_, night = [
        frames[round(shot.start_s * 25) : round(shot.end_s * 25)].mean() for shot in shots
    ]
    assert dim < 0.45 * light and night < 0.45 * light
    dark = moments(Mention("pink", "star", dark=True), timeline(shots))
    assert [(m["start_s"], m["end_s"]) for m in dark] == [(3.0, 6.0), (18.0, 21.0)]


# ── hard worlds, by another reading of their sentences and scenes ────────────────────────────────
@dataclass
class Said:
    """What a sentence says, read from its words."""

    setting: str | None = None
    dark: bool = False
    action: str | None = None
    relation: str | None = None
    things: tuple[tuple[str | None, ...], ...] = ()


def found_and_cut(text: str, words: dict[str, list[str]]) -> tuple[str, str | None]:
    """The name whose longest phrase is in the text, and the text without it."""
    for phrase, name in sorted(
        ((phrase, name) for name, phrases in words.items() for phrase in phrases),
        key=lambda pair: -len(pair[0]),
    ):
        if f" {phrase} " in text:
            return text.replace(f" {phrase} ", " ", 1), name
    return text, None


def thing_read(text: str) -> tuple[str | None, ...]:
    """(number, size, colour, kind) of the words."""
    names: list[str | None] = []
    for words in (
        {str(number): [word] for number, word in NUMBERS.items()},
        {"tiny": ["tiny"]},
        COLOUR_WORDS,
        {kind: [word for noun in nouns for word in noun] for kind, nouns in KIND_NOUNS.items()},
    ):
        text, name = found_and_cut(text, words)
        names.append(name)
    return tuple(names)


def read(text: str) -> Said:
    text = re.sub(" the moment with | and nothing else", " ", f" {text.rstrip('?').strip()} ")
    text, dark = found_and_cut(text, {"dark": LOW_LIGHT})
    text, setting = found_and_cut(
        text,
        {name: [word for place in places for word in place] for name, places in PLACES.items()},
    )
    text, action = found_and_cut(
        text,
        {name: [word for form in forms for word in form] for name, forms in ACTION_WORDS.items()},
    )
    for name, phrases in RELATION_WORDS.items():
        for phrase in sorted(phrases, key=len, reverse=True):
            if f" {phrase} " in text and not (phrase == "and" and " and no " in text):
                sides = text.split(f" {phrase} ", 1)
                things = tuple(thing_read(f" {side} ") for side in sides)
                return Said(setting, bool(dark), action, name, things)
    thing = thing_read(text)
    return Said(setting, bool(dark), action, None, (thing,) if any(thing) else ())


def true_at(said: Said, scene: HardScene, time_s: float) -> bool | None:
    """Whether the scene shows it at that time; None if nothing is to be seen."""
    veil, change, action = scene.veil, scene.change, scene.action
    if veil:
        outside = max(veil.start_s - time_s, time_s - veil.end_s, 0.0)
        if 1 - outside / veil.ramp_s >= 0.85:
            return None
    turned = change is not None and time_s >= (change.start_s + change.end_s) / 2
    setting = change.into if change and turned else scene.setting
    if said.setting not in (None, setting):
        return False
    if said.dark and not (scene.light < 0.5 or setting == "night"):
        return False
    there = []
    if scene.kind:
        late = action is not None and time_s >= (action.start_s + action.end_s) / 2
        hidden = action is not None and action.name == ("disappears" if late else "appears")
        small = scene.radius < 0.08 and scene.count == 1
        facts = (str(scene.count), "tiny" if small else None, scene.colour, scene.kind)
        if said.action:
            under_way = action is not None and action.start_s <= time_s < action.end_s
            same = all(
                word in (None, fact) for word, fact in zip(said.things[0], facts, strict=True)
            )
            return under_way and action.name == said.action and same
        there += [] if hidden else [(facts, (0.0, 0.0))]
    if scene.second:
        second = scene.second
        there.append(((str(second.count), None, second.colour, second.kind), second.centre))

    def fitting(thing: tuple[str | None, ...]) -> Iterator[tuple[float, float]]:
        for facts, place in there:
            if all(word in (None, fact) for word, fact in zip(thing, facts, strict=True)):
                yield place

    if not said.things:
        return said.action is None
    if said.relation is None:
        return any(True for _ in fitting(said.things[0]))
    for x, y in fitting(said.things[0]):
        others = [(a - x, b - y) for a, b in fitting(said.things[1]) if (a, b) != (x, y)]
        if said.relation == "without":
            return not others
        tests: dict[str, Callable[[float, float], bool]] = {
            "left of": lambda dx, dy: dx > abs(dy),
            "right of": lambda dx, dy: -dx > abs(dy),
            "above": lambda dx, dy: dy > abs(dx),
            "below": lambda dx, dy: -dy > abs(dx),
            "next to": lambda dx, dy: abs(dx) > abs(dy),
            "with": lambda dx, dy: True,
        }
        if any(tests[said.relation](dx, dy) for dx, dy in others):
            return True
    return False


def hard_paper_world(seed: int, videos: int) -> list[Shot]:
    """Shots of a hard world that are never drawn, six a video."""
    rng = world_rng(seed)
    shots: list[Shot] = []
    for number in range(6 * videos):
        earlier = [shot.scene for shot in shots if shot.scene.pair]
        if earlier and rng.random() < 0.5:
            cast = twisted(rng, earlier[int(rng.integers(len(earlier)))])
        else:
            cast = random_cast(rng, lambda colour, kind: True)
        scene = sample_hard_scene(rng, cast if number % 12 else Cast(())).on_grid(25)
        start_s = shots[-1].end_s if number % 6 else 0.0
        shots.append(Shot(f"v{number // 6}.mp4", start_s, start_s + scene.duration_s, scene))
    return shots


@pytest.fixture(scope="module")
def asked() -> tuple[list[Shot], list[dict]]:
    shots = hard_paper_world(3, 10)
    return shots, hard_queries(shots, world_rng(4))


def test_a_hard_world_asks_about_everything(asked: tuple[list[Shot], list[dict]]) -> None:
    shots, found = asked
    numbers = dict.fromkeys(sorted({entry["group"] for entry in found}), 0)
    for entry in found:
        numbers[entry["group"]] += 1
        many, none = len(entry["moments"]), entry["group"] in ("nothing", "absent")
        assert (many == 0) == none
        assert many == 1 or entry["group"] not in ("seen", "unseen")
    assert set(numbers) == {
        *("seen", "unseen", "relation", "count", "action", "small", "dark"),
        *("setting", "kind", "negation", "absent", "nothing"),
    }
    assert min(numbers.values()) >= 2
    scenes = [shot.scene for shot in shots]
    assert {scene.action.name for scene in scenes if scene.action} == {*ACTIONS}
    for event in ("change", "veil", "still_s", "second"):
        assert sum(getattr(scene, event) is not None for scene in scenes) >= 4


def test_hard_sentences_are_true_just_when_their_moments_say(
    asked: tuple[list[Shot], list[dict]],
) -> None:
    shots, found = asked
    checked = dict.fromkeys({entry["group"] for entry in found}, 0)
    for entry in found:
        if entry["group"] == "nothing":
            continue
        said = read(entry["query"])
        spans = [(m["video"], m["start_s"], m["end_s"]) for m in entry["moments"]]
        edges = {(video, edge) for video, *ends in spans for edge in ends}
        for shot in shots:
            for time_s in np.arange(0.1, shot.scene.duration_s, 0.37).tolist():
                at_s = shot.start_s + time_s
                if any(v == shot.video and abs(at_s - edge) < 0.03 for v, edge in edges):
                    continue
                told = any(v == shot.video and a <= at_s < b for v, a, b in spans)
                true = true_at(said, shot.scene, time_s)
                if true is None:  # hidden: a flash does not end a moment, a longer dark does
                    continue
                assert told == true, (entry, shot, time_s)
                checked[entry["group"]] += true
    assert all(checked[group] for group in checked if group not in ("nothing", "absent"))


def test_hidden_seconds_belong_to_no_moment(asked: tuple[list[Shot], list[dict]]) -> None:
    shots, found = asked
    for shot in shots:
        veil = shot.scene.veil
        if veil and veil.end_s - veil.start_s > 0.6:
            dark_s = shot.start_s + (veil.start_s + veil.end_s) / 2
            for entry in found:
                for m in entry["moments"]:
                    inside = m["video"] == shot.video and m["start_s"] < dark_s < m["end_s"]
                    assert not inside


def test_the_two_sentences_of_a_negation_differ_in_one_word(
    asked: tuple[list[Shot], list[dict]],
) -> None:
    _, found = asked
    negations = [entry for entry in found if entry["group"] == "negation"]
    numbers = [entry["pair"] for entry in negations]
    assert numbers == sorted([*range(1, len(numbers) // 2 + 1)] * 2)
    for with_it, without in zip(negations[::2], negations[1::2], strict=True):
        assert with_it["query"].replace(" with ", " without ") == without["query"].replace(
            "moment without", "moment with"
        )
        assert set(with_it) == set(without) == {"query", "moments", "group", "pair"}
        terms = terms_of(without["query"])  # as the engine reads it
        assert [term.weight > 0 for term in terms] == [True, False]
        assert " without " not in "".join(str(term.text) for term in terms)
        apart = {(m["video"], m["start_s"]) for m in with_it["moments"]}
        assert not apart & {(m["video"], m["start_s"]) for m in without["moments"]}


def test_training_and_hard_worlds_have_nothing_in_common() -> None:
    draws = [
        {int(make(seed).integers(2**62)) for seed in range(300)}
        for make in (world_rng, training_rng, np.random.default_rng)
    ]
    assert len(set.union(*draws)) == 900
    assert not set(HELD_OUT_TEMPLATES) & set(TRAINING_TEMPLATES)
    fields = [re.findall(r"{(\w+)}", template) for template in HELD_OUT_TEMPLATES]
    for kind in (["thing", "place"], ["thing", "relation", "other", "place"]):
        assert kind in fields
    assert any("does" in names or "doing" in names for names in fields)
    starts = tuple(template.split("{")[0] for template in HELD_OUT_TEMPLATES)
    rng = np.random.default_rng(0)
    for number in range(200):
        view = sample_hard_scene(rng, random_cast(rng, lambda c, k: True)).view(1.0)
        if view.setting:
            assert not sentence(random_mention(view, rng), rng).startswith(starts), number


def test_what_is_said_of_a_hard_view_is_true() -> None:
    rng = np.random.default_rng(0)
    said = set()
    for _ in range(400):
        scene = sample_hard_scene(rng, random_cast(rng, lambda c, k: not held_out(c, k)))
        for start_s, end_s, view in scene.stretches():
            if view.setting is None:
                assert not Mention(setting=scene.setting).matches(view)
                continue
            mention = random_mention(view, rng, [("red", "car"), ("blue", "fish")])
            assert mention.matches(view)
            text = sentence(mention, rng)
            assert true_at(read(text), scene, (start_s + end_s) / 2), text
            assert "{" not in text and "  " not in text and text == text.strip()
            said |= {mention.relation, mention.action}
            for other in alterations(mention, rng):
                assert other != mention
    assert said == {None, *RELATION_WORDS, *ACTIONS}


def test_a_hard_world_is_drawn_as_planned(tmp_path: Path) -> None:
    shots = make_world(tmp_path / "a", 9, 1, 3, difficulty="hard")
    assert make_world(tmp_path / "b", 9, 1, 3, difficulty="hard") == shots
    for name in ("truth.jsonl", "shots.jsonl", "hard-9-000.mp4"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with av.open(str(tmp_path / "a" / "hard-9-000.mp4")) as container:
        fps = container.streams.video[0].average_rate
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == round(shots[-1].end_s * fps)
    for shot in shots:
        for share in (0.0, 0.3, 0.6, 0.95):
            number = int(share * round((shot.end_s - shot.start_s) * fps))
            drawn = renderer(shot.scene).frame(float(number / fps)).astype(int)
            stored = frames[round(shot.start_s * fps) + number].astype(int)
            assert np.abs(drawn - stored).mean() < 8
    with pytest.raises(UserError, match="no --difficulty 'harder'"):
        make_world(tmp_path / "c", 9, 1, 1, difficulty="harder")


def test_another_difficulty_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "world-7-20").mkdir()
    (tmp_path / "world-7-20" / "truth.jsonl").touch()
    words = ["vsearch", "demo", "--corpus", str(tmp_path), "--difficulty", "harder"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    said = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2 and "no --difficulty 'harder'; choose one of easy, hard" in said


def test_every_cast_finds_room_in_the_frame() -> None:
    rng, numbers = np.random.default_rng(1), set()
    for _ in range(3000):
        scene = sample_hard_scene(rng, random_cast(rng, lambda c, k: True))
        scene = sample_hard_scene(rng, twisted(rng, scene)) if rng.random() < 0.3 else scene
        numbers.add((scene.count, scene.second.count if scene.second else 0))
        for time_s in (0.0, scene.duration_s):
            for group, _ in scene.drawn(time_s):
                for place, reach in zip(group.centre, group.reach, strict=True):
                    assert reach - 1e-9 <= place <= 1 - reach + 1e-9
    assert numbers >= {*((n, 0) for n in NUMBERS), *((n, m) for n in (1, 2, 3) for m in (1, 2, 3))}


def test_scenes_that_cannot_be_are_refused() -> None:
    scene = acted("moves left")
    with pytest.raises(ValueError, match="would not last"):
        other = sample_hard_scene(
            np.random.default_rng(0), Cast((("red", "car"), ("blue", "car")), relation="above")
        ).second
        replace(scene, second=other)
    with pytest.raises(ValueError, match="do not fit"):
        replace(scene, action=Action("moves left", 1.0, 2.0, 0.95))
    with pytest.raises(ValueError, match="by an action only"):
        replace(scene, velocity=(0.1, 0.0))


def test_what_covers_a_cell_in_training_is_what_is_drawn_there() -> None:
    pictures = draw_pictures(1, 250, 8 * CELLS, workers=1, hard_share=1)
    palette = np.array(list(COLOURS.values()), float)
    discs = [list(KINDS).index(kind) for kind in ("ball", "heart")]  # without holes and windows
    right = []
    for number, view in enumerate(pictures.views):
        for frame, kinds, colours in zip(
            pictures.pixels[number], pictures.kinds[number], pictures.colours[number], strict=True
        ):
            middles = frame[4::8, 4::8]
            covered = np.isin(kinds, discs) & (not view.dark)
            far = np.abs(middles[covered][:, None].astype(float) - palette).sum(axis=2)
            right += (far.argmin(axis=1) == colours[covered]).tolist()
    assert len(right) > 150 and np.mean(right) > 0.8
    assert sum(len(view.groups) == 2 for view in pictures.views) > 60
