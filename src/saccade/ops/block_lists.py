"""Which tiles of keys each tile of queries visits: what block-sparse kernels (Triton, FlexAttention) run on.

Tokens are taken in tiles that lie close together on the map (token permutation, as in generalized neighborhood
attention, 2025, arXiv:2504.16922): a tile of 8 x 8 tokens sees far fewer tiles than one of 64 tokens in a row. Tokens
of different residue (dilated windows, grids) never meet, and are tiled apart.
"""

from math import prod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saccade.ops.check import check_positive
from saccade.ops.pattern import AxialPattern, Ranges, Space, StaticPattern

__all__ = ["BlockLists", "block_lists", "kernel_lists", "tile_shape"]


QUERY_TILES, KEY_TILE = (64, 128), 64  # tokens of the tiles of the Triton kernels
LARGE_TILE_COST = 0.95  # of a pair in a large tile over one in a small tile, on an H200: 0.86 without masks, 1.0 with


class BlockLists(NamedTuple):
    """Tiles of queries and of keys, and which of them meet; built on the CPU.

    Attributes:
        query, key: (T, Q) and (S, K) numbers of the tokens in each tile, -1 where a tile is not full.
        blocks: (T, most) key tiles that each query tile visits: first those that it sees whole, then the others.
        full, visits: (T,) how many it sees whole, and how many in all.
        mask: (T, most) for the others, which of `masks` says what is visible.
        masks: (U, Q, K) booleans, each different one once.
    """

    query: Tensor
    key: Tensor
    blocks: Tensor
    full: Tensor
    visits: Tensor
    mask: Tensor
    masks: Tensor

    def transposed(self) -> "BlockLists":
        """For each key tile the query tiles that visit it; masks are (U, K, Q)."""
        tile = torch.arange(len(self.blocks)).unsqueeze(1).expand_as(self.blocks)
        entry = torch.arange(self.blocks.shape[1]).expand_as(self.blocks)
        used = entry < self.visits.unsqueeze(1)
        whole = (entry < self.full.unsqueeze(1))[used]
        tile, block, mask = tile[used], self.blocks[used], self.mask[used]
        # by key tile, the whole ones first
        order = (block * 2 + ~whole).argsort(stable=True)
        tile, block, mask, whole = tile[order], block[order], mask[order], whole[order]
        count = torch.bincount(block, minlength=len(self.key))
        place = torch.arange(len(block)) - (count.cumsum(0) - count)[block]
        most = max(1, int(count.max()))
        blocks, masks = (torch.zeros(len(self.key), most, dtype=torch.long) for _ in range(2))
        blocks[block, place], masks[block, place] = tile, mask
        full = torch.bincount(block[whole], minlength=len(self.key))
        return self._replace(
            blocks=blocks, full=full, visits=count, mask=masks, masks=self.masks.transpose(1, 2).contiguous()
        )

    def to(self, device: torch.device | str) -> "BlockLists":
        """The same on a device, as kernels read it: 32-bit numbers and masks of bytes."""
        dtypes = (torch.uint8 if x.dtype == torch.bool else torch.int32 for x in self)
        return BlockLists(*(x.to(device, dtype).contiguous() for x, dtype in zip(self, dtypes, strict=True)))


