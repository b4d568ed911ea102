"""SparsityBudget: the loss by hand, ascent of the weights, schedules, errors."""

import pytest
import torch
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.gates import SparsityBudget, anneal_temperature, warm_target

GATES = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.float64)  # sparse: 1/2, 0, 3/4


def test_the_loss_is_a_mean_over_tasks_of_means_over_samples():
    budget, task = SparsityBudget(4).double(), torch.tensor([0, 0, 3])
    target = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    a, b = budget.linear.detach(), budget.quadratic.detach()
    missed = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    each = a[task] * missed + b[task] * missed**2
    assert_close(budget(GATES, target, task).detach(), (each[:2].mean() + each[2]) / 2)
    assert_close(budget(GATES.unsqueeze(2).expand(-1, -1, 3), target, task), budget(GATES, target, task))


def test_the_weights_ascend_and_the_gates_descend():
    budget, gates = SparsityBudget().double(), GATES.clone().requires_grad_()
    loss = budget(gates, 0.5)
    loss.backward()
    missed = torch.tensor([0.0, 0.5, 0.25], dtype=torch.float64)
    assert_close(budget.linear.grad, -missed.mean().view(1))  # an optimizer that descends raises them
    assert_close(budget.quadratic.grad, -missed.square().mean().view(1))
    assert (gates.grad[1] > 0).all()  # too full: less
    assert (gates.grad[2] < 0).all()  # too sparse: more


def test_without_tasks_it_is_the_mean_distance():
    budget = SparsityBudget(0)
    assert_close(budget(GATES, 0.5), torch.tensor(0.25, dtype=torch.float64))


def test_the_weights_start_between_0_and_a_half():
    budget = SparsityBudget(1000)
    for weight in (budget.linear, budget.quadratic):
        assert 0 <= weight.min() < 0.05
        assert 0.45 < weight.max() <= 0.5


def test_schedules():
    temperatures = [anneal_temperature(step / 100) for step in range(101)]
    assert temperatures == sorted(temperatures, reverse=True)
    assert temperatures[60:] == [1.0] * 41
    assert temperatures[30] == pytest.approx(1.25)
    assert anneal_temperature(0.0, 2.0, 0.5, until=0) == 0.5
    assert [warm_target(p, 0.8, 0.2, 0.5) for p in (0, 0.25, 0.5, 1)] == pytest.approx([0.2, 0.5, 0.8, 0.8])
    assert warm_target(0, 0.8) == 0.8


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match="num_tasks is -1"):
        SparsityBudget(-1)
    with pytest.raises(InputError, match=r"task is \(2,\) and there are 3 samples"):
        SparsityBudget(2)(GATES, 0.5, torch.tensor([0, 1]))
