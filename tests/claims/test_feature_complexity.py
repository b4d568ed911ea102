"""Feature complexity: claims that need no training."""

from saccade.claims import verify


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("feature_complexity", fast=True) if o.verdict == "fails"] == []
