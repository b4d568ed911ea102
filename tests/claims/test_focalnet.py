"""FocalNet's claims file: official outputs replayed, other arguments, the layer alone, what replay refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saccade.claims import read_case, replay
from saccade.claims.focalnet import _from_official
from saccade.errors import InputError, WorkError
from saccade.mixers import FocalModulation

RECORDED = Path(__file__).parents[1] / "recorded" / "focalnet"


def recorded():
    return read_case(RECORDED / "open.safetensors")


def test_official_outputs_and_the_gradient_are_ours():
    matches = replay(recorded(), 1e-5)
    assert {match.name for match in matches} == {
        "grad.x",
        *(f"out.x.{name}" for name in ("featuremaps", "gates0", "logits", "modulation0", "modulator0")),
    }
    assert all(match.holds for match in matches), matches


@pytest.mark.parametrize(
    "wrong", [{"normalize_modulator": True}, {"use_postln": True}, {"norm_layer": "eps 0.1"}], ids=str
)
def test_other_arguments_give_other_outputs(wrong):
    case = recorded()
    matches = replay(replace(case, args=case.args | wrong), 1e-5)
    assert not any(match.holds for match in matches if match.name in ("out.x.logits", "grad.x"))


@pytest.mark.parametrize(
    "wrong", [{"use_layerscale": True}, {"use_postln_in_modulation": True}, {"patch_norm": False}, {"mlp_ratio": 4.0}]
)
def test_arguments_that_do_not_fit_the_state(wrong):
    case = recorded()
    with pytest.raises(WorkError, match="cannot take the official state"):
        replay(replace(case, args=case.args | wrong))


def test_the_official_default_has_values_for_more_stages_than_there_are():
    model = _from_official(embed_dim=8, depths=(1, 2), use_conv_embed=True, use_layerscale=True, layerscale_value=0.5)
    assert len(model.stages) == 2
    assert model.patch_embed.proj.kernel_size == (7, 7)
    assert model.stages[0].blocks[0].ls1.gamma[0] == 0.5


def test_the_layer_alone():
    layer = FocalModulation(8, focal_levels=2, post_norm=True)
    state = {
        f"state.{name}".replace("norm.", "ln.").replace("focal_layers.0", "focal_layers.0.0"): tensor
        for name, tensor in layer.state_dict().items()
    }
    state["state.focal_layers.1.0.weight"] = state.pop("state.focal_layers.1.weight")
    state["state.h.weight"] = state["state.h.weight"][..., None, None]
    x = torch.randn(2, 5, 4, 8)
    args = {"dim": 8, "focal_window": 3, "focal_level": 2, "use_postln_in_modulation": True}
    tensors = {**state, "in.x": x, "out.y": layer(x).detach()}
    case = replace(recorded(), cls="FocalModulation", args=args, tensors=tensors)
    assert [match.holds for match in replay(case, 1e-6)] == [True]


def test_what_replay_refuses():
    with pytest.raises(InputError, match="is a case of FocalNetBlock: replay serves FocalNet and FocalModulation"):
        replay(replace(recorded(), cls="FocalNetBlock"))
