"""Generalized neighborhood attention: a stride makes a continuum from sliding windows to blocks."""

from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from saccade.claims.framework import (
    Paper,
    at_least,
    at_most,
    claim,
    equal,
    relative_difference,
    rounding,
)
from saccade.claims.framework.experiment import train_on_digits
from saccade.claims.framework.natten import replay
from saccade.claims.framework.oracles import cut_windows, dense_attention, random_inputs
from saccade.mixers import NeighborhoodAttention
from saccade.ops import (
    Halo,
    Neighborhood,
    Window,
    merge_attention,
    softmax_attention,
    sparse_attention,
    tile_bound,
)

__all__ = ["PAPER", "replay"]

PAPER = Paper(
    title="Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
    arxiv="2504.16922",
    published="2025-04-23",
    summary="Neighborhood attention gets a stride: queries are grouped and a group shares the window of its leader, so "
    "that stride 1 slides, a stride as large as the window gives blocks, and HaloNet lies between. A simulator counts "
    "the tiles that a kernel must visit, and so bounds the speed-up that a window, a stride and tiles can have.",
    home=("saccade.ops.Neighborhood", "saccade.mixers.NeighborhoodAttention", "saccade.ops.tile_bound"),
    differences=(
        "The authors' simulator is announced and not released: ours follows their description of it.",
        "NATTEN takes a scale of 0.0 for none given, and so does replay; our functions take it at its word.",
    ),
)


class Row(NamedTuple):
    """A row of the case studies."""

    pattern: Neighborhood
    space: tuple[int, ...]
    query_tile: int | tuple[int, ...]
    key_tile: int | tuple[int, ...]
    bounds: tuple[float, float, float]  # by FLOPs, mean, slowest
    timed: float | None = None  # speed-up of the kernel, where a window slides over an image or a video


FLUX, HUNYUAN = (256, 256), (30, 48, 80)
TABLE = {
    "FLUX s1": Row(Neighborhood(80), FLUX, (16, 8), (16, 8), (10.24, 7.515, 6.649), 6.0),
    "FLUX s1 16x16": Row(Neighborhood(80), FLUX, (16, 16), (16, 8), (10.24, 7.061, 6.095), 5.0),
    "FLUX s16": Row(Neighborhood(80, 16), FLUX, (16, 8), (16, 8), (10.24, 10.24, 10.24)),
    "FLUX s16 16x16": Row(Neighborhood(80, 16), FLUX, (16, 16), (16, 8), (10.24, 10.24, 10.24)),
    "Hunyuan s1": Row(Neighborhood((18, 24, 24)), HUNYUAN, (2, 8, 8), (2, 8, 8), (11.11, 5.44, 3.6), 3.6),
    "Hunyuan s1 4x8x8": Row(Neighborhood((18, 24, 24)), HUNYUAN, (4, 8, 8), (2, 8, 8), (11.11, 5.245, 3.273), 3.2),
    "Hunyuan s16x8x8": Row(
        Neighborhood((18, 24, 24), (16, 8, 8)), HUNYUAN, (4, 8, 8), (2, 8, 8), (11.11, 11.11, 11.11)
    ),
    "1-D s1": Row(Neighborhood(2048), (32768,), 128, 128, (16.0, 15.11, 15.06)),
    "1-D s256": Row(Neighborhood(2048, 256), (32768,), 256, 128, (16.0, 16.0, 16.0)),
}

DEFINITION = "the pattern's definition"
DIGITS = equal("three to four digits are published", relative=1e-3)


@claim("equivalence", "equal", rounding, source=DEFINITION)
def stride_as_large_as_the_window_is_blocked() -> float:
    """With stride = window = b, and b dividing the map, it is attention inside blocks, without a shift."""
    inputs = random_inputs(8, 12)
    query, key, value = (cut_windows(x, 4) for x in inputs)
    blocks = F.scaled_dot_product_attention(query, key, value)
    return relative_difference(cut_windows(sparse_attention(*inputs, Neighborhood(4, stride=4)), 4), blocks)


