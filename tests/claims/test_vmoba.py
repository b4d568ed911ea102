"""VMoBA's claims file: official outputs replayed, other arguments, claims."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saccade.claims import read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "vmoba" / "open.safetensors"


def test_official_outputs_are_ours():
    matches = replay(read_case(RECORDED))
    assert len(matches) == 14
    assert all(match.holds for match in matches), matches


@pytest.mark.parametrize("wrong", [{"chunk": 12}, {"topk": 2}, {"simsum_threshold": 0.9}])
def test_other_arguments_give_other_outputs(wrong):
    case = read_case(RECORDED)
    holds = {match.name: match.holds for match in replay(replace(case, args=case.args | wrong))}
    assert not holds["out.threshold_head_global" if "simsum_threshold" in wrong else "out.topk_head_global"]


def test_a_block_may_be_a_part_of_a_frame():
    case = read_case(RECORDED)
    half = replace(case, args=case.args | {"chunk sizes": ("0.5",)})
    matches = {match.name: match.difference for match in replay(half)}
    assert matches["out.partition0"] == 0
    assert matches["out.partition0_chunk"] == pytest.approx(36 / 48)  # 12 tokens where 48 are recorded


def test_other_functions_and_outputs_are_refused():
    case = read_case(RECORDED)
    with pytest.raises(InputError, match="replay knows moba_attn_varlen alone"):
        replay(replace(case, cls="WanModel"))
    with pytest.raises(InputError, match="has an output 'topk_row'"):
        replay(replace(case, tensors=case.tensors | {"out.topk_row": torch.zeros(1)}))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("vmoba", fast=True) if o.verdict == "fails"] == []
