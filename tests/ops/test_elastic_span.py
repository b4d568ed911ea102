"""ElasticSpan and what rules lose: the published layout, candidates, influence as a change of the loss, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import (
    ElasticSpan,
    PerHead,
    attention_influence,
    span_candidates,
    span_densities,
    span_losses,
    sparse_attention,
    sum_blocks,
)


def layout_as_published(rule, blocks):
    """A band around the diagonal, the first row and the first column."""
    width = max(1, int(rule.alpha // rule.block_size + rule.beta * blocks))
    see = torch.zeros(blocks, blocks, dtype=torch.bool)
    for row in range(blocks):
        see[row, max(0, row - width + 1) : row + width] = True
    see[0] = see[:, 0] = True
    return see


rules = st.builds(ElasticSpan, st.floats(-300, 500), st.floats(0, 1.5), st.sampled_from([1, 8, 64]))


@given(rule=rules, blocks=st.integers(1, 12))
def test_the_layout_is_the_published_one(rule, blocks):
    length = blocks * rule.block_size
    assert torch.equal(rule.layout(length), layout_as_published(rule, blocks))
    seen = rule.with_sinks().mask((length,))
    tokens = rule.layout(length).repeat_interleave(rule.block_size, 0).repeat_interleave(rule.block_size, 1).tril()
    assert torch.equal(seen, tokens)
    fullest = rule.layout(length).tril().sum(-1).max() / blocks
    assert_close(span_densities([rule], length)[0], fullest)


def test_negative_alphas_are_rounded_down_and_the_sum_towards_zero():
    assert [ElasticSpan(alpha, 0.5, 8).blocks(80) for alpha in (-9, -8, -1, 0, 7, 8)] == [3, 4, 4, 5, 5, 6]
    assert ElasticSpan(-8, 0.26, 8).blocks(40) == 1  # int(0.3) is 0, and the own block is seen in any case


def test_without_sinks_and_in_both_directions():
    rule = ElasticSpan(4, 0, 2)
    assert torch.equal(rule.with_sinks(0, causal=False).mask((9,)), rule.mask((9,)))
    assert torch.equal(rule.with_sinks(3, causal=False).mask((9,)), rule.mask((9,)) | (torch.arange(9) < 3))
    assert torch.equal(rule.with_sinks(0).mask((9,)), rule.mask((9,)).tril())


def test_heads_with_spans_of_their_own_in_value_and_gradient():
    inputs = [torch.randn(2, 3, 37, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    heads = [ElasticSpan(4, 0, 4), ElasticSpan(-8, 0.5, 4), ElasticSpan(0, 1, 4)]
    pattern = PerHead([rule.with_sinks() for rule in heads])
    fast, slow = (sparse_attention(*inputs, pattern, impl=impl) for impl in ("auto", "reference"))
    assert_close(fast, slow)
    for head, rule in enumerate(heads):
        query, key, value = (x[:, head] for x in inputs)
        hidden = ~(layout_as_published(rule, 10).repeat_interleave(4, 0).repeat_interleave(4, 1)[:37, :37].tril())
        weights = (query @ key.mT / 2).masked_fill(hidden, -torch.inf).softmax(-1)
        assert_close(fast[:, head], weights @ value)
    upstream = torch.randn_like(slow)
    assert_close(*(torch.autograd.grad(each, inputs, upstream) for each in (fast, slow)))


def test_candidates_fit_and_are_sorted_by_their_span_at_the_longest():
    found = span_candidates(2048, 8192, 16384)
    assert {rule.alpha for rule in found} <= set(range(-2048, 8193, 1024))
    spans = [rule.tokens(16384) for rule in found]
    assert spans == sorted(spans)
    assert spans[-1] == 16384
    for rule in found:
        assert rule.tokens(8192) <= 8192
        assert rule.tokens(2048) > 0
    assert ElasticSpan(-1024, 1.0) in found
    assert ElasticSpan(-1024, 0.5) not in found  # a span of 0 at 2048 tokens
    assert ElasticSpan(1024, 1.0) not in found  # longer than the sequence


# Influence


def make_map(length=7, causal=True):
    logits = torch.randn(2, 3, length, length, dtype=torch.float64)
    if causal:
        logits = logits.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
    return logits.softmax(-1), torch.randn(2, 3, length, length, dtype=torch.float64)


@pytest.mark.parametrize("causal", [False, True])
def test_influence_is_what_a_linear_loss_gains(causal):
    attention, grad = make_map(causal=causal)
    influence = attention_influence(attention, grad, eps=0.0)
    loss = (attention * grad).sum(-1)
    for entry in range(7):
        masked = attention.index_fill(-1, torch.tensor(entry), 0)
        masked = masked / masked.sum(-1, keepdim=True)
        change = (masked.nan_to_num(0) * grad).sum(-1) - loss  # a row without keys gives 0
        assert_close(influence[..., entry], change)


def test_influence_is_the_first_order_change_of_any_loss():
    """By central differences, along the way from the map to the one without an entry."""
    attention, _ = make_map(causal=False)
    attention.requires_grad_()
    value = torch.randn(7, 4, dtype=torch.float64)
    loss = (attention @ value).tanh().square().sum()
    (grad,) = torch.autograd.grad(loss, attention)
    influence = attention_influence(attention.detach(), grad, eps=0.0)
    i, j = 4, 2
    away = torch.zeros_like(attention)
    row = attention[:, :, i].detach()
    away[:, :, i] = row * row[..., j : j + 1] / (1 - row[..., j : j + 1])
    away[:, :, i, j] = -row[..., j]
    ahead, back = (((attention + step * away) @ value).tanh().square().sum((2, 3)) for step in (1e-5, -1e-5))
    assert_close(influence[:, :, i, j], (ahead - back) / 2e-5, atol=1e-8, rtol=1e-6)


def test_sums_over_blocks_average_the_samples():
    influence = torch.randn(3, 2, 10, 7, dtype=torch.float64)
    for absolute in (True, False):
        mean = (influence.abs() if absolute else influence).mean(0)
        blocks = sum_blocks(influence, 4, absolute=absolute)
        assert blocks.shape == (2, 3, 2)
        assert_close(blocks[:, 2, 1], mean[:, 8:, 4:].sum((1, 2)))
        assert_close(blocks.sum((1, 2)), mean.sum((1, 2)))


@pytest.mark.parametrize("causal", [True, False])
def test_losses_are_what_the_layout_leaves_out(causal):
    influence = torch.rand(2, 3, 24, 24, dtype=torch.float64)
    candidates = [ElasticSpan(4, 0, 4), ElasticSpan(-4, 0.5, 4), ElasticSpan(0, 1, 4)]
    losses = span_losses(sum_blocks(influence, 4), candidates, 24, causal=causal)
    blocks = influence.mean(0).unflatten(2, (6, 4)).unflatten(1, (6, 4)).sum((2, 4))
    for number, rule in enumerate(candidates):
        for head in range(3):
            left_out = sum(
                blocks[head, i, j]
                for i in range(6)
                for j in range(i + 1 if causal else 6)
                if not layout_as_published(rule, 6)[i, j]
            )
            assert_close(losses[head, number], torch.as_tensor(left_out, dtype=torch.float64))


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match="beta is -1: a span does not shrink"):
        ElasticSpan(0, -1)
    with pytest.raises(InputError, match="block_size is 0"):
        ElasticSpan(0, 1, 0)
    with pytest.raises(InputError, match="no rule of 2 has a span above 0 at 8 tokens and within 16 and 32 tokens"):
        span_candidates(8, 16, 32, alphas=[-8, 64], betas=[0])
    with pytest.raises(InputError, match="give one gradient"):
        attention_influence(torch.zeros(2, 2), torch.zeros(2, 3))
    with pytest.raises(InputError, match="the rules cut 24 tokens into 3 blocks"):
        span_losses(torch.zeros(2, 6, 6), [ElasticSpan(0, 1, 8)], 24)
