"""How a new snapshot uses the shards of the one before."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsearch import snapshots as snapshots_module
from vsearch.snapshots import MOST_DEAD, SMALL_SHARDS, Content, StoredShard, deal

FULL, GROWING = 1000, 100


@pytest.fixture(autouse=True, scope="module")
def small_numbers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots_module, "GROWING_FRAMES", GROWING)
        yield


def video(number: int, frames: int, generation: int = 0) -> Content:
    return Content(f"v{number:04d}", f"g{generation}", frames)


def stored(
    number: int, contents: Sequence[Content], dead: int = 0, flat: bool = False
) -> StoredShard:
    frames = sum(content.frames for content in contents) + dead
    return StoredShard(number, frames, flat, frozenset(contents))


def published(
    kept: list[StoredShard], new: list[list[Content]], now: Sequence[Content]
) -> list[StoredShard]:
    """The shards as the next build finds them: of what stays only what counts, small ones flat."""
    shards = [(shard.frames, shard.flat, shard.contents & set(now)) for shard in kept]
    for group in new:
        frames = sum(content.frames for content in group)
        shards.append((frames, frames <= FULL // 20, frozenset(group)))
    return [StoredShard(number, *facts) for number, facts in enumerate(shards)]


def live(shard: StoredShard, now: Sequence[Content]) -> int:
    return sum(content.frames for content in now if content in shard.contents)


def assert_right(
    now: Sequence[Content],
    before: Sequence[StoredShard],
    kept: list[StoredShard],
    new: list[list[Content]],
) -> None:
    assert set(kept) <= set(before)
    placed = Counter(content for shard in kept for content in shard.contents & set(now))
    placed.update(content for group in new for content in group)
    assert placed == Counter(now)
    for shard in kept:
        assert shard.frames - live(shard, now) <= MOST_DEAD * shard.frames + 1e-9
        assert live(shard, now)
    for group in new:
        assert group
        assert len(group) == 1 or sum(content.frames for content in group) <= FULL
    for one, next_ in pairwise(new):
        assert sum(content.frames for content in one) + next_[0].frames > FULL


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Content], list[StoredShard]]:
    """(the videos that there are now, the shards that there were): some videos are new, some gone, some
    are another generation; shards have dead frames of before.
    """
    frames = st.integers(1, 60) | st.integers(1, 1500)
    videos = [video(n, size) for n, size in enumerate(draw(st.lists(frames, max_size=40)))]
    before: list[list[Content]] = []
    now: list[Content] = []
    for content in videos:
        fate = draw(st.sampled_from(["stays", "stays", "stays", "new", "gone", "changed"]))
        if fate != "gone":
            changed = fate == "changed"
            now.append(video(int(content.video_id[1:]), content.frames, 1) if changed else content)
        if fate != "new":
            if not before or draw(st.booleans()):
                before.append([])
            before[-1].append(content)
    shards = [
        stored(number, contents, dead=draw(st.integers(0, 50)), flat=draw(st.booleans()))
        for number, contents in enumerate(before)
    ]
    return now, shards


@given(histories())
def test_every_video_is_placed_once_and_nothing_stale_is(
    history: tuple[list[Content], list[StoredShard]],
) -> None:
    now, before = history
    assert_right(now, before, *deal(now, before, FULL))


@given(histories())
def test_a_second_build_of_the_same_changes_nothing(
    history: tuple[list[Content], list[StoredShard]],
) -> None:
    now, before = history
    after = published(*deal(now, before, FULL), now)
    assert deal(now, after, FULL) == (after, [])


@given(histories())
def test_large_shards_that_are_live_enough_stay(
    history: tuple[list[Content], list[StoredShard]],
) -> None:
    now, before = history
    kept, _ = deal(now, before, FULL)
    for shard in before:
        if shard.frames >= FULL / 4 and live(shard, now) > 0.81 * shard.frames:
            assert shard in kept


@given(histories())
def test_where_no_video_is_new_no_live_shard_is_made_anew(
    history: tuple[list[Content], list[StoredShard]],
) -> None:
    now, before = history
    old = [content for content in now if any(content in shard.contents for shard in before)]
    kept, new = deal(old, before, FULL)
    dying = [shard for shard in before if live(shard, old) < (1 - MOST_DEAD) * shard.frames]
    if not any(live(shard, old) for shard in dying):
        assert new == []
        assert kept == [shard for shard in before if shard not in dying]


def test_the_bound_of_dead_frames_is_a_fifth() -> None:
    contents = [video(n, 10) for n in range(10)]
    shard = stored(0, contents)
    assert deal(contents[2:], [shard], FULL) == ([shard], [])
    assert deal(contents[3:], [shard], FULL) == ([], [contents[3:]])
    assert deal([], [shard], FULL) == ([], [])


def test_a_video_with_other_frames_is_made_anew() -> None:
    contents = [video(n, 100) for n in range(8)]
    shard = stored(0, contents)
    changed = video(3, 100, generation=1)
    kept, new = deal([*contents[:3], changed, *contents[4:]], [shard], FULL)
    assert (kept, new) == ([shard], [[changed]])


def test_a_small_flat_shard_takes_in_what_is_new() -> None:
    old, more = [video(n, 10) for n in range(5)], [video(9, 10)]
    assert deal([*old, *more], [stored(0, old, flat=True)], FULL) == ([], [[*old, *more]])
    coded = stored(0, old)
    assert deal([*old, *more], [coded], FULL) == ([coded], [more])
    large = [video(n, GROWING // 4 + 1) for n in range(4)]
    flat = stored(0, large, flat=True)
    assert deal([*large, *more], [flat], FULL) == ([flat], [more])


def test_many_small_shards_become_one() -> None:
    contents = [video(n, 90) for n in range(SMALL_SHARDS)]
    shards = [stored(n, [content]) for n, content in enumerate(contents)]
    large = stored(SMALL_SHARDS, [video(100, FULL // 4)])
    new = video(101, 90)
    now = [*contents, *large.contents, new]
    assert deal(now, [*shards, large], FULL) == ([large], [[*contents, new]])
    fewer = [*contents[1:], *large.contents, new]
    assert deal(fewer, [*shards[1:], large], FULL) == ([*shards[1:], large], [[new]])


def test_a_video_is_never_divided() -> None:
    contents = [video(0, 10), video(1, 3 * FULL), video(2, 10), video(3, FULL - 10)]
    assert deal(contents, [], FULL) == ([], [contents[:1], contents[1:2], contents[2:]])


@given(st.integers(0, 2**32 - 1), st.sampled_from([30, 300]))
@settings(max_examples=20)
def test_over_many_rounds_shards_stay_few_and_little_is_made_anew(seed: int, largest: int) -> None:
    """Videos come and go; each round is a build upon the one before."""
    chance = random.Random(seed)
    now: list[Content] = []
    shards: list[StoredShard] = []
    added = made = number = 0
    for _ in range(150):
        gone = {content for content in now if chance.random() < 0.02}
        now = [content for content in now if content not in gone]
        for _ in range(chance.randint(0, 6)):
            content = video(number, chance.randint(1, largest))
            now.insert(chance.randint(0, len(now)), content)
            number, added = number + 1, added + content.frames
        kept, new = deal(now, shards, FULL)
        assert_right(now, shards, kept, new)
        shards = published(kept, new, now)
        made += sum(content.frames for group in new for content in group)
        small = [shard for shard in shards if shard.frames < FULL / 4]
        assert len(small) <= SMALL_SHARDS
        total = sum(content.frames for content in now)
        assert sum(shard.frames for shard in shards) <= total / (1 - MOST_DEAD) + 1e-9
        assert len(shards) <= SMALL_SHARDS + 1 + 4 * total / (1 - MOST_DEAD) / FULL
    assert made <= 12 * (added + 1)
