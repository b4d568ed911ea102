"""HaloNet: the queries of a block share one window of keys, the block and a halo around it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.claims.framework import (
    Case,
    Paper,
    at_least,
    at_most,
    claim,
    equal,
    play,
    relative_difference,
    rounding,
    run_official,
)
from saccade.claims.framework.oracles import cut_windows, dense_attention
from saccade.errors import InputError
from saccade.measure import count_flops, count_parameters
from saccade.mixers import HaloAttention
from saccade.mixers.mixer import split_heads
from saccade.ops import Halo, Neighborhood, sparse_attention

PAPER = Paper(
    title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    arxiv="2103.12731",
    published="2021-03-23",
    summary="Local self-attention is made fast by letting all queries of a block share one window of keys, the block "
    "and a halo around it; the same layer halves the map when it keeps every second query. A family of residual "
    "networks, H0 to H7, has it in place of every 3 x 3 convolution, so parameters do not grow with the window.",
    home=("saccade.mixers.HaloAttention", "saccade.ops.Halo", "saccade.ops.QueryTables"),
    missing=("the networks H0 to H7, and timm's variants of them",),
    differences=(
        "The authors published no code: replay follows timm's HaloAttn, which the recorded cases come from.",
        "timm does not scale the position term by default, and neither do we; scale_position=True is its "
        "scale_pos_embed, which scales products and position term together.",
        "timm refuses a map that the block does not divide; ours has smaller blocks at the end.",
        "Our projections are linear layers where timm has 1 x 1 convolutions of the same weights.",
    ),
)

LAYER = "the layer's definition"


@claim("params", 1, source=LAYER)
def parameters_do_not_depend_on_block_and_halo() -> int:
    """Parameters do not depend on block b and halo h, apart from the position tables, 2 (2 (b + 2 h) - 1) d: the
    number of different counts over six pairs of b and h."""
    counts = set()
    for block, halo in [(1, 0), (4, 0), (4, 3), (8, 3), (8, 4), (14, 2)]:
        layer = HaloAttention(64, 4, block_size=block, halo_size=halo)
        counts.add(count_parameters(layer) - 2 * (2 * (block + 2 * halo) - 1) * 16)
    return len(counts)


@claim(
    "params",
    {"H0": 5.5, "H1": 8.1, "H2": 9.4, "H4": 19.1, "H5": 30.7, "H6": 43.4, "H7": 67.4},
    source="table of the family, recalled",
    needs="the networks H0 to H7, which saccade does not have yet",
)
def the_family_has_its_sizes() -> None:
    """H0 to H7 have so many million parameters."""


@claim("equivalence", "equal", rounding, source=LAYER)
def without_a_halo_it_is_window_attention() -> float:
    """With h = 0 and tables of zeros it is attention inside non-overlapping windows."""
    layer, x = _without_position(block_size=4, halo_size=0), _random_map(8, 12)
    query, key, value = (cut_windows(t, 4) for t in _project(layer, x))
    windows = F.scaled_dot_product_attention(query, key, value)
    return relative_difference(cut_windows(split_heads(layer(x), 4), 4), windows)


@claim("equivalence", "equal", rounding, source=LAYER)
def one_block_is_global_attention() -> float:
    """With b = H = W, h = 0 and tables of zeros it is global attention."""
    layer, x = _without_position(block_size=8, halo_size=0), _random_map(8, 8)
    return relative_difference(split_heads(layer(x), 4), dense_attention(*_project(layer, x)))


@claim("equivalence", "equal", rounding, source=LAYER)
def blocks_of_one_pixel_slide() -> float:
    """With b = 1 and tables of zeros every pixel attends to the window of 2 h + 1 around it, zeros outside the map."""
    layer, x = _without_position(block_size=1, halo_size=2), _random_map(6, 7)
    query, *keys_and_values = _project(layer, x)
    key, value = (  # (B heads, H W, 25, D)
        F.unfold(t.movedim(-1, 2).flatten(0, 1), 5, padding=2).unflatten(1, (-1, 25)).permute(0, 3, 2, 1)
        for t in keys_and_values
    )
    slid = F.scaled_dot_product_attention(query.flatten(0, 1).flatten(1, 2).unsqueeze(2), key, value)
    return relative_difference(split_heads(layer(x), 4).flatten(0, 1).flatten(1, 2), slid.squeeze(2))


@claim("flops", {"keys": 196, "FLOPs": 4 * 196 * 64}, source="cost of the layer, recalled")
def products_of_a_query() -> dict[str, int]:
    """A query of b = 8, h = 3 has (b + 2 h)^2 = 196 keys, and its two products take 4 (b + 2 h)^2 c FLOPs (c = 64),
    counted while the layer's attention runs."""
    pattern = Halo(8, 3, padded=True)
    return {"keys": pattern.num_visible((32, 32)) // 32**2, "FLOPs": _count_products(pattern, (32, 32)) // 32**2}


@claim(
    "complexity",
    {"blocks": 3.06, "pixels": 196.0},
    equal("two decimals are published", within=0.005),
    source="cost of the layer, recalled",
)
def copies_of_keys() -> dict[str, float]:
    """The keys that are extracted for all blocks of b = 8, h = 3 take ((b + 2 h) / b)^2 = 3.06 times the map's memory;
    a window of the same size for each pixel takes 196 times."""
    blocks = Halo(8, 3, padded=True).plan((32, 32)).groups[0].key
    return {"blocks": blocks.numel() / 32**2, "pixels": Neighborhood(14).num_visible((32, 32)) / 32**2}


@claim("property", "equal", rounding, source=LAYER)
def equivariant_to_shifts_by_blocks() -> float:
    """A map with a wide margin of zeros, shifted by b, gives the shifted output, position tables included."""
    return _shift_error(block=4, shift=4)


@claim("property", "not equal", at_least(0.01, "rounding is 1e-16, a weight that matters 0.1"), source=LAYER)
def not_equivariant_to_other_shifts() -> float:
    """Shifted by 1, with b = 4, it does not."""
    return _shift_error(block=4, shift=1)


@claim("property", "equal", rounding, source=LAYER)
def pixel_windows_are_equivariant_to_every_shift() -> float:
    """With b = 1, local attention for each pixel, a shift by 1 gives the shifted output."""
    return _shift_error(block=1, shift=1)


@claim("flops", 0.25, source="attention down-sampling, recalled")
def strided_attention_does_a_quarter_of_the_products() -> float:
    """Attention of stride 2 takes a quarter of the products of attention with all queries, which are then pooled."""
    strided = _count_products(Halo(8, 3, padded=True, query_stride=2), (16, 16))
    return strided / _count_products(Halo(8, 3, padded=True), (32, 32))


@claim("property", 0, source=LAYER)
def receptive_field_is_the_block_and_its_halo() -> int:
    """The gradient of an output by the input is non-zero exactly on the output's block enlarged by h: the number of
    pixels, over all outputs, where it is not so."""
    layer, x = HaloAttention(8, 2, block_size=4, halo_size=2).double(), _random_map(12, 8, dim=8).requires_grad_()
    out = layer(x).sum(-1)
    wrong = 0
    for row in range(12):
        for column in range(8):
            reached = torch.autograd.grad(out[0, row, column], x, retain_graph=True)[0][0].abs().sum(-1) > 0
            expected = torch.zeros(12, 8, dtype=torch.bool)
            top, left = row // 4 * 4, column // 4 * 4
            expected[max(top - 2, 0) : top + 6, max(left - 2, 0) : left + 6] = True
            wrong += int((reached != expected).sum())
    return wrong


@claim(
    "accuracy",
    {"H7": 84.9, "H0": 77.9},
    source="table of the family, recalled; ImageNet top-1",
    needs="ImageNet, and the networks H0 to H7, which saccade does not have yet",
)
def accuracy_rises_with_the_window() -> None:
    """Accuracy rises with the size of the window and saturates; H7 reaches 84.9 % at 67.4 million parameters."""


@claim(
    "accuracy",
    "1.07 (chance) without a halo",
    at_least(0.8, "chance is 1, the variance of the target; single settings differ"),
    source="an experiment of ours with timm's layer",
    slow=True,
)
def without_a_halo_no_block_sees_its_neighbour() -> float:
    """Trained to copy the pixel three columns to the left, a layer of 4 x 4 blocks without a halo stays at chance in
    the columns whose source is in another block: their mean squared error."""
    from_other_blocks = torch.arange(3, 16) % 4 < 3
    return _train_to_copy(halo=0)[from_other_blocks].mean().item()


@claim(
    "accuracy",
    "below 1e-6 in every column with h = 3",
    at_most(0.01, "a hundredth of chance; how far 200 steps get depends on the seed"),
    source="an experiment of ours with timm's layer",
    slow=True,
)
def a_halo_sees_its_neighbour() -> float:
    """With a halo of three the same layer learns to copy in every column: the largest mean squared error of one."""
    return _train_to_copy(halo=3).max().item()


def replay(case: Case) -> dict[str, Tensor]:
    """timm's HaloAttn: channels first, 1 x 1 convolutions, one table for rows and one for columns."""
    if "HaloAttn" not in case.cls:
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: whole networks come with the backbones")
    layer = case.build(_from_timm)

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {
            name.replace("pos_embed.height_rel", "tables.0").replace("pos_embed.width_rel", "tables.1"): (
                tensor.flatten(1) if name in ("q.weight", "kv.weight") else tensor
            )
            for name, tensor in state.items()
        }
        return {"y": run_official(layer, renamed, inputs["x"].movedim(1, -1)).movedim(-1, 1)}

    return play(case, forward)


def _from_timm(
    dim: int,
    dim_out: int | None = None,
    feat_size: object = None,
    stride: int = 1,
    num_heads: int = 8,
    dim_head: int | None = None,
    block_size: int = 8,
    halo_size: int = 3,
    qk_ratio: float = 1.0,
    qkv_bias: bool = False,
    avg_down: bool = False,
    scale_pos_embed: bool = False,
) -> HaloAttention:
    """The layer with the arguments of timm's HaloAttn."""
    dim_out = dim_out or dim
    return HaloAttention(
        dim,
        num_heads,
        block_size=block_size,
        halo_size=halo_size,
        stride=stride,
        avg_down=avg_down,
        dim_out=dim_out,
        dim_head=dim_head or _divisible_by_8(dim_out * qk_ratio) // num_heads,
        qkv_bias=qkv_bias,
        scale_position=scale_pos_embed,
        out_proj=False,
    )


def _divisible_by_8(channels: float) -> int:
    """timm's rounding to a multiple of 8 that is at least 8 and loses at most a tenth."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def _random_map(height: int, width: int, dim: int = 32) -> Tensor:
    return torch.randn(2, height, width, dim, dtype=torch.float64)


def _without_position(block_size: int, halo_size: int) -> HaloAttention:
    """A layer of 32 channels and 4 heads whose position tables are 0."""
    layer = HaloAttention(32, 4, block_size=block_size, halo_size=halo_size, out_proj=False).double()
    for table in layer.tables:
        torch.nn.init.zeros_(table)
    return layer


def _project(layer: HaloAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a layer, (B, heads, H, W, D)."""
    key, value = split_heads(layer.kv(x), 4).chunk(2, -1)
    return split_heads(layer.q(x), 4), key, value


def _count_products(pattern: Halo, space: tuple[int, int]) -> int:
    """FLOPs of attention with 4 heads of 16 channels, as it runs."""
    query, key = (torch.randn(1, 4, *axes, 16) for axes in (space, pattern.key_space(space)))
    return count_flops(lambda: sparse_attention(query, key, key, pattern)).total


def _shift_error(block: int, shift: int) -> float:
    """How much the output of a shifted map differs from the shifted output of the map."""
    layer = HaloAttention(16, 2, block_size=block, halo_size=2).double()
    x = F.pad(_random_map(4, 4, dim=16), (0, 0, 8, 8, 8, 8))
    return relative_difference(layer(x.roll((shift, shift), (1, 2))), layer(x).roll((shift, shift), (1, 2)))


def _train_to_copy(halo: int) -> Tensor:
    """Train a layer to copy the pixel three columns to the left; mean squared errors of columns 3 to 15 at the end."""
    layer = HaloAttention(8, 4, block_size=4, halo_size=halo, dim_head=16, qkv_bias=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
    for _ in range(200):
        x = torch.randn(16, 16, 16, 8)
        error = (layer(x) - x.roll(3, 2))[:, :, 3:].square()
        optimizer.zero_grad()
        error.mean().backward()
        optimizer.step()
    return error.detach().mean((0, 1, 3))
