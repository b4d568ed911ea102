"""MixtureOfBlocksAttention: the turns that layers take, causal sequences, errors."""

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import MixtureOfBlocksAttention

TURNS = [
    ((8, 12, 4), [(2, 12, 4), (8, 3, 1), (2, 3, 1), (2, 12, 4)]),
    ((9, 4), [(3, 4), (3, 1), (3, 4)]),
    ((6,), [(2,), (2,)]),
]


@pytest.mark.parametrize(("space", "blocks"), TURNS)
def test_layers_take_turns(space, blocks):
    assert [MixtureOfBlocksAttention(8, layer=layer).block(space) for layer in range(len(blocks))] == blocks


def test_a_size_for_each_axis_counts_where_the_axis_is_cut():
    sizes = [MixtureOfBlocksAttention(8, layer=layer, block_size=(2, 3, 9)).block((8, 12, 4)) for layer in range(3)]
    assert sizes == [(2, 12, 4), (8, 3, 4), (2, 3, 4)]


def test_causal_sequences_and_what_taps_see_of_them():
    mixer = MixtureOfBlocksAttention(8, 2, block_size=3, topk=2, scope="query", causal=True).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    with saccade.tap(mixer) as seen:
        out = mixer(x)
    attention = seen[""].attention
    assert not attention.triu(1).any()
    value = mixer.qkv(x).chunk(3, -1)[2].unflatten(-1, (2, 4)).transpose(1, 2)
    assert_close(mixer.proj((attention @ value).transpose(1, 2).flatten(2)), out)
    changed = x.clone()
    changed[:, 7:] += 1
    assert_close(mixer(changed)[:, :7], out[:, :7])


def test_maps_of_four_axes_and_causal_maps_are_refused():
    with pytest.raises(InputError, match="the map has 4 axes: blocks are of sequences, images and videos"):
        MixtureOfBlocksAttention(8)(torch.zeros(1, 2, 2, 2, 2, 8))
    with pytest.raises(InputError, match="Flatten the map to a sequence"):
        MixtureOfBlocksAttention(8, topk=2, scope="query", causal=True)(torch.zeros(1, 4, 4, 8))
