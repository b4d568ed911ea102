"""Holistic concepts: the recorded case, other configurations of it, claims."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saccade.claims import load_paper, read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "holistic_concepts" / "open.safetensors"


def test_recorded_case():
    matches = replay(read_case(RECORDED), tolerance=1e-5)
    assert {match.name: match for match in matches if not match.holds} == {}
    assert len(matches) == 5


def test_other_sizes_designs_and_classes_are_served():
    case = read_case(RECORDED)
    tensors = {name: tensor for name, tensor in case.tensors.items() if not name.startswith("out.")} | {
        "in.U3": torch.rand(2, 9, 6),
        "in.W": torch.rand(6, 7),
        "out.importance.tanh.U3": torch.zeros(6),
        "out.masks": torch.zeros(64, 6),
    }
    words = "importance for class 3, nb_design=8"
    ours = load_paper("holistic_concepts").replay(replace(case, tensors=tensors, record={"what": words}))
    assert ours["out.masks"].shape == (8 * 8, 6)
    assert ours["out.importance.tanh.U3"].shape == (6,)
    assert (ours["out.importance.tanh.U3"] > 0).all()


def test_what_is_not_known_is_named():
    case = read_case(RECORDED)
    with pytest.raises(InputError, match=r"has out\.importance\.cubic\.U2"):
        load_paper("holistic_concepts").replay(
            replace(case, tensors=case.tensors | {"out.importance.cubic.U2": torch.zeros(1)})
        )
    with pytest.raises(InputError, match="names no class or nb_design"):
        load_paper("holistic_concepts").replay(replace(case, record={}))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("holistic_concepts", fast=True) if o.verdict == "fails"] == []
