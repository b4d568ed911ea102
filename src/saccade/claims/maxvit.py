"""MaxViT: attention inside windows, then attention over grids that span the map."""

import ast
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.backbones import MaxViT, create_model
from saccade.backbones.maxvit import rename_official
from saccade.backbones.mlp import Mlp
from saccade.backbones.residual import Block
from saccade.claims.framework import (
    Case,
    Paper,
    at_least,
    at_most,
    claim,
    count_model_parameters,
    equal,
    measure_model_flops,
    play,
    relative_difference,
    rounding,
    run_official,
)
from saccade.errors import InputError, check_choice
from saccade.measure import count_flops, count_parameters
from saccade.mixers import GridAttention, PatternAttention, WindowAttention
from saccade.ops import Grid, RelativeTable, Window, softmax_attention, sparse_attention
from saccade.ops.check import per_axis

Sizes = int | tuple[int, ...]

PAPER = Paper(
    title="MaxViT: Multi-Axis Vision Transformer",
    arxiv="2204.01697",
    published="2022-04-04",
    summary="One block has a convolution, attention inside windows (local) and attention over a grid of strided "
    "positions (global, dilated). Both attentions touch a fixed number of tokens, so cost is linear in the image's "
    "area while the two together connect every pair of positions.",
    home=(
        "saccade.mixers.WindowAttention",
        "saccade.mixers.GridAttention",
        "saccade.ops.Grid",
        "saccade.backbones.MaxViT",
    ),
    differences=(
        "The authors' code is in TensorFlow: replay follows timm's port, which the recorded cases come from.",
        "timm's own networks order qkv by head, and their table as Swin does, [(2 P - 1)^2, heads] of query minus key: "
        "replay reorders both. Their position bias from an MLP (rel_pos_type mlp) is refused, and so are networks of "
        "other blocks or another padding than the authors'.",
        "timm refuses a map that the partition does not divide; ours has smaller windows and grids.",
        "timm interpolates tables bicubically, with a spacing that grows away from the middle; ours bilinearly, as the "
        "authors do.",
    ),
)

LAYER = "the layer's definition"
NETWORKS = {"T": "maxvit_tiny", "S": "maxvit_small", "B": "maxvit_base", "L": "maxvit_large", "XL": "maxvit_xlarge"}


@claim(
    "params",
    {"T": 30_916_528, "S": 68_927_956, "B": 119_467_708, "L": 211_785_560, "XL": 474_951_952},
    source="official configurations, at 224 x 224",
)
def networks_have_their_sizes() -> dict[str, int]:
    """The networks have so many parameters."""
    return count_model_parameters(NETWORKS)


@claim(
    "params",
    {"T": 31, "S": 69, "B": 119, "L": 212, "XL": 475},
    equal("whole millions are published", within=0.5),
    source="table of the networks",
)
def networks_have_the_published_sizes() -> dict[str, float]:
    """The networks have so many million parameters."""
    return {name: count / 1e6 for name, count in count_model_parameters(NETWORKS).items()}


@claim("params", {"384": 60_480, "512": 133_056}, source="official configurations")
def larger_images_add_position_tables_alone() -> dict[str, int]:
    """T has 60 480 parameters more for images of 384 x 384 than for 224 x 224, and 133 056 more for 512 x 512, all in
    the position tables of its windows and grids, whose size is a 32nd of the image's: counted in its 22 layers."""
    blocks = [(64, 2), (128, 2), (256, 5), (512, 2)]  # width and number

    def count(window: int) -> int:
        kinds = WindowAttention, GridAttention
        return sum(n * count_parameters(kind(dim, window_size=window)) for dim, n in blocks for kind in kinds)

    return {"384": count(12) - count(7), "512": count(16) - count(7)}


PORT = "timm's port, counted, a multiply-add as two"


@claim("flops", {"224": 11_103_673_312, "384": 34_785_320_192, "512": 66_499_342_336}, source=PORT)
def cost_of_the_smallest_network() -> dict[str, int]:
    """T takes so many FLOPs for an image of so many pixels a side, with the products by one-hot matrices through which
    the port, and the authors' code, read position tables."""
    return {str(size): _cost("maxvit_tiny", size) for size in (224, 384, 512)}


