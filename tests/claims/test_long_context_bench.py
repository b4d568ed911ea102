"""The benchmark's claims file: its schemes are simulated, so claims alone."""

from saccade.claims import load_paper, verify


def test_fast_claims_hold():
    assert load_paper("long_context_bench").replay is None
    assert [o.claim.name for o in verify("long_context_bench", fast=True) if o.verdict == "fails"] == []
