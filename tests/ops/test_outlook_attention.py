"""outlook_attention: the sum over windows, both implementations, its token matrix, sizes at the border, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import outlook_attention, outlook_attention_weights


def make_inputs(space=(5, 4), kernel=3, stride=1, dim=4, seed=0):
    """Values and logits of 2 images and 3 heads, in float64 and part of gradients."""
    rng = torch.Generator().manual_seed(seed)
    windows = [-(-length // stride) for length in space]
    shapes = (2, 3, *space, dim), (2, 3, *windows, kernel**2, kernel**2)
    return [torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in shapes]


def sum_windows(value, logits, kernel, stride, padding, scale):
    """The definition, window by window and token by token."""
    out = torch.zeros_like(value)
    inside = [range(length) for length in value.shape[2:4]]
    for i in range(logits.shape[2]):
        for j in range(logits.shape[3]):
            weights = (logits[:, :, i, j] * scale).softmax(-1)
            tokens = [
                (stride * i - padding + row, stride * j - padding + column)
                for row in range(kernel)
                for column in range(kernel)
            ]
            for number, (row, column) in enumerate(tokens):
                if row not in inside[0] or column not in inside[1]:
                    continue
                for other, (r, c) in enumerate(tokens):
                    if r in inside[0] and c in inside[1]:
                        out[:, :, row, column] += weights[:, :, number, other, None] * value[:, :, r, c]
    return out


sizes = st.integers(1, 7)


@pytest.mark.parametrize("impl", ["reference", "windows"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (2, 2, 0), (2, 1, 1), (3, 4, 1), (5, 2, 0), (1, 1, 0)]
)
def test_it_is_the_sum_over_windows(kernel, stride, padding, impl):
    value, logits = (x.detach() for x in make_inputs((5, 4), kernel, stride))
    out = outlook_attention(value, logits, stride=stride, padding=padding, impl=impl)
    assert_close(out, sum_windows(value, logits, kernel, stride, padding, 0.5))


@given(space=st.tuples(sizes, sizes), kernel=st.integers(1, 4), stride=st.integers(1, 4), seed=st.integers(0, 99))
def test_windows_equal_reference_in_value_and_gradient(space, kernel, stride, seed):
    inputs = make_inputs(space, kernel, stride, seed=seed)
    windows, reference = (
        outlook_attention(*inputs, stride=stride, padding=seed % kernel, impl=impl) for impl in ("windows", "reference")
    )
    assert_close(windows, reference)
    upstream = torch.randn_like(reference)
    assert_close(*(torch.autograd.grad(out, inputs, upstream) for out in (windows, reference)))


@pytest.mark.parametrize("stride", [1, 2])
def test_second_gradients_are_those_of_finite_differences(stride):
    inputs = make_inputs((3, 4), 2, stride, dim=2)
    call = lambda *inputs: outlook_attention(*inputs, stride=stride)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@given(space=st.tuples(sizes, sizes), stride=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_token_matrix_gives_the_output(space, stride, seed):
    value, logits = make_inputs(space, 3, stride, seed=seed)
    weights = outlook_attention_weights(logits, space, stride=stride, scale=0.5)
    assert_close(weights @ value.flatten(2, 3), outlook_attention(value, logits, stride=stride).flatten(2, 3))


def test_scale_is_of_the_logits():
    value, logits = make_inputs(dim=4)
    assert_close(outlook_attention(value, logits), outlook_attention(value, logits / 2, scale=1.0))
    mixed = outlook_attention(value, logits, scale=0.0)
    assert_close(mixed, outlook_attention(value, torch.zeros_like(logits)))


def test_a_token_in_no_window_gets_0():
    value, logits = make_inputs((1, 8), 1, 3)
    out = outlook_attention(value, logits, stride=3)
    assert (out[:, :, 0, [0, 3, 6]] == value[:, :, 0, [0, 3, 6]]).all()
    assert (out[:, :, 0, [1, 2, 4, 5, 7]] == 0).all()


@pytest.mark.parametrize("impl", ["windows", "reference"])
def test_half_precision_is_close_to_full(impl):
    """Nine windows of nine weighted values are summed: weights, products and sums are rounded."""
    inputs = [x.detach().bfloat16() for x in make_inputs((9, 8), dim=16)]
    out, full = outlook_attention(*inputs, impl=impl), outlook_attention(*(x.double() for x in inputs))
    assert out.dtype == torch.bfloat16
    error = (out - full).square().mean().sqrt() / full.square().mean().sqrt()
    assert error < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    "shape", [(2, 3, 3, 2, 9, 9), (2, 3, 5, 4, 9, 9), (2, 3, 3, 2, 9, 4), (2, 3, 3, 2, 8, 8), (4,)]
)
def test_logits_of_another_shape(shape):
    value, _ = make_inputs((5, 4))
    stride = 1 if shape[2:3] == (3,) and shape[-2:] == (9, 9) else 2
    expected = (2, 3, 5, 4) if stride == 1 else (2, 3, 3, 2)
    message = rf"logits is .* with stride {stride} give \({', '.join(map(str, expected))}, K\^2, K\^2\)"
    with pytest.raises(InputError, match=message):
        outlook_attention(value, torch.zeros(shape, dtype=torch.float64), stride=stride)


def test_values_without_two_axes_of_space():
    with pytest.raises(InputError, match=r"value is \(2, 3, 5, 4\): give \(B, heads, H, W, E\)"):
        outlook_attention(torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 9, 9))


def test_numbers_that_are_not_floats():
    value, logits = make_inputs()
    with pytest.raises(TypeError, match=r"logits is torch.int64: outlook attention takes floating-point"):
        outlook_attention(value, logits.long())


@pytest.mark.parametrize("padding", [-1, 3])
def test_a_padding_that_leaves_the_first_window_outside(padding):
    with pytest.raises(InputError, match=rf"padding is {padding} and a window has 3 x 3 tokens: take 0 to 2"):
        outlook_attention(*make_inputs(), padding=padding)


def test_a_stride_of_0_and_an_implementation_that_does_not_exist():
    with pytest.raises(InputError, match="stride is 0: give an integer of at least 1"):
        outlook_attention(*make_inputs(), stride=0)
    with pytest.raises(InputError, match="impl is 'window': did you mean windows"):
        outlook_attention(*make_inputs(), impl="window")
