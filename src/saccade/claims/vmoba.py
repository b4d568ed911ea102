"""VMoBA: queries of a video choose blocks of keys, over whole heads, by a share of similarity."""

from ast import literal_eval
from itertools import pairwise

import torch
from torch import Tensor

from saccade.claims.framework import (
    Case,
    Paper,
    at_least,
    at_most,
    claim,
    play,
    relative_difference,
    rounding,
)
from saccade.claims.framework.oracles import dense_attention, moving_photo, random_inputs
from saccade.errors import InputError
from saccade.measure import count_flops
from saccade.mixers import MixtureOfBlocksAttention
from saccade.ops import choose_blocks, mixture_of_blocks
from saccade.ops.selection import block_order

PAPER = Paper(
    title="VMoBA: Mixture-of-Block Attention for Video Diffusion Models",
    arxiv="2506.23858",
    published="2025-06-27",
    summary="MoBA gives each query a few blocks of keys, chosen by its product with their mean. For video, layers take "
    "turns with blocks of time, of space and of both; pairs of query and block compete over a whole head, and their "
    "number follows from a threshold on the similarity that they add up to.",
    home=(
        "saccade.mixers.MixtureOfBlocksAttention",
        "saccade.ops.choose_blocks",
        "saccade.ops.mixture_of_blocks",
        "saccade.ops.select_similarity_mass",
    ),
    missing=("the video diffusion models in which it was trained",),
    differences=(
        "Where no query chose a block beside its own, official code attends to all; ours does with all_if_none=True.",
        "Official tiles of space must divide the video; ours may be smaller at the end.",
        "Official code packs a batch into one sequence, where the scopes of head and all run over the whole batch; "
        "ours run over one video.",
        "The number on arXiv is recalled, and the date is that of the repository's release.",
    ),
)

DEFINITION = "the operator's definition"
ABSTRACT = "abstract, recalled"
SCOPES = {"query_head": "query", "head_global": "head", "overall": "all", "block": "block"}
VIDEO, BLOCK = (4, 6, 4), (2, 3, 2)  # 8 blocks


@claim("equivalence", "equal to 1e-5", rounding, source=DEFINITION)
def choosing_everything_is_full_attention() -> dict[str, float]:
    """With k = the number of blocks, and with tau = 1 in every scope, it is attention over all tokens."""
    query, key, value = random_inputs(*VIDEO)
    options = {"topk": {"topk": 8}} | {f"tau, {name}": {"mass": 1.0, "scope": scope} for name, scope in SCOPES.items()}
    return {
        name: relative_difference(
            mixture_of_blocks(query, key, value, choose_blocks(query, key, BLOCK, **given)),
            dense_attention(query, key, value),
        )
        for name, given in options.items()
    }


@claim("equivalence", "equal", rounding, source=DEFINITION)
def parts_merge_to_one_masked_softmax() -> dict[str, float]:
    """Attention to the blocks one by one, merged through the log-sum-exp, is one softmax under a mask; and so is the
    causal form, where the own block is a part of its own."""
    video = random_inputs(*VIDEO)
    chosen = choose_blocks(*video[:2], BLOCK)
    query, key, value = (x.flatten(2, -2) for x in video)
    past = choose_blocks(query, key, 20, topk=2, scope="query", causal=True)
    ours = mixture_of_blocks(*video, chosen), mixture_of_blocks(query, key, value, past, causal=True)
    return {
        "video": relative_difference(ours[0], dense_attention(*video, chosen.mask(VIDEO))),
        "causal": relative_difference(ours[1], dense_attention(query, key, value, past.mask((96,)).tril())),
    }


@claim("property", (0, 0, 0), source="layer-wise recurrent partition")
def partitions_tile_the_video() -> tuple[int, ...]:
    """The three partitions, time, space and both, put every token into exactly one block, in an order that can be
    undone: tokens of 4 x 6 x 4 of which that is not so."""
    wrong = []
    for layer in range(3):
        block = MixtureOfBlocksAttention(32, layer=layer, block_size=BLOCK).block(VIDEO)
        order = block_order(VIDEO, block, torch.device("cpu")).flatten()
        wrong.append(int((order[order.argsort()] != torch.arange(96)).sum()))
    return tuple(wrong)


