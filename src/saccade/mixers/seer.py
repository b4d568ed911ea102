"""Attention to the blocks that a learned gate predicts (SeerAttention, Gao et al., 2024, arXiv:2410.13276)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade import taps
from saccade.gates import BlockGate
from saccade.mixers.mixer import Mixer, choose_heads, merge_heads, split_heads
from saccade.ops import (
    Causal,
    Pattern,
    block_map,
    block_map_divergence,
    rotary_angles,
    rotate,
    select_gated,
    sparse_attention,
    sparse_attention_weights,
)
from saccade.ops.check import per_axis
from saccade.ops.selection import block_order

__all__ = ["SeerAttention"]

BLOCKS = 8  # along an axis
LOSS_SCALE = 10.0
SKIPPED = 0.25  # of the rows of causal maps, in the loss
DENSE_ROWS = 2


class SeerAttention(Mixer):
    """Softmax attention of blocks over those that a small learned gate finds worth it (Gao et al., 2024).

    The output has no gradient for the gate, which only chooses. It learns from `distill`, beside or after the rest.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels. Each has its own gate.
        block_size: tokens of a block, one number or one for each axis. None cuts each axis in eight; SeerAttention has
            64 tokens of a sequence. The last block along an axis may be smaller.
        share: of the blocks, about, that is computed; None computes all.
        threshold: compute the blocks that the gate gives more than this weight, instead of a share.
        gate_dim, query_pools, key_pools, force_double: as for `saccade.gates.BlockGate`.
        rotary: base of a rotary position embedding of query and key, which the gate applies by block; None has none.
        causal: tokens see none that come later, but what a block sees is chosen by all its tokens; for sequences. The
            last two blocks then see all before them, and the first quarter is left out of the loss.
        qkv_bias: give the projection to query, key and value a bias.
        impl: as in `sparse_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        block_size: int | tuple[int, ...] | None = None,
        share: float | None = 0.25,
        threshold: float | None = None,
        gate_dim: int | None = None,
        query_pools: Sequence[str] = ("mean",),
        key_pools: Sequence[str] = ("max", "min", "mean"),
        force_double: bool = False,
        rotary: float | None = None,
        causal: bool = False,
        qkv_bias: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        self.num_heads = choose_heads(dim, num_heads)
        self.block_size = block_size
        self.share = share if threshold is None else None
        self.threshold = threshold
        self.rotary = rotary
        self.causal = causal
        self.impl = impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.gate = BlockGate(
            dim // self.num_heads,
            self.num_heads,
            gate_dim=gate_dim,
            query_pools=query_pools,
            key_pools=key_pools,
            causal=causal,
            force_double=force_double,
        )
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x)  # (B, heads, *space, D)
        pattern = self.pattern(query, key)
        query, key = self.turn(query), self.turn(key)
        taps.record(self, "attention", lambda: sparse_attention_weights(query, key, pattern))
        out: Tensor = self.proj(merge_heads(sparse_attention(query, key, value, pattern, impl=self.impl)))
        return out

    def distill(self, x: Tensor) -> Tensor:
        """Loss of the gate on a map (B, *space, C): ten times the divergence of what it predicts from the largest
        attention weights of each pair of blocks. Its gradient reaches the gate alone."""
        with torch.no_grad():
            query, key, _ = self.project(x)
            block = self.blocks(tuple(x.shape[1:-1]))
            target = block_map(self.turn(query), self.turn(key), block, block, causal=self.causal)
        skipped = SKIPPED if self.causal else 0.0
        return LOSS_SCALE * block_map_divergence(self.scores(query, key), target, skip=skipped)

    def project(self, x: Tensor) -> list[Tensor]:
        """Query, key and value of a map, (B, heads, *space, D) each, before any rotary embedding."""
        return [split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1)]

    def blocks(self, space: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens of a block along each axis of a map."""
        sizes = per_axis("block_size", self.block_size, len(space))
        return tuple(-(-length // BLOCKS) if size is None else size for size, length in zip(sizes, space))

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """What the gate says of each pair of blocks, (B, heads, T, T) logits."""
        space = tuple(query.shape[2:-1])
        block = self.blocks(space)
        rotary = None
        if self.rotary is not None:
            first = block_order(space, block, query.device)[:, 0]
            rotary = self._rotary(space, first, self.gate.gate_dim)
        scores: Tensor = self.gate(query, key, block, rotary)
        return scores

    def pattern(self, query: Tensor, key: Tensor) -> Pattern:
        """The blocks that are computed."""
        space = tuple(query.shape[2:-1])
        everything = self.share is None and self.threshold is None
        selection = select_gated(
            self.scores(query, key),
            share=1.0 if everything else self.share,
            threshold=self.threshold,
            causal=self.causal,
            dense_rows=DENSE_ROWS if self.causal else 0,
            query_block=self.blocks(space),
            key_block=self.blocks(space),
            ragged=True,
        )
        return selection & Causal() if self.causal else selection

    def turn(self, x: Tensor) -> Tensor:
        """Query or key with its rotary embedding, if there is one."""
        if self.rotary is None:
            return x
        space = tuple(x.shape[2:-1])
        tokens = torch.arange(torch.Size(space).numel(), device=x.device)
        turned = rotate(x.flatten(2, -2), *self._rotary(space, tokens, x.shape[-1]))
        return turned.unflatten(2, space)

    def _rotary(self, space: tuple[int, ...], tokens: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines for the places of some tokens."""
        assert self.rotary is not None
        places = torch.stack(torch.unravel_index(tokens, space))
        angles = rotary_angles(places, dim, base=self.rotary)
        return angles.cos(), angles.sin()
