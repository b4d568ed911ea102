"""Strip attention (S2AFormer, 2025, arXiv:2505.22195): narrow queries and keys, and few keys.

The strips are of channels: a head's queries are N x 1. For strips of space, see `saccade.ops.Window`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError, check_choice
from saccade.mixers.mixer import Mixer, choose_heads, merge_heads, split_heads
from saccade.ops import softmax_attention
from saccade.ops.check import check_positive
from saccade.ops.softmax_attention import attention_weights

__all__ = ["StripAttention"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
POOLS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


class StripAttention(Mixer):
    """Softmax attention with one channel a head in queries and keys, over a reduced map (S2AFormer, 2025,
    arXiv:2505.22195).

    Values keep their width. The token matrix shares the weight of a cell of the reduced map evenly among its tokens.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels.
        qk_dim: channels of query and key in each head. 1 makes the strip; C / num_heads is ordinary attention.
        sr_ratio: r, tokens of a cell along each axis; keys and values come from a map of one token a cell, queries from
            the whole one. 1 leaves the reduction out. Pyramids take 8, 4, 2 and 1 from their first stage to the last.
        reduction: how a cell becomes a token. "conv": a convolution of stride r and a norm; a cell that reaches over
            the end of the map has zeros there. "mean": the mean of its tokens, without parameters.
        axes: axes of space, which the convolution needs to know; 2 for images.
        qkv_bias: give the projections to query, key and value a bias.
        scale: factor of q.k; None takes qk_dim^-0.5.
        impl: as in `softmax_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        qk_dim: int = 1,
        sr_ratio: int = 2,
        reduction: str = "conv",
        axes: int = 2,
        qkv_bias: bool = True,
        scale: float | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        check_positive(qk_dim=qk_dim, sr_ratio=sr_ratio)
        check_choice("reduction", reduction, ("conv", "mean"))
        if axes not in (1, 2, 3):
            raise InputError(f"axes is {axes}: give 1, 2 or 3 axes of space")
        self.num_heads = choose_heads(dim, num_heads)
        self.sr_ratio = sr_ratio
        self.axes = axes
        self.scale = scale
        self.impl = impl
        self.strip = self.num_heads * qk_dim
        self.q = nn.Linear(dim, self.strip, bias=qkv_bias)
        convolves = reduction == "conv" and sr_ratio > 1
        self.sr = CONVOLUTIONS[axes - 1](dim, dim, sr_ratio, sr_ratio) if convolves else None
        self.norm = nn.LayerNorm(dim) if convolves else nn.Identity()
        self.kv = nn.Linear(dim, self.strip + dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        space = tuple(x.shape[1:-1])
        if len(space) != self.axes:
            raise InputError(f"x is {tuple(x.shape)}: the mixer was built for {self.axes} axes. Set axes={len(space)}")
        key_value = self.kv(self.reduce(x).flatten(1, -2)).split([self.strip, self.dim], -1)  # (B, M, ...)
        query, key, value = (split_heads(part, self.num_heads) for part in (self.q(x.flatten(1, -2)), *key_value))
        taps.record(self, "attention", lambda: self._attention(query, key, space))
        out = merge_heads(softmax_attention(query, key, value, scale=self.scale, impl=self.impl))
        projected: Tensor = self.proj(out).unflatten(1, space)
        return projected

    def reduce(self, x: Tensor) -> Tensor:
        """The map that keys and values are projected from: (B, *space, C) to (B, *cells, C)."""
        if self.sr_ratio == 1:
            return x
        maps = x.movedim(-1, 1)
        if self.sr is None:
            return self._pool(maps).movedim(1, -1)
        margins = [n for length in reversed(maps.shape[2:]) for n in (0, -length % self.sr_ratio)]
        out: Tensor = self.norm(self.sr(F.pad(maps, margins)).movedim(1, -1))
        return out

    def _pool(self, maps: Tensor) -> Tensor:
        """(B, C, *space) to (B, C, *cells): means over the tokens of the map alone."""
        return POOLS[self.axes - 1](maps, self.sr_ratio, ceil_mode=True)

    def _attention(self, query: Tensor, key: Tensor, space: tuple[int, ...]) -> Tensor:
        weights = attention_weights(query, key, None, query.shape[-1] ** -0.5 if self.scale is None else self.scale)
        if self.sr_ratio == 1:
            return weights
        tokens = torch.eye(query.shape[2], dtype=weights.dtype, device=weights.device)
        spread = self._pool(tokens.unflatten(1, space).unsqueeze(1)).flatten(1)  # (N, M)
        return weights @ spread.mT
