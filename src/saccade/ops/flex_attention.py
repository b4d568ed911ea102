"""Attention over lists of tiles by torch's compiled FlexAttention: on CUDA forward and backward, on CPU forward."""

import math
from collections import OrderedDict
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from saccade.errors import InputError
from saccade.ops.block_lists import BlockLists
from saccade.ops.pattern import Space, StaticPattern
from saccade.ops.softmax_attention import AttentionResult

__all__ = ["attend_flex"]

TILE = 128  # tokens; FlexAttention's own block size
_KEPT: OrderedDict[Any, tuple[Callable[..., Any], Any]] = OrderedDict()
_MOST_KEPT = 64


def attend_flex(
    query: Tensor, key: Tensor, value: Tensor, pattern: StaticPattern, space: Space, scale: float, need_lse: bool
) -> AttentionResult:
    """Softmax attention under a static pattern: tokens are put in the order of its tiles, and back.

    The first call of a pattern on a map compiles, which takes seconds; its block mask is built once.

    Args:
        query: (B, heads, N, D).
        key, value: (B, kv_heads, M, D) and (..., E).
        pattern, space: which keys a query sees, and the axes of the queries.
        scale: factor of q.k.
        need_lse: give the log-sum-exp too, which there is on CUDA alone.
    """
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if query.device.type == "cpu" and (need_lse or training):
        lacks = "log-sum-exp to return or merge by" if need_lse else "backward pass"
        raise InputError(f"impl is 'flex' on the CPU, where FlexAttention has no {lacks}. Use impl='tiled'")
    lists = pattern.block_lists(space, TILE, TILE)
    attend, block_mask = _compiled(pattern, space, lists, query)
    rows, columns = (order.flatten().to(query.device) for order in (lists.query, lists.key))
    q = query.index_select(2, rows.clamp(min=0))
    k, v = (x.index_select(2, columns.clamp(min=0)) for x in (key, value))
    out, lse = attend(q, k, v, block_mask, scale, query.shape[1] != key.shape[1], need_lse)
    back = rows.argsort(stable=True)[-math.prod(space) :]  # what is not a token stands first
    return AttentionResult(out.index_select(2, back), lse.index_select(2, back) if need_lse else lse)


def _compiled(pattern: StaticPattern, space: Space, lists: BlockLists, like: Tensor) -> tuple[Callable[..., Any], Any]:
    """The compiled call and the block mask of a pattern on a map, made once."""
    question = (pattern, space, like.device)
    if question not in _KEPT:
        # a code object of its own, so that many patterns do not share one compiler's limit of variants
        own = FunctionType(_attend.__code__.replace(), _attend.__globals__, f"attend_{len(_KEPT)}")
        _KEPT[question] = torch.compile(own, dynamic=False), _block_mask(lists, like.device)
        if len(_KEPT) > _MOST_KEPT:
            _KEPT.popitem(last=False)
    _KEPT.move_to_end(question)
    return _KEPT[question]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, block_mask: Any, scale: float, grouped: bool, need_lse: bool
) -> tuple[Tensor, Tensor]:
    from torch.nn.attention import flex_attention as flex

    options: dict[str, Any] = {"block_mask": block_mask, "scale": scale, "enable_gqa": grouped}
    if not need_lse:
        return flex.flex_attention(q, k, v, **options), q.new_empty(0)
    if hasattr(flex, "AuxRequest"):
        out, aux = flex.flex_attention(q, k, v, return_aux=flex.AuxRequest(lse=True), **options)
        return out, aux.lse
    out, lse = flex.flex_attention(q, k, v, return_lse=True, **options)  # torch before 2.9
    return out, lse


def _block_mask(lists: BlockLists, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    tiles, keys = len(lists.query), len(lists.key)
    most = lists.blocks.shape[1]
    entry = torch.arange(most)
    table = torch.zeros(tiles, keys, dtype=torch.long)  # which mask holds for a pair of tiles
    partial = (entry >= lists.full[:, None]) & (entry < lists.visits[:, None])
    row = torch.arange(tiles)[:, None].expand_as(lists.blocks)
    table[row[partial], lists.blocks[partial]] = lists.mask[partial]
    others = lists.blocks.gather(1, (entry + lists.full[:, None]).clamp(max=most - 1))
    table, masks = table.to(device), lists.masks.to(device)

    def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return masks[table[q // TILE, k // TILE], q % TILE, k % TILE]

    def widen(numbers: Tensor) -> Tensor:
        """As many columns as there are key tiles, which a block mask wants."""
        wide = torch.zeros(tiles, keys, dtype=torch.int32)
        wide[:, : min(most, keys)] = numbers[:, :keys]
        return wide[None, None].to(device)

    counts = [x.to(device, torch.int32)[None, None] for x in (lists.visits - lists.full, lists.full)]
    return BlockMask.from_kv_blocks(
        counts[0], widen(others), counts[1], widen(lists.blocks), BLOCK_SIZE=(TILE, TILE), mask_mod=visible
    )
