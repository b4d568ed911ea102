"""dynamic_filter: sums over clamped windows, both implementations in value and gradient, its token matrix, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import Neighborhood, RelativeTable, dynamic_filter, dynamic_filter_weights, window_bias


def make_inputs(space=(5, 7), size=3, dim=4, dtype=torch.float64, seed=0):
    """Values and kernels of 2 images and 3 heads."""
    rng = torch.Generator().manual_seed(seed)
    shapes = (2, 3, *space, dim), (2, 3, *space, size**2)
    return [torch.randn(shape, generator=rng, dtype=dtype).requires_grad_() for shape in shapes]


def scatter(kernels, space, size):
    """The token matrix by another way: kernels written where NATTEN's pattern has its True entries, row by row."""
    mask = Neighborhood(size).mask(space)
    matrix = torch.zeros(*kernels.shape[:2], *mask.shape, dtype=kernels.dtype)
    matrix[:, :, mask] = kernels.flatten(2)
    return matrix


SIZES = [((5, 7), 3), ((5, 5), 5), ((6, 5), 5), ((9, 8), 5), ((3, 4), 1), ((4, 11), 3), ((14, 14), 13), ((3, 99), 3)]


@pytest.mark.parametrize(("space", "size"), SIZES)
@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_it_is_the_product_with_kernels_in_the_clamped_windows(space, size, impl):
    value, kernels = make_inputs(space, size)
    matrix = scatter(kernels, space, size)
    out = dynamic_filter(value, kernels, impl=impl)
    assert_close(out, (matrix @ value.flatten(2, 3)).unflatten(2, space))
    assert_close(dynamic_filter_weights(kernels), matrix)


@given(
    extra=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    half=st.integers(0, 3),
    dim=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_tiled_equals_reference_in_value_and_gradient(extra, half, dim, seed):
    size = 2 * half + 1
    inputs = make_inputs((size + extra[0], size + extra[1]), size, dim, seed=seed)
    tiled, reference = (dynamic_filter(*inputs, impl=impl) for impl in ("tiled", "reference"))
    assert_close(tiled, reference)
    upstream = torch.randn_like(reference)
    assert_close(*(torch.autograd.grad(out, inputs, upstream) for out in (tiled, reference)))


def test_second_derivatives_are_those_of_finite_differences():
    inputs = make_inputs((4, 3), 3, 2)
    assert torch.autograd.gradcheck(dynamic_filter, inputs)
    assert torch.autograd.gradgradcheck(dynamic_filter, inputs)


def test_a_gradient_that_nobody_wants_is_not_computed():
    value, kernels = make_inputs()
    out = dynamic_filter(value.detach(), kernels)
    assert torch.autograd.grad(out.sum(), kernels)[0].any()
    assert not dynamic_filter(value.detach(), kernels.detach()).requires_grad


@pytest.mark.parametrize("space", [(5, 5), (9, 12)])
def test_uniform_kernels_are_box_means_which_repeat_at_the_border(space):
    value = make_inputs(space, 5)[0]
    out = dynamic_filter(value, torch.full((2, 3, *space, 25), 1 / 25, dtype=torch.float64))
    means = torch.nn.functional.avg_pool2d(value.flatten(0, 1).movedim(-1, 1), 5, 1)
    means = torch.nn.functional.pad(means, (2, 2, 2, 2), mode="replicate")
    assert_close(out, means.movedim(1, -1).unflatten(0, (2, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_summed_in_float32(dtype):
    value, kernels = make_inputs((15, 16), 13, dtype=dtype)
    out, exact = dynamic_filter(value, kernels), dynamic_filter(value.double(), kernels.double())
    assert out.dtype == dtype
    assert_close(out, exact.to(dtype))


def test_maps_in_any_order_of_memory_and_compiled():
    value, kernels = make_inputs((9, 8), 5)
    strided = value.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4)
    assert not strided.is_contiguous()
    assert_close(dynamic_filter(strided, kernels), dynamic_filter(value, kernels))
    compiled = torch.compile(dynamic_filter, fullgraph=True, backend="aot_eager")
    out, expected = compiled(value, kernels), dynamic_filter(value, kernels)
    assert_close(out, expected)
    grads = (torch.autograd.grad(each.square().sum(), (value, kernels)) for each in (out, expected))
    assert_close(*grads)


@pytest.mark.parametrize(("space", "size"), SIZES)
def test_bias_is_the_table_of_the_pattern(space, size):
    table = torch.randn(3, 2 * size - 1, 2 * size - 1, dtype=torch.float64)
    tokens = torch.cartesian_prod(*(torch.arange(length) for length in space))
    offset = (tokens - tokens.unsqueeze(1)).movedim(-1, 0).unsqueeze(1)  # (axes, 1, N, N), key minus query
    dense = RelativeTable(table)(torch.zeros(()), offset)[0]
    expected = dense[:, Neighborhood(size).mask(space)].unflatten(1, (*space, size, size))
    assert_close(window_bias(table, space), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, k: dynamic_filter(v, k, impl="fast"), "impl is 'fast'"),
        (lambda v, k: dynamic_filter(v[0], k), r"value is \(3, 5, 7, 4\): give \(B, heads, H, W, channels or places\)"),
        (lambda v, k: dynamic_filter(v, k[:, :, 1:]), "both share"),
        (lambda v, k: dynamic_filter(v, k[..., :8]), "a kernel has K\\^2 weights"),
        (lambda v, k: dynamic_filter(v, k[..., :4]), "kernels have 2 x 2 places .* take an odd side of at most 5"),
        (lambda v, k: dynamic_filter(v[:, :, :2], k[:, :, :2]), r"3 x 3 places and the map is \(2, 7\)"),
        (lambda v, k: window_bias(torch.zeros(2, 3, 5), (5, 5)), r"give \(heads, 2 K - 1, 2 K - 1\)"),
        (lambda v, k: window_bias(torch.zeros(2, 13, 13), (7, 5)), r"7 x 7 places and the map is \(7, 5\)"),
    ],
)
def test_errors_say_what_fits(call, message):
    with pytest.raises(InputError, match=message):
        call(*make_inputs())


def test_integers_are_no_values():
    value, kernels = make_inputs()
    with pytest.raises(TypeError, match=r"value is torch\.int64"):
        dynamic_filter(value.long(), kernels)
