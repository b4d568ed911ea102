"""Pyramid attention: what a level is, the engine against the equation, levels, errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import (
    block_importance,
    pyramid_attention,
    pyramid_attention_weights,
    pyramid_density,
    pyramid_levels,
    similar_levels,
    softmax_attention,
)

ENDS = {1: 0.4, 2: 0.5, 4: 0.6, 8: 0.8}


def make_inputs(queries, keys, *, heads=4, kv_heads=2, grad=False):
    shapes = [(2, heads, queries, 5), (2, kv_heads, keys, 5), (2, kv_heads, keys, 3)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=grad) for shape in shapes]


def make_levels(queries, keys, query_block, key_block, heads=4):
    """Every level at random, and a row that skips all."""
    choices = torch.tensor([0, *(size for size in (1, 2, 4, 8) if key_block % size == 0)])
    levels = choices[torch.randint(len(choices), (2, heads, -(-queries // query_block), -(-keys // key_block)))]
    levels[0, 0, 0] = 0
    return levels


def repeat_means(x, size):
    """Every token replaced by the mean of its group."""
    return torch.cat([group.mean(2, keepdim=True).expand_as(group) for group in x.split(size, 2)], 2)


def attend_to_means(query, key, value, levels, query_block, key_block):
    """Dense attention, query block by query block, to keys and values replaced by the means of their level."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=query.dtype)
    for image, head, row in torch.cartesian_prod(
        *map(torch.arange, levels.expand(-1, query.shape[1], -1, -1).shape[:3])
    ):
        parts = []
        for column, level in enumerate(levels.expand(-1, query.shape[1], -1, -1)[image, head, row].tolist()):
            if level:
                here = slice(column * key_block, (column + 1) * key_block)
                parts.append([repeat_means(x[image, head, here][None, None], level) for x in (key, value)])
        if parts:
            keys, values = (torch.cat(each, 2) for each in zip(*parts))
            rows = slice(row * query_block, (row + 1) * query_block)
            asked = query[image, head, rows][None, None]
            out[image, head, rows] = F.scaled_dot_product_attention(asked, keys, values)[0, 0]
    return out


CASES = [
    (32, 48, 8, 16),
    (32, 32, 16, 8),
    (21, 45, 4, 8),  # groups of fewer tokens at the end
    (5, 3, 8, 8),
    (20, 20, 1, 4),  # single queries
    (9, 9, 3, 3),
    (1, 1, 1, 1),
]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("queries", "keys", "query_block", "key_block"), CASES)
def test_the_engine_equals_the_equation_in_value_lse_and_gradient(queries, keys, query_block, key_block, shared):
    inputs = make_inputs(queries, keys, grad=True)
    levels = make_levels(queries, keys, query_block, key_block, heads=1 if shared else 4)
    for replicate in (False, True):
        options = {"replicate": replicate, "return_lse": True}
        fast, slow = (
            pyramid_attention(*inputs, levels, query_block, key_block, impl=impl, **options)
            for impl in ("tiled", "reference")
        )
        assert_close(fast, slow)
        upstream = torch.randn_like(slow.out)
        assert_close(*(torch.autograd.grad(each.out, inputs, upstream) for each in (fast, slow)))


@pytest.mark.parametrize(("queries", "keys", "query_block", "key_block"), CASES)
def test_a_level_is_dense_attention_to_repeated_means(queries, keys, query_block, key_block):
    inputs = make_inputs(queries, keys)
    levels = make_levels(queries, keys, query_block, key_block)
    out = pyramid_attention(*inputs, levels, query_block, key_block)
    assert_close(out, attend_to_means(*inputs, levels, query_block, key_block))
    weights = pyramid_attention_weights(*inputs[:2], levels, query_block, key_block)
    assert_close(weights @ inputs[2].repeat_interleave(2, 1), out)
    assert (weights.sum(-1)[0, 0, :query_block] == 0).all()


@pytest.mark.parametrize("level", [1, 2, 4, 8])
def test_constant_groups_and_level_one_are_dense_attention(level):
    query, key, value = make_inputs(24, 37)
    if level > 1:
        key, value = (x[:, :, :5].repeat_interleave(8, 2)[:, :, :37] for x in (key, value))
    levels = torch.full((2, 1, 3, 3), level)
    assert_close(pyramid_attention(query, key, value, levels, 8, 16), softmax_attention(query, key, value))


