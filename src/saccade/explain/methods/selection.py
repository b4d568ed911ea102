"""A mask that a model makes itself, or that a network learnt for it, as an explanation."""

import torch
from torch import Tensor, nn

from saccade.errors import InputError
from saccade.explain.classifier import Classifier, batches, evaluating
from saccade.explain.methods.attribution import Attribution

__all__ = ["selection"]


def selection(
    classify: Classifier, images: Tensor, target: Tensor, *, batch_size: int, selector: nn.Module | None = None
) -> Attribution:
    """The share of each pixel that a selector shows to the model, in 0..1, as `saccade.training.SelectionGame` trains.

    One forward pass of the selector an image. The mask is made before there is an answer and knows no class: `target`
    changes nothing.

    Args:
        selector: images (B, C, H, W) -> mask logits (B, 1, H, W); runs in eval mode. None takes the model's own
            `selector`.

    Raises: InputError if there is no selector, or if it returns something else.
    """
    network = getattr(classify.model, "selector", None) if selector is None else selector
    if not isinstance(network, nn.Module):
        raise InputError(
            f"{type(classify.model).__name__} has no selector: train one with saccade.training.SelectionGame and give "
            "it as selector=, or use a method that needs none, such as integrated_gradients"
        )
    masks = []
    with evaluating(network, grad=False):
        for (part,) in batches(batch_size, images):
            logits = network(part.clone())
            expected = (len(part), 1, *part.shape[-2:])
            if not isinstance(logits, Tensor) or logits.shape != expected:
                given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise InputError(f"the selector returns {given}: an explanation needs mask logits {expected}")
            masks.append(logits.sigmoid()[:, 0])
    return Attribution(torch.cat(masks).to(images))
