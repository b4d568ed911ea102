"""block_weights and the blocks chosen by them: rows = reference, quotas, sequences that are being generated, errors."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import (
    block_weights,
    kept_blocks,
    pool_attention,
    select_block_share,
    select_blocks_by_weight,
    sparse_attention,
)
from saccade.ops.softmax_attention import attention_weights


def make_inputs(space, key_space=None, heads=4, kv_heads=2):
    shapes = [(2, heads, *space, 5), (2, kv_heads, *(key_space or space), 5)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(
    ("space", "key_space", "block"),
    [((12,), None, 4), ((7, 5), (4, 6), (3, 2)), ((3, 4, 5), None, 2), ((5,), (1100,), 64), ((1100,), (5,), 64)],
)
def test_rows_equal_the_reference_without_gradient(space, key_space, block):
    query, key = make_inputs(space, key_space)
    rows, reference = (block_weights(query, key, block, scale=0.7, impl=impl) for impl in ("auto", "reference"))
    assert_close(rows, reference)
    assert not rows.requires_grad


def test_means_are_over_blocks_that_zeros_fill_up():
    attention = torch.randn(1, 1, 5, 7)
    filled = torch.nn.functional.pad(attention.abs(), (0, 2, 0, 1))
    expected = torch.stack([torch.stack([part.mean() for part in row.split(3, -1)]) for row in filled[0, 0].split(3)])
    assert_close(pool_attention(attention, 3)[0, 0], expected)


def test_weights_are_formed_for_a_few_rows_at_a_time(monkeypatch):
    formed = []

    def note(query, key, added, scale):
        formed.append(query.shape[2])
        return attention_weights(query, key, added, scale)

    monkeypatch.setattr(sys.modules["saccade.ops.block_weights"], "attention_weights", note)
    block_weights(*make_inputs((2048,)), 32)
    assert (sum(formed), max(formed)) == (2048, 512)


@given(blocks=st.integers(1, 60), keep=st.floats(0, 1))
def test_the_share_and_one_more_are_kept(blocks, keep):
    kept = kept_blocks(blocks, keep)
    assert 1 <= kept <= blocks
    assert kept == blocks or blocks * keep < kept <= blocks * keep + 1


def test_the_chosen_blocks_have_the_largest_weights():
    query, key = make_inputs((9, 8), kv_heads=4)
    scores = block_weights(query, key, (3, 2))
    pairs = select_blocks_by_weight(query, key, (3, 2), keep=0.4).pairs((9, 8))
    assert (pairs.sum(-1) == 5).all()
    assert (scores.where(pairs, torch.inf).amin(-1) >= scores.where(~pairs, 0).amax(-1)).all()


@pytest.mark.parametrize(
    ("tokens", "generated", "first"), [(32, 16, 4), (30, 9, 6), (30, 0, 7), (30, 30, 0), (5, 1, 1)]
)
def test_generated_keys_are_chosen_apart(tokens, generated, first):
    query, key = make_inputs((tokens,), kv_heads=4)
    pairs = select_blocks_by_weight(query, key, 4, keep=0.3, generated=generated).pairs((tokens,))
    together = select_blocks_by_weight(query, key, 4, keep=0.3).pairs((tokens,))
    assert torch.equal(pairs[..., :first], together[..., :first])
    apart = select_block_share(block_weights(query, key[:, :, 4 * first :], 4), 0.3)
    expected = torch.zeros_like(pairs[..., first:]).scatter(-1, apart.blocks, True)
    assert torch.equal(pairs[..., first:], expected)


def test_the_engine_computes_with_it():
    query, key = make_inputs((30,), kv_heads=4)
    chosen = select_blocks_by_weight(query, key, 4, generated=9)
    fast, slow = (sparse_attention(query, key, key, chosen, impl=impl) for impl in ("auto", "reference"))
    assert_close(fast, slow)


def test_errors_say_what_to_do():
    query, key = make_inputs((4, 6))
    with pytest.raises(InputError, match=r"keep is 1\.5: give a share of 0 to 1"):
        select_blocks_by_weight(query, key, 2, keep=1.5)
    with pytest.raises(InputError, match="Give 0 to 24 on one axis of space, or None"):
        select_blocks_by_weight(query, key, 2, generated=3)
    with pytest.raises(InputError, match="generated is 25"):
        select_blocks_by_weight(query.flatten(2, 3), key.flatten(2, 3), 2, generated=25)
    with pytest.raises(InputError, match="blocks are of one map"):
        select_blocks_by_weight(query, key[:, :, :3], 2)
    with pytest.raises(InputError, match="block_size is 0"):
        block_weights(query, key, 0)
    with pytest.raises(InputError, match="impl is 'tiled'"):
        block_weights(query, key, 2, impl="tiled")
    with pytest.raises(InputError, match=r"space is \(5,\): it has 6 tokens there"):
        pool_attention(torch.zeros(1, 1, 6, 6), 2, space=(5,))
