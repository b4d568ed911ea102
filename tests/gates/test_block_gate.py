"""Gates of blocks: what the scores are made of, forms of the projection, errors."""

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.gates import BlockGate, TokenGate
from saccade.ops import rotary_angles


def make_inputs(*space, heads=4, kv_heads=2, dim=6):
    return [torch.randn(2, count, *space, dim, dtype=torch.float64) for count in (heads, kv_heads)]


def angles(places, dim):
    turned = rotary_angles(torch.tensor([places]), dim)
    return turned.cos(), turned.sin()


def turn(x, place, dim):
    """One vector as complex numbers, turned."""
    turned = torch.polar(torch.ones(dim // 2), rotary_angles(torch.tensor([[place]]), dim)[0]).to(torch.complex128)
    whole = torch.complex(*x.chunk(2)) * turned
    return torch.cat([whole.real, whole.imag])


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, (None, (4, 18, 6))),
        ({"force_double": True}, ((4, 6, 6), (2, 18, 6))),
        ({"gate_dim": 4, "key_pools": ("mean",)}, ((4, 6, 4), (2, 6, 4))),
        ({"query_pools": ("max", "min")}, ((4, 12, 6), (2, 18, 6))),
    ],
)
def test_projections_have_the_official_shapes(options, shapes):
    gate = BlockGate(6, 4, 2, **options)
    found = gate.mask_linear_q and tuple(gate.mask_linear_q.weight.shape), tuple(gate.mask_linear_k.weight.shape)
    assert found == shapes
    for parameter in gate.parameters():
        assert 0.01 < parameter.std() < 0.03


@pytest.mark.parametrize(
    "options", [{}, {"gate_dim": 4}, {"query_pools": ("min", "max"), "key_pools": ("min", "mean")}]
)
def test_scores_are_products_of_projected_pools_at_the_places_of_first_tokens(options):
    gate, (query, key) = BlockGate(6, 4, 2, **options).double(), make_inputs(11)
    scores = gate(query, key, 4, angles([0, 4, 8], gate.gate_dim))
    assert scores.shape == (2, 4, 3, 3)
    order = ("max", "min", "mean")

    def pooled(tokens, pools):
        kinds = {"max": tokens.amax(0), "min": tokens.amin(0), "mean": tokens.mean(0)}
        return torch.cat([kinds[pool] for pool in order if pool in pools])

    for head, row, column in [(0, 0, 2), (3, 2, 1), (2, 1, 1)]:
        asked = pooled(query[1, head, 4 * row : 4 * row + 4], gate.query_pools)
        answer = pooled(key[1, head // 2, 4 * column : 4 * column + 4], gate.key_pools)
        if gate.mask_linear_q is not None:
            asked = asked @ gate.mask_linear_q.weight[head]
        answer = answer @ gate.mask_linear_k.weight[head if gate.mask_linear_q is None else head // 2]
        expected = turn(asked, 4 * row, gate.gate_dim) @ turn(answer, 4 * column, gate.gate_dim)
        assert_close(scores[1, head, row, column], expected / gate.gate_dim**0.5)


def test_causal_gates_see_no_later_block_and_maps_are_served():
    query, key = make_inputs(12)
    gate = BlockGate(6, 4, 2, causal=True).double()
    scores = gate(query, key, 4)
    assert_close(scores.tril(), BlockGate.forward(_open(gate), query, key, 4).tril())
    assert (scores.triu(1) == torch.full_like(scores, -torch.inf).triu(1)).all()
    assert BlockGate(6, 4, 2).double()(*make_inputs(5, 7), (2, 3)).shape == (2, 4, 9, 9)


def _open(gate):
    twin = BlockGate(6, 4, 2).double()
    twin.load_state_dict(gate.state_dict())
    return twin


def test_gates_of_single_queries_pool_the_heads_of_a_group():
    gate, (query, key) = TokenGate(6, 4, 2, gate_dim=4).double(), make_inputs(9)
    with torch.no_grad():
        gate.attngate_qnorm.weight.uniform_(0.5, 2)
    rotary = angles(list(range(9)), 4), angles([0, 4, 8], 4)
    scores = gate(query, key, 4, *rotary)
    assert scores.shape == (2, 2, 9, 3)
    asked = sum(query[1, 2 + member, 5] @ gate.attngate_linear_q.weight[1, member] for member in range(2))
    block = key[1, 1, 4:8]
    answer = torch.cat([block.amax(0), block.amin(0), block.mean(0)]) @ gate.attngate_linear_k.weight[1]
    asked, answer = (x / (x.square().mean() + 1e-6).sqrt() for x in (asked, answer))
    expected = turn(asked * gate.attngate_qnorm.weight, 5, 4) @ turn(answer, 4, 4) / 2
    assert_close(scores[1, 1, 5, 1], expected)
    assert_close(gate(query, key, 4)[:, :, 0, 0], scores[:, :, 0, 0])  # both at the beginning


@pytest.mark.parametrize("gate", [BlockGate(6, 4, 2), TokenGate(6, 4, 2)])
def test_taps_see_the_weights_of_blocks(gate):
    with saccade.tap(gate) as seen:
        scores = gate(*(x.float() for x in make_inputs(8)), 4)
    assert_close(seen[""].gate, scores.softmax(-1))


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match="num_heads is 4 and kv_heads is 3: give a divisor"):
        BlockGate(6, 4, 3)
    with pytest.raises(InputError, match="num_heads is 4 and kv_heads is 3: give a divisor"):
        TokenGate(6, 4, 3)
    with pytest.raises(InputError, match="pool is 'avg': choose one of max, mean, min"):
        BlockGate(6, 4, key_pools=("avg",))
    with pytest.raises(InputError, match="pools is empty"):
        BlockGate(6, 4, query_pools=())
    with pytest.raises(InputError, match=r"causal is True: give sequences \(B, heads, N, D\)"):
        BlockGate(6, 4, 2, causal=True).double()(*make_inputs(4, 4), 2)
