"""MP-SAE: recorded cases, arguments of the recorded class, claims."""

from pathlib import Path

import pytest
import torch

from saccade.claims import Case, load_paper, read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "mp_sae"


def test_recorded_cases():
    matches = replay(read_case(RECORDED / "open.safetensors"), tolerance=1e-5)
    assert {match.name for match in matches if not match.holds} == set()
    assert len(matches) == 12


def make_case(cls="MpSAE", **args):
    tensors = {
        "state.dictionary._weights": 3 * torch.randn(9, 5),
        "state.dictionary.multiplier": torch.tensor(0.2),
        "in.x": torch.randn(4, 5),
    }
    return Case("mp_sae", "made", cls, {"d": 5, "concepts": 9} | args, {}, tensors)


@pytest.mark.parametrize("k", [1, 12])
def test_any_number_of_steps(k):
    case = make_case(k=k, use_multiplier=True)
    found = load_paper("mp_sae").replay(case)
    assert found["out.dictionary"].norm(dim=-1).tolist() == pytest.approx([torch.tensor(0.2).exp().item()] * 9)
    assert torch.allclose(found["out.recon"] + found["out.residual"], case.tensors["in.x"], atol=1e-4)


def test_what_is_not_served_is_named():
    with pytest.raises(InputError, match="dropout is set"):
        load_paper("mp_sae").replay(make_case(dropout=0.1))
    with pytest.raises(InputError, match="no names are known"):
        load_paper("mp_sae").replay(make_case("MatchingPursuitSAE"))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("mp_sae", fast=True) if o.verdict == "fails"] == []
