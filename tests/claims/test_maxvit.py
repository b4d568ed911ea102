"""MaxViT's claims file: official outputs replayed, the other configurations of timm's layer, what replay refuses."""

from dataclasses import replace
from functools import partial
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


# Networks


def test_the_recorded_network_is_ours():
    matches = replay(read_case(RECORDED / "open.safetensors"), 1e-5)
    assert len(matches) == 138
    assert all(match.holds for match in matches), [match for match in matches if not match.holds]


def make_network_case(conv, transformer, **options):
    """A network of one block in timm's names with random weights, in double precision, its configurations nested."""
    args = {"embed_dim": (12,), "depths": (1,), "block_type": ("M",), "stem_width": (4, 6), "num_classes": 3}
    args |= {"conv_cfg": {"padding": "same"} | conv, "transformer_cfg": {"dim_head": 4} | transformer, **options}
    hidden, mlp = 56 if conv.get("expand_ratio") == 4.6 else 48, int(12 * transformer.get("expand_ratio", 4))
    kernel = conv.get("kernel_size", 3)
    shapes = {"stem.conv1.weight": (4, 3, 3, 3), "stem.conv2.weight": (6, 4, 3, 3)}
    norms = {"stem.norm1": 4}
    block = "stages.0.blocks.0."
    norms |= {f"{block}conv.{name}": dim for name, dim in (("pre_norm", 6), ("norm1", hidden), ("norm2", hidden))}
    shapes |= {f"{block}conv.conv1_1x1.weight": (hidden, 6, 1, 1), f"{block}conv.conv3_1x1.weight": (12, hidden, 1, 1)}
    shapes |= {f"{block}conv.conv2_kxk.weight": (hidden, 1, kernel, kernel)}
    shapes |= {f"{block}conv.shortcut.expand.weight": (12, 6, 1, 1)}
    if conv.get("output_bias", True):
        shapes |= {f"{block}conv.conv3_1x1.bias": (12,), f"{block}conv.shortcut.expand.bias": (12,)}
    gate = int(12 * conv.get("attn_ratio", 0.25))
    if conv.get("attn_layer", "se"):
        shapes |= {f"{block}conv.se.fc1.weight": (gate, hidden, 1, 1), f"{block}conv.se.fc1.bias": (gate,)}
        shapes |= {f"{block}conv.se.fc2.weight": (hidden, gate, 1, 1), f"{block}conv.se.fc2.bias": (hidden,)}
    for kind in ("block", "grid"):
        of = f"{block}attn_{kind}."
        shapes |= {of + "attn.qkv.weight": (36, 12), of + "attn.qkv.bias": (36,)}
        shapes |= {of + "attn.proj.weight": (12, 12), of + "attn.proj.bias": (12,)}
        shapes |= {of + "attn.rel_pos.relative_position_bias_table": (3, 3, 5)}
        shapes |= {of + "mlp.fc1.weight": (mlp, 12), of + "mlp.fc1.bias": (mlp,)}
        shapes |= {of + "mlp.fc2.weight": (12, mlp), of + "mlp.fc2.bias": (12,)}
        shapes |= {of + f"norm{n}.{part}": (12,) for n in (1, 2) for part in ("weight", "bias")}
    if "head_hidden_size" in options:
        shapes |= {"head.norm.weight": (12,), "head.norm.bias": (12,), "head.fc.weight": (3, 5), "head.fc.bias": (3,)}
        shapes |= {"head.pre_logits.fc.weight": (5, 12), "head.pre_logits.fc.bias": (5,)}
    else:
        shapes |= {"norm.weight": (12,), "norm.bias": (12,), "head.fc.weight": (3, 12), "head.fc.bias": (3,)}
    if options.get("stem_bias"):
        shapes |= {"stem.conv1.bias": (4,), "stem.conv2.bias": (6,)}
    for norm, dim in norms.items():
        shapes |= {f"{norm}.{part}": (dim,) for part in ("weight", "bias", "running_mean", "running_var")}
    tensors = {f"state.{name}": torch.randn(shape, dtype=torch.float64) / 3 for name, shape in shapes.items()}
    for norm in norms:
        tensors[f"state.{norm}.running_var"] = tensors[f"state.{norm}.running_var"].abs() + 0.5
        tensors[f"state.{norm}.num_batches_tracked"] = torch.tensor(0)
    tensors["in.x"] = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    case = read_case(RECORDED / "open_block.safetensors")
    return replace(case, cls="MaxxVit", args=args, record={"args": args}, tensors=tensors)


