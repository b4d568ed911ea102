"""Parts that families share: padding, positions, tokens with a class token; each against another derivation."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from saccade.backbones import Isotropic
from saccade.backbones.convolution import SameAvgPool2d, SameConv2d, divisible, pad_same
from saccade.backbones.mlp import Mlp
from saccade.backbones.patches import Downsample
from saccade.backbones.positions import ConvPosition, resize_positions, resize_relative_table
from saccade.backbones.recalibration import EfficientChannelGate
from saccade.backbones.residual import Block, LayerScale, TokenBlock
from saccade.errors import InputError
from saccade.mixers import Attention


@pytest.mark.parametrize("size", [(7, 8), (8, 8), (5, 4), (1, 1)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (2, 2), (7, 2)])
def test_same_padding_gives_ceil_of_side_over_stride_and_puts_the_odd_zero_last(size, kernel, stride):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    conv = SameConv2d(3, 4, kernel, stride=stride).double()
    out = conv(x)
    assert out.shape[2:] == tuple(-(-length // stride) for length in size)
    # the window of output (i, j) begins at i stride - before: read it from a wide margin of zeros
    wide = F.pad(x, [9] * 4)
    for axis_out in [(0, 0), (out.shape[2] - 1, out.shape[3] - 1)]:
        starts = []
        for length, place in zip(size, axis_out):
            total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            starts.append(9 + place * stride - total // 2)
        patch = wide[:, :, starts[0] : starts[0] + kernel, starts[1] : starts[1] + kernel]
        expected = torch.einsum("bchw,ochw->bo", patch, conv.weight) + conv.bias
        assert_close(out[:, :, axis_out[0], axis_out[1]], expected)


@pytest.mark.parametrize("size", [(7, 8), (8, 8), (5, 3)])
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2)])
def test_same_pooling_divides_by_real_elements(size, kernel, stride):
    pool = SameAvgPool2d(kernel, stride)
    assert_close(pool(torch.full((1, 2, *size), 3.0)), torch.full((1, 2, *(-(-n // stride) for n in size)), 3.0))
    x = torch.randn(1, 1, *size)
    assert_close(
        pool(x)[0, 0, 0, 0],
        x[0, 0, : kernel - pad_before(size[0], kernel, stride), : kernel - pad_before(size[1], kernel, stride)].mean(),
    )


def pad_before(length, kernel, stride):
    return max((-(-length // stride) - 1) * stride + kernel - length, 0) // 2


def test_no_padding_is_no_copy():
    x = torch.randn(1, 1, 4, 4)
    assert pad_same(x, 2, 2) is x
    assert divisible(8 * 0.3) == 8


def test_positions_keep_class_tokens_and_constants_and_come_back():
    positions = torch.randn(1, 2 + 12, 5)
    same = resize_positions(positions, (3, 4), old=(3, 4))
    assert same is positions
    larger = resize_positions(positions, (6, 5), old=(3, 4))
    assert larger.shape == (1, 2 + 30, 5)
    assert torch.equal(larger[:, :2], positions[:, :2])
    assert_close(resize_positions(torch.ones(1, 9, 2), (5, 4)), torch.ones(1, 20, 2))
    with pytest.raises(InputError, match="give a row for each token"):
        resize_positions(positions, (3, 3), old=(4, 4))


def test_relative_tables_are_resized_about_their_middle():
    table = torch.randn(3, 5, 7)
    assert resize_relative_table(table, (5, 7)) is table
    larger = resize_relative_table(table, (9, 7))
    assert larger.shape == (3, 9, 7)
    assert_close(larger[:, 4], table[:, 2])
    assert_close(larger.flip(1), resize_relative_table(table.flip(1), (9, 7)))


def test_layer_scale_and_gates():
    assert torch.equal(LayerScale(3, 0.5)(torch.ones(2, 4, 3)), torch.full((2, 4, 3), 0.5))
    gate, x = EfficientChannelGate(16), torch.randn(2, 16, 3, 4)
    assert gate.conv.kernel_size == (3,)
    means = F.pad(x.mean((2, 3)), (1, 1)).unfold(1, 3, 1)
    assert_close(gate(x), x * (means @ gate.conv.weight.flatten()).sigmoid()[..., None, None])


def make_tokens(**options):
    block = partial(TokenBlock, 8)
    options = {"dim": 8, "depth": 3, "image_size": 16, "patch_size": 4, "num_classes": 5} | options
    return Isotropic(lambda number: block(Attention(8, 2), Mlp(8, 16)), **options).double().eval()


@pytest.mark.parametrize("positions", ["all", "patches", None])
@pytest.mark.parametrize("join", [0, 2])
def test_class_tokens_join_and_are_left_out_of_maps(positions, join):
    model, images = make_tokens(positions=positions, join=join), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    features, maps = model.forward_features(images), model.forward_stages(images)
    assert (model.num_prefix_tokens, features.shape) == (1, (2, 17, 8))
    assert [tuple(each.shape) for each in maps] == [(2, 8, 4, 4)] * 3
    assert torch.equal(maps[-1].flatten(2).mT, features[:, 1:])
    assert_close(model(images), model.head(features[:, 0]))
    other = torch.randn(2, 3, 20, 12, dtype=torch.float64)
    assert model(other).shape == (2, 5)
    with pytest.raises(InputError, match="a patch has 4 x 4 pixels"):
        model(images[..., :3])


def test_without_class_tokens_it_is_a_chain_of_blocks_on_a_map():
    model = make_tokens(class_tokens=0)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = model.patch_embed(images) + model.pos_embed.unflatten(1, (4, 4))
    for block in model.blocks:
        x = Block.forward(block, x)
    assert_close(model(images), model.head(model.norm(x).mean((1, 2))))


def test_checkpointing_and_groups_of_an_isotropic_network():
    model = make_tokens().train()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    grads = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert_close(*grads)
    assert model.no_weight_decay() == {"cls_token", "pos_embed"}
    assert model.group_matcher()["stem"] == r"^(?:cls_token|pos_embed|patch_embed)\b"


def test_positions_of_another_image_size_are_loaded_by_interpolation(tmp_path):
    from saccade.backbones.weights import load_weights

    small, large = make_tokens(), make_tokens(image_size=24)
    load_weights(large, small.state_dict(), "small")
    assert_close(large.pos_embed, resize_positions(small.pos_embed, (6, 6), old=(4, 4)))
    assert isinstance(large.head, nn.Linear)


@pytest.mark.parametrize("kernel", [3, 5])
def test_positions_from_a_convolution_are_added(kernel):
    layer, x = ConvPosition(6, kernel).double(), torch.randn(2, 4, 7, 6, dtype=torch.float64)
    assert_close(layer(x), x + layer.proj(x.movedim(-1, 1)).movedim(1, -1))
    active = ConvPosition(6, kernel, act=nn.ReLU).double()
    active.load_state_dict(layer.state_dict())
    assert_close(active(x), x + (layer(x) - x).relu())


def test_a_step_down_pads_odd_maps_at_their_end():
    layer, x = Downsample(3, 4, 2, padding="same").double(), torch.randn(2, 5, 3, 3, dtype=torch.float64)
    padded = F.pad(layer.norm(x), (0, 0, 0, 1, 0, 1)).movedim(-1, 1)
    assert_close(layer(x), F.conv2d(padded, layer.reduction.weight, layer.reduction.bias, 2).movedim(1, -1))
    with pytest.raises(InputError, match="padding is 'valid'"):
        Downsample(3, 4, padding="valid")
