"""MoA: every head of a trained model gets a span of its own, by a rule that grows with the length."""

from functools import cache
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor

import saccade
from saccade.claims.framework import Case, Paper, at_most, claim, play, relative_difference, rounding
from saccade.claims.framework.oracles import random_inputs
from saccade.claims.framework.text import CharacterModel, train_on_text
from saccade.errors import InputError
from saccade.mixers import ElasticSpanAttention
from saccade.ops import (
    ElasticSpan,
    assign_spans,
    attention_influence,
    choose_plan,
    softmax_attention,
    span_candidates,
    span_densities,
    span_losses,
    sum_blocks,
)

PAPER = Paper(
    title="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
    arxiv="2406.14909",
    published="2024-06-21",
    summary="Each head of a trained model sees the first tokens and a span before the query that grows with the length "
    "by a rule of its own. The rules are found without training: gradients say what each attention entry is worth, and "
    "an integer program gives each head the rule that loses least within a budget of memory.",
    home=(
        "saccade.mixers.ElasticSpanAttention",
        "saccade.ops.ElasticSpan",
        "saccade.ops.assign_spans",
        "saccade.ops.attention_influence",
    ),
    missing=("a cache for decoding that drops the keys outside the spans", "the language models and their plans"),
    differences=(
        "Official code treats the first query apart, which sees one key alone; ours does so with every such query.",
        "Official plans were solved by a commercial solver; ours are solved by HiGHS, which scipy brings.",
        "Official spans are of sequences; ours are taken along each axis of a map.",
    ),
)

PROFILE = "gradient-based profiling"
DEFINITION = "the rule's definition"
ABSTRACT = "abstract"
EVERYTHING = ElasticSpan(0, 1.0, 4)


@claim("theory", "equal to 1e-5", rounding, source=PROFILE)
def influence_is_the_change_of_a_linear_loss() -> float:
    """For a loss <G, A V> the influence of an entry is exactly what the loss gains when the entry is masked and the row
    renormalised: the largest relative difference over all pairs of 9 causal tokens."""
    query, key, value = random_inputs(9)
    upstream = torch.randn_like(value)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    influence = attention_influence(*_map_and_gradient(query, key, value, upstream), eps=0.0)
    before = softmax_attention(query, key, value, mask=causal)
    changes = torch.zeros_like(influence)
    for i, j in product(range(9), repeat=2):
        if j <= i:
            mask = causal.clone()
            mask[i, j] = False
            out = softmax_attention(query, key, value, mask=mask)
            changes[:, :, i, j] = (upstream * (out - before)).sum((2, 3))
    return relative_difference(influence, changes)


@claim("property", 0, rounding, source=PROFILE)
def weighted_gradients_cancel_in_a_row() -> float:
    """sum_j A_ij (G_ij - sum_n A_in G_in) is 0 for every row: the largest magnitude."""
    attention, grad = _map_and_gradient(*random_inputs(9), torch.randn(2, 3, 9, 8, dtype=torch.float64))
    return (attention * (grad - (attention * grad).sum(-1, keepdim=True))).sum(-1).abs().max().item()


@claim("property", (0, 0, 0), source=DEFINITION)
def longer_spans_keep_more_and_lose_less() -> tuple[int, ...]:
    """Along rules with growing spans the kept blocks are supersets, densities do not fall, and losses, of magnitudes,
    do not rise: pairs of neighbouring rules of the published search space at 8192 tokens where it is not so."""
    rules = sorted(span_candidates(2048, 8192, 16384), key=lambda rule: rule.blocks(8192))
    layouts = [rule.layout(8192) for rule in rules]
    losses = span_losses(torch.rand(3, 128, 128, dtype=torch.float64), rules, 8192)
    densities = span_densities(rules, 8192)
    return (
        sum(bool((small & ~large).any()) for small, large in pairwise(layouts)),
        int((densities.diff() < 0).sum()),
        int((losses.diff() > 1e-9).sum()),
    )


