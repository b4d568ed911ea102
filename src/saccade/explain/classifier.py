"""A model as a checked function from images to logits, and the checks that explanations share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from saccade.errors import InputError, WorkError

__all__ = ["Classifier", "batches", "check_images", "check_whole", "evaluating", "read_target"]


class Classifier:
    """(B, C, H, W) -> (B, classes): calls the model and refuses what is not a finite table of logits.

    With `questions` (classes, Q) it gives (B, Q), the logits times these: sums of logits, of which a class is one.
    Images are copied first, so that a model whose first operation works in place neither changes the caller's
    tensor nor fails on one that collects gradients.
    """

    def __init__(self, model: nn.Module, questions: Tensor | None = None) -> None:
        self.model = model
        self.questions = questions

    def __call__(self, images: Tensor) -> Tensor:
        logits = self.model(images.clone())
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            raise InputError(
                f"{type(self.model).__name__} returns {_describe(logits)} for {len(images)} images: an explanation "
                "needs one tensor of logits (B, classes). Wrap the model in a module whose forward returns that tensor"
            )
        if not logits.isfinite().all():
            raise WorkError(
                f"{type(self.model).__name__} gives logits that are NaN or infinite: nothing can be explained. Check "
                "its weights, and that the images are normalised as in training"
            )
        if torch.is_grad_enabled() and images.requires_grad and not logits.requires_grad:
            raise InputError(
                f"the logits of {type(self.model).__name__} carry no gradient of the images: it cuts the graph "
                "(detach, no_grad, whole numbers). Remove the cut, or use a method without gradients, such as occlusion"
            )
        return logits if self.questions is None else logits @ self.questions.to(logits)

    def score(self, images: Tensor, target: Tensor) -> Tensor:
        """The sum of the target's logits, whose gradient holds every image's own gradient."""
        return self(images).gather(1, target[:, None]).sum()


def _describe(output: object) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    size = f" of {len(output)}" if isinstance(output, tuple | list | dict) else ""
    return f"a {type(output).__name__}{size}"


@contextmanager
def evaluating(model: nn.Module, *, grad: bool) -> Iterator[Classifier]:
    """The model in eval mode, gradients on or off whatever the caller's context; each module's mode is put back."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            yield Classifier(model)
    finally:
        for module, training in modes:
            module.training = training


def check_images(images: Tensor) -> None:
    """Raise InputError unless `images` are finite normalised floats (B, C, H, W) with B > 0."""
    if not isinstance(images, Tensor):
        raise InputError(f"images are a {type(images).__name__}: give a tensor (B, 3, H, W) of normalised floats")
    shape = tuple(images.shape)
    if images.ndim == 3:
        raise InputError(f"images have shape {shape}: give (B, 3, H, W). Add the batch axis with images[None]")
    if images.ndim != 4 or 0 in shape:
        raise InputError(f"images have shape {shape}: give (B, 3, H, W) with at least one image")
    if not images.is_floating_point():
        raise InputError(f"images are {images.dtype}: give what the model takes, (x / 255 - mean) / std as floats")
    if not images.isfinite().all():
        raise InputError("images hold NaN or infinite values: give finite normalised floats")


def check_whole(name: str, value: int, low: int = 1, high: int | None = None) -> None:
    """Raise InputError unless `value` is a whole number from `low` to `high`."""
    wrong = isinstance(value, bool) or not isinstance(value, int) or value < low
    if wrong or (high is not None and value > high):
        raise InputError(
            f"{name} is {value!r}: give a whole number "
            + (f"of at least {low}" if high is None else f"from {low} to {high}")
        )


def read_target(target: object, classify: Classifier, images: Tensor, batch_size: int, name: str = "target") -> Tensor:
    """(B,) class indices: the given ones, checked, or the classes that the model predicts."""
    with torch.no_grad():
        if target is None:
            return torch.cat([classify(part).argmax(1) for (part,) in batches(batch_size, images)])
        num_classes = classify(images[:1]).shape[1]
    given = torch.as_tensor(target, device=images.device)
    if given.is_floating_point() or given.dtype == torch.bool or given.shape not in ((), (len(images),)):
        raise InputError(
            f"{name} is {given.dtype} of shape {tuple(given.shape)}: give one class index, or one for each of the "
            f"{len(images)} images"
        )
    if given.min() < 0 or given.max() >= num_classes:
        wrong = given.flatten()[(given.flatten() < 0) | (given.flatten() >= num_classes)][0].item()
        raise InputError(f"{name} is {wrong} but the model knows {num_classes} classes: give 0 to {num_classes - 1}")
    return given.long().expand(len(images)).clone()


def batches(batch_size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors' first axis, `batch_size` at a time."""
    return zip(*(tensor.split(batch_size) for tensor in tensors), strict=True)
