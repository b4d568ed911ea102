"""evaluate: how well a network does on held-out images."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from saccade.data import normalize
from saccade.errors import InputError
from saccade.training.batches import Batches, make_loader, num_images

__all__ = ["Evaluation", "evaluate"]


class Evaluation(NamedTuple):
    """What `evaluate` found, on the CPU.

    Args:
        correct: (N,) bool, an entry for each image in the order of the dataset.
        predicted: (N,) long, the class with the largest logit.
        loss: mean cross-entropy in nats, without label smoothing.
    """

    correct: Tensor
    predicted: Tensor
    loss: float


def evaluate(
    model: nn.Module, dataset: Dataset, *, mean: Sequence[float], std: Sequence[float], batch_size: int = 256
) -> Evaluation:
    """Compare what `model` says about each image with its label.

    Args:
        model: takes normalised images (B, 3, S, S), returns logits (B, classes). It runs where its parameters are, in
            evaluation mode, and is left in the mode it was in.
        dataset: items (uint8 image (3, S, S), label).
        mean, std: of each colour, in [0, 1], as in `ImageData`.
        batch_size: changes time and memory, not the result.

    Raises: InputError if the dataset is empty.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    training = model.training
    model.eval()
    found = []
    try:
        with torch.no_grad():
            for images, labels, *_ in make_loader(dataset, Batches(num_images(dataset), batch_size)):
                logits = model(normalize(images.to(device), mean, std))
                found.append([part.cpu() for part in judge(logits, labels.to(device))])
    finally:
        model.train(training)
    predicted, correct, losses = (torch.cat(parts) for parts in zip(*found))
    return Evaluation(correct, predicted, losses.mean().item())


def judge(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find, for each row of logits: the predicted class, whether it is the label, and the cross-entropy."""
    predicted = logits.argmax(1)
    return predicted, predicted == labels, cross_entropy(at_least_float32(logits), labels, reduction="none")


def at_least_float32(logits: Tensor) -> Tensor:
    """Widen half precision, in which a cross-entropy would lose digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_logits(logits: Tensor, images: int, classes: int) -> None:
    """Raise InputError unless there is a row of `classes` logits for each of `images` images."""
    if logits.shape != (images, classes):
        raise InputError(
            f"the model returned {tuple(logits.shape)} for {images} images of {classes} classes, expected "
            f"({images}, {classes}): build it with num_classes={classes}"
        )
