"""Gradient methods against formulas, then parity between them."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from saccade.explain import explain
from tests.explain.nets import ConvNet, images, linear


def test_on_a_linear_model_all_are_weight_times_input():
    model, x = linear().double(), images().double()
    target = torch.tensor([2, 0, 3])
    share = (model.weight[target] * x).sum(1).detach()
    for method in ("input_x_gradient", "integrated_gradients"):
        assert_close(explain(model, x, method=method, target=target).map, share, rtol=1e-6, atol=1e-6)
    assert_close(explain(model, x, method="gradient", target=target).map, model.weight[target].abs().amax(1).detach())


def test_input_x_gradient_is_the_hand_formula_of_a_relu_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10), nn.ReLU(), nn.Linear(10, 4)).double()
    x = images(2, 3, 4, 4).double()
    first, second = model[1], model[3]
    open_gates = (first(x.flatten(1)) > 0).double()
    slope = (second.weight[1] * open_gates) @ first.weight
    expected = (slope * x.flatten(1)).view_as(x).sum(1).detach()
    assert_close(explain(model, x, method="input_x_gradient", target=1).map, expected)


def test_integrated_gradients_of_a_linear_model_are_complete():
    found = explain(linear().double(), images().double(), steps=2)
    assert found.error is not None
    assert_close(found.error, torch.zeros(3).double(), rtol=0, atol=1e-5)  # captum's step sizes are float32


@pytest.mark.parametrize("baseline", [0.0, 0.5])
def test_the_completeness_error_is_the_gap_between_map_and_logits(baseline):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    x = images().double() * 3
    gaps = []
    for steps in (3, 200):
        found = explain(model, x, target=2, steps=steps, baseline=baseline, batch_size=7)
        fall = (model(x) - model(torch.full_like(x, baseline)))[:, 2].detach()
        assert found.error is not None
        assert_close(found.error, found.map.sum((1, 2)) - fall, rtol=1e-6, atol=1e-9)
        gaps.append(found.error.abs().max().item())
    assert gaps[1] < 1e-3 < gaps[0]


def test_methods_without_a_known_sum_report_no_error_and_no_layer():
    found = explain(ConvNet(), images(), method="input_x_gradient")
    assert found.error is None
    assert found.layer is None
    assert found.seconds > 0
