from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from vsearch.index import (
    DamagedIndexError,
    IvfPq,
    Shard,
    exact_search,
    fill,
    sha256,
    train_quantizer,
)

DIM = 64


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def clustered(rows: int, centres: int, seed: int = 0) -> NDArray[np.float16]:
    """Unit vectors around random centres, as the frames of shots are."""
    rng = np.random.default_rng(seed)
    middle = unit(rng.standard_normal((centres, DIM)))
    spread = 0.6 * unit(rng.standard_normal((rows, DIM)))
    return unit(middle[rng.integers(centres, size=rows)] + spread).astype(np.float16)


def queries_near(vectors: NDArray[np.float16], count: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(1)
    chosen = vectors[rng.choice(len(vectors), count, replace=False)].astype(np.float32)
    return unit(chosen + 0.3 * unit(rng.standard_normal(chosen.shape)))


def flat_shard(folder: Path, vectors: NDArray[np.float16]) -> Shard:
    path = folder / "vectors.f16"
    vectors.tofile(path)
    return Shard(path, *vectors.shape, ivf=None, nprobe=1)


@pytest.fixture(scope="module")
def large() -> NDArray[np.float16]:
    return clustered(20_000, centres=200)


@pytest.fixture(scope="module")
def quantizer(large: NDArray[np.float16]) -> tuple[IvfPq, NDArray[np.uint8]]:
    shape = IvfPq.for_rows(len(large))
    return shape, train_quantizer(large[::2].astype(np.float32), shape)


@pytest.fixture(scope="module")
def ivf_shard(
    tmp_path_factory: pytest.TempPathFactory,
    large: NDArray[np.float16],
    quantizer: tuple[IvfPq, NDArray[np.uint8]],
) -> Shard:
    folder = tmp_path_factory.mktemp("shard")
    shape, trained = quantizer
    large.tofile(folder / "vectors.f16")
    (folder / "shard.faiss").write_bytes(fill(trained, large, batch=7000))
    return Shard(
        folder / "vectors.f16", *large.shape, ivf=folder / "shard.faiss", nprobe=shape.nprobe
    )


def test_the_oracle_is_right_on_a_case_by_hand() -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8], [-1, 0]], np.float16)
    scores, rows = exact_search(vectors, np.array([[1, 0], [0, -1]], np.float32), 2)
    assert rows.tolist() == [[0, 2], [0, 3]]
    assert np.allclose(scores, [[1, 0.6], [0, 0]], atol=1e-3)


def test_a_flat_shard_answers_as_the_oracle(tmp_path: Path) -> None:
    vectors = clustered(500, centres=20)
    shard = flat_shard(tmp_path, vectors)
    queries = queries_near(vectors, 20)
    oracle_scores, oracle_rows = exact_search(vectors, queries, 10)
    for query, expected_scores, expected_rows in zip(
        queries, oracle_scores, oracle_rows, strict=True
    ):
        scores, rows = shard.search(query, 10)
        assert np.allclose(scores, expected_scores, atol=1e-5)
        assert rows.tolist() == expected_rows.tolist()


def test_more_hits_than_rows_gives_every_row_once(tmp_path: Path) -> None:
    vectors = clustered(7, centres=7)
    scores, rows = flat_shard(tmp_path, vectors).search(vectors[3].astype(np.float32), 50)
    assert sorted(rows) == list(range(7))
    assert rows[0] == 3
    assert list(scores) == sorted(scores, reverse=True)


def test_ivfpq_finds_nearly_all_and_scores_them_exactly(
    ivf_shard: Shard, large: NDArray[np.float16]
) -> None:
    queries = queries_near(large, 100)
    _, oracle_rows = exact_search(large, queries, 10)
    found = 0
    for query, expected in zip(queries, oracle_rows, strict=True):
        scores, rows = ivf_shard.search(query, 10)
        assert len(set(rows)) == 10
        assert np.allclose(scores, large[rows].astype(np.float32) @ query, atol=1e-6)
        assert list(scores) == sorted(scores, reverse=True)
        found += len(set(rows) & set(expected))
    assert found / oracle_rows.size >= 0.95


def test_scores_of_a_stretch_are_those_of_its_rows(
    ivf_shard: Shard, large: NDArray[np.float16]
) -> None:
    query = queries_near(large, 1)[0]
    expected = large[100:140].astype(np.float32) @ query
    assert np.allclose(ivf_shard.scores(query, 100, 140), expected, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 38, 77, 78, 1000, 20_000, 10**6, 10**9])
def test_the_shape_leaves_faiss_enough_rows_a_cell(rows: int) -> None:
    shape = IvfPq.for_rows(rows)
    assert shape.nlist == 1 or rows >= 39 * shape.nlist
    assert shape.nlist & (shape.nlist - 1) == 0
    assert 1 <= shape.nprobe <= min(shape.nlist, 256)
    if rows >= 10**5:
        assert 2**-0.5 <= shape.nlist / (4 * rows**0.5) <= 2**0.5


@pytest.mark.parametrize("change", [-2, 2])
def test_vectors_of_another_size_are_refused(tmp_path: Path, change: int) -> None:
    vectors = clustered(10, centres=2)
    data = vectors.tobytes()
    path = tmp_path / "vectors.f16"
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(DamagedIndexError, match=r"vectors\.f16 does not hold 10 vectors"):
        Shard(path, 10, DIM, ivf=None, nprobe=1)


def test_a_faiss_file_of_other_rows_is_refused(
    tmp_path: Path, large: NDArray[np.float16], quantizer: tuple[IvfPq, NDArray[np.uint8]]
) -> None:
    large.tofile(tmp_path / "vectors.f16")
    (tmp_path / "shard.faiss").write_bytes(fill(quantizer[1], large[:-1]))
    with pytest.raises(DamagedIndexError, match=r"shard\.faiss does not hold"):
        Shard(tmp_path / "vectors.f16", *large.shape, ivf=tmp_path / "shard.faiss", nprobe=8)


def test_sha256_is_the_known_one(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "abc") == known
