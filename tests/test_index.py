from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vsearch import index as index_module
from vsearch.config import DamagedIndexError
from vsearch.index import (
    Index,
    Shard,
    best_of,
    encode,
    exact_search,
    fit,
    imbalance,
    train_quantizer,
)
from vsearch.sizing import Setting, cells_for
from vsearch.storage import sha256

DIM, ROWS, NLIST = 64, 60_000, 128
SETTING = Setting(nprobe=32, per_hit=10)

Half = NDArray[np.float16]
Single = NDArray[np.float32]
Mask = NDArray[np.bool_]


def unit(vectors: NDArray[np.floating]) -> Single:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def near(middles: NDArray[np.floating], spread: float, seed: int) -> Single:
    """A unit vector near each of the middles."""
    noise = np.random.default_rng(seed).standard_normal(middles.shape)
    return unit(middles + spread * unit(noise))


def clustered(rows: int, centres: int, dim: int = DIM) -> Half:
    """Unit vectors around random centres, as the frames of shots are. The centres lie on two sides, as
    days and nights do: the first half of the rows is on the one.
    """
    rng = np.random.default_rng(0)
    side = np.repeat([1, -1], centres // 2)[:, None] * unit(rng.standard_normal(dim))
    middles = unit(0.6 * side + unit(rng.standard_normal((centres // 2 * 2, dim))))
    place = np.sort(rng.integers(len(middles), size=rows))
    return near(middles[place], 0.6, seed=1).astype(np.float16)


def best_rows(vectors: Half, query: Single, k: int, allowed: Mask | None = None) -> list[int]:
    """The oracle of this file: the rows of the k highest scores."""
    scores = vectors.astype(np.float32) @ query
    if allowed is not None:
        scores[~allowed] = -np.inf
    order = np.argsort(-scores, kind="stable")[:k]
    return [int(row) for row in order if np.isfinite(scores[row])]


def flat_shard(folder: Path, vectors: Half) -> Shard:
    path = folder / f"{len(list(folder.iterdir()))}.f16"
    vectors.tofile(path)
    return Shard(path, *vectors.shape)


def coded_shard(folder: Path, vectors: Half, quantizer: bytes) -> Shard:
    path = folder / f"{len(list(folder.iterdir()))}.f16"
    vectors.tofile(path)
    encode(quantizer, vectors, path.with_suffix(".faiss"))
    return Shard(path, *vectors.shape, path.with_suffix(".faiss"))


@pytest.fixture(scope="module")
def vectors() -> Half:
    return clustered(ROWS, centres=600)


@pytest.fixture(scope="module")
def queries(vectors: Half) -> Single:
    chosen = np.random.default_rng(2).choice(ROWS, 40, replace=False)
    return near(vectors[chosen].astype(np.float32), 0.6, seed=3)


@pytest.fixture(scope="module")
def quantizer(vectors: Half) -> bytes:
    return train_quantizer(vectors[::10].astype(np.float32), NLIST)


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory, vectors: Half, quantizer: bytes) -> Shard:
    return coded_shard(tmp_path_factory.mktemp("coded"), vectors, quantizer)


@pytest.fixture(scope="module")
def in_eight(
    tmp_path_factory: pytest.TempPathFactory, vectors: Half, quantizer: bytes
) -> list[Shard]:
    """The same rows in eight shards of different sizes."""
    folder = tmp_path_factory.mktemp("eight")
    return [coded_shard(folder, vectors[a:b], quantizer) for a, b in pairwise(EDGES)]


EDGES = [0, 5, 100, 7_000, 20_000, 20_001, 33_333, 50_000, ROWS]


def in_parts(values: NDArray[np.bool_]) -> list[Mask]:
    return [values[a:b] for a, b in pairwise(EDGES)]


def searched(
    index: Index, query: Single, k: int, allowed: Sequence[Mask] | None = None
) -> tuple[Single, list[int]]:
    """(scores, rows), these as numbers of the whole."""
    scores, shards, rows = index.search(query, k, allowed)
    firsts = np.cumsum([0, *(shard.rows for shard in index.shards)])
    return scores, (firsts[shards] + rows).tolist()


def recall(index: Index, vectors: Half, queries: Single, k: int, allowed: Mask | None) -> float:
    """Mean share of the true hits that are found; what must hold of any answer is asserted."""
    shares = []
    for query in queries:
        masks = None if allowed is None else [allowed]
        scores, rows = searched(index, query, k, masks)
        assert len(set(rows)) == len(rows) <= k
        assert allowed is None or allowed[rows].all()
        assert np.allclose(scores, vectors[rows].astype(np.float32) @ query, atol=1e-6)
        assert (np.diff(scores) <= 0).all()
        expected = best_rows(vectors, query, k, allowed)
        shares.append(len(set(rows) & set(expected)) / len(expected) if expected else 1.0)
    return float(np.mean(shares))


# ── exact ────────────────────────────────────────────────────────────────────────────────────────


def test_exact_search_is_right_on_a_case_by_hand() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [-1, 0]], np.float16)
    scores, rows = exact_search(vectors, np.array([[1, 0], [0, -1]], np.float32), 2)
    assert rows.tolist() == [[0, 2], [0, 3]]
    assert np.allclose(scores, [[1, 0.6], [0, 0]], atol=1e-3)


small = st.lists(st.lists(st.integers(-2, 2), min_size=2, max_size=2), min_size=1, max_size=40)


@given(small, small, st.integers(1, 50), st.integers(1, 50))
def test_exact_search_in_batches_finds_the_first_of_the_best(
    rows: list[list[int]], asked: list[list[int]], k: int, batch: int
) -> None:
    """Small integers make many ties, and exact scores whatever the shapes."""
    vectors, queries = np.array(rows, np.float16), np.array(asked, np.float32)
    scores, found = exact_search(vectors, queries, k, batch)
    expected = [best_rows(vectors, query, k) for query in queries]
    assert found.tolist() == expected
    assert (scores == np.take_along_axis(queries @ vectors.T.astype(np.float32), found, 1)).all()


@pytest.mark.parametrize("batch", [700, 3000])
def test_among_many_equals_the_first_are_found(batch: int) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.integers(-2, 3, (3000, 2)).astype(np.float16)
    queries = rng.integers(-2, 3, (9, 2)).astype(np.float32)
    _, found = exact_search(vectors, queries, 200, batch)
    assert found.tolist() == [best_rows(vectors, query, 200) for query in queries]


def test_of_many_hits_the_sure_ones_are_found_as_if_only_they_were_asked_for(
    coded: Shard, vectors: Half, queries: Single
) -> None:
    index = Index([coded], SETTING)
    for query in queries:
        best = set(best_rows(vectors, query, 100))
        few = set(index.search(query, 100)[2].tolist())
        scores, _, rows = index.search(query, 400, sure=100)
        assert len(rows) == 400 and np.allclose(scores, vectors[rows] @ query, atol=1e-3)
        assert len(best & set(rows[:100].tolist())) >= len(best & few)
        some = index.search(query, 400)[2]  # of those behind them fewer
        truth = set(best_rows(vectors, query, 400))
        assert len(truth & set(rows.tolist())) <= len(truth & set(some.tolist()))


def test_exact_search_of_no_vectors_finds_nothing() -> None:
    scores, rows = exact_search(np.zeros((0, 4), np.float16), np.ones((3, 4), np.float32), 5)
    assert scores.shape == rows.shape == (3, 0)


@given(st.lists(st.integers(0, 6), max_size=60), st.integers(1, 70))
def test_the_best_are_the_first_of_a_stable_sort(values: list[int], k: int) -> None:
    scores, rows = best_of(np.array(values, np.float32), np.arange(len(values)) * 3, k)
    order = sorted(range(len(values)), key=lambda place: -values[place])[:k]
    assert rows.tolist() == [3 * place for place in order]
    assert scores.tolist() == [values[place] for place in order]


def test_a_flat_shard_answers_as_the_oracle(tmp_path: Path, vectors: Half, queries: Single) -> None:
    shard = flat_shard(tmp_path, vectors[::20])
    assert shard.flat and shard.nlist == 0
    assert recall(Index([shard]), vectors[::20], queries, 10, None) == 1
    assert recall(Index([shard]), vectors[::20], queries, 200, None) == 1


@pytest.mark.parametrize("scanned", [0, 20_000])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.01, 0.0005, 0.0])
def test_a_filtered_flat_shard_answers_as_the_masked_oracle(
    tmp_path: Path,
    vectors: Half,
    queries: Single,
    share: float,
    scanned: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index_module, "SCANNED_ROWS", scanned)
    some = vectors[::20]
    allowed = np.random.default_rng(4).random(len(some)) < share
    assert recall(Index([flat_shard(tmp_path, some)]), some, queries[:5], 50, allowed) == 1


