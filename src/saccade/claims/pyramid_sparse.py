"""Pyramid sparse attention: importance decides how coarsely a block of keys is read, before it is skipped."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade.claims.framework import (
    Case,
    Paper,
    at_most,
    claim,
    equal,
    play,
    relative_difference,
    rounding,
)
from saccade.claims.framework.oracles import dense_attention, random_inputs
from saccade.claims.framework.photo import photo_tokens, project_alike
from saccade.errors import InputError
from saccade.measure import count_flops
from saccade.ops import (
    block_importance,
    gilbert_order,
    pyramid_attention,
    pyramid_density,
    pyramid_levels,
    reorder,
    similar_levels,
)

PAPER = Paper(
    title="PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation",
    arxiv="2512.04025",
    published="2025-12-03",
    summary="Block-sparse attention that does not only keep or drop a block of keys and values: by its estimated "
    "importance to a block of queries it is read token by token, as means of 2, 4 or 8 neighbours, or skipped. The "
    "log of what a mean stands for is added to its logit. A fixed budget so covers far more of a sequence.",
    home=(
        "saccade.mixers.PyramidSparseAttention",
        "saccade.ops.pyramid_attention",
        "saccade.ops.pyramid_levels",
        "saccade.ops.gilbert_order",
    ),
    missing=(
        "the video models in which it was measured, and their schedule of dense steps",
        "orders of tokens by clusters of their features, which official code offers beside the curve",
    ),
    differences=(
        "Official code repeats the last token until its block is full, and the copies are seen above level 1; ours "
        "does so with replicate=True. By default a group at the end has fewer tokens and weighs less, so that the "
        "result is dense attention to repeated means for any length.",
        "Official code estimates importance from a random quarter of the tokens; ours from all, or with sample=0.25.",
        "With levels by count official code may leave a query without keys; ours keeps the share least=0.06 at level "
        "1, as both do with levels by mass, unless least=None.",
        "Official code encodes levels also as lists of block numbers for its kernels; replay makes them.",
        "The released kernel merges two pooled blocks into a tile, which is too few for blocks of 64 and 32 at "
        "levels 4 and 8; read in the code, and not copied.",
    ),
)

DEFINITION = "the operator's definition"
CONFIGURATION = "attention_config.yaml of the repository"
EXPERIMENT = "an experiment that the paper's claim suggests"
COUNT = {1: 0.10, 2: 0.15, 4: 0.15, 8: 0.35}
MASS = {1: 0.4, 2: 0.5, 4: 0.6, 8: 0.8}
BLOCK = 16


@claim("equivalence", "equal to 1e-6", rounding, source=DEFINITION)
def level_one_everywhere_is_dense_attention() -> dict[str, float]:
    """With level 1 for all pairs of blocks it is softmax attention over all tokens, also under a causal mask."""
    query, key, value = random_inputs(70)
    levels = torch.ones(2, 1, 5, 5, dtype=torch.long)
    return {
        name: relative_difference(
            pyramid_attention(query, key, value, levels, BLOCK, BLOCK, causal=causal),
            dense_attention(query, key, value, causal=causal),
        )
        for name, causal in (("all", False), ("causal", True))
    }


@claim("equivalence", "equal to 1e-5", rounding, source=DEFINITION)
def a_level_is_attention_to_repeated_means() -> float:
    """A block at level l counts as if its keys and values were replaced by the means of l neighbours, each l times:
    random mixtures of all levels, and blocks that are skipped, against dense attention for each block of queries."""
    query, key, value = random_inputs(70)
    levels = torch.tensor([0, 1, 2, 4, 8])[torch.randint(5, (1, 1, 5, 5))].expand(2, -1, -1, -1)
    parts = []
    for row, asked in enumerate(query.split(BLOCK, 2)):
        seen = [(level, number) for number, level in enumerate(levels[0, 0, row].tolist()) if level]
        keys, values = (
            torch.cat([_repeat_means(x.split(BLOCK, 2)[number], level) for level, number in seen], 2)
            for x in (key, value)
        )
        parts.append(dense_attention(asked, keys, values))
    return relative_difference(pyramid_attention(query, key, value, levels, BLOCK, BLOCK), torch.cat(parts, 2))


@claim("equivalence", "equal", rounding, source=DEFINITION)
def constant_groups_lose_nothing() -> float:
    """Where keys and values are constant in aligned groups of 8, any mixture of levels 1 to 8 is dense attention."""
    query, key, value = random_inputs(64)
    key, value = (x[:, :, ::8].repeat_interleave(8, 2) for x in (key, value))
    levels = torch.tensor([1, 2, 4, 8])[torch.randint(4, (2, 3, 4, 4))]
    out = pyramid_attention(query, key, value, levels, BLOCK, BLOCK)
    return relative_difference(out, dense_attention(query, key, value))


@claim("property", {"attention": 0, "levels": 0}, source=DEFINITION)
def no_causal_output_depends_on_later_tokens() -> dict[str, int]:
    """In the causal form attention looks at no later token, a mean of keys counting as its last one, and the levels of
    a block at no later block: of 63 queries, those whose output changes when all later tokens do at given levels; and
    of 7 blocks, those whose output changes when all later blocks do, levels and all."""
    inputs = random_inputs(64)

    def assign(query: Tensor, key: Tensor) -> Tensor:
        return pyramid_levels(block_importance(query, key, 8, 8, causal=True), MASS, causal=True)

    def attend(inputs: Sequence[Tensor], levels: Tensor) -> Tensor:
        query, key, value = inputs
        return pyramid_attention(query, key, value, levels, 8, 8, causal=True)

    levels = assign(*inputs[:2])
    before, changed = attend(inputs, levels), {"attention": 0, "levels": 0}
    for place in range(1, 64):
        later = (torch.arange(64) >= place).view(-1, 1)
        moved = [x + later * torch.randn_like(x) for x in inputs]
        given = {"attention": levels} if place % 8 else {"attention": levels, "levels": assign(moved[0], moved[1])}
        for name, each in given.items():
            same = torch.allclose(attend(moved, each)[:, :, :place], before[:, :, :place])
            changed[name] += int(not same)
    return changed


@claim(
    "complexity",
    {"plug-in, CogVideoX-5B": 0.15, "CogVideoX-5B in 4 steps": 0.15},
    equal("published as 85 % sparsity, in whole per cent, and the levels are whole blocks", within=0.0075),
    source=CONFIGURATION,
)
def shares_of_blocks_give_the_published_sparsity() -> dict[str, float]:
    """The density, the mean of 1 / level, that the published ranges give to rows of 400 blocks."""
    ranges = {
        "plug-in, CogVideoX-5B": COUNT,
        "CogVideoX-5B in 4 steps": {1: 0.05, 2: 0.15, 4: 0.25, 8: 0.5},
    }
    importance = torch.rand(1, 1, 4, 400)
    return {
        name: pyramid_density(pyramid_levels(importance, ends, by="count", least=None, tiles=4)).item()
        for name, ends in ranges.items()
    }


@claim(
    "complexity",
    {"attention over density": 1.0, "importance": 1 / 16},
    equal("pooling keys and values is linear in their number", relative=0.02),
    source=DEFINITION,
)
def cost_follows_the_density() -> dict[str, float]:
    """Counted FLOPs of attention at levels by count over those of dense attention, divided by the density; and those of
    importance from a quarter of the tokens over those of all logits (4096 tokens, blocks of 64, 32 channels)."""
    query, key = torch.randn(2, 1, 2, 4096, 32)
    importance = block_importance(query, key, 64, 64, sample=0.25)
    levels = pyramid_levels(importance, COUNT, by="count")
    dense = count_flops(lambda: dense_attention(query, key, key)).total
    counted = count_flops(pyramid_attention, query, key, key, levels, 64, 64).total
    estimate = count_flops(lambda: block_importance(query, key, 64, 64, sample=0.25)).total
    return {
        "attention over density": counted / dense / pyramid_density(levels).item(),
        "importance": estimate / (dense / 2),
    }


@claim("property", {"raster": 0.50, "Gilbert": 0.26}, at_most(0.9, "clearly lower"), source=EXPERIMENT, slow=True)
def levels_lose_less_than_keeping_or_dropping() -> dict[str, float]:
    """At equal density its output is nearer to that of dense attention than with the most important blocks kept and
    all others dropped (9 of 64, 0.141 against 0.143): the ratio of the relative errors, on the patches of a photo (64 x
    64 tokens in blocks of 64, by count). Published are those of a first run on another photo, with another estimate."""
    errors = _photo_errors()
    return {order: errors[order]["pyramid"] / errors[order]["binary"] for order in ("raster", "Gilbert")}


@claim("property", {"pyramid": 0.32, "binary": 0.61}, at_most(0.9, "clearly lower"), source=EXPERIMENT, slow=True)
def blocks_along_the_curve_lose_less() -> dict[str, float]:
    """With tokens along the Gilbert curve the error is lower than row by row: the ratio of the relative errors."""
    errors = _photo_errors()
    return {name: errors["Gilbert"][name] / errors["raster"][name] for name in ("pyramid", "binary")}


@claim("property", {"raster": 0.46, "Gilbert": 0.35}, at_most(0.99, "lower"), source=EXPERIMENT, slow=True)
def reading_the_rest_at_level_eight_loses_less_than_skipping_it() -> dict[str, float]:
    """The relative error with the least important blocks at level 8, over that with these skipped."""
    errors = _photo_errors()
    return {order: each["none skipped"] / each["pyramid"] for order, each in errors.items()}


@claim("property", {"mass": True, "count": 0}, source="thresholdbound and topk")
def peaked_rows_take_fewer_fine_blocks_by_mass() -> dict[str, Any]:
    """Where importance is peaked, levels by mass have fewer blocks at level 1 than where it is flat; by count they have
    as many: the difference of peaked and flat rows of 48 blocks."""
    flat = torch.linspace(1, 2, 48)
    importance = torch.stack([flat, flat**8]).view(1, 1, 2, 48)
    fine = {by: (pyramid_levels(importance, MASS, by=by) == 1).sum(-1).flatten() for by in ("mass", "count")}
    return {
        "mass": bool(fine["mass"][1] < fine["mass"][0]),
        "count": int(fine["count"][1] - fine["count"][0]),
    }


@claim("property", (0, 0), source="rearranger of the repository")
def the_curve_visits_every_token_and_steps_to_neighbours() -> tuple[int, int]:
    """The Gilbert curve through a box of 13 x 30 x 45 tokens (CogVideoX) misses none; through one of 12 x 30 x 44,
    whose sides are even, it steps to a neighbour every time: tokens missed, and other steps."""
    visited = gilbert_order((13, 30, 45)).unique()
    places = torch.stack(torch.unravel_index(gilbert_order((12, 30, 44)), (12, 30, 44)))
    return 13 * 30 * 45 - len(visited), int((places.diff().abs().sum(0) != 1).sum())


@claim(
    "accuracy",
    {"PSA, 4 steps": 0.826, "full, 50 steps": 0.819, "full, 4 steps": 0.818},
    source="README of the repository; VBench of CogVideoX-5B at 85 % sparsity",
    needs="CogVideoX-5B, its distilled weights, VBench, and a GPU",
)
def videos_stay_as_good() -> None:
    """VBench scores of CogVideoX-5B with and without it."""


def replay(case: Case) -> dict[str, Tensor]:
    """Levels in both encodings and their density, the cap by similarity, and the order of tokens along the curve."""
    if "transfer_attn_to_mask" not in case.cls:
        raise InputError(
            f"{case.key}/{case.name} is a case of {case.cls}: replay knows transfer_attn_to_mask, the key "
            "similarity and the Gilbert order, which are recorded in one file"
        )

    def forward(_: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: _output(case, name.removeprefix("out."), inputs) for name in _names(case)}

    return play(case, forward)


def _names(case: Case) -> list[str]:
    return [name.removeprefix("out.") for name in case.expected]


def _output(case: Case, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
    args = case.args
    if name == "ksim":
        bounds = dict(zip((2, 4, 8), args["similarity thresholds 2x,4x,8x"]))
        return similar_levels(inputs["k"], args["block"], bounds).int()
    if name == "gilbert_order":
        return gilbert_order(tuple(args["grid width,height,depth"])[::-1]).int()
    kind, _, mode = name.partition("_")
    listed = mode.endswith(("_new", "_newtype"))
    mode = mode.removesuffix("_new").removesuffix("_newtype").replace("tb", "thresholdbound")
    if kind not in ("mask", "density") or f"mask_ratios_{mode}" not in args:
        raise InputError(
            f"{case.key}/{case.name} has an output {name!r}: replay knows masks and densities of the modes "
            "whose mask_ratios are recorded"
        )
    levels = _assign(inputs["attn"], mode, args, listed)
    if kind == "density":
        return pyramid_density(levels)
    return (_list_blocks(inputs["attn"], levels) if listed else levels).int()


def _assign(importance: Tensor, mode: str, args: Mapping[str, Any], listed: bool) -> Tensor:
    """The official assignment: topk has no least share, and lists of blocks do not know of text."""
    ends = {int(level): bounds[1] for level, bounds in args[f"mask_ratios_{mode}"].items()}
    text = 0 if listed else -(-args.get("text_length", 0) // args["block"])
    return pyramid_levels(
        importance,
        ends,
        by="count" if mode == "topk" else "mass",
        least=None if mode == "topk" else args.get("min_full_attn_ratio", 0.06),
        tiles=args["block"] // args["tile"],
        full_blocks=text,
    )


def _list_blocks(importance: Tensor, levels: Tensor) -> Tensor:
    """(B, heads, T, M + 5): the blocks of levels 1, 2, 4, 8 and 0, the most important first, each list ended by -1."""
    order = importance.sort(dim=-1, descending=True, stable=True).indices
    rows = []
    for blocks, level in zip(order.flatten(0, 2).tolist(), levels.flatten(0, 2).tolist()):
        rows.append([b for kind in (1, 2, 4, 8, 0) for b in (*(b for b in blocks if level[b] == kind), -1)])
    return torch.tensor(rows).view(*levels.shape[:3], -1)


def _repeat_means(x: Tensor, size: int) -> Tensor:
    """Each token replaced by the mean of its group of so many neighbours."""
    return torch.cat([group.mean(2, keepdim=True).expand_as(group) for group in x.split(size, 2)], 2)


def _photo_errors() -> dict[str, dict[str, float]]:
    """Relative errors of the output, by the order of the tokens and what is done with blocks of less importance."""
    query, key, value = (x.flatten(2, -2) for x in project_alike(photo_tokens()[None, 4:68, 20:84]))
    inputs = query, key, value, dense_attention(query, key, value)
    errors = {}
    for name, order in {"raster": torch.arange(64**2), "Gilbert": gilbert_order((64, 64))}.items():
        query, key, value, expected = (reorder(x, order) for x in inputs)
        importance = block_importance(query, key, 64, 64)
        levels = pyramid_levels(importance, COUNT, by="count")
        density = pyramid_density(levels).item()
        assigned = {
            "pyramid": levels,
            "binary": pyramid_levels(importance, {1: round(density * 64) / 64}, by="count"),
            "none skipped": levels.masked_fill(levels == 0, 8),
        }
        outs = {kind: pyramid_attention(query, key, value, each, 64, 64) for kind, each in assigned.items()}
        errors[name] = {kind: ((out - expected).norm() / expected.norm()).item() for kind, out in outs.items()}
    return errors
