"""ContMix: the steps of the paper, both ways to make kernels, what they depend on, small maps, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import ContMix
from saccade.ops import Neighborhood


def make_mixer(**options):
    mixer = ContMix(**{"dim": 8, "num_heads": 2, "kernel_size": 5, "small_kernel": 3} | options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return mixer


def make_input(*space, dim=8):
    return torch.randn(2, *space, dim, dtype=torch.float64)


def by_the_steps(mixer, x):
    """Token by token, from the definition; windows from NATTEN's pattern."""
    heads, (batch, height, width, dim) = mixer.num_heads, x.shape
    regions = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), mixer.num_regions).flatten(2).mT
    query = mixer.q(x).view(batch, height * width, heads, -1) * (dim // heads) ** -0.5
    key = mixer.k(regions).view(batch, -1, heads, dim // heads // 2)
    affinity = torch.einsum("bngc,brgc->bgnr", query, key)
    made = affinity @ mixer.kernels.weight.T + mixer.kernels.bias
    small, large = mixer.kernel_sizes
    out = torch.zeros(batch, height * width, dim, dtype=x.dtype)
    value = mixer.v(x).flatten(1, 2)
    for size, table, logits, half in (
        (small, mixer.small_bias, made[..., : small**2], slice(0, dim // 2)),
        (large, mixer.large_bias, made[..., small**2 :], slice(dim // 2, dim)),
    ):
        seen = Neighborhood(size).mask((height, width))
        for token in range(height * width):
            places = seen[token].nonzero().flatten()
            row, column = token // width, token % width
            bias = table[:, places // width - row + size - 1, places % width - column + size - 1]
            weights = (logits[:, :, token] + bias).softmax(-1)  # (B, heads, K^2)
            mine = value[:, places, half].unflatten(-1, (heads, -1))
            out[:, token, half] = torch.einsum("bgk,bkgc->bgc", weights, mine).flatten(1)
    return mixer.proj(out).view_as(x)


@pytest.mark.parametrize("space", [(5, 5), (7, 9), (6, 11)])
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_it_follows_the_steps_of_the_paper(space, impl):
    mixer, x = make_mixer(impl=impl, num_regions=3), make_input(*space)
    assert_close(mixer(x), by_the_steps(mixer, x))


@pytest.mark.parametrize("space", [(7, 9), (2, 3)])
def test_the_fast_form_equals_the_reference_in_value_and_gradient(space):
    fast, x = make_mixer(), make_input(*space).requires_grad_()
    slow = make_mixer(impl="reference")
    slow.load_state_dict(fast.state_dict())
    upstream, grads = torch.randn_like(x), []
    for mixer in (fast, slow):
        grads.append(torch.autograd.grad(mixer(x), [x, *mixer.parameters()], upstream))
    assert_close(fast(x), slow(x))
    assert_close(*grads)


def test_kernels_see_the_whole_map_and_filters_their_window():
    mixer, x = make_mixer(), make_input(9, 9).requires_grad_()
    small, large = mixer.make_kernels(x, x)
    assert torch.autograd.grad(large[0, 0, 0, 0, 0], x)[0][0, 8, 8].abs().max() > 1e-6
    with saccade.tap(mixer) as seen:
        mixer(x)
    attention = seen[""].attention
    for heads, size in ((attention[:, :2], 3), (attention[:, 2:], 5)):
        assert torch.equal((heads > 0).all(1)[0], Neighborhood(size).mask((9, 9)))
    assert_close(small.sum(-1), torch.ones_like(small[..., 0]))


def test_context_of_another_map_and_width_makes_the_kernels():
    mixer = make_mixer(context_dim=6, projections=False)
    value, query, context = make_input(6, 7), make_input(6, 7), make_input(6, 7, dim=6)
    out = mixer.filter(value, query, context)
    assert out.shape == value.shape
    assert not torch.equal(mixer.filter(value, query, -context), out)
    assert isinstance(mixer.proj, nn.Identity)
    constant = torch.full_like(value, 3.0)
    assert_close(mixer.filter(constant, query, context), constant)  # weights sum to 1


def test_a_small_map_is_enlarged_and_averaged_back():
    mixer, x = make_mixer(), make_input(2, 3)
    large = F.interpolate(x.permute(0, 3, 1, 2), (5, 7), mode="bilinear").permute(0, 2, 3, 1)
    value = F.interpolate(mixer.v(x).permute(0, 3, 1, 2), (5, 7), mode="bilinear").permute(0, 2, 3, 1)
    filtered = mixer.filter(value, large, large)
    expected = F.adaptive_avg_pool2d(filtered.permute(0, 3, 1, 2), (2, 3)).permute(0, 2, 3, 1)
    assert_close(mixer(x), mixer.proj(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 7, "num_heads": None}, "Take an even number of channels"),
        ({"num_heads": 3}, r"num_heads is 3 and dim is 8: .* Take one of \[1, 2, 4\]"),
        ({"kernel_size": 4}, "kernel_size is 4 and small_kernel is 3: take odd ones"),
        ({"kernel_size": 3, "small_kernel": 5}, "the large not smaller"),
        ({"num_regions": 0}, "num_regions is 0"),
        ({"impl": "fast"}, "impl is 'fast'"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        make_mixer(**options)


@pytest.mark.parametrize(("dim", "heads"), [(8, 1), (64, 2), (96, 3), (112, 2), (100, 2)])
def test_heads_are_as_many_as_divide_half_of_the_channels(dim, heads):
    assert ContMix(dim).num_heads == heads
