"""MOAT's claims file: official outputs replayed, other arguments of the authors' network, what replay refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from saccade.claims import read_case, replay
from saccade.claims.moat import replay as run
from saccade.errors import InputError, WorkError

RECORDED = Path(__file__).parents[1] / "recorded" / "moat"


def recorded():
    return read_case(RECORDED / "open.safetensors")


def test_official_outputs_and_the_gradient_are_ours():
    matches = replay(recorded(), 1e-5)
    assert {match.name for match in matches} == {"grad.x", "out.logits", *(f"out.stage{n}" for n in range(1, 6))}
    assert all(match.holds for match in matches), matches


@pytest.mark.parametrize(
    "wrong",
    [
        {"pool_size": 3},
        {"window_size": (None, None, (2, 2), (2, 2))},
        {"window_size": (None, None, None, None)},
        {"global_attention_at_end_of_moat_stage": True},
    ],
    ids=str,
)
def test_other_arguments_give_other_outputs(wrong):
    case = recorded()
    matches = replay(replace(case, args=case.args | wrong), 1e-5)
    assert not any(match.holds for match in matches if match.name in ("out.logits", "grad.x"))


def test_arguments_that_do_not_fit_the_state():
    case = recorded()
    for wrong in ({"head_size": 4}, {"expansion_rate": 4}, {"num_blocks": (1, 1, 1, 1)}, {"se_ratio": 0.5}):
        with pytest.raises(WorkError, match="cannot take the official state"):
            replay(replace(case, args=case.args | wrong))


def test_gradients_of_logits_by_a_cotangent_and_in_the_state():
    case = recorded()
    kernel = "state.moat/block_02_00/attention/q/weight"
    tensors = dict(case.tensors)
    tensors["in.cotangent.logits"] = torch.randn(1, 10)
    tensors[f"grad.{kernel}"] = torch.zeros_like(tensors[kernel])
    found = run(replace(case, tensors=tensors))
    assert found[f"grad.{kernel}"].shape == tensors[kernel].shape
    assert found["grad.x"].abs().max() > 0
    step = tensors[kernel] * 1e-3
    moved = [
        run(replace(case, tensors=case.tensors | {kernel: tensors[kernel] + sign * step}))["out.logits"].double()
        for sign in (1, -1)
    ]
    slope = ((moved[0] - moved[1]) * tensors["in.cotangent.logits"]).sum() / 2
    assert_close(slope, (found[f"grad.{kernel}"].double() * step).sum(), rtol=2e-2, atol=1e-6)


def test_endpoints_for_dense_heads_are_the_maps_behind_a_gelu():
    case = recorded()
    tensors = case.tensors | {f"out.res{n}": F.gelu(case.tensors[f"out.stage{n}"]) for n in range(1, 6)}
    assert all(match.holds for match in replay(replace(case, tensors=tensors), 1e-5))


def test_without_a_head_there_are_maps_alone():
    case = recorded()
    tensors = {
        name: tensor
        for name, tensor in case.tensors.items()
        if not any(word in name for word in ("logits", "final_layer_norm", "grad"))
    }
    args = case.args | {"build_classification_head_with_class_num": None}
    matches = replay(replace(case, args=args, tensors=tensors), 1e-5)
    assert [match.name for match in matches if match.holds] == [f"out.stage{n}" for n in range(1, 6)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stage_stride": (2, 2, 2, 1)}, r"stage_stride is \(2, 2, 2, 1\)"),
        ({"block_type": ("mbconv", "mbconv", "moat", "mlp")}, "block_type is 'mlp'"),
        ({"activation": "relu"}, "does not fit the signature .* 'activation'"),
    ],
)
def test_what_replay_cannot_serve(wrong, message):
    case = recorded()
    with pytest.raises(InputError, match=message):
        replay(replace(case, args=case.args | wrong))
    with pytest.raises(InputError, match="is a case of MOATBlock: replay serves the network MOAT"):
        replay(replace(case, cls="MOATBlock"))
