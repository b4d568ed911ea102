"""MoA's claims file: official profiles, layouts and losses replayed, other arguments, claims."""

from dataclasses import replace
from pathlib import Path

import pytest

from saccade.claims import read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "moa" / "open.safetensors"


def test_official_outputs_are_ours():
    matches = replay(read_case(RECORDED), tolerance=1e-5)
    assert len(matches) == 6
    assert all(match.holds for match in matches), matches


@pytest.mark.parametrize(
    ("wrong", "changed"),
    [
        ({"alpha candidates": (-16.0, 0.0, 16.0, 40.0)}, {"config_alpha", "layout", "loss"}),
        ({"beta candidates": (0.0, 0.25, 0.625, 1.0)}, {"config_alpha", "config_beta", "layout", "loss"}),
        ({"min_token_length": 8}, {"config_alpha", "config_beta", "layout", "loss"}),
        ({"block_size": 16}, {"effect_block", "layout", "loss"}),
    ],
)
def test_other_arguments_give_other_outputs(wrong, changed):
    case = read_case(RECORDED)
    matches = replay(replace(case, args=case.args | wrong))
    assert {match.name.removeprefix("out.") for match in matches if not match.holds} >= changed
    assert "out.effect" in {match.name for match in matches if match.holds}


def test_other_classes_are_refused():
    with pytest.raises(InputError, match="replay knows the attention influence alone"):
        replay(replace(read_case(RECORDED), cls="LlamaModel"))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("moa", fast=True) if o.verdict == "fails"] == []
