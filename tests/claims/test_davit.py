"""DaViT's claims file: official outputs replayed, single blocks, windows that pad the map, what replay refuses."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from saccade.backbones import DaViT
from saccade.claims import Case, read_case, replay
from saccade.claims.davit import _channel, _spatial
from saccade.claims.davit import replay as run
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "davit"
CASE = RECORDED / "open.safetensors"


@pytest.mark.parametrize(("name", "results"), [("open", 34), ("open_model", 2)])
def test_official_outputs_and_gradients_are_ours(name, results):
    matches = replay(read_case(RECORDED / f"{name}.safetensors"), tolerance=1e-5)
    assert len(matches) == results
    assert all(match.holds for match in matches), matches


def test_the_blocks_one_by_one_give_what_both_give():
    case, x = read_case(CASE), None
    for number, cls in enumerate(["SpatialBlock", "ChannelBlock"]):
        tensors = {
            name.replace(f"state.{number}.", "state."): tensor
            for name, tensor in case.tensors.items()
            if name.startswith(f"state.{number}.")
        }
        tensors["in.x"] = case.tensors["in.x"] if x is None else x
        args = {name: value for name, value in case.args.items() if number == 0 or name != "window"}
        x = run(replace(case, cls=cls, args=args, tensors=tensors))["out.y"]
    assert_close(x, case.tensors["out.y"], atol=1e-4, rtol=1e-4)


def test_every_argument_of_the_official_blocks_reaches_ours():
    spatial = _spatial(12, 3, 5, mlp_ratio=1.5, qkv_bias=False, cpe_act=True)
    assert spatial.attn.window_size == 5
    assert spatial.attn.qkv.bias is None
    assert spatial.mlp.fc1.out_features == 18
    assert isinstance(spatial.cpe1.act, torch.nn.GELU)
    channel = _channel(12, 3, ffn=False)
    assert channel.attn.qkv.bias is None
    assert channel.mlp is None
    assert not any(name.startswith("norm2") for name in channel.state_dict())


def make_case(**args):
    """A case of the official network with other arguments, its state made of ours under official names."""
    model = DaViT((8, 16), (2, 1), (2, 4), num_classes=3, window_size=3, **args).eval()
    kinds = model.kinds

    def official(name):
        name = re.sub(r"^stages\.(\d)\.downsample\.reduction", r"patch_embeds.\1.proj", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.norm", r"patch_embeds.\1.norm", name)
        name = name.replace("patch_embed.", "patch_embeds.0.").replace("pre_logits", "norms")
        name = re.sub(r"\.cpe([12])\.", lambda found: f".cpe.{int(found[1]) - 1}.", name)
        return re.sub(
            r"^stages\.(\d)\.blocks\.(\d)\.",
            lambda found: f"main_blocks.{found[1]}.{int(found[2]) // kinds}.{int(found[2]) % kinds}.",
            name,
        )

    x = torch.randn(2, 3, 26, 21)
    state = {f"state.{official(name)}": tensor for name, tensor in model.state_dict().items()}
    return state | {"in.x": x, "out.y": model(x).detach()}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"overlap": True, "qkv_bias": False}, {"overlapped_patch": True}),
        ({"position_act": True, "mlp_ratio": 1.5}, {"cpe_act": True, "mlp_ratio": 1.5}),
        ({"ffn": False, "kinds": ("channel",)}, {"ffn": False, "attention_types": ("channel",)}),
        ({"kinds": ("channel", "spatial")}, {"attention_types": ("channel", "spatial")}),
    ],
)
def test_networks_of_other_arguments_are_rebuilt_from_state_and_words(ours, theirs):
    args = {"num_heads": (2, 4), "window_size": 3, **theirs}
    matches = replay(Case("davit", "made", "DaViT", args, {}, make_case(**ours)), tolerance=1e-6)
    assert all(match.holds for match in matches), matches


def test_what_is_no_davit_and_maps_without_a_size_are_refused():
    case = read_case(CASE)
    with pytest.raises(InputError, match="replay serves DaViT and its blocks"):
        replay(replace(case, cls="Florence"))
    with pytest.raises(InputError, match="does not say the size of the map"):
        replay(replace(case, args={"dim": 24}))
