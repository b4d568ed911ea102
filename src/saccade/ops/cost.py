"""What attention costs under a pattern: pairs, FLOPs, bytes, and the tiles that a kernel must visit."""

from math import inf, prod
from typing import NamedTuple

import torch

from saccade.errors import InputError
from saccade.ops.check import check_positive
from saccade.ops.compose import PerHead, SelectionUnion
from saccade.ops.pattern import TILE_TOKENS, Pattern, StaticPattern
from saccade.ops.selection import Selection
from saccade.ops.tiling import TileBound, tile_bound

__all__ = ["Cost", "pattern_cost"]


class Cost(NamedTuple):
    """What a forward pass costs.

    Attributes:
        pairs: pairs of query and key that may attend, over all images and heads.
        computed: pairs that the tiled engine computes for them, hidden ones included.
        flops: of the two products over `pairs`, two FLOPs a multiply-add; the backward pass takes 2.5 times as many.
        bytes: query, key and value read once, and the result written once.
        bound: how many times faster than dense attention a kernel of tiles can be at most.
    """

    pairs: int
    computed: int
    flops: int
    bytes: int
    bound: TileBound


def pattern_cost(
    pattern: Pattern,
    space: tuple[int, ...],
    *,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    query_tile: int | tuple[int, ...] | None = None,
    key_tile: int | tuple[int, ...] | None = None,
) -> Cost:
    """Count what `sparse_attention` costs under a pattern, without running it or forming an N x N mask.

    Args:
        pattern: which keys a query sees. For a `PerHead` heads are its own.
        space: the axes of the queries.
        batch, heads, kv_heads, head_dim, value_dim, dtype: of the tensors; kv_heads None takes heads, value_dim None
            takes head_dim.
        query_tile, key_tile: tokens along each axis of the tiles of the bound; None takes tiles of about 64 tokens.
            A selection is bounded by its own blocks.

    >>> from saccade.ops import Neighborhood
    >>> cost = pattern_cost(Neighborhood(7), (56, 56), heads=4, head_dim=32)
    >>> cost.flops == 4 * 56**2 * 7**2 * 4 * 32, cost.bound.flops
    (True, 64.0)
    """
    if isinstance(pattern, PerHead):
        heads = len(pattern.patterns)
    value_dim = head_dim if value_dim is None else value_dim
    kv_heads = heads if kv_heads is None else kv_heads
    check_positive(batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim)
    side = round(TILE_TOKENS ** (1 / max(1, len(space))))
    tiles = (query_tile or side, key_tile or side)
    queries, keys = prod(space), prod(pattern.key_space(space))
    found = [(_count(part, space, len(mine), batch, tiles), len(mine)) for part, mine in _by_head(pattern, heads)]
    pairs, computed = (sum(counts[number] for (counts, _), _ in found) for number in (0, 1))
    moved = batch * (queries * heads + keys * kv_heads) * (head_dim + value_dim)
    flops = 2 * pairs * (head_dim + value_dim)
    return Cost(pairs, computed, flops, moved * dtype.itemsize, _mean([(bound, n) for (_, bound), n in found]))


def _by_head(pattern: Pattern, heads: int) -> list[tuple[Pattern, list[int]]]:
    return pattern.by_pattern() if isinstance(pattern, PerHead) else [(pattern, list(range(heads)))]


def _count(
    pattern: Pattern, space: tuple[int, ...], heads: int, batch: int, tiles: tuple[int | tuple[int, ...], ...]
) -> tuple[tuple[int, int], TileBound]:
    """Pairs that may attend and that are computed, over images and heads, and the bound."""
    if isinstance(pattern, StaticPattern):
        computed = sum(each.query.numel() * each.key.shape[1] for each in pattern.plan(space).groups)
        counts = (pattern.num_visible(space), computed)
        return (counts[0] * batch * heads, counts[1] * batch * heads), tile_bound(pattern, space, *tiles)
    if isinstance(pattern, SelectionUnion):
        parts = [_count(part, space, heads, batch, tiles) for part in pattern.parts()]
        visited, most = (sum(1 / bound[number] for _, bound in parts) for number in (1, 2))
        pairs, computed = (sum(counts[number] for counts, _ in parts) for number in (0, 1))
        every = batch * heads * prod(space) * prod(pattern.key_space(space))
        return (pairs, computed), TileBound(_over(every, pairs), _over(1, visited), _over(1, most))
    if not isinstance(pattern, Selection):
        raise InputError(f"a {type(pattern).__name__} does not say what it computes")
    return _count_selection(pattern, space, heads, batch)


def _count_selection(
    selection: Selection, space: tuple[int, ...], heads: int, batch: int
) -> tuple[tuple[int, int], TileBound]:
    """Of the blocks that are listed; a cut inside them is counted exactly, image by image."""
    shape = selection.blocks.shape
    if shape[0] not in (1, batch) or shape[1] not in (1, heads):
        raise InputError(f"the selection is for {shape[0]} images and {shape[1]} heads, not for {batch} and {heads}")
    repeats = batch * heads // (shape[0] * shape[1])
    pairs = selection.pairs(space)
    sizes = [_block_sizes(order) for order in selection.block_shapes(space)]
    pairs_of_tokens = (pairs * (sizes[0][:, None] * sizes[1]).to(pairs.device)).sum()
    seen = pairs_of_tokens if selection.within is None else selection.mask(space).sum()
    rows = pairs.sum(-1)
    every = prod(space) * prod(selection.key_space(space)) * batch * heads
    bound = TileBound(
        _over(every, int(seen) * repeats),
        _over(pairs.numel(), int(rows.sum())),
        _over(pairs.shape[-1], int(rows.max())),
    )
    return (int(seen) * repeats, int(pairs_of_tokens) * repeats), bound


def _block_sizes(order: torch.Tensor) -> torch.Tensor:
    return (order >= 0).sum(1)


def _mean(bounds: list[tuple[TileBound, int]]) -> TileBound:
    """The bound of heads that run one after the other: times add up."""
    heads = sum(count for _, count in bounds)
    flops, mean = (_over(heads, sum(count / bound[number] for bound, count in bounds)) for number in (0, 1))
    return TileBound(flops, mean, min(bound.slowest for bound, _ in bounds))


def _over(every: float, visited: float) -> float:
    return every / visited if visited else inf
