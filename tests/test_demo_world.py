import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from vsearch.demo.scenes import (
    COLOURS,
    FRAME_PX,
    KINDS,
    SETTINGS,
    SceneRenderer,
    held_out,
    sample_scene,
)
from vsearch.demo.sentences import (
    COLOUR_WORDS,
    HELD_OUT_TEMPLATES,
    KIND_NOUNS,
    NOWHERE,
    TRAINING_TEMPLATES,
    Mention,
    full_mention,
    random_mention,
    sentence,
)
from vsearch.demo.world import Shot, make_world, queries

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
    from vsearch.demo.train_models import draw_pictures

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
