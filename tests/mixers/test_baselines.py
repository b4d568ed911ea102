"""Mixers without attention: a convolution and an average, each from its definition; errors."""

import pytest
import torch
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.mixers import DepthwiseConv, Pooling


def test_pooling_is_the_mean_of_the_neighbours_on_the_map_minus_the_token():
    x = torch.randn(1, 4, 5, 3, dtype=torch.float64)
    out = Pooling(3)(x)
    for row in range(4):
        for column in range(5):
            near = x[0, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            assert_close(out[0, row, column], near.mean((0, 1)) - x[0, row, column])


def test_a_depthwise_convolution_weighs_neighbours_for_each_channel_with_zeros_around():
    mixer, x = DepthwiseConv(3, kernel_size=3).double(), torch.randn(1, 4, 5, 3, dtype=torch.float64)
    padded = torch.zeros(6, 7, 3, dtype=torch.float64)
    padded[1:-1, 1:-1] = x[0]
    kernel = mixer.conv.weight[:, 0].movedim(0, -1)  # (3, 3, C)
    mixed = torch.stack([(padded[r : r + 3, c : c + 3] * kernel).sum((0, 1)) for r in range(4) for c in range(5)])
    assert_close(mixer(x).flatten(0, 2), mixer.proj(mixed + mixer.conv.bias))


@pytest.mark.parametrize("size", [0, 4, -1])
def test_a_window_without_a_middle(size):
    with pytest.raises(InputError, match=f"kernel_size is {size}: give an odd number"):
        DepthwiseConv(8, kernel_size=size)
    with pytest.raises(InputError, match=f"pool_size is {size}: give an odd number"):
        Pooling(8, pool_size=size)
