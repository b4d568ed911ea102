"""Derivations by other means, which claims compare with: nothing here calls the operators that it checks."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cut_windows", "dense_attention", "moving_photo", "random_inputs"]


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


def moving_photo() -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a photo that moves by 4 pixels a frame, (1, 4, 8, 16, 16, 32): 8 frames of 16 x 16
    patches under random projections, to similar queries and keys."""
    from sklearn.datasets import load_sample_image

    photo = torch.from_numpy(load_sample_image("china.jpg").copy()).double().movedim(-1, 0) / 255
    frames = torch.stack([photo[:, 100:228, 100 + 4 * t : 228 + 4 * t] for t in range(8)])
    patches = frames.unflatten(3, (16, 8)).unflatten(2, (16, 8)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    patches = F.layer_norm(patches, patches.shape[-1:])
    channels = patches.shape[-1]
    to_query = torch.randn(channels, 128, dtype=torch.float64) / channels**0.5
    to_key = to_query + 0.5 * torch.randn(channels, 128, dtype=torch.float64) / channels**0.5
    to_value = torch.randn(channels, 128, dtype=torch.float64) / channels**0.5
    query, key, value = (
        (patches @ matrix).unflatten(-1, (4, 32)).movedim(-2, 0).unsqueeze(0) for matrix in (to_query, to_key, to_value)
    )
    return query, key, value
