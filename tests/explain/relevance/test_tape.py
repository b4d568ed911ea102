"""The tape: what it sees is what torch computes. Input times gradient on it is autograd's for any program."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from saccade.explain.relevance import relevance
from saccade.explain.relevance.recipes import gradient
from saccade.explain.relevance.tape import record


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def in_place_on_a_view(x):
    y = x * 2
    y[:, 1:3].relu_()
    return y


def aliases_see_a_change(x):
    y = x * 2
    flat, left = y.view(-1), y[:, :2]
    y.mul_(x)
    left += 1
    return (flat * flat).view_as(x) + y


def dead_base(x):
    left, right = (x * 3).chunk(2, 1)
    left *= right
    return torch.cat([left, right], 1)


def filled_buffer(x):
    out = torch.zeros_like(x)
    for column in range(x.shape[1]):
        out[:, column] = x[:, column] ** (column + 1)
    return out


def transposed_in_place(x):
    y = x.clone()
    y.t_()
    y += y.exp()
    return y.t()


def mask_made_in_place(x):
    mask = torch.zeros(x.shape[1], dtype=torch.bool)
    mask[::2] = True
    return x.masked_fill(mask, 0) + x.clone().masked_fill_(~mask, -1) * x


def shared_heads(x):
    query = torch.stack([x, x.sin(), x.cos(), x * 3])[None]
    return F.scaled_dot_product_attention(query, query[:, 1:3], query[:, 2:4], enable_gqa=True).sum((0, 1))


def keeps_old_versions(x):
    y = x * 1
    z = y * y  # its derivative reads y as it is here
    y.add_(1)
    return z * y


def control_flow(x):
    for _ in range(3):
        x = x * 2 if x.sum() > 0 else x - 1
    return x.cumsum(1)


def out_variant(x):
    out = torch.empty_like(x)
    torch.mul(x, x, out=out)
    return out + x


def splits(x):
    _, b, c, *_ = x.split(1, 1)
    return torch.stack([b, c, b * c], 1).flatten(1)


def complex_numbers(x):
    y = torch.fft.rfft(x)
    return torch.fft.irfft(y * torch.view_as_complex(torch.arange(6.0).view(3, 2).double()), n=4) + y.abs()[:, :1]


PROGRAMS = [
    in_place_on_a_view,
    aliases_see_a_change,
    filled_buffer,
    transposed_in_place,
    mask_made_in_place,
    control_flow,
    splits,
    complex_numbers,
    lambda x: torch.einsum("ij,kj,kl->il", x, x, x.exp()),
    lambda x: F.scaled_dot_product_attention(*[x[None, None].expand(2, 1, -1, -1)] * 3).sum(0)[0],
    lambda x: F.scaled_dot_product_attention(*[x[None, None]] * 3, attn_mask=x @ x.T, is_causal=False)[0, 0],
    lambda x: F.scaled_dot_product_attention(*[x[None, None]] * 3, is_causal=True)[0, 0],
    shared_heads,
    lambda x: F.layer_norm(x, (4,)),
    lambda x: F.rms_norm(x, (4,)),
    lambda x: F.group_norm(x[:, :, None, None].expand(3, 4, 2, 2), 2).flatten(1),
    lambda x: F.batch_norm(x, None, None, training=True),
    lambda x: F.batch_norm(x, torch.ones(4).double(), torch.ones(4).double() * 3),
    lambda x: F.max_pool1d(x[:, None], 2, 1)[:, 0] + x.amax(1, keepdim=True) + x.max(1)[0][:, None],
    lambda x: F.interpolate(x.view(3, 1, 2, 2), scale_factor=2, mode="bilinear").flatten(1),
    lambda x: F.conv_transpose2d(x.view(3, 1, 2, 2), torch.ones(1, 2, 3, 3).double(), stride=2, padding=1).flatten(1),
    lambda x: F.conv1d(x[:, None], torch.ones(2, 1, 3).double(), torch.ones(2).double(), padding=1).flatten(1),
    lambda x: F.unfold(x.view(3, 1, 2, 2), 2, padding=1).flatten(1),
    lambda x: torch.logsumexp(x, 1, keepdim=True) + x.log_softmax(1) + x.var(1, keepdim=True),
    lambda x: (x.T / x.norm(dim=1)).T - torch.rsub(x, 3) + 2 / (x.abs() + 1) + torch.dot(x[0], x[1]),
    lambda x: torch.addmm(x, x.exp()[:, :3], x, alpha=2) + (x @ x[0])[:, None] + torch.ones(3, 3).double() @ x,
    lambda x: x.index_select(1, torch.tensor([3, 0, 0])) + x[:, torch.tensor([1, 2, 3])].roll(1, 1),
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_input_times_gradient_is_autograds(program):
    x = inputs(3, 4)
    leaf = x.clone().requires_grad_()
    out = program(leaf * 1)
    upstream = inputs(*out.shape, seed=1)
    (slope,) = torch.autograd.grad(out, leaf, upstream)
    assert_close(relevance(program, x, recipe="gradient", start=upstream).map, x * slope)


@pytest.mark.parametrize(
    ("program", "same"),
    [
        (dead_base, lambda x: torch.cat([9 * x[:, :2] * x[:, 2:], 3 * x[:, 2:]], 1)),
        (keeps_old_versions, lambda x: x * x * (x + 1)),
        (out_variant, lambda x: x * x + x),
    ],
)
def test_programs_that_autograd_refuses_are_their_pure_twins(program, same):
    x = inputs(3, 4)
    with pytest.raises(RuntimeError):
        program(x.clone().requires_grad_() * 1).sum().backward()
    upstream = inputs(3, 4, seed=1)
    one, two = (relevance(f, x, recipe="gradient", start=upstream).map for f in (program, same))
    assert_close(one, two)


def test_the_callers_tensors_stay_as_they_were():
    x = inputs(3, 4)
    given, version = x.clone(), x._version
    relevance(lambda y: y.relu_().add_(1), x, recipe="epsilon", start=x)
    assert_close(x, given, rtol=0, atol=0)
    assert x._version == version
    assert not x.requires_grad


def test_layers_are_named_by_their_parameters_and_counted():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2)))
    tape, _ = record(lambda mark, x: model(*x), [torch.ones(1, 4)], dict(model.named_parameters()), gradient().needs)
    assert [(node.layer, node.index) for node in tape.nodes if node.index is not None] == [
        ("0", 0),
        ("2.0", 1),
        ("2.1", 2),
    ]
    assert tape.count == 3
    assert [node.op for node in tape.nodes] == ["addmm", "relu", "addmm", "addmm"]


def test_only_what_rules_read_is_kept():
    model = nn.Sequential(nn.Linear(4, 50), nn.Flatten(), nn.GELU(), nn.Linear(50, 50), nn.Tanh()).double()
    x = inputs(8, 4)
    parameters = dict(model.named_parameters())
    tape, _ = record(lambda mark, given: model(*given), [x], parameters, lambda node: (False, False))
    assert tape.bytes == x.nbytes  # the root, which maps are weighed with
    tape, _ = record(lambda mark, given: model(*given), [x], parameters, lambda node: (True, True))
    assert tape.bytes == x.nbytes + 4 * 8 * 50 * 8


def count_tensors():
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def test_nothing_survives_50_calls():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    x = torch.randn(2, 4)
    relevance(model, x, inner=["0"])
    before = count_tensors()
    for _ in range(50):
        relevance(model, x, inner=["0"])
    assert count_tensors() == before
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