@claim("property", {"query_head": 0.0, "head_global above 0": True}, source="global selection")
def queries_share_the_pairs_unevenly() -> dict[str, float | bool]:
    """With as many pairs in all, each query has the same number when they compete for each query, and queries with
    large products get more when they compete within a head: the variance of blocks per query."""
    query, key, _ = random_inputs(*VIDEO)
    variance = {
        name: choose_blocks(query, key, BLOCK, topk=3, scope=SCOPES[name]).used.sum(-1).double().var().item()
        for name in ("query_head", "head_global")
    }
    return {"query_head": variance["query_head"], "head_global above 0": variance["head_global"] > 0}


@claim("property", "fewer", at_most(0.8, "clearly fewer"), source="threshold selection")
def concentrated_heads_choose_fewer_pairs() -> float:
    """At the same tau, a head in which few pairs have large products selects fewer pairs than a flat one: the pairs of
    a head whose query and block means grow as powers, over those of a head where they are equally spread."""
    spread = torch.linspace(0.1, 1, 8, dtype=torch.float64).repeat_interleave(12).view(1, 1, 96, 1)
    query = torch.cat([spread**4, spread], 1)
    pairs = choose_blocks(query, query, 12, mass=0.5, scope="head").used.sum((0, 2, 3))
    return (pairs[0] / pairs[1]).item()


@claim(
    "complexity",
    "the formula, below full attention",
    at_most(1, "the last of each block's tiles may be partly empty"),
    source=DEFINITION,
)
def cost_follows_the_pairs() -> dict[str, float]:
    """Attention takes 4 c d FLOPs for each pair, those with the own block included, and choosing 2 S C d a head: what
    counting adds to that, in tiles of 64 queries for each block, and all of it over the 4 S^2 d of full attention
    (S = 2048, C = 32 blocks of c = 64, d = 16)."""
    query, key = torch.randn(2, 1, 2, 2048, 16)
    chosen = choose_blocks(query, key, 64, mass=0.1)
    pairs = int(chosen.used.sum())
    counted = count_flops(mixture_of_blocks, query, key, key, chosen).total
    counted += count_flops(lambda: choose_blocks(query, key, 64, mass=0.1)).total
    formula = 4 * 64 * 16 * pairs + 2 * 2 * 2048 * 32 * 16
    tiles = (counted - formula) / (4 * 64 * 16 * 64)
    return {"extra tiles a block": tiles / (2 * 32), "share of full": counted / (2 * 4 * 2048**2 * 16)}


@claim("equivalence", "equal", rounding, source="MoBA")
def causal_choice_of_everything_is_causal_attention() -> float:
    """MoBA with k = the number of blocks is causal attention, also where the last block is smaller."""
    query, key, value = random_inputs(50)
    chosen = choose_blocks(query, key, 16, topk=4, scope="query", causal=True)
    return relative_difference(
        mixture_of_blocks(query, key, value, chosen, causal=True), dense_attention(query, key, value, causal=True)
    )


@claim("property", 0, source="MoBA")
def no_causal_output_depends_on_later_tokens() -> int:
    """In MoBA neither the choice nor the attention of a query looks ahead: outputs that change when all later tokens
    do, for each of 50 queries."""
    query, key, value = random_inputs(50)

    def attend(key: Tensor, value: Tensor) -> Tensor:
        chosen = choose_blocks(query, key, 8, topk=2, scope="query", causal=True)
        return mixture_of_blocks(query, key, value, chosen, causal=True)

    before, changed = attend(key, value), 0
    for place in range(49):
        later = (torch.arange(50) > place).view(-1, 1) * 10.0
        after = attend(key + later * torch.randn_like(key), value + later)
        changed += int(not torch.allclose(after[:, :, : place + 1], before[:, :, : place + 1]))
    return changed