def expected_network(case):
    """timm's network of one block, written down anew; its attention is the layer's above."""
    state = {name.removeprefix("state."): tensor for name, tensor in case.tensors.items()}
    conv, transformer = case.args["conv_cfg"], case.args["transformer_cfg"]
    gelu = partial(F.gelu, approximate="tanh" if conv.get("act_layer") == "gelu_tanh" else "none")

    def norm(name, x):
        parts = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *parts, eps=conv.get("norm_eps", 1e-5))

    def convolve(name, x, stride=1):
        weight = state[f"{name}.weight"]
        margin = weight.shape[-1] - stride  # all maps here are even: TensorFlow puts the odd zero last
        x = F.pad(x, [margin // 2, margin - margin // 2] * 2)
        return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, groups=x.shape[1] // weight.shape[1])

    x = convolve("stem.conv2", gelu(norm("stem.norm1", convolve("stem.conv1", state["in.x"], 2))))
    name = "stages.0.blocks.0."
    of = name + "conv."
    inside = gelu(norm(of + "norm1", convolve(of + "conv1_1x1", norm(of + "pre_norm", x))))
    inside = gelu(norm(of + "norm2", convolve(of + "conv2_kxk", inside, 2)))
    if of + "se.fc1.weight" in state:
        means = inside.mean((2, 3), keepdim=True)
        inside = inside * convolve(of + "se.fc2", F.silu(convolve(of + "se.fc1", means))).sigmoid()
    x = convolve(of + "shortcut.expand", F.avg_pool2d(x, 2)) + convolve(of + "conv3_1x1", inside)
    x = x.permute(0, 2, 3, 1)
    for kind in ("block", "grid"):
        own = {
            f"state.{key.removeprefix(name + f'attn_{kind}.')}": t for key, t in state.items() if f"attn_{kind}" in key
        }
        cfg = {"window_size": SIZE, **transformer}
        layer = replace(case, args={"partition_type": kind, "cfg": cfg}, tensors={**own, "state.in.x": x})
        x = join(expected_output(layer), kind == "grid", x.shape[1:3])
    eps = transformer.get("norm_eps", 1e-6)
    if "norm.weight" in state:
        return F.linear(
            F.layer_norm(x, (12,), state["norm.weight"], state["norm.bias"], eps).mean((1, 2)),
            state["head.fc.weight"],
            state["head.fc.bias"],
        )
    pooled = F.layer_norm(x.mean((1, 2)), (12,), state["head.norm.weight"], state["head.norm.bias"], eps)
    hidden = F.linear(pooled, state["head.pre_logits.fc.weight"], state["head.pre_logits.fc.bias"]).tanh()
    return F.linear(hidden, state["head.fc.weight"], state["head.fc.bias"])


def join(groups, grid, space):
    """The inverse of `partition`."""
    place = partition(torch.arange(space.numel()).view(1, *space, 1), grid).flatten()
    return groups.flatten(1, 2)[:, place.argsort()].unflatten(1, space)


@pytest.mark.parametrize(
    ("conv", "transformer", "options"),
    [
        ({}, {"window_size": SIZE}, {}),
        (
            {"norm_eps": 1e-3, "act_layer": "gelu_tanh"},
            {"act_layer": "gelu_tanh", "norm_eps": 1e-5},
            {"stem_bias": True},
        ),
        ({"kernel_size": 5, "output_bias": False}, {"head_first": False}, {"head_hidden_size": 5}),
        ({"attn_ratio": 0.5, "expand_ratio": 4.6}, {"expand_ratio": 1.5}, {"head_hidden_size": 5}),
        ({"attn_layer": ""}, {}, {}),
    ],
)
def test_other_configurations_of_the_network(conv, transformer, options):
    transformer = {"rel_pos_type": "bias_tf", "window_size": SIZE} | transformer
    case = make_network_case(conv, transformer, **options)
    assert_close(run(case)["out.y"], expected_network(case))


@pytest.mark.parametrize(
    ("conv", "transformer", "options", "message"),
    [
        ({"padding": ""}, {}, {}, "conv_padding is '': replay serves networks like the authors', with 'same'"),
        ({"block_type": "convnext"}, {}, {}, "conv_block_type is 'convnext'"),
        ({}, {}, {"block_type": ("M", "T")}, r"block_type is \('M', 'T'\)"),
        ({}, {"use_nchw_attn": True}, {}, "use_nchw_attn is True"),
        ({"act_layer": "silu"}, {}, {}, "conv_act_layer is 'silu'"),
        ({}, {"act_layer": "gelu_tanh"}, {}, "transformer_act_layer is 'gelu_tanh'"),
    ],
)
def test_networks_that_replay_cannot_serve(conv, transformer, options, message):
    case = make_network_case({}, {"window_size": SIZE})
    args = case.args | {"conv_cfg": {"padding": "same"} | conv, "transformer_cfg": transformer, **options}
    with pytest.raises(InputError, match=message):
        run(replace(case, args=args))


def test_cases_of_other_classes():
    with pytest.raises(InputError, match="is a case of CoAtNet: replay serves PartitionAttentionCl, MaxxVit"):
        replay(replace(read_case(RECORDED / "open_block.safetensors"), cls="CoAtNet"))
