"""PAROAttention: heads read the axes of a video in orders of their own, in which their maps fall into blocks."""

from functools import lru_cache

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
)
from saccade.claims.framework.oracles import dense_attention, random_inputs
from saccade.errors import InputError
from saccade.measure import count_flops
from saccade.ops import (
    axis_order,
    axis_orders,
    block_incoherence,
    choose_axis_order,
    pool_attention,
    quantize_blocks,
    reorder,
    restore,
    select_mask,
    select_top_k,
    sparse_attention,
    static_blocks,
)

PAPER = Paper(
    title="PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual Generation "
    "Models",
    arxiv="2506.16054",
    published="2025-06-19",
    summary="Maps of video models show stripes and diagonals because tokens stand in the order frame, row, column. "
    "Each head gets, from a few inputs and once and for all, the order of the axes in which its map falls into even "
    "blocks; blocks that hold little are then left out, and the others rounded to 8 or 4 bits, at hardly any loss.",
    home=(
        "saccade.mixers.ReorderedAttention",
        "saccade.ops.choose_axis_order",
        "saccade.ops.static_blocks",
        "saccade.ops.quantized_attention",
    ),
    missing=(
        "the video models, and blocks for each of their time steps, the first of which may stay dense (recalled)",
        "integer kernels: rounding is simulated in floats",
    ),
    differences=(
        "How the choice weighs empty blocks against even ones, and from which sum a block counts as empty, is recalled "
        "and not in the official code: both are arguments of choose_axis_order, with defaults of ours.",
        "The official simulation masks weights after the softmax; its kernels, and ours, leave blocks out before it.",
        "How values are scaled when rounded is not known: each channel shares a scale here.",
    ),
)

ABSTRACT = "abstract"
CODE = "official code"
EXPERIMENT = "an experiment on maps made by hand, whose figures depend on how wide the heads are"
PLANS = ((0, 1, 2), (0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 1, 0), (2, 0, 1))
"""Numbers of official code: FHW, FWH, HWF, HFW, WHF and WFH."""
NAMES = dict(zip(("FHW", "FWH", "HWF", "HFW", "WHF", "WFH"), PLANS))
VIDEO, BLOCK, DENSITY = (8, 12, 12), 48, 0.2
HEADS = {"temporal": (0.02, 2, 2), "row": (2, 2, 0.02), "frame": (2, 0.02, 0.02), "local": (0.5, 0.5, 0.5)}
"""Heads made by hand: how fast attention falls with the squared distance in time, height and width."""
RIGHT_AND_WRONG = {"temporal": ("HWF", "FHW"), "row": ("FHW", "WHF"), "frame": ("FHW", "HWF")}
"""Orders that suit a head, and that do not."""


@claim("equivalence", "equal to 1e-6", rounding, source="the mechanism")
def orders_do_not_change_attention() -> dict[str, float]:
    """In each of the six orders, and with another one for each head, attention gives after the way back what it gives
    in row-major order."""
    query, key, value = (x.flatten(2, -2) for x in random_inputs(3, 4, 5))
    orders = {name: axis_order((3, 4, 5), axes) for name, axes in NAMES.items()}
    orders["one a head"] = torch.stack(list(orders.values())[1:4])
    full = dense_attention(query, key, value)
    errors = {}
    for name, order in orders.items():
        q, k, v = (reorder(x, order) for x in (query, key, value))
        errors[name] = relative_difference(restore(dense_attention(q, k, v), order), full)
    return errors


@claim("property", (0, 1, 5, 3, 4, 2), source=CODE)
def two_orders_undo_each_other() -> tuple[int, ...]:
    """Orders 2 and 5 are each other's way back, and the other four their own: the number of each one's inverse."""
    return tuple(PLANS.index(tuple(axes.index(axis) for axis in range(3))) for axes in PLANS)


@claim(
    "property",
    {"temporal": 0.995 - 0.581, "row": 0.964 - 0.392, "frame": 0.980 - 0.205},
    at_least(0.2, "a clear gain; the figures depend on the heads"),
    source=EXPERIMENT,
)
def the_right_order_gathers_attention() -> dict[str, float]:
    """The fullest fifth of the blocks holds more in the right order: HWF instead of FHW for a head that looks along
    time, FHW instead of WHF along a row and instead of HWF for one that looks around its own frame. The difference."""
    return {
        head: _held(_map(head), right) - _held(_map(head), wrong) for head, (right, wrong) in RIGHT_AND_WRONG.items()
    }


