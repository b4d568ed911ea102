"""Codebook features: recorded cases, arguments of the recorded classes, claims."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saccade.claims import Case, load_paper, read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "codebook_features"


def test_recorded_cases():
    matches = replay(read_case(RECORDED / "open.safetensors"), tolerance=1e-5)
    assert {match.name for match in matches if not match.holds} == set()
    assert len(matches) == 8 + 3 * 4 + 10


def make_case(groups=1, **args):
    names = [f"codebook.{group}." for group in range(groups)] if groups > 1 else [""]
    width = 10 // groups
    state = {f"state.{name}codebook.weight": torch.randn(6, width) for name in names}
    state |= {f"state.{name}ln.weight": torch.rand(width) for name in names}
    state |= {f"state.{name}ln.bias": torch.randn(width) for name in names}
    inputs = {"in.x": torch.randn(2, 3, 10), "in.grad_out": torch.randn(2, 3, 10), "grad.x": torch.zeros(2, 3, 10)}
    args = {"dim": 10, "num_codes": 6, "num_codebooks": groups} | args
    return Case("codebook_features", "made", "", args, {}, state | inputs)


@pytest.mark.parametrize("loss", ["base", "aeloss", "vqvae", "vqvae-0.1", "fullaeloss", "fullaeloss-2"])
@pytest.mark.parametrize("groups", [1, 5])
def test_any_configuration(loss, groups):
    found = load_paper("codebook_features").replay(make_case(groups, loss=loss, kcodes=4, similarity="ip"))
    assert found["out.y"].shape == (2, 3, 10)
    assert found["out.ids"].shape == (groups, 2, 3, 4)
    assert found["grad.x"].abs().sum() > 0


def test_commitment_is_a_quarter_unless_it_is_given():
    load = load_paper("codebook_features").replay
    case = make_case(loss="vqvae", similarity="euc")
    again = replace(case, args=case.args | {"loss": "vqvae-0.25"})
    other = replace(case, args=case.args | {"loss": "vqvae-1"})
    assert torch.equal(load(case)["grad.x"], load(again)["grad.x"])
    assert not torch.allclose(load(case)["grad.x"], load(other)["grad.x"])


def test_heads_that_come_apart_are_one_input():
    case = make_case(2, similarity="ip")
    apart = {name: case.tensors[name].unflatten(-1, (2, 5)) for name in ("in.x", "in.grad_out", "grad.x")}
    found = load_paper("codebook_features").replay(replace(case, tensors=case.tensors | apart))
    whole = load_paper("codebook_features").replay(case)
    assert torch.equal(found["out.y"].flatten(-2), whole["out.y"])
    assert torch.equal(found["out.ids"], whole["out.ids"])


def test_what_is_not_served_is_named():
    load = load_paper("codebook_features").replay
    with pytest.raises(InputError, match="similarity is 'cosine'"):
        load(make_case(similarity="cosine"))
    with pytest.raises(InputError, match="gradient is 'ae'"):
        load(make_case(loss="ae"))
    with pytest.raises(InputError, match="2 codebooks, but a state of one"):
        load(make_case(num_codebooks=2))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("codebook_features", fast=True) if o.verdict == "fails"] == []