@claim(
    "flops",
    {"S": 23_178_250_704, "B": 47_844_629_040, "L": 87_039_473_728, "XL, 21843 classes": 194_573_236_320},
    source=PORT,
    slow=True,
)
def cost_of_the_networks() -> dict[str, int]:
    """The networks take so many FLOPs for an image of 224 x 224, with those products."""
    return {name: _cost(NETWORKS[name], 224) for name in "SBL"} | {
        "XL, 21843 classes": _cost("maxvit_xlarge", 224, num_classes=21843)
    }


@claim(
    "flops",
    {
        "T": (5.6, 17.7, 33.7),
        "S": (11.7, 36.1, 67.6),
        "B": (24.2, 74.2, 138.5),
        "L": (43.9, 133.1, 245.4),
        "XL": (97.8, 293.7, 535.2),
    },
    equal("products are counted; what else the published figures hold is not said", relative=0.02),
    source="table of the networks, at 224, 384 and 512",
    slow=True,
)
def cost_is_the_published_one() -> dict[str, tuple[float, ...]]:
    """The networks take so many billion multiply-adds."""
    return {name: tuple(_cost(model, size) / 2e9 for size in (224, 384, 512)) for name, model in NETWORKS.items()}


@claim(
    "complexity",
    {"384": 1.0, "512": 1.0},
    equal("windows grow with the image, and with them the products of attention", within=0.2),
    source="T of timm's port",
)
def cost_follows_the_pixels() -> dict[str, float]:
    """T takes FLOPs in proportion to the pixels, though its windows have the 32nd part of the image's side: FLOPs of a
    pixel over those at 224."""
    of_pixel = {size: _cost("maxvit_tiny", size) / size**2 for size in (224, 384, 512)}
    return {str(size): of_pixel[size] / of_pixel[224] for size in (384, 512)}


@claim("complexity", tuple(4 * side**2 * 49 * 64 for side in (14, 28, 56)) * 2, source=LAYER)
def products_are_linear_in_the_tokens() -> tuple[int, ...]:
    """The products of a layer take 2 H W P^2 C multiply-adds: P = G = 7, C = 64 and maps of 14, 28 and 56 tokens a
    side, windows and then grids, counted while they run."""
    maps = [torch.zeros(1, 2, side, side, 32) for side in (14, 28, 56)]
    return tuple(count_flops(sparse_attention, x, x, x, kind(7)).total for kind in (Window, Grid) for x in maps)


@claim("equivalence", {"window": "dense", "grid": "dense"}, rounding, source=LAYER)
def one_group_is_dense_attention() -> dict[str, float]:
    """With P = H or G = H there is one group, and both are dense attention with relative bias, entry
    [x - i + P - 1, y - j + P - 1] for query (i, j) and key (x, y)."""
    query, key, value = (torch.randn(2, 3, 5, 5, 8, dtype=torch.float64) for _ in range(3))
    table = torch.randn(3, 9, 9, dtype=torch.float64)
    place = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    rows, columns = (place[None] - place[:, None] + 4).unbind(-1)  # key minus query
    dense = softmax_attention(*(x.flatten(2, 3) for x in (query, key, value)), bias=table[:, rows, columns])
    return {
        name: relative_difference(
            sparse_attention(query, key, value, pattern, bias=RelativeTable(table)).flatten(2, 3), dense
        )
        for name, pattern in [("window", Window(5)), ("grid", Grid(5))]
    }


@claim("property", (0, 4, 32, 36), source=LAYER)
def first_group_of_a_grid() -> tuple[int, ...]:
    """On a map of 8 x 8 the first group of the grid G = 2 holds the positions 0, 4, 32 and 36."""
    return tuple(Grid(2).mask((8, 8))[0].nonzero().flatten().tolist())


@claim(
    "property",
    {"window, 49": 49, "grid, 49": 49, "both, 49": 49**2, "both, 98 of 9604": 49**2},
    source=LAYER,
)
def two_layers_connect_every_pair() -> dict[str, int]:
    """With P = G = 7 one layer of either kind reaches 49 positions, and windows followed by grids every one of a map of
    49 x 49, but not of 98 x 98, where P G < H: positions with a gradient, the same for three outputs."""
    window, grid = (kind(8, 1, window_size=7).double() for kind in (WindowAttention, GridAttention))
    both = nn.Sequential(window, grid)
    return {
        "window, 49": _reach(window, 49),
        "grid, 49": _reach(grid, 49),
        "both, 49": _reach(both, 49),
        "both, 98 of 9604": _reach(both, 98),
    }


