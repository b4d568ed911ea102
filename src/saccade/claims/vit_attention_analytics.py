"""Heads of vision transformers: how important one is, how far it looks, what pattern it draws."""

import math
from functools import cache

import torch
from torch import Tensor, nn

from saccade import taps
from saccade.backbones import Isotropic
from saccade.backbones.mlp import Mlp
from saccade.backbones.residual import TokenBlock
from saccade.claims.framework import Compare, Paper, at_least, claim, relative_difference, rounding
from saccade.claims.framework.convnet import train_convnet
from saccade.claims.framework.experiment import load_digits
from saccade.explain.heads import (
    HeadImportance,
    HeadStrength,
    divergence,
    head_importance,
    head_patterns,
    head_strength,
    ring_numbers,
)
from saccade.mixers import Attention

PAPER = Paper(
    title="How Does Attention Work in Vision Transformers? A Visual Analytics Attempt",
    arxiv="2303.13731",
    published="2023-03-24",
    summary="Three questions to each head of a vision transformer: what changes when it is pruned, how far it attends, "
    "and what pattern its maps draw, by an autoencoder and clusters. Answered for any model whose attention can be "
    "read.",
    home=(
        "saccade.explain.heads.head_importance",
        "saccade.explain.heads.head_strength",
        "saccade.explain.heads.head_patterns",
        "saccade.explain.read_attention",
    ),
    differences=(
        "The paper's text was not at hand: metrics, rings and the autoencoder are our definitions after its abstract "
        "and recollections. Its interactive views are figures here.",
        "The autoencoder sees square roots of attention with the map's mean where the image ends; outside='zero' fills "
        "zeros as usual, which tell it where the query lies.",
        "Attention is shown beside attention times the length of the values, which the paper does not say.",
    ),
)

DEFINITION = "our definition, from recollection"
EXPERIMENT = "an experiment of ours: digits of 8 x 8 pixels, 16 patches, 4 layers of 4 heads"
METRICS = ("probability", "loss", "divergence", "distance", "angle")


@claim(
    "equivalence",
    {"rings": 0.0, "rings of an even head": 0.0, "distance of an even head": 0.0},
    rounding,
    source=DEFINITION,
)
def rings_share_what_the_class_token_leaves() -> dict[str, float]:
    """Ring masses add up to 1 minus the attention to the class token; of a head that attends evenly they are ring
    sizes over all tokens, borders included, and its mean distance is that of the grid: the relative differences."""
    grid, tokens = (4, 6), 24
    random = torch.randn(2, 3, 1 + tokens, 1 + tokens, dtype=torch.double).softmax(-1)
    even = torch.full_like(random, 1 / (1 + tokens))
    drawn, flat = (_strength(each, grid) for each in (random, even))
    left = 1 - random[:, :, 1:, 0].mean((0, 2))
    numbers = ring_numbers(grid).double()
    sizes = torch.stack([(numbers == ring).double().sum(-1).mean() for ring in range(6)])
    return {
        "rings": relative_difference(drawn.rings[0].sum(-1), left),
        "rings of an even head": relative_difference(flat.rings[0, 0], sizes / (1 + tokens)),
        "distance of an even head": relative_difference(flat.distance[0, :1], numbers.mean()[None] * tokens / 25),
    }


@claim("equivalence", {"plain": 0.0, "patches only": 0.0}, rounding, source="pitfalls of the card: sinks")
def attention_to_a_sink_looks_like_locality() -> dict[str, float]:
    """A head that gives the class token a share and spreads the rest evenly has a mean distance that is shorter by that
    share, and the grid's own once rows are scaled on the image alone: the relative differences."""
    grid, share = (4, 4), 0.7
    attention = torch.full((1, 1, 17, 17), (1 - share) / 16, dtype=torch.double)
    attention[..., 0] = share
    mean = ring_numbers(grid).double().mean()[None]
    plain, alone = (_strength(attention, grid, patches_only=each).distance[0] for each in (False, True))
    return {"plain": relative_difference(plain, (1 - share) * mean), "patches only": relative_difference(alone, mean)}


