"""MOAT's mixer: what its block adds to a map, from the convolution and the attention apart; windows; errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.mixers import MobileConvAttention, WindowAttention
from saccade.mixers.mobile_convolution import MobileConvolution


def make_mixer(**options):
    mixer = MobileConvAttention(8, 2, **options).double().eval()
    for name, tensor in mixer.state_dict().items():
        if name.endswith(("weight", "bias", "table", "mean")):
            torch.nn.init.normal_(tensor, std=0.4)
        elif name.endswith("var"):
            torch.nn.init.uniform_(tensor, 0.5, 2)
    return mixer


def make_input(*space):
    return torch.randn(2, *space, 8, dtype=torch.float64)


def normalise(norm, x):
    return (x - norm.running_mean) / (norm.running_var + 1e-3).sqrt() * norm.weight + norm.bias


def test_the_convolution_widens_convolves_each_channel_and_narrows():
    conv, x = make_mixer(expansion=3).conv, make_input(5, 4)
    wide = F.gelu(normalise(conv.norm1, normalise(conv.pre_norm, x) @ conv.fc1.weight.T))  # no activation in front
    padded = F.pad(wide, (0, 0, 1, 1, 1, 1))
    kernel = conv.conv.weight[:, 0]
    mixed = sum(padded[:, r : r + 5, c : c + 4] * kernel[:, r, c] for r in range(3) for c in range(3))
    expected = F.gelu(normalise(conv.norm2, mixed)) @ conv.fc2.weight.T + conv.fc2.bias
    assert_close(conv(x.movedim(-1, 1)).movedim(1, -1), expected)


@pytest.mark.parametrize("options", [{"window_size": 3}, {"num_windows": 2, "table_size": 4}, {}], ids=str)
def test_it_adds_the_convolution_and_attention_behind_it(options):
    mixer, x = make_mixer(**options), make_input(6, 9)
    attention = WindowAttention(8, 2, **(options or {"window_size": (6, 9), "table_size": 14})).double()
    own = {name: tensor for name, tensor in mixer.state_dict().items() if not name.startswith(("conv.", "norm."))}
    attention.load_state_dict(own)
    behind = x + mixer.conv(x.movedim(-1, 1)).movedim(1, -1)
    assert_close(x + mixer(x), behind + attention(mixer.norm(behind)))


def test_default_windows_have_at_most_the_tokens_of_the_published_maps():
    mixer = make_mixer()
    assert mixer.window((14, 28)) == (14, 14)
    assert mixer.window((16, 15)) == (8, 8)
    assert mixer.position_bias_table.shape == (2, 27, 27)


@pytest.mark.parametrize("space", [(7,), (2, 3, 4)])
def test_other_axes(space):
    mixer, x = make_mixer(axes=len(space)), make_input(*space)
    assert mixer(x).shape == x.shape
    with pytest.raises(InputError, match=f"built for 2 axes. Set axes={len(space)}"):
        make_mixer()(x)


def test_a_branch_may_change_the_width():
    branch = MobileConvolution(4, 6, 8, out_bias=False)
    assert branch(torch.randn(2, 4, 5, 3)).shape == (2, 6, 5, 3)
    assert branch.fc2.bias is None