def test_copies_of_the_last_token_are_those_of_a_padded_sequence():
    query, key, value = make_inputs(8, 13)
    levels = torch.tensor([2, 4]).expand(2, 4, 1, 2)
    padded = [torch.cat([x, x[:, :, -1:].expand(-1, -1, 3, -1)], 2) for x in (key, value)]
    out = pyramid_attention(query, key, value, levels, 8, 8, replicate=True)
    assert_close(out, pyramid_attention(query, *padded, levels, 8, 8))


@pytest.mark.parametrize("impl", ["tiled", "reference"])
@pytest.mark.parametrize("tokens", [24, 21])
def test_causal_attention_knows_no_later_token(tokens, impl):
    query, key, value = make_inputs(tokens, tokens)
    levels = make_levels(tokens, tokens, 8, 8)
    out = pyramid_attention(query, key, value, levels, 8, 8, causal=True, impl=impl)
    weights = pyramid_attention_weights(query, key, levels, 8, 8, causal=True)
    assert_close(weights @ value.repeat_interleave(2, 1), out)
    assert not weights.triu(1).any()
    later = [x.clone() for x in (key, value)]
    for x in later:
        x[:, :, 13:] += 1
    assert_close(pyramid_attention(query, *later, levels, 8, 8, causal=True, impl=impl)[:, :, :13], out[:, :, :13])
    dense = pyramid_attention(query, key, value, torch.ones_like(levels), 8, 8, causal=True, impl=impl)
    assert_close(dense, softmax_attention(query, key, value, causal="top_left"))


def test_half_precision_keeps_its_kind():
    inputs = [x.bfloat16() for x in make_inputs(21, 45)]
    levels = make_levels(21, 45, 4, 8)
    out = pyramid_attention(*inputs, levels, 4, 8)
    assert out.dtype == torch.bfloat16
    exact = pyramid_attention(*(x.double() for x in inputs), levels, 4, 8)
    assert (out - exact).abs().max() < 0.02 * exact.abs().max()


# Levels