@claim("equivalence", 0, source=DEFINITION)
def stride_one_is_neighborhood_attention() -> int:
    """With stride 1 a query sees the window of w keys, inside the map, whose centre is nearest to it: pairs, over odd
    windows, where it is not so."""
    wrong = 0
    for window, length in [(1, 5), (3, 7), (5, 5), (7, 20)]:
        place = torch.arange(length)
        centres = torch.arange(window // 2, length - window // 2)
        nearest = centres[(place[:, None] - centres).abs().argmin(1)]
        within = (place - nearest[:, None]).abs() <= window // 2
        wrong += int((Neighborhood(window).mask((length,)) != within).sum())
    return wrong


@claim("equivalence", "equal", rounding, source=DEFINITION)
def whole_windows_are_dense_attention() -> dict[str, float]:
    """With w = L it is dense attention, whatever the stride."""
    inputs = random_inputs(5, 6)
    patterns = {f"stride {stride}": Neighborhood((5, 6), stride) for stride in (1, 3, 5)}
    return {
        name: relative_difference(sparse_attention(*inputs, pattern), dense_attention(*inputs))
        for name, pattern in patterns.items()
    }


@claim("equivalence", "equal", rounding, source=DEFINITION)
def windows_of_one_token_return_the_values() -> float:
    """With w = 1 the output is v."""
    inputs = random_inputs(5, 6)
    return relative_difference(sparse_attention(*inputs, Neighborhood(1)), inputs[2])


@claim("equivalence", 0, source="HaloNet as an instance")
def inner_blocks_are_halo_attention() -> int:
    """With w = b + 2 h and stride b, blocks away from the border see exactly HaloNet's window, for odd and even b: the
    number of pairs where they do not."""
    wrong = 0
    for block, halo in [(4, 2), (5, 2), (6, 1), (3, 3)]:
        length = 6 * block
        differ = Neighborhood(block + 2 * halo, block).mask((length,)) != Halo(block, halo).mask((length,))
        wrong += int(differ[block : length - block].sum())
    return wrong


@claim("property", {"ours": 8, "HaloNet": 6}, source="HaloNet as an instance")
def border_windows_shift_inwards() -> dict[str, int]:
    """At the border the window is shifted inwards and keeps its w keys, where HaloNet has fewer inside the map: keys
    of the first query, b = 4, h = 2."""
    patterns = {"ours": Neighborhood(8, 4), "HaloNet": Halo(4, 2)}
    return {name: int(pattern.mask((16,))[0].sum()) for name, pattern in patterns.items()}


@claim("property", 0, source=DEFINITION)
def every_query_has_the_keys_of_its_group() -> int:
    """Without causality every query has w keys on an axis, and the queries of a stride group have the same: queries,
    over all windows, strides and lengths up to 12, where it is not so."""
    wrong = 0
    for window, stride, length in _shapes():
        mask = Neighborhood(window, stride).mask((length,))
        leader = torch.arange(length) // stride * stride
        wrong += int(((mask.sum(1) != window) | (mask != mask[leader]).any(1)).sum())
    return wrong


@claim("property", 0, source=DEFINITION)
def causal_queries_see_more_the_later_they_stand() -> int:
    """On a causal axis query i of a group that ends with l sees w - (l - i) keys, i + 1 while l < w - 1, and never a
    later key: queries where it is not so."""
    wrong = 0
    for window, stride, length in _shapes():
        mask = Neighborhood(window, stride, causal=True).mask((length,))
        place = torch.arange(length)
        last = (place // stride * stride + stride - 1).clamp(max=length - 1)
        expected = torch.where(last >= window - 1, window - (last - place), place + 1)
        wrong += int(((mask.sum(1) != expected) | mask.triu(1).any(1)).sum())
    return wrong


@claim("equivalence", 0, source=DEFINITION)
def causal_blocks() -> int:
    """With stride = window, causal attention is causal inside blocks: pairs where it is not so."""
    return int((Neighborhood(4, 4, causal=True).mask((12,)) != Window(4).mask((12,)).tril()).sum())


@claim("equivalence", "equal", rounding, source=DEFINITION)
def dilation_is_attention_on_interleaved_maps() -> float:
    """With dilation d each of the d^r interleaved maps attends by itself; where d does not divide the axis they differ
    in size."""
    query, key, value = random_inputs(11, 9)
    dilated = sparse_attention(query, key, value, Neighborhood((3, 4), (1, 2), (3, 2)))
    apart = torch.empty_like(dilated)
    for row, column in product(range(3), range(2)):
        part = (..., slice(row, None, 3), slice(column, None, 2), slice(None))
        apart[part] = sparse_attention(query[part], key[part], value[part], Neighborhood((3, 4), (1, 2)))
    return relative_difference(dilated, apart)


@claim("complexity", (4 * 864 * 35 * 64, 4 * 1728 * 35 * 64), source="complexity of the pattern")
def products_are_linear_in_the_map() -> tuple[int, ...]:
    """The products of visible pairs take 4 N prod(w) n e FLOPs, linear in N at a fixed window: 24 x 36 and 48 x 36
    tokens, w = 5 x 7, n e = 64."""
    return tuple(4 * 64 * Neighborhood((5, 7)).num_visible(space) for space in [(24, 36), (48, 36)])


@claim(
    "theory",
    {name: row.bounds for name, row in TABLE.items()},
    DIGITS,
    source="case studies: layouts, windows and tiles from the official documentation, mean and slowest computed with "
    "NATTEN's masks",
)
def simulated_speed_ups() -> dict[str, tuple[float, ...]]:
    """Bounds of the speed-up over dense attention by FLOPs, prod(L) / prod(w), and by visited tiles, for the mean and
    for the slowest query tile; a stride that fits the tiles reaches the bound by FLOPs."""
    return {name: tuple(tile_bound(*row[:4])) for name, row in TABLE.items()}


@claim("theory", {"FLUX s1": (8.332, 7.758), "Hunyuan s1": (6.872, 5.625)}, DIGITS, source="case studies, computed")
def simulated_speed_ups_with_dynamic_tiles() -> dict[str, tuple[float, ...]]:
    """Key tiles that start where the windows do come closer to the bound by FLOPs: mean and slowest."""
    return {name: tile_bound(*TABLE[name][:4], dynamic=True)[1:] for name in ("FLUX s1", "Hunyuan s1")}


@claim("theory", 0, source="simulator's description")
def tiles_never_beat_flops() -> int:
    """Where the tiles divide the map, the bound by tiles never exceeds the bound by FLOPs, nor the slowest tile the
    mean: windows, strides and tiles where they do."""
    bounds = [
        tile_bound(Neighborhood(window, stride), (length,), query_tile, key_tile)
        for window, stride, length in _shapes()
        for query_tile, key_tile in product((1, 2, 3, 5), (1, 2, 4))
        if length % query_tile == length % key_tile == 0
    ]
    return sum(not bound.slowest <= bound.mean + 1e-9 <= bound.flops + 2e-9 for bound in bounds)


@claim("theory", 0, source="perfect block sparsity")
def strides_that_fit_the_tiles_waste_nothing() -> int:
    """Where the stride is a multiple of the query tile and the key tile divides w and (w - s) / 2, all three bounds
    are equal: cases where they are not."""
    fitting = [(8, 8, 4, 4), (12, 4, 4, 4), (12, 4, 2, 2), (16, 8, 8, 4), (24, 8, 8, 8)]  # w, s, query tile, key tile
    bounds = [tile_bound(Neighborhood(w, s), (96,), query, key) for w, s, query, key in fitting]
    return sum(len(set(bound)) > 1 for bound in bounds)


@claim(
    "theory",
    "within 25 %",
    at_most(1.25, "the simulator knows nothing of a kernel but its tiles"),
    source="kernel timings on H100 and B200 in the official documentation",
)
def the_slowest_tile_predicts_timings() -> dict[str, float]:
    """Where a window slides over an image or a video, the bound by the slowest tile predicts the kernel's speed-up: the
    larger of the two over the smaller."""
    ratios = {name: tile_bound(*row[:4]).slowest / row.timed for name, row in TABLE.items() if row.timed}
    return {name: max(ratio, 1 / ratio) for name, ratio in ratios.items()}


@claim(
    "property",
    {"FLUX": (3.2, 7.515), "64 x 64": (4.0, 8.463)},
    DIGITS,
    source="curse of multi-dimensionality, computed",
)
def one_dimensional_tiles_waste_work() -> dict[str, tuple[float, float]]:
    """Tiles that are rows are worth less than square ones of as many tokens, by the mean: FLUX with 1 x 128 against
    16 x 8, and 64 x 64 tokens with w = 16 and 1 x 64 against 8 x 8."""

    def means(window: int, space: tuple[int, ...], row: tuple[int, ...], square: tuple[int, ...]) -> Any:
        return tuple(tile_bound(Neighborhood(window), space, tile, tile).mean for tile in (row, square))

    return {"FLUX": means(80, FLUX, (1, 128), (16, 8)), "64 x 64": means(16, (64, 64), (1, 64), (8, 8))}


@claim("property", "above 1", at_least(1.5, "a clear reversal"), source="an experiment of ours")
def on_small_maps_rows_may_win() -> float:
    """On 32 x 32 tokens with w = 5 the order reverses: the mean bound of tiles of two rows over that of 8 x 8."""
    rows, squares = (tile_bound(Neighborhood(5), (32, 32), tile, tile).mean for tile in ((2, 32), (8, 8)))
    return rows / squares


@claim("equivalence", "equal", rounding, source="token permutation")
def tiles_and_back_change_nothing() -> float:
    """Tokens in an order that makes tiles contiguous, attended and ordered back give the same result: our tiled engine,
    whose plan is such an order, against the dense mask."""
    inputs, pattern = random_inputs(11, 9), Neighborhood((5, 4), (2, 3), (2, 1))
    dense = dense_attention(*inputs, mask=pattern.mask((11, 9)))
    return relative_difference(sparse_attention(*inputs, pattern, impl="tiled"), dense)


@claim("equivalence", "equal to 1e-6", rounding, source="neighborhood cross-attention")
def parts_merge_through_the_log_sum_exp() -> float:
    """Attention over two sets of keys, merged through the log-sum-exp, is attention over all of them."""
    query, key, value = random_inputs(30)
    parts = zip(key.split(11, 2), value.split(11, 2))
    merged = merge_attention([softmax_attention(query, k, v, return_lse=True) for k, v in parts])
    return relative_difference(merged.out, dense_attention(query, key, value))


@claim(
    "theory",
    {"s 1": (2.25, 1.44), "s 2": (2.25, 1.44), "s 4": (4.0, 4.0), "s 12": (4.0, 4.0)},
    equal("float64", within=1e-9),
    source="an experiment of ours",
)
def tiles_counted_in_the_mask() -> dict[str, tuple[float, float]]:
    """24 x 24 tokens, w = 12, tiles of 4 x 4: mean and slowest bound, counted in the dense mask."""
    bounds = {}
    for stride in (1, 2, 4, 12):
        tiles = Neighborhood(12, stride).mask((24, 24)).view(6, 4, 6, 4, 6, 4, 6, 4)
        visited = tiles.any(7).any(5).any(3).any(1).view(36, 36).sum(1).double()
        bounds[f"s {stride}"] = (36 / visited.mean().item(), 36 / visited.max().item())
    return bounds


@claim("theory", {"s 8": (7.11, 7.11), "s 16": (5.22, 4.0)}, DIGITS, source="an experiment of ours")
def a_larger_stride_is_not_always_better() -> dict[str, tuple[float, ...]]:
    """64 x 64 tokens, w = 24, tiles of 8 x 8: mean and slowest bound of strides 8 and 16."""
    return {f"s {stride}": tile_bound(Neighborhood(24, stride), (64, 64), 8, 8)[1:] for stride in (8, 16)}


@claim(
    "accuracy",
    "hardly changes",
    at_most(0.03, "twice the standard error of the difference of two accuracies of 97 % on 359 images"),
    source="an experiment of ours",
    slow=True,
)
def accuracy_hardly_depends_on_the_stride() -> float:
    """One layer trained on digits (8 x 8 tokens, w = 4) is about as accurate with strides 1, 2 and 4: the largest
    difference."""

    def accuracy(stride: int) -> float:
        return train_on_digits(lambda dim: NeighborhoodAttention(dim, 2, window_size=4, stride=stride))

    accuracies = [accuracy(stride) for stride in (1, 2, 4)]
    return max(accuracies) - min(accuracies)


@claim(
    "speed",
    "28 % to 46 % end to end; 1.3 PFLOP/s in half precision",
    source="abstract",
    needs="a B200 with the authors' kernels, and the networks Cosmos-7B, HunyuanVideo and FLUX",
)
def networks_run_faster_without_training() -> None:
    """Cosmos-7B, HunyuanVideo and FLUX run faster on a B200, without being trained again."""


def _shapes() -> list[tuple[int, int, int]]:
    """All windows, strides and lengths up to 12 that fit."""
    return [(w, s, length) for length in range(1, 13) for w in range(1, length + 1) for s in range(1, w + 1)]
