"""Mixture of block attention (VMoBA, 2025, arXiv:2506.23858, and MoBA, its causal ancestor)."""

import torch
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError
from saccade.mixers.mixer import Mixer, choose_heads, merge_heads, split_heads
from saccade.ops import Selection, choose_blocks, mixture_of_blocks, sparse_attention_weights
from saccade.ops.check import per_axis

__all__ = ["MixtureOfBlocksAttention"]

BLOCKS = 4  # along an axis that is cut


class MixtureOfBlocksAttention(Mixer):
    """Softmax attention of each query over its own block and those that match it best (VMoBA, 2025, arXiv:2506.23858).

    With `causal`, `topk` and scope "query" it is MoBA, on sequences.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels. Each head chooses for itself.
        layer: number of the layer. Layers take turns: of a video (time, height, width) the first cuts time into
            blocks of whole frames, the second height and width into tiles through all frames, the third all three
            axes. Of an image the first cuts height, the second both axes, and
            the latter is the default.
        block_size: tokens of a block along each axis that is cut, one number or one for each axis of space. None cuts
            such an axis in four. The last block along an axis may be smaller.
        mass, topk, scope, causal: as in `saccade.ops.choose_blocks`.
        qkv_bias: give the projection to query, key and value a bias.
        impl: as in `saccade.ops.mixture_of_blocks`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        layer: int = 1,
        block_size: int | tuple[int, ...] | None = None,
        mass: float = 0.25,
        topk: int | None = None,
        scope: str = "head",
        causal: bool = False,
        qkv_bias: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        self.num_heads = choose_heads(dim, num_heads)
        self.layer = layer
        self.block_size = block_size
        self.mass = mass
        self.topk = topk
        self.scope = scope
        self.causal = causal
        self.impl = impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1))
        selection = choose_blocks(
            query,
            key,
            self.block(tuple(x.shape[1:-1])),
            mass=self.mass,
            topk=self.topk,
            scope=self.scope,
            causal=self.causal,
        )
        taps.record(self, "attention", lambda: self._attention(query, key, selection))
        out = mixture_of_blocks(query, key, value, selection, causal=self.causal, impl=self.impl)
        projected: Tensor = self.proj(merge_heads(out))
        return projected

    def block(self, space: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens of a block along each axis of a map: all of them where the axis is not cut."""
        sizes = per_axis("block_size", self.block_size, len(space))
        cut = _cut_axes(len(space), self.layer)
        return tuple(
            (-(-length // BLOCKS) if size is None else min(size, length)) if axis in cut else length
            for axis, (length, size) in enumerate(zip(space, sizes))
        )

    def _attention(self, query: Tensor, key: Tensor, selection: Selection) -> Tensor:
        if not self.causal:
            return sparse_attention_weights(query, key, selection)
        eye = torch.eye(key.shape[2], dtype=key.dtype, device=key.device).expand(*key.shape[:3], -1)
        return mixture_of_blocks(query, key, eye, selection, causal=True, impl="reference")


def _cut_axes(axes: int, layer: int) -> range:
    """Which axes the blocks of a layer cut: the first, all but the first, all; without repetitions."""
    turns = {1: [range(1)], 2: [range(1), range(2)], 3: [range(1), range(1, 3), range(3)]}
    if axes not in turns:
        raise InputError(f"the map has {axes} axes: blocks are of sequences, images and videos. Give one to three axes")
    return turns[axes][layer % axes]
