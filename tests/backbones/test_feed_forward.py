"""ConvolutionalGLU: its equation on one to three axes, what a tap sees, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import saccade
from saccade.backbones import ConvolutionalGLU
from saccade.errors import InputError


def make_block(*args, **options):
    return ConvolutionalGLU(*args, **options).double()


@pytest.mark.parametrize("space", [(7,), (5, 4), (3, 2, 4)], ids=str)
def test_the_gate_alone_looks_at_its_neighbours(space):
    block, x = make_block(6, 9, 5, axes=len(space)), torch.randn(2, *space, 6, dtype=torch.float64)
    hidden = block.fc1(x)
    gate, value = hidden[..., :6], hidden[..., 6:]  # 6 of 9
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(space)]
    gate = convolve(gate.movedim(-1, 1), block.dwconv.weight, block.dwconv.bias, padding=1, groups=6).movedim(1, -1)
    with saccade.tap(block) as seen:
        out = block(x)
    assert_close(out, block.fc2(F.gelu(gate) * value))
    assert_close(seen[""].gate, F.gelu(gate))


@pytest.mark.parametrize(("asked", "hidden"), [(20, 13), (None, 8), (3, 2)])
def test_hidden_channels_are_two_thirds(asked, hidden):
    block = make_block(12, asked)
    assert block.fc1.weight.shape == (2 * hidden, 12)
    assert block.fc2.weight.shape == (12, hidden)


def test_in_evaluation_nothing_is_dropped():
    block, x = make_block(6, drop=0.5).eval(), torch.randn(1, 3, 3, 6, dtype=torch.float64)
    assert torch.equal(block(x), block(x))
    assert not torch.equal(block.train()(x), block(x))


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match=r"x is \(2, 4, 6\): give \(B, \*space, 6\) with 2 axes of space"):
        make_block(6)(torch.zeros(2, 4, 6).double())
    with pytest.raises(InputError, match=r"x is \(2, 6, 4, 4\)"):
        make_block(6)(torch.zeros(2, 6, 4, 4).double())
    with pytest.raises(InputError, match="axes is 4: give 1, 2 or 3"):
        make_block(6, axes=4)
    with pytest.raises(InputError, match="hidden_channels is 0: give an integer of at least 1"):
        make_block(6, 1)
