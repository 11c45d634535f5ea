import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vsearch.fusion import ALPHAS, EVEN, LATER_S, foretold, fuse, pairs, tuned

FRAMES, DIM = 600, 24


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float16]:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_a_fused_vector_is_the_unit_vector_of_both(alpha: float) -> None:
    rng = np.random.default_rng(0)
    projected, clip = unit(rng.standard_normal((50, DIM))), unit(rng.standard_normal((50, DIM)))
    fused = fuse(projected, clip, alpha)
    assert fused.dtype == np.float16
    for row, p, c in zip(fused, projected, clip, strict=True):
        total = alpha * p.astype(np.float64) + (1 - alpha) * c.astype(np.float64)
        np.testing.assert_allclose(row, total / np.sqrt((total**2).sum()), atol=1e-3)


@given(st.lists(st.floats(0, 60), max_size=40).map(sorted))
def test_a_frame_is_paired_with_the_first_one_late_enough(times: list[float]) -> None:
    now, then = pairs(np.array(times))
    expected = [
        (a, next(b for b in range(a, len(times)) if times[b] >= times[a] + LATER_S - 1e-6))
        for a in range(len(times))
        if times[-1] >= times[a] + LATER_S - 1e-6
    ]
    assert list(zip(now.tolist(), then.tolist(), strict=True)) == expected


def share(clip_noise: float, projected_noise: float, sees: float = 1.0) -> float:
    """The α for frames of which CLIP and the projector see the same, each with noise of its own that
    is another one later; the projector sees that only to a share, and something else that stays.
    """
    rng = np.random.default_rng(3)

    def some(scale: float) -> NDArray[np.float64]:
        return scale * rng.standard_normal((FRAMES, DIM))

    seen = some(1)
    ours = sees * seen + some(1 - sees)
    now, then = (
        (unit(ours + some(projected_noise)), unit(seen + some(clip_noise))) for _ in range(2)
    )
    curve = foretold(now, then, rng.standard_normal((40, DIM)).astype(np.float32))
    assert [alpha for alpha, _ in curve] == list(ALPHAS)
    return tuned(curve)


def test_of_equals_each_has_half() -> None:
    assert share(0.7, 0.7) == pytest.approx(0.5, abs=0.1)


def test_the_space_with_less_noise_has_the_larger_share() -> None:
    assert share(1.2, 0.3) >= 0.7
    assert share(0.3, 1.2) <= 0.3


def test_a_projector_that_sees_something_else_has_next_to_none() -> None:
    assert share(0.5, 0.1, sees=0.0) <= 0.2


def test_where_nothing_tells_both_count_the_same() -> None:
    assert tuned([]) == EVEN == 0.5
    rng = np.random.default_rng(0)
    alone = unit(rng.standard_normal((1, DIM))), unit(rng.standard_normal((1, DIM)))
    assert tuned(foretold(alone, alone, rng.standard_normal((9, DIM)).astype(np.float32))) == EVEN
