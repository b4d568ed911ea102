"""PSA's claims file: official levels, caps and orders replayed, other arguments, claims."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saccade.claims import load_paper, read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "pyramid_sparse" / "open.safetensors"


def replay_with(**args):
    case = read_case(RECORDED)
    return load_paper("pyramid_sparse").replay(replace(case, args=case.args | args))


def test_official_outputs_are_ours():
    matches = replay(read_case(RECORDED), tolerance=1e-6)
    assert len(matches) == 9
    assert all(match.holds for match in matches), matches


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"tile": 128}, {"mask_topk", "mask_thresholdbound"}),
        ({"min_full_attn_ratio": 0.2}, {"mask_thresholdbound"}),
        ({"similarity thresholds 2x,4x,8x": (0.0, 0.0, 0.0)}, {"ksim"}),
        ({"grid width,height,depth": (4, 6, 4)}, {"gilbert_order"}),
        ({"mask_ratios_topk": {"1": (0, 0.2), "0": (0.2, 1)}}, {"mask_topk", "mask_topk_newtype"}),
    ],
    ids=lambda given: min(given),
)
def test_other_arguments_give_other_outputs(wrong, names):
    case, ours = read_case(RECORDED), replay_with(**wrong)
    changed = {name for name in case.expected if not torch.equal(ours[name], case.expected[name])}
    assert {f"out.{name}" for name in names} <= changed
    assert not changed & ({"out.ksim", "out.gilbert_order"} - {f"out.{name}" for name in names})


def test_text_is_read_in_full_where_levels_are_a_map():
    before, ours = read_case(RECORDED).expected, replay_with(text_length=226)
    assert (ours["out.mask_topk"][..., -2:] == 1).all()
    assert torch.equal(ours["out.mask_topk"][..., :-2], before["out.mask_topk"][..., :-2])
    assert torch.equal(ours["out.mask_topk_newtype"], before["out.mask_topk_newtype"])


def test_ranges_follow_the_order_of_the_mapping_by_count_and_their_ends_by_mass():
    ratios = {"8": (0, 0.1), "0": (0.1, 0.5), "1": (0.5, 1)}
    ours = replay_with(mask_ratios_topk=ratios)
    counts = [(ours["out.mask_topk"] == level).sum(-1).unique().tolist() for level in (8, 0, 1)]
    assert counts == [[4], [20], [24]]
    ratios = {"0": (0.8, 1.0), "8": (0.0, 0.8)}
    ours = replay_with(mask_ratios_thresholdbound=ratios)
    assert set(ours["out.mask_thresholdbound"].unique().tolist()) == {0, 8}


def test_other_functions_and_outputs_are_refused():
    case = read_case(RECORDED)
    with pytest.raises(InputError, match="replay knows transfer_attn_to_mask, the key similarity"):
        replay(replace(case, cls="WanModel"))
    with pytest.raises(InputError, match="has an output 'mask_cumulative'"):
        replay(replace(case, tensors=case.tensors | {"out.mask_cumulative": torch.zeros(1)}))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("pyramid_sparse", fast=True) if o.verdict == "fails"] == []
