"""DHVT's claims file: official outputs replayed, other arguments, what replay refuses."""

from dataclasses import replace
from pathlib import Path

import pytest

from saccade.claims import read_case, replay
from saccade.errors import InputError, WorkError

RECORDED = Path(__file__).parents[1] / "recorded" / "dhvt"


def recorded():
    return read_case(RECORDED / "open.safetensors")


def test_official_outputs_and_the_gradient_are_ours():
    case = recorded()
    args = dict(case.args)
    matches = replay(case, 1e-5)
    assert {match.name for match in matches} == {
        "grad.x",
        *(f"out.x.{name}" for name in ("daff0", "himhsa0", "logits", "patch")),
    }
    assert all(match.holds for match in matches), matches
    assert case.args == args


@pytest.mark.parametrize("wrong", [{"qk_scale": 0.1}, {"norm_layer": "LayerNorm eps 0.1"}], ids=str)
def test_other_arguments_give_other_outputs(wrong):
    case = recorded()
    matches = replay(replace(case, args=case.args | wrong), 1e-5)
    assert not any(match.holds for match in matches if match.name in ("out.x.logits", "grad.x"))


@pytest.mark.parametrize(
    "wrong", [{"patch_size": 2}, {"num_heads": 2}, {"mlp_ratio": 4}, {"qkv_bias": False}, {"depth": 3}], ids=str
)
def test_arguments_that_do_not_fit_the_state(wrong):
    case = recorded()
    with pytest.raises(WorkError, match="cannot take the official state"):
        replay(replace(case, args=case.args | wrong))


def test_what_replay_refuses():
    case = recorded()
    with pytest.raises(InputError, match="is a case of DAFF: replay serves VisionTransformer"):
        replay(replace(case, cls="DAFF"))
    with pytest.raises(InputError, match="apply_dhvt is False"):
        replay(replace(case, args=case.args | {"apply_dhvt": False}))
