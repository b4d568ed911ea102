"""What a study concludes: laws of the intervals, then what is recommended in each situation, then errors."""

import json
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.errors import InputError
from saccade.study.verdict import accuracy_interval, compare, recommend

images = st.integers(1, 60)
seeds = st.integers(1, 3)


def draw(accuracy, seeds=1, images=400, seed=0):
    """Correctness of a mixer for which the same images are hard in each seed."""
    rng = np.random.default_rng(seed)
    hard = np.random.default_rng(99).random(images)
    return [hard + rng.normal(0, 0.01, images) < accuracy for _ in range(seeds)]


def make_results(correct, failed=(), latency=None, faithfulness=None, **data):
    mixers = [
        {
            "name": name,
            "status": "done",
            "accuracy": vars(accuracy_interval(rows)),
            "latency_ms": {"median": latency[name], "batch": 1} if latency else None,
            "faithfulness": (faithfulness or {}).get(name),
        }
        for name, rows in correct.items()
    ]
    mixers += [{"name": name, "status": "failed", "error": "loss became NaN"} for name in failed]
    return {"mixers": mixers, "data": {"classes": list("0123456789"), "skipped": []} | data}


def abpc(value):
    ends = {"low": value - 0.1, "high": value + 0.1, "random": 0.0, "random_low": -0.05, "random_high": 0.05}
    verdict = "better than random" if value > 0.15 else "not distinguishable from random"
    return {"method": "grad_cam", "abpc": {"value": value, **ends}, "verdict": verdict}


# intervals


