"""DHVT: patches, MLPs and blocks from their steps, other channels; what cannot be built."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from saccade.backbones import DHVT
from saccade.backbones.dhvt import AggregationMlp, OverlappingPatches
from saccade.backbones.weights import load_weights
from saccade.errors import InputError


def randomise(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


def make_net(**options):
    return randomise(DHVT(**{"dim": 16, "depth": 2, "num_heads": 4, "patch_size": 4, "num_classes": 3, **options}))


@pytest.mark.parametrize(("patch_size", "dims"), [(2, [16]), (4, [8, 16]), (16, [2, 4, 8, 16])])
def test_patches_halve_the_image_step_by_step(patch_size, dims):
    patches = randomise(OverlappingPatches(3, 16, patch_size))
    images = torch.randn(2, 3, 33, 48, dtype=torch.float64)
    y = images * patches.pre_affine.alpha + patches.pre_affine.beta
    convs = [step for step in patches.proj if isinstance(step, nn.Sequential)]
    assert [conv[0].out_channels for conv in convs] == dims
    for number, (conv, norm) in enumerate(convs):
        y = norm(F.conv2d(y, conv.weight, stride=2, padding=1))
        y = F.gelu(y) if number < len(convs) - 1 or patch_size == 2 else y
    y = y * patches.post_affine.alpha + patches.post_affine.beta
    assert_close(patches(images), y.permute(0, 2, 3, 1))
    assert patches(images).shape[1:3] == (-(-33 // patch_size), -(-48 // patch_size))


def test_the_mlp_convolves_the_map_and_scales_the_class_token():
    mlp, x = randomise(AggregationMlp(16, 24)), torch.randn(2, 5, 4, 16, dtype=torch.float64)
    token = torch.randn(2, 1, 16, dtype=torch.float64)
    u = F.gelu(mlp.bn1(mlp.conv1(x.permute(0, 3, 1, 2))))
    y = mlp.bn3(mlp.conv3(u + F.gelu(mlp.bn2(mlp.conv2(u)))))
    factors = mlp.excitation(F.gelu(mlp.compress(y.mean((2, 3)))))
    out, scaled = mlp(x, token)
    assert_close(out, y.permute(0, 2, 3, 1))
    assert_close(scaled, token * factors[:, None])
    assert mlp.conv2.groups == 24


def test_a_block_is_attention_and_the_mlp_with_residuals():
    block, tokens = make_net().blocks[0], torch.randn(2, 13, 16, dtype=torch.float64)

    def run(layer, x):
        out, token = layer(x[:, 1:].view(2, 3, 4, 16), x[:, :1])
        return torch.cat([token, out.flatten(1, 2)], 1)

    y = tokens + run(lambda x, prefix: block.attn(x, prefix), block.norm1(tokens))
    assert_close(block(tokens, (3, 4)), y + run(block.mlp, block.norm2(y)))


def test_scales_of_colours_are_repeated_or_averaged_for_other_channels():
    model = make_net()
    for channels in (1, 5):
        other = make_net(in_chans=channels)
        load_weights(other, model.state_dict(), "three")
        alpha, own = other.patch_embed.pre_affine.alpha, model.patch_embed.pre_affine.alpha
        assert_close(alpha, own.mean(1, True) if channels == 1 else torch.cat([own, own[:, :2]], 1))


def test_what_cannot_be_built():
    with pytest.raises(InputError, match=r"patch_size is 6: every convolution halves the image. Take 2, 4, 8 or 16"):
        make_net(patch_size=6)