def test_more_hits_than_rows_gives_every_row_once(tmp_path: Path, vectors: Half) -> None:
    shard = flat_shard(tmp_path, vectors[:7])
    scores, rows = searched(Index([shard]), vectors[3].astype(np.float32), 50)
    assert sorted(rows) == list(range(7))
    assert rows[0] == 3
    assert list(scores) == sorted(scores, reverse=True)


def test_scores_of_rows_are_those_of_their_vectors(
    coded: Shard, vectors: Half, queries: Single
) -> None:
    query, every = queries[0], vectors.astype(np.float32) @ queries[0]
    assert np.allclose(coded.scores(query, 100, 140), every[100:140], atol=1e-6)
    rows = np.array([59_999, 3, 3, 0, 777])
    assert np.allclose(coded.score(query, rows, batch=2), every[rows], atol=1e-6)
    assert coded.score(query, rows[:0]).shape == (0,)


# ── codes ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("k", "least"), [(10, 0.97), (200, 0.95)])
def test_codes_find_nearly_all_and_scores_are_exact(
    coded: Shard, vectors: Half, queries: Single, k: int, least: float
) -> None:
    assert recall(Index([coded], SETTING), vectors, queries, k, None) >= least


def test_where_every_cell_is_visited_and_every_row_scored_nothing_is_missed(
    coded: Shard, vectors: Half, queries: Single
) -> None:
    everything = Index([coded], Setting(nprobe=10 * NLIST, per_hit=ROWS))
    assert recall(everything, vectors, queries[:3], 200, None) == 1


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("k", [1, 10, 200])
def test_eight_shards_answer_as_one(
    coded: Shard, in_eight: list[Shard], queries: Single, k: int, filtered: bool
) -> None:
    allowed = np.random.default_rng(5).random(ROWS) < 0.5
    one, eight = Index([coded], SETTING), Index(in_eight, SETTING)
    for query in queries:
        expected_scores, expected = searched(one, query, k, [allowed] if filtered else None)
        scores, rows = searched(eight, query, k, in_parts(allowed) if filtered else None)
        assert np.allclose(scores, expected_scores, atol=1e-6)
        assert rows == expected


