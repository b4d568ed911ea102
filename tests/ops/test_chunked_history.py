"""Sparsity shared out over chunks, and the choice of frames and blocks of the past: laws, then errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import grow_sparsity, select_history, sparse_attention

# Sharing out


@given(
    chunks=st.integers(1, 12),
    target=st.floats(0, 0.95),
    room=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_mean_by_cost_is_the_target_and_none_is_negative(chunks, target, room, seed):
    rng = torch.Generator().manual_seed(seed)
    base = target + room * (0.99 - target)
    cost = (torch.rand(chunks - 1, generator=rng, dtype=torch.float64) + 0.1).tolist()
    trust = (5 * torch.rand(chunks - 1, generator=rng, dtype=torch.float64) + 0.01).tolist()
    sparsities = grow_sparsity(chunks, target, base=base, trust=trust, cost=cost)
    assert len(sparsities) == chunks
    assert sparsities[0] == 0
    assert all(0 <= each <= base for each in sparsities)
    if chunks > 1:
        mean = sum(c * s for c, s in zip(cost, sparsities[1:])) / sum(cost)
        assert mean == pytest.approx(target, abs=1e-9)
    more_trusted = sorted(zip(trust, sparsities[1:]), reverse=True)
    assert [s for _, s in more_trusted] == sorted(sparsities[1:])


def test_by_default_it_grows_and_costs_count_the_keys():
    sparsities = grow_sparsity(5, 0.6)
    assert list(sparsities) == sorted(set(sparsities))
    assert sum(n * s for n, s in zip(range(2, 6), sparsities[1:])) / sum(range(2, 6)) == pytest.approx(0.6)
    assert grow_sparsity(5, 0.6, base=0.6) == pytest.approx((0, 0.6, 0.6, 0.6, 0.6))
    assert grow_sparsity(3, 0.0) == (0, 0, 0)
    assert grow_sparsity(1, 0.7) == (0,)


# Choosing


def make_video(own=2, frames=7, space=(4, 5), heads=4, kv_heads=2, value_dim=3):
    shapes = [(2, heads, own, *space, 6), (2, kv_heads, frames, *space, 6), (2, kv_heads, frames, *space, value_dim)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def means(x, size):
    """(B, heads, frames, blocks, D) by slicing frames of two axes."""
    rows = [torch.stack([cell.mean((3, 4)) for cell in row.split(size, 4)], 3) for row in x.split(size, 3)]
    return torch.cat(rows, 3)


def choose_slowly(query, key, size, count, frames, sink, recent, whole):
    """Sets of (frame, block) for each query block, by their definition."""
    own, total = query.shape[2], key.shape[2]
    history = total - own
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    queries, blocks, whole_frames = means(query, size).flatten(2, 3), means(key, size), key.mean((3, 4))
    always = {f for f in range(total) if f < sink or f >= history - recent}
    chosen = {}
    for b, h, t in torch.cartesian_prod(*map(torch.arange, queries.shape[:3])).tolist():
        others = sorted(
            set(range(total)) - always, key=lambda f: float(queries[b, h, t] @ whole_frames[b, h, f]), reverse=True
        )
        seen = always | set(others if frames is None else others[:frames])
        pairs = [(f, j) for f in sorted(seen) for j in range(blocks.shape[3])]
        score = {(f, j): float(queries[b, h, t] @ blocks[b, h, f, j]) for f, j in pairs}
        if whole:
            score |= {pair: float("inf") for pair in pairs if pair[0] >= history}
        chosen[b, h, t] = set(sorted(pairs, key=lambda pair: score[pair], reverse=True)[:count])
    return chosen


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"density": 0.3, "frames": 2}, 8),
        ({"density": 0.3, "frames": None}, 8),
        ({"density": 0.2, "frames": 1, "sink_frames": 0, "recent_frames": 0}, 6),
        ({"density": 0.5, "frames": 1, "sink_frames": 2, "recent_frames": 9}, 14),
        ({"density": 0.4, "frames": 2, "whole_chunk": True}, 11),
        ({"density": 0.1, "frames": 2, "whole_chunk": True}, 8),  # the chunk's own blocks, at least
        ({"density": 0.001, "frames": 3}, 1),
        ({"density": 1.0, "frames": 1}, 20),  # no more than the chosen frames have
    ],
)
def test_frames_then_blocks_are_the_best_by_their_means(options, count):
    query, key, _ = (x.detach() for x in make_video())
    chosen = select_history(query, key, 3, **options)  # 2 x 2 blocks a frame, smaller at the end
    settings = {"frames": 6, "sink_frames": 1, "recent_frames": 1, "whole_chunk": False} | options
    expected = choose_slowly(
        query,
        key,
        3,
        count,
        settings["frames"],
        settings["sink_frames"],
        settings["recent_frames"],
        settings["whole_chunk"],
    )
    assert chosen.used.all()
    for (b, h, t), pairs in expected.items():
        assert {(n // 4, n % 4) for n in chosen.blocks[b, h, t].tolist()} == pairs
        assert len(pairs) == chosen.blocks.shape[-1] == count


def test_the_engine_attends_to_the_past_in_value_and_gradient():
    inputs = make_video()
    chosen = select_history(*inputs[:2], 3, density=0.3, frames=2)
    fast, slow = (sparse_attention(*inputs, chosen, impl=impl) for impl in ("auto", "reference"))
    assert_close(fast, slow)
    upstream = torch.randn_like(slow)
    assert_close(*(torch.autograd.grad(each, inputs, upstream) for each in (fast, slow)))


@pytest.mark.parametrize(
    ("own", "frames", "space"), [(1, 1, (4, 5)), (3, 3, (6,)), (2, 7, ()), (1, 4, (1, 1))], ids=str
)
def test_everything_kept_is_dense_attention_of_any_frames(own, frames, space):
    query, key, value = make_video(own, frames, space, kv_heads=4)
    chosen = select_history(query, key, 2, density=1, frames=None)
    flat = [x.flatten(2, -2) for x in (query, key, value)]
    dense = torch.nn.functional.scaled_dot_product_attention(*flat)
    assert_close(sparse_attention(query, key, value, chosen).flatten(2, -2), dense)


def test_without_a_batch_there_is_no_choice():
    query, key, value = (x[:0] for x in make_video())
    chosen = select_history(query, key, 3, density=0.3, frames=2)
    assert sparse_attention(query, key, value, chosen).shape == (0, 4, 2, 4, 5, 3)


# Errors


def test_errors_of_sharing_out_say_what_to_give():
    for options in ({"base": 0.4}, {"base": 1.0}):
        with pytest.raises(InputError, match="give 0 <= target <= base < 1"):
            grow_sparsity(4, 0.5, **options)
    for name, wrong in (("trust", (1, 2)), ("trust", (1, 2, -1)), ("cost", (1, 2, float("nan")))):
        with pytest.raises(InputError, match=f"{name} is .*: give 3 numbers of 0 or more"):
            grow_sparsity(4, 0.5, **{name: wrong})
    with pytest.raises(InputError, match="Give trust to a chunk that has a cost, or take base = target"):
        grow_sparsity(4, 0.5, trust=(0, 0, 0))
    with pytest.raises(InputError, match="num_chunks is 0"):
        grow_sparsity(0, 0.5)


def test_errors_of_choosing_say_what_to_give():
    query, key, _ = make_video()
    for density in (0, 1.1):
        with pytest.raises(InputError, match=r"density is .*: give a share above 0 and at most 1"):
            select_history(query, key, 3, density=density)
    with pytest.raises(InputError, match="frames is 0"):
        select_history(query, key, 3, density=0.5, frames=0)
    with pytest.raises(InputError, match="sink_frames is -1"):
        select_history(query, key, 3, density=0.5, sink_frames=-1)
    for wrong in (key[:, :, :1], key[:, :, :, :3]):
        with pytest.raises(InputError, match="the keys are those of all frames so far, the chunk's own last"):
            select_history(query, wrong, 3, density=0.5)
    with pytest.raises(InputError, match="block_size is"):
        select_history(query, key, (2, 2, 2), density=0.5)
