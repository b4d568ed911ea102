"""Masks that switch concepts partly off, and the indices that are read from a model's answers to them."""

import torch
from torch import Tensor

from saccade.errors import check_choice
from saccade.explain.classifier import check_whole

__all__ = ["halton_design", "hsic_indices", "sobol_indices"]

_VARIANCES = ("both", "first")


def halton_design(num_concepts: int, designs: int = 32) -> Tensor:
    """Masks for `sobol_indices`: designs A and B of Halton points, then for each concept A with that column of B.

    The points are not scrambled and start at the origin.

    Returns: (designs * (num_concepts + 2), num_concepts) float64 in 0..1.
    """
    from scipy.stats.qmc import Halton

    check_whole("num_concepts", num_concepts)
    check_whole("designs", designs, 2)
    points = torch.from_numpy(Halton(2 * num_concepts, scramble=False).random(designs))
    a, b = points[:, :num_concepts], points[:, num_concepts:]
    swapped = a.repeat(num_concepts, 1, 1)
    column = torch.arange(num_concepts)
    swapped[column, :, column] = b.mT
    return torch.cat([a, b, swapped.flatten(0, 1)])


def sobol_indices(answers: Tensor, num_concepts: int, *, variance: str = "both") -> Tensor:
    """Total Sobol indices by Jansen's estimator: the share of the variance that is gone when all other masks are known.

    Args:
        answers: (..., designs * (num_concepts + 2)), to the masks of `halton_design`.
        variance: from designs "both", or from the "first" alone as in CRAFT's code.

    Returns: (..., num_concepts) float64; 0 where the answer never changes.
    """
    check_choice("variance", variance, _VARIANCES)
    answers = answers.double().unflatten(-1, (num_concepts + 2, -1))
    a, swapped = answers[..., 0, :], answers[..., 2:, :]
    spread = (answers[..., :2, :].flatten(-2) if variance == "both" else a).var(-1, keepdim=True)
    total = (a.unsqueeze(-2) - swapped).square().mean(-1) / 2
    return torch.where(spread > 0, total / torch.where(spread > 0, spread, 1), 0)


def hsic_indices(answers: Tensor, masks: Tensor) -> Tensor:
    """Hilbert-Schmidt independence criterion between each concept's mask and the answer (2022, arXiv:2206.06219).

    Masks of 0 and 1 have the kernel that tells equal from unequal, answers a Gaussian one whose width is their median
    distance. 0 is independence; it has no sign.

    Args:
        answers: (..., M).
        masks: (M, num_concepts) of 0 and 1.

    Returns: (..., num_concepts) float64.
    """
    answers, masks = answers.double(), masks.double()
    apart = (answers.unsqueeze(-1) - answers.unsqueeze(-2)).square()
    count = answers.shape[-1]
    width = apart.flatten(-2).sqrt().median(-1).values.square()[..., None, None]
    kernel = torch.exp(-apart / (2 * torch.where(width > 0, width, 1)))
    centred = masks - masks.mean(0)  # centring leaves 2 c c^T of [m = m'] = m m' + (1 - m)(1 - m')
    return 2 * torch.einsum("mc,...mn,nc->...c", centred, kernel, centred) / (count - 1) ** 2