def assign(row, ends, by, least, tiles):
    """One row of importance, as the card of the paper says it."""
    order = sorted(range(len(row)), key=lambda block: -row[block])
    levels, start = [0] * len(row), 0
    for level, end in ends.items() if by == "count" else sorted(ends.items(), key=lambda entry: entry[1]):
        if by == "count":
            stop = int(len(row) * end)
        else:
            sums = [sum(row[block] for block in order[: n + 1]) / sum(row) for n in range(len(row))]
            below = sum(each <= end + 1e-6 for each in sums)
            stop = below + 1 if below else start
        if level == 1 and least is not None:
            stop = max(stop, int(least * len(row)) + 1)
        stop = min(max(stop, start), len(row))
        if tiles and level:
            step = -(-level // tiles)
            length = -(-(stop - start) // step) * step
            stop = start + (length if start + length <= len(row) else (stop - start) // step * step)
        for block in order[start:stop]:
            levels[block] = level
        start = stop
    return levels


@given(
    blocks=st.integers(1, 40),
    shares=st.lists(st.floats(0, 1), min_size=4, max_size=4).map(sorted),
    by=st.sampled_from(["count", "mass"]),
    least=st.sampled_from([None, 0.06, 0.3]),
    tiles=st.sampled_from([None, 1, 4]),
)
def test_levels_are_those_of_the_definition(blocks, shares, by, least, tiles):
    importance = torch.rand(1, 2, 3, blocks, dtype=torch.float64) ** 3
    ends = dict(zip((1, 2, 4, 8), shares))
    levels = pyramid_levels(importance, ends, by=by, least=least, tiles=tiles)
    for row, ours in zip(importance.flatten(0, 2).tolist(), levels.flatten(0, 2).tolist()):
        assert ours == assign(row, ends, by, least, tiles)


@pytest.mark.parametrize("by", ["count", "mass"])
def test_causal_levels_are_those_of_the_visible_blocks(by):
    importance = torch.rand(1, 2, 12, 12, dtype=torch.float64)
    levels = pyramid_levels(importance, ENDS, by=by, causal=True)
    assert not levels.triu(1).any()
    for row in range(12):
        expected = torch.tensor(
            [assign(each[: row + 1], ENDS, by, 0.06, None) for each in importance[0, :, row].tolist()]
        )
        expected[:, 0] = expected[:, row] = 1
        assert torch.equal(levels[0, :, row, : row + 1], expected)


def test_blocks_of_text_are_read_in_full():
    levels = pyramid_levels(torch.rand(1, 2, 3, 20), ENDS, full_blocks=2)
    assert (levels[..., -2:] == 1).all()


def test_density_counts_what_is_left():
    levels = torch.tensor([1] * 10 + [2] * 5 + [8] * 20 + [0] * 65)
    assert pyramid_density(levels).item() == pytest.approx(0.15)


def test_similar_levels_compare_first_and_last_tokens():
    key = torch.randn(2, 3, 44, 6, dtype=torch.float64)
    key[:, :, 16:24] = key[:, :, 16:17]
    key[:, :, 40:] = key[:, :, 40:41]  # the last block has fewer tokens
    found = similar_levels(key, 8, {2: 0.5, 4: 0.3, 8: 0.1})
    assert (found[:, :, 2] == 8).all()
    assert (found[:, :, 5] == 8).all()
    for block in range(5):
        part = F.normalize(key[:, :, 8 * block : 8 * block + 8], dim=-1)
        expected = torch.ones(2, 3, dtype=torch.long)
        for level, threshold in {2: 0.5, 4: 0.3, 8: 0.1}.items():
            cosine = (part[:, :, ::level] * part[:, :, level - 1 :: level]).sum(-1).mean(-1)
            expected = torch.where(cosine > threshold, level, expected)
        assert torch.equal(found[:, :, block], expected)


# Importance


def test_importance_is_the_largest_weight_beside_the_largest_of_its_query():
    query, key, _ = make_inputs(10, 14)
    logits = (query @ key.repeat_interleave(2, 1).mT) * 5**-0.5
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    weights = F.pad(weights, (0, 2, 0, 2)).unflatten(-1, (4, 4)).unflatten(2, (3, 4)).amax((3, 5))
    assert_close(block_importance(query, key, 4, 4), weights / weights.sum(-1, keepdim=True))


def test_a_sample_repeats_with_its_generator_and_never_exceeds_the_whole():
    query, key, _ = make_inputs(64, 61)

    def draw(seed):
        return block_importance(query, key, 16, 16, sample=0.25, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert_close(draw(1).sum(-1), torch.ones(2, 4, 4, dtype=torch.float64))
    constant = [x[:, :, :4].repeat_interleave(16, 2) for x in (query, key)]  # any token of a block is the block
    assert_close(block_importance(*constant, 16, 16, sample=0.25), block_importance(*constant, 16, 16, sample=1.0))


def test_errors_say_what_to_do():
    query, key, value = make_inputs(16, 16)
    levels = torch.ones(2, 4, 2, 2, dtype=torch.long)
    with pytest.raises(InputError, match=r"give whole numbers \(2, 4 or 1, 2, 2\), one for each pair of blocks"):
        pyramid_attention(query, key, value, levels[..., :1], 8, 8)
    with pytest.raises(InputError, match=r"levels has \[3\] and sizes is \(1, 2, 4, 8\): name all levels in sizes"):
        pyramid_attention(query, key, value, 3 * levels, 8, 8)
    with pytest.raises(InputError, match="key_block is 8 and a level is 3: a level is a divisor of the block"):
        pyramid_attention(query, key, value, levels, 8, 8, sizes=(1, 3))
    with pytest.raises(InputError, match="key_block is 6 and a level is 4"):
        similar_levels(key, 6, {4: 0.5})
    with pytest.raises(InputError, match="causal is True with 16 queries in blocks of 8 and 16 keys in blocks of 16"):
        pyramid_attention(query, key, value, levels[..., :1], 8, 16, causal=True)
    with pytest.raises(InputError, match=r"sizes is \(2,\): the own block is read at level 1"):
        pyramid_attention(query, key, value, 2 * levels, 8, 8, sizes=(2,), causal=True)
    with pytest.raises(InputError, match=r"sample is 0.5 and causal is True: give a share"):
        block_importance(query, key, 8, 8, sample=0.5, causal=True)
    with pytest.raises(InputError, match=r"ends is \{1: 1.5\}: give level -> share"):
        pyramid_levels(torch.rand(1, 1, 2, 2), {1: 1.5})
    with pytest.raises(InputError, match=r"importance is \(2, 2\): give \(B, heads or 1, query blocks, key blocks\)"):
        pyramid_levels(torch.rand(2, 2), ENDS)
