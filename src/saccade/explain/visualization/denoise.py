"""Total variation, and the image nearest to a given one that has little of it (Rudin, Osher and Fatemi, 1992)."""

import torch
from torch import Tensor

from saccade.errors import InputError
from saccade.explain.classifier import check_whole

__all__ = ["denoise_total_variation", "total_variation"]


def total_variation(images: Tensor) -> Tensor:
    """Sum over places of the length of each channel's gradient, forward differences: (..., H, W) -> (...).

    >>> total_variation(torch.tensor([[0.0, 3.0], [4.0, 3.0]]))  # 5 at the first place, 0 and 1 beside and below
    tensor(6.)
    """
    below = torch.diff(images, dim=-2, append=images[..., -1:, :])
    right = torch.diff(images, dim=-1, append=images[..., -1:])
    return torch.hypot(below, right).sum((-2, -1))


def denoise_total_variation(images: Tensor, weight: float, *, iterations: int = 100) -> Tensor:
    """Minimise the total variation of u plus weight / 2 times the squared distance of u from the image.

    The weight is that of scikit-image's `denoise_tv_bregman`: a larger one smooths less, and as u has a unit, so has
    the weight: images in 0..255 want one 255 times smaller than images in 0..1. Ours is the fast gradient projection on
    the dual (Beck and Teboulle, 2009), which serves batches on any device and keeps each channel's mean. Split Bregman
    there agrees inside the image alone: its outermost pixels are far from the minimum.

    Args:
        images: (..., H, W); channels are smoothed one by one.
        weight: above 0.
        iterations: of the projection. What is left of the error falls with their square.

    Returns: (..., H, W), in the dtype of the images.
    Raises: InputError for a weight that is not above 0.
    """
    if not weight > 0:
        raise InputError(f"weight is {weight}: give a number above 0; a larger one smooths less")
    check_whole("iterations", iterations)
    dual, momentum = images.new_zeros(2, *images.shape), 1.0
    ahead = dual.clone()
    for _ in range(iterations):
        found = _restore(images, ahead, weight)
        ahead[0, ..., :-1, :].add_(found[..., 1:, :] - found[..., :-1, :], alpha=weight / 8)
        ahead[1, ..., :-1].add_(found[..., 1:] - found[..., :-1], alpha=weight / 8)
        moved = ahead / torch.hypot(ahead[0], ahead[1]).clamp(min=1)
        after = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead, dual, momentum = dual.lerp(moved, 1 + (momentum - 1) / after), moved, after
    return _restore(images, dual, weight)


def _restore(images: Tensor, dual: Tensor, weight: float) -> Tensor:
    """The image of a dual (2, ..., H, W), a flow downwards and one to the right that do not leave it."""
    below, right = dual[0, ..., :-1, :] / weight, dual[1, ..., :-1] / weight
    found = images.clone()
    found[..., :-1, :].add_(below)
    found[..., 1:, :].sub_(below)
    found[..., :-1].add_(right)
    found[..., 1:].sub_(right)
    return found
