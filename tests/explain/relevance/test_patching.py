"""Patching: what three methods share, each by hand, then errors. Recorded coefficients stand in tests/claims."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.explain.relevance import activation_patching, attribution_patching, coefficients, relevance_patching

METHODS = [activation_patching, attribution_patching, relevance_patching]


def linear_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)).double()


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def metric(out):
    return (out[..., 0] - out[..., 1]).mean()


@pytest.mark.parametrize("method", METHODS)
def test_on_a_linear_model_every_score_is_the_exact_rise(method):
    model, clean, corrupted = linear_net(), inputs(2, 3, 4), inputs(2, 3, 4, seed=1)
    scores = method(model, clean, corrupted, metric, ["0", "1:in", "2"], axes=(1,))
    assert {name: tuple(score.shape) for name, score in scores.items()} == {"0": (3,), "1:in": (3,), "2": (3,)}
    rise = (metric(model(clean)) - metric(model(corrupted))).detach()
    for score in scores.values():  # each layer carries all of the difference
        assert_close(score.sum(), rise)
    mixed = corrupted.clone()
    mixed[:, 1] = clean[:, 1]
    assert_close(scores["0"][1], (metric(model(mixed)) - metric(model(corrupted))).detach())
    assert_close(method(model, clean, corrupted, metric, ["0"])["0"], rise)


def test_a_module_that_runs_twice_has_two_scores():
    layer = nn.Linear(4, 4).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    clean, corrupted = inputs(2, 4), inputs(2, 4, seed=1)
    for method in METHODS:
        assert set(method(model, clean, corrupted, metric, ["0"])) == {"0", "0#2"}


def test_gradients_are_autograds_and_activations_the_models():
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)).double()
    x = inputs(2, 4)
    activation, c = coefficients(model, x, metric, ["0"], recipe="gradient")["0"]
    hidden = model[0](x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(metric(model[2](model[1](hidden))), hidden)
    assert_close(activation, hidden.detach())
    assert_close(c, slope)
    _, c = coefficients(model, x, metric, ["0"])["0"]
    gelu = nn.functional.gelu(hidden)
    by_hand = torch.autograd.grad(metric(model[2](gelu)), gelu)[0] * gelu / (hidden + 1e-6 * hidden.sign())
    assert_close(c, by_hand.detach())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: relevance_patching(m, x, x[:1], metric, ["0"]), r"clean is \(2, 4\) but corrupted is \(1, 4\)"),
        (lambda m, x: relevance_patching(m, x, x, metric, ["7"]), "module is '7'"),
        (lambda m, x: relevance_patching(m, x, x, metric, ["0"], recipe="epsilon"), "give 'relp' or 'gradient'"),
        (lambda m, x: coefficients(m, x, lambda out: out, ["0"]), "it must give one number"),
        (lambda m, x: coefficients(m, x, lambda out: torch.ones(()), ["0"]), "does not depend on the inputs"),
        (lambda m, x: coefficients(lambda y: m(y), x, metric, ["0"]), "give a torch.nn.Module"),
    ],
)
def test_wrong_calls_say_what_to_do(call, message):
    with pytest.raises(InputError, match=message):
        call(linear_net(), inputs(2, 4))
