"""TransNeXt: recorded cases, arguments of the official layers, claims."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from saccade.backbones import TransNeXt
from saccade.claims import Case, load_paper, read_case, replay, verify
from saccade.errors import InputError
from saccade.mixers import AggregatedAttention, LengthScaledAttention
from saccade.ops import pooled_coordinates

RECORDED = Path(__file__).parents[1] / "recorded" / "transnext"


@pytest.mark.parametrize(("name", "results"), [("open", 21), ("open_convglu", 8), ("open_model", 2)])
def test_recorded_cases(name, results):
    matches = replay(read_case(RECORDED / f"{name}.safetensors"), tolerance=1e-5)
    assert {match.name for match in matches if not match.holds} == set()
    assert len(matches) == results


def make_case(layer, cls, space, cells, pretrain, **args):
    """A case of our own layer under official names, with the table of positions that official code is given."""
    state = {f"state.{name}": tensor.detach() for name, tensor in layer.state_dict().items()}
    if "state.sr.weight" in state:
        state["state.sr.weight"] = state["state.sr.weight"][..., None, None]
    table, rows = pooled_coordinates(space, cells, pretrain)
    numbers = torch.arange(table[..., 0].numel()).view(table.shape[:-1])
    index = numbers[rows[0][:, None, :, None], rows[1][None, :, None, :]].flatten()
    shuffled = torch.randperm(len(table.flatten(0, 1)))  # torch.unique sorts by its own order
    x = torch.randn(2, space[0] * space[1], layer.dim)
    tensors = state | {
        "in.x": x,
        "in.relative_coords_table": table.flatten(0, 1)[shuffled],
        "in.relative_pos_index": shuffled.argsort()[index].int(),
        "out.y": layer(x.unflatten(1, space)).flatten(1, 2).detach(),
    }
    return Case("transnext", "made", cls, {"dim": layer.dim, "input_resolution": space} | args, {}, tensors)


@pytest.mark.parametrize("pretrain", [(6, 9), (14, 14), (7, 12)], ids=str)
@pytest.mark.parametrize(
    ("ours", "official"),
    [
        ({"sr_ratio": 3, "qkv_bias": False}, {"sr_ratio": 3, "qkv_bias": False}),
        ({"pool_size": 4, "window_size": 5}, {"fixed_pool_size": 4, "window_size": 5}),
    ],
)
def test_arguments_of_aggregated_attention_and_its_positions(ours, official, pretrain):
    layer = AggregatedAttention(12, 3, pretrain_size=pretrain, **ours)
    torch.nn.init.normal_(layer.cpb_fc1.weight)
    case = make_case(
        layer, "AggregatedAttention (native)", (6, 9), layer.cells((6, 9)), pretrain, num_heads=3, **official
    )
    assert_close(load_paper("transnext").replay(case)["out.y"], case.tensors["out.y"])


@pytest.mark.parametrize("pretrain", [(4, 5), (9, 3)], ids=str)
def test_arguments_of_the_last_stage(pretrain):
    layer = LengthScaledAttention(12, 3, pretrain_size=pretrain, qkv_bias=False)
    case = make_case(layer, "Attention", (4, 5), (4, 5), pretrain, num_heads=3, qkv_bias=False)
    assert_close(load_paper("transnext").replay(case)["out.y"], case.tensors["out.y"])


@pytest.mark.parametrize(
    ("ours", "official"),
    [
        ({"sr_ratios": (2, 1)}, {"sr_ratios": (2, 1), "img_size": 32}),
        (
            {"sr_ratios": (3, 2), "window_sizes": (5, 3), "qkv_bias": False, "num_classes": 0, "in_chans": 1},
            {"sr": (3, 2)},
        ),
        ({"pool_size": 2, "sr_ratios": (2, 2)}, {"fixed_pool_size": 2, "sr_ratios": 2, "pretrain_size": 32}),
        ({"norm_eps": 0.1, "mlp_ratios": (1.9, 3), "sr_ratios": (1, 1), "image_size": 64}, {"sr": 1, "img": 64}),
    ],
)
def test_arguments_of_networks(ours, official):
    options = {"image_size": 32, "num_classes": 5, "num_heads": (1, 3), "mlp_ratios": (2, 3)} | ours
    model = TransNeXt((8, 12), (1, 2), **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, model.in_chans, 32, 32)
    tensors = {f"state.{name}": tensor for name, tensor in official_names(model).items()}
    tensors |= {"in.x": x, "out.y": model(x).detach()}
    args = official | ({"eps": 0.1} if "norm_eps" in ours else {})
    case = Case("transnext", "made", "TransNeXt", args, {}, tensors)
    assert_close(load_paper("transnext").replay(case)["out.y"], tensors["out.y"])


def official_names(model):
    state = {}
    for name, tensor in model.state_dict().items():
        stage, rest = re.match(r"(?:stages\.(\d)\.)?(.*)", name).groups()
        if stage is not None:
            part, rest = rest.split(".", 1)
            name = {"downsample": "patch_embed", "blocks": "block", "norm": "norm"}[part] + f"{int(stage) + 1}.{rest}"
        name = name.replace("patch_embed.", "patch_embed1.").replace("dwconv.", "dwconv.dwconv.")
        state[name] = tensor[..., None, None] if name.endswith(".sr.weight") else tensor
    return state


def test_positions_of_another_map_are_refused():
    case = read_case(RECORDED / "open.safetensors")
    moved = case.tensors | {"in.relative_pos_index": case.tensors["in.relative_pos_index"].roll(1)}
    with pytest.raises(InputError, match="has other relative positions than tokens on"):
        load_paper("transnext").replay(replace(case, tensors=moved))


def test_cases_that_are_not_served():
    case = Case("transnext", "made", "TransNeXt", {}, {}, {})
    with pytest.raises(InputError, match="a case of TransNeXt: replay serves TransNeXt, AggregatedAttention"):
        load_paper("transnext").replay(case)
    recorded = read_case(RECORDED / "open_model.safetensors")
    with pytest.raises(InputError, match=r"has sr_ratios \(8, 1, 2, 1\), and its weights are for others"):
        load_paper("transnext").replay(replace(recorded, args=recorded.args | {"sr": (8, 1, 2, 1)}))
    with pytest.raises(InputError, match="does not say H and W, nor input_resolution"):
        load_paper("transnext").replay(replace(case, cls="ConvolutionalGLU", args={"in": 12}))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("transnext", fast=True) if o.verdict == "fails"] == []
