"""SeerAttention: a small gate learns to predict, from pooled queries and keys, which blocks attention will look at."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.claims.framework import (
    Case,
    Compare,
    Paper,
    at_most,
    claim,
    equal,
    play,
    relative_difference,
    replay_parts,
    rounding,
    run_official,
)
from saccade.claims.framework.oracles import dense_attention, random_inputs
from saccade.claims.framework.photo import photo_tokens, project_alike
from saccade.errors import InputError
from saccade.gates import BlockGate, TokenGate
from saccade.measure import count_flops
from saccade.mixers import SeerAttention
from saccade.ops import (
    Causal,
    block_map,
    block_map_divergence,
    block_means,
    select_gated,
    select_top_k,
    sparse_attention,
)

PAPER = Paper(
    title="SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
    arxiv="2410.13276",
    published="2024-10-17",
    summary="Beside each attention layer a gate pools queries and keys by block, projects them for each head and "
    "predicts the attention map of blocks. It learns from the largest true weight of each pair of blocks while the "
    "model is frozen; then only blocks with a high predicted score are computed, exactly.",
    home=(
        "saccade.mixers.SeerAttention",
        "saccade.gates.BlockGate",
        "saccade.gates.TokenGate",
        "saccade.ops.block_map",
        "saccade.ops.select_gated",
    ),
    missing=("the language models whose gates were trained", "training the gates of SeerAttention-R"),
    differences=(
        "The paper is of causal sequences; our layer also takes maps of two and three axes in blocks along each, "
        "without a mask, and turns blocks and tokens by their place along each axis.",
        "Where no weight is above the threshold ours computes the best block; official code none, as "
        "at_least_one=False does.",
        "The divergence is averaged over all entries, as official code does, and not over rows.",
    ),
)

GATE = "the gate's definition"
README = "README of the repository; MB in bfloat16"
EXPERIMENT = "an experiment that the paper's method suggests"
SIZES = {  # layers, query heads, key heads
    "Llama-3.1-8B": (32, 32, 8),
    "Llama-3.1-70B": (80, 64, 8),
    "Qwen2.5-7B": (28, 28, 4),
    "Qwen2.5-14B": (48, 40, 8),
    "Qwen2.5-32B": (64, 40, 8),
}
DECODE = {"Qwen3-4B": (36, 32, 8), "Qwen3-8B": (36, 32, 8), "Qwen3-14B": (40, 40, 8)}


@claim(
    "params",
    {"Llama-3.1-8B": 101, "Llama-3.1-70B": 503, "Qwen2.5-7B": 77, "Qwen2.5-14B": 189, "Qwen2.5-32B": 252},
    equal("whole MB are published", within=0.5),
    source=README,
)
def gates_have_their_sizes() -> dict[str, float]:
    """The gates of all layers take so many MB: heads of 128 channels, queries pooled once, keys three times."""
    return {
        name: 2e-6 * layers * _count(BlockGate, heads, kv_heads) for name, (layers, heads, kv_heads) in SIZES.items()
    }


@claim(
    "params",
    {"Qwen3-4B": 66.1, "Qwen3-8B": 66.1, "Qwen3-14B": 83.9},
    equal("one decimal is published", within=0.05),
    source=README,
)
def gates_for_decoding_have_their_sizes() -> dict[str, float]:
    """The gates of SeerAttention-R, for single queries and shared by the heads of a group, take so many MB."""
    return {
        name: 2e-6 * layers * _count(TokenGate, heads, kv_heads) for name, (layers, heads, kv_heads) in DECODE.items()
    }


@claim("equivalence", "equal", rounding, source=GATE)
def all_blocks_are_causal_attention() -> dict[str, float]:
    """With all blocks kept, by threshold 0 or by share 1, it is dense causal attention."""
    query, key, value = random_inputs(70)
    scores = BlockGate(8, 3, causal=True).double()(query, key, 16)
    dense = dense_attention(query, key, value, causal=True)
    kept = {"threshold": {"threshold": 0.0}, "share": {"share": 1.0}}
    errors = {}
    for name, options in kept.items():
        chosen = select_gated(scores, causal=True, query_block=16, key_block=16, ragged=True, **options)  # type: ignore[arg-type]
        errors[name] = relative_difference(sparse_attention(query, key, value, chosen & Causal()), dense)
    return errors


@claim("equivalence", "equal", rounding, source=GATE)
def the_target_needs_no_dense_map() -> dict[str, float]:
    """What the gate is taught, made from the largest logits of blocks row by row, is the dense attention map pooled by
    the maximum, each row over its sum; with and without a causal mask."""
    query, key, _ = random_inputs(64)
    errors = {}
    for name, causal in (("all", False), ("causal", True)):
        later = torch.ones(64, 64, dtype=torch.bool).triu(1) & causal
        dense = (query @ key.mT * 8**-0.5).masked_fill(later, -torch.inf).softmax(-1)
        pooled = F.max_pool2d(dense, 16)
        target = block_map(query, key, 16, 16, causal=causal)
        errors[name] = relative_difference(target, pooled / pooled.sum(-1, keepdim=True))
    return errors


@claim(
    "property",
    {f"r = {share}": share for share in (0.1, 0.3, 0.5, 0.7, 0.9)},
    equal("k is rounded down to whole blocks, each of which is up to 2 / n of the triangle", within=2 / 256),
    source="nz_ratio of the repository",
)
def a_share_is_one_of_the_causal_triangle() -> dict[str, float]:
    """With k = (1 - sqrt(1 - r)) n blocks for each row, a share r of the causal triangle of blocks is computed
    (n = 256)."""
    kept = {}
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        chosen = select_gated(torch.randn(1, 1, 256, 256), share=share, causal=True)
        kept[f"r = {share}"] = chosen.used.sum().item() / (256 * 257 / 2)
    return kept


@claim("property", "the gate alone", source=GATE)
def the_loss_reaches_the_gate_alone() -> str:
    """The gradient of the loss is of the gate's parameters, and that of the output of all others."""
    layer, x = SeerAttention(24, 3), torch.randn(1, 16, 16, 24)
    reached = []
    for loss in (layer.distill(x), layer(x).square().sum()):
        layer.zero_grad()
        loss.backward()
        reached.append({name for name, parameter in layer.named_parameters() if parameter.grad is not None})
    gate = {name for name, _ in layer.named_parameters() if name.startswith("gate.")}
    rest = {name for name, _ in layer.named_parameters()} - gate
    return "the gate alone" if reached == [gate, rest] else f"{reached}"