@claim(
    "property",
    {"smallest": 0.0, "ln 2 - largest": 0.0, "asymmetry": 0.0, "of equals": 0.0},
    rounding,
    source="Jensen-Shannon divergence",
)
def divergence_is_symmetric_and_from_0_to_ln_2() -> dict[str, float]:
    """Over a thousand pairs of predictions, some certain: the smallest divergence of two classes' certain predictions
    from themselves, by how much the largest of all, of two certain predictions, is off ln 2, the largest asymmetry, and
    the largest of equal predictions."""
    p, q = (20 * torch.randn(2, 1000, 10, dtype=torch.double)).softmax(-1)
    certain = torch.eye(10, dtype=torch.double)
    p, q = torch.cat([p, certain]), torch.cat([q, certain.roll(1, 0)])
    there, back = divergence(p, q), divergence(q, p)
    return {
        "smallest": divergence(certain, certain).min().item(),
        "ln 2 - largest": abs(math.log(2) - there.max().item()),
        "asymmetry": (there - back).abs().max().item(),
        "of equals": divergence(p, p).max().item(),
    }


@claim("property", dict.fromkeys((*METRICS, "flip"), 0.0), rounding, source=DEFINITION)
def a_head_that_the_projection_does_not_read_has_no_importance() -> dict[str, float]:
    """A head whose rows of the output projection are 0 can be pruned without a change of any metric: the largest."""
    model = _vit().double().eval()
    with torch.no_grad():
        model.get_parameter("blocks.1.attn.proj.weight")[:, 8:16] = 0
    found = head_importance(model, torch.randn(5, 1, 8, 8, dtype=torch.double), target=3)
    return {metric: values[1, 1].abs().max().item() for metric, values in found.by_image.items()}


@claim(
    "property",
    "above 0",
    at_least(0, "a positive rank correlation is claimed"),
    source="comparison of metrics, recalled; " + EXPERIMENT,
    slow=True,
)
def metrics_agree_on_the_important_heads() -> dict[str, float]:
    """Spearman's correlation over the 16 heads of each metric with the rise of the loss."""
    agreement = _importance().agreement()
    names = list(_importance().by_image)
    row = agreement[names.index("loss")]
    return {name: row[names.index(name)].item() for name in (*METRICS, "flip") if name != "loss"}


@claim(
    "property",
    "fewer values",
    Compare("less than the number of heads", "a count has few values", lambda measured, _: measured["flip"] < 16),
    source="comparison of metrics, recalled; " + EXPERIMENT,
    slow=True,
)
def flips_are_coarse() -> dict[str, int]:
    """Different values of each metric among 16 heads: flips of 359 predictions are often as many."""
    return {name: len(_importance().matrix(name).unique()) for name in _importance().by_image}


@claim(
    "property",
    {"most local head": "local", "growth with depth": "above 0"},
    Compare(
        "a head of the first layer keeps more than an even one's share within a token, and distance grows",
        "the order is claimed",
        lambda measured, _: measured["most local head"] > measured["even head"] and measured["growth with depth"] > 0,
    ),
    source="trend over layers, recalled; " + EXPERIMENT,
    slow=True,
    guess="a grid of 4 x 4 patches leaves little room: an even head looks 1.9 tokens far, and two layers suffice",
)
def lower_layers_hold_local_heads() -> dict[str, float]:
    """Attention within one token of the first layer's most local head beside an even one's, the mean distance of the
    last layer's heads minus the first's, and the spread of the first layer's, in tokens; rows scaled on the image."""
    found = _digit_strength()
    near = found.rings[..., :2].sum(-1)
    return {
        "most local head": near[0].max().item(),
        "even head": (ring_numbers((4, 4)) < 2).double().mean().item(),
        "growth with depth": (found.distance[-1].mean() - found.distance[0].mean()).item(),
        "spread": (found.distance[0].max() - found.distance[0].min()).item(),
    }


@claim(
    "property",
    {"heads with few flips": 0.5, "largest over median rise": 2.0},
    Compare(
        "at least as large",
        "most is half or more; a tail is heavy where the largest is over twice the median",
        lambda measured, published: all(measured[key] >= published[key] for key in published),
    ),
    source="distribution of importance, recalled; " + EXPERIMENT,
    slow=True,
)
def most_heads_can_be_pruned_alone() -> dict[str, float]:
    """Share of heads without which under 5 % of held-out predictions change, and the largest rise of the loss over the
    median size of its change."""
    flips, loss = (_importance().matrix(name).flatten() for name in ("flip", "loss"))
    return {
        "heads with few flips": (flips < 0.05).double().mean().item(),
        "largest over median rise": (loss.max() / loss.abs().median()).item(),
    }


