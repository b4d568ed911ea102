"""relp: recorded cases, what replay serves, claims."""

from dataclasses import replace
from pathlib import Path

import pytest

from saccade.claims import load_paper, read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "relp" / "open.safetensors"


def test_recorded_cases():
    matches = replay(read_case(RECORDED), tolerance=1e-5)
    assert {match.name for match in matches if not match.holds} == set()
    assert len(matches) == 106


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("relp", fast=True) if o.verdict == "fails"] == []


@pytest.mark.parametrize(("setting", "value"), [("act_fn", "solu_ln"), ("normalization_type", "BN"), ("rotary_dim", 4)])
def test_settings_that_are_not_served_are_named(setting, value):
    case = read_case(RECORDED)
    row = case.record["models"]["ln"]
    record = {"models": {"ln": row | {"config": row["config"] | {setting: value}}}}
    with pytest.raises(InputError, match=f"{setting}|{value}"):
        load_paper("relp").replay(replace(case, record=record))