@claim("property", {"window by 4": "equal", "grid by 1": "equal", "grid by 3": "equal"}, rounding, source=LAYER)
def shifts_without_position_bias() -> dict[str, float]:
    """Without position bias, windows commute with cyclic shifts by P, and grids with every cyclic shift: P = G = 4 on a
    map of 8 x 12."""
    return {
        "window by 4": _shift_error(WindowAttention(16, 2, window_size=4, position_bias=False), 4),
        "grid by 1": _shift_error(GridAttention(16, 2, window_size=4, position_bias=False), 1),
        "grid by 3": _shift_error(GridAttention(16, 2, window_size=4, position_bias=False), 3),
    }


@claim(
    "property",
    {"window by 1": "different", "grid by 1, with bias": "different"},
    at_least(0.01, "rounding is 1e-16, a weight that matters 0.1"),
    source=LAYER,
)
def other_shifts() -> dict[str, float]:
    """Windows do not commute with other shifts, and grids with position bias not either, since places inside a group
    rotate."""
    grid = GridAttention(16, 2, window_size=4)
    nn.init.normal_(grid.get_parameter("position_bias_table"))
    return {
        "window by 1": _shift_error(WindowAttention(16, 2, window_size=4, position_bias=False), 1),
        "grid by 1, with bias": _shift_error(grid, 1),
    }


@claim("equivalence", "equal", rounding, source=LAYER)
def a_grid_is_windows_of_another_order() -> float:
    """Grid attention is window attention, P = G, of the map whose position a (H / G) + o has moved to o G + a, on both
    axes; position bias included."""
    query, key, value = (torch.randn(2, 3, 8, 12, 8, dtype=torch.float64) for _ in range(3))
    bias = RelativeTable(torch.randn(3, 7, 7, dtype=torch.float64))
    moved = sparse_attention(_gather_grids(query), _gather_grids(key), _gather_grids(value), Window(4), bias=bias)
    return relative_difference(_gather_grids(sparse_attention(query, key, value, Grid(4), bias=bias)), moved)


@claim(
    "accuracy",
    {"T": 83.62, "S": 84.45, "B": 84.95, "L": 85.17, "L at 512": 86.70, "XL at 512, 21k": 88.7},
    source="table and abstract; ImageNet top-1, at 224 x 224",
    needs="ImageNet and the authors' weights",
)
def networks_are_accurate() -> None:
    """The networks have these accuracies."""


@claim(
    "accuracy",
    "chance (50 %, loss 1) with windows alone",
    at_least(0.8, "chance is 1, the variance of the values; single settings differ"),
    source="an experiment of ours",
    slow=True,
)
def windows_alone_cannot_swap_values() -> float:
    """Two marked pixels in different windows carry values of +-1 and each must tell the other's: trained, two layers of
    window attention stay at chance. Their mean squared error."""
    return _train_to_swap("block", "block")


@claim(
    "accuracy",
    "below 1e-4 with windows and grids",
    at_most(0.1, "a tenth of chance; how far 400 steps get depends on the seed"),
    source="an experiment of ours",
    slow=True,
)
def windows_and_grids_swap_values() -> float:
    """A layer of windows followed by one of grids learns it: mean squared error."""
    return _train_to_swap("block", "grid")


def replay(case: Case) -> dict[str, Tensor]:
    """timm's PartitionAttentionCl, and its MaxxVit of the authors' blocks."""
    if "MaxxVit" in case.cls:
        options = _read_network(case)
        model: nn.Module = _network(case, options)
        heads = options["transformer_dim_head"], options["transformer_head_first"]
        sizes = {f"attn_{kind}": options[f"transformer_{name}_size"] for kind, name in _KINDS.items()}
    elif "PartitionAttentionCl" in case.cls:
        args = _read_layer(case)
        model = replace(case, args=args).build(_partition_block)
        heads = args.get("dim_head", 32), args.get("head_first", True)
        sizes = {"": _partition_size(**args)}
    else:
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: replay serves PartitionAttentionCl, MaxxVit")

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        state = _as_authors(state, *heads, sizes)
        return {"y": run_official(model, rename_official(state), inputs["x"])}

    return play(case, forward)


