"""softmax_attention and merge_attention: laws, borders, half precision, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import AttentionResult, merge_attention, softmax_attention

IMPLS = ("reference", "fused")


def make_inputs(queries=5, keys=7, dim=4, value_dim=3, heads=4, kv_heads=2, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, queries, dim), (2, kv_heads, keys, dim), (2, kv_heads, keys, value_dim)]
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def average(query, key, value, visible, bias, scale):
    """The definition, one query and one key at a time; the share of a hidden key is never formed."""
    group = query.shape[1] // key.shape[1]
    out = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    lse = torch.full(query.shape[:-1], -math.inf, dtype=query.dtype)
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for n in range(query.shape[2]):
                seen = visible[b, h, n].nonzero().flatten().tolist()
                logits = [scale * query[b, h, n] @ key[b, h // group, m] + bias[b, h, n, m] for m in seen]
                if logits:
                    lse[b, h, n] = torch.stack(logits).logsumexp(0)
                for m, logit in zip(seen, logits):
                    out[b, h, n] += (logit - lse[b, h, n]).exp() * value[b, h // group, m]
    return out, lse


@given(seed=st.integers(0, 2**32 - 1), queries=st.integers(1, 5), keys=st.integers(1, 6), dim=st.integers(1, 4))
def test_it_is_the_average_over_visible_keys_and_a_query_without_any_gets_0(seed, queries, keys, dim):
    query, key, value = (x.detach() for x in make_inputs(queries, keys, dim, seed=seed))
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 4, queries, keys, generator=rng) < 0.6
    bias = torch.randn(2, 4, queries, keys, generator=rng, dtype=torch.float64)
    out, lse = average(query, key, value, mask, bias, 0.3)
    for impl in IMPLS:
        assert_close(softmax_attention(query, key, value, mask=mask, bias=bias, scale=0.3, impl=impl), out)
    assert_close(softmax_attention(query, key, value, mask=mask, bias=bias, scale=0.3, return_lse=True).lse, lse)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (9, 2)])
@pytest.mark.parametrize("hide", [False, True])
def test_fused_equals_reference_in_value_and_gradient(shape, hide):
    inputs = make_inputs(*shape)
    bias = torch.randn(1, 4, *shape, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 1, *shape) < 0.5 if hide else None
    out = [softmax_attention(*inputs, mask=mask, bias=bias, impl=impl) for impl in IMPLS]
    assert_close(*out)
    upstream = torch.randn_like(out[0])
    assert_close(*(torch.autograd.grad(o, [*inputs, bias], upstream) for o in out))


def test_gradients_of_output_and_log_sum_exp_are_those_of_finite_differences():
    inputs = make_inputs(3, 4, 2, 2, heads=2, kv_heads=1)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda *x: softmax_attention(*x, mask=mask, return_lse=True), inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_that_sees_nothing_gets_0_and_gives_no_gradient(impl):
    inputs = make_inputs()
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    out = softmax_attention(*inputs, mask=mask, impl=impl)
    assert (out[:, :, 2] == 0).all()
    grads = torch.autograd.grad(out[:, :, 2].sum(), inputs)
    assert all((grad == 0).all() for grad in grads)
    grads = torch.autograd.grad(softmax_attention(*inputs, mask=mask, impl=impl).square().sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, :, 2] == 0).all()


def test_the_log_sum_exp_of_a_query_that_sees_nothing_is_minus_infinity_without_gradient():
    inputs = make_inputs()
    lse = softmax_attention(*inputs, mask=torch.zeros(5, 7, dtype=torch.bool), return_lse=True).lse
    assert (lse == -math.inf).all()
    grads = torch.autograd.grad(lse.sum(), inputs[:2])
    assert all((grad == 0).all() for grad in grads)


def test_booleans_and_floats_as_mask_and_bias_say_the_same():
    query, key, value = make_inputs()
    mask, bias = torch.rand(5, 7) < 0.7, torch.randn(4, 1, 7, dtype=torch.float64)
    floats = torch.zeros(5, 7, dtype=torch.float64).masked_fill(~mask, -math.inf)
    expected = softmax_attention(query, key, value, mask=mask, bias=bias)
    assert_close(softmax_attention(query, key, value, mask=floats, bias=bias), expected)
    assert_close(softmax_attention(query, key, value, mask=floats + bias), expected)


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3)])
@pytest.mark.parametrize(("anchor", "torchs"), [("top_left", causal_upper_left), ("bottom_right", causal_lower_right)])
@pytest.mark.parametrize("impl", IMPLS)
def test_causal_anchors_are_those_of_torch(shape, anchor, torchs, impl):
    inputs = make_inputs(*shape, kv_heads=4)
    mask = torch.ones(shape, dtype=torch.bool).tril(0 if anchor == "top_left" else shape[1] - shape[0])
    out = softmax_attention(*inputs, causal=anchor, impl=impl)
    assert_close(out, softmax_attention(*inputs, mask=mask, impl=impl))
    assert (out[:, :, ~mask.any(1)] == 0).all()
    if mask.any(1).all():  # torch gives NaN where a query sees nothing
        assert_close(out, F.scaled_dot_product_attention(*inputs, attn_mask=torchs(*shape)))


def test_a_bias_may_stand_beside_causal():
    query, key, value = make_inputs(5, 5)
    slope = -torch.arange(5.0, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = softmax_attention(query, key, value, mask=mask, bias=slope)
    assert_close(softmax_attention(query, key, value, causal="top_left", bias=slope), expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_key_head_serves_as_many_query_heads_in_a_row(impl):
    query, key, value = make_inputs(heads=6, kv_heads=2)
    repeated = [x.repeat_interleave(3, 1) for x in (key, value)]
    assert_close(softmax_attention(query, key, value, impl=impl), softmax_attention(query, *repeated, impl=impl))


def test_scale_is_one_over_the_root_of_the_width_and_0_is_a_scale():
    query, key, value = make_inputs(dim=4)
    assert_close(softmax_attention(query, key, value), softmax_attention(query, key, value, scale=0.5))
    mean = value.mean(2, keepdim=True).repeat_interleave(2, 1).expand(-1, -1, 5, -1)
    assert_close(softmax_attention(query, key, value, scale=0.0), mean)


@pytest.mark.parametrize("impl", IMPLS)
def test_logits_may_be_huge(impl):
    query, key, value = make_inputs()
    out = softmax_attention(query, key, value, scale=1e6, impl=impl)
    best = (query @ key.repeat_interleave(2, 1).mT).argmax(-1, keepdim=True)
    assert_close(out, value.repeat_interleave(2, 1).gather(2, best.expand(-1, -1, -1, 3)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_full(impl, dtype):
    """The output averages values, so an error of eps relative to the largest is one rounding of weights and result."""
    inputs = make_inputs(33, 65, 16, dtype=dtype)
    out = softmax_attention(*inputs, impl=impl)
    full = softmax_attention(*(x.float() for x in inputs), impl="reference")
    assert out.dtype == dtype
    assert (out - full).abs().max() < 2 * torch.finfo(dtype).eps * inputs[2].abs().max()


def test_the_log_sum_exp_of_half_precision_is_float32():
    out, lse = softmax_attention(*make_inputs(dtype=torch.bfloat16), return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


# Merging


def attend_in_parts(inputs, cuts, **options):
    query, key, value = inputs
    parts = zip(key.tensor_split(cuts, 2), value.tensor_split(cuts, 2))
    return merge_attention([softmax_attention(query, k, v, return_lse=True, **options) for k, v in parts])


@given(cuts=st.lists(st.integers(1, 8), max_size=4, unique=True).map(sorted), seed=st.integers(0, 2**32 - 1))
def test_merged_parts_are_attention_over_all_keys_in_value_and_gradient(cuts, seed):
    inputs = make_inputs(keys=9, seed=seed)
    whole, merged = softmax_attention(*inputs, return_lse=True), attend_in_parts(inputs, cuts)
    assert_close(merged, whole)
    upstream = [torch.randn_like(x) for x in whole]
    assert_close(*(torch.autograd.grad(result, inputs, upstream) for result in (merged, whole)))


def test_parts_that_show_a_query_nothing_add_nothing():
    query, key, value = inputs = make_inputs(keys=6)
    mask = torch.rand(5, 6) < 0.5
    mask[0] = False  # sees nothing anywhere
    mask[1], mask[2] = torch.tensor([1, 1, 1, 0, 0, 0]), torch.tensor([0, 0, 0, 0, 1, 1])  # one part each
    parts = [
        softmax_attention(query, key[:, :, part], value[:, :, part], mask=mask[:, part], return_lse=True)
        for part in (slice(0, 3), slice(3, 6))
    ]
    whole, merged = softmax_attention(*inputs, mask=mask, return_lse=True), merge_attention(parts)
    assert_close(merged, whole)
    assert (merged.out[:, :, 0] == 0).all()
    upstream = [torch.randn_like(x) for x in whole]
    assert_close(*(torch.autograd.grad(result, inputs, upstream) for result in (merged, whole)))


def test_merging_is_independent_of_order_and_grouping():
    query, key, value = make_inputs(keys=6)
    a, b, c = (softmax_attention(query, key[:, :, i::3], value[:, :, i::3], return_lse=True) for i in range(3))
    expected = merge_attention([a, b, c])
    assert_close(merge_attention([c, a, b]), expected)
    assert_close(merge_attention([merge_attention([a, b]), tuple(c)]), expected)
    assert_close(merge_attention([a]), a)


def test_merged_half_precision_keeps_its_dtypes():
    merged = attend_in_parts(make_inputs(dtype=torch.float16), [3])
    assert isinstance(merged, AttentionResult)
    assert (merged.out.dtype, merged.lse.dtype) == (torch.float16, torch.float32)


# Errors


def test_merging_nothing():
    with pytest.raises(InputError, match="parts is empty: give at least one"):
        merge_attention([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mask": torch.ones(5, 7).bool(), "causal": "top_left"},
            "mask is given and causal is 'top_left': give one",
        ),
        ({"causal": "top-left"}, "causal is 'top-left': did you mean top_left"),
        ({"impl": "fuse"}, "impl is 'fuse': did you mean fused"),
        ({"impl": "fused", "return_lse": True}, "impl is 'fused' and return_lse is True: .* Use impl='reference'"),
    ],
)
def test_options_that_cannot_be_served(options, message):
    with pytest.raises(InputError, match=message):
        softmax_attention(*make_inputs(), **options)


def test_a_mask_or_bias_of_integers():
    with pytest.raises(TypeError, match=r"mask is torch.int64: give floats to add to the logits, or booleans"):
        softmax_attention(*make_inputs(), mask=torch.ones(5, 7, dtype=torch.long))
    with pytest.raises(TypeError, match=r"bias is torch.bool: give floats to add to the logits$"):
        softmax_attention(*make_inputs(), bias=torch.ones(5, 7, dtype=torch.bool))
