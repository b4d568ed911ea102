"""ElasticSpanAttention: rules for heads, growth with the map, the gradient by the map that a tap sees."""

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import ElasticSpanAttention
from saccade.ops import ElasticSpan, PerHead


def test_heads_have_their_rules_and_the_default_spreads_them():
    mixer = ElasticSpanAttention(16, 4)
    assert [rule.beta for rule in mixer.rules] == [0.125, 0.375, 0.625, 0.875]
    assert [rule.blocks(16) for rule in mixer.rules] == [2, 6, 10, 14]
    assert ElasticSpanAttention(16, 2, rules=ElasticSpan(3, 0)).rules == (ElasticSpan(3, 0),) * 2
    near, far = ElasticSpan(2, 0, 2), ElasticSpan(0, 1, 2)
    mask = ElasticSpanAttention(16, 2, rules=[near, far], causal=True).pattern((12,)).mask((12,))
    assert torch.equal(mask, PerHead([near.with_sinks(), far.with_sinks()]).mask((12,)))


@pytest.mark.parametrize(("causal", "sinks"), [(False, None), (True, None), (True, 0)])
def test_the_loss_has_a_gradient_by_the_map_that_a_tap_sees(causal, sinks):
    mixer = ElasticSpanAttention(8, 2, causal=causal, sinks=sinks).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    upstream = torch.randn_like(x)
    plain = mixer(x)
    with saccade.tap(mixer, kinds=("attention",), detach=False) as seen:
        out = mixer(x)
    assert_close(out, plain)
    (grad,) = torch.autograd.grad(out, seen[""].attention, upstream)
    value = mixer.qkv(x).chunk(3, -1)[2].unflatten(-1, (2, 4)).transpose(1, 2)
    by_head = (upstream @ mixer.proj.weight).unflatten(-1, (2, 4)).transpose(1, 2)
    assert_close(grad, by_head @ value.mT)


def test_a_rule_for_each_head():
    with pytest.raises(InputError, match="rules has 3 entries and there are 2 heads"):
        ElasticSpanAttention(8, 2, rules=[ElasticSpan(0, 1)] * 3)
