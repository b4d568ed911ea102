"""Sparsifiner: pruned tokens, rates of single blocks, errors."""

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.backbones.sparsifiner import Sparsifiner, prune_tokens
from saccade.errors import InputError


def make_net(**options):
    options = {"image_size": 8, "patch_size": 2, "dim": 12, "depth": 3, "num_heads": 2, "num_classes": 5} | options
    net = Sparsifiner(**options).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return net


def make_images():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def test_pruned_tokens_stay_away_and_end_as_zeros():
    net = make_net(keep_tokens={0: 0.7, 1: 0.4})
    result = net.run(make_images())
    alive = torch.stack(result.alive)
    assert alive.sum(-1).tolist() == [[12, 12], [7, 7], [7, 7]]  # of 16, rounded up
    assert (alive[1:] <= alive[:-1]).all()
    empty = result.features[~alive[-1]]
    assert_close(empty, net.norm.bias.expand_as(empty))  # the norm of 0
    chosen = result.layers[2].selection.mask((16,))[..., 1:]
    assert not chosen.movedim(-1, 1)[~alive[1]].any()


def test_without_pruning_all_are_alive():
    assert make_net().run(make_images()).alive == [None, None, None]


def test_it_is_a_backbone():
    net, images = make_net(keep_tokens={1: 0.5}), make_images()
    result = net.run(images)
    assert_close(net(images), result.logits)
    assert_close(net.forward_features(images)[:, 1:], result.features)
    maps = net.forward_stages(images)
    assert [tuple(each.shape) for each in maps] == [(2, 12, 4, 4)] * 3
    net.set_grad_checkpointing()
    net.train()(images).square().sum().backward()
    kept = {name: p.grad for name, p in net.named_parameters()}
    net.set_grad_checkpointing(False)
    net.zero_grad()
    net(images).square().sum().backward()
    assert_close(
        {name: p.grad for name, p in net.named_parameters() if p.grad is not None},
        {name: grad for name, grad in kept.items() if grad is not None},
    )


def test_images_of_another_size():
    net = make_net(keep_tokens={1: 0.5})
    result = net.run(torch.randn(2, 3, 12, 8, dtype=torch.float64))
    assert result.logits.shape == (2, 5)
    assert result.alive[2].sum(-1).tolist() == [12, 12]  # of 6 x 4


def test_patches_that_the_class_token_sees_most_are_kept():
    attention = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.5, 0.1, 0.2, 0.2]]])  # means 0.3 0.15 0.25 0.3
    assert prune_tokens(attention, 3).tolist() == [[True, False, True, True]]
    assert prune_tokens(attention, 2, torch.tensor([[False, True, True, True]])).tolist() == [
        [False, False, True, True]
    ]
    assert prune_tokens(attention, 3, torch.tensor([[False, True, False, False]])).sum() == 1


def test_each_block_has_its_rate():
    layers = make_net(keep_rate=(1.0, 0.5, 0.1)).run(make_images()).layers
    assert [int(layer.selection.mask((16,)).sum(-1).unique()) for layer in layers] == [17, 9, 2]


def test_every_parameter_but_the_predictors_is_trained():
    net = make_net(keep_tokens={1: 0.5})
    net(make_images()).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == ("mask_predictor" in name), name


def test_networks_by_name_are_the_official_ones():
    model = saccade.create_model("sparsifiner_tiny")
    assert all(not block.attn.keep_prefix and block.attn.keep_rate == 0.25 for block in model.blocks)
    seen = model.run(torch.randn(1, 3, 224, 224)).layers[0].selection.mask((196,))
    assert (seen.sum(-1) == 50).all()
    assert saccade.create_model("sparsifiner_test", attention_options={"topk": 3}).blocks[0].attn.topk == 3


def test_weights_of_another_size_are_refused(tmp_path):
    """The rank of a predictor follows the number of tokens."""
    path = tmp_path / "net.pth"
    torch.save(saccade.create_model("sparsifiner_test").state_dict(), path)
    with pytest.raises(InputError, match=r"mask_predictor.proj_n is \(65, 10\), not \(145, 24\)"):
        saccade.create_model("sparsifiner_test", pretrained=path, image_size=96)


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match="give one number, or one a block"):
        make_net(keep_rate=(1.0, 0.5))
    with pytest.raises(InputError, match=r"keep_tokens is \{3: 0\.5\}: blocks have numbers 0 to 2"):
        make_net(keep_tokens={3: 0.5})
    with pytest.raises(InputError, match="keep_tokens is 0: give a share above 0"):
        make_net(keep_tokens={1: 0})
    with pytest.raises(InputError, match=r"images is \(2, 1, 8, 8\): give a batch \(B, 3, H, W\)"):
        make_net().run(torch.zeros(2, 1, 8, 8))