_KINDS = {"block": "window", "grid": "grid"}
_TIMM = {"norm_eps": 1e-6, "act_layer": "gelu", "head_first": True, "rel_pos_type": "bias"}
_AUTHORS = {"norm_eps": 1e-5, "act_layer": "gelu_tanh", "head_first": False, "rel_pos_type": "bias_tf"}
_GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def _defaults(case: Case) -> dict[str, Any]:
    """What timm's configuration of attention has where nothing else is said: its own, or that of the authors."""
    return _AUTHORS if "TF-compatible" in case.record.get("repo", "") or "tf style" in case.cls else _TIMM


def _read_layer(case: Case) -> dict[str, Any]:
    """Arguments of the layer and its configuration, as a mapping or in words, which the names beside them complete."""
    words = case.record.get("args", "")
    args = case.args | case.args.get("cfg", {})
    args.pop("cfg", None)
    if isinstance(words, str):
        args = {"dim_head" if name == "width" else name: value for name, value in args.items()}
        sizes = re.findall(r"(window|grid) (\d+)x(\d+)", words)
        args |= {f"{name}_size": (int(rows), int(columns)) for name, rows, columns in sizes}
        found = re.search(r"partition_type (\w+)", case.cls)
        args |= {"partition_type": found[1]} if found else {}
    return args if _defaults(case) is _TIMM else _AUTHORS | args


_SAID = {
    "conv_norm_eps": r"conv norm eps ([\d.e-]+)",
    "transformer_norm_eps": r"LN eps ([\d.e-]+)",
    "transformer_dim_head": r"(?:head width|dim_head) (\d+)",
    "transformer_head_first": r"head_first (True|False)",
    "transformer_window_size": r"window(?:_size)?(?: ?= ?grid)? ?=? ?(\d+)",
    "transformer_grid_size": r"grid(?:_size)? ?=? ?(\d+)",
}
_FIXED = {  # what the authors' networks have, and replay therefore serves
    "block_type": "M",
    "conv_block_type": "mbconv",
    "conv_expand_output": True,
    "conv_group_size": 1,
    "conv_pre_norm_act": False,
    "conv_stride_mode": "dw",
    "conv_pool_type": "avg2",
    "conv_padding": "same",
    "conv_attn_early": False,
    "conv_attn_act_layer": "silu",
    "transformer_no_block_attn": False,
    "transformer_use_nchw_attn": False,
}


def _read_network(case: Case) -> dict[str, Any]:
    """Arguments of timm's network, those of its two configurations as conv_* and transformer_*; window and grid as
    pairs."""
    authors = _defaults(case) is _AUTHORS
    conv = {"norm_eps": 1e-3, "act_layer": "gelu_tanh", "padding": "same"} if authors else {"padding": ""}
    args = case.args | case.args.get("cfg", {})
    options: dict[str, Any] = {"img_size": 224, "transformer_partition_ratio": 32, "transformer_dim_head": 32}
    options |= {"conv_norm_eps": 1e-5, "conv_act_layer": "gelu"}
    for name, nested in {"conv": conv, "transformer": _defaults(case)}.items():
        options |= {f"{name}_{key}": value for key, value in (nested | args.pop(f"{name}_cfg", {})).items()}
    options |= args
    words = case.record.get("args") or case.record.get("arguments")
    if isinstance(words, str):
        found = {name: re.search(pattern, words) for name, pattern in _SAID.items()}
        options |= {name: ast.literal_eval(said[1]) for name, said in found.items() if said}
    for name, needed in _FIXED.items():
        given = options.get(name, needed)
        if any(each != needed for each in (given if isinstance(given, tuple) else (given,))):
            raise InputError(f"{name} is {given!r}: replay serves networks like the authors', with {needed!r}")
    follows = tuple(
        side // options["transformer_partition_ratio"] for side in per_axis("img_size", options["img_size"], 2)
    )
    window = options.get("transformer_window_size") or follows
    grid = options.get("transformer_grid_size") or window
    sizes = {"window": window, "grid": grid}
    return options | {f"transformer_{name}_size": per_axis(name, size, 2) for name, size in sizes.items()}


