import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from head import free_ports
from torch import Tensor

from vsearch.projector import (
    Projector,
    cosine_loss,
    info_nce,
    paired_metrics,
    projection_loss,
)

PAIRS, DIM = 12, 16


def pairs(seed: int = 0, count: int = PAIRS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    projected = torch.randn(count, DIM, generator=generator)
    return projected, projected + torch.randn(count, DIM, generator=generator)


def numpy_losses(projected: Tensor, clip: Tensor, temperature: float) -> tuple[float, float]:
    """(cosine loss, InfoNCE) spelt out in double precision."""
    a, b = (np.asarray(t, np.float64) for t in (projected, clip))
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    similarity = a @ b.T
    own = np.exp(np.diag(similarity) / temperature)
    every = np.exp(similarity / temperature).sum(1)
    return float(1 - np.diag(similarity).mean()), float(-np.log(own / every).mean())


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_losses_are_those_of_the_formulas(temperature: float) -> None:
    projected, clip = pairs()
    cosine, nce = numpy_losses(projected, clip, temperature)
    assert cosine_loss(projected, clip).item() == pytest.approx(cosine, rel=1e-5)
    assert info_nce(projected, clip, temperature).item() == pytest.approx(nce, rel=1e-5)
    both = projection_loss(projected, clip, 0.3, temperature).item()
    assert both == pytest.approx(cosine + 0.3 * nce, rel=1e-5)


def test_losses_ignore_the_length_of_vectors() -> None:
    projected, clip = pairs()
    for loss in (cosine_loss, info_nce):
        assert torch.allclose(loss(7 * projected, 0.1 * clip), loss(projected, clip), atol=1e-5)


def test_metrics_of_a_case_by_hand() -> None:
    projected = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    clip = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    metrics = paired_metrics(projected, clip)
    assert metrics == pytest.approx({"cosine": (1 + 0.6 + 1) / 3, "recall@1": 2 / 3})


def test_a_projector_standardises_its_input() -> None:
    projector = Projector(DIM, 4, hidden=8)
    dino = 5 + 3 * torch.randn(64, DIM, generator=torch.Generator().manual_seed(0))
    mean, std = dino.mean(0), dino.std(0)
    raw = projector.net((dino - mean) / std)
    projector.standardise_by(mean, std)
    assert torch.allclose(projector(dino), raw, atol=1e-5)


def test_a_constant_dimension_does_not_explode() -> None:
    projector = Projector(2, 4, hidden=8)
    projector.standardise_by(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert torch.isfinite(projector(torch.ones(3, 2))).all()


def test_a_stored_projector_gives_the_same_vectors() -> None:
    projector = Projector(DIM, 4, hidden=8)
    projector.standardise_by(torch.arange(DIM, dtype=torch.float32), torch.full((DIM,), 2.0))
    weights, sizes = projector.to_bytes()
    assert json.loads(sizes) == {"in_dim": DIM, "out_dim": 4, "hidden": 8}
    loaded = Projector.from_bytes(weights, sizes)
    dino, _ = pairs()
    assert torch.equal(loaded(dino), projector(dino))
    assert not loaded.training


# ── two ranks ────────────────────────────────────────────────────────────────────────────────────


def gradients(loss: Callable[[Tensor, Tensor], Tensor], projected: Tensor, clip: Tensor) -> Tensor:
    """The value, then the gradients to both inputs, in one flat tensor."""
    projected, clip = projected.clone().requires_grad_(), clip.clone().requires_grad_()
    value = loss(projected, clip)
    value.backward()
    return torch.cat([value.detach()[None], projected.grad.flatten(), clip.grad.flatten()])


def rank_main(rank: int, port: int, results: mp.SimpleQueue) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    projected, clip = pairs()
    first = rank * PAIRS // 2
    half = slice(first, first + PAIRS // 2)
    part = gradients(info_nce, projected[half], clip[half])
    both = gradients(lambda p, c: projection_loss(p, c, 0.5, 0.07), projected[half], clip[half])
    results.put((rank, part.tolist(), both.tolist()))
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_have_the_gradient_of_one_process() -> None:
    (port,) = free_ports(1)
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(rank_main, args=(port, results), nprocs=2)
    by_rank = sorted(results.get() for _ in range(2))

    whole = (info_nce, lambda p, c: projection_loss(p, c, 0.5, 0.07))
    for kind, loss in enumerate(whole, 1):
        values, ours = [], {"projected": [], "clip": []}
        for found in by_rank:
            flat = torch.tensor(found[kind])
            values.append(flat[0])
            projected, clip = flat[1:].view(2, PAIRS // 2, DIM) / len(by_rank)
            ours["projected"].append(projected)
            ours["clip"].append(clip)
        single = gradients(loss, *pairs())
        expected = single[1:].view(2, PAIRS, DIM)
        assert torch.allclose(torch.stack(values).mean(), single[0], atol=1e-5)
        assert torch.allclose(torch.cat(ours["projected"]), expected[0], atol=1e-5)
        assert torch.allclose(torch.cat(ours["clip"]), expected[1], atol=1e-5)
        assert expected.abs().amax(dim=(1, 2)).min() > 1e-2
