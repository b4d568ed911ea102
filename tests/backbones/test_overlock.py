"""OverLoCK: the folded form, the classifier of the overview, what taps see, its parts; errors."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import saccade
from saccade.backbones import OverLoCKOutput
from saccade.backbones.convolution import LinearNorm
from saccade.backbones.large_kernel import BRANCHES, LargeKernel, ResidualDepthwise
from saccade.backbones.recalibration import ResponseNorm
from saccade.backbones.weights import load_weights
from saccade.errors import InputError


def build(**options):
    torch.manual_seed(0)
    return randomise(saccade.create_model("overlock_test", num_classes=5, **options).double())


def randomise(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    return module.eval()


def make_images(side=96):
    return torch.randn(2, 3, side, side, dtype=torch.float64)


@pytest.mark.parametrize("size", BRANCHES)
def test_a_large_kernel_folds_into_one_convolution(size):
    layer, x = randomise(LargeKernel(3, size).double()), torch.randn(2, 3, 9, 22, dtype=torch.float64)
    steps = layer.norm(layer.conv(x) + sum(branch(x) for branch in layer.branches.values()))
    assert_close(layer(x), steps)
    layer.reparameterize()
    assert_close(layer(x), steps)
    assert {name for name, _ in layer.named_parameters()} == {"conv.weight", "conv.bias", "norm.weight", "norm.bias"}
    assert_close(layer.train()(x), layer.norm(layer.conv(x)))  # a norm of the batch is not folded
    layer.reparameterize()
    assert len(layer.branches) == 0


def test_the_folded_network_gives_the_same_and_its_weights_load():
    model, images = build(), make_images()
    expected = model(images)
    assert model.reparameterize() is model
    assert_close(model(images), expected)
    fresh = saccade.create_model("overlock_test", num_classes=5, reparameterized=True).double().eval()
    load_weights(fresh, model.state_dict(), "folded")
    assert_close(fresh(images), expected)
    with pytest.raises(InputError, match="weights of another architecture"):
        load_weights(build(), model.state_dict(), "folded")


def test_official_names_of_the_folded_form():
    model = build(reparameterized=True)
    official = {
        "blocks1.0.proj.1.lk_origin.weight": torch.zeros(16, 1, 9, 9),
        "blocks1.0.proj.1.lk_origin.bias": torch.zeros(16),
        "sub_blocks4.1.lepe.0.lk_origin.bias": torch.zeros(48),
        "aux_head.2.weight": torch.zeros(5, 48, 1, 1),
    }
    assert model.rename(official).keys() == {
        "stages.0.blocks.0.large.conv.weight",
        "stages.0.blocks.0.large.conv.bias",
        "stages.5.blocks.1.large.conv.bias",
    }


def test_the_overview_has_a_classifier_of_its_own_in_training():
    model, images = build(aux_head=True), make_images()
    out = model.train()(images)
    assert isinstance(out, OverLoCKOutput)
    (out.logits.square().sum() + 0.4 * out.overview.square().sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert model.eval()(images).shape == (2, 5)
    model.reset_classifier(7)
    model.double()
    assert [each.shape for each in model.train()(images)] == [(2, 7), (2, 7)]
    assert model.group_matcher()["blocks"][-1][0] == r"^(?:final_conv|aux_norm)\b"
    model.reset_classifier(0)
    assert isinstance(model.aux_head, nn.Identity)


def test_taps_show_the_context_and_the_kernels_token_matrices():
    model, images = build(), make_images(128)
    with saccade.tap(model) as seen:
        looked = model.look(images)
    context = seen["stages.3.context"].features
    assert_close(context, model.stages[3].context(looked.overview).movedim(1, -1))
    for name, tokens, heads in (("stages.4.blocks.1.mix", 64, 4), ("stages.5.blocks.1.mix", 16, 8)):
        attention = seen[name].attention
        assert attention.shape == (2, heads, tokens, tokens)
        assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))


def test_the_first_block_gets_the_context_alone_and_the_others_renew_it():
    model = build()
    scaled = [block.own_scale is not None for stage in model.stages[4:] for block in stage.blocks]
    assert scaled == [False, True, True, True]


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_the_reference_agrees_in_value_and_gradient(memory):
    fast, slow = build(), build(impl="reference")
    slow.load_state_dict(fast.state_dict())
    grads = []
    for model in (fast, slow):
        images = torch.linspace(-1, 1, 3 * 64 * 96, dtype=torch.float64).view(1, 3, 64, 96).sin()
        images = images.contiguous(memory_format=memory).requires_grad_()
        grads.append(torch.autograd.grad(model(images).square().sum(), [images, *model.parameters()]))
    assert_close(*grads)


def test_parts_against_their_definitions():
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    norm = randomise(ResponseNorm(6).double())
    size = x.square().sum((2, 3), keepdim=True).sqrt()
    share = size / (size.mean(1, keepdim=True) + 1e-6)
    assert_close(norm(x), norm.gamma * (x * share) + norm.beta + x)
    zeros = torch.zeros(1, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(norm(zeros).sum(), zeros)[0].isfinite().all()
    conv = ResidualDepthwise(6).double()
    assert_close(conv(x), x + nn.functional.conv2d(x, conv.weight, conv.bias, padding=1, groups=6))
    linear = randomise(LinearNorm(5, 3).double())
    expected = nn.functional.linear(x, linear.linear.weight)
    shown = (expected - linear.bn.running_mean) / (linear.bn.running_var + 1e-5).sqrt()
    assert_close(linear(x), shown * linear.bn.weight + linear.bn.bias)


def test_kernels_without_branches_are_refused():
    with pytest.raises(InputError, match="kernel_size is 6: branches are known for 5, 7"):
        LargeKernel(4, 6)