def _network(case: Case, options: Mapping[str, Any]) -> MaxViT:
    """timm's network of the authors' blocks: what shapes show is read from the state, the rest from the arguments."""
    shapes = {name.removeprefix("state."): t.shape for name, t in case.tensors.items() if name.startswith("state.")}
    depths = Counter(int(name.split(".")[1]) for name in shapes if name.endswith(".conv.pre_norm.weight"))
    first = "stages.0.blocks.0"
    dims = tuple(shapes[f"stages.{stage}.blocks.0.conv.conv3_1x1.weight"][0] for stage in sorted(depths))
    gate = shapes.get(f"{first}.conv.se.fc1.weight")
    act, attn_act = options["conv_act_layer"], options["transformer_act_layer"]
    check_choice("conv_act_layer", act, _GELU)
    check_choice("transformer_act_layer", attn_act, (act,))
    return MaxViT(
        dims,
        tuple(depths[stage] for stage in sorted(depths)),
        stem_dims=(shapes["stem.conv1.weight"][0], shapes["stem.conv2.weight"][0]),
        head_dim=shapes["head.pre_logits.fc.weight"][0] if "head.pre_logits.fc.weight" in shapes else 0,
        dim_head=options["transformer_dim_head"],
        window_size=options["transformer_window_size"],
        grid_size=options["transformer_grid_size"],
        position_bias=options["transformer_rel_pos_type"] is not None,
        expansion=shapes[f"{first}.conv.conv1_1x1.weight"][0] / dims[0],
        mlp_ratio=shapes[f"{first}.attn_grid.mlp.fc1.weight"][0] / dims[0],
        kernel_size=shapes[f"{first}.conv.conv2_kxk.weight"][-1],
        gate_ratio=options.get("conv_attn_ratio", 0.25) if gate else 0,
        act=_GELU[act],
        stem_bias="stem.conv1.bias" in shapes,
        out_bias=f"{first}.conv.conv3_1x1.bias" in shapes,
        conv_eps=options["conv_norm_eps"],
        norm_eps=options["transformer_norm_eps"],
        num_classes=shapes["head.fc.weight"][0] if "head.fc.weight" in shapes else 0,
        in_chans=shapes["stem.conv1.weight"][1],
    )


def _partition_size(
    partition_type: str = "block", window_size: Sizes | None = None, grid_size: Sizes | None = None, **_others: Any
) -> tuple[int, ...]:
    """Tokens of the window, or of the grid, along both axes."""
    size = window_size if partition_type == "block" or grid_size is None else grid_size
    if size is None:
        raise InputError("neither window_size nor grid_size is given: the layer needs the size of its partition")
    return per_axis("window_size", size, 2)


