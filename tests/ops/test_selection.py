"""Selections: the engine equals the dense mask, selectors keep what they promise, errors."""

import pytest
import torch
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import (
    Selection,
    block_means,
    select_mask,
    select_mass,
    select_similarity_mass,
    select_top_k,
    sparse_attention,
)
from saccade.ops.selection import block_order, highest


def make_inputs(space, *, heads=4, kv_heads=2, key_space=None, dim=5, value_dim=3):
    key_space = key_space or space
    shapes = [(2, heads, *space, dim), (2, kv_heads, *key_space, dim), (2, kv_heads, *key_space, value_dim)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


CASES = [
    ((8, 6), None, (4, 3), (2, 3), 2),
    ((12,), (20,), 3, 5, 3),
    ((4, 4, 2), None, 2, (2, 1, 2), 4),
    ((6, 4), None, 1, 1, 7),  # a list of keys for each query
    ((7, 5), None, (3, 2), (2, 3), 3),  # smaller blocks at the end
    ((5,), (11,), 2, 4, 2),
    ((6, 5), None, 1, (2, 3), 3),  # single queries that select blocks
    ((150,), None, 1, 40, 2),  # more queries of a block than fit a tile
]


@pytest.mark.parametrize(("space", "key_space", "query_block", "key_block", "count"), CASES)
@pytest.mark.parametrize("shared", [False, True])
def test_engine_equals_reference_in_value_lse_and_gradient(space, key_space, query_block, key_block, count, shared):
    query, key, value = make_inputs(space, key_space=key_space)
    scores = block_means(query, query_block) @ block_means(key, key_block).repeat_interleave(2, 1).mT
    scores = scores.mean(1, keepdim=True) if shared else scores
    blocks = {"query_block": query_block, "key_block": key_block, "key_size": key_space}
    selection = select_top_k(scores, count, ragged=True, **blocks)
    fast, slow = (
        sparse_attention(query, key, value, selection, return_lse=True, impl=impl) for impl in ("auto", "reference")
    )
    assert_close(fast, slow)
    assert_close(sparse_attention(query, key, value, selection), slow.out)  # the fused path
    upstream = torch.randn_like(slow.out)
    grads = [torch.autograd.grad(each.out, (query, key, value), upstream) for each in (fast, slow)]
    assert_close(*grads)


def test_rows_that_select_nothing_give_zero_with_a_gradient_of_zero():
    query, key, value = make_inputs((8,))
    mask = torch.ones(2, 4, 4, 4, dtype=torch.bool)
    mask[:, :, 1] = False
    out = sparse_attention(query, key, value, select_mask(mask, query_block=2, key_block=2))
    assert (out[:, :, 2:4] == 0).all()
    assert (out[:, :, 4:] != 0).any()
    grad = torch.autograd.grad(out.square().sum(), query)[0]
    assert grad.isfinite().all()
    assert (grad[:, :, 2:4] == 0).all()


def test_without_a_batch_there_is_no_output():
    query, key, value = (x[:0] for x in make_inputs((6,)))
    selection = select_top_k(torch.zeros(0, 1, 3, 3), 2, query_block=2, key_block=2)
    assert sparse_attention(query, key, value, selection).shape == (0, 4, 6, 3)


def test_means_of_smaller_blocks_at_the_end_count_their_own_tokens():
    x = torch.arange(15.0).view(1, 1, 5, 3, 1)
    blocks = [part.mean() for rows in x.split(2, 2) for part in rows.split(2, 3)]
    assert_close(block_means(x, 2).flatten(), torch.stack(blocks))


def test_selecting_every_block_is_dense_attention():
    query, key, value = make_inputs((4, 6), kv_heads=4)
    everything = select_top_k(torch.randn(2, 1, 4, 4), 4, query_block=(2, 3), key_block=(2, 3))
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.flatten(2, 3) for x in (query, key, value)))
    assert_close(sparse_attention(query, key, value, everything).flatten(2, 3), dense)


def test_mask_of_a_selection_marks_the_tokens_of_the_chosen_blocks():
    selection = Selection(torch.tensor([[[[1, 1], [0, 0]]]]), torch.tensor([[[[True, False], [False, False]]]]), 2, 3)
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[:2, 3:] = True
    assert torch.equal(Selection(selection.blocks, selection.used, 2, 3, (6,)).mask((4,))[0, 0], expected)


