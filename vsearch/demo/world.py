"""Makes a small archive of the tiny world: H.264 videos whose every moment is known, and sentences
with their true moments as JSONL.

An easy world has easy scenes and sentences of five groups. A hard one has hard scenes, many of them
twists of earlier ones (another colour, the opposite relation, the first object alone, another count or
action), and its truth is to the second: a moment is as long as the sentence is true.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from vsearch.config import UserError
from vsearch.demo.hard import (
    ACTIONS,
    Cast,
    HardScene,
    opposite,
    relation,
    renderer,
    sample_hard_scene,
)
from vsearch.demo.scenes import (
    COLOURS,
    FRAME_PX,
    KINDS,
    SETTINGS,
    Scene,
    View,
    held_out,
    sample_scene,
)
from vsearch.demo.sentences import (
    HELD_OUT_TEMPLATES,
    NOWHERE,
    NUMBERS,
    TRAINING_TEMPLATES,
    Mention,
    alterations,
    another,
    relations_of,
    sentence,
    sizes_of,
)

DIFFICULTIES = ("easy", "hard")
FLASH_S = 0.5
"""So long the picture may be hidden without that a moment ends."""


@dataclass(frozen=True)
class Shot:
    """A scene in its place: seconds [start_s, end_s) of the video file `video`."""

    video: str
    start_s: float
    end_s: float
    scene: Scene


class Stretch(NamedTuple):
    """Seconds [start_s, end_s) of a video in which what is to be seen stays the same."""

    video: str
    start_s: float
    end_s: float
    view: View


def make_world(
    folder: Path,
    seed: int,
    videos: int = 20,
    scenes_per_video: int = 6,
    report: Callable[[int, int], None] = lambda done, total: None,
    difficulty: str = "easy",
) -> list[Shot]:
    """Writes `videos` MP4 files, `truth.jsonl` (the sentences) and `shots.jsonl` (what is in each
    shot) into `folder`. The same seed and difficulty ("easy" or "hard") give the same scenes and
    sentences. Raises `UserError` for another difficulty.
    """
    _check(difficulty)
    hard = difficulty == "hard"
    folder.mkdir(parents=True, exist_ok=True)
    rng = world_rng(seed) if hard else np.random.default_rng(seed)
    plans: list[tuple[Path, Sequence[Scene], int]] = []
    cut: list[HardScene] = []
    for number in range(videos):
        fps = int(rng.choice([24, 25, 30]))
        path = folder / f"{'hard' if hard else 'world'}-{seed}-{number:03d}.mp4"
        if hard:
            cut += _cut_with_twists(rng, scenes_per_video, fps, cut)
            plans.append((path, cut[-scenes_per_video:], fps))
        else:
            plans.append((path, _cut_together(rng, scenes_per_video, fps), fps))
    shots: list[Shot] = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for number, written in enumerate(pool.map(write_video, *zip(*plans, strict=True)), 1):
            shots += written
            report(number, videos)
    _write_lines(folder / "shots.jsonl", [{**asdict(shot)} for shot in shots])
    _write_lines(folder / "truth.jsonl", (hard_queries if hard else queries)(shots, rng))
    return shots


def world_beside(
    corpus: str,
    seed: int = 7,
    videos: int = 20,
    difficulty: str = "easy",
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """The folder of a world in that of its corpus, where `vsearch demo` has it; made if it is not there.
    Raises `UserError` where another world is, and as `make_world`.
    """
    _check(difficulty)
    folder = Path(corpus) / f"world-{seed}-{videos}{'-hard' if difficulty == 'hard' else ''}"
    others = [path for path in Path(corpus).glob("world-*") if path != folder]
    if others:
        raise UserError(
            f"{corpus} holds another world ({others[0].name}), whose sentences would have more answers "
            f"with this one beside it: choose another --corpus."
        )
    if not (folder / "truth.jsonl").exists():
        make_world(folder, seed, videos, report=report, difficulty=difficulty)
    return folder


def _check(difficulty: str) -> None:
    if difficulty not in DIFFICULTIES:
        known = ", ".join(DIFFICULTIES)
        raise UserError(f"There is no --difficulty {difficulty!r}; choose one of {known}.")


def write_video(path: Path, scenes: Sequence[Scene], fps: int) -> list[Shot]:
    """One MP4 of the scenes, cut together without transitions; each is a whole number of frames."""
    shots = []
    count = 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=fps, options={"crf": "20", "preset": "veryfast"}
        )
        stream.width = stream.height = FRAME_PX
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, fps)
        for scene in scenes:
            drawer = renderer(scene)
            first = count
            for number in range(round(scene.duration_s * fps)):
                frame = av.VideoFrame.from_ndarray(drawer.frame(number / fps), format="rgb24")
                frame.pts, frame.time_base = count, Fraction(1, fps)
                container.mux(stream.encode(frame))
                count += 1
            shots.append(Shot(path.name, first / fps, count / fps, scene))
        container.mux(stream.encode(None))
    return shots


def _cut_together(rng: np.random.Generator, count: int, fps: int) -> list[Scene]:
    """Random scenes; neighbours differ in setting, a third of the pairs are held-out ones, and one
    scene in twelve is empty.
    """
    scenes: list[Scene] = []
    for _ in range(count):
        before = scenes[-1].setting if scenes else None
        setting = str(rng.choice([s for s in SETTINGS if s != before]))
        unseen = bool(rng.random() < 1 / 3)
        pairs = [(c, k) for c in COLOURS for k in KINDS if held_out(c, k) == unseen]
        pair = pairs[int(rng.integers(len(pairs)))]
        scene = sample_scene(rng, pair=pair, setting=setting, empty=bool(rng.random() < 1 / 12))
        scenes.append(replace(scene, duration_s=round(scene.duration_s * fps) / fps))
    return scenes


def queries(shots: list[Shot], rng: np.random.Generator) -> list[dict[str, object]]:
    """Sentences with their true moments. Groups: `seen` and `unseen` (one right answer; the pair was
    or was not drawn in training; half in templates kept out of training), `setting`, `kind` (any
    number of answers), `nothing`.
    """

    def line(
        group: str, mention: Mention, templates: tuple[str, ...] = TRAINING_TEMPLATES
    ) -> dict[str, object]:
        true = [shot for shot in shots if mention.matches(shot.scene.view(0))]
        moments = [{"video": s.video, "start_s": s.start_s, "end_s": s.end_s} for s in true]
        return {"query": sentence(mention, rng, templates), "moments": moments, "group": group}

    lines = []
    for number, shot in enumerate(shots):
        scene = shot.scene
        if not (scene.colour and scene.kind):
            continue
        pair = Mention(scene.colour, scene.kind)
        for mention in (pair, replace(pair, setting=scene.setting)):
            if sum(mention.matches(other.scene.view(0)) for other in shots) == 1:
                templates = HELD_OUT_TEMPLATES if number % 2 else TRAINING_TEMPLATES
                group = "unseen" if held_out(scene.colour, scene.kind) else "seen"
                lines.append(line(group, mention, templates))
                break
    lines += [line("setting", Mention(setting=setting)) for setting in SETTINGS]
    lines += [line("kind", Mention(kind=kind)) for kind in KINDS]
    lines = [entry for entry in lines if entry["moments"]]
    return lines + [{"query": text, "moments": [], "group": "nothing"} for text in NOWHERE]


def timeline(shots: Sequence[Shot]) -> list[Stretch]:
    """What is to be seen from when to when. The shots of a video are expected in their order."""
    return [
        Stretch(shot.video, shot.start_s + start_s, shot.start_s + end_s, view)
        for shot in shots
        for start_s, end_s, view in shot.scene.stretches()
    ]


def moments(mention: Mention, stretches: Sequence[Stretch]) -> list[dict[str, object]]:
    """From when to when the mention is true, each time as long as it lasts, whatever is cut meanwhile."""
    found: list[tuple[str, float, float]] = []
    for stretch in stretches:
        if not mention.matches(stretch.view):
            continue
        start_s = stretch.start_s
        if found and found[-1][0] == stretch.video and start_s - found[-1][2] <= FLASH_S:
            start_s = found.pop()[1]
        found.append((stretch.video, start_s, stretch.end_s))
    return [
        {"video": video, "start_s": round(start_s, 6), "end_s": round(end_s, 6)}
        for video, start_s, end_s in found
    ]


def hard_queries(shots: Sequence[Shot], rng: np.random.Generator) -> list[dict[str, object]]:
    """Sentences with their true moments. `seen` and `unseen` have one right answer, `nothing` (from
    outside the world) and `absent` (of the world's language) none, the others any number: `relation`,
    `count`, `action`, `small`, `dark`, `setting`, `kind`, `negation`. Half are in templates kept out of
    training.

    Two lines of `negation` with the same `pair` differ in 'with' and 'without' alone; their `terms` say
    the same as texts with weights.
    """
    stretches = timeline(shots)
    asked: dict[tuple[str, Mention], list[dict[str, object]]] = {}
    for shot in shots:
        view = max(shot.scene.stretches(), key=lambda s: (len(s[2].groups), s[1] - s[0]))[2]
        for group, mention in _statements(shot, view, rng):
            found = moments(mention, stretches)
            if group in ("seen", "unseen"):
                shorter = (group, replace(mention, setting=None))
                said = len(found) == 1 and (not mention.setting or shorter not in asked)
            else:
                said = group != "count" or found != moments(replace(mention, count=None), stretches)
            if said:
                asked[group, mention] = found
    for setting in SETTINGS:
        asked["setting", Mention(setting=setting)] = moments(Mention(setting=setting), stretches)
    for kind in KINDS:
        asked["kind", Mention(kind=kind)] = moments(Mention(kind=kind), stretches)
    for shot in shots[::2]:
        untrue = [m for m in _untrue(shot, rng) if not moments(m, stretches)]
        if untrue:
            asked["absent", untrue[int(rng.integers(len(untrue)))]] = []
    lines: list[dict[str, object]] = []
    for (group, mention), found in asked.items():
        templates = HELD_OUT_TEMPLATES if rng.random() < 0.5 else TRAINING_TEMPLATES
        if found or group == "absent":
            text = sentence(mention, rng, templates)
            lines.append({"query": text, "moments": found, "group": group})
    lines += _negations(stretches, rng)
    return lines + [{"query": text, "moments": [], "group": "nothing"} for text in NOWHERE]


def _statements(shot: Shot, view: View, rng: np.random.Generator) -> Iterator[tuple[str, Mention]]:
    """(group of queries, mention) of what a shot shows."""
    for group in view.groups:
        pair = Mention(group.colour, group.kind)
        known = "unseen" if held_out(group.colour, group.kind) else "seen"
        yield known, pair
        yield known, replace(pair, setting=view.setting)
        yield "count", replace(pair, count=group.count)
        if "tiny" in sizes_of(group):
            yield "small", replace(pair, size="tiny")
        if view.dark:
            yield "dark", replace(pair, dark=True)
    if len(view.groups) == 2:
        one, other = view.groups if rng.random() < 0.5 else view.groups[::-1]
        names = relations_of(one, other)[:-1]
        name = names[int(rng.integers(len(names)))]
        thing = Mention(other.colour, other.kind)
        yield "relation", Mention(one.colour, one.kind, relation=name, other=thing)
    for _, _, acted in shot.scene.stretches():
        if acted.acting:
            yield "action", Mention(acted.acting.colour, acted.acting.kind, action=acted.action)


def _untrue(shot: Shot, rng: np.random.Generator) -> list[Mention]:
    """What a shot shows at its start, with one thing said differently."""
    view = shot.scene.view(0)
    if not view.groups:
        return []
    one, *others = view.groups
    pair = Mention(one.colour, one.kind)
    said = [
        replace(pair, setting=view.setting),
        replace(pair, count=one.count),
        replace(pair, action=ACTIONS[int(rng.integers(len(ACTIONS)))]),
    ]
    if others:
        other = Mention(others[0].colour, others[0].kind)
        said.append(replace(pair, relation=relations_of(one, others[0])[0], other=other))
    return [altered for mention in said for altered in alterations(mention, rng)]


def _negations(stretches: Sequence[Stretch], rng: np.random.Generator) -> list[dict[str, object]]:
    """Pairs of sentences, with and without another thing, of which each is true somewhere."""
    lines: list[dict[str, object]] = []
    told = set()
    for view in (stretch.view for stretch in stretches if len(stretch.view.groups) > 1):
        one, other = view.groups
        colour = other.colour if one.kind == other.kind or rng.random() < 0.5 else None
        thing, company = Mention(one.colour, one.kind), Mention(colour, other.kind)
        both = [replace(thing, relation=r, other=company) for r in ("with", "without")]
        true = [moments(mention, stretches) for mention in both]
        if (thing, company) in told or not all(true):
            continue
        told.add((thing, company))
        templates = HELD_OUT_TEMPLATES if rng.random() < 0.5 else TRAINING_TEMPLATES
        suited = [template for template in templates if "{other}" in template]
        template = suited[int(rng.integers(len(suited)))]
        for mention, found in zip(both, true, strict=True):
            text = sentence(mention, rng, (template,), paraphrase=False)
            lines.append({"query": text, "moments": found, "group": "negation", "pair": len(told)})
    return lines


# ── what is cut together in a hard world ─────────────────────────────────────────────────────────
def world_rng(seed: int) -> np.random.Generator:
    """Of hard worlds; training draws from `training_rng`, which has nothing in common with it."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))


def training_rng(seed: int) -> np.random.Generator:
    """Of the pictures that models are trained on."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))


def random_cast(rng: np.random.Generator, allowed: Callable[[str, str], bool]) -> Cast:
    """One or two groups of allowed pairs; half of the second ones look like the first: the same kind
    or the same colour. A third of the pairs is of those held out of training, if allowed.
    """
    pairs = [(c, k) for c in COLOURS for k in KINDS if allowed(c, k)]
    rare = [pair for pair in pairs if held_out(*pair)]
    common = [pair for pair in pairs if not held_out(*pair)]
    drawn = rare if rare and (not common or rng.random() < 1 / 3) else common
    first = drawn[int(rng.integers(len(drawn)))]
    if rng.random() < 0.5:
        return Cast((first,))
    alike = [pair for pair in pairs if (pair[0] == first[0]) != (pair[1] == first[1])]
    others = [pair for pair in pairs if pair[0] != first[0] and pair[1] != first[1]]
    drawn = alike if alike and rng.random() < 0.5 else others
    return Cast((first, drawn[int(rng.integers(len(drawn)))]))


def twisted(rng: np.random.Generator, scene: HardScene) -> Cast:
    """The scene's cast with one thing changed: easily mistaken for it."""
    (colour, kind), *others = scene.pairs
    other_colour = ((another(rng, COLOURS, colour), kind), *others)
    other_kind = ((colour, another(rng, KINDS, kind)), *others)
    casts = [Cast(pairs) for pairs in (other_colour, other_kind) if len({*pairs}) == len(pairs)]
    if scene.second:
        casts.append(Cast(((colour, kind),)))
        name = relation(replace(scene.second, centre=(0.0, 0.0)), scene.second)
        casts.append(Cast((*scene.pairs,), relation=opposite(name)))
    else:
        casts.append(Cast(((colour, kind),), count=another(rng, NUMBERS, scene.count)))
        before = scene.action.name if scene.action else None
        casts.append(Cast(((colour, kind),), action=another(rng, ACTIONS, before)))
    return casts[int(rng.integers(len(casts)))]


def _cut_with_twists(
    rng: np.random.Generator, count: int, fps: int, before: Sequence[HardScene]
) -> list[HardScene]:
    """Random hard scenes. Half are twists of scenes of this or an earlier video, one in twelve is
    empty; most neighbours differ in setting.
    """
    scenes: list[HardScene] = []
    for _ in range(count):
        models = [scene for scene in (*before, *scenes) if scene.pairs]
        if models and rng.random() < 0.5:
            cast = twisted(rng, models[int(rng.integers(len(models)))])
        else:
            cast = random_cast(rng, lambda colour, kind: True)
        if rng.random() < 1 / 12:
            cast = Cast(())
        last = scenes[-1].view(scenes[-1].duration_s).setting if scenes else None
        setting = last if rng.random() < 0.15 else another(rng, SETTINGS, last)
        scenes.append(sample_hard_scene(rng, cast, setting).on_grid(fps))
    return scenes


def _write_lines(path: Path, lines: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
