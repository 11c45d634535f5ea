"""Makes a small archive of the tiny world: H.264 videos whose every moment is known, and sentences
with their true moments as JSONL.
"""

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np

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
    HELD_OUT_TEMPLATES,
    NOWHERE,
    TRAINING_TEMPLATES,
    Mention,
    sentence,
)


@dataclass(frozen=True)
class Shot:
    """A scene in its place: seconds [start_s, end_s) of the video file `video`."""

    video: str
    start_s: float
    end_s: float
    scene: Scene


def make_world(
    folder: Path,
    seed: int,
    videos: int = 20,
    scenes_per_video: int = 6,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Shot]:
    """Writes `videos` MP4 files, `truth.jsonl` (the sentences) and `shots.jsonl` (what is in each
    shot) into `folder`. The same seed gives the same scenes and sentences.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    plans = []
    for number in range(videos):
        fps = int(rng.choice([24, 25, 30]))
        scenes = _cut_together(rng, scenes_per_video, fps)
        plans.append((folder / f"world-{seed}-{number:03d}.mp4", scenes, fps))
    shots: list[Shot] = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for number, written in enumerate(pool.map(write_video, *zip(*plans, strict=True)), 1):
            shots += written
            report(number, videos)
    _write_lines(folder / "shots.jsonl", [{**asdict(shot)} for shot in shots])
    _write_lines(folder / "truth.jsonl", queries(shots, rng))
    return shots


def write_video(path: Path, scenes: list[Scene], fps: int) -> list[Shot]:
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
            renderer = SceneRenderer(scene)
            first = count
            for number in range(round(scene.duration_s * fps)):
                frame = av.VideoFrame.from_ndarray(renderer.frame(number / fps), format="rgb24")
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
        true = [shot for shot in shots if mention.matches(shot.scene)]
        moments = [{"video": s.video, "start_s": s.start_s, "end_s": s.end_s} for s in true]
        return {"query": sentence(mention, rng, templates), "moments": moments, "group": group}

    lines = []
    for number, shot in enumerate(shots):
        scene = shot.scene
        if not (scene.colour and scene.kind):
            continue
        pair = Mention(scene.colour, scene.kind)
        for mention in (pair, replace(pair, setting=scene.setting)):
            if sum(mention.matches(other.scene) for other in shots) == 1:
                templates = HELD_OUT_TEMPLATES if number % 2 else TRAINING_TEMPLATES
                group = "unseen" if held_out(scene.colour, scene.kind) else "seen"
                lines.append(line(group, mention, templates))
                break
    lines += [line("setting", Mention(setting=setting)) for setting in SETTINGS]
    lines += [line("kind", Mention(kind=kind)) for kind in KINDS]
    lines = [entry for entry in lines if entry["moments"]]
    return lines + [{"query": text, "moments": [], "group": "nothing"} for text in NOWHERE]


def _write_lines(path: Path, lines: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
