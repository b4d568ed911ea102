"""Methods that read the gradient of the target's logit with respect to the pixels."""

import torch
from torch import Tensor

from saccade.explain.classifier import Classifier, batches, check_whole
from saccade.explain.methods.attribution import Attribution

__all__ = ["gradient", "input_x_gradient", "integrated_gradients"]


def gradient(classify: Classifier, images: Tensor, target: Tensor, *, batch_size: int) -> Attribution:
    """Largest absolute gradient over a pixel's channels, how strongly the logit answers to it.

    Without sign, in logits per unit of input (Simonyan et al., 2013, arXiv:1312.6034).
    """
    maps = []
    for part, classes in batches(batch_size, images, target):
        part.requires_grad_()
        (slope,) = torch.autograd.grad(classify.score(part, classes), part)
        maps.append(slope.abs().amax(1))
    return Attribution(torch.cat(maps))


def input_x_gradient(classify: Classifier, images: Tensor, target: Tensor, *, batch_size: int) -> Attribution:
    """Input times gradient, summed over channels: each pixel's share in the model's tangent at the image.

    Signed, in logits; exact where the model is linear (Shrikumar et al., 2016, arXiv:1605.01713).
    """
    from captum.attr import InputXGradient

    method = InputXGradient(classify)
    parts = batches(batch_size, images, target)
    return Attribution(
        torch.cat([method.attribute(part.requires_grad_(), target=classes).sum(1) for part, classes in parts])
    )


def integrated_gradients(
    classify: Classifier, images: Tensor, target: Tensor, *, batch_size: int, steps: int = 50, baseline: float = 0.0
) -> Attribution:
    """Mean gradient on the straight line from a baseline to the image, times their difference, summed over channels.

    Signed, in logits (Sundararajan et al., 2017, arXiv:1703.01365).

    Args:
        steps: points on the line, one gradient pass each; 50 as in the paper, which finds 20 to 300 enough.
        baseline: value of every pixel at the line's start; 0 is the training images' mean colour in normalised floats.

    Returns: the maps, and as `error` the completeness gap: the map's sum minus logit(image) - logit(baseline).
    """
    from captum.attr import IntegratedGradients

    check_whole("steps", steps)
    method = IntegratedGradients(classify)
    maps, errors = [], []
    for part, classes in batches(batch_size, images, target):
        relevance, error = method.attribute(
            part,
            baselines=float(baseline),
            target=classes,
            n_steps=steps,
            internal_batch_size=batch_size,
            return_convergence_delta=True,
        )
        maps.append(relevance.sum(1))
        errors.append(error)
    return Attribution(torch.cat(maps).detach(), torch.cat(errors).detach())
