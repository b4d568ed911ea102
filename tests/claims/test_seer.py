"""SeerAttention's claims file: official scores and selections replayed, other gates, claims."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from saccade.claims import load_paper, read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "seer" / "open.safetensors"


def replay_with(**args):
    """Our outputs of the first part with other arguments; its state is drawn in the shape of the gate."""
    case = read_case(RECORDED)
    return load_paper("seer").replay(replace(case, args={"c0": case.args["c0"] | args, "c1": case.args["c1"]}))


def test_official_outputs_are_ours():
    case = read_case(RECORDED)
    matches = replay(case, tolerance=1e-6)
    assert len(matches) == 10
    assert all(match.holds for match in matches), matches
    ours = load_paper("seer").replay(case)
    for part in ("c0", "c1"):  # beside the -1e30 of what is hidden any logit would agree
        seen = torch.ones(7, 7, dtype=torch.bool).tril()
        logits = (each[f"out.{part}.logits_masked"][..., seen] for each in (ours, case.expected))
        assert_close(*logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [({"threshold": 0.2}, "mask_threshold"), ({"nz_ratio": 0.9}, "mask_nzratio")],
)
def test_other_arguments_give_other_outputs(wrong, name):
    expected, ours = read_case(RECORDED).expected, replay_with(**wrong)
    assert not torch.equal(ours[f"out.c0.{name}"], expected[f"out.c0.{name}"])
    assert_close(ours["out.c0.score"], expected["out.c0.score"])
    assert torch.equal(ours["out.c1.mask_threshold"], expected["out.c1.mask_threshold"])


@pytest.mark.parametrize(
    ("gate", "options", "shapes"),
    [
        ("Qavg_Kmaxminavg", {"force_double": True}, {"q": (4, 16, 16), "k": (2, 48, 16)}),
        ("Qmaxminavg_Kavg", {}, {"q": (4, 48, 16), "k": (2, 16, 16)}),
        ("Qavg_Kmax", {"block_size": 52}, {"k": (4, 16, 16)}),
        ("Qmax_Kmin", {"gate_hidden": 8}, {"q": (4, 16, 8), "k": (2, 16, 8)}),
    ],
)
def test_every_gate_is_built(gate, options, shapes):
    case = read_case(RECORDED)
    tensors = {name: tensor for name, tensor in case.tensors.items() if not name.startswith("state.c0")}
    tensors |= {f"state.c0.mask_linear_{kind}.weight": torch.randn(shape) for kind, shape in shapes.items()}
    args = case.args["c0"] | {"gate": gate} | options
    for name in ("cos", "sin"):
        blocks = -(-52 // args["block_size"])
        tensors[f"in.c0.{name}"] = tensors[f"in.c0.{name}"][:, :blocks, : args["gate_hidden"]]
    ours = load_paper("seer").replay(replace(case, args={"c0": args}, tensors=tensors))
    assert ours["out.c0.score"].shape == (1, 4, blocks, blocks)
    assert_close(ours["out.c0.score"].sum(-1), torch.ones(1, 4, blocks))


def test_other_classes_and_gates_are_refused():
    case = read_case(RECORDED)
    with pytest.raises(InputError, match="replay knows AttnGate alone"):
        replay(replace(case, cls="LlamaModel"))
    with pytest.raises(InputError, match="has the gate 'Qproj_Kmaxminavg': replay knows those of pooled queries"):
        replay_with(gate="Qproj_Kmaxminavg")


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("seer", fast=True) if o.verdict == "fails"] == []
