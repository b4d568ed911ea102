"""assign_spans: against exhaustive search, constraints, the front, errors."""

from itertools import product

import pytest
import torch
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import assign_spans, choose_plan

DENSITIES = torch.tensor([[0.2, 0.4, 0.7], [0.1, 0.3, 0.8]], dtype=torch.float64)


def make_losses(lengths=2, layers=2, heads=2, rules=3):
    return torch.rand(lengths, layers, heads, rules, dtype=torch.float64)


def all_plans(losses, densities, budgets, rules_per_layer, least):
    """(plans, lengths) losses of every plan that keeps to the constraints."""
    lengths, layers, heads, rules = losses.shape
    kept = []
    for plan in product(range(rules), repeat=layers * heads):
        chosen = torch.tensor(plan).view(layers, heads)
        if any(len(set(layer.tolist())) > rules_per_layer for layer in chosen):
            continue
        mean = densities[:, chosen.flatten()].mean(1)
        limit = torch.tensor(budgets, dtype=torch.float64)
        if ((mean <= limit + 1e-9) & (mean >= least * limit - 1e-9)).all():
            kept.append(losses.gather(-1, chosen.expand(lengths, -1, -1).unsqueeze(-1)).flatten(1).sum(1))
    return torch.stack(kept)


@pytest.mark.parametrize(("rules_per_layer", "least"), [(1, 0.0), (2, 0.0), (2, 0.9), (3, 0.5)])
def test_plans_are_on_the_front_of_all_plans(rules_per_layer, least):
    losses, budgets = make_losses(), [0.45, 0.45]
    everything = all_plans(losses, DENSITIES, budgets, rules_per_layer, least)
    plans = assign_spans(losses, DENSITIES, budgets, rules_per_layer=rules_per_layer, least=least)
    for length in range(2):
        assert_close(min(plan.losses[length] for plan in plans), everything[:, length].min())
    for plan in plans:
        chosen = plan.rules
        assert_close(plan.losses, losses.gather(-1, chosen.expand(2, -1, -1).unsqueeze(-1)).flatten(1).sum(1))
        assert_close(plan.densities, DENSITIES[:, chosen.flatten()].mean(1))
        assert (plan.densities <= torch.tensor(budgets, dtype=torch.float64) + 1e-8).all()
        assert all(len(set(layer.tolist())) <= rules_per_layer for layer in chosen)
        beaten = (everything <= plan.losses - 1e-9).all(1)
        assert not beaten.any()


def test_more_points_find_more_of_the_front():
    losses = make_losses(layers=3, heads=3)
    few, many = (assign_spans(losses, DENSITIES, [0.45, 0.45], least=0.0, points=points) for points in (1, 9))
    assert len(many) > len(few)
    first, second = (torch.stack([plan.losses[length] for plan in many]) for length in range(2))
    assert (first.diff() > 0).all()  # sorted by the first length, which costs the second
    assert (second.diff() < 0).all()


def test_the_plan_for_an_unseen_length_has_the_least_loss_there():
    losses = make_losses(3)
    plans = assign_spans(losses[:2], DENSITIES, [0.45, 0.45], least=0.0)
    there = [losses[2].gather(-1, plan.rules.unsqueeze(-1)).sum() for plan in plans]
    assert choose_plan(plans, losses[2]) is plans[there.index(min(there))]


def test_losses_may_be_negative():
    losses = make_losses(1) - 0.8
    (plan,) = assign_spans(losses, DENSITIES[:1], [0.45], least=0.0)
    assert_close(plan.losses[0], all_plans(losses, DENSITIES[:1], [0.45], 2, 0.0).min())


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match=r"no plan keeps to budgets \(0.05,\) .* densities of 0.2 to 0.7: raise the"):
        assign_spans(make_losses(1), DENSITIES[:1], [0.05])
    with pytest.raises(InputError, match="and a budget for each length"):
        assign_spans(make_losses(2), DENSITIES, [0.5])
    with pytest.raises(InputError, match="plans is empty"):
        choose_plan([], make_losses()[0])
