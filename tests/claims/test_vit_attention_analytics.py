"""Analytics of heads: claims, and that they see a fault."""

import pytest
import torch

from saccade.claims import check, load_paper, verify
from saccade.explain.heads import strength

CLAIMS = {claim.name: claim for claim in load_paper("vit_attention_analytics").claims}


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("vit_attention_analytics", fast=True) if o.verdict == "fails"] == []


@pytest.mark.parametrize("name", ["rings share what the class token leaves", "attention to a sink looks like locality"])
def test_claims_about_rings_see_another_distance(name, monkeypatch):
    def city_blocks(grid):
        places = torch.cartesian_prod(*(torch.arange(side) for side in grid))
        return (places[:, None] - places).abs().sum(-1)

    monkeypatch.setattr(strength, "ring_numbers", city_blocks)
    assert check(CLAIMS[name]).verdict == "fails"
