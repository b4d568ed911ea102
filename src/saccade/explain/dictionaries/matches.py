"""How well features detect attributes: precision, recall and F1 of "the feature is active".

The third axis of Makelov et al. (2024, arXiv:2405.08366).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.errors import InputError

__all__ = ["Matches", "match_features"]


class Matches(NamedTuple):
    """Features beside the values of an attribute.

    Attributes:
        values: (values,), those that occur, in order.
        precision: (features, values), share of the activations where a feature is active that have the value; NaN for
            a feature that is never active.
        recall: (features, values), share of the activations with the value where the feature is active.
        f1: (features, values), their harmonic mean; NaN for a feature that is never active.
    """

    values: Tensor
    precision: Tensor
    recall: Tensor
    f1: Tensor

    def best(self) -> tuple[Tensor, Tensor]:
        """The highest F1 of each value, and its feature: (values,) each. What is NaN counts as lowest."""
        top = self.f1.nan_to_num(-torch.inf).max(0)
        return top.values, top.indices

    def scores(self, labels: Tensor) -> Tensor:
        """(N, features), the F1 of every feature with the value of each row, for labels (N,); NaN becomes -infinity."""
        return self.f1.nan_to_num(-torch.inf).mT[place_values(self.values, labels)]


def match_features(codes: Tensor, labels: Tensor) -> Matches:
    """Precision, recall and F1 of codes (N, features) that differ from 0 against whole-number labels (N,).

    >>> found = match_features(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.5, 0.0]]), torch.tensor([7, 7, 9]))
    >>> found.f1
    tensor([[0.8000, 0.5000],
            [   nan,    nan]])
    """
    if codes.ndim != 2 or labels.shape != codes.shape[:1] or labels.is_floating_point():
        raise InputError(
            f"codes are {tuple(codes.shape)} and labels {labels.dtype} of shape {tuple(labels.shape)}: give (N, "
            "features) and (N,) whole numbers"
        )
    values, place = labels.unique(return_inverse=True)
    active = (codes != 0).double()
    member = torch.nn.functional.one_hot(place, len(values)).double()
    both, fired, size = active.mT @ member, active.sum(0)[:, None], member.sum(0)
    f1 = (2 * both / (fired + size)).where(fired > 0, torch.nan)
    dtype = codes.dtype if codes.is_floating_point() else torch.get_default_dtype()
    return Matches(values, (both / fired).to(dtype), (both / size).to(dtype), f1.to(dtype))


def place_values(values: Tensor, labels: Tensor) -> Tensor:
    """Where each label stands among sorted values. Raises: InputError for one that does not."""
    place = torch.searchsorted(values, labels.contiguous()).clamp_max(len(values) - 1)
    if not (values[place] == labels).all():
        unknown = labels[values[place] != labels].flatten()[0].item()
        raise InputError(f"label {unknown} was not there before: known are {', '.join(map(str, values.tolist()))}")
    return place
