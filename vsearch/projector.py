"""The projector from DINO's space to CLIP's: the article's MLP, its losses, its metrics.

Shapes: b = pairs of this rank, g = pairs of all ranks, d = DINO's width, c = CLIP's.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor, nn

from vsearch.corpus import Corpus


class Projector(nn.Module):
    """Linear d → hidden, GELU, Linear hidden → c, on DINO vectors standardised by the mean and
    deviation of the training frames (kept with the weights).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, in_dim: int, out_dim: int, hidden: int = 2048) -> None:
        super().__init__()
        self.sizes = {"in_dim": in_dim, "out_dim": out_dim, "hidden": hidden}
        self.register_buffer("mean", torch.zeros(in_dim))
        self.register_buffer("std", torch.ones(in_dim))
        self.net = nn.Sequential(nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, out_dim))

    def standardise_by(self, mean: Tensor, std: Tensor) -> None:
        """Sets the statistics of the input, each (d,)."""
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=1e-4))

    def forward(self, dino: Tensor) -> Tensor:
        """(b, d) → (b, c), not normalised."""
        out: Tensor = self.net((dino - self.mean) / self.std)
        return out

    def to_bytes(self) -> tuple[bytes, bytes]:
        """(safetensors, JSON of the sizes)."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
        return save(tensors), (json.dumps(self.sizes) + "\n").encode()

    @classmethod
    def from_bytes(cls, weights: bytes, sizes: bytes) -> "Projector":
        known: dict[str, Any] = json.loads(sizes)
        projector = cls(known["in_dim"], known["out_dim"], known["hidden"])
        projector.load_state_dict(load(weights))
        return projector.eval()


def cosine_loss(projected: Tensor, clip: Tensor) -> Tensor:
    """1 − cosine, mean over pairs; both (b, c)."""
    return 1 - F.cosine_similarity(projected, clip, dim=-1).mean()


def info_nce(projected: Tensor, clip: Tensor, temperature: float = 0.07) -> Tensor:
    """InfoNCE (van den Oord et al. 2018, arXiv:1807.03748): each projected vector (b, c) must find
    its own CLIP vector among those of all ranks (g, c). The gather passes gradients back, so the
    mean over ranks of this loss has the gradient of one process that holds all pairs.
    """
    queries, keys = F.normalize(projected, dim=-1), F.normalize(clip, dim=-1)
    first = 0
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        first = dist.get_rank() * len(keys)
        keys = torch.cat(dist_nn.all_gather(keys))
    logits = queries @ keys.T / temperature
    return F.cross_entropy(logits, torch.arange(len(queries), device=logits.device) + first)


def projection_loss(
    projected: Tensor, clip: Tensor, info_nce_weight: float, temperature: float
) -> Tensor:
    """The article's loss: cosine + λ · InfoNCE."""
    return cosine_loss(projected, clip) + info_nce_weight * info_nce(projected, clip, temperature)


@torch.inference_mode()
def paired_metrics(projected: Tensor, clip: Tensor) -> dict[str, float]:
    """Of (n, c) pairs: `cosine`, the mean of each with its own, and `recall@1`, how often its own
    CLIP vector is the nearest of all n.
    """
    queries, keys = F.normalize(projected, dim=-1), F.normalize(clip, dim=-1)
    nearest = torch.cat([(part @ keys.T).argmax(1) for part in queries.split(4096)])
    own = torch.arange(len(queries), device=queries.device)
    return {
        "cosine": float((queries * keys).sum(-1).mean()),
        "recall@1": float((nearest == own).float().mean()),
    }


def load_projector(corpus: Corpus, version: str) -> Projector:
    """A projector of the corpus, on the CPU."""
    folder = f"projector/{version}"
    weights = corpus.read(f"{folder}/model.safetensors")
    return Projector.from_bytes(weights, corpus.read(f"{folder}/config.json"))


def projection(
    corpus: Corpus, version: str
) -> tuple[str, Callable[[NDArray[np.float16]], NDArray[np.float16]]]:
    """(column of the frames, function of its vectors (n, d)) that give unit vectors float16 (n, c) of
    CLIP's space, by a projector of the corpus, on a GPU where this process has one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_projector(corpus, version).to(device)

    @torch.inference_mode()
    def project(vectors: NDArray[np.float16]) -> NDArray[np.float16]:
        dino = torch.from_numpy(vectors).to(device).float()
        projected: NDArray[np.float16] = F.normalize(model(dino), dim=-1).half().cpu().numpy()
        return projected

    return "dino", project


def untrained(projector: Projector, seed: int) -> Projector:
    """A projector as it was before its training: the same form and statistics of the input, and fresh
    weights.
    """
    fresh = Projector(**projector.sizes)
    fresh.load_state_dict(projector.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in fresh.net.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return fresh.eval()
