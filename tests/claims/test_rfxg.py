"""RFxG: the recorded case, other questions of it, claims."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saccade.claims import load_paper, read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "rfxg" / "open.safetensors"


def test_recorded_case():
    matches = replay(read_case(RECORDED))
    assert {match.name for match in matches if not match.holds or match.difference > 1e-10} == set()
    assert len(matches) == 22


def test_other_groups_and_sizes_are_served():
    case = read_case(RECORDED)
    tensors = case.tensors | {
        "in.image": torch.rand(5, 9, 3, dtype=torch.float64),
        "in.saliency": torch.rand(5, 9, dtype=torch.float64),
        "in.W": torch.randn(135, 7, dtype=torch.float64),
        "in.group_a": torch.tensor([6]),
    }
    ours = load_paper("rfxg").replay(replace(case, tensors=tensors))
    assert ours["out.masked.blur.0.5"].shape == (5, 9, 3)
    assert ours["out.black.pgs.curve"].shape == (9,)


def test_an_unknown_result_is_named():
    case = read_case(RECORDED)
    with pytest.raises(InputError, match=r"has out\.black\.xyz"):
        load_paper("rfxg").replay(replace(case, tensors=case.tensors | {"out.black.xyz": torch.zeros(1)}))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("rfxg", fast=True) if o.verdict == "fails"] == []
