"""Laws of every exported pattern: its short answers and its tiles say what its mask says."""

import inspect
import pickle

import pytest
import torch
from hypothesis import given

from saccade import ops
from saccade.ops import Pattern
from tests.contract.exceptions import MADE_FROM_DATA
from tests.ops.cases import CASES, IDS, patterns


def unfold_plan(plan, num_queries, num_keys, values):
    """(queries, keys) dense form of per-tile values (T | 1, Q, K), and how often each visible pair stands in a tile."""
    values, visible = (x.expand(len(plan.query), -1, -1) for x in (values, plan.visible))
    slots = torch.arange(num_queries) if plan.slot is None else plan.slot
    tile, row = slots // plan.query.shape[1], slots % plan.query.shape[1]
    assert torch.equal(plan.query[tile, row], torch.arange(num_queries))  # the slot of a query holds that query
    visible, keys = visible[tile, row], plan.key[tile]
    count = torch.zeros(num_queries, num_keys, dtype=torch.long).scatter_add_(1, keys, visible.long())
    dense = torch.zeros(num_queries, num_keys, dtype=values.dtype)
    return dense.scatter_add_(1, keys, values[tile, row] * visible), count


def check_pattern(pattern, space):
    mask, keys = pattern.mask(space), pattern.key_space(space)
    num_queries, num_keys = torch.Size(space).numel(), torch.Size(keys).numel()
    assert mask.shape == (num_queries, num_keys)
    assert mask.any(1).all(), "a query sees nothing"
    assert pattern.sees_all(space) == mask.all()
    assert pattern.num_visible(space) == mask.sum()

    offset, per_tile = pattern.offset(space), pattern.plan_offset(space)
    assert offset.shape == (len(space), *mask.shape)
    plan = pattern.plan(space)
    for along, along_tile in zip(offset, per_tile):
        dense, count = unfold_plan(plan, num_queries, num_keys, along_tile)
        assert torch.equal(count, mask.long())  # each visible pair once, nothing else
        assert torch.equal(dense, along * mask)

    hidden = pattern.plan_hidden(space, torch.float64)
    assert torch.equal(hidden.squeeze(1).exp().bool(), plan.visible)


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
    assert twin.plan(space).query is pattern.plan(space).query


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
    assert {type(pattern).__name__ for pattern, _ in CASES} | set(MADE_FROM_DATA) == concrete
