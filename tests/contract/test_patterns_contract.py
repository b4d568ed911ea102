"""Laws of every exported pattern: its short answers and its tiles say what its mask says."""

import inspect
import pickle

import pytest
import torch
from hypothesis import given

from saccade import ops
from saccade.ops import AxialPattern, Pattern
from tests.contract.exceptions import NO_PLAN
from tests.ops.cases import CASES, IDS, patterns


def unfold_plan(plan, num_queries, num_keys, values):
    """(queries, keys) dense form of values (T | 1, Q, K) of every group, and how often each visible pair stands in a
    tile."""
    rows = [[], [], [], []]  # of every slot: its query, keys, what is visible, values
    for tiles, own in zip(plan.groups, values):
        shape = (*tiles.query.shape, tiles.key.shape[1])
        parts = (tiles.query.unsqueeze(-1), tiles.key.unsqueeze(1).expand(shape), tiles.visible.expand(shape))
        for row, part in zip(rows, (*parts, own.expand(shape))):
            row.extend(part.flatten(0, 1))
    slots = range(num_queries) if plan.slot is None else plan.slot.tolist()
    assert [int(rows[0][slot]) for slot in slots] == list(range(num_queries))  # the slot of a query holds that query
    dense, count = (torch.zeros(num_queries, num_keys, dtype=torch.long) for _ in range(2))
    for query, slot in enumerate(slots):
        _, keys, visible, own = (row[slot] for row in rows)
        count[query].scatter_add_(0, keys, visible.long())
        dense[query].scatter_add_(0, keys, own * visible)
    return dense, count


def of_tiles(each, kind):
    """Entries of all tiles from those of their kinds."""
    return each if kind is None or len(each) == 1 else each[kind]


def check_pattern(pattern, space):
    mask, keys = pattern.mask(space), pattern.key_space(space)
    num_queries, num_keys = torch.Size(space).numel(), torch.Size(keys).numel()
    assert mask.shape == (num_queries, num_keys)
    assert mask.any(1).all() or not isinstance(pattern, AxialPattern), "a query sees nothing"
    assert pattern.sees_all(space) == mask.all()
    assert pattern.num_visible(space) == mask.sum()

    offset, (regions, _) = pattern.offset(space), pattern.plan_regions(space, True, torch.float64)
    assert offset.shape == (len(space), *mask.shape)
    plan = pattern.plan(space)
    for axis, along in enumerate(offset):
        dense, count = unfold_plan(
            plan, num_queries, num_keys, [of_tiles(region.offset[axis], region.kind) for region in regions]
        )
        assert torch.equal(count, mask.long())  # each visible pair once, nothing else
        assert torch.equal(dense, along * mask)

    for tiles, region in zip(plan.groups, regions):
        assert torch.equal(region.query, tiles.query)
        assert torch.equal(region.key, tiles.key)
        hidden = torch.zeros(1, 1, 1, 1) if region.hidden is None else of_tiles(region.hidden, region.kind)
        assert (hidden.squeeze(1).exp().bool() == tiles.visible).all()

    queries, keys = torch.arange(num_queries), torch.arange(num_keys)
    assert torch.equal(pattern.sees(space, queries[:, None], keys), mask)
    some = queries[:: 1 + num_queries // 5].numpy()
    reached = torch.zeros(num_keys, dtype=torch.bool)
    reached[pattern.reach(space, some)] = True
    assert not (mask[some].any(0) & ~reached).any()


@pytest.mark.parametrize(("pattern", "space"), CASES, ids=IDS)
def test_answers_and_tiles_say_what_the_mask_says_in_telling_cases(pattern, space):
    check_pattern(pattern, space)


@given(patterns())
def test_answers_and_tiles_say_what_the_mask_says(case):
    check_pattern(*case)


@pytest.mark.parametrize(("pattern", "space"), CASES, ids=IDS)
def test_equal_patterns_share_their_tiles_and_travel_between_processes(pattern, space):
    twin = pickle.loads(pickle.dumps(pattern))
    assert twin == pattern
    assert hash(twin) == hash(pattern)
    assert twin.plan(space).groups[0].query is pattern.plan(space).groups[0].query


@pytest.mark.parametrize(("pattern", "space"), CASES, ids=IDS)
def test_patterns_are_frozen(pattern, space):
    for name in [*vars(pattern), "anything"]:
        with pytest.raises(AttributeError):
            setattr(pattern, name, 1)


def test_tiles_built_under_inference_mode_serve_training_later():
    query = torch.randn(1, 1, 6, 2, requires_grad=True)
    pattern = ops.Neighborhood(3)
    with torch.inference_mode():
        ops.sparse_attention(query, query, query, pattern)
    ops.sparse_attention(query, query, query, pattern).sum().backward()


def test_every_exported_pattern_is_among_the_cases():
    kinds = [each for each in vars(ops).values() if isinstance(each, type) and issubclass(each, Pattern)]
    concrete = {kind.__name__ for kind in kinds if not inspect.isabstract(kind)}
    assert {type(pattern).__name__ for pattern, _ in CASES} | set(NO_PLAN) == concrete
