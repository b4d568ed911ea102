"""The removal engine: ranks, patches, fillers, and curves against a loop by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.explain.removal import FILLERS, patch_relevance, rank, removal_curves
from tests.explain.nets import images


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_ranks_follow_the_scores():
    scores = torch.tensor([[0.1, 3.0, -2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    assert_close(rank(scores, generator()), torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]]))


@given(seed=st.integers(0, 2**31), levels=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_ranks_are_permutations_that_never_rise_with_the_score(seed, levels):
    scores = torch.randint(levels, (2, 3, 17), generator=generator(seed)).double()
    ranks = rank(scores, generator(seed))
    assert (ranks.sort(-1).values == torch.arange(17)).all()
    assert (scores.gather(-1, ranks.argsort(-1)).diff() <= 0).all()


def test_ties_fall_in_any_order_alike():
    ranks = rank(torch.zeros(4000, 5), generator())
    for place in range(5):
        share = (ranks == place).double().mean(0)
        assert_close(share, torch.full((5,), 0.2).double(), rtol=0, atol=0.03)  # five standard errors
    assert_close(ranks, rank(torch.zeros(4000, 5), generator()))
    assert (ranks != rank(torch.zeros(4000, 5), generator(1))).any()


def test_patches_hold_means_and_cut_ones_too():
    maps = images(2, 1, 5, 7)[:, 0].double()
    found = patch_relevance(maps, 3).view(2, 2, 3)
    assert_close(found[:, 0, 0], maps[:, :3, :3].mean((1, 2)))
    assert_close(found[:, 1, 2], maps[:, 3:, 6:].mean((1, 2)))
    assert patch_relevance(torch.full((1, 5, 7), 0.1).double(), 3).unique().numel() == 1


def test_curves_are_those_of_a_loop():
    x, patch, batch = images(2, 3, 5, 7).double(), 2, 2
    filled = FILLERS["mean"](x)
    ranks = rank(torch.rand(batch, 3, 12, generator=generator()), generator())
    counts = torch.tensor([0, 1, 6, 11, 12])
    weight = images(1, 3, 5, 7, seed=5)[0].double()

    def readout(part, owner):
        return (part * weight).sum((1, 2, 3)) + 100 * owner

    expected = torch.empty(batch, 3, 5, dtype=torch.double)
    for b in range(batch):
        for order in range(3):
            for k, count in enumerate(counts):
                image = x[b].clone()
                for place in range(12):
                    if ranks[b, order, place] < count:
                        rows = slice(place // 4 * 2, place // 4 * 2 + 2)
                        columns = slice(place % 4 * 2, place % 4 * 2 + 2)
                        image[:, rows, columns] = filled[b, :, rows, columns]
                expected[b, order, k] = (image * weight).sum() + 100 * b
    for batch_size in (1, 5, 64):
        found = removal_curves(readout, x, filled, ranks, counts, patch=patch, batch_size=batch_size)
        assert_close(found, expected)


@pytest.mark.parametrize(("steps", "passes"), [(1, 4), (4, 4 + 2 * 3 * 3)])
def test_ends_run_once_and_nothing_runs_twice(steps, passes):
    seen = []

    def readout(part, _owner):
        seen.append(len(part))
        return part.mean((1, 2, 3))

    ranks = rank(torch.zeros(2, 3, 16), generator())
    counts = torch.linspace(0, 16, steps + 1).long()
    removal_curves(readout, images(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), ranks, counts, patch=1, batch_size=7)
    assert sum(seen) == passes
    assert max(seen) <= 7


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("size", [(1, 1), (3, 9), (32, 20)])
def test_fillers_keep_shape_and_leave_flat_images_flat(filler, size):
    x = torch.full((2, 3, *size), 0.7)
    expected = torch.zeros_like(x) if filler == "zero" else x
    assert_close(FILLERS[filler](x), expected)


def test_blur_keeps_the_mean_and_loses_the_detail():
    x = images(1, 3, 32, 32)
    assert FILLERS["blur"](x).std() < 0.15 * x.std()
    assert_close(FILLERS["blur"](x).mean(), x.mean(), rtol=0, atol=0.05)
