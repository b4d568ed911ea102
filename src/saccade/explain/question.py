"""What a map answers: why this class, this group, and why not that one (the two axes of arXiv:2511.13081).

A question is one weight a class: the answer is the weighted sum of logits, so that every method of `explain` serves
every question, and the same weights on probabilities read it out of a removal curve.
"""

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from saccade.errors import InputError
from saccade.explain.classifier import Classifier, read_target

__all__ = ["Classes", "Question", "group_mask", "read_question"]

Classes = int | Tensor | Set[int]  # a class, (B,) classes, a group, or (B, classes) booleans: a group an image


@dataclass(frozen=True)
class Question:
    """Why `target`, and where `against` is given: why not that.

    Attributes:
        target, against: (B,) long, one class an image, or (B, classes) booleans, a group an image.
        weights: (B, classes) float64, of the logits that the answer sums: the mean over `target` minus that over
            `against`.
    """

    target: Tensor
    against: Tensor | None
    weights: Tensor

    @property
    def is_class(self) -> bool:
        """Whether it is the plain question: why this class."""
        return self.against is None and self.target.ndim == 1

    def ask(self, classify: Classifier) -> tuple[Classifier, Tensor]:
        """The model as a table of answers, and the column of each image: for a plain question, logits and classes."""
        if self.is_class:
            return classify, self.target
        asked, column = self.weights.unique(dim=0, return_inverse=True)
        return classify.asking(asked.T), column


def read_question(
    target: Classes | None, against: Classes | None, classify: Classifier, images: Tensor, batch_size: int
) -> Question:
    """Check both sides and sum up what they ask; a target of None is the predicted class."""
    first = read_target(target, classify, images, batch_size) if _is_class(target) else None
    with torch.no_grad():
        num_classes = classify(images[:1]).shape[1]
    first = group_mask("target", target, num_classes, images) if first is None else first
    weights, second = _mean(first, num_classes), None
    if against is not None:
        second = (
            read_target(against, classify, images, batch_size, "against")
            if _is_class(against)
            else group_mask("against", against, num_classes, images)
        )
        others = _mean(second, num_classes)
        shared = ((weights > 0) & (others > 0)).nonzero()
        if len(shared):
            image, label = shared[0].tolist()
            raise InputError(
                f"class {label} stands in target and in against (image {image}): a contrast needs two sides without a "
                "common class"
            )
        weights = weights - others
    return Question(first, second, weights)


def group_mask(name: str, group: Classes | None, num_classes: int, images: Tensor) -> Tensor:
    """(B, classes) booleans: a set of classes for all images, or checked masks."""
    if isinstance(group, Set):
        if not group or not all(type(label) is int and 0 <= label < num_classes for label in group):
            raise InputError(
                f"{name} is the group {set(group) or '{}'}: give at least one class, each from 0 to {num_classes - 1}"
            )
        mask = torch.zeros(num_classes, dtype=torch.bool, device=images.device)
        mask[sorted(group)] = True
        return mask.expand(len(images), -1)
    expected = (len(images), num_classes)
    if not isinstance(group, Tensor) or group.dtype != torch.bool or tuple(group.shape) != expected:
        given = f"{group.dtype} of shape {tuple(group.shape)}" if isinstance(group, Tensor) else repr(group)
        raise InputError(f"{name} is {given}: a group is a set of classes, or booleans {expected}")
    if not group.any(1).all():
        raise InputError(f"{name} has an image with an empty group: name at least one class for each image")
    return group.to(images.device)


def _is_class(target: Classes | None) -> bool:
    return not isinstance(target, Set) and getattr(target, "dtype", None) != torch.bool


def _mean(classes: Tensor, num_classes: int) -> Tensor:
    table = one_hot(classes, num_classes) if classes.ndim == 1 else classes
    return table.double() / table.double().sum(1, keepdim=True)
