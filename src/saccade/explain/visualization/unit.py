"""What a unit of a network answers to images: a class's logit or probability, or a channel of a layer."""

import torch
from torch import Tensor, nn

from saccade.errors import InputError, WorkError, check_choice
from saccade.explain.classifier import Classifier, batches, check_images, check_whole, evaluating
from saccade.explain.methods.layers import outputs

__all__ = ["Unit", "excitation", "read_layer"]

READINGS = ("logit", "probability")


class Unit:
    """(B, C, H, W) -> (B,), a unit's activations, differentiable; checked once, on one image.

    Args:
        classify: the model, in eval mode.
        target, layer, axis: as in `excitation`.
        image: (1, C, H, W).
    """

    def __init__(self, classify: Classifier, target: int, layer: str | None, axis: int, image: Tensor) -> None:
        self.classify, self.target, self.layer, self.axis = classify, target, layer, axis
        check_whole("target", target, 0)
        with torch.no_grad():
            table = self._table(image)
        if target >= table.shape[1]:
            where = f"{table.shape[1]} classes" if layer is None else f"{table.shape[1]} units in layer {layer!r}"
            raise InputError(f"target is {target} but there are {where}: give 0 to {table.shape[1] - 1}")

    def __call__(self, images: Tensor, reading: str = "logit") -> Tensor:
        table = self._table(images)
        if reading == "probability" and self.layer is None:
            table = table.softmax(1)
        return table[:, self.target].flatten(1).mean(1) if table.ndim > 2 else table[:, self.target]

    def _table(self, images: Tensor) -> Tensor:
        if self.layer is None:
            return self.classify(images)
        return read_layer(self.classify.model, images, self.layer).movedim(self.axis, 1)


def excitation(
    model: nn.Module,
    images: Tensor,
    *,
    target: int,
    layer: str | None = None,
    axis: int = 1,
    reading: str = "logit",
    batch_size: int = 32,
) -> Tensor:
    """How strongly images excite a unit: (B,).

    Args:
        model: runs in eval mode without gradients, and is left as it was.
        images: (B, C, H, W), normalised floats.
        target: class index; with a layer, index of its channel, which is averaged over places.
        layer: name of the module whose output is read; None reads the logits.
        axis: where the layer's output has its channels: 1, or -1 where they are last.
        reading: "logit" or "probability" of a class; a layer is read as it is.
        batch_size: the most images in one forward pass.

    Raises: InputError for wrong arguments, a layer that shows no tensor, and a unit that does not exist.
    """
    check_images(images)
    check_whole("batch_size", batch_size)
    check_choice("reading", reading, READINGS)
    with evaluating(model, grad=False) as classify:
        unit = Unit(classify, target, layer, axis, images[:1])
        return torch.cat([unit(part, reading) for (part,) in batches(batch_size, images)])


def read_layer(model: nn.Module, images: Tensor, layer: str) -> Tensor:
    """A layer's last output (B, ...) while the model runs on images, in the graph."""
    modules = dict(model.named_modules())
    check_choice("layer", layer, modules)
    with outputs({layer: modules[layer]}) as seen:
        model(images.clone())
    if not seen or seen[-1][1].ndim < 2 or len(seen[-1][1]) != len(images):
        given = f"a tensor {tuple(seen[-1][1].shape)}" if seen else "no tensor"
        raise InputError(f"layer {layer!r} shows {given} for {len(images)} images: name one that returns (B, ...)")
    found = seen[-1][1]
    if not found.isfinite().all():
        raise WorkError(f"layer {layer!r} is NaN or infinite: check the model's weights and the images")
    return found
