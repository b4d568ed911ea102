"""The recipe: learning rates and the parameters that decay."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from saccade.training import TrainSettings
from saccade.training.recipe import learning_rate, parameter_groups
from tests.training.nets import Net


@given(epochs=st.integers(1, 20), steps=st.integers(1, 30), warmup=st.floats(0, 30))
def test_rate_rises_to_the_peak_within_the_warm_up_then_falls_and_stays_positive(epochs, steps, warmup):
    settings = TrainSettings(epochs=epochs, warmup_epochs=warmup, learning_rate=0.5)
    rates = [learning_rate(settings, step, steps) for step in range(epochs * steps)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.5)
    assert peak <= min(warmup * steps + 0.5, epochs * steps / 2)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates) > 0


def test_rate_equals_that_of_the_schedulers_of_torch():
    settings = TrainSettings(epochs=5, warmup_epochs=2, learning_rate=0.5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.5)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 6, 1.0, total_iters=5)  # 2 epochs of 3 steps
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    for step in range(15):
        scheduler = warm if step < 6 else cosine
        if step == 6:
            for group in optimizer.param_groups:
                group["lr"] = 0.5
        assert learning_rate(settings, step, 3) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_norms_biases_vectors_and_named_parameters_do_not_decay():
    model = nn.Sequential(Net(), nn.LayerNorm((2, 3)), nn.Linear(3, 3))
    model[2].weight.requires_grad_(False)
    model.position_bias = nn.Parameter(torch.zeros(4, 4))
    model.no_weight_decay = lambda: {"0.scale"}
    decayed, spared = parameter_groups(model, 0.3)
    names = {id(value): name for name, value in model.named_parameters()}
    assert {names[id(value)] for value in decayed["params"]} == {"0.stem.weight", "0.head.weight"}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert {names[id(value)] for value in spared["params"]} == set(names.values()) - {
        "0.stem.weight",
        "0.head.weight",
        "2.weight",
    }


def test_a_parameter_that_two_modules_share_is_updated_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == 3
