"""Attention in blocks of keys that are chosen once and kept for many steps (SparseD, 2025, arXiv:2509.24014)."""

from functools import partial

from torch import Tensor, nn

from saccade import taps
from saccade.mixers.mixer import Mixer, choose_heads, merge_heads, split_heads
from saccade.ops import (
    Global,
    Pattern,
    ReuseState,
    reuse_attention,
    select_blocks_by_weight,
    sparse_attention,
    sparse_attention_weights,
)
from saccade.ops.check import per_axis
from saccade.ops.selection import Selection

__all__ = ["ReusedBlocksAttention"]

BLOCKS = 4  # along an axis


class ReusedBlocksAttention(Mixer):
    """Softmax attention of each block of queries over the key blocks with the largest weights (SparseD, 2025,
    arXiv:2509.24014).

    Choosing takes the products of dense attention, so one pass gains nothing. A model that runs many times on nearly
    the same tokens, such as a denoiser, calls `step` instead, which chooses once.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels. Each head chooses for itself.
        block_size: tokens of a block along each axis, one number or one for each; None cuts every axis in four. The
            last block along an axis may be smaller.
        keep, generated: as in `saccade.ops.select_blocks_by_weight`.
        scale: factor of q.k; None takes D^-0.5.
        choosing_scale: the same where blocks are chosen; None takes `scale`.
        qkv_bias: give the projection to query, key and value a bias.
        impl: as in `saccade.ops.sparse_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        block_size: int | tuple[int, ...] | None = None,
        keep: float = 0.3,
        generated: int | None = None,
        scale: float | None = None,
        choosing_scale: float | None = None,
        qkv_bias: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        self.num_heads = choose_heads(dim, num_heads)
        self.block_size = block_size
        self.keep = keep
        self.generated = generated
        self.scale = scale
        self.choosing_scale = scale if choosing_scale is None else choosing_scale
        self.impl = impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        query, key, value = self._project(x)
        pattern = self.choose(query, key)
        self._show(query, key, pattern)
        return self._finish(sparse_attention(query, key, value, pattern, scale=self.scale, impl=self.impl))

    def step(self, x: Tensor, state: ReuseState, *, choose_at: int) -> tuple[Tensor, ReuseState]:
        """Mix the tokens of x (B, *space, C) in one of many steps, as `saccade.ops.reuse_attention` does.

        Args:
            x: the map; its size is the same in all steps.
            state: `ReuseState()` in the first step of a generation, then what the step before returned.
            choose_at: the step that chooses, which is the last with full attention (`saccade.ops.choosing_step`).
        """
        query, key, value = self._project(x)
        self._show(query, key, Global() if state.pattern is None else state.pattern)
        out, state = reuse_attention(
            query, key, value, state, self.choose, choose_at=choose_at, scale=self.scale, impl=self.impl
        )
        return self._finish(out), state

    def choose(self, query: Tensor, key: Tensor) -> Selection:
        """The blocks that each block of queries sees, from (B, heads, *space, D)."""
        space = tuple(query.shape[2:-1])
        sizes = tuple(
            -(-length // BLOCKS) if size is None else min(size, length)
            for length, size in zip(space, per_axis("block_size", self.block_size, len(space)))
        )
        block = sizes[0] if len(sizes) == 1 else sizes
        return select_blocks_by_weight(
            query, key, block, keep=self.keep, generated=self.generated, scale=self.choosing_scale
        )

    def _project(self, x: Tensor) -> list[Tensor]:
        return [split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1)]

    def _show(self, query: Tensor, key: Tensor, pattern: Pattern) -> None:
        taps.record(self, "attention", partial(sparse_attention_weights, query, key, pattern, scale=self.scale))

    def _finish(self, out: Tensor) -> Tensor:
        projected: Tensor = self.proj(merge_heads(out))
        return projected
