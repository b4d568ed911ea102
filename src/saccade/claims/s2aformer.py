"""S2AFormer: one channel a head in queries and keys, and keys of a reduced map."""

import torch
from torch import Tensor, nn

from saccade.backbones import HybridPerceptionBlock
from saccade.claims.framework import Paper, at_most, claim, relative_difference, rounding
from saccade.claims.framework.experiment import train_on_digits
from saccade.claims.framework.oracles import dense_attention
from saccade.measure import count_flops
from saccade.mixers import StripAttention
from saccade.mixers.mixer import split_heads
from saccade.ops import softmax_attention
from saccade.ops.softmax_attention import attention_weights

PAPER = Paper(
    title="S2AFormer: Strip Self-Attention for Efficient Vision Transformer",
    arxiv="2505.22195",
    published="2025-05-28",
    summary="Strip attention shrinks both factors of attention: keys and values come from a map that a convolution "
    "has reduced, and queries and keys have one channel a head, while values keep their width. A block adds to it a "
    "depthwise convolution, a local interaction module and an MLP, each with a residual of its own.",
    home=("saccade.mixers.StripAttention", "saccade.backbones.HybridPerceptionBlock"),
    missing=("the networks, whose widths and depths are in no source that we could open",),
    differences=(
        "No official code was found, so there is no replay. The order of the block's branches and what is reduced are "
        "published; one channel a head, the reductions 8, 4, 2, 1, kernels of 3, an MLP ratio of 4 and the form of the "
        "local interaction module are guesses of ours, and arguments.",
        "A map that the reduction does not divide is filled with zeros for the convolution.",
    ),
)

LAYER = "the layer's definition"


@claim("complexity", {"multiply-adds": 3136 * 49 * 66, "saving": 2 * 64 * 64 / 66}, source="complexity of the layer")
def cost_of_the_products() -> dict[str, float]:
    """The two products take N M (h d + C) multiply-adds with M = N / r^2, against 2 N^2 C, a saving of
    2 r^2 C / (h d + C): counted for 56 x 56 tokens of C = 64 channels with h = 2, d = 1 and r = 8."""
    counted = {}
    for name, width, cells in [("strip", 1, 7**2), ("full", 32, 56**2)]:
        query, key, value = (torch.randn(1, 2, *shape) for shape in [(56**2, width), (cells, width), (cells, 32)])
        counted[name] = count_flops(softmax_attention, query, key, value).total / 2
    return {"multiply-adds": counted["strip"], "saving": counted["full"] / counted["strip"]}


@claim("params", {"strip": 2 * 64 * 4, "full": 2 * 64**2}, source="parameters of the layer")
def parameters_of_query_and_key() -> dict[str, int]:
    """The weights that make queries and keys are 2 C h d instead of 2 C^2: C = 64, h = 4, d = 1 and d = 16."""
    layers = {name: StripAttention(64, 4, qk_dim=width) for name, width in [("strip", 1), ("full", 16)]}
    return {name: layer.q.weight.numel() + layer.kv.weight.numel() - 64**2 for name, layer in layers.items()}


@claim("equivalence", "equal to 1e-6", rounding, source=LAYER)
def full_width_without_reduction_is_attention() -> dict[str, float]:
    """With d = C / h and r = 1 it is multi-head attention; and so it is over the reduced map's tokens with r = 2, when
    the convolution takes the first token of each cell."""
    x = torch.randn(2, 6, 8, 24, dtype=torch.float64)
    errors = {}
    for ratio in (1, 2):
        layer = StripAttention(24, 3, qk_dim=8, sr_ratio=ratio).double()
        if layer.sr is not None:
            nn.init.zeros_(layer.sr.weight)
            layer.sr.bias.data.zero_()  # type: ignore[union-attr]
            layer.sr.weight.data[..., 0, 0] = torch.eye(24)
        kept = layer.norm(x[:, ::ratio, ::ratio])
        key, value = (split_heads(part, 3) for part in layer.kv(kept).chunk(2, -1))
        query, key, value = split_heads(layer.q(x), 3).flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)
        expected = layer.proj(dense_attention(query, key, value).movedim(1, -2).flatten(-2)).unflatten(1, (6, 8))
        errors[f"r = {ratio}"] = relative_difference(layer(x), expected)
    return errors


