"""What is measured of dictionaries and their codes."""

import torch
from torch import Tensor

from saccade.errors import InputError
from saccade.explain.classifier import check_whole

__all__ = ["babel", "babel_of_chosen", "effective_rank", "explained_variance", "modality_score", "num_active"]


def explained_variance(x: Tensor, reconstruction: Tensor) -> float:
    """R^2: 1 minus the squared error over the squared distance of activations (N, dim) from their mean.

    >>> explained_variance(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0]]))
    0.5
    """
    return (1 - (x - reconstruction).square().sum() / (x - x.mean(0)).square().sum()).item()


def num_active(codes: Tensor) -> float:
    """L0: the mean number of codes (..., concepts) that differ from 0."""
    return (codes != 0).double().sum(-1).mean().item()


def effective_rank(codes: Tensor) -> float:
    """exp of the entropy of the eigenvalues of Z^T Z, as shares of their sum; Z are codes (N, concepts).

    >>> round(effective_rank(torch.eye(3)), 4)
    3.0
    """
    share = torch.linalg.svdvals(codes.double()).square()
    share = share / share.sum()
    return torch.special.entr(share).sum().exp().item()


def babel(atoms: Tensor, size: int) -> float:
    """The most that `size` atoms together resemble another one: max over j of its `size` largest |cosines|, summed.

    Args:
        atoms: (concepts, dim); lengths do not matter.
        size: from 1 to concepts - 1.
    """
    check_whole("size", size, 1, len(atoms) - 1)
    return _cosines(atoms).topk(size, -1).values.sum(-1).max().item()


def babel_of_chosen(atoms: Tensor, codes: Tensor) -> float:
    """Babel among the atoms that codes (N, concepts) choose together, each against all others, averaged over rows.

    Rows with fewer than two atoms count nothing. Raises: InputError if no row has two.
    """
    chosen = (codes != 0).flatten(0, -2)
    chosen = chosen[chosen.sum(-1) > 1].to(atoms.dtype)
    if not len(chosen):
        raise InputError("no row of codes has two active atoms: there is nothing that was chosen together")
    return (chosen * (chosen @ _cosines(atoms))).amax(-1).mean().item()


def modality_score(codes: Tensor, other: Tensor) -> Tensor:
    """Mean code in one modality over the sum of the means in both: (concepts,), 1 where it occurs in the first alone.

    Concepts that occur in neither are NaN.
    """
    first, second = codes.flatten(0, -2).mean(0), other.flatten(0, -2).mean(0)
    return first / (first + second)


def _cosines(atoms: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(atoms, dim=-1)
    return (unit @ unit.mT).abs().fill_diagonal_(0)
