"""fit_exponent against exact powers and textbook formulas; measure_scaling against layers whose growth is known."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from saccade.errors import InputError
from saccade.measure import fit_exponent, measure_scaling

QUICK = {"repeats": 1, "min_seconds": 0.0}


@given(power=st.floats(-4, 4), scale=st.floats(1e-6, 1e12))
def test_a_power_law_gives_its_power_without_error(power, scale):
    exponent = fit_exponent([7, 14, 20, 56], [scale * side**power for side in (7, 14, 20, 56)])
    assert exponent.value == pytest.approx(power, abs=1e-9)
    assert exponent.error == pytest.approx(0, abs=1e-6)


def test_slope_and_error_are_those_of_the_covariance_matrix():
    sides, costs = np.array([8, 16, 24, 48, 64]), np.array([1.0, 5.0, 7.0, 40.0, 50.0])
    design = np.stack([np.log(sides), np.ones(5)], axis=1)
    solution, residuals, *_ = np.linalg.lstsq(design, np.log(costs), rcond=None)
    covariance = residuals[0] / (5 - 2) * np.linalg.inv(design.T @ design)
    exponent = fit_exponent(sides.tolist(), costs.tolist())
    assert (exponent.value, exponent.error) == pytest.approx((solution[0], covariance[0, 0] ** 0.5))


def test_error_covers_the_truth_as_often_as_it_says():
    rng, sides = np.random.default_rng(0), np.array([32, 48, 64, 96, 128, 160, 192, 256])
    fits = [fit_exponent(sides, sides**2.0 * np.exp(rng.normal(0, 0.1, 8))) for _ in range(400)]
    inside = np.mean([abs(fit.value - 2) < 2.447 * fit.error for fit in fits])  # Student's t, 6 degrees, 95 %
    assert 0.92 < inside < 0.98


@pytest.mark.parametrize(
    ("sides", "costs", "message"),
    [
        ([32, 64], [1.0, 2.0], "at least 3 different sides"),
        ([32, 32, 64], [1.0, 2.0, 3.0], "at least 3 different sides"),
        ([32, 64, 96], [1.0, 2.0], "one cost for each"),
        ([32, 64, 96], [1.0, 0.0, 2.0], "positive and finite"),
        ([0, 64, 96], [1.0, 2.0, 3.0], "positive and finite"),
        ([32, 64, 96], [1.0, float("nan"), 3.0], "positive and finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(sides, costs, message):
    with pytest.raises(InputError, match=message):
        fit_exponent(sides, costs)


class GlobalAttention(nn.Module):
    def forward(self, images):
        tokens = images.flatten(2).mT
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)


@pytest.mark.parametrize(
    ("model", "power"), [(nn.Conv2d(3, 4, 1), 2), (GlobalAttention(), 4)], ids=["linear", "global"]
)
def test_flops_grow_with_the_power_of_the_mechanism(model, power):
    scaling = measure_scaling(model, [4, 6, 8, 12], batch=2, **QUICK)
    assert scaling.flops_exponent.value == pytest.approx(power)
    assert scaling.flops_exponent.error == pytest.approx(0, abs=1e-6)
    assert len(scaling.seconds) == len(scaling.flops) == len(scaling.sides) == 4
    assert min(scaling.seconds) > 0


def test_flops_are_of_the_whole_batch_in_the_parameters_dtype():
    model = nn.Conv2d(1, 4, 3, dtype=torch.float64)
    assert measure_scaling(model, [5, 7, 9], batch=3, in_chans=1, **QUICK).flops[0] == 3 * 2 * 4 * 9 * 3 * 3


class TakesItsPixels(nn.Conv2d):
    """Advances a clock by a second a pixel."""

    now = 0.0

    def forward(self, images):
        TakesItsPixels.now += images.shape[-1] * images.shape[-2]
        return super().forward(images)


def test_time_is_fitted_at_each_side(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: TakesItsPixels.now)
    scaling = measure_scaling(TakesItsPixels(3, 4, 1), [4, 6, 8], batch=5)
    assert scaling.seconds == (16, 36, 64)
    assert scaling.time_exponent.value == pytest.approx(2)


class OnlyEven(nn.Conv2d):
    def forward(self, images):
        if images.shape[-1] % 2:
            raise InputError(f"side is {images.shape[-1]}: give an even one")
        return super().forward(images)


def test_what_the_model_refuses_is_passed_on():
    with pytest.raises(InputError, match="side is 7: give an even one"):
        measure_scaling(OnlyEven(3, 4, 1), [4, 7, 8], **QUICK)


def test_too_few_sides_are_refused_before_anything_runs():
    model = nn.Module()  # cannot run
    with pytest.raises(InputError, match="at least 3 different sides"):
        measure_scaling(model, [32, 64])


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    measure_scaling(GlobalAttention(), [4, 6, 8], **QUICK)
    assert torch.equal(torch.get_rng_state(), before)
