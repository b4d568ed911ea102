"""claim and check: what holds, what fails and shows it, what needs something."""

import math

import pytest
import torch

from saccade.claims.framework import at_least, at_most, check, claim, equal, exact, show_value
from saccade.errors import InputError


def made(published, measured, holds=exact, **options):
    def name_of_it():
        """It is so."""
        return measured() if callable(measured) else measured

    return claim("property", published, holds, source="nowhere", **options)(name_of_it)


def test_a_claim_is_named_and_stated_by_its_function():
    made_claim = made(1, 1)
    assert made_claim.name == "name of it"
    assert made_claim.statement == "It is so."


@pytest.mark.parametrize(
    ("published", "measured", "holds", "verdict"),
    [
        (3, 3, exact, "holds"),
        (3, 4, exact, "fails"),
        (True, True, exact, "holds"),
        (True, False, exact, "fails"),
        (1.5, 1.504, equal("two decimals", within=0.005), "holds"),
        (1.5, 1.506, equal("two decimals", within=0.005), "fails"),
        (200.0, 202.0, equal("noise", relative=0.01), "holds"),
        (200.0, 203.0, equal("noise", relative=0.01), "fails"),
        ((1, 2), (1, 2), exact, "holds"),
        ((1, 2), (1, 2, 3), exact, "fails"),
        ({"a": 1.0, "b": (2, 3)}, {"a": 1.0, "b": (2, 3)}, exact, "holds"),
        ({"a": 1.0, "b": (2, 3)}, {"a": 1.0, "b": (2, 4)}, exact, "fails"),
        ({"a": 1.0, "b": 2}, {"a": 1.0}, exact, "fails"),
        ("equal", 1e-16, at_most(1e-10, "rounding"), "holds"),
        ("equal", 1e-9, at_most(1e-10, "rounding"), "fails"),
        ("equal", {"a": 0.0, "b": (0.0, 1.0)}, at_most(1e-10, "rounding"), "fails"),
        ("above", 2.0, at_least(1.5, "clear"), "holds"),
        ("above", 1.0, at_least(1.5, "clear"), "fails"),
        ("equal", math.nan, at_most(1e-10, "rounding"), "fails"),
        ("above", math.nan, at_least(1.5, "clear"), "fails"),
        (1.0, math.nan, exact, "fails"),
        ("equal", {}, at_most(1e-10, "rounding"), "fails"),
    ],
)
def test_verdicts(published, measured, holds, verdict):
    outcome = check(made(published, measured, holds))
    assert outcome.verdict == verdict
    assert outcome.measured is measured


def test_a_failing_claim_shows_its_guess_and_a_holding_one_does_not():
    assert check(made(1, 2, guess="off by one")).note == "off by one"
    assert check(made(1, 1, guess="off by one")).note == ""


def test_an_error_in_the_measurement_fails_and_is_shown():
    def measured():
        raise ZeroDivisionError("nothing to divide")

    outcome = check(made(1, measured))
    assert (outcome.verdict, outcome.measured) == ("fails", None)
    assert outcome.note.startswith("ZeroDivisionError: nothing to divide (test_claim.py, line")


def test_a_value_that_cannot_be_compared_fails_and_says_so():
    outcome = check(made(1, "many"))
    assert outcome.verdict == "fails"
    assert "TypeError" in outcome.note


def test_what_is_needed_is_named_and_nothing_runs():
    def measured():
        pytest.fail("it ran")

    outcome = check(made(1, measured, needs="a telescope"))
    assert (outcome.verdict, outcome.note) == ("needs", "a telescope")


def test_fast_leaves_slow_claims_out_and_shows_them():
    slow, quick = made(1, 1, slow=True), made(1, 1)
    assert [check(each, fast=True).verdict for each in (slow, quick)] == ["needs", "holds"]
    assert "time" in check(slow, fast=True).note
    assert check(slow).verdict == "holds"


def test_measurements_repeat_and_leave_the_random_state_alone():
    random = made(0.0, lambda: torch.rand(()).item(), at_most(1.0, "it is a share"))
    state = torch.get_rng_state()
    assert check(random).measured == check(random).measured
    assert torch.equal(torch.get_rng_state(), state)


def test_an_outcome_in_plain_values():
    row = check(made({"a": (1, math.inf)}, {"a": (1, math.inf)}, exact)).as_dict()
    assert row["published"] == {"a": [1, "inf"]}
    assert (row["verdict"], row["holds_if"]) == ("holds", "equal")
    assert row["tolerance_reason"]


def test_values_are_shown_short():
    assert show_value(0.123456789) == "0.1235"
    assert show_value({"a": (1, 2.0), "b": True}) == "a: 1, 2\nb: True"


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="kind is 'propertie': did you mean property"):
        claim("propertie", 1, source="nowhere")
