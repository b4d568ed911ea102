"""ConViT: where the class token joins, other image sizes, how it starts; what cannot be built."""

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.backbones import ConViT
from saccade.errors import InputError
from saccade.mixers import Attention, GatedPositionalAttention


def make_net(**options):
    torch.manual_seed(0)
    options = {"dim": 18, "depth": 3, "num_heads": 9, "local_depth": 2, "image_size": 32, "patch_size": 8} | options
    return ConViT(num_classes=3, **options).double().eval()


def test_the_class_token_joins_behind_the_local_blocks():
    model, images = make_net(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert [type(block.attn) for block in model.blocks] == [GatedPositionalAttention] * 2 + [Attention]
    tokens = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    assert model.forward_features(images).shape == (2, 17, 18)
    assert tokens == [16, 16, 17]
    x = model.patch_embed(images) + model.pos_embed.unflatten(1, (4, 4))
    for block in model.blocks[:2]:
        x = x + block.attn(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    x = torch.cat([model.cls_token.expand(2, -1, -1), x.flatten(1, 2)], 1)
    last = model.blocks[2]
    x = x + last.attn(last.norm1(x))
    x = x + last.mlp(last.norm2(x))
    assert_close(model(images), model.head(model.norm(x)[:, 0]))


def test_images_of_another_size_and_shape():
    model = make_net()
    assert model(torch.randn(2, 3, 48, 24, dtype=torch.float64)).shape == (2, 3)
    assert "pos_embed" not in make_net(positions=False).state_dict()


def test_layers_start_local_whatever_the_network_starts_with():
    for block in make_net(locality_strength=2.0).blocks[:2]:
        assert torch.equal(block.attn.v.weight, torch.eye(18).double())
        assert_close(block.attn.pos_proj.weight[:, 2], torch.full((9,), -2.0).double())
        assert block.attn.qk.weight.std() < 0.03
    with torch.device("meta"):
        assert saccade.create_model("convit_base").head.weight.is_meta


@pytest.mark.parametrize("depth", [-1, 3])
def test_one_block_is_left_for_the_class_token(depth):
    with pytest.raises(InputError, match=f"local_depth is {depth} and depth is 3"):
        make_net(local_depth=depth)
    assert make_net(local_depth=0)(torch.randn(1, 3, 32, 32, dtype=torch.float64)).shape == (1, 3)
