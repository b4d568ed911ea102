"""gated_positional_attention: the equation against the separable form, limits of the gate, errors."""

import pytest
import torch
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import gated_positional_attention, softmax_attention


def make_inputs(*space, heads=3, grad=False):
    query, key, value = (torch.randn(2, heads, *space, dim, dtype=torch.float64) for dim in (4, 4, 5))
    positions = [3 * torch.randn(heads, length, length, dtype=torch.float64) for length in space]
    inputs = [query, key, value, *positions, torch.rand(heads, dtype=torch.float64)]
    inputs = [x.requires_grad_(grad) for x in inputs]
    return *inputs[:3], inputs[3:-1], inputs[-1]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("space", [(1,), (11,), (5, 7), (1, 4), (3, 4, 2)], ids=str)
def test_the_separable_form_equals_the_reference_in_value_and_gradient(space, scale):
    query, key, value, positions, gate = inputs = make_inputs(*space, grad=True)
    outs = [gated_positional_attention(*inputs, scale=scale, impl=impl) for impl in ("separable", "reference")]
    assert_close(*outs)
    upstream, leaves = torch.randn_like(outs[0]), [query, key, value, *positions, gate]
    grads = [torch.autograd.grad(out, leaves, upstream) for out in outs]
    for ours, theirs in zip(*grads):
        assert_close(ours, theirs, atol=1e-12, rtol=1e-7)


def test_an_open_gate_averages_axis_by_axis_and_a_closed_one_by_content():
    query, key, value, positions, gate = make_inputs(5, 7)
    rows, columns = (logits.softmax(-1) for logits in positions)
    expected = torch.einsum("hij,hkl,bhjlc->bhikc", rows, columns, value)
    assert_close(gated_positional_attention(query, key, value, positions, torch.ones_like(gate)), expected)
    content = softmax_attention(*(x.flatten(2, 3) for x in (query, key, value))).unflatten(2, (5, 7))
    assert_close(gated_positional_attention(query, key, value, positions, torch.zeros_like(gate)), content)


def test_each_head_has_its_own_gate():
    query, key, value, positions, _ = make_inputs(5, 7)
    outs = [gated_positional_attention(query, key, value, positions, torch.full((3,), g).double()) for g in (0, 1)]
    gate = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    mixed = gated_positional_attention(query, key, value, positions, gate)
    assert_close(mixed[:, 0], outs[0][:, 0])
    assert_close(mixed[:, 1], outs[1][:, 1])
    assert_close(mixed[:, 2], (outs[0] + outs[1])[:, 2] / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": []}, r"positions are \[\]: give \[\(3, 5, 5\), \(3, 7, 7\)\]"),
        ({"positions": [torch.zeros(3, 5, 5), torch.zeros(3, 5, 7)]}, r"give .* logits for each axis"),
        ({"gate": torch.ones(2)}, r"gate is \(2,\): give \(3,\)"),
        ({"key": torch.zeros(2, 3, 5, 6, 4).double(), "value": torch.zeros(2, 3, 5, 6, 4).double()}, "of one map"),
        ({"impl": "fast"}, "impl is 'fast'"),
    ],
)
def test_errors_say_what_to_do(change, message):
    names = ("query", "key", "value", "positions", "gate")
    with pytest.raises(InputError, match=message):
        gated_positional_attention(**dict(zip(names, make_inputs(5, 7))) | change)