@claim(
    "complexity",
    {"b = 16": 1.0, "b = 64": 1.0},
    equal("a formula of products is exact", relative=1e-9),
    source=GATE,
)
def cost_of_the_gate() -> dict[str, float]:
    """A gate takes 2 n^2 g FLOPs for scores, 1 / b^2 of those of attention's logits, and 2 n 3 d g for projecting keys:
    what is counted over that, for n = 2048 / b blocks."""
    query, key = torch.randn(2, 1, 4, 2048, 32)
    counted = {}
    for block in (16, 64):
        blocks, gate = 2048 // block, BlockGate(32, 4)
        logits = 4 * 2 * 2048**2 * 32
        formula = logits / block**2 + 4 * 2 * blocks * 3 * 32 * 32
        counted[f"b = {block}"] = count_flops(gate, query, key, block).total / formula
    return counted


@claim(
    "property",
    {"divergence over its start": "below 1", "recall over random": "above 1", "recall over pooled": "above 1"},
    Compare(
        "divergence at most 0.8, the others at least 1.1",
        "clear differences; no figures are published",
        lambda measured, _: (
            measured["divergence over its start"] <= 0.8
            and min(measured["recall over random"], measured["recall over pooled"]) >= 1.1
        ),
    ),
    source=EXPERIMENT,
    slow=True,
)
def the_gate_learns_which_blocks_matter() -> dict[str, float]:
    """Trained for 300 steps (Adam, 1e-3) on the left of a photo, on maps of 24 x 24 tokens in blocks of 4 x 4 with
    random projections to similar queries and keys, the gate predicts on the right of it: its divergence over that
    before, and its recall of the true best quarter of blocks over that of random blocks, and of the best by the
    product of mean query and mean key; 4 heads of 32 channels."""
    found = _teach()
    recall = found["recall"]
    return {
        "divergence over its start": found["divergence"]["after"] / found["divergence"]["before"],
        "recall over random": recall["gate"] / recall["random"],
        "recall over pooled": recall["gate"] / recall["pooled"],
    }


