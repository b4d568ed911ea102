"""GatedPositionalAttention: official positions pair by pair, where heads start, errors; the contract has the rest."""

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import GatedPositionalAttention


def places(layer, *space):
    """Attention to places from the features of every pair, as the paper has it: offsets, last axis first, squares."""
    grid = torch.cartesian_prod(*(torch.arange(length).double() for length in space)).view(-1, len(space))
    offset = grid.unsqueeze(0) - grid.unsqueeze(1)
    features = torch.cat([offset.flip(-1), offset.square().sum(-1, keepdim=True)], -1)
    return layer.pos_proj(features).movedim(-1, 0).softmax(-1)


@pytest.mark.parametrize("space", [(9,), (4, 6), (2, 3, 4)], ids=str)
def test_with_open_gates_it_attends_as_the_features_of_pairs_say(space):
    layer = GatedPositionalAttention(8, 2, axes=len(space)).double()
    torch.nn.init.normal_(layer.pos_proj.weight, std=0.3)
    torch.nn.init.normal_(layer.pos_proj.bias)
    torch.nn.init.constant_(layer.gating_param, 50.0)
    with saccade.tap(layer) as seen:
        layer(torch.randn(1, *space, 8, dtype=torch.float64))
    assert_close(seen[""].attention[0], places(layer, *space))
    assert_close(seen[""].gate, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("heads", "offsets"),
    [
        (1, [[0, 0]]),
        (4, [[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]),
        (9, [[column, row] for column in (-1, 0, 1) for row in (-1, 0, 1)]),
    ],
)
def test_heads_start_at_the_places_of_a_kernel_rows_first(heads, offsets):
    layer = GatedPositionalAttention(36, heads, locality_strength=0.5)
    assert layer.kernel_offsets() == offsets
    expected = [[column, row, -0.5] for column, row in offsets]  # 0.5 times 2 offset, and -1
    assert_close(layer.pos_proj.weight.detach(), torch.tensor(expected))
    assert torch.equal(layer.v.weight, torch.eye(36))


def test_heads_beyond_the_kernel_start_at_random():
    weight = GatedPositionalAttention(36, 12, locality_strength=2.0).pos_proj.weight
    assert torch.equal(weight[:9, 2], torch.full((9,), -2.0))
    assert (weight[9:].abs() < 0.2).all()
    assert weight[9:].abs().min() > 0


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match=r"x is \(1, 5, 8\): its positions have 2 axes. Set axes=1"):
        GatedPositionalAttention(8)(torch.zeros(1, 5, 8))
