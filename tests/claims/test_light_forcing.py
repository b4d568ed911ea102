"""Light Forcing's claims file. There is no official code, and so no replay."""

from saccade.claims import load_paper, verify


def test_there_is_no_replay():
    assert load_paper("light_forcing").replay is None


def test_fast_claims_hold():
    outcomes = verify("light_forcing", fast=True)
    assert [o.claim.name for o in outcomes if o.verdict == "fails"] == []
    assert sum(o.verdict == "holds" for o in outcomes) >= 7
