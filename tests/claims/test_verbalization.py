"""Verbalization: the recorded cases, other texts and options, claims."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saccade.claims import load_paper, read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "verbalization" / "open.safetensors"


def test_recorded_cases():
    matches = replay(read_case(RECORDED), tolerance=1e-6)
    assert {match.name for match in matches if not match.holds} == set()
    assert len(matches) == 24


def test_a_changed_word_does_not_match():
    case = read_case(RECORDED)
    first = case.record["cases"][0]
    words = ["classic" if word == "modern" else word for word in first["words"]]  # as long, in other letters
    record = case.record | {"cases": [first | {"words": words}, *case.record["cases"][1:]]}
    ours = load_paper("verbalization").replay(replace(case, record=record))
    assert not torch.equal(ours["out.0.total order"], case.expected["out.0.total order"])


@pytest.mark.parametrize("sign", ["+", "-", None])
@pytest.mark.parametrize("filter_length", [3, 7])
@pytest.mark.parametrize("count", [1, 5, 60])
def test_other_texts_and_filters_are_served(sign, filter_length, count):
    case = read_case(RECORDED)
    own = {"words": ["a"] * count, "sgn": sign, "metric": {"name": "variance", "value": 0.5}}
    record = {"cases": [own | {"filter_length": filter_length}]}
    tensors = {"in.0.attributions": torch.randn(count, dtype=torch.float64) - (2 if sign == "-" else 0)}
    ours = load_paper("verbalization").replay(replace(case, record=record, tensors=tensors))
    assert len(ours) == 6


def test_a_case_without_scores_or_texts_is_named():
    case, paper = read_case(RECORDED), load_paper("verbalization")
    with pytest.raises(InputError, match=r"no in\.0\.attributions"):
        paper.replay(replace(case, tensors={}))
    with pytest.raises(InputError, match="lists no cases"):
        paper.replay(replace(case, record={}))


def test_fast_claims_hold():
    failed = [o.claim.name for o in verify("verbalization", fast=True) if o.verdict == "fails"]
    assert failed == ["spans of the coded form beat the threshold"]
