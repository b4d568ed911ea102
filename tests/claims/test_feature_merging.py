"""Feature merging: the recorded case, other networks, claims."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from saccade.claims import load_paper, read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "feature_merging" / "open.safetensors"


def test_recorded_case():
    matches = replay(read_case(RECORDED), tolerance=1e-5)
    assert {match.name for match in matches if not match.holds} == set()
    assert len(matches) == 4 + 3 * 23


def test_other_networks_are_served():
    net = nn.Module()
    net.features = nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(9, 5, 3), nn.ReLU())
    net.classifier = nn.Linear(5 * 4, 7)
    case = read_case(RECORDED)
    tensors = {f"state.{name}": tensor for name, tensor in net.state_dict().items()} | {"in.x": torch.randn(2, 3, 9, 9)}
    record = {"cases": {"case4": {"threshold": 0.9, "max_ratio": 0.5}}}
    ours = load_paper("feature_merging").replay(replace(case, tensors=tensors, record=record))
    assert ours["out.case4.state.features.3.weight"].shape == (2, 4, 3, 3)
    assert ours["out.case4.state.classifier.weight"].shape == (7, 2 * 4)
    assert ours["out.case4.logits"].shape == (2, 7)


def test_a_case_without_thresholds_is_named():
    with pytest.raises(InputError, match="has no cases"):
        load_paper("feature_merging").replay(replace(read_case(RECORDED), record={}))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("feature_merging", fast=True) if o.verdict == "fails"] == []