@claim("property", {"rank of the logits": 1, "steps against the order": 0}, source=LAYER)
def weights_are_monotone_in_the_key() -> dict[str, int]:
    """With d = 1 the logits of a head are the outer product of two vectors: with the keys sorted, a query's weights
    rise if it is positive and fall if it is negative, so that two queries of one sign order all keys alike."""
    query, key = torch.randn(2, 1, 1, 64, 1, dtype=torch.float64)
    weights = attention_weights(query, key.sort(2).values, None, 1.0)
    steps = weights.diff(dim=-1) * query.sign()
    rank = torch.linalg.matrix_rank((query @ key.mT)[0, 0])
    return {"rank of the logits": int(rank), "steps against the order": int((steps < 0).sum())}


@claim("property", 0, source=LAYER)
def equal_queries_attend_alike() -> int:
    """Tokens whose query, one number, is the same have the same row of weights: the number of pairs that differ, of
    queries that take five values."""
    query = torch.randint(-2, 3, (1, 1, 40, 1)).double()
    weights = attention_weights(query, torch.randn(1, 1, 30, 1, dtype=torch.float64), None, 1.0)[0, 0]
    same = query[0, 0] == query[0, 0].T
    return int((same & (torch.cdist(weights, weights, p=torch.inf) > 1e-12)).sum())


@claim("property", 0, source="receptive field of a block")
def one_block_sees_the_whole_map() -> int:
    """The gradient of every output of one block by the input is non-zero on every token: the number of pairs where it
    is not, on 8 x 12 tokens with r = 4."""
    block = HybridPerceptionBlock(16, lambda dim: StripAttention(dim, 2, sr_ratio=4)).double().eval()
    x = torch.randn(1, 8, 12, 16, dtype=torch.float64, requires_grad=True)
    outputs = block(x).square().sum(-1).flatten()
    reached = [torch.autograd.grad(out, x, retain_graph=True)[0].abs().sum(-1) > 0 for out in outputs]
    return int((~torch.stack(reached)).sum())


@claim(
    "property", {"all off": 0.0, "conv": 0.0, "attention": 0.0, "interaction": 0.0, "MLP": 0.0}, rounding, source=LAYER
)
def branches_are_residuals() -> dict[str, float]:
    """Convolution, attention, local interaction and MLP each add to the map, the last three from its norm: with all
    branches at 0 the block is the identity, and with one of them left it is x + branch(norm(x))."""
    x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
    errors = {"all off": relative_difference(_block(None)(x), x)}
    for name, part in [("conv", "conv"), ("attention", "mixer"), ("interaction", "interaction"), ("MLP", "mlp")]:
        block = _block(part)
        normed: Tensor = nn.functional.layer_norm(x, (16,))
        branch = block.get_submodule(part)
        added = branch(x.movedim(-1, 1)).movedim(1, -1) if part == "conv" else branch(normed)
        errors[name] = relative_difference(block(x), x + added)
    return errors


@claim(
    "accuracy",
    "little is lost",
    at_most(0.03, "two of 64 images a step decide about so much in a run of a few epochs"),
    source="an experiment of ours",
    slow=True,
)
def one_channel_a_head_loses_little() -> float:
    """Digits of 8 x 8 tokens, one layer of 4 heads and 32 channels: what d = 1 loses against d = 8."""
    lost = [_train(qk_dim=8, seed=seed) - _train(qk_dim=1, seed=seed) for seed in range(3)]
    return sum(lost) / len(lost)


@claim(
    "accuracy",
    "better at less computation",
    source="abstract; ImageNet-1K, ADE20K and COCO",
    needs="ImageNet, ADE20K, COCO, and the networks, whose sizes are not public",
)
def networks_are_accurate() -> None:
    """The networks are more accurate than others at less computation."""


@claim(
    "accuracy",
    "convolution is better than pooling",
    source="ablation of the paper",
    needs="ImageNet, and the networks, whose sizes are not public",
)
def a_convolution_reduces_better_than_pooling() -> None:
    """Keys and values of a convolution serve better than pooled ones (reduction="mean")."""


def _block(kept: str | None) -> HybridPerceptionBlock:
    """A block in which the last layer of every branch but one is 0."""
    block = HybridPerceptionBlock(16, lambda dim: StripAttention(dim, 2)).double().eval()
    last = {"conv": "conv", "mixer": "mixer.proj", "interaction": "interaction.conv2", "mlp": "mlp.fc2"}
    for branch, name in last.items():
        if branch != kept:
            for parameter in block.get_submodule(name).parameters():
                nn.init.zeros_(parameter)
    return block


def _train(qk_dim: int, seed: int) -> float:
    torch.manual_seed(seed)
    return train_on_digits(lambda dim: StripAttention(dim, 4, qk_dim=qk_dim, sr_ratio=1))
