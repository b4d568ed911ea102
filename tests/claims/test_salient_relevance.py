"""Salient Relevance: the recorded case, other networks of it, claims."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saccade.claims import load_paper, read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "salient_relevance" / "open.safetensors"


def test_recorded_case():
    matches = replay(read_case(RECORDED), tolerance=1e-5)
    assert {match.name for match in matches if not match.holds} == set()
    assert len(matches) == 9


def test_another_network_is_served():
    case = read_case(RECORDED)
    words = "a 5x5 stride 2 -> ReLU -> MaxPool 3 stride1 pad1 -> flatten -> b; layers numbered"
    tensors = {
        "in.x": torch.rand(3, 2, 11, 11),
        "state.a.weight": torch.randn(4, 2, 5, 5),
        "state.b.weight": torch.randn(6, 64),
        "state.b.bias": torch.randn(6),
        "out.R_after_layer2": torch.zeros(3, 4, 4, 4),
        "out.R_after_layer0": torch.zeros(3, 2, 11, 11),
    }
    ours = load_paper("salient_relevance").replay(replace(case, record={"model": words}, tensors=tensors))
    assert ours["out.R_after_layer2"].shape == (3, 4, 4, 4)
    assert ours["out.R_after_layer0"].shape == (3, 2, 11, 11)
    assert ours["out.logits"].shape == (3, 6)


def test_an_unknown_layer_is_named():
    case = read_case(RECORDED)
    with pytest.raises(InputError, match="has a layer 'softplus'"):
        load_paper("salient_relevance").replay(replace(case, record={"model": "c1 3x3 -> softplus -> f1"}))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("salient_relevance", fast=True) if o.verdict == "fails"] == []