@claim(
    "property",
    {"clusters": 3, "itself": 0.9, "evenly": 0.9},
    Compare(
        "a cluster for each, with at least these shares of the maps",
        "noise may move a few",
        lambda measured, published: all(measured[key] >= published[key] for key in published),
    ),
    source="small experiment of the card",
    slow=True,
)
def known_patterns_fall_into_clusters_of_their_own() -> dict[str, float]:
    """Heads that attend to the query itself, to all evenly and to the right neighbour (in the last column to itself),
    with 5 % noise, in 3 clusters: number of different clusters where most of a head's maps are, and the share that is
    there."""
    top = _shares(clusters=3).max(-1)
    return {
        "clusters": len(top.indices.unique()),
        **dict(zip(("itself", "evenly", "right"), top.values.tolist())),
    }


@claim(
    "property",
    "split with zeros alone",
    Compare(
        "all with the mean, under 0.8 with zeros",
        "a fifth of the maps elsewhere is more than noise does",
        lambda measured, _: measured["mean"] > 0.95 and measured["zero"] < 0.8,
    ),
    source="pitfalls of the card: padding",
    slow=True,
)
def zeros_outside_the_image_split_an_even_head() -> dict[str, float]:
    """The share of the even head's maps in its largest cluster, of 4 in the same experiment, with each map's mean or
    zeros outside the image: the border, which zeros show, then tells maps of one pattern apart."""
    return {outside: _shares(clusters=4, outside=outside)[1].max().item() for outside in ("mean", "zero")}


class _Shows(nn.Module):
    """A layer (B, 1, h, w) that shows given attention for its pixels, behind a class token or not."""

    def __init__(self, attention: Tensor) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        taps.record(self, "attention", lambda: self.attention.expand(len(x), -1, -1, -1))
        taps.record(self, "features", lambda: x.movedim(1, -1))
        return x.flatten(1)


def _strength(attention: Tensor, grid: tuple[int, int], *, patches_only: bool = False) -> HeadStrength:
    """Of given attention (B, heads, N, N); images after the first show it again, as a mean does not mind."""
    parts = [
        head_strength(_Shows(each[None]), torch.zeros(1, 1, *grid), patches_only=patches_only) for each in attention
    ]
    names = ("rings", "distance")
    means = {name: torch.stack([getattr(part, name) for part in parts]).mean(0) for name in names}
    return HeadStrength(**{**vars(parts[0]), **means})


def _known_heads() -> Tensor:
    """(1, 3, 36, 36) on 6 x 6 tokens: itself, evenly, the right neighbour (in the last column itself)."""
    itself = torch.eye(36)
    right = torch.stack([itself[token if token % 6 == 5 else token + 1] for token in range(36)])
    heads = torch.stack([itself, torch.full((36, 36), 1 / 36), right])
    heads = heads * (1 + 0.05 * torch.randn(1, 3, 36, 36)).clamp(min=0)
    return heads / heads.sum(-1, keepdim=True)


def _shares(clusters: int, outside: str = "mean") -> Tensor:
    """(heads, clusters) of known heads."""
    images = torch.zeros(8, 1, 6, 6)
    return head_patterns(_Shows(_known_heads()), images, clusters=clusters, max_maps=864, outside=outside).shares[0]


def _vit() -> Isotropic:
    def make_block(_number: int) -> TokenBlock:
        return TokenBlock(32, Attention(32, 4), Mlp(32, 64))

    return Isotropic(make_block, dim=32, depth=4, image_size=8, patch_size=2, num_classes=10, in_chans=1)


@cache
def _trained() -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        (images, labels), _ = load_digits(8)
        return train_convnet(_vit(), images, labels, epochs=12)


@cache
def _importance() -> HeadImportance:
    images, labels = load_digits(8)[1]
    return head_importance(_trained(), images, target=labels, batch_size=len(images))


@cache
def _digit_strength() -> HeadStrength:
    return head_strength(_trained(), load_digits(8)[1][0], patches_only=True)
