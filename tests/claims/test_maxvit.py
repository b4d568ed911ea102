"""MaxViT's claims file: official outputs replayed, the other configurations of timm's layer, what replay refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from saccade.claims import read_case, replay
from saccade.claims.maxvit import replay as run
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "maxvit"
HEADS, SIZE = 3, (2, 3)


@pytest.mark.parametrize("name", ["open_block", "open_grid"])
def test_official_outputs_and_gradients_are_ours(name):
    matches = replay(read_case(RECORDED / f"{name}.safetensors"))
    assert len(matches) == 15
    assert all(match.holds for match in matches), matches


def make_case(grid=False, **options):
    """A case of random weights, in double precision, with the arguments as a mapping and its configuration inside."""
    table = {"bias": (15, HEADS), "bias_tf": (HEADS, 3, 5), None: None}[options.get("rel_pos_type", "bias")]
    hidden = int(12 * options.get("expand_ratio", 4.0))
    shapes = {"norm1.weight": (12,), "norm1.bias": (12,), "norm2.weight": (12,), "norm2.bias": (12,)}
    shapes |= {"attn.qkv.weight": (36, 12), "attn.proj.weight": (12, 12)}
    shapes |= {"mlp.fc1.weight": (hidden, 12), "mlp.fc1.bias": (hidden,), "mlp.fc2.weight": (12, hidden)}
    shapes |= {"mlp.fc2.bias": (12,)}
    if options.get("attn_bias", True):
        shapes |= {"attn.qkv.bias": (36,), "attn.proj.bias": (12,)}
    if table:
        shapes["attn.rel_pos.relative_position_bias_table"] = table
    if options.get("init_values"):
        shapes |= {"ls1.gamma": (12,), "ls2.gamma": (12,)}
    tensors = {f"state.{name}": torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    tensors["in.x"] = torch.randn(2, 4, 9, 12, dtype=torch.float64)
    cfg = {"dim_head": 4, "window_size": SIZE, **options}
    args = {"dim": 12, "partition_type": "grid" if grid else "block", "cfg": cfg}
    case = read_case(RECORDED / "open_block.safetensors")
    return replace(case, args=args, record={"args": args}, tensors=tensors)


def partition(x, grid):
    """(B, H, W, ...) to (B, groups, rows * columns, ...), and the number of windows along both axes."""
    rows, columns = SIZE
    if grid:
        x = x.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).permute(0, 2, 4, 1, 3, 5)
    else:
        x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).permute(0, 1, 3, 2, 4, 5)
    return x.flatten(3, 4).flatten(1, 2)


def expected_output(case):
    """timm's layer written down anew, group by group."""
    state = {name.removeprefix("state."): tensor for name, tensor in case.tensors.items()}
    cfg, x, grid = case.args["cfg"], state["in.x"], case.args["partition_type"] == "grid"
    eps = cfg.get("norm_eps", 1e-6)
    groups = partition(F.layer_norm(x, (12,), state["norm1.weight"], state["norm1.bias"], eps), grid)
    qkv = F.linear(groups, state["attn.qkv.weight"], state.get("attn.qkv.bias"))
    if cfg.get("head_first", True):
        query, key, value = qkv.unflatten(-1, (HEADS, 12)).transpose(2, 3).chunk(3, -1)
    else:
        query, key, value = qkv.unflatten(-1, (3, HEADS, 4)).permute(3, 0, 1, 4, 2, 5)
    logits = query @ key.mT * 4**-0.5
    table = state.get("attn.rel_pos.relative_position_bias_table")
    if table is not None:
        place = torch.cartesian_prod(torch.arange(2), torch.arange(3))
        relative = place[None] - place[:, None]  # key minus query
        if table.ndim == 3:
            logits = logits + table[:, relative[..., 0] + 1, relative[..., 1] + 2]
        else:
            logits = logits + table[(1 - relative[..., 0]) * 5 + 2 - relative[..., 1]].permute(2, 0, 1)
    mixed = (logits.softmax(-1) @ value).transpose(2, 3).flatten(3)
    out = F.linear(mixed, state["attn.proj.weight"], state.get("attn.proj.bias")) * state.get("ls1.gamma", 1)
    x = partition(x, grid) + out
    hidden = F.linear(
        F.layer_norm(x, (12,), state["norm2.weight"], state["norm2.bias"], eps),
        state["mlp.fc1.weight"],
        state["mlp.fc1.bias"],
    )
    hidden = F.gelu(hidden, approximate="tanh" if cfg.get("act_layer") == "gelu_tanh" else "none")
    return x + F.linear(hidden, state["mlp.fc2.weight"], state["mlp.fc2.bias"]) * state.get("ls2.gamma", 1)


@pytest.mark.parametrize("grid", [False, True], ids=["block", "grid"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head_first": False, "rel_pos_type": "bias_tf", "act_layer": "gelu_tanh", "norm_eps": 1e-5},
        {"rel_pos_type": None, "attn_bias": False},
        {"init_values": 1e-6, "expand_ratio": 1.5},
    ],
    ids=str,
)
def test_other_configurations_of_the_layer(options, grid):
    case = make_case(grid, **options)
    assert_close(partition(run(case)["out.y"], grid), expected_output(case))


def test_a_grid_may_have_a_size_of_its_own():
    both, own = make_case(True), make_case(True, grid_size=SIZE)
    own.args["cfg"]["window_size"] = 4
    own = replace(own, tensors=both.tensors)
    assert_close(run(own)["out.y"], run(both)["out.y"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rel_pos_type": "mlp"}, "rel_pos_type is 'mlp': replay serves 'bias', 'bias_tf' and None"),
        ({"dim_head": 5}, "dim_head is 5 and dim is 12"),
        ({"window_size": None}, "neither window_size nor grid_size is given"),
        ({"act_layer": "relu"}, "act_layer is 'relu': did you mean gelu"),
        ({"use_nchw_attn": True}, "use_nchw_attn"),
    ],
)
def test_what_replay_cannot_serve(options, message):
    case = make_case()
    case.args["cfg"].update(options)
    with pytest.raises(InputError, match=message):
        run(case)


def test_whole_networks_are_refused():
    network = replace(read_case(RECORDED / "open_block.safetensors"), cls="MaxxVit (MaxViT, tf style)")
    with pytest.raises(InputError, match="whole networks come with the backbones"):
        replay(network)
