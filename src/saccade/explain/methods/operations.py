"""Relevance on operations, as a method of `explain`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from saccade.explain.classifier import Classifier, batches
from saccade.explain.methods.attribution import Attribution, Detail

if TYPE_CHECKING:
    from saccade.explain.relevance import On, Recipe, Relevance

__all__ = ["relevance", "trace_images"]


def relevance(
    classify: Classifier,
    images: Tensor,
    target: Tensor,
    *,
    batch_size: int,
    recipe: "str | Recipe" = "epsilon",
    rules: "Sequence[On]" = (),
) -> Attribution:
    """Layer-wise relevance propagation on the operations that the model runs, summed over channels.

    Signed, in logits: the answer is shared out from operation to operation, back to the pixels. It works on any model
    without a change to it, and costs about one gradient pass.

    Args:
        recipe: name of a recipe, or one made by a function of `saccade.explain.relevance.recipes`.
        rules: entries in front of the recipe's.

    Returns: the maps, as `error` their sums minus the logits, which is what biases and norms took, and the account of
        that in `detail`. Where the logit is small beside the map, as with random weights, `error` is mostly rounding;
        see `saccade.explain.relevance.Relevance.conservation_error`.
    """
    whole = trace_images(classify, images, target, batch_size, recipe, rules)
    return Attribution(whole.map.sum(1), whole.error, detail=Detail(account=whole))


def trace_images(
    classify: Classifier,
    images: Tensor,
    target: Tensor,
    batch_size: int,
    recipe: "str | Recipe",
    rules: "Sequence[On]",
) -> "Relevance":
    """Relevance of images (B, C, H, W), traced `batch_size` at a time."""
    from saccade.explain.relevance import merge
    from saccade.explain.relevance import relevance as trace

    found = [
        trace(classify.model, part, target=classes, recipe=recipe, rules=rules, output=classify.answers)
        for part, classes in batches(batch_size, images, target)
    ]
    return merge(found)
