"""NormGrad: the recorded case, other configurations of it, claims."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saccade.claims import load_paper, read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "normgrad"


def test_recorded_case():
    matches = replay(read_case(RECORDED / "open.safetensors"))
    assert {match.name for match in matches if not match.holds} == set()
    assert len(matches) == 61


def test_another_class_is_another_map():
    case = read_case(RECORDED / "open.safetensors")
    other = replace(case, record=case.record | {"configuration": "target class 2"})
    ours = load_paper("normgrad").replay(other)
    assert not torch.allclose(ours["out.l2.scaling.sum"], case.expected["out.l2.scaling.sum"], atol=1e-3)


def test_two_blocks_and_another_size_are_served():
    case = read_case(RECORDED / "open.safetensors")
    tensors = {name: each for name, each in case.tensors.items() if "features.6" not in name}
    tensors["state.head.weight"] = torch.randn(4, 5)
    expected = {"out.l2.bias.norm": torch.zeros(30, 20), "out.combi.conv3x3.max": torch.zeros(30, 20)}
    tensors = {name: each for name, each in tensors.items() if not name.startswith("out.")} | expected
    ours = load_paper("normgrad").replay(replace(case, tensors=tensors))
    assert ours["out.combi.conv3x3.max"].shape == (30, 20)


def test_a_case_has_to_name_its_class():
    case = read_case(RECORDED / "open.safetensors")
    with pytest.raises(InputError, match="names no target class"):
        load_paper("normgrad").replay(replace(case, record={}))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("normgrad", fast=True) if o.verdict == "fails"] == []
