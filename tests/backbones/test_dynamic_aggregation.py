"""Blocks of DFIR-DETR: their formulas step by step, gradients, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from saccade.backbones import (
    DualPathShuffle,
    DynamicAggregation,
    DynamicFusionBlock,
    FrequencyRefinement,
    SpatialGatedUnit,
)
from saccade.backbones.dynamic_aggregation import shuffle_channels
from saccade.errors import InputError
from saccade.mixers import WindowAttention

BLOCKS = [
    lambda: DynamicAggregation(8, depth=2),
    lambda: DynamicAggregation(8, 6, make_block=SpatialGatedUnit),
    lambda: DynamicFusionBlock(8, WindowAttention),
    lambda: SpatialGatedUnit(8, 5),
    lambda: DualPathShuffle(8, 6),
    lambda: FrequencyRefinement(8, 5),
]


def randomise(block):
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    return block.double().eval()


def convolve(conv, x):
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def make_input():
    return torch.randn(2, 5, 7, 8, dtype=torch.float64)


def test_the_gate_sees_its_neighbours():
    unit, x = randomise(SpatialGatedUnit(8, 5)), make_input()
    hidden = unit.fc1(x)
    assert_close(unit(x), unit.fc2(hidden[..., :5] * F.gelu(convolve(unit.conv, hidden[..., 5:]))))


def test_fusion_adds_convolution_and_attention_before_the_gate():
    block, x = randomise(DynamicFusionBlock(8)), make_input()
    h = x + convolve(block.local[1], convolve(block.local[0], x))
    assert block.local[0].groups == 8
    assert_close(block(x), block.gated(h + block.mixer(h)))


def test_aggregation_keeps_every_link_of_the_chain():
    block, x = randomise(DynamicAggregation(8, 6, depth=2)), make_input()
    first, second = block.conv1(x).split(3, -1)
    third = block.blocks[0](second)
    links = torch.cat([first, second, third, block.blocks[1](third)], -1)
    assert_close(block(x), block.conv2(links))


def test_the_second_path_is_made_of_the_first():
    block, x = randomise(DualPathShuffle(8, 6)), make_input()
    first = block.first(x)
    second = F.gelu(convolve(block.second[1], convolve(block.second[0], first)))
    assert_close(block(x)[..., 0::2], first)
    assert_close(block(x)[..., 1::2], second)


def test_refinement_filters_one_of_two_paths():
    block, x = randomise(FrequencyRefinement(8, 6, steps=2)), make_input()
    assert_close(block(x), block.out(torch.cat([block.mixer(block.left(x)), block.right(x)], -1)))
    assert block.mixer.weight.shape[0] == 2
    assert isinstance(FrequencyRefinement(8, make_mixer=SpatialGatedUnit).mixer, SpatialGatedUnit)


def test_a_shuffle_is_undone_by_that_of_the_other_number_of_groups():
    x = torch.arange(24).view(2, 12)
    assert torch.equal(shuffle_channels(shuffle_channels(x, 3), 4), x)
    assert shuffle_channels(x, 3)[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


@pytest.mark.parametrize("make", BLOCKS)
def test_every_parameter_gets_a_gradient(make):
    block, x = make().double().train(), make_input().requires_grad_()
    block(x).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in (x, *block.parameters()))


@pytest.mark.parametrize("make", BLOCKS)
def test_other_than_images_are_refused(make):
    with pytest.raises(InputError, match=r"x is \(2, 6, 8\): .* Give \(B, H, W, C\)"):
        make()(torch.zeros(2, 6, 8))


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match="dim_out is 5: each path makes half"):
        DualPathShuffle(8, 5)
    with pytest.raises(InputError, match="x has 5 channels and groups is 2"):
        shuffle_channels(torch.zeros(5), 2)