@claim("property", {"uniform": 0, "exhaustive": 0.0}, rounding, source="mixed-integer programming")
def the_best_plan_is_found_and_beats_every_uniform_one() -> dict[str, float]:
    """On random losses of 2 layers of 3 heads with 4 rules: uniform plans within the budget that lose less than the
    assigned plan, in 20 problems, and the largest excess over the best plan of an exhaustive search."""
    beaten, excess = 0, 0.0
    densities = torch.tensor([[0.125, 0.25, 0.5, 0.75]], dtype=torch.float64)
    for _ in range(20):
        losses = torch.rand(1, 2, 3, 4, dtype=torch.float64).sort(-1, descending=True).values
        (plan,) = assign_spans(losses, densities, [0.5], least=0.0)
        beaten += sum(bool(losses[0, :, :, rule].sum() < plan.losses[0] - 1e-12) for rule in range(3))
        excess = max(excess, (plan.losses[0] - _search(losses[0], densities[0], 0.5)).abs().item())
    return {"uniform": beaten, "exhaustive": excess}


@claim("property", 0.0, rounding, source="StreamingLLM, the baseline")
def a_cache_of_sinks_and_band_is_counted() -> float:
    """A rule with a fixed span of S tokens holds (64 + S) / N of the keys: the largest difference from counting, in the
    mask of tokens, what the last query of each block sees."""
    differences = []
    for length, span in product((512, 1024), (64, 128, 320)):
        rule = ElasticSpan(span, 0.0)
        mask = rule.with_sinks().mask((length,))
        counted = mask[63::64].sum(-1).max().item() / length
        differences += [abs(counted - (64 + span) / length), abs(span_densities([rule], length).item() - counted)]
    return max(differences)


@claim(
    "accuracy",
    "closer to dense",
    at_most(0.5, "the order is stated, not the figures: clearly less"),
    source="an experiment of ours",
    slow=True,
)
def assigned_spans_are_closer_to_dense_than_uniform_ones() -> float:
    """A causal model (32 tokens, 2 layers of 4 heads, blocks of 4) repeats what stands 16 tokens before, and is given
    spans by its influence at 24 and 32 tokens: what it loses against dense attention, over what it loses with one rule
    for all heads at the same density, three eighths, which reaches back no further than 7 tokens."""
    model = _train_causal()
    texts = _draw_repeated(64)
    uniform = ElasticSpan(8, 0.0, 4)
    budgets = [span_densities([uniform], length).item() for length in (24, 32)]
    plans = None, _plan(model, budgets), [[uniform] * 4] * 2
    dense, mixed, same = (_repeat_loss(model, texts, plan) for plan in plans)
    return (mixed - dense) / (same - dense)


@claim(
    "accuracy",
    {"effective context": 3.9, "retrieval accuracy": (1.5, 7.1)},
    source=ABSTRACT + "; against uniform spans",
    needs="Vicuna and Llama 3, and the benchmarks of long contexts",
)
def contexts_get_longer() -> None:
    """The effective context is 3.9 times as long, and retrieval 1.5 to 7.1 times as accurate, at the same spans."""


@claim("speed", {"throughput": (5.5, 6.7), "memory": (1.2, 1.4)}, source=ABSTRACT, needs="a GPU and the models")
def decoding_gets_faster() -> None:
    """Decoding is 5.5 to 6.7 times as fast, and takes 1.2 to 1.4 times less memory."""


@claim(
    "property",
    {"Vicuna-13B": 0.484, "Llama-3-8B": 0.485, "Llama-3-70B": 0.488},
    source="published plans, mean density at 4096 tokens",
    needs="the published plans, a rule for each of a thousand heads",
)
def plans_keep_to_their_budget() -> None:
    """The published plans keep just under half of the keys."""


