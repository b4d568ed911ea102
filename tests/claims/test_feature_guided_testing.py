"""Feature-guided testing: its claims."""

from saccade.claims import verify


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("feature_guided_testing", fast=True) if o.verdict == "fails"] == []
