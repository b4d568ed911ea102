"""Derivations by other means, which claims compare with: nothing here calls the operators that it checks."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cut_windows", "dense_attention", "random_inputs"]


def random_inputs(*space: int, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, (2, 3, *space, 8) in float64, with or without gradient."""
    query, key, value = torch.randn(3, 2, 3, *space, 8, dtype=torch.float64)
    return query.requires_grad_(grad), key.requires_grad_(grad), value.requires_grad_(grad)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Torch's attention over all tokens of (B, heads, *space, D), or over those that `mask` (N, M) shows."""
    q, k, v = (x.flatten(2, -2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).unflatten(2, query.shape[2:-1])


def cut_windows(x: Tensor, size: int) -> Tensor:
    """(B, heads, H, W, D) to (B, heads, windows, size * size, D)."""
    return x.unflatten(3, (-1, size)).unflatten(2, (-1, size)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
