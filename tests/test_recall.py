import itertools
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vsearch import index as index_module
from vsearch import recall
from vsearch.index import Index, Shard, encode, train_quantizer
from vsearch.recall import (
    DEPTH,
    PER_HIT,
    Point,
    Probe,
    RecallError,
    as_json,
    cheapest,
    curve,
    nprobes_for,
    probe,
)
from vsearch.sizing import Setting

DIM, ROWS, NLIST, TEXT = 32, 16_000, 64, 20
PARTS = [slice(0, 9_000), slice(9_000, 9_050), slice(9_050, 9_400), slice(9_400, ROWS)]

Half = NDArray[np.float16]
Single = NDArray[np.float32]


def unit(vectors: NDArray[np.floating]) -> Single:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors() -> Half:
    rng = np.random.default_rng(0)
    middles = unit(rng.standard_normal((150, DIM)))[rng.integers(150, size=ROWS)]
    return unit(middles + 0.9 * unit(rng.standard_normal((ROWS, DIM)))).astype(np.float16)


@pytest.fixture(scope="module")
def queries(vectors: Half) -> Single:
    """`TEXT` queries far from everything, as sentences are, and ten that are like rows."""
    rng = np.random.default_rng(1)
    text = unit(rng.standard_normal((TEXT, DIM)))
    return np.concatenate([text, unit(vectors[:10] + 0.3 * unit(rng.standard_normal((10, DIM))))])


@pytest.fixture(scope="module")
def quantizer(vectors: Half) -> bytes:
    return train_quantizer(vectors[::4].astype(np.float32), NLIST)


def coded_shard(folder: Path, vectors: Half, quantizer: bytes) -> Shard:
    path = folder / f"{len(list(folder.iterdir()))}.f16"
    vectors.tofile(path)
    encode(quantizer, vectors, path.with_suffix(".faiss"))
    return Shard(path, *vectors.shape, path.with_suffix(".faiss"))


@pytest.fixture(scope="module")
def shards(
    tmp_path_factory: pytest.TempPathFactory, vectors: Half, quantizer: bytes
) -> list[Shard]:
    """Four shards; two of them hold fewer rows than there are cells, or than hits are asked for."""
    folder = tmp_path_factory.mktemp("shards")
    return [coded_shard(folder, vectors[part], quantizer) for part in PARTS]


@pytest.fixture(scope="module")
def probes(shards: list[Shard], queries: Single) -> list[Probe]:
    return [probe(shard, queries) for shard in shards]


