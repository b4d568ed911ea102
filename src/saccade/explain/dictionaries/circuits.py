"""Which heads belong to a task's circuit: those whose codes occur only where the task can be solved.

Codes of head outputs by a small autoencoder (2024, arXiv:2405.12522). No forward pass with an ablation is needed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saccade.errors import InputError, check_choice
from saccade.explain.classifier import check_whole
from saccade.explain.dictionaries.dictionary import ConceptDictionary, ReluAutoencoder
from saccade.explain.dictionaries.site import run_once
from saccade.explain.dictionaries.stream import train_dictionary
from saccade.explain.relevance.modules import check_points

__all__ = [
    "Circuit",
    "Heads",
    "circuit_auc",
    "edge_scores",
    "find_circuit",
    "integer_codes",
    "mean_difference",
    "node_scores",
]


class Circuit(NamedTuple):
    """What `find_circuit` found.

    Attributes:
        nodes: (heads,), scores.
        edges: (heads, heads), scores of pairs, symmetric; 0 on the diagonal.
        positive, negative: (N, heads), integer codes.
        dictionary: that made them.
    """

    nodes: Tensor
    edges: Tensor
    positive: Tensor
    negative: Tensor
    dictionary: ConceptDictionary

    def members(self, threshold: float) -> Tensor:
        """(heads,), whether the score is at least the threshold."""
        return self.nodes >= threshold


class Heads:
    """The attention heads of a model, as what each adds to its tokens.

    Args:
        model: runs in eval mode without gradients.
        projections: names of the linear layers that mix the heads of a layer, whose input has them side by side.
        num_heads: in each of them.

    Heads are numbered layer by layer. The projections' biases belong to none.
    """

    def __init__(self, model: nn.Module, projections: Sequence[str], num_heads: int) -> None:
        check_whole("num_heads", num_heads)
        check_points(model, projections)
        modules = dict(model.named_modules())
        self.model, self.points, self.num_heads = model, [f"{name}:in" for name in projections], num_heads
        if not projections:
            raise InputError("no projections are named: give the linear layers after the heads")
        self.layers: list[nn.Linear] = []
        for name in projections:
            layer = modules[name]
            if not isinstance(layer, nn.Linear) or layer.in_features % num_heads:
                given = f"a {type(layer).__name__}" if not isinstance(layer, nn.Linear) else f"{layer.in_features} wide"
                raise InputError(f"{name!r} is {given}: name linear layers whose input is {num_heads} heads")
            self.layers.append(layer)

    def outputs(self, inputs: Tensor, *, position: int = -1) -> Tensor:
        """(B, heads, dim), what each head adds to one token."""
        seen: dict[str, Tensor] = {}

        def see(point: str, value: Tensor) -> Tensor:
            seen[point] = value[..., position, :].clone()
            return value

        run_once(self.model, (inputs,), self.points, see)
        parts = []
        for point, layer in zip(self.points, self.layers):
            values, weights = (
                each.unflatten(-1, (self.num_heads, -1)) for each in (seen[point], layer.weight.detach())
            )
            parts.append(torch.einsum("bhe,dhe->bhd", values, weights))
        return torch.cat(parts, 1)

    def keep(self, inputs: Tensor, members: Tensor) -> Any:
        """What the model returns when heads outside `members` (heads,) give their mean over the inputs, by position."""
        if members.shape != (len(self.points) * self.num_heads,) or members.dtype != torch.bool:
            raise InputError(
                f"members are {members.dtype} of shape {tuple(members.shape)}: give booleans "
                f"({len(self.points) * self.num_heads},), one a head"
            )
        means: dict[str, Tensor] = {}

        def learn(point: str, value: Tensor) -> Tensor:
            means[point] = value.mean(0, keepdim=True)
            return value

        run_once(
            self.model, (inputs,), self.points, learn
        )  # of the whole model: a head's mean does not depend on which others are kept
        kept = dict(zip(self.points, members.chunk(len(self.points))))

        def replace(point: str, value: Tensor) -> Tensor:
            own = kept[point].repeat_interleave(value.shape[-1] // self.num_heads)
            return torch.where(own.to(value.device), value, means[point])

        return run_once(self.model, (inputs,), self.points, replace)


def find_circuit(
    positive: Tensor,
    negative: Tensor,
    *,
    num_codes: int = 200,
    l1: float = 0.02,
    steps: int = 500,
    normalise: str = "count",
    generator: torch.Generator | None = None,
) -> Circuit:
    """Score heads by how many of their codes occur only on positive inputs.

    Args:
        positive: (N, heads, dim), what heads give for inputs on which the task can be solved.
        negative: (N, heads, dim), for as many inputs that differ in nothing but that they cannot: numbers of codes grow
            with numbers of inputs.
        num_codes: hidden units of the autoencoder, which is trained on all heads together. Outputs of each head are
            first divided by their mean length, or heads with long outputs would have most units to themselves.
        l1: price of a unit of code, beside the mean squared error of a channel.
        steps: of training.
        normalise: of the scores, as in `node_scores`.
        generator: of the order in training.
    """
    if positive.shape != negative.shape or positive.ndim != 3:
        raise InputError(
            f"positive is {tuple(positive.shape)} and negative {tuple(negative.shape)}: give as many of both, (N, "
            "heads, dim)"
        )
    both = torch.cat([positive, negative]).detach()
    length = both.norm(dim=-1).mean(0)[:, None]
    both = both / length.where(length > 0, 1.0)
    dictionary = ReluAutoencoder(both.shape[-1], num_codes, l1=l1 * both.shape[-1]).to(both)
    train_dictionary(dictionary, both.flatten(0, 1), steps=steps, generator=generator)
    codes = integer_codes(dictionary, both).split(len(positive))
    ours, theirs = codes
    nodes, edges = node_scores(ours, theirs, normalise=normalise), edge_scores(ours, theirs)
    return Circuit(nodes, edges, ours, theirs, dictionary)


@torch.no_grad()
def integer_codes(dictionary: ConceptDictionary, outputs: Tensor) -> Tensor:
    """(..., dim) -> (...), the number of the largest code; `num_concepts` where none is above 0."""
    top = dictionary.encode(outputs).max(-1)
    return top.indices.where(top.values > 0, dictionary.num_concepts)


def node_scores(positive: Tensor, negative: Tensor, *, normalise: str = "count") -> Tensor:
    """(heads,), how many distinct codes of a head occur among `positive` (N, heads) and not among `negative`.

    Args:
        positive, negative: integer codes.
        normalise: "count" leaves the number, "share" divides by the distinct codes on positives, "softmax" makes the
            numbers shares of all heads.

    >>> node_scores(torch.tensor([[0, 1], [0, 2]]), torch.tensor([[0, 3], [0, 1]]))
    tensor([0., 1.])
    """
    check_choice("normalise", normalise, ("count", "share", "softmax"))
    _check_codes(positive, negative)
    unique, size = [], []
    for ours, theirs in zip(positive.unbind(1), negative.unbind(1)):
        seen = ours.unique()
        unique.append((~torch.isin(seen, theirs)).sum())
        size.append(len(seen))
    counts = torch.stack(unique).float()
    if normalise == "share":
        return counts / torch.tensor(size, device=counts.device)
    return counts.softmax(0) if normalise == "softmax" else counts


def edge_scores(positive: Tensor, negative: Tensor) -> Tensor:
    """(heads, heads), how many distinct pairs of codes two heads have together on positives (N, heads) alone."""
    _check_codes(positive, negative)
    heads = positive.shape[1]
    scores = torch.zeros(heads, heads, device=positive.device)
    base = int(max(positive.max(), negative.max())) + 1
    for head in range(heads):
        pairs = [codes[:, head : head + 1] * base + codes for codes in (positive, negative)]
        scores[head] = node_scores(*pairs)
    return scores.fill_diagonal_(0)


def mean_difference(positive: Tensor, negative: Tensor) -> Tensor:
    """(heads,), the length of the difference of the mean outputs (N, heads, dim): a baseline without any dictionary."""
    return (positive.mean(0) - negative.mean(0)).norm(dim=-1)


def circuit_auc(scores: Tensor, members: Tensor) -> float:
    """Area under the ROC curve of scores (heads,) against the heads that are known to belong to it, booleans (heads,).

    >>> circuit_auc(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, False]))
    1.0
    """
    from sklearn.metrics import roc_auc_score

    if scores.shape != members.shape or members.all() or not members.any():
        raise InputError(
            f"scores are {tuple(scores.shape)}, members {tuple(members.shape)} with {int(members.sum())} in the "
            "circuit: give one for each head, with heads inside and outside"
        )
    return float(roc_auc_score(members.cpu().numpy(), scores.detach().cpu().numpy()))


def _check_codes(positive: Tensor, negative: Tensor) -> None:
    for name, codes in {"positive": positive, "negative": negative}.items():
        if codes.ndim != 2 or codes.is_floating_point() or not len(codes) or codes.shape[1] != positive.shape[1]:
            raise InputError(f"{name} codes are {codes.dtype} of shape {tuple(codes.shape)}: give integers (N, heads)")
