"""Transformers on the CPU with weights that oneDNN has laid out for its own kernels.

A sentence has about ten tokens. PyTorch's product of so few rows with a large matrix takes twice as long
as to read the matrix once: it lays the matrix out anew each time. Sums are added up in another order, so
results differ in the last digits of float32, as they do between one sentence and a batch.
"""

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

ROWS = 16
"""Rows of a product that a layout is chosen for; it serves any other number as well."""


def packed(module: nn.Module) -> nn.Module:
    """The same module, its linear layers and self-attention computed with packed weights; all else is
    shared. Where that cannot be, as on a GPU, a part stays as it is.
    """
    if type(module) is nn.MultiheadAttention:
        return _Attention(module) if _is_plain(module) else module
    if type(module) is nn.Linear:
        return _Linear(module.weight, module.bias) if _can_pack(module.weight) else module
    twin = copy(module)
    twin._modules = {name: child and packed(child) for name, child in module._modules.items()}
    return twin


def _can_pack(weight: Tensor) -> bool:
    known = torch.backends.mkldnn.is_available() and weight.device.type == "cpu"
    return known and weight.dtype == torch.float32


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    """Whether queries, keys and values come of one product, and nothing is added to them."""
    weight: Tensor | None = attention.in_proj_weight
    added = attention.bias_k is not None or attention.add_zero_attn
    return attention.batch_first and weight is not None and not added and _can_pack(weight)


class _Linear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias  # open_clip asks for the type of the weight
        self._packed: Any = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self.bias, "none", [], ""
        )
        return found


class _Attention(nn.Module):
    """Of a sequence to itself."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self._heads = attention.num_heads
        self._into = _Linear(attention.in_proj_weight, attention.in_proj_bias)
        self._out = _Linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        _keys: Tensor,
        _values: Tensor,
        need_weights: bool,
        attn_mask: Tensor | None,
    ) -> tuple[Tensor, None]:
        rows, tokens, width = x.shape
        parts = self._into(x).view(rows, tokens, 3, self._heads, width // self._heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(query, key, value, attn_mask)
        return self._out(seen.transpose(1, 2).reshape(rows, tokens, width)), None
