"""ChannelAttention: the order of blocks in published weights, groups, what taps see."""

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import ChannelAttention


def make_input(*space):
    return torch.randn(2, *space, 12, dtype=torch.float64)


def test_the_blocks_of_published_weights_are_value_query_and_key():
    mixer, x = ChannelAttention(12, 3).double(), make_input(4, 5)
    first, second, third = mixer.qkv(x.flatten(1, 2)).view(2, 20, 3, 3, 4).permute(2, 0, 3, 1, 4)
    weights = ((second * 4**-0.5).mT @ third).softmax(-1)
    out = (weights @ first.mT).permute(0, 3, 1, 2).reshape(2, 4, 5, 12)
    assert_close(mixer(x), mixer.proj(out))


def test_groups_do_not_meet_before_the_projection():
    mixer, x = ChannelAttention(12, 3).double(), make_input(4, 5)
    mixer.proj = torch.nn.Identity()
    out = mixer(x)
    with torch.no_grad():
        mixer.qkv.weight[[0, 12, 24]] += 1  # of the first group
    changed = (mixer(x) != out).flatten(0, 2).any(0)
    assert changed.tolist() == [True] * 4 + [False] * 8


def test_taps_see_the_weights_of_the_channels():
    mixer, x = ChannelAttention(12, 3).double(), make_input(4, 5)
    with saccade.tap(mixer) as seen:
        out = mixer(x)
    weights = seen[""].gate
    assert weights.shape == (2, 3, 4, 4)
    values = mixer.qkv(x.flatten(1, 2)).chunk(3, -1)[0].unflatten(-1, (3, 4)).transpose(1, 2)
    mixed = (values @ weights.mT).transpose(1, 2).flatten(2)
    assert_close(mixer.proj(mixed).view_as(x), out)
    assert_close(seen[""].attention, torch.eye(20, dtype=torch.float64).expand(2, 3, 20, 20))


def test_prefix_tokens_are_positions_like_all_others():
    mixer, x, prefix = ChannelAttention(12, 3).double(), make_input(1, 5), make_input(2)
    out, out_prefix = mixer(x, prefix)
    alone = mixer(torch.cat([prefix.unsqueeze(1), x], 2))
    assert_close(torch.cat([out_prefix.unsqueeze(1), out], 2), alone)


def test_groups_that_do_not_share_the_channels_evenly():
    with pytest.raises(InputError, match="num_heads is 5 and dim is 12"):
        ChannelAttention(12, 5)
