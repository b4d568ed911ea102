"""ConViT's claims file: official outputs replayed, other arguments, the layer alone, what replay refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from saccade.claims import read_case, replay
from saccade.errors import InputError, WorkError
from saccade.mixers import GatedPositionalAttention

RECORDED = Path(__file__).parents[1] / "recorded" / "convit"


def recorded():
    return read_case(RECORDED / "open.safetensors")


def test_official_outputs_and_the_gradient_are_ours():
    matches = replay(recorded(), 1e-5)
    assert {match.name for match in matches} == {
        "grad.x",
        "out.logits",
        "out.block0_attention",
        "out.block0_attention_distance",
    }
    assert all(match.holds for match in matches), matches


def test_the_official_start_is_ours():
    case = recorded()
    layer = GatedPositionalAttention(36, 9)
    assert_close(layer.pos_proj.weight.detach(), case.tensors["extra.init_pos_proj_weight"])
    assert_close(layer.gating_param.detach(), case.tensors["extra.init_gating_param"])


@pytest.mark.parametrize("wrong", [{"qk_scale": 0.1}, {"norm_layer": "LayerNorm eps 0.1"}], ids=str)
def test_other_arguments_give_other_outputs(wrong):
    case = recorded()
    matches = replay(replace(case, args=case.args | wrong), 1e-5)
    assert not any(match.holds for match in matches if match.name in ("out.logits", "grad.x"))


@pytest.mark.parametrize(
    "wrong", [{"local_up_to_layer": 2}, {"qkv_bias": True}, {"num_heads": 4}, {"use_pos_embed": False}], ids=str
)
def test_arguments_that_do_not_fit_the_state(wrong):
    case = recorded()
    with pytest.raises(WorkError, match="cannot take the official state"):
        replay(replace(case, args=case.args | wrong))


def test_the_layer_alone():
    layer, x = GatedPositionalAttention(18, 9, qkv_bias=True), torch.randn(2, 25, 18)
    tensors = {f"state.{name}": tensor for name, tensor in layer.state_dict().items()}
    tensors |= {"in.x": x, "out.y": layer(x.unflatten(1, (5, 5))).flatten(1, 2).detach()}
    case = replace(recorded(), cls="GPSA", args={"dim": 18, "num_heads": 9, "qkv_bias": True}, tensors=tensors)
    assert [match.holds for match in replay(case, 1e-6)] == [True]


def test_what_replay_refuses():
    case = recorded()
    with pytest.raises(InputError, match="is a case of MHSA: replay serves VisionTransformer and GPSA"):
        replay(replace(case, cls="MHSA"))
    with pytest.raises(InputError, match="hybrid_backbone is given"):
        replay(replace(case, args=case.args | {"hybrid_backbone": "resnet50"}))
