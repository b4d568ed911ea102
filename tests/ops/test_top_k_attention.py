"""top_k_attention: fast equals reference and a loop over queries, for whole and fractional counts; errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import top_k_attention, top_k_attention_weights


def make_inputs(space=(5,), key_space=None, *, heads=4, kv_heads=2):
    shapes = [(2, heads, *space, 6), (2, kv_heads, *(key_space or space), 6), (2, kv_heads, *(key_space or space), 3)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def attend_one_by_one(query, key, value, count, scale):
    """Sort the scores of each query, and sum over the first: flat axes of space."""
    out = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    for image, head, row in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        own = head // (query.shape[1] // key.shape[1])
        scores = scale * key[image, own] @ query[image, head, row]
        total, left = 0.0, float(count[image])
        for best in scores.argsort(descending=True):
            if left > 0:
                weight = min(left, 1.0) * (scores[best] - scores.max()).exp()
                out[image, head, row] += weight * value[image, own, best]
                total, left = total + weight, left - 1
        out[image, head, row] /= total
    return out


COUNTS = [1, 3, 7, 50, (1.0, 7.0), (0.3, 2.5), (3.0, 3.25), (6.9, 50.0)]


@pytest.mark.parametrize("scale", [0.7, -0.7])
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("count", COUNTS, ids=str)
def test_every_query_takes_its_best_keys(count, impl, scale):
    query, key, value = (x.detach() for x in make_inputs((5,), (7,)))
    given_count = torch.tensor(count, dtype=torch.float64) if isinstance(count, tuple) else count
    expected = attend_one_by_one(query, key, value, count if isinstance(count, tuple) else (count,) * 2, scale)
    assert_close(top_k_attention(query, key, value, given_count, scale=scale, impl=impl), expected)


@pytest.mark.parametrize("count", COUNTS, ids=str)
@pytest.mark.parametrize(("space", "key_space"), [((4, 3), None), ((2, 2, 2), (3, 1, 4))])
def test_fast_equals_reference_in_value_and_gradient(space, key_space, count):
    inputs = make_inputs(space, key_space)
    leaves = list(inputs)
    if isinstance(count, tuple):
        count = torch.tensor(count, dtype=torch.float64, requires_grad=True)
        leaves.append(count)
    fast, slow = (top_k_attention(*inputs, count, impl=impl) for impl in ("auto", "reference"))
    assert_close(fast, slow)
    upstream = torch.randn_like(slow)
    assert_close(*(torch.autograd.grad(out, leaves, upstream) for out in (fast, slow)))


def test_gradients_of_a_fractional_count_are_those_of_finite_differences():
    count = torch.tensor([1.4, 3.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(top_k_attention, (*make_inputs((3, 2)), count))


@given(count=st.floats(0.1, 9), seed=st.integers(0, 2**32 - 1))
def test_weights_sum_to_one_over_the_kept_keys_and_make_the_output(count, seed):
    torch.manual_seed(seed)
    query, key, value = make_inputs((3, 3), kv_heads=4)
    counts = torch.full((2,), count, dtype=torch.float64)
    weights = top_k_attention_weights(query, key, counts)
    assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert ((weights > 0).sum(-1) == -int(-count // 1)).all()
    assert_close((weights @ value.flatten(2, 3)).unflatten(2, (3, 3)), top_k_attention(query, key, value, counts))


def test_a_fraction_goes_from_one_count_to_the_next_without_a_jump():
    inputs = make_inputs((6,))
    for count in (2, 3):
        expected = top_k_attention(*inputs, count)
        for near in (count - 1e-9, count + 1e-9, float(count)):
            assert_close(top_k_attention(*inputs, torch.full((2,), near, dtype=torch.float64)), expected)


def test_errors_say_what_to_do():
    inputs = make_inputs((6,))
    with pytest.raises(InputError, match="count is 0: give an integer of at least 1"):
        top_k_attention(*inputs, 0)
    with pytest.raises(InputError, match=r"count is torch.float32 \(3,\): .* floats \(2,\), one an image"):
        top_k_attention(*inputs, torch.ones(3))
    with pytest.raises(InputError, match=r"count is torch.int64 \(2,\)"):
        top_k_attention(*inputs, torch.ones(2, dtype=torch.long))
    with pytest.raises(InputError, match=r"count is \[1.0, 0.0\]: .* Give numbers above 0"):
        top_k_attention_weights(*inputs[:2], torch.tensor([1.0, 0.0]))
    with pytest.raises(InputError, match="impl is 'flex'"):
        top_k_attention(*inputs, 2, impl="flex")
