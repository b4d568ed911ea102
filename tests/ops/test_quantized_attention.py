"""Rounding in blocks, and attention on rounded numbers: laws, then errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import quantize_blocks, quantized_attention


def make_inputs(queries=21, keys=13, heads=4, kv_heads=2):
    shapes = [(2, heads, queries, 8), (2, kv_heads, keys, 8), (2, kv_heads, keys, 6)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def dense(query, key, value, mask=None):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


# Rounding


@given(
    length=st.integers(1, 9),
    width=st.integers(1, 9),
    rows=st.integers(0, 5),
    columns=st.integers(0, 5),
    bits=st.integers(2, 16),
)
def test_each_block_becomes_whole_multiples_of_its_own_step(length, width, rows, columns, bits):
    x = torch.randn(length, width, dtype=torch.float64)
    rounded = quantize_blocks(x, (rows, columns), bits)
    most = 2 ** (bits - 1) - 1
    for i in range(0, length, rows or length):
        for j in range(0, width, columns or width):
            cut = slice(i, i + (rows or length)), slice(j, j + (columns or width))
            step = x[cut].abs().max() / most
            whole = rounded[cut] / step
            assert_close(whole, whole.round(), atol=1e-8, rtol=0)
            assert whole.abs().max().round() == most  # the largest is kept, so the range is used
            assert ((rounded[cut] - x[cut]).abs() <= step * (0.5 + 1e-9)).all()


def test_blocks_of_zeros_stay_zero_and_nothing_stays_nothing():
    assert not quantize_blocks(torch.zeros(4, 4), (2, 2)).any()
    assert quantize_blocks(torch.zeros(0, 4), (2, 2)).shape == (0, 4)


def test_the_gradient_goes_straight_through():
    x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(quantize_blocks(x, (2, 0), 4), x, upstream)[0], upstream)


# Attention


def test_with_many_bits_it_is_attention_in_value_and_nearly_in_gradient():
    inputs = make_inputs()
    mask = torch.rand(21, 13) < 0.7
    mask[:, 0] = True
    ours, full = quantized_attention(*inputs, mask=mask, bits=16, block_size=5), dense(*inputs, mask)
    assert_close(ours, full, atol=1e-3, rtol=1e-3)
    upstream = torch.randn_like(full)
    grads = (torch.autograd.grad(each, inputs, upstream) for each in (ours, full))
    assert_close(*grads, atol=2e-3, rtol=1e-3)


def test_fewer_bits_lose_more_and_each_part_has_its_own():
    inputs = make_inputs()
    full = dense(*inputs)
    errors = [(quantized_attention(*inputs, bits=bits) - full).norm().item() for bits in (3, 4, 6, 8, 12)]
    assert errors == sorted(errors, reverse=True)
    fine = (quantized_attention(*inputs, bits=12, weight_bits=4) - full).norm().item()
    assert errors[-1] < fine < errors[1]


def test_smaller_blocks_lose_less_where_scales_differ():
    query, key, value = make_inputs(keys=16)
    loud = torch.ones(21, 1, dtype=torch.float64)
    loud[:4] = 100
    full = dense(query * loud, key, value)[:, :, 4:]
    errors = [
        (quantized_attention(query * loud, key, value, bits=8, weight_bits=16, block_size=size)[:, :, 4:] - full).norm()
        for size in (4, 64)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_a_mean_that_all_keys_share_is_lost_without_taking_it_out():
    query, key, value = make_inputs()
    full = dense(query, key, value)
    errors = [
        (quantized_attention(query, key + 500, value, bits=8, center_keys=center) - full).norm().item()
        for center in (True, False)
    ]
    assert errors[0] < 0.1 * errors[1]
    assert_close(quantized_attention(query, key + 500, value), quantized_attention(query, key, value))


def test_a_query_that_sees_nothing_gets_zero_and_hidden_keys_do_not_matter():
    query, key, value = make_inputs()
    mask = torch.ones(21, 13, dtype=torch.bool)
    mask[3] = False
    out = quantized_attention(query, key, value, mask=mask)
    assert not out[:, :, 3].any()
    assert torch.autograd.grad(out.sum(), query)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_result_has_the_dtype_of_the_inputs(dtype):
    assert quantized_attention(*(x.detach().to(dtype) for x in make_inputs())).dtype == dtype


# Errors


def test_errors_say_what_to_give():
    inputs = make_inputs()
    with pytest.raises(InputError, match="bits is 1: give 2 to 16"):
        quantized_attention(*inputs, bits=1)
    with pytest.raises(InputError, match=r"block_size is \(-1, 0\)"):
        quantize_blocks(torch.ones(2, 2), (-1, 0))
    with pytest.raises(InputError, match="block_size is 0"):
        quantized_attention(*inputs, block_size=0)
    with pytest.raises(TypeError, match=r"mask is torch\.float32: give booleans"):
        quantized_attention(*inputs, mask=torch.zeros(21, 13))
    with pytest.raises(InputError, match="value is"):
        quantized_attention(inputs[0], inputs[1], inputs[2][:, :, 1:])
