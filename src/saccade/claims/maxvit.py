"""MaxViT: attention inside windows, then attention over grids that span the map."""

import re
from dataclasses import replace

import torch
from torch import Tensor, nn

from saccade.backbones.mlp import Mlp
from saccade.claims.framework import (
    Case,
    Paper,
    at_least,
    at_most,
    claim,
    play,
    relative_difference,
    rounding,
    run_official,
)
from saccade.errors import InputError, check_choice
from saccade.measure import count_flops, count_parameters
from saccade.mixers import GridAttention, PatternAttention, WindowAttention
from saccade.ops import Grid, RelativeTable, Window, softmax_attention, sparse_attention

PAPER = Paper(
    title="MaxViT: Multi-Axis Vision Transformer",
    arxiv="2204.01697",
    published="2022-04-04",
    summary="One block has a convolution, attention inside windows (local) and attention over a grid of strided "
    "positions (global, dilated). Both attentions touch a fixed number of tokens, so cost is linear in the image's "
    "area while the two together connect every pair of positions.",
    home=("saccade.mixers.WindowAttention", "saccade.mixers.GridAttention", "saccade.ops.Grid"),
    missing=("the networks T to XL, and resizing their bias tables to another window",),
    differences=(
        "The authors' code is in TensorFlow: replay follows timm's port, which the recorded cases come from.",
        "timm's own networks order qkv by head, and their table as Swin does, [(2 P - 1)^2, heads] of query minus key: "
        "replay reorders both. Their position bias from an MLP (rel_pos_type mlp) is refused.",
        "timm refuses a map that the partition does not divide; ours has smaller windows and grids.",
    ),
)

LAYER = "the layer's definition"
NETWORKS = "the networks T to XL, which saccade does not have yet"


@claim(
    "params",
    {"T": 30_916_528, "S": 68_927_956, "B": 119_467_708, "L": 211_785_560, "XL": 474_951_952},
    source="official configurations, at 224 x 224",
    needs=NETWORKS,
)
def networks_have_their_sizes() -> None:
    """The networks have so many parameters."""


@claim("params", {"384": 60_480, "512": 133_056}, source="official configurations")
def larger_images_add_position_tables_alone() -> dict[str, int]:
    """T has 60 480 parameters more for images of 384 x 384 than for 224 x 224, and 133 056 more for 512 x 512, all in
    the position tables of its windows and grids, whose size is a 32nd of the image's: counted in its 22 layers."""
    blocks = [(64, 2), (128, 2), (256, 5), (512, 2)]  # width and number

    def count(window: int) -> int:
        kinds = WindowAttention, GridAttention
        return sum(n * count_parameters(kind(dim, window_size=window)) for dim, n in blocks for kind in kinds)

    return {"384": count(12) - count(7), "512": count(16) - count(7)}


@claim(
    "flops",
    {"224": 11.104, "384": 34.785, "512": 66.499},
    source="T of timm's port, a multiply-add as two; published are 5.6, 17.7 and 33.7 G multiply-adds",
    needs=NETWORKS,
)
def cost_of_a_network_follows_the_pixels() -> None:
    """T takes so many GFLOPs, in proportion to the pixels within a few percent."""


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
    needs="ImageNet, for 88.7 % also its 21 000 classes, and " + NETWORKS,
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
    """timm's PartitionAttentionCl."""
    if "PartitionAttentionCl" not in case.cls:
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: whole networks come with the backbones")
    block = replace(case, args=_read_args(case)).build(_PartitionBlock)

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": run_official(block, block.rename(state), inputs["x"])}

    return play(case, forward)


def _read_args(case: Case) -> dict[str, object]:
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
    if "TF-compatible" in case.record.get("repo", ""):
        return {"head_first": False, "rel_pos_type": "bias_tf", "act_layer": "gelu_tanh", "norm_eps": 1e-5} | args
    return args


class _PartitionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with the arguments of timm's layer and of its configuration."""

    def __init__(
        self,
        dim: int,
        partition_type: str = "block",
        dim_head: int = 32,
        head_first: bool = True,
        expand_ratio: float = 4.0,
        attn_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        rel_pos_type: str | None = "bias",
        window_size: int | tuple[int, int] | None = None,
        grid_size: int | tuple[int, int] | None = None,
        init_values: float | None = None,
        act_layer: str = "gelu",
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("partition_type", partition_type, ("block", "grid"))
        check_choice("act_layer", act_layer, ("gelu", "gelu_tanh"))
        if rel_pos_type not in (None, "bias", "bias_tf"):
            raise InputError(f"rel_pos_type is {rel_pos_type!r}: replay serves 'bias', 'bias_tf' and None")
        if dim % dim_head:
            raise InputError(f"dim_head is {dim_head} and dim is {dim}: heads of this width do not share the channels")
        kind = WindowAttention if partition_type == "block" else GridAttention
        size = window_size if partition_type == "block" or grid_size is None else grid_size
        if size is None:
            raise InputError("neither window_size nor grid_size is given: the layer needs the size of its partition")
        self.head_first, self.init_values = head_first, init_values
        self.norm1 = nn.LayerNorm(dim, norm_eps)
        self.attn = kind(dim, dim // dim_head, window_size=size, position_bias=rel_pos_type is not None)
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = Mlp(dim, int(dim * expand_ratio))
        self.mlp.act = nn.GELU("tanh" if act_layer == "gelu_tanh" else "none")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Official tensors to ours: the table in our order, rows of qkv by kind, layer scales in what they scale."""
        state, heads = dict(state), self.attn.num_heads
        table = state.pop("attn.rel_pos.relative_position_bias_table", None)
        if table is not None:
            state["attn.position_bias_table"] = table if table.ndim == 3 else self._turn(table)
        for name in ("qkv", "proj"):  # without attn_bias both have none, where ours are 0
            weight = state[f"attn.{name}.weight"]
            state.setdefault(f"attn.{name}.bias", weight.new_zeros(len(weight)))
        if self.head_first:
            for name in ("attn.qkv.weight", "attn.qkv.bias"):
                state[name] = state[name].unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        for scale, name in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
            gamma = state.pop(scale, None)
            if gamma is not None:
                state[f"{name}.weight"] = gamma.unsqueeze(1) * state[f"{name}.weight"]
                state[f"{name}.bias"] = gamma * state[f"{name}.bias"]
        return state

    def _turn(self, table: Tensor) -> Tensor:
        """((2 P - 1)^2, heads) of query minus key to (heads, 2 P - 1, 2 P - 1) of key minus query."""
        shape = self.attn.get_parameter("position_bias_table").shape
        return table.flip(0).T.reshape(shape)


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
        _PartitionBlock(32, partition, dim_head=8, rel_pos_type="bias_tf", window_size=4) for partition in partitions
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
