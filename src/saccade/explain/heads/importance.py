"""How much rests on a head: prune it, and see what changes."""

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from saccade.errors import InputError, check_choice
from saccade.explain.attention import read_attention
from saccade.explain.classifier import Classifier, batches, check_images, check_whole, evaluating, read_target
from saccade.explain.methods.layers import outputs
from saccade.explain.parameters import with_parameters
from saccade.explain.relevance.modules import watching
from saccade.explain.score import correlate, place_on_ranks

__all__ = ["HeadImportance", "divergence", "head_importance"]

METRICS = ("probability", "loss", "flip", "divergence", "distance", "angle")


@dataclass(frozen=True)
class HeadImportance:
    """What pruning each of L layers' H heads changed, image by image.

    Attributes:
        layers: names, in the order of the network.
        projections: the layers that join their heads, where the heads were pruned.
        by_image: each metric as (L, H, B) float64, NaN where a layer has fewer heads. "probability": fall of the
            target's probability. "loss": rise of its cross-entropy, in nats. "flip": 1 where another class is
            predicted. "divergence": Jensen-Shannon, in nats. "distance" and "angle": length of the change of the
            embedding that the classifier reads (the class token's, where there is one), and 1 minus its cosine.
        target: (B,) classes of probability and loss.
        embedding: name of the layer whose input is the embedding.
    """

    layers: tuple[str, ...]
    projections: tuple[str, ...]
    by_image: dict[str, Tensor]
    target: Tensor
    embedding: str

    def matrix(self, metric: str) -> Tensor:
        """(L, H), a metric's mean over images."""
        check_choice("metric", metric, self.by_image)
        return self.by_image[metric].mean(-1)

    def agreement(self) -> Tensor:
        """Spearman's correlations of the metrics' means over all heads, one row a metric; 0 where one is constant."""
        means = torch.stack([self.matrix(metric).flatten() for metric in self.by_image])
        ranks = place_on_ranks(means[:, ~means[0].isnan()])
        return torch.stack([correlate(row, ranks) for row in ranks])


def head_importance(
    model: nn.Module,
    images: Tensor,
    *,
    target: int | Tensor | None = None,
    projections: str | None = None,
    num_heads: int | None = None,
    embedding: str | None = None,
    batch_size: int = 32,
) -> HeadImportance:
    """Prune each head alone, by zeros in place of its output before the output projection, and measure what changes.

    The projection's bias stays, and the other heads are not rescaled (2023, arXiv:2303.13731; its text was not at hand,
    so the definitions of the metrics are ours). It is done by zeros in the projection's weight, so that no hook is
    needed; a projection that several layers share is pruned in all of them. One pass over the images a head.

    Args:
        model: maps images to logits (B, classes); any with attention that `read_attention` can read.
        images: (B, C, H, W), normalised.
        target: the true class, or (B,) of them; None takes the predicted ones.
        projections: pattern of the names of the layers that join the heads, such as "blocks.*.attn.proj"; None infers
            them. Their input must be the channels of head after head.
        num_heads: with `projections`, heads of every layer; None infers them.
        embedding: layer whose input is the final embedding (B, C); None takes the linear layer that gives the logits.
        batch_size: the most images in one forward pass.

    Raises: InputError where heads, projections or the embedding cannot be inferred, naming the argument that says it.
    """
    check_images(images)
    check_whole("batch_size", batch_size)
    sites = _find_sites(model, images[:1], projections, num_heads)
    with evaluating(model, grad=False) as classify:
        images = images.detach()
        embedding = _find_embedding(classify, images[:1], embedding)
        classes = read_target(target, classify, images, batch_size)
        before = _run(classify, images, embedding, batch_size)
        most = max(site.num_heads for site in sites)
        found = torch.full((len(METRICS), len(sites), most, len(images)), torch.nan, dtype=torch.double)
        for place, site in enumerate(sites):
            for head, weight in enumerate(_without_each(model, site)):
                with with_parameters(model, {f"{site.projection}.weight": weight}):
                    found[:, place, head] = _compare(before, _run(classify, images, embedding, batch_size), classes)
    return HeadImportance(
        tuple(site.layer for site in sites),
        tuple(site.projection for site in sites),
        dict(zip(METRICS, found)),
        classes,
        embedding,
    )


