"""Next-block prediction's claims file: official masks replayed, other arguments, claims."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saccade.claims import read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "next_block" / "open.safetensors"


def test_official_masks_are_ours():
    matches = replay(read_case(RECORDED))
    assert len(matches) == 6
    assert all(match.difference == 0 for match in matches), matches


def test_other_arguments_give_other_masks():
    case = read_case(RECORDED)
    wrong = replay(replace(case, args=case.args | {"prefix length": 3, "video tokens": 23}))
    assert not any(match.holds for match in wrong)


def test_lengths_are_rounded_down_to_whole_blocks():
    case = read_case(RECORDED)
    recorded = {"out.base_5": torch.zeros(22, 22, dtype=torch.uint8)}
    (match,) = replay(replace(case, args=case.args | {"video tokens": 24}, tensors=recorded))
    assert match.note == ""  # 2 + 20 tokens: the same shape
    assert not match.holds


def test_other_cases_and_outputs_are_refused():
    case = read_case(RECORDED)
    with pytest.raises(InputError, match="replay knows the masks alone"):
        replay(replace(case, cls="GPT"))
    with pytest.raises(InputError, match=r"has an output 'out\.text_4'"):
        replay(replace(case, tensors={"out.text_4": torch.zeros(1)}))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("next_block", fast=True) if o.verdict == "fails"] == []
