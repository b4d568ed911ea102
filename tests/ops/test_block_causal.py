"""Patterns of blockwise generation: what each token sees, written out; limits; errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.errors import InputError
from saccade.ops import BlockDiffusion, Causal, next_block_pattern

sizes = {"length": st.integers(1, 60), "block": st.integers(1, 12), "prefix": st.integers(0, 15)}


@given(**sizes)
def test_blocks_are_counted_from_the_end_of_the_condition(length, block, prefix):
    block_of = [-1 if n < prefix else (n - prefix) // block for n in range(length)]
    expected = torch.tensor([[k <= q for k in block_of] for q in block_of])
    assert torch.equal(next_block_pattern(length, block, prefix=prefix).mask((length,)), expected)


@given(**sizes)
def test_the_first_block_of_the_hybrid_form_is_causal(length, block, prefix):
    base = next_block_pattern(length, block, prefix=prefix).mask((length,))
    first = torch.arange(length)
    first = (first >= prefix) & (first < prefix + block)
    expected = base & ~(first[:, None] & first & torch.ones_like(base).triu(1))
    assert torch.equal(next_block_pattern(length, block, prefix=prefix, hybrid=True).mask((length,)), expected)


@pytest.mark.parametrize("clean", ["block", "token"])
@given(half=st.integers(1, 30), block=st.integers(1, 12))
def test_noised_tokens_see_their_block_and_clean_ones_before_it(clean, half, block):
    def sees(q, k):
        if q < half:
            return q // block == k // block if k < half else (k - half) // block < q // block
        within = (k - half) // block <= (q - half) // block if clean == "block" else k <= q
        return k >= half and within

    expected = torch.tensor([[sees(q, k) for k in range(2 * half)] for q in range(2 * half)])
    assert torch.equal(BlockDiffusion(block, clean=clean).mask((2 * half,)), expected)
    assert torch.equal(BlockDiffusion(block, clean=clean).mask((2, half)), expected)  # a half a row


def test_halves_alone_are_blocks_and_block_causal_attention():
    mask = BlockDiffusion(4).mask((48,))
    assert torch.equal(mask[24:, 24:], Causal(4).mask((24,)))
    assert torch.equal(mask[:24, 24:], Causal(4).mask((24,)) & ~mask[:24, :24])


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match=r"map \(5,\) has an odd number of tokens: give the noised ones, then as many"):
        BlockDiffusion(2).mask((5,))
    with pytest.raises(InputError, match="clean is 'blok': did you mean block"):
        BlockDiffusion(2, clean="blok")
    with pytest.raises(InputError, match="prefix is -1: give the number of tokens in front"):
        next_block_pattern(4, 2, prefix=-1)
    with pytest.raises(InputError, match="block_size is 0"):
        next_block_pattern(4, 0)
