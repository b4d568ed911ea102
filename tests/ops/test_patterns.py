"""Patterns against derivations written anew from the papers' formulas; then what the papers claim; then errors."""

from functools import reduce
from itertools import product
from math import prod

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from saccade.errors import InputError
from saccade.ops import (
    BlockDiffusion,
    Causal,
    Complement,
    Documents,
    ElasticSpan,
    Global,
    GlobalTokens,
    Grid,
    Halo,
    Intersection,
    Neighborhood,
    Sinks,
    SlidingWindow,
    Union,
    Window,
)
from tests.ops.cases import CASES, IDS, patterns

# One axis at a time, (queries, keys) booleans; a key is visible when it is visible on every axis


def global_axis(length):
    return np.ones((length, length), bool)


def window_axis(length, window_size, shift, ragged, causal):
    """Cut the tokens before every number that is the shift, modulo the window."""
    window = np.cumsum([x % window_size == shift for x in range(length)])
    see = window[:, None] == window
    return np.tril(see) if causal else see


def grid_axis(length, grid_size, ragged):
    """Rows of grid_size runs of equal length (the last may be short): a column is a grid."""
    run = -(-length // grid_size)
    column = [x for _ in range(grid_size) for x in range(run)][:length]
    return np.equal.outer(column, column)


def halo_axis(length, block_size, halo_size, padded, query_stride, ragged):
    """Blocks of the keys' axis, enlarged; the strided queries are then picked from all of them."""
    keys = length * query_stride
    see = np.zeros((keys, keys + 2 * halo_size), bool)
    for first in range(0, keys, block_size):
        see[first : first + block_size, first : first + block_size + 2 * halo_size] = True
    see = see[::query_stride]
    return see if padded else see[:, halo_size : halo_size + keys]


def neighborhood_axis(length, window_size, stride, dilation, causal):
    """The definition of generalized neighborhood attention, pair by pair (arXiv:2504.16922)."""
    see = np.zeros((length, length), bool)
    left, right = window_size // 2, window_size // 2 + (window_size % 2 - 1)
    for x, y in product(range(length), repeat=2):
        group = x % dilation
        if y % dilation != group:
            continue
        i, j = x // dilation, y // dilation
        last = length // dilation + (1 if group < length % dilation else 0) - 1
        if causal:
            leader = min(i // stride * stride + stride - 1, last)
            start, end = max(leader - window_size + 1, 0), min(i + 1, last + 1)
        else:
            leader = min(i // stride * stride + stride // 2, last)
            inwards = last + 1 - right - leader - 1 if leader + right > last else 0
            start = max(leader - left, 0) + inwards
            end = start + window_size
        see[x, y] = start <= j < end
    return see


def sliding_axis(length, before, after, dilation):
    """Pair by pair: the distance in steps."""
    see = np.zeros((length, length), bool)
    for x, y in product(range(length), repeat=2):
        see[x, y] = (y - x) % dilation == 0 and -before <= (y - x) // dilation <= after
    return see


def elastic_axis(length, alpha, beta, block_size):
    """Pair by pair: the distance in blocks."""
    span = max(1, int(alpha // block_size + beta * -(-length // block_size)))
    see = np.zeros((length, length), bool)
    for x, y in product(range(length), repeat=2):
        see[x, y] = abs(x // block_size - y // block_size) < span
    return see


AXIS = {
    ElasticSpan: elastic_axis,
    Global: global_axis,
    Window: window_axis,
    Grid: grid_axis,
    Halo: halo_axis,
    Neighborhood: neighborhood_axis,
    SlidingWindow: sliding_axis,
}


def causal_map(tokens, block_size):
    return np.kron(np.tri(-(-tokens // block_size)), np.ones((block_size, block_size)))[:tokens, :tokens]


def documents_map(tokens, lengths):
    see = np.zeros((tokens, tokens))
    for start, length in zip(np.cumsum([0, *lengths]), lengths):
        see[start : start + length, start : start + length] = 1
    return see


def global_tokens_map(tokens, numbers):
    see = np.zeros((tokens, tokens))
    for number in numbers:
        see[number] = see[:, number] = 1
    return see


def sinks_map(tokens, count):
    see = np.zeros((tokens, tokens))
    see[:, :count] = 1
    return see


def block_diffusion_map(tokens, block_size, clean):
    """Four quarters: noised and clean queries, noised and clean keys."""
    half = tokens // 2
    causal = causal_map(half, block_size)
    before = causal - np.kron(np.eye(-(-half // block_size)), np.ones((block_size, block_size)))[:half, :half]
    later = causal if clean == "block" else np.tri(half)
    return np.block([[causal - before, before], [np.zeros((half, half)), later]])


MAP = {Causal: causal_map, Documents: documents_map, Sinks: sinks_map, BlockDiffusion: block_diffusion_map}
SETS = {Union: torch.logical_or, Intersection: torch.logical_and}


def options_of(pattern, axis):
    return {name: value[axis] if isinstance(value, tuple) else value for name, value in vars(pattern).items()}


def derive_mask(pattern, space):
    """From one axis at a time, from the map in row-major order, or from the parts."""
    if type(pattern) in SETS:
        return reduce(SETS[type(pattern)], (derive_mask(part, space) for part in pattern.parts))
    if isinstance(pattern, Complement):
        return torch.logical_not(derive_mask(pattern.part, space))
    if isinstance(pattern, GlobalTokens):
        return torch.tensor(global_tokens_map(prod(space), pattern.tokens)).bool()
    if type(pattern) in MAP:
        return torch.tensor(MAP[type(pattern)](prod(space), **vars(pattern))).bool()
    axes = [AXIS[type(pattern)](length, **options_of(pattern, axis)) for axis, length in enumerate(space)]
    return torch.tensor(reduce(np.kron, axes))


@pytest.mark.parametrize(("pattern", "space"), CASES, ids=IDS)
def test_mask_is_the_definition_in_telling_cases(pattern, space):
    assert torch.equal(pattern.mask(space), derive_mask(pattern, space))


@given(patterns())
def test_mask_is_the_definition(case):
    pattern, space = case
    assert torch.equal(pattern.mask(space), derive_mask(pattern, space))


# Windows


def swin_mask(length, size, shift):
    """Swin's own way: roll the map, cut it evenly, and keep apart what the roll brought together."""
    rolled = torch.arange(length).roll(-shift)
    region = torch.zeros(length)
    region[length - size :] = 1
    region[length - shift :] = 2
    window = torch.arange(length) // size
    alike = (window[:, None] == window) & (region[:, None] == region)
    mask = torch.empty_like(alike)
    mask[rolled[:, None], rolled] = alike
    return mask


@given(size=st.integers(2, 7), windows=st.integers(1, 4), data=st.data())
def test_shifted_windows_are_those_of_swins_cyclic_shift(size, windows, data):
    shift = data.draw(st.integers(1, size - 1))
    assert torch.equal(Window(size, shift=shift).mask((size * windows,)), swin_mask(size * windows, size, shift))


def test_windows_of_an_image_are_its_reshape():
    number = torch.arange(6 * 8).view(6, 8)
    windows = number.view(2, 3, 4, 2).transpose(1, 2).reshape(-1, 6)  # MaxViT's and Swin's partition
    mask = torch.zeros(48, 48, dtype=torch.bool)
    for window in windows:
        mask[window[:, None], window] = True
    assert torch.equal(Window((3, 2)).mask((6, 8)), mask)


def test_grids_of_an_image_are_its_transposed_reshape():
    number = torch.arange(6 * 8).view(6, 8)
    grids = number.view(3, 2, 2, 4).permute(1, 3, 0, 2).reshape(-1, 6)  # MaxViT: 3 x 2 grids, tokens 2 and 4 apart
    mask = torch.zeros(48, 48, dtype=torch.bool)
    for grid in grids:
        mask[grid[:, None], grid] = True
    assert torch.equal(Grid((3, 2)).mask((6, 8)), mask)


# Halo


def test_halo_blocks_see_what_unfold_gathers_from_the_padded_map():
    block, halo, height, width = 4, 2, 8, 12
    number = torch.arange(1, height * width + 1.0).view(1, 1, height, width)
    regions = F.unfold(F.pad(number, [halo] * 4), block + 2 * halo, stride=block)[0].T  # (blocks, region), 0 outside
    mask = Halo(block, halo).mask((height, width))
    for query in range(height * width):
        row, column = divmod(query, width)
        region = regions[row // block * (width // block) + column // block]
        assert (mask[query].nonzero().flatten() + 1).tolist() == region[region > 0].int().tolist()


def test_padded_halo_is_halo_between_keys_outside_the_map():
    assert Halo(4, 3, padded=True).key_space((8, 12)) == (14, 18)
    inner = Halo(4, 3, padded=True).mask((8, 12)).view(96, 14, 18)[:, 3:-3, 3:-3]
    assert torch.equal(inner.flatten(1), Halo(4, 3).mask((8, 12)))
    assert (Halo(4, 3, padded=True).mask((8, 12)).sum(1) == 10 * 10).all()


def test_halo_positions_count_inside_the_region_as_halonets_tables_do():
    """Row j - i + win - 1 of the table: j in the region, i in the block of kept queries (HaloNet; timm)."""
    block, halo, stride = 4, 1, 2
    pattern = Halo(block, halo, padded=True, query_stride=stride)
    offset, mask = pattern.offset((6,))[0], pattern.mask((6,))
    for query in range(6):
        i = query % (block // stride)
        assert offset[query][mask[query]].tolist() == [j - i for j in range(block + 2 * halo)]
    assert torch.equal(Halo(block, halo, query_stride=stride).offset((6,))[0], offset[:, halo:-halo])


@given(blocks=st.integers(2, 5), block=st.integers(1, 5), halo=st.integers(0, 3))
def test_halo_without_a_halo_is_window_and_with_one_block_global(blocks, block, halo):
    assert torch.equal(Halo(block, 0).mask((blocks * block,)), Window(block).mask((blocks * block,)))
    assert Halo(block, halo).sees_all((block,))


# Neighborhood: claims of its papers


@given(data=st.data(), window=st.integers(1, 9), dilation=st.integers(1, 3))
def test_every_query_sees_as_many_keys_and_a_stride_group_sees_alike(data, window, dilation):
    stride = data.draw(st.integers(1, window))
    length = data.draw(st.integers(window * dilation, window * dilation + 20))
    mask = Neighborhood(window, stride=stride, dilation=dilation).mask((length,))
    assert (mask.sum(1) == window).all()
    for x, y in product(range(length), repeat=2):
        if x % dilation == y % dilation and x // dilation // stride == y // dilation // stride:
            assert torch.equal(mask[x], mask[y])


@given(data=st.data(), window=st.integers(1, 7))
def test_a_causal_axis_shows_no_later_key_and_always_the_query_itself(data, window):
    stride = data.draw(st.integers(1, window))
    length = data.draw(st.integers(window, 20))
    mask = Neighborhood(window, stride=stride, causal=True).mask((length,))
    assert not mask.triu(1).any()
    assert mask.diagonal().all()
    if stride == window and length % window == 0:  # block-causal
        assert torch.equal(mask, Window(window).mask((length,)).tril())


def test_causal_axes_leave_the_others_free():
    mask = Neighborhood((3, 3, 3), causal=(True, False, False)).mask((4, 3, 3))
    assert torch.equal(mask, torch.kron(Neighborhood(3, causal=True).mask((4,)), torch.ones(9, 9, dtype=torch.bool)))


def test_number_of_queries_that_see_a_key():
    """Maximum 3r + 1 beside the borders, where windows are shifted inwards (arXiv:2403.04690, r = 3)."""
    seen_by = Neighborhood(7).mask((20,)).sum(0).tolist()
    assert seen_by == [4, 5, 6, 7, 8, 9, 10, 7, 7, 7, 7, 7, 7, 10, 9, 8, 7, 6, 5, 4]


def test_an_even_window_has_one_more_token_on_the_left():
    assert Neighborhood(4).mask((9,))[4].nonzero().flatten().tolist() == [2, 3, 4, 5]


@given(window=st.integers(1, 8), blocks=st.integers(1, 4))
def test_stride_of_the_window_is_blocked_attention(window, blocks):
    expected = Window(window).mask((window * blocks,))
    assert torch.equal(Neighborhood(window, stride=window).mask((window * blocks,)), expected)


@given(length=st.integers(1, 12), data=st.data())
def test_limits_of_the_window(length, data):
    stride = data.draw(st.integers(1, length))
    assert Neighborhood(length, stride=stride).sees_all((length,))
    assert torch.equal(Neighborhood(1).mask((length,)), torch.eye(length, dtype=torch.bool))
    assert torch.equal(Neighborhood(length, causal=True).mask((length,)), torch.ones(length, length).tril().bool())


@given(dilation=st.integers(2, 4), window=st.integers(1, 4), more=st.integers(0, 9), causal=st.booleans())
def test_dilation_is_the_same_attention_on_each_interleaved_map(dilation, window, more, causal):
    length = dilation * window + more
    mask = Neighborhood(window, dilation=dilation, causal=causal).mask((length,))
    for group in range(dilation):
        own = mask[group::dilation]
        alone = Neighborhood(window, causal=causal).mask((len(own),))
        assert torch.equal(own[:, group::dilation], alone)
        assert own.sum() == alone.sum()


@pytest.mark.parametrize("block", [3, 4])
def test_neighborhood_sees_what_halo_sees_in_blocks_inside_the_map(block):
    halo, blocks = 2, 5
    gna = Neighborhood(block + 2 * halo, stride=block).mask((block * blocks,))
    inner = slice(block, -block)
    assert torch.equal(gna[inner], Halo(block, halo).mask((block * blocks,))[inner])
    assert (gna[:block].sum(1) == block + 2 * halo).all()  # at the border it is shifted inwards instead


# Options


def test_options_may_be_lists_as_a_configuration_file_gives_them():
    pair = Neighborhood([3, 5], stride=[1, 2], causal=[True, False])
    assert torch.equal(pair.mask((5, 7)), Neighborhood((3, 5), stride=(1, 2), causal=(True, False)).mask((5, 7)))


@pytest.mark.parametrize(
    ("pattern", "space", "message"),
    [
        (Window(4), (8, 10), "window_size is 4 and axis 1 has 10 tokens, .* Resize or pad the map to 12"),
        (Window(4, shift=4), (8,), "shift is 4 and window_size is 4 on axis 0: take a shift of 0 to 3"),
        (Window(4, shift=-1), (8,), "shift is -1 .* take a shift of 0 to 3"),
        (Window((4, 4)), (8,), r"window_size is \(4, 4\): the map has 1 axes. Give one value, or 1"),
        (Window(4), (), r"space is \(\): a pattern needs at least one axis. Give"),
        (Grid(4), (10,), "grid_size is 4 and axis 0 has 10 tokens, .* pad the map to 12, .* or set ragged=True"),
        (Halo(4, 1), (10,), "block_size / query_stride is 4 and axis 0 has 10 tokens"),
        (Halo(4, -1), (8,), "halo_size is -1 on axis 0: give 0 or more tokens"),
        (Halo(3, 1, query_stride=2), (6,), "query_stride is 2 and block_size is 3 on axis 0: the stride must divide"),
        (Neighborhood(3, stride=4), (9,), "stride is 4 and window_size is 3 on axis 0: take a stride of 1 to 3"),
        (Neighborhood(9), (10, 8), "window_size 9 with dilation 1 spans 9 tokens, but axis 1 has 8: .* at most 8$"),
        (Neighborhood(3, dilation=4), (10,), "spans 12 tokens, but axis 0 has 10: .* at most 2, or a dilation of at"),
    ],
)
def test_a_space_that_cannot_be_served(pattern, space, message):
    with pytest.raises(InputError, match=message):
        pattern.key_space(space)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(0), "window_size is 0: give an integer of at least 1, or one for each axis"),
        (lambda: Window(2.5), "window_size is 2.5: give an integer"),
        (lambda: Grid((2, 0)), r"grid_size is \(2, 0\): give an integer"),
        (lambda: Halo(0, 1), "block_size is 0: give an integer"),
        (lambda: Halo(2, 1, query_stride=0), "query_stride is 0: give an integer"),
        (lambda: Neighborhood(3, dilation=0), "dilation is 0: give an integer"),
        (lambda: Neighborhood(3, stride=-1), "stride is -1: give an integer"),
    ],
)
def test_sizes_that_make_no_pattern(make, message):
    with pytest.raises(InputError, match=message):
        make()
