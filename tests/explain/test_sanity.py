"""Sanity checks: methods that look at nothing learnt are told, models come back, numbers against other derivations."""

import pytest
import torch
from sklearn.feature_selection import r_regression
from torch import nn
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.explain import class_sensitivity, explain, parameter_randomization
from saccade.explain.score import correlate, place_on_ranks
from tests.explain.nets import ConvNet, Linear, images, linear


def test_a_method_that_looks_at_nothing_is_told():
    found = parameter_randomization(linear(), images(8), method="random")
    assert found.verdict == "shuffled weights give the same map"
    assert found.similarity[-1].value == pytest.approx(1)
    assert abs(found.similarity[-1].random) < 0.05


def test_the_gradient_of_a_linear_model_follows_its_weights():
    found = parameter_randomization(linear(), images(8), method="input_x_gradient")
    assert found.verdict == "follows the weights"
    assert found.fractions == (1.0,)


def test_stages_shuffle_from_the_output_down():
    model, x = ConvNet(), images(4, 3, 16, 16)
    found = parameter_randomization(model, x, method="grad_cam", stages=4)
    assert found.fractions == (0.25, 0.5, 0.75, 1.0)
    assert len(found.similarity) == 4
    alone = parameter_randomization(model, x, method="grad_cam")
    assert alone.similarity[-1].value == pytest.approx(found.similarity[-1].value)


def test_the_model_is_left_as_it_was():
    model = ConvNet().train().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameter_randomization(model, images(), method="gradient", stages=2)
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_ranks_and_correlations_are_those_of_the_book():
    first, second = images(2, 1, 5, 6)[:, 0], images(2, 1, 5, 6, seed=1)[:, 0].round()
    ours = correlate(first.flatten(1), second.flatten(1))
    theirs = [r_regression(a.flatten()[:, None].double(), b.flatten().double())[0] for a, b in zip(first, second)]
    assert ours.tolist() == pytest.approx(theirs)
    scipy_stats = pytest.importorskip("scipy.stats")
    spearman = correlate(place_on_ranks(first), place_on_ranks(second))
    theirs = [scipy_stats.spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(first, second)]
    assert spearman.tolist() == pytest.approx(theirs)
    assert correlate(torch.ones(3), torch.arange(3.0)) == 0


def test_class_sensitivity_of_opposite_classes_and_of_a_map_that_knows_no_class():
    weight = images(2, 3, 8, 8, seed=1)
    model = Linear(torch.stack([weight[0], -weight[0]]))
    found = class_sensitivity(model, images(6), method="input_x_gradient")
    assert found.value == pytest.approx(-1)
    assert abs(found.random) < 0.1
    assert class_sensitivity(model, images(6), method="random").value == pytest.approx(1)


def test_class_sensitivity_is_the_correlation_of_the_two_maps():
    model, x = ConvNet().eval(), images(4)
    logits = model(x)
    maps = [explain(model, x, method="grad_cam", target=each).map for each in (logits.argmax(1), logits.argmin(1))]
    expected = [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item() for a, b in zip(*maps)]
    found = class_sensitivity(model, x, method="grad_cam", batch_size=3)
    assert found.value == pytest.approx(sum(expected) / 4, abs=1e-5)
    assert found.low <= found.value <= found.high


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parameter_randomization(nn.Sequential(nn.AvgPool2d(8), nn.Flatten()), images()), "no parameters"),
        (lambda: parameter_randomization(linear(), images(), stages=0), "stages is 0"),
        (lambda: parameter_randomization(linear(), images(), method="gradients"), "did you mean gradient"),
        (lambda: parameter_randomization(linear(), images(), repeats=1), "at least 2 repeats"),
        (lambda: class_sensitivity(linear(classes=1), images(), method="gradient"), "knows 1 class"),
        (lambda: class_sensitivity(linear(), images(), method="gradient", steps=3), "no option of gradient"),
    ],
)
def test_wrong_calls_say_what_to_do(call, message):
    with pytest.raises(InputError, match=message):
        call()
