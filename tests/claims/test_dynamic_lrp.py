"""dynamic_lrp: recorded cases, what replay serves, claims."""

from dataclasses import replace
from pathlib import Path

import pytest

from saccade.claims import load_paper, read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "dynamic_lrp" / "open.safetensors"


def test_recorded_cases():
    matches = replay(read_case(RECORDED), tolerance=1e-5)
    assert {match.name for match in matches if not match.holds} == set()
    assert len(matches) == 15


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("dynamic_lrp", fast=True) if o.verdict == "fails"] == []


def test_other_widths_and_options_are_served_and_unknown_ones_named():
    case = read_case(RECORDED)
    tensors = {name: t for name, t in case.tensors.items() if not name.startswith("out.") or ".logits" in name}
    wanted = {f"out.conv.relevance.{name}": case.tensors["in.conv.x"] for name in ("gamma_mm2", "filter0.1")}
    ran = load_paper("dynamic_lrp").replay(replace(case, tensors=tensors | wanted))
    assert set(wanted) <= set(ran)
    with pytest.raises(InputError, match="option 'w_square'"):
        load_paper("dynamic_lrp").replay(
            replace(case, tensors=tensors | {"out.mlp.relevance.w_square": tensors["in.mlp.x"]})
        )
