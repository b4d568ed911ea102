"""Dictionaries from known attributes: a vector for each value of each, the bar that learned dictionaries are held to.

Makelov et al. (2024, arXiv:2405.08366).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.explain.dictionaries.matches import place_values

__all__ = ["SupervisedDictionary", "fit_supervised"]

Labels = Mapping[str, Tensor]


class SupervisedDictionary(NamedTuple):
    """Activations as a mean and a vector for the value of each attribute.

    Attributes:
        mean: (dim,).
        values: attribute -> (values,) those known, in order.
        vectors: attribute -> (values, dim); their mean over the activations they were made from is 0.
    """

    mean: Tensor
    values: dict[str, Tensor]
    vectors: dict[str, Tensor]

    def part(self, attribute: str, labels: Tensor) -> Tensor:
        """(N, dim), the vectors of one attribute's values (N,)."""
        check_choice("attribute", attribute, self.vectors)
        return self.vectors[attribute][place_values(self.values[attribute], labels)]

    def reconstruct(self, attributes: Labels) -> Tensor:
        """(N, dim) from the values (N,) of all attributes."""
        if attributes.keys() != self.vectors.keys():
            raise InputError(f"attributes are {', '.join(attributes)}: give {', '.join(self.vectors)}")
        parts = [self.part(name, labels) for name, labels in attributes.items()]
        return self.mean + torch.stack(parts).sum(0)

    def edit(self, x: Tensor, attribute: str, before: Tensor, after: Tensor) -> Tensor:
        """Activations (N, dim) with an attribute's values `before` (N,) exchanged for those of `after`."""
        return x - self.part(attribute, before) + self.part(attribute, after)


def fit_supervised(x: Tensor, attributes: Labels, *, method: str = "least_squares") -> SupervisedDictionary:
    """Make a dictionary from activations (N, dim) and whole-number attributes name -> (N,).

    Args:
        x: activations.
        attributes: what is known of each.
        method: "least_squares" finds all vectors jointly; "mean" takes means of the activations with a value less the
            mean of all, which mixes attributes up wherever they are not balanced.
    """
    check_choice("method", method, ("least_squares", "mean"))
    if x.ndim != 2 or not len(x) or not attributes:
        raise InputError(f"activations are {tuple(x.shape)} with {len(attributes)} attributes: give (N, dim) and one")
    for name, labels in attributes.items():
        if labels.shape != x.shape[:1] or labels.is_floating_point():
            raise InputError(
                f"attribute {name!r} is {labels.dtype} of shape {tuple(labels.shape)}: give whole numbers ({len(x)},)"
            )
    mean, values, members = x.mean(0), {}, {}
    for name, labels in attributes.items():
        values[name], place = labels.unique(return_inverse=True)
        members[name] = torch.nn.functional.one_hot(place, len(values[name])).to(x)
    shares = {name: member / member.sum(0) for name, member in members.items()}
    if method == "mean":
        return SupervisedDictionary(mean, values, {name: share.mT @ (x - mean) for name, share in shares.items()})
    # centred columns: an attribute's one-hots sum to 1, and the solution of least norm is the one for these
    centred = torch.cat([member - member.mean(0) for member in members.values()], 1)
    found = (torch.linalg.pinv(centred.double()) @ (x - mean).double()).to(x)
    vectors = dict(zip(members, found.split([len(each) for each in values.values()])))
    for name, member in members.items():
        vectors[name] = vectors[name] - member.mean(0) @ vectors[name]
    return SupervisedDictionary(mean, values, vectors)
