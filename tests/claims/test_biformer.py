"""BiFormer: recorded cases, arguments of the official layers, claims."""

from pathlib import Path

import pytest
import torch

from saccade.claims import Case, load_paper, read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "biformer"


@pytest.mark.parametrize("name", ["open", "open_nchw"])
def test_recorded_cases(name):
    matches = replay(read_case(RECORDED / f"{name}.safetensors"))
    assert {match.name for match in matches if not match.holds} == set()
    assert len(matches) >= 8


def make_case(cls, **args):
    tensors = {"in.x": torch.randn(1, 4, 6, 8), "out.y": torch.zeros(1, 4, 6, 8)}
    return Case("biformer", "made", cls, {"dim": 8, "num_heads": 2, "n_win": 2, "topk": 2} | args, {}, tensors)


@pytest.mark.parametrize(
    ("option", "value"),
    [("soft_routing", True), ("param_routing", True), ("diff_routing", True), ("kv_downsample_mode", "ada_avgpool")],
)
def test_arguments_that_are_not_served_are_named(option, value):
    with pytest.raises(InputError, match=f"{option} is set: pooled keys and soft routing do not work yet"):
        load_paper("biformer").replay(make_case("BiLevelRoutingAttention (bra_legacy)", **{option: value}))


def test_networks_are_not_served():
    with pytest.raises(InputError, match="whole networks come with the backbones"):
        load_paper("biformer").replay(make_case("BiFormer"))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("biformer", fast=True) if o.verdict == "fails"] == []
