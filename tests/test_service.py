"""The service without HTTP and Ray: parts that are late or gone, snapshots that change, pages, load."""

import asyncio
import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archive import add_video, config, vectors_of
from test_build_index import build

import vsearch
from vsearch import service as module
from vsearch.config import UserError
from vsearch.corpus import Corpus
from vsearch.encoders import ClipEncoder
from vsearch.filters import Filter
from vsearch.query import Term
from vsearch.search import Engine, sure
from vsearch.serve import BATCH, TextEncoder
from vsearch.service import (
    Answer,
    BusyError,
    GoneError,
    Kept,
    LoadedPart,
    MissingPartError,
    NotLoaded,
    Service,
    UnavailableError,
    follow,
)
from vsearch.snapshots import Snapshots
from vsearch.versions import Versions

PARTS = 3
TERMS = [Term(text="a boat")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """A corpus of eight shards with two snapshots: rows a moment, then rows a frame."""
    corpus = Corpus(str(tmp_path_factory.mktemp("corpus")))
    for number in range(16):
        add_video(corpus, f"v{number}", tags={"side": "left" if number % 2 else "right"})
    first = build(corpus, rows="moments", shard_frames=800).snapshot
    second = build(corpus, shard_frames=800).snapshot
    assert len(Snapshots(corpus).manifest(second)["shards"]) == 8
    return corpus.url, [first, second]


@pytest.fixture
def newest(corpus: tuple[str, list[str]]) -> str:
    url, versions = corpus
    if Snapshots(Corpus(url)).current != versions[1]:
        Snapshots(Corpus(url)).roll_back(versions[1])
    return url


async def meaning(text: str) -> Any:
    """A vector for a text; another for each, but always the same."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    vector = np.random.default_rng(seed).standard_normal(config().clip.dim)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def parts_of(url: str, count: int = PARTS) -> list[Any]:
    threads = ThreadPoolExecutor(4)
    return [LoadedPart(Versions(url, slice(n, None, count)), threads) for n in range(count)]


def service(url: str, parts: list[Any] | None = None) -> Service:
    if parts is not None:
        return Service(url, Versions(url, slice(0, 0)), meaning, parts)
    return Service(url, Versions(url), meaning)


class Late:
    """A part that answers after a while."""

    def __init__(self, part: Any, seconds: float) -> None:
        self._part, self.seconds = part, seconds

    async def ask(self, *arguments: Any) -> Any:
        await asyncio.sleep(self.seconds)
        return await self._part.ask(*arguments)


class Dead:
    async def ask(self, *arguments: Any) -> Any:
        raise MissingPartError("is away")


def as_found(answer: Answer) -> list[dict[str, Any]]:
    return [segment.to_dict() for segment in answer.results.segments]


def of_engine(url: str, text: str, limit: int, snapshot: str | None = None, **options: Any) -> Any:
    engine = vsearch.open(url, snapshot)
    vector = asyncio.run(meaning(text))
    found = engine.find(vector, limit, **options)
    told = sure(found.segments, engine.scale([Term(text=text)], [vector], [1.0]), 0.0)
    return [segment.to_dict() for segment in told]


@pytest.mark.parametrize("where", [None, Filter(tags={"side": "left"}), Filter(from_s=5, to_s=20)])
def test_parts_answer_as_one_process_and_as_the_engine(newest: str, where: Filter | None) -> None:
    for text in ("a boat", "a red house", "rain"):
        expected = of_engine(newest, text, 20, where=where)
        assert len(expected) == 20
        for parts in (None, parts_of(newest)):
            answer = asyncio.run(service(newest, parts).search([Term(text=text)], where, 20))
            assert as_found(answer) == expected
            assert not answer.missing


def test_a_late_part_is_left_out_in_time_and_then_not_waited_for(newest: str) -> None:
    parts = parts_of(newest)
    late = parts[1] = Late(parts[1], 60)
    there = service(newest, parts)

    async def ask() -> tuple[Answer, float, float]:
        began = time.monotonic()
        first = await there.search(TERMS)
        middle = time.monotonic()
        await there.search(TERMS)
        return first, middle - began, time.monotonic() - middle

    answer, first_s, second_s = asyncio.run(ask())
    assert answer.missing == ["part 2 of 3 did not answer within 1 s"]
    assert module.PART_LIMIT_S <= first_s < module.PART_LIMIT_S + 1
    assert second_s < module.HURRY_S + 0.5
    assert there.status()["missing"] == ["part 2 of 3"]
    others = [Engine(newest, part=slice(n, None, PARTS)) for n in (0, 2)]
    vector = asyncio.run(meaning("a boat"))
    known = {s.video for engine in others for s in engine.find(vector, 100).segments}
    assert (
        len(answer.results.segments) == 12 and {s.video for s in answer.results.segments} <= known
    )
    late.seconds = 0
    assert not asyncio.run(there.search(TERMS)).missing
    assert there.status()["missing"] == []


def test_a_dead_part_is_named_and_the_others_answer(newest: str) -> None:
    there = service(newest, [*parts_of(newest)[:2], Dead()])
    answer = asyncio.run(there.search(TERMS))
    assert answer.missing == ["part 3 of 3 is away"] and answer.to_dict()["partial"]
    assert len(answer.results.segments) == 12
    composed = [Term(text="a boat"), Term(text="rain", weight=-0.5)]
    assert asyncio.run(there.search(composed)).missing == ["part 3 of 3 is away"]


def test_a_fault_in_a_part_is_not_taken_for_a_part_that_is_away(newest: str) -> None:
    class Faulty:
        async def ask(self, *arguments: Any) -> Any:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(service(newest, [Faulty(), *parts_of(newest)[1:]]).search(TERMS))


def test_pages_follow_each_other_without_a_break(newest: str) -> None:
    expected = of_engine(newest, "a boat", 50)
    for parts in (None, parts_of(newest)):
        there, cursor, pages = service(newest, parts), None, []
        for _ in range(5):
            answer = asyncio.run(there.search(TERMS, limit=10, cursor=cursor))
            pages += as_found(answer)
            cursor = answer.cursor
        assert pages == expected


def test_the_last_page_says_so(newest: str) -> None:
    answer = asyncio.run(
        service(newest).search(TERMS, Filter(videos=["v1"], from_s=2, to_s=5), limit=100)
    )
    assert answer.cursor is None and 0 < len(answer.results.segments) < 100


def test_weak_segments_are_left_out(newest: str) -> None:
    every = of_engine(newest, "a boat", 100)
    bound = every[9]["score"]
    answer = asyncio.run(service(newest, parts_of(newest)).search(TERMS, limit=50, min_score=bound))
    assert as_found(answer) == [segment for segment in every if segment["score"] >= bound]
    assert answer.cursor is None


def test_more_like_a_moment_finds_it_first(newest: str) -> None:
    term = Term(video_id="v7", at_s=12.34)
    for parts in (None, parts_of(newest)):
        best = asyncio.run(service(newest, parts).search([term])).results.segments[0]
        assert best.video_id == "v7" and best.start_s <= 12.34 <= best.end_s
    row = vectors_of("v71", 400)[123].astype(np.float32)
    found = Engine(newest).vector_at("v7", 12.34)
    assert found is not None and float(found @ row) == pytest.approx(np.linalg.norm(row), abs=1e-3)
    with pytest.raises(UserError, match="no video"):
        asyncio.run(service(newest).search([Term(video_id="nobody", at_s=0.0)]))


def test_without_moves_away_from_what_is_not_wanted(newest: str) -> None:
    first = of_engine(newest, "a boat", 1)[0]
    like = Term(video_id=first["video_id"], at_s=first["best_s"], weight=-1)
    for parts in (None, parts_of(newest)):
        answer = asyncio.run(service(newest, parts).search([*TERMS, like]))
        assert all(s.to_dict() != first for s in answer.results.segments)


def test_a_timeline_holds_the_best_score_of_each_step(newest: str) -> None:
    vector = asyncio.run(meaning("a boat"))
    rows = vectors_of("v31", 400).astype(np.float32) @ vector
    for parts in (None, parts_of(newest)):
        found, snapshot, _ = asyncio.run(service(newest, parts).timeline("v3", TERMS, 40))
        assert snapshot == vsearch.open(newest).snapshot
        assert (found.start_s, found.step_s) == (0.0, pytest.approx(1.0))
        np.testing.assert_allclose(found.scores, rows.reshape(40, 10).max(1), atol=2e-3)
    fine, _, _ = asyncio.run(service(newest).timeline("v3", TERMS, 800))
    np.testing.assert_allclose(np.repeat(rows, 2), fine.scores, atol=2e-3)
    with pytest.raises(LookupError):
        asyncio.run(service(newest).timeline("nobody", TERMS, 40))


# ── snapshots ────────────────────────────────────────────────────────────────────────────────────


def test_a_new_snapshot_is_loaded_beside_the_old_and_shards_are_shared(
    corpus: tuple[str, list[str]], newest: str
) -> None:
    url, (first, second) = corpus
    versions = Versions(url)
    assert versions.load() is None
    Snapshots(Corpus(url)).roll_back(first)
    loaded = versions.load()
    assert loaded and loaded.snapshot == first and versions.current.snapshot == second
    versions.take(loaded)
    assert [engine.snapshot for engine in versions.loaded] == [first, second]
    again = Engine(url, first, like=loaded)
    assert all(a is b for a, b in zip(again.index.shards, loaded.index.shards, strict=True))
    Snapshots(Corpus(url)).roll_back(second)
    back = versions.load()
    assert back is versions.get(second)  # it was still there
    versions.take(back)
    assert [engine.snapshot for engine in versions.loaded] == [second, first]


def test_the_earlier_snapshot_goes_after_a_while(
    corpus: tuple[str, list[str]], newest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, (first, _) = corpus
    there = service(url)
    page = asyncio.run(there.search(TERMS, limit=5))
    Snapshots(Corpus(url)).roll_back(first)
    engine = there.versions.load()
    assert engine
    there.versions.take(engine)
    follows = asyncio.run(there.search(TERMS, limit=5, cursor=page.cursor))
    assert (
        follows.results.snapshot == page.results.snapshot
        and there.versions.current.snapshot == first
    )
    there.versions.forget()
    assert len(there.versions.loaded) == 2
    monkeypatch.setattr("vsearch.versions.KEPT_S", 0.0)
    there.versions.forget()
    assert len(there.versions.loaded) == 1
    with pytest.raises(GoneError):
        asyncio.run(there.search(TERMS, limit=5, cursor=page.cursor))


def test_parts_that_are_behind_or_ahead_never_mix_snapshots(
    corpus: tuple[str, list[str]], newest: str
) -> None:
    url, (first, second) = corpus
    behind = parts_of(url)  # on the second; the pointer will go to the first
    Snapshots(Corpus(url)).roll_back(first)
    ahead = parts_of(url)
    there = service(url, [behind[0], *ahead[1:]])  # the gateway knows the first alone
    assert asyncio.run(there.ready(there.versions.current)) is False
    answer = asyncio.run(there.search(TERMS))
    assert answer.results.snapshot == first and answer.missing == [
        "part 1 of 3 does not have the snapshot yet"
    ]
    # One that has both answers from the older, of which all parts have some.
    both = Versions(url, slice(0, 0))
    both._engines = [Engine(url, first, slice(0, 0)), Engine(url, second, slice(0, 0))]
    mixed = Service(url, both, meaning, [*behind[:2], _Both(behind[2], ahead[2])])
    answer = asyncio.run(mixed.search(TERMS))
    assert (answer.results.snapshot, answer.missing) == (second, [])
    assert as_found(answer) == of_engine(url, "a boat", 12, second)
    # A gateway that is behind turns to what the parts have.
    Snapshots(Corpus(url)).roll_back(second)
    late = Versions(url, slice(0, 0))
    Snapshots(Corpus(url)).roll_back(first)
    answer = asyncio.run(Service(url, late, meaning, ahead).search(TERMS))
    assert (answer.results.snapshot, answer.missing) == (first, [])
    assert as_found(answer) == of_engine(url, "a boat", 12, first)


class _Both:
    """A part that has the snapshots of two."""

    def __init__(self, *parts: Any) -> None:
        self._parts = parts

    async def ask(self, *arguments: Any) -> Any:
        for part in self._parts:
            found = await part.ask(*arguments)
            if not isinstance(found, NotLoaded):
                return found
        return found


@pytest.mark.parametrize("parts", [0, PARTS])
def test_queries_under_way_while_snapshots_change_are_each_of_one(
    corpus: tuple[str, list[str]], newest: str, parts: int
) -> None:
    url, versions = corpus
    texts = ["a boat", "rain", "a red house", "night"]
    truth = {
        (version, text): of_engine(url, text, 12, version) for version in versions for text in texts
    }
    behind = [Versions(url, slice(n, None, parts)) for n in range(parts)]
    threads = ThreadPoolExecutor(4)
    afar = [LoadedPart(part, threads) for part in behind]
    there = Service(url, Versions(url, slice(0, 0) if parts else slice(None)), meaning, afar)
    seen = []

    async def ask(text: str) -> None:
        for _ in range(25):
            answer = await there.search([Term(text=text)])
            assert not answer.missing
            assert as_found(answer) == truth[answer.results.snapshot, text]
            seen.append(answer.results.snapshot)
            await asyncio.sleep(0.01)

    async def change() -> None:
        for number in range(6):
            await asyncio.to_thread(Snapshots(Corpus(url)).roll_back, versions[number % 2])
            await asyncio.sleep(0.15)

    async def everything() -> None:
        following = [
            asyncio.create_task(follow(part, 0.02 * (n + 1))) for n, part in enumerate(behind)
        ]
        following.append(asyncio.create_task(there.run(0.03)))
        await asyncio.gather(change(), *map(ask, texts))
        for task in following:
            task.cancel()

    asyncio.run(everything())
    assert set(seen) == set(versions) and len(seen) == 100


def test_a_damaged_snapshot_is_not_taken_and_the_old_one_answers(
    tmp_path: Path,
) -> None:
    corpus = Corpus(str(tmp_path))
    for name in ("a", "b"):
        add_video(corpus, name)
    build(corpus)
    there = service(corpus.url)
    before = as_found(asyncio.run(there.search(TERMS)))
    add_video(corpus, "c")
    new = build(corpus).snapshot
    entry = Snapshots(corpus).manifest(new)["shards"][-1]["vectors_file"]
    Path(corpus.path(f"index/{entry['name']}")).write_bytes(b"damaged")
    assert there.versions.load() is None
    assert "is damaged" in there.status()["problem"]
    assert as_found(asyncio.run(there.search(TERMS))) == before
    first = Snapshots(corpus).roll_back()
    assert there.versions.load() is None and there.versions.current.snapshot == first
    assert there.status()["problem"] is None


# ── load ─────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_too_much_is_refused_at_once(newest: str) -> None:
    parts = parts_of(newest)
    slow = Late(parts[0], 0.5)
    there = service(newest, [slow, *parts[1:]])

    async def flood() -> list[Any]:
        asked = (there.search(TERMS) for _ in range(module.SEARCHES + 10))
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(flood())
    refused = [answer for answer in found if isinstance(answer, BusyError)]
    answered = [answer for answer in found if isinstance(answer, Answer)]
    assert (len(refused), len(answered)) == (10, module.SEARCHES)
    assert isinstance(asyncio.run(there.search(TERMS)), Answer)  # and then there is room again


def test_an_answer_that_takes_too_long_is_given_up(
    newest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LIMIT_S", 0.2)
    there = service(newest, [Late(parts_of(newest, 1)[0], 5)])
    with pytest.raises(UnavailableError, match=r"within 0\.2 s"):
        asyncio.run(there.search(TERMS))


def test_kept_values_are_the_ones_used_last() -> None:
    kept: Kept[str, bytes] = Kept(10, len)
    for name in "abc":
        kept.put(name, name.encode() * 4)
    assert (kept.get("a"), kept.get("b"), kept.get("c")) == (None, b"bbbb", b"cccc")
    kept.get("b")
    kept.put("d", b"dddd")
    assert (kept.get("b"), kept.get("c")) == (b"bbbb", None)
    kept.put("e", b"e" * 11)
    assert kept.get("e") is None


async def _encoded(encoder: TextEncoder, sentences: list[str]) -> list[Any]:
    return await asyncio.gather(*map(encoder.encode, sentences), return_exceptions=True)


def test_sentences_that_wait_are_encoded_together(
    corpus: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = corpus
    encoder = TextEncoder(url)
    alone = ClipEncoder.recorded(Corpus(url).config.clip).encode_text
    batches: list[int] = []

    def encode_text(_: ClipEncoder, sentences: list[str]) -> Any:
        batches.append(len(sentences))
        time.sleep(0.05)
        if "fail" in sentences:
            raise RuntimeError("no memory")
        return alone(sentences)

    monkeypatch.setattr(ClipEncoder, "encode_text", encode_text)
    sentences = [f"a boat {number}" for number in range(BATCH + 5)]
    found = asyncio.run(_encoded(encoder, sentences))
    assert batches == [BATCH, 5]
    np.testing.assert_allclose(np.stack(found), alone(sentences), atol=1e-5)

    # Each of a batch that fails is told so, and the next is encoded.
    failed = asyncio.run(_encoded(encoder, ["fail", "a boat"]))
    assert [str(error) for error in failed] == ["no memory", "no memory"]
    [vector] = asyncio.run(_encoded(encoder, ["a boat 1"]))
    np.testing.assert_allclose(vector, found[1], atol=1e-5)


def test_who_leaves_while_a_sentence_waits_takes_nobody_along(
    corpus: tuple[str, list[str]],
) -> None:
    encoder = TextEncoder(corpus[0])

    async def some_leave() -> list[Any]:
        asked = [asyncio.create_task(encoder.encode(f"a boat {number}")) for number in range(6)]
        await asyncio.sleep(0)
        for task in asked[::2]:
            task.cancel()
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(some_leave())
    assert [isinstance(one, asyncio.CancelledError) for one in found] == [True, False] * 3
    np.testing.assert_allclose(np.linalg.norm(np.stack(found[1::2]), axis=1), 1, atol=1e-5)