@claim(
    "property",
    {"75 %": "oracle, gate, others", "50 %": "oracle, gate, others", "25 %": "oracle, gate, others"},
    source=EXPERIMENT,
    slow=True,
)
def outputs_of_gated_attention_are_nearest_to_dense_ones() -> dict[str, str]:
    """With the same number of blocks (the share that is computed), the output differs least from dense attention where
    the true map chooses, then the taught gate; then random blocks or products of means."""
    order = {}
    for share, errors in _teach()["errors"].items():
        ranked = sorted(errors, key=lambda name: errors[name])
        order[share] = ", ".join([*ranked[:2], "others"])
    return order


@claim(
    "property",
    {"75 %": "below 1", "50 %": "below 1", "25 %": "below 1"},
    at_most(1, "the order that was expected"),
    source="an expectation on the card of the paper; nobody had measured it",
    guess="the mean of 16 tokens hides the one that stands out, and blocks that are chosen by means are alike, so that "
    "what is left out is left out on one side; random blocks are a fair sample of the values. In blocks of 2 x 2 "
    "products of means do better than random ones",
    slow=True,
)
def products_of_means_lose_less_than_random_blocks() -> dict[str, float]:
    """In the same experiment the error with blocks by the product of mean query and mean key, over that with random
    blocks."""
    return {share: errors["pooled"] / errors["random"] for share, errors in _teach()["errors"].items()}


@claim(
    "accuracy",
    "little loss of perplexity",
    source="abstract; 90 % sparsity at 32 thousand tokens after fine-tuning for long contexts",
    needs="Llama-3.1-8B, its gates, and a GPU",
)
def language_models_keep_their_perplexity() -> None:
    """Perplexity with gated attention stays near that of dense attention."""


@claim(
    "speed",
    5.67,
    source="abstract; over FlashAttention-2, 90 % sparsity at 32 thousand tokens",
    needs="a GPU and the authors' kernel",
)
def attention_gets_faster() -> None:
    """How many times faster attention is than FlashAttention-2."""


def replay(case: Case) -> dict[str, Tensor]:
    """AttnGate in all its combinations of pools, and both selections of blocks."""
    if "AttnGate" not in case.cls:
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: replay knows AttnGate alone")
    return replay_parts(case, case.args, _replay_gate) if "gate" not in case.args else _replay_gate(case)


def _replay_gate(case: Case) -> dict[str, Tensor]:
    args, gate = case.args, _build(case)

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        query, key = (inputs[name].transpose(1, 2) for name in "qk")  # recorded as (B, S, heads, d)
        half = inputs["cos"].shape[-1] // 2  # recorded twice, for both halves of the channels
        rotary = tuple(inputs[name][:, None, :, :half] for name in ("cos", "sin"))
        scores = run_official(gate, state, query, key, args["block_size"], rotary)  # type: ignore[arg-type]
        plain = run_official(gate, state, query, key, args["block_size"])
        blocks = scores.shape[-1]
        chosen = {
            "mask_threshold": {"threshold": args["threshold"], "dense_rows": 2, "at_least_one": False},
            "mask_nzratio": {"share": args["nz_ratio"]},
        }
        masks = {
            name: select_gated(scores, causal=True, key_size=(blocks,), **options).pairs((blocks,)).byte()
            for name, options in chosen.items()
        }
        return {
            "score": scores.softmax(-1),
            "score_norope": plain.softmax(-1),
            "logits_masked": scores.clamp(min=-1e30),  # as recorded
            **masks,
        }

    return play(case, forward)