@pytest.mark.parametrize("scope", ["query", "head", "all"])
def test_top_k_takes_the_highest_pairs_of_its_scope(scope):
    scores = torch.randn(2, 3, 5, 7)
    scores[0, 0, 0] = -torch.inf
    chosen = select_top_k(scores, 2, scope=scope)
    taken = torch.zeros_like(scores).scatter_add(-1, chosen.blocks, chosen.used.float()).bool()
    for pool, kept in zip(
        *(x.flatten({"query": 3, "head": 2, "all": 1}[scope]).flatten(0, -2) for x in (scores, taken))
    ):
        finite = int((pool != -torch.inf).sum())
        assert kept.sum() == min(finite, 2 * pool.numel() // 7)
        if kept.any() and (~kept & (pool != -torch.inf)).any():
            assert pool[kept].min() >= pool[~kept].max()


@pytest.mark.parametrize("scope", ["query", "head", "all"])
@pytest.mark.parametrize("mass", [0.3, 0.9, 1.0])
def test_mass_is_reached_and_not_without_the_smallest_chosen(scope, mass):
    scores = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    chosen = select_mass(scores, mass, scope=scope)
    taken = torch.zeros_like(scores).scatter_add(-1, chosen.blocks, chosen.used.double()).bool()
    flat = {"query": 3, "head": 2, "all": 1}[scope]
    weights, taken = scores.flatten(flat).softmax(-1).flatten(0, -2), taken.flatten(flat).flatten(0, -2)
    for row, kept in zip(weights, taken):
        assert row[kept].sum() >= mass - 1e-12
        assert row[kept].sum() - row[kept].min() < mass


def select_as_published(scores, own, mass):
    """One scope of VMoBA's threshold: (entries,) scores, own pairs, which are selected."""
    scaled = (scores - scores.min()) / (scores.max() - scores.min())
    total = scaled.sum() + 1e-6
    left = max(mass - (scaled * own).sum().item() / total, 0)
    taken, chosen = 0.0, own.clone()
    for entry in scaled.masked_fill(own, 0).argsort(descending=True):
        taken += scaled[entry] / total
        chosen[entry] = True
        if taken >= left:
            break
    return chosen


POOLS = {"query": (0, 1, 2), "head": (0, 1), "all": (0,), "block": (0, 3)}
"""Axes over which each scope is taken by itself."""


@pytest.mark.parametrize("mass", [0.05, 0.4, 0.9])
@pytest.mark.parametrize("scope", POOLS)
def test_similarity_mass_is_that_of_vmoba(scope, mass):
    scores = torch.randn(2, 3, 8, 4, dtype=torch.float64)
    own = torch.eye(4, dtype=torch.bool).repeat_interleave(2, 0).expand_as(scores)
    chosen = select_similarity_mass(scores, mass, own=own, scope=scope, key_block=2).pairs((8,))
    apart = POOLS[scope]
    order = (*apart, *(axis for axis in range(4) if axis not in apart))
    rows = [x.permute(order).flatten(len(apart)).flatten(0, -2) for x in (scores, own, chosen)]
    for score, mine, taken in zip(*rows):
        assert torch.equal(taken, select_as_published(score, mine, mass))
        assert taken.sum() > mine.sum()


def test_similarity_mass_does_not_depend_on_scale_and_hides_minus_infinity():
    scores = torch.randn(2, 3, 8, 4, dtype=torch.float64)
    scores[0, 0, :, 1] = -torch.inf
    scores[1, 1, 2] = -torch.inf
    for scope in POOLS:
        chosen, scaled = (
            select_similarity_mass(each, 0.5, scope=scope, key_block=2).pairs((8,)) for each in (scores, 7 * scores + 3)
        )
        assert torch.equal(chosen, scaled)
        assert not chosen[scores == -torch.inf].any()


def test_all_similarity_is_every_pair():
    chosen = select_similarity_mass(torch.randn(2, 3, 8, 4), 1.0, scope="head", key_block=2)
    assert chosen.pairs((8,)).all()


def test_ties_go_to_the_lower_block_on_every_call():
    assert select_top_k(torch.zeros(1, 1, 1, 6), 3).blocks.flatten().tolist() == [0, 1, 2]


def test_errors_say_what_to_do():
    query, key, value = make_inputs((8, 6))
    selection = select_top_k(torch.randn(2, 4, 4, 8), 2, query_block=(4, 3), key_block=(2, 3))
    with pytest.raises(InputError, match=r"blocks must divide it\. Pad the map, or set ragged=True"):
        sparse_attention(query[:, :, :7], key[:, :, :7], value[:, :, :7], selection)
    with pytest.raises(InputError, match="has 8"):
        sparse_attention(*make_inputs((16, 6)), selection)
    with pytest.raises(InputError, match="NaN, which cannot be ranked"):
        select_top_k(torch.full((1, 1, 2, 2), torch.nan), 1)
    with pytest.raises(InputError, match="did you mean head"):
        select_top_k(torch.zeros(1, 1, 2, 2), 1, scope="heads")
    with pytest.raises(InputError, match="above 0 and at most 1"):
        select_mass(torch.zeros(1, 1, 2, 2), 1.5)


@pytest.mark.parametrize("space", [(6, 4), (7, 4), (6,), (4, 2, 6)])
def test_means_of_blocks_whole_or_not(space):
    block = 2
    x = torch.randn(2, 3, *space, 5, dtype=torch.float64)
    rows = block_order(space, block, x.device)
    flat = x.flatten(2, -2)
    expected = torch.stack([flat[:, :, row[row >= 0]].mean(2) for row in rows], 2)
    assert_close(block_means(x, block), expected)


@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_ties_go_to_the_lower_block_in_exported_graphs_too(count):
    scores = torch.tensor([2.0, 1.0, 2.0, -torch.inf, 2.0, 1.0]).expand(1, 1, 2, 6)
    expected = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count].sort(-1).values
    assert torch.equal(highest(scores, count).sort(-1).values, expected)