@claim(
    "property",
    {"temporal": 113 / 20, "row": 140 / 13, "frame": 17.5 / 1.9},
    at_least(2, "clearly lower; the figures depend on the heads"),
    source=EXPERIMENT,
)
def the_right_order_evens_the_blocks() -> dict[str, float]:
    """Of the same pairs of orders, the incoherence of the blocks (max / mean) in the wrong one over the right one."""
    return {
        head: _unevenness(_map(head), wrong) / _unevenness(_map(head), right)
        for head, (right, wrong) in RIGHT_AND_WRONG.items()
    }


@claim(
    "property",
    0.951 - 0.933,
    at_most(0.1, "half of what the other heads gain at least; the figures depend on the head"),
    source=EXPERIMENT,
)
def a_local_head_holds_as_much_in_any_order() -> float:
    """For a head that looks around itself in time and space, what the fullest fifth of the blocks holds hardly depends
    on the order: the difference of the best and the worst of the six."""
    held = [_held(_map("local"), name) for name in NAMES]
    return max(held) - min(held)


@claim("property", 78 / 55, at_least(1.2, "a clear difference; the figures depend on the head"), source=EXPERIMENT)
def its_blocks_are_not_as_even_in_any() -> float:
    """The incoherence of such a head's blocks does depend on the order, so that both have to be scored: the highest of
    the six over the lowest."""
    uneven = [_unevenness(_map("local"), name) for name in NAMES]
    return max(uneven) / min(uneven)


@claim("property", {"temporal": True, "row": True, "frame": True}, source="how heads get their order")
def heads_choose_the_axis_they_look_along() -> dict[str, bool]:
    """The choice gives a head that looks along time an order with time innermost, one that looks along rows the width,
    and one that looks around its frame the frames outermost."""
    chosen = {head: axis_orders(3)[_choose(head)] for head in ("temporal", "row", "frame")}
    return {
        "temporal": chosen["temporal"][-1] == 0,
        "row": chosen["row"][-1] == 2,
        "frame": chosen["frame"][0] == 0,
    }


@claim(
    "property",
    "lower",
    at_most(1, "lower is what is said, and not by how much"),
    source="abstract",
)
def the_right_order_rounds_better() -> dict[str, float]:
    """The relative error of a map rounded in blocks to 8 and to 4 bits, in the right order over the wrong one."""
    ratios = {}
    for head, (right, wrong) in RIGHT_AND_WRONG.items():
        for bits in (8, 4):
            maps = [_ordered(_map(head), name) for name in (right, wrong)]
            errors = [(quantize_blocks(each, (BLOCK, BLOCK), bits) - each).norm().item() for each in maps]
            ratios[f"{head}, {bits} bits"] = errors[0] / errors[1]
    return ratios


@claim("property", "lower", at_most(0.5, "clearly lower"), source=ABSTRACT)
def the_chosen_order_loses_less() -> dict[str, float]:
    """With a fifth of the blocks kept, the error of the output in the chosen order over that in the wrong one."""
    value, ratios = torch.randn(1152, 32, dtype=torch.float64), {}
    for head, (_, wrong) in RIGHT_AND_WRONG.items():
        chosen = axis_orders(3)[_choose(head)]
        errors = []
        for axes in (chosen, NAMES[wrong]):
            order = axis_order(VIDEO, axes)
            weights, moved = _map(head)[order][:, order], value[order]
            blocks = static_blocks(weights[None, None], BLOCK, density=DENSITY)
            kept = weights * blocks[0].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            kept = kept / kept.sum(-1, keepdim=True).clamp(min=1e-300)  # a row may have no block
            errors.append(((kept - weights) @ moved).norm().item())
        ratios[head] = errors[0] / errors[1]
    return ratios


@claim("equivalence", "equal", rounding, source=CODE)
def masking_after_the_softmax_shrinks_the_output() -> float:
    """The official simulation sets weights to 0 after the softmax; its kernel leaves blocks out before. Row by row the
    first is the second times the share of attention that is kept: the relative difference to that."""
    query, key, value = (x.flatten(2, -2) for x in random_inputs(4, 6, 4))
    weights = (query @ key.mT * 8**-0.5).softmax(-1)
    kept = select_mask(static_blocks(weights, 12, density=0.4)[None], query_block=12, key_block=12)
    shown = weights * kept.mask((96,))
    kernel = sparse_attention(query, key, value, kept) * shown.sum(-1, keepdim=True)
    return relative_difference(kernel, shown @ value)


