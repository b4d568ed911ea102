"""pattern_cost: every figure from the mask, for patterns of every kind; then errors."""

import pytest
import torch
from hypothesis import given

from saccade.errors import InputError
from saccade.ops import Causal, Global, Neighborhood, PerHead, Sinks, Window, pattern_cost, select_top_k, tile_bound
from tests.ops.cases import patterns


@given(patterns(max_tokens=80))
def test_static_patterns_cost_what_their_mask_says(case):
    pattern, space = case
    mask = pattern.mask(space)
    cost = pattern.cost(space, batch=2, heads=3, head_dim=5, value_dim=7)
    assert cost.pairs == 6 * mask.sum()
    assert cost.flops == cost.pairs * 2 * (5 + 7)
    assert cost.computed >= cost.pairs
    assert cost.bound.flops == (pytest.approx(mask.numel() / mask.sum().item()) if mask.any() else torch.inf)
    assert cost.bound.mean <= cost.bound.flops * (1 + 1e-9)


@given(patterns(max_tokens=60))
def test_tiles_of_a_composition_are_counted_in_its_mask(case):
    pattern, space = case
    if pattern.key_space(space) != space:
        return
    composed = pattern & Global()
    bound = composed.cost(space, query_tile=2, key_tile=3).bound
    blocks = [torch.stack([axis // size for axis in unravel(space)]) for size in (2, 3)]
    tiles = [each.unique(dim=1, return_inverse=True)[1] for each in blocks]
    visited = torch.zeros(*(int(each.max()) + 1 for each in tiles), dtype=torch.bool)
    rows, columns = composed.mask(space).nonzero().T
    visited[tiles[0][rows], tiles[1][columns]] = True
    if not visited.any():
        assert bound.mean == torch.inf
        return
    assert bound.mean == pytest.approx(visited.numel() / visited.sum().item())
    assert bound.slowest == pytest.approx(visited.shape[1] / visited.sum(1).max().item())


def unravel(space):
    return torch.unravel_index(torch.arange(torch.Size(space).numel()), space)


def test_bytes_are_those_of_the_tensors():
    cost = Window(4).cost((8,), batch=2, heads=6, kv_heads=3, head_dim=4, value_dim=5, dtype=torch.float16)
    sizes = [(2, 6, 8, 4), (2, 3, 8, 4), (2, 3, 8, 5), (2, 6, 8, 5)]
    assert cost.bytes == sum(torch.empty(size, dtype=torch.float16).nbytes for size in sizes)


def test_heads_add_up():
    cost = PerHead([Window(4), Window(4), Global()]).cost((16,), query_tile=4, key_tile=4)
    alone = [pattern.cost((16,), query_tile=4, key_tile=4) for pattern in (Window(4), Global())]
    assert cost.pairs == 2 * alone[0].pairs + alone[1].pairs
    assert cost.bound.mean == pytest.approx(3 / (2 / 4 + 1))


@pytest.mark.parametrize(
    "cut", [lambda chosen: chosen, lambda chosen: chosen & Causal(), lambda chosen: chosen | Sinks(1)]
)
def test_selections_cost_what_their_mask_says(cut):
    chosen = cut(select_top_k(torch.randn(2, 3, 3, 4), 2, query_block=4, key_block=3, key_size=(12,)))
    cost = pattern_cost(chosen, (12,), batch=2, heads=3, head_dim=4)
    assert cost.pairs == chosen.mask((12,)).sum()
    assert cost.bound.flops == pytest.approx(2 * 3 * 144 / cost.pairs)
    assert cost.computed >= cost.pairs


def test_errors():
    with pytest.raises(InputError, match="heads is 0: give an integer of at least 1"):
        Window(2).cost((4,), heads=0)
    with pytest.raises(InputError, match="take a window of at most 4"):
        Neighborhood(5).cost((4,))
    chosen = select_top_k(torch.randn(2, 3, 3, 3), 2, query_block=4, key_block=4)
    with pytest.raises(InputError, match="for 2 images and 3 heads, not for 1 and 3"):
        chosen.cost((12,), heads=3)
    with pytest.raises(InputError, match="dynamic is True"):
        tile_bound(Causal(), (8,), 2, 2, dynamic=True)
