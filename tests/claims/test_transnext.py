"""TransNeXt: recorded cases, arguments of the official layers, claims."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from saccade.claims import Case, load_paper, read_case, replay, verify
from saccade.errors import InputError
from saccade.mixers import AggregatedAttention, LengthScaledAttention
from saccade.ops import pooled_coordinates

RECORDED = Path(__file__).parents[1] / "recorded" / "transnext"


@pytest.mark.parametrize(("name", "results"), [("open", 21), ("open_convglu", 8)])
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


def test_positions_of_another_map_are_refused():
    case = read_case(RECORDED / "open.safetensors")
    moved = case.tensors | {"in.relative_pos_index": case.tensors["in.relative_pos_index"].roll(1)}
    with pytest.raises(InputError, match="has other relative positions than tokens on"):
        load_paper("transnext").replay(replace(case, tensors=moved))


def test_cases_that_are_not_served():
    case = Case("transnext", "made", "TransNeXt", {}, {}, {})
    with pytest.raises(InputError, match="whole networks come with the backbones"):
        load_paper("transnext").replay(case)
    with pytest.raises(InputError, match="does not say H and W, nor input_resolution"):
        load_paper("transnext").replay(replace(case, cls="ConvolutionalGLU", args={"in": 12}))


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("transnext", fast=True) if o.verdict == "fails"] == []
