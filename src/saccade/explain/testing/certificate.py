"""What the points of a grid say about all images between them, if the model is Lipschitz (arXiv:1710.07859)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.errors import InputError, check_choice
from saccade.explain.classifier import check_images, check_whole, evaluating, read_target

__all__ = ["Certificate", "certify_radius"]

_ORDERS = {"l1": 1.0, "l2": 2.0, "linf": math.inf}


@dataclass(frozen=True)
class Certificate:
    """Bounds of the distance of the nearest misclassified image, among those that differ in the free values alone.

    Attributes:
        radius: no misclassified image is nearer than this; 0 if the grid is too coarse to tell.
        nearest: distance of the nearest misclassified point of the grid, an upper bound; infinite if there is none.
        covering: the largest distance of an image from the grid.
        points: how many were asked.
    """

    radius: float
    nearest: float
    covering: float
    points: int


def certify_radius(
    model: nn.Module,
    image: Tensor,
    *,
    lipschitz: float,
    tau: float,
    within: float,
    free: Tensor | None = None,
    target: int | None = None,
    norm: str = "l2",
    batch_size: int = 256,
    most: int = 200_000,
) -> Certificate:
    """Ask the model about all points of a grid around an image, and say how far around it no error can be.

    Each image lies within `covering` of a point of the grid: tau / 2 in each value, times D^(1/k) in the norm L_k of D
    free values. Where a point's margin, the logit of the class less the largest other, is above lipschitz * covering,
    no image that near can be misclassified; so none is within the distance of the nearest point whose margin is not,
    less covering.

    Args:
        image: (1, C, H, W).
        lipschitz: constant of the margin: it changes by at most this times the distance. Of a linear model, the largest
            dual norm of a difference of two rows.
        tau: step of the grid.
        within: distance up to which points are asked; the radius is at most this less covering.
        free: (C, H, W) booleans, the values that may change; None frees all. The number of points grows as a power of
            their number, so that a certificate is for few.
        target: the class that is right; None takes the predicted one.
        norm: "l1", "l2" or "linf", of distances and of `lipschitz`.
        batch_size: the most images in one forward pass.
        most: the most points of the cube around the ball.

    Raises: InputError for wrong arguments, and if the grid has more points than `most`.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> net[1].weight.data = torch.tensor([[1.0], [-1.0]])  # margin 2 x, Lipschitz constant 2
    >>> found = certify_radius(net, torch.full((1, 1, 1, 1), 0.52), lipschitz=2.0, tau=0.1, within=1.0)
    >>> round(found.radius, 3), round(found.nearest, 3)  # the true distance is 0.52
    (0.45, 0.6)
    """
    check_images(image)
    check_choice("norm", norm, _ORDERS)
    check_whole("batch_size", batch_size)
    if len(image) != 1:
        raise InputError(f"image holds {len(image)} images: give one, (1, C, H, W)")
    for name, value in (("lipschitz", lipschitz), ("tau", tau), ("within", within)):
        if not 0 < value < math.inf:
            raise InputError(f"{name} is {value}: give a number above 0")
    free = torch.ones(image.shape[1:], dtype=torch.bool) if free is None else free.cpu()
    if free.dtype != torch.bool or free.shape != image.shape[1:] or not free.any():
        raise InputError(
            f"free is {free.dtype} of shape {tuple(free.shape)}: give booleans {tuple(image.shape[1:])}, not all false"
        )
    count, reach = int(free.sum()), int(within / tau + 1e-9)
    if (2 * reach + 1) ** count > most:
        raise InputError(
            f"{count} free values with {2 * reach + 1} steps each are more than {most} points: free fewer values, or "
            "give a larger tau or a smaller within"
        )
    steps = torch.arange(-reach, reach + 1, dtype=torch.float64)
    offsets = tau * torch.cartesian_prod(*[steps] * count).view(-1, count)
    distances = torch.linalg.vector_norm(offsets, _ORDERS[norm], dim=1)
    inside = distances <= within * (1 + 1e-12)
    offsets, distances = offsets[inside], distances[inside]
    covering = tau / 2 * (1.0 if norm == "linf" else count ** (1 / _ORDERS[norm]))
    with evaluating(model, grad=False) as classify:
        label = int(read_target(target, classify, image, 1))
        margins = []
        for part in offsets.split(batch_size):
            asked = image.repeat(len(part), 1, 1, 1)
            asked[:, free.to(image.device)] += part.to(image)
            logits = classify(asked).cpu().double()
            own = logits[:, label].clone()
            logits[:, label] = -math.inf
            margins.append(own - logits.amax(1))
    margin = torch.cat(margins)
    unsafe, wrong = distances[margin <= lipschitz * covering], distances[margin <= 0]
    reached = min(unsafe.min().item() if len(unsafe) else math.inf, within)
    nearest = wrong.min().item() if len(wrong) else math.inf
    return Certificate(max(0.0, reached - covering), nearest, covering, len(distances))
