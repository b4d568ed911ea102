"""tile_bound: the closed form against tiles counted in the mask, then errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.errors import InputError
from saccade.ops import Global, Grid, Halo, Neighborhood, Window, tile_bound


def count_tiles(pattern, space, query_tile, key_tile):
    """Mean and slowest bound from the mask: every residue's queries and keys are tiled by themselves."""
    tiles = [
        tile_axis(pattern.ranges(axis, len(space), length), query_tile[axis], key_tile[axis])
        for axis, length in enumerate(space)
    ]
    query, key = (number_tiles([pair[side] for pair in tiles]) for side in (0, 1))
    visited = torch.zeros(int(query.max()) + 1, int(key.max()) + 1, dtype=torch.bool)
    rows, columns = pattern.mask(space).nonzero().T
    visited[query[rows], key[columns]] = True
    dense_queries, dense_keys = (
        torch.tensor([-(-length // tile) for length, tile in zip(lengths, sizes)]).prod().item()
        for lengths, sizes in ((space, query_tile), (pattern.key_space(space), key_tile))
    )
    return dense_queries * dense_keys / visited.sum().item(), dense_keys / visited.sum(1).max().item()


def tile_axis(ranges, query_tile, key_tile):
    """The tile of every query and of every key along one axis."""
    numbers = []
    for residue, tile in (
        (torch.as_tensor(ranges.start) % ranges.step, query_tile),
        (torch.arange(ranges.keys) % ranges.step, key_tile),
    ):
        names = {}
        seen = torch.zeros(ranges.step, dtype=torch.long)
        number = []
        for each in residue.tolist():
            number.append(names.setdefault((each, int(seen[each]) // tile), len(names)))
            seen[each] += 1
        numbers.append(torch.tensor(number))
    return numbers


def number_tiles(per_axis):
    total = torch.zeros(1, dtype=torch.long)
    for numbers in per_axis:
        total = (total[:, None] * (int(numbers.max()) + 1) + numbers).flatten()
    return total


@given(data=st.data(), axes=st.integers(1, 2))
def test_closed_form_counts_what_the_mask_shows(data, axes):
    space = tuple(data.draw(st.integers(2, 14)) for _ in range(axes))
    window = tuple(data.draw(st.integers(1, length)) for length in space)
    dilation = tuple(data.draw(st.integers(1, length // w)) for length, w in zip(space, window))
    stride = tuple(data.draw(st.integers(1, w)) for w in window)
    causal = tuple(data.draw(st.booleans()) for _ in space)
    pattern = Neighborhood(window, stride, dilation, causal)
    tiles = [tuple(data.draw(st.integers(1, 6)) for _ in space) for _ in range(2)]
    bound = tile_bound(pattern, space, *tiles)
    assert (bound.mean, bound.slowest) == pytest.approx(count_tiles(pattern, space, *tiles))
    assert bound.flops == pytest.approx(pattern.mask(space).numel() / pattern.mask(space).sum().item())


@pytest.mark.parametrize(
    "pattern", [Global(), Grid(3), Window(4, shift=2), Halo(4, 2), Halo(4, 1, padded=True), Halo(4, 2, query_stride=2)]
)
def test_other_patterns(pattern):
    bound = tile_bound(pattern, (12, 12), (3, 2), 4)
    assert (bound.mean, bound.slowest) == pytest.approx(count_tiles(pattern, (12, 12), (3, 2), (4, 4)))


def test_tiles_of_one_token_reach_the_bound_by_flops():
    bound = tile_bound(Neighborhood(5, dilation=2), (13, 11), 1, 1)
    assert bound.mean == pytest.approx(bound.flops)
    assert bound.slowest == pytest.approx(bound.flops)


@given(window=st.integers(1, 20), tile=st.integers(1, 8))
def test_tiles_that_move_with_the_window_never_visit_more(window, tile):
    fixed, moving = (tile_bound(Neighborhood(window), (40,), 4, tile, dynamic=dynamic) for dynamic in (False, True))
    assert moving.mean >= fixed.mean
    assert moving.slowest >= fixed.slowest


def test_errors():
    with pytest.raises(InputError, match="key_tile is 0: give an integer of at least 1"):
        tile_bound(Neighborhood(3), (8,), 4, 0)
    with pytest.raises(InputError, match=r"query_tile is \(4, 4\): the map has 1 axes"):
        tile_bound(Neighborhood(3), (8,), (4, 4), 4)
    with pytest.raises(InputError, match="take a window of at most 8"):
        tile_bound(Neighborhood(9), (8,), 4, 4)