def _partition_block(
    dim: int,
    partition_type: str = "block",
    dim_head: int = 32,
    head_first: bool = True,
    expand_ratio: float = 4.0,
    attn_bias: bool = True,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    rel_pos_type: str | None = "bias",
    window_size: Sizes | None = None,
    grid_size: Sizes | None = None,
    init_values: float | None = None,
    act_layer: str = "gelu",
    norm_eps: float = 1e-6,
    drop_path: float = 0.0,
) -> Block:
    """The layer with the arguments of timm's and of its configuration."""
    check_choice("partition_type", partition_type, ("block", "grid"))
    check_choice("act_layer", act_layer, _GELU)
    if rel_pos_type not in (None, "bias", "bias_tf"):
        raise InputError(f"rel_pos_type is {rel_pos_type!r}: replay serves 'bias', 'bias_tf' and None")
    if dim % dim_head:
        raise InputError(f"dim_head is {dim_head} and dim is {dim}: heads of this width do not share the channels")
    kind = WindowAttention if partition_type == "block" else GridAttention
    size = _partition_size(partition_type, window_size, grid_size)
    attention = kind(dim, dim // dim_head, window_size=size, position_bias=rel_pos_type is not None)
    mlp = Mlp(dim, int(dim * expand_ratio), act=partial(nn.GELU, _GELU[act_layer]))
    return Block(dim, attention, mlp, norm=partial(nn.LayerNorm, eps=norm_eps))


def _as_authors(
    state: Mapping[str, Tensor], dim_head: int, head_first: bool, sizes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """A state of timm's own order in that of the authors: tables (heads, 2 P - 1, 2 P - 1) of key minus query, rows of
    qkv by kind, biases everywhere, layer scales in what they scale.

    Args:
        sizes: by the last word of the layer's name, tokens of its partition along both axes.
    """
    state = dict(state)
    for prefix in [name.removesuffix("attn.qkv.weight") for name in state if name.endswith("attn.qkv.weight")]:
        heads = len(state[f"{prefix}attn.qkv.weight"]) // (3 * dim_head)
        table = f"{prefix}attn.rel_pos.relative_position_bias_table"
        if table in state and state[table].ndim == 2:
            rows = [2 * size - 1 for size in sizes[prefix.rstrip(".").rpartition(".")[2]]]
            state[table] = state[table].flip(0).T.reshape(heads, *rows)
        for name in ("qkv", "proj"):  # without attn_bias both have none, where ours are 0
            weight = state[f"{prefix}attn.{name}.weight"]
            state.setdefault(f"{prefix}attn.{name}.bias", weight.new_zeros(len(weight)))
        if head_first:
            for name in (f"{prefix}attn.qkv.weight", f"{prefix}attn.qkv.bias"):
                state[name] = state[name].unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        for scale, name in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
            gamma = state.pop(f"{prefix}{scale}", None)
            if gamma is not None:
                state[f"{prefix}{name}.weight"] = gamma.unsqueeze(1) * state[f"{prefix}{name}.weight"]
                state[f"{prefix}{name}.bias"] = gamma * state[f"{prefix}{name}.bias"]
    return state


def _cost(name: str, size: int, **options: Any) -> int:
    """FLOPs of a network, and of the products of position tables (2 P - 1)^2 with one-hot matrices: along rows, then
    along columns."""
    with torch.device("meta"):
        model = create_model(name, image_size=size, **options)
    heads = sum(each.num_heads for each in model.modules() if isinstance(each, WindowAttention | GridAttention))
    window, rows = size // 32, 2 * (size // 32) - 1
    read = heads * window**2 * rows * (rows + window**2)
    return 2 * read + measure_model_flops([name], image_size=size, **options)[name]


def _reach(layer: nn.Module, side: int) -> int:
    """Positions that outputs depend on: the number for three of them, or -1 if it differs."""
    x = torch.randn(1, side, side, 8, dtype=torch.float64, requires_grad=True)
    out = layer(x).sum(-1)
    counts = set()
    for row, column in [(0, 0), (20, 31), (side - 1, side - 2)]:
        (grad,) = torch.autograd.grad(out[0, row, column], x, retain_graph=True)
        counts.add(int((grad.abs().sum(-1) > 0).sum()))
    return counts.pop() if len(counts) == 1 else -1


def _shift_error(layer: PatternAttention, shift: int) -> float:
    """How much the output of a shifted map differs from the shifted output, on a map of 8 x 12."""
    x = torch.randn(2, 8, 12, 16, dtype=torch.float64)
    layer = layer.double()
    return relative_difference(layer(x.roll((shift, shift), (1, 2))), layer(x).roll((shift, shift), (1, 2)))


def _gather_grids(x: Tensor) -> Tensor:
    """(B, heads, H, W, D) with a (H / 4) + o moved to o 4 + a, on both axes."""
    return x.unflatten(3, (4, -1)).transpose(3, 4).flatten(3, 4).unflatten(2, (4, -1)).transpose(2, 3).flatten(2, 3)


def _train_to_swap(*partitions: str) -> float:
    """Train two layers (P = G = 4) on maps of 8 x 8 with channels mark and value: mean squared error at the marked
    pixels over the last 50 of 400 steps."""
    blocks = [
        _partition_block(32, partition, dim_head=8, rel_pos_type="bias_tf", window_size=4) for partition in partitions
    ]
    model = nn.Sequential(nn.Linear(2, 32), *blocks, nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    errors = []
    for _ in range(400):
        maps, places, values = _draw_pairs(32)
        out = model(maps).flatten(1).gather(1, places)
        error = (out - values.flip(1)).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    return sum(errors[-50:]) / 50


def _draw_pairs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (B, 8, 8, 2) of mark and value, the two marked places in different windows (B, 2), their values +-1."""
    windows = torch.rand(batch, 4).argsort(1)[:, :2]
    inside = torch.randint(16, (batch, 2))
    row, column = windows // 2 * 4 + inside // 4, windows % 2 * 4 + inside % 4
    places, values = 8 * row + column, torch.randint(2, (batch, 2)) * 2.0 - 1
    marked = torch.zeros(batch, 64).scatter(1, places, 1.0)
    carried = torch.zeros(batch, 64).scatter(1, places, values)
    return torch.stack([marked, carried], -1).unflatten(1, (8, 8)), places, values
