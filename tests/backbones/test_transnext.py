"""TransNeXt: what its stages are made of, positions at other image sizes, how it starts, errors."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import saccade
from saccade.backbones import TransNeXt
from saccade.errors import InputError
from saccade.mixers import AggregatedAttention, LengthScaledAttention


def make_net(**options):
    torch.manual_seed(0)
    options = {"mlp_ratios": (2, 2), "sr_ratios": (2, 1), "image_size": 32, "num_classes": 5} | options
    net = TransNeXt((24, 48), (1, 2), **options).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def make_images(*size):
    return torch.randn(2, 3, *size, dtype=torch.float64)


def test_a_stage_whose_map_is_not_pooled_attends_to_all():
    model = saccade.create_model("transnext_test")
    kinds = [[type(block.attn) for block in stage.blocks] for stage in model.stages]
    assert kinds == [[AggregatedAttention], [AggregatedAttention], [AggregatedAttention] * 2, [LengthScaledAttention]]
    assert [stage.blocks[0].attn.pretrain_size for stage in model.stages] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert [stage.blocks[0].attn.num_heads for stage in model.stages] == [1, 2, 3, 4]


def test_steps_of_a_stage():
    net, images = make_net(), make_images(32, 32)
    x = net.patch_embed(images)
    assert x.shape == (2, 8, 8, 24)
    for stage in net.stages:
        x = stage.downsample(x)
        for block in stage.blocks:
            x = x + block.attn(block.norm1(x))
            x = x + block.mlp(block.norm2(x))
        x = stage.norm(x)
    assert_close(net(images), net.head(x.mean((1, 2))))


def test_positions_are_scaled_by_the_images_of_the_training():
    """Where they are scaled by the images at hand, a network for larger images has other position biases."""
    small, large = make_net(), make_net(image_size=64)
    large.load_state_dict(small.state_dict())
    images = make_images(64, 64)
    assert not torch.allclose(small(images), large(images))
    for block in (small.stages[0].blocks[0], small.stages[1].blocks[1]):
        assert block.attn.pretrain_size == (32 // (4 if block.attn.dim == 24 else 8),) * 2


def test_cost_is_linear_with_pooled_cells_of_one_number():
    net = make_net(pool_size=4, sr_ratios=(2, 2))
    assert [stage.blocks[0].attn.cells((8, 8)) for stage in net.stages] == [(4, 4), (4, 4)]
    assert net(make_images(40, 64)).shape == (2, 5)
    with pytest.raises(InputError, match=r"pool_size is \(4, 4\) and the map is \(1, 1\)"):
        net(make_images(4, 4))


def test_it_starts_as_the_authors_networks():
    model = saccade.create_model("transnext_test")
    attention = model.stages[2].blocks[0].attn
    assert abs(attention.sr.weight.std() / (2 / 72) ** 0.5 - 1) < 0.05  # of 5184 numbers
    for layer in (attention.q, attention.kv, model.head):
        assert abs(layer.weight.std() / 0.02 - 1) < 0.05
        assert not layer.bias.any()


def test_what_is_not_decayed():
    model = saccade.create_model("transnext_test")
    kept = {name.split(".attn.")[1] for name in model.no_weight_decay()}
    assert kept == {
        *("temperature", "query_embedding", "relative_pos_bias_local"),
        *(f"cpb_fc{layer}.{part}" for layer in (1, 2) for part in ("weight", "bias")),
    }


def test_errors_say_what_to_do():
    for name in ("num_heads", "mlp_ratios", "sr_ratios", "window_sizes"):
        with pytest.raises(InputError, match=rf"{name} is \(1, 1, 1\) and dims is \(24, 48\): give one for each stage"):
            make_net(**{name: (1, 1, 1)})