@pytest.mark.parametrize("k", [10, 200])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("scanned", [0, 20_000])
def test_what_a_filter_leaves_is_found(
    coded: Shard,
    vectors: Half,
    queries: Single,
    k: int,
    share: float,
    scanned: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index_module, "SCANNED_ROWS", scanned)
    allowed = np.random.default_rng(6).random(ROWS) < share
    found = recall(Index([coded], SETTING), vectors, queries[:20], k, allowed)
    assert found >= (0.95 if allowed.sum() > scanned else 1)


@pytest.mark.parametrize("k", [10, 200])
def test_what_a_filter_leaves_far_from_the_query_is_found(
    coded: Shard, vectors: Half, k: int
) -> None:
    """By day or by camera, what a filter leaves may all lie in other cells than those near the query."""
    allowed = np.arange(ROWS) >= ROWS // 2
    others = near(vectors[: ROWS // 2 : 1500].astype(np.float32), 0.6, seed=7)
    assert recall(Index([coded], SETTING), vectors, others, k, allowed) >= 0.8


@pytest.mark.parametrize("scanned", [0, 20_000])
@pytest.mark.parametrize("left", [0, 1, 3])
def test_a_filter_that_leaves_a_few_rows_gives_just_these(
    coded: Shard,
    in_eight: list[Shard],
    queries: Single,
    left: int,
    scanned: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index_module, "SCANNED_ROWS", scanned)
    allowed = np.zeros(ROWS, bool)
    allowed[[2, 41_000, 59_999][:left]] = True
    for query in queries[:5]:
        for k in (1, 2, 500):
            _, rows = searched(Index([coded], SETTING), query, k, [allowed])
            assert len(rows) == min(k, left) and allowed[rows].all()
            assert searched(Index(in_eight, SETTING), query, k, in_parts(allowed))[1] == rows


@pytest.mark.parametrize("filtered", [False, True])
def test_flat_and_coded_shards_are_searched_as_one(
    tmp_path: Path,
    in_eight: list[Shard],
    vectors: Half,
    queries: Single,
    filtered: bool,
) -> None:
    mixed = [
        flat_shard(tmp_path, vectors[a:b]) if place in (1, 3, 7) else shard
        for place, (shard, (a, b)) in enumerate(zip(in_eight, pairwise(EDGES), strict=True))
    ]
    allowed = np.random.default_rng(8).random(ROWS) < 0.7
    found = 0
    for query in queries:
        masks = in_parts(allowed) if filtered else None
        scores, rows = searched(Index(mixed, SETTING), query, 100, masks)
        assert np.allclose(scores, vectors[rows].astype(np.float32) @ query, atol=1e-6)
        assert (np.diff(scores) <= 0).all()
        assert not filtered or allowed[rows].all()
        expected = best_rows(vectors, query, 100, allowed if filtered else None)
        in_flat = {row for row in expected if 5 <= row < 100 or 7_000 <= row < 20_000 or row >= 5e4}
        assert in_flat <= set(rows)
        found += len(set(rows) & set(expected))
    assert found >= 0.95 * 100 * len(queries)


def test_a_filter_on_flat_shards_does_not_hide_what_it_leaves_of_the_coded(
    tmp_path: Path, coded: Shard, vectors: Half, queries: Single
) -> None:
    """Many rows left in a flat shard say nothing of how many are left in the coded ones."""
    flat = flat_shard(tmp_path, vectors[:30_000])
    allowed = np.random.default_rng(9).random(ROWS) < 0.002
    index = Index([flat, coded], SETTING)
    for query in queries[:10]:
        _, shards, rows = index.search(query, ROWS, [np.ones(30_000, bool), allowed])
        assert set(rows[shards == 1]) == set(np.flatnonzero(allowed))


def test_no_rows_at_all_are_found_in_an_index_that_leaves_none(
    tmp_path: Path, vectors: Half, queries: Single
) -> None:
    shards = [flat_shard(tmp_path, vectors[:10]), flat_shard(tmp_path, vectors[10:30])]
    nothing = [np.zeros(10, bool), np.zeros(20, bool)]
    assert [len(part) for part in Index(shards).search(queries[0], 5, nothing)] == [0, 0, 0]


# ── quantizer ────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(0, 10**10))
def test_cells_are_a_power_of_two_and_leave_faiss_enough_rows(rows: int) -> None:
    nlist = cells_for(rows)
    assert nlist >= 1 and nlist & (nlist - 1) == 0
    assert nlist == 1 or rows >= 39 * nlist
    assert cells_for(rows + 1) >= nlist
    if rows >= 10**5:
        assert 0.707 <= nlist / (2 * rows**0.5) <= 1.415


def centroids(quantizer: bytes) -> Single:
    index = faiss.deserialize_index(np.frombuffer(quantizer, np.uint8))
    return index.quantizer.reconstruct_n(0, index.nlist)


def test_a_quantizer_has_unit_centroids_and_no_rows(quantizer: bytes) -> None:
    assert centroids(quantizer).shape == (NLIST, DIM)
    assert np.allclose(np.linalg.norm(centroids(quantizer), axis=1), 1, atol=1e-5)
    assert faiss.deserialize_index(np.frombuffer(quantizer, np.uint8)).ntotal == 0


def test_encode_and_fit_tell_the_cells_as_numpy_does(
    tmp_path: Path, quantizer: bytes, vectors: Half, coded: Shard
) -> None:
    cosines = vectors[:5000].astype(np.float32) @ centroids(quantizer).T
    mean, filled = fit(quantizer, vectors[:5000])
    assert np.isclose(mean, cosines.max(1).mean(), atol=1e-5)
    assert filled.tolist() == np.bincount(cosines.argmax(1), minlength=NLIST).tolist()
    encoded_mean, encoded_filled = encode(quantizer, vectors[:5000], tmp_path / "codes")
    assert (encoded_mean, encoded_filled.tolist()) == (mean, filled.tolist())
    rows = coded.rows_in(np.array([3, 77]))
    assert sorted(rows[rows < 5000]) == np.flatnonzero(np.isin(cosines.argmax(1), [3, 77])).tolist()
    assert coded.rows_in(np.zeros(0, np.int64)).tolist() == []


def test_a_shard_of_more_rows_than_a_batch_is_encoded_whole(
    tmp_path: Path, quantizer: bytes, vectors: Half
) -> None:
    twice = np.concatenate([vectors, vectors[:10_000]])
    mean, filled = encode(quantizer, twice, tmp_path / "codes")
    assert filled.sum() == len(twice) > 65_536
    assert np.isclose(
        mean, (twice.astype(np.float32) @ centroids(quantizer).T).max(1).mean(), atol=1e-5
    )
    assert faiss.read_index(str(tmp_path / "codes")).ntotal == len(twice)


def test_no_vectors_fit_without_a_division_by_nothing(quantizer: bytes) -> None:
    mean, filled = fit(quantizer, np.zeros((0, DIM), np.float16))
    assert mean == 0 and filled.tolist() == [0] * NLIST


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50))
def test_imbalance_is_the_mean_of_squares_over_the_square_of_the_mean(filled: list[int]) -> None:
    found = imbalance(np.array(filled))
    if not any(filled):
        assert found == 0
        return
    mean = sum(filled) / len(filled)
    assert np.isclose(found, sum(n * n for n in filled) / len(filled) / mean**2)
    assert 1 - 1e-9 <= found <= len(filled) + 1e-9
    assert np.isclose(imbalance(np.full(len(filled), 7)), 1)


