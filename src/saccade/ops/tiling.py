"""What sparsity is worth to a kernel that skips whole tiles (the simulator of generalized neighborhood attention, 2025,
arXiv:2504.16922; the authors' own is announced, and this is its published definition)."""

from math import inf, prod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from saccade.errors import InputError
from saccade.ops.check import check_positive, per_axis
from saccade.ops.pattern import AxialPattern, Ranges, StaticPattern
from saccade.ops.selection import block_order, num_blocks, token_slots

__all__ = ["TileBound", "tile_bound"]


class TileBound(NamedTuple):
    """How many times faster than dense attention a pattern can be at most.

    Attributes:
        flops: pairs of query and key, over the pairs that may attend: what no kernel can beat.
        mean: pairs of tiles, over the pairs of tiles that must be visited: the bound of a kernel of such tiles.
        slowest: the same for the query tile that must visit most, on which a kernel that runs all at once waits.
    """

    flops: float
    mean: float
    slowest: float


def tile_bound(
    pattern: StaticPattern,
    space: tuple[int, ...],
    query_tile: int | tuple[int, ...],
    key_tile: int | tuple[int, ...],
    *,
    dynamic: bool = False,
) -> TileBound:
    """Bound the speed-up of a pattern over dense attention, for a kernel that skips whole tiles of keys.

    A tile of queries visits every tile that touches the span of its queries' keys. Tokens of different residue (dilated
    windows, grids) never meet and are tiled apart, as if each residue were a map of its own. Under a composed pattern a
    tile is visited if any of its keys is seen, and all tiles lie on a fixed grid.

    Args:
        pattern: which keys a query sees.
        space: the axes of the queries.
        query_tile: queries of a tile along each axis, one number or one for each.
        key_tile: keys of a tile, likewise.
        dynamic: let key tiles start at the first key of the span; otherwise they lie on a fixed grid.

    Returns: TileBound, exact and without forming the mask. Where nothing is seen the bounds are infinite.
    Raises: InputError if the pattern cannot serve `space`, a tile is not positive, or dynamic tiles are asked of a
        composed pattern.

    >>> from saccade.ops import Neighborhood
    >>> tile_bound(Neighborhood(12, stride=1), (24, 24), 4, 4)
    TileBound(flops=4.0, mean=2.25, slowest=1.44)
    """
    check_positive(query_tile=query_tile, key_tile=key_tile)
    axes = len(space)
    query_tile, key_tile = per_axis("query_tile", query_tile, axes), per_axis("key_tile", key_tile, axes)
    keys = pattern.key_space(space)
    if not isinstance(pattern, AxialPattern):
        if dynamic:
            raise InputError(f"dynamic is True and the pattern is {pattern}: tiles move with a separable pattern alone")
        counts = _look(pattern, space, keys, query_tile, key_tile)
        every = num_blocks(keys, key_tile)
        pairs = pattern.num_visible(space)
        return TileBound(
            flops=prod(space) * prod(keys) / pairs if pairs else inf,
            mean=len(counts) * every / sum(counts) if pairs else inf,
            slowest=every / max(counts) if pairs else inf,
        )
    visited = [_visited(*axis, dynamic) for axis in zip(pattern.all_ranges(space), query_tile, key_tile)]
    query_tiles = prod(-(-length // tile) for length, tile in zip(space, query_tile))
    key_tiles = prod(-(-length // tile) for length, tile in zip(keys, key_tile))
    return TileBound(
        flops=prod(space) * prod(keys) / pattern.num_visible(space),
        mean=query_tiles * key_tiles / prod(int(each.sum()) for each in visited),
        slowest=key_tiles / prod(int(each.max()) for each in visited),
    )


def _look(
    pattern: StaticPattern,
    space: tuple[int, ...],
    keys: tuple[int, ...],
    query_tile: tuple[int, ...],
    key_tile: tuple[int, ...],
) -> list[int]:
    """Key tiles that each query tile visits."""
    cpu = torch.device("cpu")
    order = block_order(keys, key_tile, cpu)
    tile_of_key = token_slots(order, keys) // order.shape[1]
    counts = []
    for queries in block_order(space, query_tile, cpu):
        queries = queries[queries >= 0]
        candidates = torch.from_numpy(pattern.reach(space, queries.numpy()))
        seen = pattern.sees(space, queries[:, None], candidates).any(0)
        counts.append(len(tile_of_key[candidates[seen]].unique()))
    return counts


def _visited(ranges: Ranges, query_tile: int, key_tile: int, dynamic: bool) -> NDArray[np.int64]:
    """Key tiles along one axis that each of its query tiles visits."""
    first, last = ranges.start // ranges.step, (ranges.stop - 1) // ranges.step  # counted within the residue
    residue = ranges.start % ranges.step
    counts = []
    for each in np.unique(residue):
        queries = np.flatnonzero(residue == each)
        tiles = np.arange(0, len(queries), query_tile)
        a, b = np.minimum.reduceat(first[queries], tiles), np.maximum.reduceat(last[queries], tiles)
        counts.append((b - a) // key_tile + 1 if dynamic else b // key_tile - a // key_tile + 1)
    return np.concatenate(counts)
