"""channel_attention: the paper's equation, averages over the channels of a head, any order of positions, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import channel_attention, channel_attention_weights


def make_inputs(tokens=7, dim=4, seed=0):
    """Query, key and value of 2 images and 3 heads, in float64 and part of gradients."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, tokens, dim, generator=rng, dtype=torch.float64).requires_grad_() for _ in range(3)]


@given(tokens=st.integers(1, 9), dim=st.integers(1, 6), seed=st.integers(0, 99))
def test_it_is_softmax_attention_of_the_transposed_map(tokens, dim, seed):
    inputs = make_inputs(tokens, dim, seed)
    query, key, value = inputs
    weights = (torch.einsum("bhnc,bhnd->bhcd", query, key) * dim**-0.5).softmax(-1)
    expected = torch.einsum("bhcd,bhnd->bhnc", weights, value)
    out = channel_attention(query, key, value)
    assert_close(out, expected)
    upstream = torch.randn_like(out)
    assert_close(*(torch.autograd.grad(each, inputs, upstream) for each in (out, expected)))


def test_every_output_is_an_average_of_its_own_values():
    query, key, value = make_inputs()
    weights = channel_attention_weights(query, key)
    assert (weights >= 0).all()
    assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    out = channel_attention(query, key, value)
    assert (out <= value.amax(-1, True) + 1e-12).all()
    assert (out >= value.amin(-1, True) - 1e-12).all()


def test_weights_are_0_before_their_products_would_be_denormal_numbers():
    rng = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 900, 8, generator=rng) for _ in range(2))
    query = query + 2 * key
    weights, exact = (channel_attention_weights(query.to(t), key.to(t)) for t in (torch.float32, torch.float64))
    small = exact < 1e-30
    assert 0 < small.sum() < small.numel()
    assert ((weights == 0) | (weights > 9e-32)).all()
    assert ((exact > 0) & (exact < 1e-40)).any()
    assert_close(weights, exact.float())


def test_the_order_of_positions_does_not_matter():
    inputs, order = make_inputs(), torch.randperm(7)
    shuffled = [x[:, :, order] for x in inputs]
    assert_close(channel_attention(*shuffled), channel_attention(*inputs)[:, :, order])


def test_every_output_depends_on_every_position():
    inputs = make_inputs()
    out = channel_attention(*inputs)
    for n in range(7):
        grads = torch.autograd.grad(out[:, :, n].square().sum(), inputs[:2], retain_graph=True)
        assert all((grad.abs().sum(-1) > 0).all() for grad in grads)


def test_scale_is_of_the_products():
    query, key, value = make_inputs(dim=4)
    assert_close(channel_attention(query, key, value, scale=0.5), channel_attention(query, key, value))
    mean = value.mean(-1, keepdim=True).expand_as(value)
    assert_close(channel_attention(query, key, value, scale=0.0), mean)


def test_products_of_many_positions_do_not_overflow_in_half_precision():
    """The sum over 64 x 64 positions of 16 is far above what float16 holds; the weights are made in float32."""
    x = torch.full((1, 1, 64 * 64, 4), 16.0, dtype=torch.float16)
    out = channel_attention(x, x, x)
    assert out.dtype == torch.float16
    assert_close(out, x)


def test_shapes_that_do_not_fit_together():
    query, key, value = make_inputs()
    with pytest.raises(InputError, match=r"value is .* but key is .*: both share \(B, heads, \*space\)"):
        channel_attention(query, key, value[:, :, :5])
