"""BiFormer: recorded cases, arguments of the official layers, claims."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saccade.backbones import BiFormer
from saccade.claims import Case, load_paper, read_case, replay, verify
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "biformer"


@pytest.mark.parametrize("name", ["open", "open_nchw", "open_model"])
def test_recorded_cases(name):
    matches = replay(read_case(RECORDED / f"{name}.safetensors"), tolerance=1e-5)
    assert {match.name for match in matches if not match.holds} == set()
    assert len(matches) >= 8


def make_case(cls, **args):
    tensors = {"in.x": torch.randn(1, 4, 6, 8), "out.y": torch.zeros(1, 4, 6, 8)}
    return Case("biformer", "made", cls, {"dim": 8, "num_heads": 2, "n_win": 2, "topk": 2} | args, {}, tensors)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"diff_routing": True}, "diff_routing is set without soft_routing"),
        ({"kv_downsample_mode": "fracpool"}, "kv_downsample_mode is 'fracpool'"),
    ],
)
def test_arguments_that_official_code_does_not_serve_are_named(args, message):
    with pytest.raises(InputError, match=message):
        load_paper("biformer").replay(make_case("BiLevelRoutingAttention (bra_legacy)", **args))


def official(name, within):
    """An official name of the network's parameter, of the older code."""
    name = re.sub(r"^patch_embed\.", "downsample_layers.0.", name)
    name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
    name = re.sub(r"^stages\.(\d)\.blocks\.", rf"stages.\1.{within}", name)
    name = name.replace(".pos_embed.proj.", ".pos_embed.").replace(".mlp.fc1.", ".mlp.0.")
    name = name.replace(".mlp.fc2.", ".mlp.2." if within else ".mlp.3.").replace(".attn.match.", ".attn.router.emb.")
    name = re.sub(r"\.ls([12])\.gamma", r".gamma\1", name)
    if not re.match(r"stages\.3\.", name):
        name = name.replace(".attn.qkv.", ".attn.qkv.qkv.").replace(".attn.proj.", ".attn.wo.")
    return (
        name.replace(".attn.1.proj.", ".attn.3.").replace(".attn.1.conv.", ".attn.2.").replace(".attn.0.", ".attn.1.")
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"qk_dims": (4, 8, 16, 8), "scale": 0.4, "lepe_size": 3, "layer_scale": 1.0}, {"qk_scale": 0.4}),
        ({"topks": (2, 0, 3, -1), "position_size": 0}, {"topks": (2, 0, 3, -1)}),
        ({"stem": "patch", "mlp_ratio": (1.0, 2.0, 3.0, 1.5)}, {}),
        ({"padding": "input", "num_regions": 3}, {"auto_pad": True, "n_win": 3}),
        (
            {"route_options": ({"pool": "avg", "pool_size": 2}, {"pool": "avg", "pool_size": 1}, {}, {})},
            {"kv_downsample_mode": "ada_avgpool", "kv_per_wins": (2, 1, 1, -1)},
        ),
        (
            {"route_options": ({"soft": True, "learned": True, "differentiable": True},) * 4},
            {"soft_routing": True, "diff_routing": True, "param_routing": True},
        ),
    ],
)
def test_networks_of_other_arguments_are_rebuilt_from_state_and_words(ours, theirs):
    if theirs.get("kv_per_wins"):
        ours["route_options"][2].update(pool="avg", pool_size=1)
    options = {"topks": (1, 2, 4, -2), "num_regions": 2, "head_dim": 4, "num_classes": 3} | ours
    model = BiFormer((8, 8, 16, 16), (1, 2, 1, 1), **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(1, 3, 64, 64)
    within = "blocks." if options.get("stem") == "patch" else ""
    state = {f"state.{official(name, within)}": tensor for name, tensor in model.state_dict().items()}
    args = {"topks": (1, 2, 4, -2), "n_win": 2, "head_dim": 4, "kv_downsample_mode": "identity"} | theirs
    matches = replay(Case("biformer", "made", "BiFormer", args, {}, state | {"in.x": x, "out.y": model(x).detach()}))
    assert all(match.holds for match in matches), matches


def test_what_is_no_biformer_and_what_no_network_has_is_refused():
    with pytest.raises(InputError, match="replay serves BiFormer and its attention"):
        load_paper("biformer").replay(make_case("Swin"))
    case = read_case(RECORDED / "open_model.safetensors")
    with pytest.raises(InputError, match="mlp_dwconv is True"):
        replay(replace(case, args=case.args | {"mlp_dwconv": True}))
    with pytest.raises(InputError, match="pre_norm is False"):
        replay(replace(case, args=case.args | {"pre_norm": False}))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("biformer", fast=True) if o.verdict == "fails"] == []
