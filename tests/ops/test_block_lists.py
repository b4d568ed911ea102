"""block_lists: tiles and lists say what the mask says, in both directions; tile_shape."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.ops import Causal, Neighborhood, Window
from saccade.ops.block_lists import block_lists, kernel_lists, tile_shape
from tests.ops.cases import CASES, IDS, patterns


def unfold(lists, queries, keys, by_key=False):
    """The (N, M) mask that the lists describe; every visit is counted."""
    count = torch.zeros(queries + 1, keys + 1, dtype=torch.long)  # the last row and column take what is outside
    for tile in range(len(lists.blocks)):
        for entry in range(int(lists.visits[tile])):
            other = int(lists.blocks[tile, entry])
            rows, columns = (lists.query[other], lists.key[tile]) if by_key else (lists.query[tile], lists.key[other])
            full = entry < int(lists.full[tile])
            seen = torch.ones(len(rows), len(columns)) if full else lists.masks[lists.mask[tile, entry]]
            seen = seen.T if by_key and not full else seen
            if full:
                assert (columns >= 0).all()  # kernels look at no mask there
            count[rows[:, None], columns] += seen.long()
    return count[:-1, :-1]


def check(pattern, space, query_tile, key_tile):
    lists = block_lists(pattern, space, query_tile, key_tile)
    keys = pattern.key_space(space)
    for order, axes in ((lists.query, space), (lists.key, keys)):
        assert sorted(order[order >= 0].tolist()) == list(range(prod(axes)))
    mask = pattern.mask(space).long()
    assert torch.equal(unfold(lists, prod(space), prod(keys)), mask)
    assert torch.equal(unfold(lists.transposed(), prod(space), prod(keys), by_key=True), mask)


@pytest.mark.parametrize(("pattern", "space"), CASES, ids=IDS)
def test_lists_are_the_mask_in_telling_cases(pattern, space):
    check(pattern, space, 16, 8)


@given(patterns(max_tokens=100), st.sampled_from([4, 16, 32]), st.sampled_from([4, 16, 32]))
def test_lists_are_the_mask(case, query_tile, key_tile):
    check(*case, query_tile, key_tile)


def test_windows_that_fit_a_tile_are_tiles():
    lists = block_lists(Window(7), (28, 28), 64, 64)
    assert lists.blocks.shape == (16, 1)
    assert len(lists.masks) == 1  # 49 of 64 keys


def test_a_dilated_neighborhood_is_as_sparse_as_one_of_the_smaller_map():
    dilated = block_lists(Neighborhood(7, dilation=2), (64, 64))
    plain = block_lists(Neighborhood(7), (32, 32))
    assert dilated.visits.sum() == 4 * plain.visits.sum()


def test_large_tiles_are_taken_where_they_see_little_more():
    assert kernel_lists(Causal(), (4096,)).query.shape[1] == 128
    assert kernel_lists(Neighborhood(16), (64, 64)).query.shape[1] == 64
    assert kernel_lists(Window(8), (32, 32)).query.shape[1] == 64


@pytest.mark.parametrize("tokens", [16, 32, 64, 128])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_tiles_have_as_many_tokens_as_asked(tokens, axes):
    assert prod(tile_shape(tokens, axes)) == tokens
