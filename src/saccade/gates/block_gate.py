"""Gates that predict which blocks of keys matter (SeerAttention, Gao et al., 2024, arXiv:2410.13276).

They see queries and keys pooled by block, before any rotary embedding, and answer with scores for
`saccade.ops.select_gated`. They learn from `saccade.ops.block_map_divergence` to the map that attention really has.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError, check_choice
from saccade.ops.block_map import pool_blocks
from saccade.ops.check import check_attention, check_positive
from saccade.ops.rotary import rotate

__all__ = ["BlockGate", "TokenGate"]

POOLS = ("max", "min", "mean")  # in the order of their channels in official weights
Block = int | tuple[int, ...]
Rotary = tuple[Tensor, Tensor]


class BlockGate(nn.Module):
    """Score every pair of query block and key block by a product of what their pooled tokens are projected to.

    Args:
        head_dim: D, channels of a head.
        num_heads: heads of the queries, each with a gate of its own.
        kv_heads: heads of the keys, which divide num_heads; None takes as many.
        gate_dim: channels of the product. None takes D.
        query_pools, key_pools: some of "max", "min" and "mean", whose results are put side by side.
        causal: key blocks after the query block have a score of -inf; for sequences.
        force_double: project the queries even where they are pooled once and gate_dim is D. Otherwise they stay as
            they are there, and each query head has a projection of the keys.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        kv_heads: int | None = None,
        *,
        gate_dim: int | None = None,
        query_pools: Sequence[str] = ("mean",),
        key_pools: Sequence[str] = POOLS,
        causal: bool = False,
        force_double: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        check_positive(head_dim=head_dim, num_heads=num_heads, kv_heads=kv_heads)
        if num_heads % kv_heads:
            raise InputError(f"num_heads is {num_heads} and kv_heads is {kv_heads}: give a divisor")
        self.gate_dim = head_dim if gate_dim is None else gate_dim
        self.query_pools = _check_pools(query_pools)
        self.key_pools = _check_pools(key_pools)
        self.causal = causal
        single = len(self.query_pools) == 1 and self.gate_dim == head_dim and not force_double
        self.mask_linear_q = None if single else _HeadLinear(num_heads, head_dim * len(self.query_pools), self.gate_dim)
        self.mask_linear_k = _HeadLinear(
            num_heads if single else kv_heads, head_dim * len(self.key_pools), self.gate_dim
        )

    def forward(self, query: Tensor, key: Tensor, block_size: Block, rotary: Rotary | None = None) -> Tensor:
        """Score the blocks of a map.

        Args:
            query: (B, heads, *space, D).
            key: (B, kv_heads, *space, D).
            block_size: tokens of a block, one number or one for each axis; the last may be smaller.
            rotary: cosines and sines, (blocks, gate_dim / 2), of the place of each block's first token.

        Returns: (B, heads, T, M), logits of a softmax over key blocks.
        """
        check_attention(query, key, key)
        pooled = _pool(query, block_size, self.query_pools)
        asked = pooled if self.mask_linear_q is None else self.mask_linear_q(pooled)  # (B, heads, T, gate_dim)
        keys = _pool(key, block_size, self.key_pools)
        if self.mask_linear_q is None:
            keys = keys.repeat_interleave(query.shape[1] // key.shape[1], 1)
        keys = self.mask_linear_k(keys)
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)  # (B, heads, M, gate_dim)
        if rotary is not None:
            asked, keys = rotate(asked, *rotary), rotate(keys, *rotary)
        scores = asked @ keys.mT * self.gate_dim**-0.5
        if self.causal:
            if query.ndim != 4:
                raise InputError(f"query is {tuple(query.shape)} and causal is True: give sequences (B, heads, N, D)")
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        taps.record(self, "gate", lambda: scores.softmax(-1))
        return scores


class TokenGate(nn.Module):
    """Score every pair of single query and key block, for all query heads of a key head together (SeerAttention-R).

    Args:
        head_dim, num_heads, kv_heads, gate_dim, key_pools: as for BlockGate.
        eps: of the norms of query and key.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        kv_heads: int | None = None,
        *,
        gate_dim: int | None = None,
        key_pools: Sequence[str] = POOLS,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        check_positive(head_dim=head_dim, num_heads=num_heads, kv_heads=kv_heads)
        if num_heads % kv_heads:
            raise InputError(f"num_heads is {num_heads} and kv_heads is {kv_heads}: give a divisor")
        self.gate_dim = head_dim if gate_dim is None else gate_dim
        self.key_pools = _check_pools(key_pools)
        self.attngate_linear_q = _HeadLinear(kv_heads, num_heads // kv_heads, head_dim, self.gate_dim)
        self.attngate_linear_k = _HeadLinear(kv_heads, head_dim * len(self.key_pools), self.gate_dim)
        for linear in (self.attngate_linear_q, self.attngate_linear_k):
            nn.init.xavier_uniform_(linear.weight)
        self.attngate_qnorm = nn.RMSNorm(self.gate_dim, eps=eps)
        self.attngate_knorm = nn.RMSNorm(self.gate_dim, eps=eps)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        block_size: Block,
        query_rotary: Rotary | None = None,
        key_rotary: Rotary | None = None,
    ) -> Tensor:
        """Score the blocks of keys.

        Args:
            query: (B, heads, *space, D).
            key: (B, kv_heads, *key_space, D).
            block_size: tokens of a block of keys, as for BlockGate.
            query_rotary: cosines and sines, (N, gate_dim / 2), of the place of each query.
            key_rotary: the same, (M, gate_dim / 2), for the first token of each block.

        Returns: (B, kv_heads, N, M), logits of a softmax over key blocks.
        """
        check_attention(query, key, key)
        grouped = query.flatten(2, -2).unflatten(1, (key.shape[1], -1))  # (B, kv_heads, group, N, D)
        asked = self.attngate_qnorm((grouped @ self.attngate_linear_q.weight).sum(2))
        keys = self.attngate_knorm(self.attngate_linear_k(_pool(key, block_size, self.key_pools)))
        if query_rotary is not None:
            asked = rotate(asked, *query_rotary)
        if key_rotary is not None:
            keys = rotate(keys, *key_rotary)
        scores: Tensor = asked @ keys.mT * self.gate_dim**-0.5
        taps.record(self, "gate", lambda: scores.softmax(-1))
        return scores


class _HeadLinear(nn.Module):
    """A projection for each head: (B, heads, T, in) to (B, heads, T, out)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def _pool(x: Tensor, block: Block, pools: Sequence[str]) -> Tensor:
    """(B, heads, *space, D) to (B, heads, T, D * pools)."""
    return torch.cat([pool_blocks(x, block, pool) for pool in pools], -1)


def _check_pools(pools: Sequence[str]) -> tuple[str, ...]:
    for pool in pools:
        check_choice("pool", pool, POOLS)
    if not pools:
        raise InputError(f"pools is empty: give at least one of {', '.join(POOLS)}")
    return tuple(pool for pool in POOLS if pool in pools)
