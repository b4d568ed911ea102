"""TopKAttention: shares of the map, predicted ones, errors. What it computes is its operator's: tests/ops."""

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import Attention, TopKAttention


def make_input(*space):
    return torch.randn(2, *space, 8, dtype=torch.float64)


@pytest.mark.parametrize(
    ("share", "space", "kept"), [(0.1, (5, 6), 3), (0.25, (3, 3), 3), (1e-9, (4,), 1), (1, (7,), 7)]
)
def test_a_query_keeps_its_share_of_the_map_rounded_up(share, space, kept):
    mixer = TopKAttention(8, 2, share=share).double()
    with saccade.tap(mixer) as seen:
        mixer(make_input(*space))
    assert ((seen[""].attention > 0).sum(-1) == kept).all()


def test_all_tokens_are_dense_attention():
    mixer, dense, x = TopKAttention(8, 2, share=1).double(), Attention(8, 2).double(), make_input(5, 3)
    dense.load_state_dict(mixer.state_dict())
    assert_close(mixer(x), dense(x))


def test_a_predicted_share_starts_where_asked_and_follows_the_image():
    mixer, x = TopKAttention(8, 2, share=0.25, dynamic=True).double(), make_input(4, 5)
    assert_close(mixer.count(x), torch.full((2,), 5.0, dtype=torch.float64))
    torch.nn.init.normal_(mixer.gate.weight)
    count = mixer.count(x)
    assert_close(count, (20 * mixer.gate(x.mean((1, 2))).sigmoid()).squeeze(-1).clamp(min=1))
    assert count[0] != count[1]
    mixer(x).square().sum().backward()
    assert mixer.gate.weight.grad.abs().max() > 1e-6


def test_a_predicted_share_of_less_than_a_token_keeps_the_best_one():
    mixer, x = TopKAttention(8, 2, share=0.001, dynamic=True).double(), make_input(3, 3)
    with saccade.tap(mixer) as seen:
        mixer(x)
    assert ((seen[""].attention > 0).sum(-1) == 1).all()


def test_errors_say_what_to_do():
    for options in ({"share": 0.0}, {"share": 1.1}, {"share": 1.0, "dynamic": True}):
        with pytest.raises(InputError, match="give a share of the tokens above 0, and at most 1, or below 1 where"):
            TopKAttention(8, **options)
