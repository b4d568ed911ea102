"""agent_attention: a linear attention through agents, its token matrix, what the paper claims, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import agent_attention, agent_attention_weights


def make_inputs(queries=6, keys=7, agents=3, dim=4, value_dim=5, seed=0):
    """Query, key, value, agent and the two biases, in float64 and part of gradients."""
    rng = torch.Generator().manual_seed(seed)
    shapes = [
        (2, 2, queries, dim),
        (2, 2, keys, dim),
        (2, 2, keys, value_dim),
        (2, 2, agents, dim),
        (1, 2, agents, keys),
        (2, queries, agents),
    ]
    return [torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in shapes]


def attend(inputs, **options):
    *tokens, agent_bias, query_bias = inputs
    return agent_attention(*tokens, agent_bias=agent_bias, query_bias=query_bias, **options)


def weights_of(inputs):
    query, key, _, agent, agent_bias, query_bias = inputs
    return agent_attention_weights(query, key, agent, agent_bias=agent_bias, query_bias=query_bias)


@pytest.mark.parametrize(("asked", "scale"), [(None, 0.5), (0.3, 0.3)])
@pytest.mark.parametrize("impl", ["linear", "reference"])
def test_it_is_the_two_softmax_steps_of_the_paper(asked, scale, impl):
    query, key, value, agent, agent_bias, query_bias = inputs = make_inputs(dim=4)
    gathered = torch.einsum("bham,bhme->bhae", torch.softmax(scale * agent @ key.mT + agent_bias, -1), value)
    read = torch.einsum("bhna,bhae->bhne", torch.softmax(scale * query @ agent.mT + query_bias, -1), gathered)
    assert_close(attend(inputs, scale=asked, impl=impl), read)


@given(queries=st.integers(1, 9), keys=st.integers(1, 9), agents=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_linear_equals_reference_in_value_and_gradient(queries, keys, agents, seed):
    inputs = make_inputs(queries, keys, agents, seed=seed)
    linear, reference = (attend(inputs, impl=impl) for impl in ("linear", "reference"))
    assert_close(linear, reference)
    upstream = torch.randn_like(reference)
    assert_close(*(torch.autograd.grad(out, inputs, upstream) for out in (linear, reference)))


@given(agents=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_the_token_matrix_averages_and_has_at_most_the_agents_for_rank(agents, seed):
    inputs = make_inputs(queries=8, keys=9, agents=agents, seed=seed)
    weights = weights_of(inputs)
    assert_close(weights @ inputs[2], attend(inputs))
    assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (weights >= 0).all()
    assert (torch.linalg.matrix_rank(weights) <= agents).all()


def test_one_agent_gives_every_query_the_same():
    out = attend(make_inputs(agents=1))
    assert_close(out, out[:, :, :1].expand_as(out))


def test_with_an_agent_for_each_query_it_is_a_product_of_two_attentions():
    query, key, value, *_ = make_inputs(keys=6)
    first, second = (torch.softmax(0.5 * query @ other.mT, -1) for other in (query, key))
    assert_close(agent_attention(query, key, value, query), first @ second @ value)


def test_every_output_depends_on_every_key():
    inputs = make_inputs()
    out = attend(inputs)
    for n in range(out.shape[2]):
        grads = torch.autograd.grad(out[:, :, n].square().sum(), inputs[1:3], retain_graph=True)
        assert all((grad.abs().sum(-1) > 0).all() for grad in grads)


@pytest.mark.parametrize("impl", ["linear", "reference"])
def test_half_precision_is_close_to_full(impl):
    """Two averages in a row: weights and values are rounded twice."""
    inputs = [x.detach().bfloat16() for x in make_inputs(33, 65, 9, 16, 16)]
    out = attend(inputs, impl=impl)
    full = attend([x.double() for x in inputs], impl="reference")
    assert out.dtype == torch.bfloat16
    assert (out - full).abs().max() < 4 * torch.finfo(torch.bfloat16).eps * inputs[2].abs().max()


@pytest.mark.parametrize("shape", [(2, 2, 4), (2, 3, 3, 4), (1, 2, 3, 4), (2, 2, 3, 5)])
def test_agents_of_another_shape(shape):
    query, key, value, *_ = make_inputs()
    with pytest.raises(InputError, match=r"agent is .* but query is \(2, 2, 6, 4\): both share B, heads and D"):
        agent_attention(query, key, value, torch.zeros(shape, dtype=torch.float64))


def test_an_implementation_that_does_not_exist():
    with pytest.raises(InputError, match="impl is 'liner': did you mean linear"):
        attend(make_inputs(), impl="liner")
