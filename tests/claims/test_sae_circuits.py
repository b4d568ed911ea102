"""Circuits from integer codes: the claims that take no training."""

from saccade.claims import verify


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("sae_circuits", fast=True) if o.verdict == "fails"] == []