@given(images=images, seeds=seeds, accuracy=st.floats(0, 1), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_interval_holds_its_value_and_has_width(images, seeds, accuracy, seed):
    correct = np.random.default_rng(seed).random((seeds, images)) < accuracy
    interval = accuracy_interval(list(correct))
    assert interval.value == pytest.approx(correct.mean())
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.low < interval.high


@pytest.mark.parametrize(("right", "images"), [(20, 20), (0, 20), (359, 359), (350, 359), (180, 359), (45, 50)])
def test_one_seed_agrees_with_wilson(right, images):
    """Wilson's interval is derived otherwise: from the normal approximation under each hypothetical accuracy."""
    z, share = 1.96, right / images
    centre = (share + z * z / (2 * images)) / (1 + z * z / images)
    half = z * sqrt(share * (1 - share) / images + z * z / (4 * images**2)) / (1 + z * z / images)
    interval = accuracy_interval([np.arange(images) < right])
    assert 0.9 < (interval.high - interval.low) / (2 * half) < 1.35
    assert (interval.low + interval.high) / 2 == pytest.approx(centre, abs=0.35 * half)


def test_one_seed_says_that_it_is_one():
    assert "one seed" in accuracy_interval(draw(0.9)).method
    assert "one seed" not in accuracy_interval(draw(0.9, seeds=2)).method


def test_seeds_that_disagree_widen_the_interval():
    alike = accuracy_interval([*draw(0.9), *draw(0.9)])
    apart = accuracy_interval([*draw(0.98), *draw(0.82)])
    assert apart.high - apart.low > 2 * (alike.high - alike.low)


def test_interval_contains_the_truth_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(100):
        chance = rng.beta(9, 1, size=150)
        shift = rng.normal(0, 0.02, size=(3, 1))
        interval = accuracy_interval(list(rng.random((3, 150)) < np.clip(chance + shift, 0, 1)))
        hits += interval.low <= 0.9 <= interval.high
    assert hits >= 90


def test_equal_mixers_seldom_give_a_winner():
    rng, winners = np.random.default_rng(0), 0
    for _ in range(50):
        chance = rng.beta(0.9, 0.1, size=120)
        correct = {str(i): list(rng.random((2, 120)) < chance) for i in range(4)}
        winners += len(compare(correct).tied) == 1
    assert winners <= 3


def test_pairing_sees_what_separate_intervals_cannot():
    better, worse = np.arange(300) < 240, np.arange(300) < 225
    one, other = accuracy_interval([better]), accuracy_interval([worse])
    assert other.high > one.low
    assert compare({"worse": [worse], "better": [better]}).tied == ("better",)


def test_more_comparisons_widen_each_lead():
    correct = {"a": draw(0.9), "b": draw(0.88, seed=1)}
    more = correct | {str(i): draw(0.5, seed=i) for i in range(6)}
    two, many = compare(correct).leads["b"], compare(more).leads["b"]
    assert many.value == two.value
    assert many.high - many.low > two.high - two.low


def test_same_seed_same_figures():
    correct = {"a": draw(0.9, 2), "b": draw(0.88, 2, seed=1)}
    assert compare(correct) == compare(correct)


# recommendations


def test_a_clear_winner_is_named():
    correct = {"halo": draw(0.8, 2), "window": draw(0.97, 2), "pooling": draw(0.5, 2)}
    results = make_results(correct, latency={"halo": 2.0, "window": 3.0, "pooling": 1.0})
    verdict = recommend(results, correct)
    assert verdict["sentence"] == "Use window: on your held-out images it is more accurate than halo and pooling."
    assert verdict["winner"] == verdict["suggested"] == verdict["best"] == "window"
    assert verdict["certain"]
    assert verdict["tied"] == []
    assert any("pooling is the fastest with 1 ms an image against 3 ms" in reason for reason in verdict["reasons"])
    share, low, high = (100 * results["mixers"][1]["accuracy"][end] for end in ("value", "low", "high"))
    assert verdict["reasons"][0] == f"window has the highest accuracy: {share:.1f} % ({low:.1f} to {high:.1f})."


def test_a_winner_of_one_training_run_is_called_that():
    correct = {"halo": draw(0.8), "window": draw(0.97)}
    assert recommend(make_results(correct), correct)["sentence"].endswith("as far as one training run each can tell.")


def test_a_tie_names_no_winner_and_suggests_on_cost():
    correct = {"halo": draw(0.965, seed=1), "window": draw(0.97), "pooling": draw(0.5)}
    verdict = recommend(make_results(correct, latency={"halo": 2.0, "window": 3.0, "pooling": 1.0}), correct)
    assert verdict["sentence"] == (
        "On accuracy, window and halo cannot be told apart. The cheapest of them to run is halo."
    )
    assert verdict["winner"] is None
    assert not verdict["certain"]
    assert verdict["tied"] == ["window", "halo"]
    assert verdict["suggested"] == "halo"
    assert any("a choice on cost, not on accuracy" in reason for reason in verdict["reasons"])
    assert any("one seed was run" in reason for reason in verdict["reasons"])


def test_a_tie_without_costs_suggests_nothing():
    correct = {"halo": draw(0.97), "window": draw(0.97)}
    verdict = recommend(make_results(correct), correct)
    assert verdict["suggested"] is None
    assert "cannot be told apart" in verdict["sentence"]


def test_one_mixer_is_not_called_a_winner():
    correct = {"window": draw(0.9)}
    verdict = recommend(make_results(correct, failed=["halo"]), correct)
    assert "Only window finished" in verdict["sentence"]
    assert verdict["winner"] is None
    assert not verdict["certain"]
    assert "halo failed and is not compared: loss became NaN" in verdict["reasons"]


def test_when_all_failed_nothing_is_recommended():
    verdict = recommend(make_results({}, failed=["halo", "window"]), {})
    assert "nothing to recommend" in verdict["sentence"]
    assert (verdict["winner"], verdict["suggested"], verdict["tied"]) == (None, None, [])
    assert len(verdict["reasons"]) == 2


@pytest.mark.parametrize("data", [{}, {"classes": ["a", "b"], "majority": 0.9}])
def test_guessing_is_not_recommended(data):
    correct = {"window": draw(0.9 if data else 0.1), "halo": draw(0.5 if data else 0.02)}
    verdict = recommend(make_results(correct, latency={"window": 1.0, "halo": 2.0}, **data), correct)
    assert "better than guessing" in verdict["sentence"]
    assert (verdict["winner"], verdict["suggested"], verdict["certain"]) == (None, None, False)


def test_skipped_images_are_counted():
    correct = {"window": draw(0.9)}
    skipped = [{"path": "a.jpg", "reason": "truncated"}] * 2
    reasons = recommend(make_results(correct, skipped=skipped), correct)["reasons"]
    assert "2 images could not be used and are left out." in reasons


@given(
    accuracies=st.lists(st.floats(0.3, 1), min_size=1, max_size=5),
    seeds=seeds,
    images=images,
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_a_certain_winner_leads_beyond_zero(accuracies, seeds, images, seed):
    rng = np.random.default_rng(seed)
    correct = {f"m{i}": list(rng.random((seeds, images)) < share) for i, share in enumerate(accuracies)}
    verdict = recommend(make_results(correct, latency=dict.fromkeys(correct, 1.0)), correct)
    assert verdict["certain"] == (verdict["winner"] is not None)
    if verdict["certain"]:
        assert all(lead["low"] > 0 for lead in verdict["leads"].values())
    near = {name for name, lead in verdict["leads"].items() if lead["low"] <= 0}
    assert set(verdict["tied"]) == (near | {verdict["best"]} if near else set())
    assert json.loads(json.dumps(verdict)) == verdict


# whether pictures can be trusted


def test_trust_follows_the_figures():
    correct = {"window": draw(0.97), "halo": draw(0.8)}
    for window, halo, words in [
        (0.4, 0.3, "better than chance, for all mixers"),
        (0.4, 0.0, "for window, but not for halo: do not rely on those"),
        (0.0, 0.1, "Do not rely on the pictures of grad cam"),
    ]:
        results = make_results(correct, faithfulness={"window": abpc(window), "halo": abpc(halo)})
        trust = recommend(results, correct)["trust"]
        assert words in trust
        assert f"For window: ABPC {window:.2f}" in trust
    assert "was not measured" in recommend(make_results(correct), correct)["trust"]


# errors


def test_errors_name_what_was_given():
    with pytest.raises(InputError, match=r"halo has \(seeds, images\) = \(1, 5\) but window has \(1, 6\)"):
        compare({"window": [np.ones(6, bool)], "halo": [np.ones(5, bool)]})
    with pytest.raises(InputError, match="no mixer to compare"):
        compare({})
    with pytest.raises(InputError, match="one row over the same images"):
        accuracy_interval([np.ones(3, bool), np.ones(4, bool)])
    with pytest.raises(InputError, match="one row over the same images"):
        accuracy_interval([])
