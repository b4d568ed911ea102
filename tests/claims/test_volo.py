"""VOLO's claims file: official outputs replayed, other configurations, and what replay refuses."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saccade.backbones import VOLO
from saccade.claims import Case, parse_args, read_case, replay
from saccade.claims.volo import _official
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "volo"


@pytest.mark.parametrize(("name", "results"), [("open", 8), ("open_model", 71)])
def test_official_outputs_and_gradients_are_ours(name, results):
    matches = replay(read_case(RECORDED / f"{name}.safetensors"), tolerance=1e-5)
    assert len(matches) == results
    assert all(match.holds for match in matches), matches


def test_every_argument_of_the_official_layer_reaches_ours():
    args = parse_args("dim 12, num_heads 2, kernel_size 5, padding 2, stride 3, qk_scale 0.3, proj_drop 0.1")
    layer = _official(**args)
    assert (layer.num_heads, layer.kernel_size, layer.padding, layer.stride, layer.scale) == (2, 5, 2, 3, 0.3)
    assert layer.v.bias is None
    assert layer.proj_drop.p == 0.1


def official(name, down):
    """An official name of the network's parameter."""
    before = [stage + sum(down[:stage]) for stage in range(len(down))]
    name = re.sub(r"^stages\.(\d)\.blocks", lambda found: f"network.{before[int(found[1])]}", name)
    name = re.sub(
        r"^stages\.(\d)\.downsample\.reduction", lambda found: f"network.{before[int(found[1])] - 1}.proj", name
    )
    return re.sub(
        r"^(patch_embed\.conv)\.(\d)\.(conv|bn)",
        lambda found: f"{found[1]}.{3 * int(found[2]) + (found[3] == 'bn')}",
        name,
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        (
            {"down": (False, False, False), "dims": (12, 12, 12)},
            {"downsamples": (False, False, False), "pooling_scale": 1},
        ),
        ({"down": (True, True, False), "outlook": (True, True, False)}, {"downsamples": (True, True, False)}),
        ({"kernel_size": 5, "stride": 3, "padding": 2}, {"out_kernel": 5, "out_stride": 3, "out_padding": 2}),
        ({"scale": 0.3, "qkv_bias": True, "mlp_ratio": (2.0, 3.5, 3.0)}, {"qk_scale": 0.3, "mlp_ratios": (2, 3.5, 3)}),
        ({"class_layers": 1, "patch_size": 8}, {"post_layers": ("ca",), "patch_size": 8}),
        ({"pool": "all"}, {"return_mean": True}),
        ({"dense": False, "class_layers": 0}, {"return_mean": True, "return_dense": False}),
    ],
)
def test_networks_of_other_arguments_are_rebuilt_from_state_and_words(ours, theirs):
    pool = ours.pop("pool", None)
    options = {"dims": (8, 12, 12), "num_classes": 3, "stem_dim": 4, "image_size": 64} | ours
    model = VOLO((2, 1, 1), num_heads=(2, 3, 4), **options).eval()
    model.global_pool = pool or model.global_pool
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x = torch.randn(2, 3, 64, 64)
    state = {f"state.{official(name, model.down)}": tensor for name, tensor in model.state_dict().items()}
    args = {"num_heads": (2, 3, 4), **theirs}
    matches = replay(Case("volo", "made", "VOLO", args, {}, state | {"in.x": x, "out.y": model(x).detach()}))
    assert all(match.holds for match in matches), matches


def test_what_is_no_volo_is_refused():
    with pytest.raises(InputError, match="replay serves VOLO and OutlookAttention"):
        replay(replace(read_case(RECORDED / "open.safetensors"), cls="LVViT"))