def replay(case: Case) -> dict[str, Tensor]:
    """Influence of every layer's attention, the candidates, their layouts, and what each loses."""
    if "attention influence" not in case.cls:
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: replay knows the attention influence alone")
    given = case.args

    def forward(_: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        layers = [[inputs[f"{name}{layer}"] for name in ("q", "k", "v", "go")] for layer in range(given["layers"])]
        influence = torch.stack([attention_influence(*_map_and_gradient(*each)) for each in layers], 1)
        rules = span_candidates(
            given["min_token_length"],
            given["max_profile_length"],
            given["max_token_length"],
            alphas=given["alpha candidates"],
            betas=given["beta candidates"],
            block_size=given["block_size"],
        )
        blocks = sum_blocks(influence, given["block_size"])
        return {
            "effect": influence,
            "effect_block": blocks.unsqueeze(0),
            "config_alpha": torch.tensor([rule.alpha for rule in rules]),
            "config_beta": torch.tensor([rule.beta for rule in rules]),
            "layout": torch.stack([rule.layout(given["tokens"]) for rule in rules]).byte(),
            "loss": span_losses(blocks, rules, given["tokens"]).flatten(0, 1),
        }

    return play(case, forward)


def _map_and_gradient(query: Tensor, key: Tensor, value: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The causal attention map, and the gradient of <upstream, A V> by it."""
    length = query.shape[2]
    logits = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(
        ~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf
    )
    return logits.softmax(-1), upstream @ value.mT


def _search(losses: Tensor, densities: Tensor, budget: float) -> Tensor:
    """The least loss over all plans of (layers, heads, rules) with at most two rules in a layer."""
    layers, heads, rules = losses.shape
    best = losses.new_tensor(torch.inf)
    one_layer = [each for each in product(range(rules), repeat=heads) if len(set(each)) <= 2]
    for plan in product(one_layer, repeat=layers):
        chosen = torch.tensor(plan)
        if densities[chosen].mean() <= budget + 1e-9:
            best = torch.minimum(best, losses.gather(-1, chosen.unsqueeze(-1)).sum())
    return best


def _draw_repeated(count: int, length: int = 32) -> Tensor:
    """(count, length) of 16 characters by chance, from the 16th place on those of 16 places before."""
    return torch.randint(16, (count, 16)).repeat(1, 2)[:, :length]


@cache
def _train_causal() -> CharacterModel:
    """A causal model with dense attention that repeats; about ten seconds."""

    def draw() -> tuple[Tensor, Tensor]:
        texts = _draw_repeated(64)
        return texts[:, :-1], texts[:, 1:].index_fill(1, torch.arange(15), -1)

    model = CharacterModel(
        lambda dim: ElasticSpanAttention(dim, 4, rules=EVERYTHING, causal=True, impl="reference"), 32
    )
    train_on_text(model, draw, 400)
    return model


def _repeat_loss(model: CharacterModel, texts: Tensor, plan: list[list[ElasticSpan]] | None = None) -> float:
    """Mean loss of what is repeated, with a rule for each layer and head; None: every head sees everything."""
    for layer, block in enumerate(model.blocks):
        block.mixer.rules = tuple(plan[layer]) if plan else (EVERYTHING,) * 4  # type: ignore[union-attr]
    with torch.no_grad():
        return _loss(model, texts).item()


def _loss(model: CharacterModel, texts: Tensor) -> Tensor:
    return F.cross_entropy(model(texts[:, :-1])[:, 15:].flatten(0, 1), texts[:, 16:].flatten())


def _plan(model: CharacterModel, budgets: list[float]) -> list[list[ElasticSpan]]:
    """A rule for each layer and head of a model that sees everything, by the influence at 24 and 32 tokens."""
    rules = span_candidates(4, 32, 32, alphas=range(-4, 33, 4), betas=(0, 0.25, 0.5, 0.75, 1), block_size=4)
    losses = []
    for length in (24, 32):
        texts = _draw_repeated(64, min(length + 1, 32))
        with saccade.tap(model, kinds=("attention",), detach=False) as seen:
            loss = _loss(model, texts)
        maps = list(seen.attention.values())
        pairs = zip(maps, torch.autograd.grad(loss, maps))
        influence = torch.stack([attention_influence(*pair) for pair in pairs], 1)  # (B, layers, heads, N, N)
        losses.append(span_losses(sum_blocks(influence.detach(), 4), rules, length))
    densities = torch.stack([span_densities(rules, length) for length in (24, 32)])
    plans = assign_spans(torch.stack(losses), densities, budgets)
    plan = choose_plan(plans, losses[-1])
    return [[rules[rule] for rule in layer] for layer in plan.rules.tolist()]
