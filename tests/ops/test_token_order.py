"""Orders of tokens: permutations that are undone, neighbours that stay together, errors."""

from itertools import permutations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.errors import InputError
from saccade.ops import axis_order, gilbert_order, reorder, restore, tile_order

spaces = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


def steps(space):
    """(N - 1,) how far neighbours on the curve are apart, summed over the axes."""
    places = torch.stack(torch.unravel_index(gilbert_order(space), space))
    return places.diff().abs().sum(0)


@given(spaces, st.integers(1, 4))
def test_every_token_has_one_place(space, tile):
    for order in (gilbert_order(space), tile_order(space, tile), axis_order(space, tuple(range(len(space)))[::-1])):
        assert order.sort().values.tolist() == list(range(torch.Size(space).numel()))


@pytest.mark.parametrize("space", [*product((2, 4, 6, 8, 10), repeat=3), *product((2, 6, 14), repeat=2), (7,)], ids=str)
def test_neighbours_on_the_curve_are_neighbours_in_space(space):
    assert (steps(space) == 1).all()


@pytest.mark.parametrize("space", [*product(range(1, 12), repeat=2)], ids=str)
def test_on_a_plane_of_odd_length_at_most_one_step_is_diagonal(space):
    assert (steps(space) == 1).sum() >= torch.Size(space).numel() - 2
    assert (steps(space) <= 2).all()


def test_blocks_along_the_curve_are_rounder_than_rows():
    """64 tokens of a 64 x 64 map: their spread is that of an 8 x 8 square, and not that of a row."""
    places = torch.stack(torch.unravel_index(gilbert_order((64, 64)), (64, 64))).double()
    assert places.unflatten(1, (64, 64)).var(2).sum(0).max() < 2 * (2 * 63 / 12)


@given(spaces, st.integers(1, 4))
def test_tiles_are_whole(space, tile):
    order = tile_order(space, tile)
    places = torch.stack(torch.unravel_index(order, space)) // tile
    number = torch.zeros_like(order)
    for along, length in zip(places, space):
        number = number * -(-length // tile) + along
    assert (number.diff() >= 0).all()


def test_orders_of_axes_are_those_of_permuted_maps():
    space = (2, 3, 4)
    x = torch.randn(24, 5)
    for axes in permutations(range(3)):
        expected = x.view(*space, 5).permute(*axes, 3).flatten(0, 2)
        assert torch.equal(reorder(x, axis_order(space, axes)), expected)


def test_restoring_undoes_an_order_of_each_head_with_its_gradient():
    x = torch.randn(2, 3, 8, 5, requires_grad=True)
    order = torch.stack([torch.randperm(8) for _ in range(3)])
    moved = reorder(x, order)
    assert torch.equal(moved[1, 2, 4], x[1, 2, order[2, 4]])
    assert torch.equal(restore(moved, order), x)
    assert torch.equal(restore(reorder(x, order[0]), order[0]), x)
    upstream = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(moved, x, upstream)[0], restore(upstream, order))


def test_compiled_and_exported_the_curve_is_a_constant():
    def move(x):
        return reorder(x.flatten(1, 2), gilbert_order(tuple(x.shape[1:3]), x.device))

    class Move(torch.nn.Module):
        def forward(self, x):
            return move(x)

    x = torch.randn(2, 5, 6, 3)
    torch.compiler.reset()
    assert torch.equal(torch.compile(move, fullgraph=True, backend="aot_eager")(x), move(x))
    assert torch.equal(torch.export.export(Move(), (x + 1,)).module()(x), move(x))


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match=r"x is \(6, 2\) and order is torch.int64 \(5,\): give x \(..., N, D\)"):
        reorder(torch.zeros(6, 2), torch.arange(5))
    with pytest.raises(InputError, match="an order of N whole numbers"):
        restore(torch.zeros(6, 2), torch.arange(6.0))
    with pytest.raises(InputError, match=r"axes is \(0, 0\): give each axis of \(2, 3\) once, such as \(1, 0\)"):
        axis_order((2, 3), (0, 0))
    with pytest.raises(InputError, match="the curve fills one to three axes"):
        gilbert_order((2, 2, 2, 2))
    with pytest.raises(InputError, match=r"space is .*: give an integer of at least 1"):
        tile_order((0, 3), 2)