@claim(
    "property",
    "at most that of query_head",
    at_least(0.0, "the order is expected, the size of the difference is not known"),
    source="an experiment that the paper suggests; nobody had measured it",
    guess="a third of the queries get no block beside their own. What all products of a query share counts when "
    "queries compete and cancels in the softmax: with the mean key taken out of all keys half of the gap is gone, in "
    "three runs of three. Long queries are not the cause, for unit queries show the same; the rest is unexplained, and "
    "trained projections may behave otherwise",
    slow=True,
)
def competing_within_a_head_loses_less() -> float:
    """On a photo moving by 4 pixels a frame (8 frames of 16 x 16 patches), with random projections to similar queries
    and keys, attention to equally many pairs differs less from full attention when they compete within a head: the
    relative error of query_head minus that of head_global."""
    query, key, value = moving_photo()
    full = dense_attention(query, key, value)
    error = {
        scope: (
            mixture_of_blocks(query, key, value, choose_blocks(query, key, (2, 4, 4), topk=8, scope=scope)) - full
        ).norm()
        / full.norm()
        for scope in ("query", "head")
    }
    return (error["query"] - error["head"]).item()


@claim(
    "speed",
    {"training": (2.92, 1.48), "inference": (2.4, 1.35)},
    source=ABSTRACT + "; FLOPs and latency, 93 frames at 576 x 1024, 55 thousand tokens",
    needs="the video diffusion models, and a GPU with the authors' kernels",
)
def networks_get_faster() -> None:
    """FLOPs and latency fall by these factors; attention gets faster than full attention above 33 thousand tokens."""


@claim("accuracy", "comparable or better", source=ABSTRACT, needs="trained video diffusion models and VBench")
def quality_is_kept() -> None:
    """Videos are as good as those of full attention."""


def replay(case: Case) -> dict[str, Tensor]:
    """moba_attn_varlen of VMoBA in each kind of selection, its partitions, and MoBA's causal reference."""
    if "moba_attn_varlen" not in case.cls:
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: replay knows moba_attn_varlen alone")
    names = [name.removeprefix("out.") for name in case.expected if name.startswith("out.")]

    def forward(_: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens = [inputs[name] for name in "qkv"]  # (S, heads, d)
        outputs = {name: _attend(case, name, tokens) for name in names if not name.startswith("partition")}
        return outputs | _partitions(case)

    return play(case, forward)


def _attend(case: Case, name: str, tokens: list[Tensor]) -> Tensor:
    """One recorded output, (S, heads, d)."""
    topk, chunk = case.args["topk"], case.args["chunk"]
    if name == "moba_causal":
        ends = case.args["cu_seqlens of moba_causal"]
        parts = zip(*(x.split([b - a for a, b in pairwise(ends)]) for x in tokens))
        options = {"topk": topk, "scope": "query", "causal": True}
        return torch.cat([_attend_sequence(part, chunk, options) for part in parts])
    kind, _, scope = name.partition("_")
    if kind not in ("topk", "threshold") or scope not in SCOPES:
        raise InputError(f"{case.key}/{case.name} has an output {name!r}: replay knows topk_ and threshold_ scopes")
    options = {"topk": topk} if kind == "topk" else {"mass": case.args["simsum_threshold"]}
    return _attend_sequence(tokens, chunk, options | {"scope": SCOPES[scope], "all_if_none": True})


def _attend_sequence(tokens: list[Tensor] | tuple[Tensor, ...], chunk: int, options: dict) -> Tensor:
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in tokens)
    chosen = choose_blocks(query, key, chunk, **options)
    out = mixture_of_blocks(query, key, value, chosen, causal=options.get("causal", False))
    return out.squeeze(0).transpose(0, 1)


def _partitions(case: Case) -> dict[str, Tensor]:
    """The order of the tokens and the length of a block, for each recorded size: of frames (1-D), or of tiles."""
    outputs: dict[str, Tensor] = {}
    space = case.args.get("patch_resolution t,h,w", ())
    for number, text in enumerate(case.args.get("chunk sizes", ())):
        size = literal_eval(text) if isinstance(text, str) else text
        order = torch.arange(torch.Size(space).numel())
        if isinstance(size, tuple):
            blocks = block_order(space, (space[0], *size)[-3:], torch.device("cpu"))
            order, chunk = blocks.flatten(), blocks.shape[1]
        else:
            chunk = int(size * space[1] * space[2])
        outputs |= {f"partition{number}": order.int(), f"partition{number}_chunk": torch.tensor(chunk)}
    return outputs
