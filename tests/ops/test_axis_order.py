"""Orders of the axes, how maps fall into blocks in them, and which blocks are kept: laws, then errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import (
    axis_orders,
    block_incoherence,
    choose_axis_order,
    select_mask,
    sparse_attention,
    static_blocks,
)


def make_weights(tokens, samples=2, heads=3):
    return torch.randn(samples, heads, tokens, tokens, dtype=torch.float64).softmax(-1)


def blocks_of(weights, size):
    """Every block of a matrix, by slicing."""
    starts = range(0, len(weights), size)
    return [[weights[i : i + size, j : j + size] for j in starts] for i in starts]


def sums_of_blocks(weights, size):
    """(heads, T, T), means over the samples."""
    return torch.stack(
        [torch.stack([torch.stack([b.sum() for b in r]) for r in blocks_of(w, size)]) for w in weights.mean(0)]
    )


# Orders


def test_orders_of_the_axes_are_all_there_are_and_begin_row_major():
    assert axis_orders(1) == [(0,)]
    assert axis_orders(2) == [(0, 1), (1, 0)]
    assert axis_orders(3)[0] == (0, 1, 2)
    assert len(set(axis_orders(3))) == 6


# Blocks


@given(tokens=st.integers(1, 13), size=st.integers(1, 15))
def test_incoherence_is_that_of_the_blocks_also_at_the_end(tokens, size):
    weights = make_weights(tokens, 1, 1)[0, 0]
    blocks = blocks_of(weights, size)
    uneven = [b.max() / b.mean() for row in blocks for b in row]
    assert_close(block_incoherence(weights, size), torch.stack(uneven).mean())


def test_blocks_of_zeros_are_even():
    assert block_incoherence(torch.zeros(2, 4, 4), 2).tolist() == [1, 1]


# Choosing an order


def make_head(space, axis):
    """Attention of every token to its own line along an axis."""
    places = torch.stack(torch.meshgrid(*map(torch.arange, space), indexing="ij")).flatten(1)
    others = torch.tensor([other for other in range(len(space)) if other != axis])
    alike = (places[others, :, None] == places[others, None, :]).all(0).double()
    return alike / alike.sum(-1, keepdim=True)


@pytest.mark.parametrize("space", [(4, 4), (4, 4, 4)], ids=str)
def test_a_head_that_looks_along_an_axis_gets_it_innermost(space):
    heads = torch.stack([make_head(space, axis) for axis in range(len(space))]).unsqueeze(0)
    choice = choose_axis_order(heads, space, block_size=4)
    orders = axis_orders(len(space))
    assert [orders[number][-1] for number in choice.order] == list(range(len(space)))
    count = torch.Size(space).numel() // 4
    best = choice.dense.gather(1, choice.order.unsqueeze(1)).squeeze(1)
    assert_close(best, torch.full_like(best, 1 / count))  # the diagonal alone
    assert (choice.dense >= best.unsqueeze(1)).all()


def test_balance_decides_between_empty_and_even_blocks():
    space, weights = (6, 6), make_weights(36)
    for balance, scores in ((1.0, "dense"), (0.0, "incoherence")):
        choice = choose_axis_order(weights, space, block_size=4, threshold=1.0, balance=balance)
        assert torch.equal(choice.order, getattr(choice, scores).argmin(1))


def test_scores_are_means_over_samples():
    weights = make_weights(12, 3)
    whole = choose_axis_order(weights, (3, 4), block_size=5, threshold=1.0)
    parts = [choose_axis_order(sample.unsqueeze(0), (3, 4), block_size=5, threshold=1.0) for sample in weights]
    assert_close(whole.dense, torch.stack([part.dense for part in parts]).mean(0))
    assert_close(whole.incoherence, torch.stack([part.incoherence for part in parts]).mean(0))


def test_with_nothing_to_choose_by_it_is_row_major_order():
    assert choose_axis_order(torch.full((1, 2, 8, 8), 1 / 8), (2, 4), block_size=4).order.tolist() == [0, 0]


# Keeping blocks


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
def test_as_many_blocks_as_asked_are_kept_and_they_are_the_fullest(density):
    weights = make_weights(20)
    kept = static_blocks(weights, 4, density=density)
    assert kept.flatten(1).sum(1).tolist() == [max(1, round(25 * density))] * 3
    sums = sums_of_blocks(weights, 4)
    for own, held in zip(kept, sums):
        assert own.all() or held[own].min() >= held[~own].max()


@pytest.mark.parametrize("mass", [0.1, 0.7, 1.0])
def test_the_mass_asked_for_is_reached_and_not_without_the_emptiest_kept(mass):
    weights = make_weights(20)
    sums = sums_of_blocks(weights, 4) / 20
    for own, held in zip(static_blocks(weights, 4, mass=mass), sums):
        assert held[own].sum() >= mass - 1e-12
        assert held[own].sum() - held[own].min() < mass


def test_a_smaller_block_at_the_end_stays_whole():
    kept = static_blocks(make_weights(18), 4, density=0.1)
    assert kept.shape == (3, 5, 5)
    assert kept[:, -1].all()
    assert kept[:, :, -1].all()
    assert kept[:, :-1, :-1].flatten(1).sum(1).max() <= 3


def test_the_engine_computes_with_kept_blocks():
    query, key, value = torch.randn(3, 2, 3, 18, 5, dtype=torch.float64)
    selection = select_mask(static_blocks(make_weights(18), 4, mass=0.4)[None], query_block=4, key_block=4, ragged=True)
    assert_close(*(sparse_attention(query, key, value, selection, impl=impl) for impl in ("auto", "reference")))


# Errors


def test_errors_say_what_to_give():
    weights = torch.ones(1, 1, 6, 6)
    with pytest.raises(InputError, match="axes is 0"):
        axis_orders(0)
    with pytest.raises(
        InputError, match=r"weights is \(1, 1, 6, 6\) and the map is \(2, 4\): give \(samples, heads, 8"
    ):
        choose_axis_order(weights, (2, 4))
    for options in ({"balance": 1.5}, {"threshold": -1}):
        with pytest.raises(InputError, match="give 0 to 1, and 0 or more"):
            choose_axis_order(weights, (2, 3), **options)
    for options in ({}, {"density": 0.5, "mass": 0.5}, {"density": 0.0}, {"mass": 1.1}):
        with pytest.raises(InputError, match="give one of them, above 0 and at most 1"):
            static_blocks(weights, 2, **options)
    with pytest.raises(InputError, match=r"give \(samples, heads, N, N\)"):
        static_blocks(weights[..., :3], 2, density=0.5)
    with pytest.raises(InputError, match="block_size is 0"):
        static_blocks(weights, 0, density=0.5)
