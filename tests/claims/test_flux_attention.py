"""Flux Attention's claims file: official routers replayed, other arguments, claims."""

from dataclasses import replace
from pathlib import Path

import pytest

from saccade.claims import read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "flux_attention" / "open.safetensors"


def test_official_outputs_are_ours():
    matches = replay(read_case(RECORDED), tolerance=1e-5)
    assert len(matches) == 30
    assert all(match.holds for match in matches), matches


@pytest.mark.parametrize(("wrong", "same"), [({"pool_size": 5}, set()), ({"tau": 0.9}, {"features", "logits", "hard"})])
def test_other_arguments_give_other_outputs(wrong, same):
    case = read_case(RECORDED)
    matches = replay(replace(case, args=case.args | wrong), tolerance=1e-5)
    for match in matches:
        kind = match.name.rsplit(".", 1)[1]
        if kind != "hard":  # which may be the same by chance
            assert match.holds == (kind in same), match


def test_some_modes_alone():
    case = read_case(RECORDED)
    some = {name: tensor for name, tensor in case.tensors.items() if not name.startswith("out.") or ".q." in name}
    some = {name: tensor for name, tensor in some.items() if "sigmoid" not in name}
    part = replace(case, args=case.args | {"pooling modes": ("q",)}, tensors=some)
    matches = replay(part, tolerance=1e-5)
    assert len(matches) == 5
    assert all(match.holds for match in matches)


def test_other_classes_and_modes_are_refused():
    case = read_case(RECORDED)
    with pytest.raises(InputError, match="replay knows AttentionRouter alone"):
        replay(replace(case, cls="Qwen3Model"))
    with pytest.raises(InputError, match="the pooling mode of flux_attention/open is 'ctx': did you mean ctx_q"):
        replay(replace(case, args=case.args | {"pooling modes": ("ctx",)}))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("flux_attention", fast=True) if o.verdict == "fails"] == []
