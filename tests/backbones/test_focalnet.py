"""FocalNet: its blocks from their parts, steps down, images of other sizes, names of timm; what cannot be built."""

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.backbones import FocalNet
from saccade.backbones.residual import Block, PostNormBlock
from saccade.backbones.weights import fit_weights
from saccade.errors import InputError


def make_net(**options):
    torch.manual_seed(0)
    model = FocalNet(**{"dim": 8, "depths": (1, 1), "focal_levels": (1, 2), "focal_windows": (3, 5), **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def images(*size):
    return torch.randn(2, 3, *size, dtype=torch.float64)


@pytest.mark.parametrize("post_norm", [False, True])
def test_norms_stand_before_or_behind_the_branches(post_norm):
    block = make_net(post_norm=post_norm, layer_scale=0.1).stages[1].blocks[0]
    assert type(block) is (PostNormBlock if post_norm else Block)
    y = x = torch.randn(2, 5, 4, 16, dtype=torch.float64)
    for norm, branch, scale in ((block.norm1, block.attn, block.ls1), (block.norm2, block.mlp, block.ls2)):
        y = y + scale.gamma * (norm(branch(y)) if post_norm else branch(norm(y)))
    assert_close(block(x), y)


@pytest.mark.parametrize(("overlap", "sizes"), [(False, [(9, 12), (4, 6)]), (True, [(10, 12), (5, 6)])])
def test_maps_of_odd_sides(overlap, sizes):
    maps = make_net(overlap=overlap, depths=(1, 1)).forward_stages(images(39, 48))
    assert [tuple(each.shape[2:]) for each in maps] == sizes
    for each in maps:
        assert each.is_contiguous(memory_format=torch.channels_last)


def test_pixels_that_fill_no_patch_are_dropped():
    model, x = make_net(), images(39, 48)
    assert_close(model.stages[0].blocks(model.patch_embed(x)), model.stages[0].blocks(model.patch_embed(x[:, :, :36])))
    with pytest.raises(InputError, match=r"images is \(2, 3, 7, 48\): a token of the last map has 8 x 8 pixels"):
        model(x[:, :, :7])


def test_names_of_timm_and_of_the_authors_lead_to_the_same():
    model = make_net(post_norm=True, layer_scale=0.1, norm_in_modulation=True)
    own, official, timm = model.state_dict(), {}, {}
    for name, tensor in own.items():
        name = name.replace(".attn.norm.", ".attn.ln.").replace(".attn.", ".modulation.")
        name = name.replace("focal_layers.0", "focal_layers.0.0").replace("focal_layers.1", "focal_layers.1.0")
        square = any(f"{layer}.weight" in name for layer in (".f", ".h", "modulation.proj", "fc1", "fc2"))
        theirs = name.replace("patch_embed", "stem").replace("stages", "layers").replace(".ln.", ".norm.")
        theirs = theirs.replace("norm1", "norm1_post").replace("norm2", "norm2_post").replace("head.", "head.fc.")
        timm[theirs] = tensor[..., None, None] if square else tensor
        name = name.replace("stages.1.downsample", "stages.0.downsample").replace("stages", "layers")
        name = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        official[name] = tensor[..., None, None] if ".h.weight" in name else tensor
    for state in (official, timm):
        found = fit_weights(model, state)
        assert found.keys() == own.keys()
        assert all(torch.equal(found[name], own[name]) for name in own)


def test_what_cannot_be_built():
    with pytest.raises(InputError, match=r"depths is \(1, 1\), focal_levels is \(1,\)"):
        make_net(focal_levels=(1,))
    assert saccade.create_model("focalnet_test", patch_norm=False).patch_embed.norm.__class__ is torch.nn.Identity
