"""SparseD's claims file: official masks replayed, other arguments, claims."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saccade.claims import read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "sparsed" / "open.safetensors"


def test_official_masks_are_ours():
    matches = replay(read_case(RECORDED), tolerance=0)
    assert len(matches) == 2
    assert all(match.holds for match in matches), matches


@pytest.mark.parametrize("wrong", [{"block_size": 7}, {"keep_ratio": 0.1}])
def test_other_arguments_give_other_masks(wrong):
    case = read_case(RECORDED)
    assert not any(match.holds for match in replay(replace(case, args=case.args | wrong)))


@pytest.mark.parametrize(("block", "keep"), [(16, 0.5), (3, 0.0), (100, 1.0)])
def test_any_arguments_are_served_as_published(block, keep):
    case = read_case(RECORDED)
    ours = replay(replace(case, args={"block_size": block, "keep_ratio": keep}))
    assert ours[1].difference is not None  # the view has its shape
    attention = case.tensors["in.attn"]
    filled = torch.nn.functional.pad(attention, (0, -70 % block, 0, -50 % block))
    means = filled.unflatten(3, (-1, block)).unflatten(2, (-1, block)).mean((3, 5))
    count = min(means.shape[-1], int(means.shape[-1] * keep) + 1)
    expected = torch.zeros_like(means).scatter(-1, means.topk(count).indices, 1).byte()
    served = replace(
        case, args={"block_size": block, "keep_ratio": keep}, tensors=case.tensors | {"out.mask": expected}
    )
    assert replay(served)[0].difference == 0


def test_other_functions_are_refused():
    with pytest.raises(InputError, match="replay knows create_attention_block_mask"):
        replay(replace(read_case(RECORDED), cls="LLaDAModel"))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("sparsed", fast=True) if o.verdict == "fails"] == []