def divergence(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions (..., classes) along the last axis, in nats, from 0 to ln 2.

    >>> round(divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).item(), 4)
    0.6931
    """
    middle = (first + second) / 2
    terms = [torch.xlogy(each, each) - torch.xlogy(each, middle) for each in (first, second)]
    return (sum(terms).sum(-1) / 2).clamp(min=0)  # type: ignore[union-attr]


class _Site(NamedTuple):
    layer: str
    projection: str
    num_heads: int


class _Answers(NamedTuple):
    logits: Tensor
    embedding: Tensor


def _find_sites(model: nn.Module, image: Tensor, projections: str | None, num_heads: int | None) -> list[_Site]:
    if num_heads is not None:
        check_whole("num_heads", num_heads)
    if projections is not None and num_heads is not None:
        sites = [_Site(name, name, num_heads) for name in _matching(model, projections)]
    else:
        layers = read_attention(model, image)
        if projections is not None:
            counts = {layer.attention.shape[1] for layer in layers}
            if len(counts) > 1:
                raise InputError(f"layers have {sorted(counts)} heads: give num_heads, and one pattern for each number")
            sites = [_Site(name, name, *counts) for name in _matching(model, projections)]
        else:
            for layer in layers:
                if layer.projection is None:
                    raise InputError(
                        f"the layer that joins the heads of {layer.name!r} cannot be inferred: give projections, a "
                        "pattern of such layers' names as 'blocks.*.attn.proj', and num_heads"
                    )
            found = {layer.projection: layer for layer in layers}
            sites = [_Site(layer.name, str(name), layer.attention.shape[1]) for name, layer in found.items()]
    for site in sites:
        weight = getattr(model.get_submodule(site.projection), "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim < 2 or weight.shape[1] % site.num_heads:
            shape = tuple(weight.shape) if isinstance(weight, Tensor) else "no parameter"
            raise InputError(
                f"the weight of {site.projection!r} is {shape}, for {site.num_heads} heads: give projections whose "
                "weight is (channels out, channels in), with as many channels in for each head"
            )
    return sites


def _matching(model: nn.Module, pattern: str) -> list[str]:
    names = [name for name, _ in model.named_modules() if fnmatchcase(name, pattern)]
    if not names:
        raise InputError(f"projections is {pattern!r}: no module of {type(model).__name__} has such a name")
    return names


def _find_embedding(classify: Classifier, image: Tensor, embedding: str | None) -> str:
    modules = dict(classify.model.named_modules())
    if embedding is not None:
        check_choice("embedding", embedding, modules)
        return embedding
    linear: dict[str, nn.Module] = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    with outputs(linear) as seen:
        logits = classify(image)
    for name, output in reversed(seen):
        if output.shape == logits.shape:
            return name
    raise InputError("no linear layer gives the logits: give embedding, the name of a layer whose input is (B, C)")


def _without_each(model: nn.Module, site: _Site) -> Iterator[Tensor]:
    weight = model.get_parameter(f"{site.projection}.weight").detach()
    for columns in torch.arange(weight.shape[1]).chunk(site.num_heads):
        pruned = weight.clone()
        pruned[:, columns] = 0
        yield pruned


def _run(classify: Classifier, images: Tensor, embedding: str, batch_size: int) -> _Answers:
    logits: list[Tensor] = []
    read: list[Tensor] = []

    def keep(_point: str, value: Tensor) -> Tensor:
        read.append(value.flatten(1))
        return value

    for (part,) in batches(batch_size, images):
        with watching(classify.model, [f"{embedding}:in"], keep):
            logits.append(classify(part))
    return _Answers(torch.cat(logits).double(), torch.cat(read).double())


def _compare(before: _Answers, after: _Answers, classes: Tensor) -> Tensor:
    """(metrics, B)."""
    p, q = before.logits.softmax(1), after.logits.softmax(1)
    column = classes[:, None]
    losses = [cross_entropy(each.logits, classes, reduction="none") for each in (after, before)]
    return torch.stack(
        [
            (p - q).gather(1, column)[:, 0],
            losses[0] - losses[1],
            (p.argmax(1) != q.argmax(1)).double(),
            divergence(p, q),
            (before.embedding - after.embedding).norm(dim=1),
            1 - cosine_similarity(before.embedding, after.embedding),
        ]
    ).cpu()