def assert_predicted(
    found: Probe, shards: list[Shard], vectors: Half, queries: Single, firsts: list[int]
) -> None:
    """The curve against searches at each of its settings. Where a row has the same estimate as the last
    candidate chance decides whether it is one; the curve takes it for lost.
    """
    every = queries @ vectors.astype(np.float32).T
    truth = np.argsort(-every, axis=1, kind="stable")[:, :DEPTH]
    for point in curve(found, TEXT):
        index = Index(shards, Setting(point.nprobe, point.per_hit))
        p, count = found.nprobes.index(point.nprobe), point.per_hit * DEPTH
        hits = []
        for query, rows_of_query in zip(queries, truth, strict=True):
            _, parts, rows = index.search(query, DEPTH)
            hits.append(np.isin(rows_of_query, np.asarray(firsts)[parts] + rows))
        last = found.best[p, :, min(count, found.best.shape[2]) - 1]
        at_best = (found.estimates[p] >= last[:, None]) & np.isfinite(found.estimates[p])
        deep, ten = np.mean(hits, axis=1), np.array(hits)[:, :10].mean(1)
        assert (deep <= at_best.mean(1) + 1e-9).all()
        for claimed, true, slack in (
            (point.recall_200_text, deep[:TEXT].mean(), 0.01),
            (point.recall_200_frames, deep[TEXT:].mean(), 0.01),
            (point.recall_10_text, ten[:TEXT].mean(), 0.01),
            (point.worst_text, np.sort(deep[:TEXT])[: TEXT // 20].mean(), 0.03),
        ):
            assert true - slack <= claimed <= true + 1e-4, point


@pytest.fixture(autouse=True)
def never_scanned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "SCANNED_ROWS", 0)
    monkeypatch.setattr(recall, "TIMED_QUERIES", 2)


def test_the_curve_of_a_shard_is_what_a_search_finds(
    shards: list[Shard], probes: list[Probe], vectors: Half, queries: Single
) -> None:
    assert_predicted(probes[0], shards[:1], vectors[PARTS[0]], queries, [0])


def test_the_curve_of_summed_probes_is_what_a_search_of_all_shards_finds(
    shards: list[Shard], probes: list[Probe], vectors: Half, queries: Single
) -> None:
    firsts = [part.start for part in PARTS]
    assert_predicted(reduce(add, probes), shards, vectors, queries, firsts)


def test_the_curve_rises_with_cells_and_candidates(probes: list[Probe]) -> None:
    points = {(p.nprobe, p.per_hit): p.recall_200_text for p in curve(reduce(add, probes), TEXT)}
    assert set(points) == set(itertools.product(nprobes_for(NLIST), PER_HIT))
    for (nprobe, per_hit), found in points.items():
        assert found <= points[nprobe, PER_HIT[-1]]
        assert found <= points[NLIST, per_hit] + 0.02  # more cells bring more rivals too
    assert points[NLIST, PER_HIT[-1]] > points[nprobes_for(NLIST)[0], PER_HIT[0]]


def test_probes_add_up_in_any_order(probes: list[Probe]) -> None:
    a, b, c, d = probes
    expected = (a + b) + (c + d)
    assert expected.truth.shape == (TEXT + 10, DEPTH)
    for sum_ in (a + (b + (c + d)), d + c + b + a, (c + a) + (d + b)):
        assert (sum_.truth == expected.truth).all()
        assert (sum_.best == expected.best).all()
        assert (sum_.estimates == expected.estimates).all()
        assert np.allclose(sum_.p50_ms, expected.p50_ms)
        assert [p[:-1] for p in points_of(sum_)] == [p[:-1] for p in points_of(expected)]


def points_of(found: Probe) -> list[tuple[float, ...]]:
    return [tuple(point.values()) for point in as_json(curve(found, TEXT))]


def test_a_probe_in_parts_is_a_probe_of_the_whole(
    tmp_path: Path, probes: list[Probe], vectors: Half, queries: Single, quantizer: bytes
) -> None:
    whole = probe(coded_shard(tmp_path, vectors, quantizer), queries)
    summed = reduce(add, probes)
    assert np.allclose(summed.truth, whole.truth, atol=1e-6)
    assert (summed.best == whole.best).all()
    assert [p[:-1] for p in points_of(summed)] == [p[:-1] for p in points_of(whole)]


def test_the_truth_of_a_probe_is_the_exact_answer(
    probes: list[Probe], vectors: Half, queries: Single
) -> None:
    for part, found in zip(PARTS, probes, strict=True):
        scores = -np.sort(-(queries @ vectors[part].astype(np.float32).T), axis=1)[:, :DEPTH]
        assert np.allclose(found.truth, scores, atol=1e-6)
        rows = part.stop - part.start
        assert found.estimates.shape == (len(found.nprobes), len(queries), min(DEPTH, rows))
        assert found.best.shape[2] == min(DEPTH * max(PER_HIT) + 1, rows)
        assert (np.diff(found.best.clip(-9), axis=2) <= 0).all()
        assert np.isfinite(found.estimates[-1]).all() or rows > found.best.shape[2]


def test_a_probe_goes_through_a_file_without_pickle(tmp_path: Path, probes: list[Probe]) -> None:
    np.savez(tmp_path / "probe.npz", allow_pickle=False, **probes[1].arrays())
    with np.load(tmp_path / "probe.npz", allow_pickle=False) as arrays:
        again = Probe.from_arrays(arrays)
    assert again.nprobes == probes[1].nprobes
    for name in ("truth", "estimates", "best", "p50_ms"):
        kept, stored = getattr(probes[1], name), getattr(again, name)
        assert kept.dtype == stored.dtype and np.array_equal(kept, stored)
    assert points_of(again + probes[0]) == points_of(probes[1] + probes[0])


@pytest.mark.parametrize("rows", [1, 30, 150])
def test_a_few_rows_are_all_found_where_all_cells_are_visited(
    tmp_path: Path, vectors: Half, queries: Single, quantizer: bytes, rows: int
) -> None:
    shard = coded_shard(tmp_path, vectors[:rows], quantizer)
    found = probe(shard, queries)
    points = curve(found, TEXT)
    full = [point for point in points if point.nprobe == NLIST]
    assert [p.recall_200_text for p in full] == [p.worst_text for p in full] == [1.0] * len(full)
    assert_predicted(found, [shard], vectors[:rows], queries, [0])


def test_without_frames_among_the_queries_nothing_is_said_against_them(probes: list[Probe]) -> None:
    assert {p.recall_200_frames for p in curve(probes[0], TEXT + 10)} == {1.0}


def test_a_flat_shard_cannot_be_probed(tmp_path: Path, vectors: Half, queries: Single) -> None:
    vectors[:10].tofile(tmp_path / "flat.f16")
    with pytest.raises(ValueError, match="exact"):
        probe(Shard(tmp_path / "flat.f16", 10, DIM), queries)


@given(st.integers(0, 20))
def test_numbers_of_cells_to_try_ascend_to_all_cells_or_512(power: int) -> None:
    tried = nprobes_for(2**power)
    assert list(tried) == sorted(set(tried))
    assert tried[-1] == min(2**power, 512)
    assert all(n == 2**power or 4 <= n <= 512 for n in tried)


# ── cheapest ─────────────────────────────────────────────────────────────────────────────────────


def point(nprobe: int, recall_200: float, worst: float, p50_ms: float) -> Point:
    return Point(nprobe, 5, recall_200, 1.0, worst, 1.0, p50_ms)


def test_the_fastest_of_those_that_find_enough_is_chosen() -> None:
    points = [
        point(4, 0.969, 0.95, 0.1),
        point(8, 0.99, 0.84, 0.2),
        point(16, 0.97, 0.85, 0.5),
        point(32, 0.99, 0.98, 0.4),
        point(64, 1.0, 1.0, 0.6),
    ]
    assert cheapest(points) == Setting(32, 5)
    assert cheapest(points, 0.995) == Setting(64, 5)
    assert cheapest(points, 0.9) == Setting(4, 5)
    assert cheapest([point(64, 1.0, 1.0, 0.3), point(16, 0.97, 0.85, 0.3)]) == Setting(16, 5)


shares = st.integers(0, 20).map(lambda n: n / 20)


@given(st.lists(st.tuples(shares, shares, shares), min_size=1, max_size=12), shares)
def test_no_setting_that_finds_enough_is_faster(
    found: list[tuple[float, float, float]], least: float
) -> None:
    points = [point(4 + n, *values) for n, values in enumerate(found)]
    good = [p for p in points if p.recall_200_text >= least and p.worst_text >= least - 0.12]
    if not good:
        with pytest.raises(RecallError):
            cheapest(points, least)
        return
    chosen = next(p for p in points if p.nprobe == cheapest(points, least).nprobe)
    assert chosen in good
    assert chosen.p50_ms == min(p.p50_ms for p in good)


def test_where_nothing_finds_enough_the_error_says_what_to_do() -> None:
    points = [point(4, 0.5, 0.2, 0.1), point(8, 0.9, 0.6, 0.2), point(16, 0.9, 0.7, 0.3)]
    with pytest.raises(RecallError) as caught:
        cheapest(points)
    assert caught.value.exit_code == 3
    text = str(caught.value)
    for part in ("0.900", "0.700", "0.97", "0.85", "--retrain", "--kind flat", "--min-recall"):
        assert part in text
    with pytest.raises(RecallError, match=r"worst twentieth 0\.700"):
        cheapest(points, 0.85)
