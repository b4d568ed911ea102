"""PAROAttention's claims file: official permutations replayed, other sizes, claims."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from saccade.claims import load_paper, read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "paro" / "open.safetensors"


def test_official_orders_are_ours():
    matches = replay(read_case(RECORDED))
    assert [(match.name, match.difference) for match in matches] == [("out.inverse_applied", 0), ("out.order", 0)]


def test_other_plans_give_other_orders():
    case = read_case(RECORDED)
    swapped = case.tensors | {"in.plan": torch.tensor([[0, 1, 5, 3, 4, 2]])}
    assert {m.name: m.holds for m in replay(replace(case, tensors=swapped))} == {
        "out.inverse_applied": True,
        "out.order": False,
    }


@pytest.mark.parametrize(("video", "text"), [((2, 3, 4), 0), ((5, 1, 2), 3)])
def test_other_videos_and_texts(video, text):
    args = {"frames,height,width": video} | ({"text tokens (first)": text} if text else {})
    plan = torch.tensor([[4, 2]])  # WHF and HWF
    results = load_paper("paro").replay(replace(read_case(RECORDED), args=args, tensors={"in.plan": plan}))
    frames, height, width = map(range, video)
    number = {(f, h, w): text + (f * len(height) + h) * len(width) + w for f, h, w in product(frames, height, width)}
    whf = [number[f, h, w] for w, h, f in product(width, height, frames)]
    hwf = [number[f, h, w] for h, w, f in product(height, width, frames)]
    assert results["out.order"].tolist() == [[*range(text), *whf], [*range(text), *hwf]]
    assert results["out.inverse_applied"].tolist() == [list(range(text + len(number)))] * 2


def test_other_functions_and_plans_are_refused():
    case = read_case(RECORDED)
    with pytest.raises(InputError, match="replay knows permutations alone"):
        replay(replace(case, cls="CogVideoXTransformer3DModel"))
    with pytest.raises(InputError, match="plan holds 6: the orders of a video are numbered 0 to 5"):
        replay(replace(case, tensors=case.tensors | {"in.plan": torch.tensor([[6]])}))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("paro", fast=True) if o.verdict == "fails"] == []
