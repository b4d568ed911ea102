"""focal_context: the equation against convolutions, its matrix, limits and errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import focal_context
from saccade.ops.focal_modulation import focal_context_weights


def make_inputs(*space, levels=2, channels=3, grad=False):
    context = torch.randn(2, *space, channels, dtype=torch.float64, requires_grad=grad)
    gates = torch.randn(2, *space, levels + 1, dtype=torch.float64, requires_grad=grad)
    sizes = [3, 5, 1][:levels]
    kernels = [
        torch.randn(channels, 1, *[size] * len(space), dtype=torch.float64, requires_grad=grad) for size in sizes
    ]
    return context, gates, kernels


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("space", [(1,), (11,), (5, 7), (1, 2), (3, 4, 2)], ids=str)
def test_convolutions_equal_the_reference_in_value_and_gradient(space, levels, normalize):
    context, gates, kernels = make_inputs(*space, levels=levels, grad=True)
    outs = [focal_context(context, gates, kernels, normalize=normalize, impl=impl) for impl in ("conv", "reference")]
    assert_close(*outs)
    upstream = torch.randn_like(outs[0])
    assert_close(*(torch.autograd.grad(out, [context, gates, *kernels], upstream) for out in outs))


def test_kernels_of_unequal_sides():
    context, gates, _ = make_inputs(5, 7, levels=1)
    kernels = [torch.randn(3, 1, 1, 5, dtype=torch.float64)]
    assert_close(focal_context(context, gates, kernels), focal_context(context, gates, kernels, impl="reference"))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("space", [(9,), (5, 7), (9, 9), (3, 4, 2)], ids=str)
def test_the_matrix_makes_the_context_of_equal_channels(space, normalize):
    context, gates, kernels = make_inputs(*space)
    context = context[..., :1].expand(*context.shape).contiguous()
    matrix = focal_context_weights(context, gates, kernels, normalize=normalize)
    out = focal_context(context, gates, kernels, normalize=normalize)
    assert_close((matrix @ context[..., :1].flatten(1, -2)).squeeze(-1), out.mean(-1).flatten(1))


def test_without_kernels_there_is_the_mean_alone():
    context, gates, _ = make_inputs(5, 7, levels=0)
    assert_close(focal_context(context, gates, []), F.gelu(context.mean((1, 2), keepdim=True)) * gates)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": torch.zeros(2, 5, 7, 2)}, r"with 2 kernels give gates \(2, 5, 7, 3\)"),
        ({"gates": torch.zeros(2, 5, 6, 3)}, r"gates is \(2, 5, 6, 3\)"),
        ({"context": torch.zeros(2, 3)}, r"give context \(B, \*space, C\)"),
        ({"kernels": [torch.zeros(3, 3, 3)] * 2}, r"a kernel is \(3, 3, 3\) and context is \(2, 5, 7, 3\)"),
        ({"kernels": [torch.zeros(4, 1, 3, 3)] * 2}, r"give \(3, 1, a size for each axis"),
        ({"kernels": [torch.zeros(3, 1, 2, 3)] * 2}, "give odd sizes"),
        ({"impl": "fft"}, "impl is 'fft'"),
    ],
)
def test_errors_say_what_to_do(change, message):
    context, gates, kernels = make_inputs(5, 7)
    with pytest.raises(InputError, match=message):
        focal_context(**{"context": context, "gates": gates, "kernels": kernels} | change)
    with pytest.raises(TypeError, match=r"context is torch.int64"):
        focal_context(context.long(), gates, kernels)
