"""CrossShapedAttention: stripes by hand, the convolution inside them, narrow maps, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import CrossShapedAttention


def make_mixer(**options):
    return CrossShapedAttention(8, **{"num_heads": 4} | options).double()


def make_input(*space):
    return torch.randn(2, *space, 8, dtype=torch.float64)


def attend(mixer, part, query, key, value):
    """One stripe of one half: (B, h, w, 4) each; two heads of two channels, and the convolution."""
    q, k, v = (x.flatten(1, 2).unflatten(-1, (2, 2)).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).view_as(value)
    conv = mixer.lepe[part]
    local = F.conv2d(value.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=1, groups=4)
    return out + local.permute(0, 2, 3, 1)


@pytest.mark.parametrize("space", [(6, 9), (5, 7), (4, 3), (2, 2)])
def test_halves_attend_in_stripes_down_and_across(space):
    mixer, x = make_mixer(stripe_size=3), make_input(*space)
    halves = []
    for part, axis in enumerate((2, 1)):
        parts = [each[..., 4 * part : 4 * part + 4] for each in mixer.qkv(x).chunk(3, -1)]
        stripes = zip(*(each.split(3, axis) for each in parts))
        halves.append(torch.cat([attend(mixer, part, *stripe) for stripe in stripes], axis))
    assert_close(mixer(x), mixer.proj(torch.cat(halves, -1)))


def test_without_stripes_all_heads_see_the_map():
    mixer, x = make_mixer(stripe_size=None), make_input(4, 5)
    assert len(mixer.lepe) == 1
    with saccade.tap(mixer) as seen:
        mixer(x)
    assert (seen[""].attention > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 1}, "num_heads is 1: half of the heads .* Take an even number, or stripe_size=None"),
        ({"num_heads": 3}, "num_heads is 3 and dim is 8"),
        ({"stripe_size": 0}, "stripe_size is 0"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        make_mixer(**options)
