"""block_map and what gates do with it: laws, gradients, selections, errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import block_map, block_map_divergence, block_means, pool_blocks, select_gated

CASES = [
    ((12,), (20,), 3, 5),
    ((7,), (11,), 2, 4),
    ((6, 5), (6, 5), (2, 3), (4, 2)),
    ((2, 3, 4), (4, 3, 2), 2, (1, 2, 2)),
    ((1,), (1,), 8, 8),
    ((2100,), (9,), 3, 4),  # more queries than are held at a time
]


def make_inputs(space, keys):
    return torch.randn(2, 4, *space, 5, dtype=torch.float64), torch.randn(2, 2, *keys, 5, dtype=torch.float64)


def cut(x, blocks, first):
    """All blocks of a (..., *space) tensor along its axes of space, as a list."""
    parts = [x]
    for axis, size in enumerate(blocks, start=first):
        parts = [piece for part in parts for piece in part.split(size, axis)]
    return parts


@pytest.mark.parametrize("divisor", ["sum", "max"])
@pytest.mark.parametrize(("space", "keys", "query_block", "key_block"), CASES)
def test_by_rows_it_equals_the_reference_and_the_dense_map(space, keys, query_block, key_block, divisor):
    query, key = make_inputs(space, keys)
    options = {"divisor": divisor, "scale": 1.3}
    fast, slow = (block_map(query, key, query_block, key_block, impl=impl, **options) for impl in ("auto", "reference"))
    assert_close(fast, slow)
    assert_close(fast.sum(-1), torch.ones_like(fast[..., 0]))
    logits = 1.3 * query.flatten(2, -2) @ key.flatten(2, -2).repeat_interleave(2, 1).mT
    dense = logits.softmax(-1) if divisor == "sum" else (logits - logits.amax(-1, True)).exp()
    dense = dense.view(2, 4, *space, *keys)
    sizes = [(block,) * len(space) if isinstance(block, int) else block for block in (query_block, key_block)]
    rows = [
        torch.stack([part.flatten(2).amax(-1) for part in cut(row, sizes[1], 2 + len(space))], -1)
        for row in cut(dense, sizes[0], 2)
    ]
    expected = torch.stack(rows, 2)
    assert_close(fast, expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_causal_maps_know_no_later_token(impl):
    query, key = make_inputs((11,), (11,))
    before = block_map(query, key, 3, 3, causal=True, impl=impl)
    assert not before.triu(1).any()
    key[:, :, 7:] += 3
    assert_close(block_map(query, key, 3, 3, causal=True, impl=impl)[:, :, :2], before[:, :, :2])
    weights = (query @ key.repeat_interleave(2, 1).mT * 5**-0.5).masked_fill(
        torch.ones(11, 11, dtype=torch.bool).triu(1), -torch.inf
    )
    dense = F.pad(weights.softmax(-1), (0, 1, 0, 1)).unflatten(-1, (4, 3)).unflatten(2, (4, 3)).amax((3, 5))
    assert_close(block_map(query, key, 3, 3, causal=True, impl=impl), dense / dense.sum(-1, keepdim=True))


def test_large_logits_stay_finite():
    query, key = (1e4 * x.float() for x in make_inputs((9,), (9,)))
    for divisor in ("sum", "max"):
        assert block_map(query, key, 4, 2, divisor=divisor).isfinite().all()


def test_pools_of_smaller_blocks_at_the_end_are_of_their_own_tokens():
    x = torch.randn(2, 3, 5, 7, 4) - 2  # a zero of the margin would be the largest
    blocks = [part.flatten(2, 3) for part in cut(x, (2, 3), 2)]
    assert_close(pool_blocks(x, (2, 3), "max"), torch.stack([block.amax(2) for block in blocks], 2))
    assert_close(pool_blocks(-x, (2, 3), "min"), torch.stack([(-block).amin(2) for block in blocks], 2))
    assert_close(pool_blocks(x, (2, 3)), block_means(x, (2, 3)))


def test_divergence_is_that_of_torch_where_nothing_is_hidden():
    scores, target = torch.randn(2, 3, 8, 5, dtype=torch.float64), torch.randn(2, 3, 8, 5, dtype=torch.float64)
    target = target.softmax(-1)
    expected = F.kl_div(scores[:, :, 2:].log_softmax(-1), target[:, :, 2:], reduction="none").mean()
    assert_close(block_map_divergence(scores, target, skip=0.25), expected)


def test_divergence_has_a_finite_gradient_where_blocks_are_hidden():
    hidden = torch.ones(4, 4, dtype=torch.bool).triu(1)
    scores = torch.randn(4, 4).masked_fill(hidden, -torch.inf).requires_grad_()
    target = torch.randn(4, 4).masked_fill(hidden, -torch.inf).softmax(-1)
    loss = block_map_divergence(scores, target)
    (grad,) = torch.autograd.grad(loss, scores)
    assert loss > 0
    assert_close(grad, (scores.softmax(-1) - target).detach() / 16)
    assert block_map_divergence(target.log(), target).abs() < 1e-7


@given(st.integers(1, 9), st.floats(0.01, 1), st.booleans(), st.integers(0, 3))
def test_a_share_takes_the_same_number_of_the_highest_visible_blocks(blocks, share, causal, dense):
    scores = torch.randn(2, 3, blocks, blocks)
    chosen = select_gated(scores, share=share, causal=causal, dense_rows=dense, key_size=(blocks,)).pairs((blocks,))
    count = max(1, int((1 - (1 - share) ** 0.5 if causal else share) * blocks))
    for row in range(blocks):
        seen = row + 1 if causal else blocks
        assert not chosen[:, :, row, seen:].any()
        want = seen if row >= blocks - dense else min(count, seen)
        assert (chosen[:, :, row].sum(-1) == want).all()
        lowest = scores[:, :, row].where(chosen[:, :, row], torch.inf).amin(-1)
        left = scores[:, :, row, :seen].masked_fill(chosen[:, :, row, :seen], -torch.inf).amax(-1)
        assert (lowest >= left).all()


def test_a_threshold_is_one_of_softmax_weights():
    scores = torch.randn(2, 3, 6, 6)
    chosen = select_gated(scores, threshold=0.2, causal=True, key_size=(6,)).pairs((6,))
    weights = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    assert torch.equal(chosen, (weights > 0.2) | (weights == weights.amax(-1, True)))
    none = select_gated(scores, threshold=1.0, at_least_one=False, key_size=(6,))
    assert not none.pairs((6,)).any()
    assert (select_gated(scores, threshold=1.0, key_size=(6,)).pairs((6,)).sum(-1) == 1).all()
    last = select_gated(scores, threshold=1.0, causal=True, dense_rows=2, key_size=(6,)).pairs((6,))
    assert last[0, 0].sum(-1).tolist() == [1, 1, 1, 1, 5, 6]


def test_errors_say_what_to_do():
    query, key = make_inputs((6,), (8,))
    with pytest.raises(InputError, match=r"with queries on \(6,\) and keys on \(8,\): give one sequence"):
        block_map(query, key, 2, 2, causal=True)
    with pytest.raises(InputError, match="divisor is 'min': choose one of max, sum"):
        block_map(query, key, 2, 2, divisor="min")
    with pytest.raises(InputError, match="choose one of max, mean, min"):
        pool_blocks(key, 2, "sum")
    with pytest.raises(InputError, match=r"target is \(2, 3\) and skip is 0.0: give two maps of one shape"):
        block_map_divergence(torch.zeros(3, 3), torch.zeros(2, 3))
    with pytest.raises(InputError, match="share is None and threshold is None: give one of them"):
        select_gated(torch.zeros(1, 1, 2, 2))
    with pytest.raises(InputError, match=r"share is 0 and threshold is None"):
        select_gated(torch.zeros(1, 1, 2, 2), share=0)
    with pytest.raises(InputError, match=r"scores is \(2, 2\): give \(B, heads or 1, query blocks, key blocks\)"):
        select_gated(torch.zeros(2, 2), share=0.5)
