"""Sequences for next-block prediction: every position predicts what the official layout says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.errors import InputError
from saccade.training import next_block


@given(block=st.integers(1, 7), blocks=st.integers(1, 6), hybrid=st.booleans())
def test_every_token_predicts_its_own_place_in_the_next_block(block, blocks, hybrid):
    count = block * blocks
    inputs, targets = next_block(torch.arange(count).unsqueeze(0), block, hybrid=hybrid)
    assert (targets - block).tolist() == [list(range(count))]
    words = [token - block if token >= block else f"special {token}" for token in inputs[0].tolist()]
    if hybrid:  # a begin token, the first block, special tokens that stand for it, the rest but the last block
        middle = [f"special {n}" for n in range(1, block)]
        assert words == ["special 0", *range(block), *middle, *range(block, count)][:count]
    else:
        assert words == [f"special {n}" for n in range(block)] + list(range(count - block))


def test_a_condition_stands_in_front_and_is_moved_up_too():
    inputs, targets = next_block(torch.tensor([[7, 8], [9, 7]]), 1, condition=torch.tensor([[3], [4]]))
    assert inputs.tolist() == [[4, 0, 8], [5, 0, 10]]
    assert targets.tolist() == [[8, 9], [10, 8]]


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match=r"tokens is \(1, 5\) and block_size is 2: give \(B, n\) with a block that"):
        next_block(torch.zeros(1, 5, dtype=torch.long), 2)
    with pytest.raises(InputError, match=r"condition is \(2, 1\): give \(1, P\), one row a sequence"):
        next_block(torch.zeros(1, 4, dtype=torch.long), 2, condition=torch.zeros(2, 1, dtype=torch.long))
