"""faithfulness: laws on models whose best order is known, then errors."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.errors import InputError, WorkError
from saccade.explain import Explanation, Score, explain, faithfulness
from tests.explain.nets import ConvNet, Linear, images, linear


def two_classes(seed=0, scale=1.0):
    """Logits (w x, 0): the probability of class 0 rises with w x, so the order of w x is the best there is."""
    weight = images(2, 3, 8, 8, seed) * scale
    weight[1] = 0
    return Linear(weight)


def oracle(model, x):
    return (model.weight[0] * x).sum(1).detach()


def measure(model, x, maps, **options):
    options = {"target": 0, "filler": "zero", "patch": 1} | options
    return faithfulness(model, x, maps, **options)


def numbers(result):
    return {k: v for k, v in dataclasses.asdict(result).items() if k not in ("seconds", "filler", "verdict", "against")}


def test_no_order_deletes_faster_than_the_oracle_on_a_linear_model():
    model, x = two_classes(scale=0.2), images(6, seed=1)
    best = measure(model, x, oracle(model, x))
    for seed in range(5):
        other = measure(model, x, images(6, 1, 8, 8, seed=10 + seed)[:, 0])
        assert (best.deletion_curves <= other.deletion_curves + 1e-12).all()
        assert (best.insertion_curves >= other.insertion_curves - 1e-12).all()
        assert best.abpc.value > other.abpc.value


def test_the_oracle_is_better_than_random_and_its_opposite_worse():
    model, x = two_classes(scale=0.2), images(6, seed=1)
    good, bad = (measure(model, x, sign * oracle(model, x)) for sign in (1, -1))
    assert good.verdict == "better than random"
    assert bad.verdict == "worse than random"
    assert good.deletion.value < good.deletion.random < bad.deletion.value
    assert good.insertion.value > good.insertion.random > bad.insertion.value
    assert good.deletion.difference_high < 0 < good.insertion.difference_low


def test_one_image_is_enough_for_a_verdict():
    model, x = two_classes(scale=0.2), images(1, seed=1)
    found = measure(model, x, oracle(model, x))
    assert found.verdict == "better than random"
    assert found.repeats == 32
    assert found.abpc.low == found.abpc.high == found.abpc.value
    assert found.abpc.difference_low < found.abpc.difference < found.abpc.difference_high


@pytest.mark.parametrize("num_images", [1, 2, 4, 16])
def test_maps_that_know_nothing_are_seldom_told_from_random(num_images):
    model, x, trials = two_classes(scale=0.2), images(num_images, seed=2), 40
    told = 0
    for seed in range(1000, 1000 + trials):
        maps = images(num_images, 1, 8, 8, seed=seed)[:, 0]
        told += measure(model, x, maps, steps=8, seed=seed).verdict != "not distinguishable from random"
    assert told <= 0.15 * trials  # 5 % are promised


def test_a_constant_map_is_a_random_one():
    x = torch.rand(8, 3, 8, 8)
    weight = torch.zeros(2, 3, 8, 8)
    weight[0, :, :2] = 0.3  # evidence in the top rows, which come first in pixel order
    model = Linear(weight)
    found = measure(model, x, torch.full((8, 8, 8), 0.1))
    assert found.verdict == "not distinguishable from random"
    assert abs(found.abpc.value) < 0.1
    assert abs(measure(model, x, -torch.arange(64.0).view(8, 8).expand(8, 8, 8)).abpc.value) > 0.3


def test_curves_run_from_the_whole_image_to_the_filler():
    model, x = ConvNet().eval(), images(4, 3, 16, 16)
    target = model(x).argmax(1)
    found = faithfulness(model, x, images(4, 1, 16, 16)[:, 0], filler="mean")
    filled = x.mean((2, 3), keepdim=True).expand_as(x)
    whole, empty = (model(v).double().softmax(1).gather(1, target[:, None])[:, 0].detach() for v in (x, filled))
    assert_close(found.target, target)
    for curves, first, last in (
        (found.deletion_curves, whole, empty),
        (found.insertion_curves, empty, whole),
        (found.random_curves, whole, empty),
    ):
        assert curves.shape == (4, 21)
        assert_close(curves[:, 0], first, check_dtype=False, rtol=1e-5, atol=1e-6)
        assert_close(curves[:, -1], last, check_dtype=False, rtol=1e-5, atol=1e-6)
    assert_close(found.fractions[[0, -1]], torch.tensor([0.0, 1.0]).double())


def test_insertion_is_what_inserting_pixel_by_pixel_gives():
    model, x = two_classes(scale=0.2), images(1)
    maps = images(1, 1, 8, 8, seed=7)[:, 0]
    found = measure(model, x, maps, steps=64, repeats=20)
    image, probabilities = torch.zeros_like(x), []
    for place in [None, *maps.flatten().argsort(descending=True).tolist()]:
        if place is not None:
            image[..., place // 8, place % 8] = x[..., place // 8, place % 8]
        probabilities.append(model(image).double().softmax(1)[0, 0].item())
    assert_close(found.insertion_curves[0], torch.tensor(probabilities).double(), rtol=1e-5, atol=1e-6)
    area = sum((a + b) / 2 / 64 for a, b in pairwise(probabilities))
    assert found.insertion.value == pytest.approx(area, abs=1e-6)


def test_areas_are_means_over_the_removed_share():
    """With weights of one sign and equal size the probability depends on how many pixels are left alone."""
    weight = torch.zeros(2, 3, 8, 8)
    weight[0] = 0.02
    found = measure(Linear(weight), torch.ones(2, 3, 8, 8), images(2, 1, 8, 8)[:, 0], steps=64)
    left = torch.linspace(1, 0, 65).double() * 64 * 3 * 0.02
    assert found.deletion.value == pytest.approx(torch.trapezoid(left.sigmoid(), dx=1 / 64).item(), abs=1e-6)
    assert found.deletion.value == pytest.approx(found.insertion.value, abs=1e-6)
    assert found.abpc.value == pytest.approx(0, abs=1e-6)


def test_abpc_turns_with_the_map_and_is_insertion_minus_deletion():
    model, x, maps = ConvNet(), images(5), images(5, 1, 8, 8)[:, 0]
    plus, minus = (faithfulness(model, x, sign * maps, repeats=3) for sign in (1, -1))
    assert plus.abpc.value == pytest.approx(-minus.abpc.value, abs=1e-12)
    assert plus.abpc.value == pytest.approx(plus.insertion.value - plus.deletion.value, abs=1e-12)
    assert plus.abpc.random == pytest.approx(0, abs=1e-12)  # each random order is used both ways


def test_the_seed_decides_and_the_batch_size_does_not():
    model, x, maps = ConvNet().double(), images(3).double(), images(3, 1, 8, 8)[:, 0]
    first, again, batched, other = (
        numbers(faithfulness(model, x, maps, **options)) for options in ({}, {}, {"batch_size": 7}, {"seed": 1})
    )
    assert_close(first, again, rtol=0, atol=0)
    assert_close(first, batched)
    assert first["abpc"] != other["abpc"]
    assert_close(first["deletion_curves"], other["deletion_curves"])  # no ties in this map


def test_intervals_hold_their_values_and_narrow_with_confidence():
    model, x, maps = ConvNet(), images(12), images(12, 1, 8, 8)[:, 0]
    wide, narrow = (faithfulness(model, x, maps, confidence=c) for c in (0.99, 0.5))
    for name in ("deletion", "insertion", "abpc"):
        score, inner = getattr(wide, name), getattr(narrow, name)
        assert score.low <= score.value <= score.high
        assert score.random_low <= score.random <= score.random_high
        assert score.difference == pytest.approx(score.value - score.random)
        assert inner.high - inner.low < score.high - score.low


def test_an_explanation_brings_its_target_and_the_front_door_serves():
    model, x = ConvNet().train(), images(3)
    found = explain(model, x, target=torch.tensor([3, 0, 1]), method="gradient")
    result = saccade.faithfulness(model, x, found)
    assert_close(result.target, found.target)
    assert_close(numbers(result), numbers(faithfulness(model, x, found.map, target=found.target)))
    assert model.training
    assert isinstance(result.deletion, Score)
    assert isinstance(found, Explanation)


def test_defaults_are_a_sixteenth_of_the_side_and_at_most_one_step_a_patch():
    model = ConvNet()
    assert faithfulness(model, images(1, 3, 35, 50), images(1, 1, 35, 50)[:, 0]).patch == 2
    tiny = faithfulness(model, images(1, 3, 4, 4), images(1, 1, 4, 4)[:, 0], patch=2)
    assert_close(tiny.fractions, torch.linspace(0, 1, 5).double())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filler": "blurr"}, "did you mean blur"),
        ({"patch": 9}, "patch is 9: give a whole number from 1 to 8"),
        ({"steps": 0}, "steps is 0"),
        ({"repeats": 1}, r"3 image\(s\) with 1 random orders.*at least 2 repeats"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"confidence": 95}, "confidence is 95"),
        ({"target": 4}, "target is 4"),
        ({"explanation": torch.zeros(3, 8, 7)}, r"the map is \(3, 8, 7\).*\(3, 8, 8\)"),
        ({"explanation": torch.full((3, 8, 8), float("nan"))}, "the map holds NaN"),
        ({"explanation": "lrp"}, "the map is str"),
        ({"images": images()[0]}, "batch axis"),
    ],
)
def test_wrong_calls_say_what_to_do(options, message):
    arguments = {"images": images(), "explanation": torch.zeros(3, 8, 8)} | options
    with pytest.raises(InputError, match=message):
        faithfulness(linear(), **arguments)


def test_nan_is_failed_work():
    with pytest.raises(WorkError, match="NaN"):
        faithfulness(Linear(torch.full((2, 3, 8, 8), float("nan"))), images(), torch.zeros(3, 8, 8))
