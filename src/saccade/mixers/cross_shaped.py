"""Cross-shaped windows (CSWin, Dong et al., 2021, arXiv:2107.00652): stripes down the map and stripes across it."""

import torch
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError
from saccade.mixers.mixer import Mixer, append_zeros, choose_heads, crop, merge_heads, split_heads
from saccade.ops import Window, sparse_attention, sparse_attention_weights
from saccade.ops.check import check_positive

__all__ = ["CrossShapedAttention"]


class CrossShapedAttention(Mixer):
    """Softmax attention inside stripes, down the map for half of the heads and across it for the others (CSWin, Dong et
    al., 2021, arXiv:2107.00652).

    A depthwise convolution of the values inside each stripe tells positions apart (LePE); zeros stand outside a
    stripe. Taps show the heads of stripes down the map first, and leave the convolution out.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels, two at least with stripes.
        stripe_size: tokens across a stripe, or all where the map has fewer; the last stripe may be narrower. None
            takes the whole map for all heads.
        qkv_bias: give the projection to query, key and value a bias.
        impl: as in `sparse_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        stripe_size: int | None = 7,
        qkv_bias: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        if stripe_size is None:
            self.parts = 1
        else:
            check_positive(stripe_size=stripe_size)
            self.parts = 2
        self.num_heads = choose_heads(dim, max(self.parts, dim // 32) if num_heads is None else num_heads)
        if self.num_heads % self.parts:
            raise InputError(
                f"num_heads is {self.num_heads}: half of the heads see stripes down the map, half across it. Take an "
                "even number, or stripe_size=None"
            )
        self.stripe_size = stripe_size
        self.impl = impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        width = dim // self.parts
        self.lepe = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(self.parts))
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise InputError(f"x is {tuple(x.shape)}: stripes run down and across an image. Give (B, H, W, {self.dim})")
        stripes = self.stripes((x.shape[1], x.shape[2]))
        query, key, value = (part.chunk(self.parts, -1) for part in self.qkv(x).chunk(3, -1))
        heads = self.num_heads // self.parts
        groups = list(zip(*([split_heads(part, heads) for part in kind] for kind in (query, key, value))))
        patterns = [Window(stripe, ragged=True) for stripe in stripes]
        taps.record(
            self,
            "attention",
            lambda: torch.cat([sparse_attention_weights(q, k, p) for (q, k, _), p in zip(groups, patterns)], 1),
        )
        mixed = [merge_heads(sparse_attention(q, k, v, p, impl=self.impl)) for (q, k, v), p in zip(groups, patterns)]
        local = [_inside(conv, part, stripe) for conv, part, stripe in zip(self.lepe, value, stripes)]
        out: Tensor = self.proj(torch.cat([a + b for a, b in zip(mixed, local)], -1))
        return out

    def stripes(self, space: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of the stripes of each part of the heads, on a map."""
        height, width = space
        if self.stripe_size is None:
            return [space]
        return [(height, min(width, self.stripe_size)), (min(height, self.stripe_size), width)]


def _inside(conv: nn.Module, x: Tensor, stripe: tuple[int, int]) -> Tensor:
    """A convolution of each stripe of (B, H, W, C) by itself."""
    (height, width), space = stripe, (x.shape[1], x.shape[2])
    if stripe == space:
        return conv(x.movedim(-1, 1)).movedim(1, -1)
    padded = append_zeros(x, [-length % size for length, size in zip(space, stripe)])
    cut = padded.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3)  # (B, h, w, height, width, C)
    out = conv(cut.flatten(0, 2).movedim(-1, 1)).movedim(1, -1).unflatten(0, cut.shape[:3])
    return crop(out.transpose(2, 3).flatten(3, 4).flatten(1, 2), space)