# ── files ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("change", [-2, 2])
def test_vectors_of_another_size_are_refused(tmp_path: Path, vectors: Half, change: int) -> None:
    data = vectors[:10].tobytes()
    path = tmp_path / "vectors.f16"
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(DamagedIndexError, match=r"vectors\.f16 does not hold 10 vectors"):
        Shard(path, 10, DIM)


def test_codes_of_other_rows_are_refused(tmp_path: Path, vectors: Half, quantizer: bytes) -> None:
    vectors[:100].tofile(tmp_path / "vectors.f16")
    encode(quantizer, vectors[:99], tmp_path / "shard.faiss")
    with pytest.raises(DamagedIndexError, match=r"shard\.faiss does not hold .* 100 rows"):
        Shard(tmp_path / "vectors.f16", 100, DIM, tmp_path / "shard.faiss")


def test_codes_of_another_dimension_are_refused(
    tmp_path: Path, vectors: Half, quantizer: bytes
) -> None:
    np.zeros((100, 2 * DIM), np.float16).tofile(tmp_path / "vectors.f16")
    encode(quantizer, vectors[:100], tmp_path / "shard.faiss")
    with pytest.raises(DamagedIndexError, match=r"shard\.faiss does not hold"):
        Shard(tmp_path / "vectors.f16", 100, 2 * DIM, tmp_path / "shard.faiss")


def test_an_index_of_another_kind_is_refused(tmp_path: Path, vectors: Half) -> None:
    vectors[:100].tofile(tmp_path / "vectors.f16")
    flat = faiss.IndexFlatIP(DIM)
    flat.add(vectors[:100].astype(np.float32))
    faiss.write_index(flat, str(tmp_path / "shard.faiss"))
    with pytest.raises(DamagedIndexError, match=r"shard\.faiss does not hold"):
        Shard(tmp_path / "vectors.f16", 100, DIM, tmp_path / "shard.faiss")


@pytest.mark.parametrize("damage", ["empty", "cut off", "not FAISS"])
def test_a_file_that_faiss_cannot_read_is_refused_by_its_name(
    tmp_path: Path, vectors: Half, quantizer: bytes, damage: str
) -> None:
    vectors[:100].tofile(tmp_path / "vectors.f16")
    path = tmp_path / "shard.faiss"
    encode(quantizer, vectors[:100], path)
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "cut off": data[: len(data) // 2]}.get(damage, b"?" * 5000))
    with pytest.raises(DamagedIndexError, match=r"shard\.faiss"):
        Shard(tmp_path / "vectors.f16", 100, DIM, path)


def test_sha256_is_the_known_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "abc") == known
