"""Block-causal attention: what depends on what, a condition, noised and clean halves, errors."""

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.mixers import BlockCausalAttention
from saccade.ops import BlockDiffusion, Causal


def depends(mixer, x):
    """(N, N): whether the output of a token depends on the input of another."""
    jacobian = torch.autograd.functional.jacobian(lambda x: mixer(x).flatten(1, -2).sum(-1)[0], x)
    return jacobian[:, 0].abs().sum(-1).flatten(1) > 1e-12


@pytest.mark.parametrize(
    ("options", "space", "block"), [({}, (3, 4), 4), ({}, (6,), 1), ({}, (2, 2, 3), 3), ({"block_size": 5}, (3, 4), 5)]
)
def test_by_default_a_block_is_a_row(options, space, block):
    mixer, x = BlockCausalAttention(8, 2, **options).double(), torch.randn(1, *space, 8, dtype=torch.float64)
    assert torch.equal(depends(mixer, x), Causal(block).mask(space))


def test_a_condition_sees_itself_alone_and_is_seen_by_all():
    mixer, x = BlockCausalAttention(8, 2, block_size=3, prefix=2, hybrid=True).double(), torch.randn(1, 11, 8)
    seen = depends(mixer, x.double())
    assert seen[:, :2].all()
    assert not seen[:2, 2:].any()
    assert torch.equal(seen[2:5, 2:5], torch.ones(3, 3, dtype=torch.bool).tril())
    assert seen[5:8, 2:8].all()


def test_the_noised_half_is_the_first_along_the_first_axis():
    mixer, x = BlockCausalAttention(8, 2, noised=True).double(), torch.randn(1, 4, 3, 8, dtype=torch.float64)
    assert torch.equal(depends(mixer, x), BlockDiffusion(3).mask((4, 3)))


def test_the_clean_half_of_a_training_pass_is_the_pass_that_fills_the_cache():
    train, infer = (BlockCausalAttention(8, 2, block_size=3, noised=noised).double() for noised in (True, False))
    infer.load_state_dict(train.state_dict())
    clean, noised = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    assert_close(train(torch.cat([noised, clean], 1))[:, 9:], infer(clean))


def test_attention_maps_are_of_the_pattern():
    mixer = BlockCausalAttention(8, 2)
    with saccade.tap(mixer) as seen:
        mixer(torch.randn(2, 3, 4, 8))
    assert torch.equal(seen[""].attention > 0, Causal(4).mask((3, 4)).expand(2, 2, 12, 12))


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match="prefix is 2, hybrid False and noised True"):
        BlockCausalAttention(8, prefix=2, noised=True)
    with pytest.raises(InputError, match=r"the map is \(3, 4\): noised and clean share its first axis"):
        BlockCausalAttention(8, noised=True)(torch.zeros(1, 3, 4, 8))
    with pytest.raises(InputError, match="BlockCausalAttention cannot serve prefix tokens"):
        BlockCausalAttention(8)(torch.zeros(1, 3, 4, 8), torch.zeros(1, 1, 8))