@claim("complexity", {"flops": 0.25, "reordering": 0}, source="cost of the mechanism")
def cost_falls_with_the_density() -> dict[str, float]:
    """Attention costs its density times the full N^2: the share of FLOPs with a quarter of the blocks of every row
    kept. Reordering moves N d numbers and computes nothing: its FLOPs."""
    query, key, value = torch.randn(3, 1, 2, 1024, 16)
    chosen = select_top_k(torch.randn(1, 2, 16, 16), 4, query_block=64, key_block=64)
    full = 2 * 1024**2 * (16 + 16) * 2
    order = torch.stack([axis_order((4, 16, 16), axes) for axes in PLANS[1:3]])
    return {
        "flops": count_flops(lambda: sparse_attention(query, key, value, chosen)).total / full,
        "reordering": count_flops(lambda: restore(reorder(query, order), order)).total,
    }


@claim("property", (0.2, 0.3, 0.5), equal("a whole number of blocks", within=0.002), source="README of the repository")
def densities_are_met() -> tuple[float, ...]:
    """Static blocks are kept at the densities of the benchmarks: measured on random maps of 20 x 20 blocks."""
    weights = torch.rand(2, 1, 160, 160)
    return tuple(static_blocks(weights, 8, density=density).double().mean().item() for density in (0.2, 0.3, 0.5))


@claim(
    "speed",
    (1.9, 2.7),
    source=ABSTRACT + "; end to end, with 20 to 30 % of the blocks and INT8 or INT4",
    needs="the video models, and a GPU with the authors' kernels",
)
def models_get_faster() -> None:
    """Video and image models run between 1.9 and 2.7 times as fast."""


@claim("accuracy", "nearly the same", source=ABSTRACT, needs="the video and image models")
def metrics_are_kept() -> None:
    """The metrics of generated videos and images are nearly those of full attention in full precision."""


@claim("property", "the same", source="abstract, recalled", needs="the video models")
def orders_hold_for_other_inputs() -> None:
    """The order that suits a head is the same for other prompts and at other time steps."""


def replay(case: Case) -> dict[str, Tensor]:
    """The permutation of each head's tokens, and its inverse, of the CogVideoX and Wan processors."""
    if "permutation" not in case.cls:
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: replay knows permutations alone")
    video, text = case.args["frames,height,width"], case.args.get("text tokens (first)", 0)
    tokens = text + torch.Size(video).numel()

    def forward(_: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        plan = inputs["plan"].flatten().tolist()  # of the heads of one layer
        wrong = [number for number in plan if number not in range(len(PLANS))]
        if wrong:
            raise InputError(f"plan holds {wrong[0]}: the orders of a video are numbered 0 to 5")
        order = torch.stack([F.pad(axis_order(video, PLANS[number]) + text, (text, 0)) for number in plan])
        order[:, :text] = torch.arange(text)
        index = torch.arange(tokens, dtype=torch.int32).view(1, 1, -1, 1).expand(-1, len(plan), -1, -1)
        moved = reorder(index, order)
        outputs = {"order": moved, "inverse_applied": restore(moved, order)}
        return {name: output[0, :, :, 0] for name, output in outputs.items()}

    return play(case, forward)


@lru_cache(maxsize=len(HEADS))
def _map(head: str) -> Tensor:
    """(N, N) attention over a video of 8 x 12 x 12: softmax of minus the weighted squared distance, with noise."""
    places = torch.stack(torch.meshgrid(*map(torch.arange, VIDEO), indexing="ij")).flatten(1).double()
    distance = (places.unsqueeze(2) - places.unsqueeze(1)).square()
    noise = torch.randn(1152, 1152, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (0.3 * noise - (torch.tensor(HEADS[head]).view(3, 1, 1) * distance).sum(0)).softmax(-1)


def _ordered(weights: Tensor, name: str) -> Tensor:
    order = axis_order(VIDEO, NAMES[name])
    return weights[order][:, order]


def _held(weights: Tensor, name: str) -> float:
    """Share of attention in the fullest fifth of the blocks."""
    sums = pool_attention(_ordered(weights, name)[None, None], BLOCK).flatten().sort(descending=True).values
    return (sums[: round(DENSITY * len(sums))].sum() / sums.sum()).item()


def _unevenness(weights: Tensor, name: str) -> float:
    return block_incoherence(_ordered(weights, name), BLOCK).item()


def _choose(head: str) -> int:
    return int(choose_axis_order(_map(head)[None, None], VIDEO, block_size=BLOCK).order)
