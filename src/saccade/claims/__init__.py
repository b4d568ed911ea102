"""Papers: what they claim, measured here, and their official code's recorded outputs, replayed. One file a paper."""

from saccade.claims.framework import (
    Case,
    Claim,
    Match,
    Outcome,
    Paper,
    check,
    describe_error,
    parse_args,
    read_case,
    show_value,
)
from saccade.claims.framework.index import Listing, claimed_keys, list_papers, load_paper, replay, verify

__all__ = [
    "Case",
    "Claim",
    "Listing",
    "Match",
    "Outcome",
    "Paper",
    "check",
    "claimed_keys",
    "describe_error",
    "list_papers",
    "load_paper",
    "parse_args",
    "read_case",
    "replay",
    "show_value",
    "verify",
]
