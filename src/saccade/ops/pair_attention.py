"""Attention over pairs of a query and a block of keys, computed block by block: what single queries that select blocks
need. Memory and time are linear in the pairs."""

from collections.abc import Callable

import torch
from torch import Tensor

from saccade.ops.softmax_attention import AttentionResult, attend

__all__ = ["attend_pairs"]

TILE = 64  # queries that meet one key block in one product: a block with more of them is met again


def attend_pairs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pairs: Tensor,
    columns: Tensor,
    scale: float,
    sees: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> AttentionResult:
    """Softmax attention of every query over the tokens of its key blocks.

    Args:
        query: (B, heads, N, D).
        key, value: (B, kv_heads, M, D) and (..., E); kv_heads divides heads.
        pairs: (B, heads | 1, N, blocks) booleans.
        columns: (blocks, c) numbers of the tokens in each block, -1 where a block is smaller.
        scale: factor of q.k.
        sees: which pairs of query and key number, broadcastable tensors, may meet inside the blocks; None: all.
    """
    batch, heads, num_queries, _ = query.shape
    pairs = pairs.expand(batch, heads, -1, -1).flatten(0, 1).mT  # (B heads, blocks, N): sorted by block
    image, block, row = pairs.nonzero().unbind(1)
    row = image * num_queries + row
    slot, block_of_tile = _tile(image * len(columns) + block, batch * heads * len(columns))

    def blocks_of(x: Tensor) -> Tensor:
        """(tiles, 1, c, D): the block of every tile."""
        x = x.repeat_interleave(heads // x.shape[1], 1)[:, :, columns.flatten()]
        return x.unflatten(2, tuple(columns.shape)).flatten(0, 2)[block_of_tile].unsqueeze(1)

    rows = row.new_zeros(len(block_of_tile) * TILE).scatter(0, slot, row)  # a free place takes query 0, for nothing
    tiles = query.flatten(0, 2)[rows].view(-1, 1, TILE, query.shape[-1])
    keys = columns[block_of_tile % len(columns), None]  # (tiles, 1, c)
    visible = keys >= 0
    if sees is not None:
        visible = visible & sees((rows % num_queries).view(-1, TILE, 1), keys)
    hidden = torch.zeros(visible.shape, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    hidden = hidden.masked_fill(~visible, -torch.inf).unsqueeze(1)
    out, lse = attend(tiles, blocks_of(key), blocks_of(value), hidden, scale)
    merged = _merge(out.flatten(0, 2)[slot], lse.flatten()[slot], row, batch * heads * num_queries)
    return AttentionResult(*(x.unflatten(0, (batch, heads, num_queries)) for x in merged))


def _tile(block: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Cut the pairs of each block, which stand together, into tiles: the slot of each pair, the block of each tile."""
    count = torch.bincount(block, minlength=num_blocks)
    tiles = -(-count // TILE)
    place = torch.arange(len(block), device=block.device) - (count.cumsum(0) - count)[block]
    slot = (tiles.cumsum(0) - tiles)[block] * TILE + place
    return slot, torch.repeat_interleave(torch.arange(num_blocks, device=block.device), tiles)


def _merge(out: Tensor, lse: Tensor, row: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Merge the parts (pairs, E) of every row through their log-sum-exp; a row without parts gets 0 and -inf."""
    top = lse.new_full((num_rows,), -torch.inf).scatter_reduce(0, row, lse.detach(), "amax")
    top = top.masked_fill(top == -torch.inf, 0)
    share = (lse - top[row]).exp()
    total = lse.new_zeros(num_rows).index_add(0, row, share)
    empty = total == 0
    safe = total.masked_fill(empty, 1)
    parts = out.to(lse.dtype) * (share / safe[row]).unsqueeze(-1)
    merged = parts.new_zeros(num_rows, out.shape[-1]).index_add(0, row, parts)
    return merged.to(out.dtype), (safe.log() + top).masked_fill(empty, -torch.inf)