def tile_shape(tokens: int, axes: int) -> tuple[int, ...]:
    """Sides of a tile of about as many tokens, a power of two, as even as possible.

    >>> tile_shape(128, 2), tile_shape(64, 3)
    ((8, 16), (4, 4, 4))
    """
    halvings = tokens.bit_length() - 1
    return tuple(2 ** ((halvings + axis) // axes) for axis in range(axes))


def kernel_lists(pattern: StaticPattern, space: Space) -> BlockLists:
    """The lists with which the Triton kernels are fastest.

    Larger tiles of queries read each tile of keys less often, and see more of what is hidden.
    """
    small, large = (pattern.block_lists(space, tile, KEY_TILE) for tile in QUERY_TILES)
    pairs = [int(lists.visits.sum()) * lists.query.shape[1] for lists in (small, large)]
    return large if LARGE_TILE_COST * pairs[1] <= pairs[0] else small


def block_lists(pattern: StaticPattern, space: Space, query_tile: int = 64, key_tile: int = 64) -> BlockLists:
    """Find the tiles and what they visit, without forming the N x M mask.

    Args:
        pattern: which keys a query sees.
        space: the axes of the queries.
        query_tile, key_tile: tokens of a tile, powers of two.
    """
    check_positive(query_tile=query_tile, key_tile=key_tile)
    keys = pattern.key_space(space)
    query, key = _tiles(pattern, space, space, query_tile), _tiles(pattern, space, keys, key_tile)
    place = np.zeros((2, prod(keys)), dtype=np.int64)  # tile and slot of every key
    tile, slot = np.nonzero(key >= 0)
    place[:, key[tile, slot]] = tile, slot
    rows: list[tuple[list[int], list[int], list[int]]] = []
    known: dict[bytes, int] = {}
    masks: list[NDArray[np.bool_]] = []
    for queries in query:
        inside = queries >= 0
        candidates = pattern.reach(space, queries[inside])
        seen = pattern.sees(space, torch.from_numpy(queries[inside])[:, None], torch.from_numpy(candidates)).numpy()
        candidates, seen = candidates[seen.any(0)], seen[:, seen.any(0)]
        visited, number = np.unique(place[0, candidates], return_inverse=True)
        dense = np.zeros((len(visited), key_tile, query_tile), dtype=bool)
        dense[number, place[1, candidates], : inside.sum()] = seen.T
        # queries past the end take whatever their tile takes: nobody reads them
        dense[:, :, inside.sum() :] = dense[:, :, :1]
        whole = dense.all((1, 2))
        numbers = []
        for each in np.ascontiguousarray(dense[~whole].swapaxes(1, 2)):
            text = each.tobytes()
            if text not in known:
                known[text] = len(masks)
                masks.append(each)
            numbers.append(known[text])
        rows.append((visited[whole].tolist(), visited[~whole].tolist(), numbers))
    most = max(1, *(len(whole) + len(others) for whole, others, _ in rows), 1)
    blocks, mask = (np.zeros((len(rows), most), dtype=np.int64) for _ in range(2))
    for number_of_row, (whole_blocks, others, numbers) in enumerate(rows):
        blocks[number_of_row, : len(whole_blocks) + len(others)] = whole_blocks + others
        mask[number_of_row, len(whole_blocks) : len(whole_blocks) + len(others)] = numbers
    full = np.array([len(whole) for whole, _, _ in rows])
    count = np.array([len(whole) + len(others) for whole, others, _ in rows])
    every = np.stack(masks) if masks else np.ones((1, query_tile, key_tile), dtype=bool)
    return BlockLists(*(torch.from_numpy(x) for x in (query, key, blocks, full, count, mask, every)))


def _tiles(pattern: StaticPattern, space: Space, axes: Space, tokens: int) -> NDArray[np.int64]:
    """(T, tokens) numbers of the tokens on `axes`, in tiles that lie close together, filled up with -1 at their end."""
    sides = tile_shape(tokens, len(axes))
    per_axis = []
    for axis, (length, side) in enumerate(zip(axes, sides)):
        ranges = pattern.ranges(axis, len(space), space[axis]) if isinstance(pattern, AxialPattern) else None
        per_axis.append(_cut(ranges, length, side, own=axes == space))
    numbers = np.zeros((1, 1), dtype=np.int64)
    for tiles, length in zip(per_axis, axes):
        outside = (numbers < 0)[:, None, :, None] | (tiles < 0)[None, :, None, :]
        joined = numbers[:, None, :, None] * length + tiles[None, :, None, :]
        numbers = np.where(outside, -1, joined).reshape(len(numbers) * len(tiles), -1)
    numbers = np.take_along_axis(numbers, np.argsort(numbers < 0, axis=1, kind="stable"), 1)
    return np.pad(numbers, ((0, 0), (0, tokens - numbers.shape[1])), constant_values=-1)


def _cut(ranges: Ranges | None, length: int, side: int, own: bool) -> NDArray[np.int64]:
    """(tiles, side) places along one axis: tokens of one residue, and of one block where whole blocks see alike."""
    places = np.arange(length)
    runs = [places]
    if ranges is not None:
        runs = [places[places % ranges.step == residue] for residue in range(min(ranges.step, length))]
        if own:
            blocks = [np.split(run, np.flatnonzero(np.diff(ranges.start[run])) + 1) for run in runs]
            if 2 * sum(map(len, blocks)) * side <= 3 * length:  # blocks nearly fill tiles of their own
                runs = [block for each in blocks for block in each]
    pieces = [run[first : first + side] for run in runs for first in range(0, len(run), side)]
    return np.stack([np.pad(piece, (0, side - len(piece)), constant_values=-1) for piece in pieces])
