"""Pyramid sparse attention (2025, arXiv:2512.04025): blocks of tokens along a curve read others at levels that fit."""

from collections.abc import Mapping

from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError, check_choice
from saccade.mixers.mixer import Mixer, choose_heads, merge_heads, split_heads
from saccade.ops import (
    axis_order,
    block_importance,
    gilbert_order,
    pyramid_attention,
    pyramid_attention_weights,
    pyramid_levels,
    reorder,
    restore,
    similar_levels,
    tile_order,
)

__all__ = ["PyramidSparseAttention"]

ENDS = {1: 0.4, 2: 0.5, 4: 0.6, 8: 0.8}  # those for Wan2.1-14B
LARGEST_BLOCK = 64
TILE = (2, 8, 8)


class PyramidSparseAttention(Mixer):
    """Softmax attention in which important blocks are read in full, others as means, the rest not at all (PSA, 2025).

    Tokens are put in an order in which neighbours of the map share a block, mixed as a sequence, and put back.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels. Each head has its own levels.
        ends, by, least: which blocks have which level, as in `saccade.ops.pyramid_levels`.
        query_block, key_block: tokens of a block, the latter a multiple of every level; the last may have fewer. None
            cuts the sequence in about eight, but takes at most 64; published models have 128.
        order: "gilbert", along a space-filling curve; "tile", in tiles of 8 x 8, and two frames of a video; "row",
            row-major.
        similarity: level -> mean cosine that a block's neighbouring keys must exceed to be read there, as in
            `saccade.ops.similar_levels`; published models that use it take {2: 0.7, 4: 0.65, 8: 0.6}.
        sample: share of a block's tokens by which its importance is estimated, at random; 0.25 in published models.
            By default all are, so that the same input gives the same output.
        causal: tokens see none that come later, but the levels of a block are chosen by all its tokens; for sequences,
            with query_block = key_block.
        qkv_bias: give the projection to query, key and value a bias.
        impl: as in `saccade.ops.pyramid_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        ends: Mapping[int, float] = ENDS,
        by: str = "mass",
        least: float | None = 0.06,
        query_block: int | None = None,
        key_block: int | None = None,
        order: str = "gilbert",
        similarity: Mapping[int, float] | None = None,
        sample: float = 1.0,
        causal: bool = False,
        qkv_bias: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        check_choice("order", order, ("gilbert", "row", "tile"))
        self.num_heads = choose_heads(dim, num_heads)
        self.ends = dict(ends)
        self.sizes = tuple(sorted({1, *self.ends, *(similarity or {})} - {0}))
        self.by = by
        self.least = least
        self.query_block = query_block
        self.key_block = key_block
        self.order = order
        self.similarity = similarity
        self.sample = sample
        self.causal = causal
        self.impl = impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        space = tuple(x.shape[1:-1])
        if self.causal and len(space) > 1:
            raise InputError(f"x is {tuple(x.shape)} and causal is True: an order of tokens is one of sequences")
        order = self.token_order(space).to(x.device)
        tokens = reorder(x.flatten(1, -2), order)
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(tokens).chunk(3, -1))
        blocks = self.blocks(tokens.shape[1])
        levels = self.levels(query, key)

        def attention() -> Tensor:
            weights = pyramid_attention_weights(query, key, levels, *blocks, sizes=self.sizes, causal=self.causal)
            return restore(restore(weights, order).mT, order).mT

        taps.record(self, "attention", attention)
        mixed = pyramid_attention(
            query, key, value, levels, *blocks, sizes=self.sizes, causal=self.causal, impl=self.impl
        )
        out: Tensor = self.proj(restore(merge_heads(mixed), order))
        return out.view_as(x)

    def token_order(self, space: tuple[int, ...]) -> Tensor:
        """(N,) the numbers of the tokens of a map in their order."""
        if self.order == "row":
            return axis_order(space, tuple(range(len(space))))
        return gilbert_order(space) if self.order == "gilbert" else tile_order(space, TILE[-len(space) :])

    def blocks(self, tokens: int) -> tuple[int, int]:
        """Tokens of a block of queries and of keys in a sequence of so many."""
        coarsest = max(self.sizes)
        usual = -(-min(LARGEST_BLOCK, -(-tokens // 8)) // coarsest) * coarsest
        return (self.query_block or usual), (self.key_block or usual)

    def levels(self, query: Tensor, key: Tensor) -> Tensor:
        """The level of each pair of blocks, (B, heads, T, M), from ordered tokens (B, heads, N, D)."""
        blocks = self.blocks(query.shape[2])
        importance = block_importance(query, key, *blocks, sample=self.sample, causal=self.causal)
        levels = pyramid_levels(importance, self.ends, by=self.by, least=self.least, causal=self.causal)
        if self.similarity is None:
            return levels
        return levels.minimum(similar_levels(key, blocks[1], self.similarity).unsqueeze(-2))