def _build(case: Case) -> BlockGate:
    """The gate with the arguments of AttnGate; its name tells the pools: Qavg_Kmaxminavg."""
    args = case.args
    found = re.fullmatch(r"Q((?:max|min|avg)+)_K((?:max|min|avg)+)", args["gate"])
    if found is None:
        raise InputError(
            f"{case.key}/{case.name} has the gate {args['gate']!r}: replay knows those of pooled queries and keys, "
            "such as Qavg_Kmaxminavg"
        )
    query_pools, key_pools = (
        [pool.replace("avg", "mean") for pool in re.findall("max|min|avg", names)] for names in found.groups()
    )
    return BlockGate(
        args["head_dim"],
        args["q heads"],
        args["kv heads"],
        gate_dim=args["gate_hidden"],
        query_pools=query_pools,
        key_pools=key_pools,
        causal=True,
        force_double=args["force_double"],
    )


def _count(gate: Callable[[int, int, int], nn.Module], heads: int, kv_heads: int) -> int:
    """Parameters of a gate for heads of 128 channels, which is never filled."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in gate(128, heads, kv_heads).parameters())


SHARES = {"75 %": 27, "50 %": 18, "25 %": 9}  # of 36 blocks


@cache
def _teach() -> dict[str, dict[str, Any]]:
    """Teach a gate on the left of a photo, and measure it and what it competes with on the right.

    Random projections differ: with 4 heads the order of all but random and pooled is the same in three runs of three,
    with 2 heads in two.
    """
    tokens = photo_tokens()[..., :24].float()  # the left and the right have no place in common
    photo = project_alike(F.layer_norm(tokens, (24,)).unsqueeze(0), heads=4)

    def cut(count: int, left: int, right: int) -> list[Tensor]:
        places = [(int(torch.randint(48, ())), int(torch.randint(left, right - 23, ()))) for _ in range(count)]
        return [torch.cat([x[:, :, a : a + 24, b : b + 24] for a, b in places]) for x in photo]

    def target(inputs: list[Tensor]) -> Tensor:
        return block_map(inputs[0], inputs[1], 4, 4)

    gate = BlockGate(32, 4)
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-3)
    train, test = cut(48, 0, 74), cut(16, 74, 106)
    taught, truth = target(train), target(test)

    def divergence() -> float:
        with torch.no_grad():
            return block_map_divergence(gate(test[0], test[1], 4), truth).item()

    before = divergence()
    for _ in range(300):
        chosen = torch.randint(48, (4,))
        loss = 10 * block_map_divergence(gate(train[0][chosen], train[1][chosen], 4), taught[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    query_means, key_means = (block_means(x, 4) for x in test[:2])
    scores = {
        "oracle": truth,
        "gate": gate(test[0], test[1], 4).detach(),
        "pooled": query_means @ key_means.mT,
        "random": torch.rand_like(truth),
    }
    best = _best(truth)
    query, key, value = test
    full = dense_attention(query, key, value)
    errors: dict[str, dict[str, float]] = {share: {} for share in SHARES}
    for share, count in SHARES.items():
        for name, each in scores.items():
            out = sparse_attention(query, key, value, select_top_k(each, count, query_block=4, key_block=4))
            errors[share][name] = ((out - full).norm() / full.norm()).item()
    return {
        "divergence": {"before": before, "after": divergence()},
        "recall": {name: (_best(each) & best).sum().item() / best.sum().item() for name, each in scores.items()},
        "errors": errors,
    }


def _best(scores: Tensor) -> Tensor:
    """The best quarter of the blocks of each row."""
    best = scores.topk(scores.shape[-1] // 4, -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
