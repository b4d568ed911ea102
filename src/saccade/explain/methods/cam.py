"""Grad-CAM (Selvaraju et al., 2017, arXiv:1610.02391), on the last map of any network, channels first or last."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from saccade.errors import InputError, check_choice
from saccade.explain.classifier import Classifier, batches
from saccade.explain.methods.attribution import Attribution, enlarge

__all__ = ["grad_cam"]

_CHANNEL_AXIS = {"NCHW": 1, "NHWC": 3}
_REPEATERS = (nn.Dropout, nn.Identity, nn.Softmax)  # make no features; their output may be an attention map


def grad_cam(
    classify: Classifier,
    images: Tensor,
    target: Tensor,
    *,
    batch_size: int,
    layer: str | None = None,
    layout: str | None = None,
) -> Attribution:
    """Activations of one layer, weighted by each channel's mean gradient and summed over channels, at pixel resolution.

    Signed, in logits: the paper keeps the positive part for its pictures, but ranking pixels needs both.
    Interpolation is bilinear.

    Args:
        layer: module whose output is a map; None takes the last one to run whose output is a map larger than 1 x 1,
            that is the last before global pooling.
        layout: "NCHW" or "NHWC", where the layer's output has its channels; None infers it from the sides, which must
            have the image's proportions, and reads a cube, which could be both, as NCHW.

    Raises: InputError if no layer returns a map, if the named one does not, or if the logit does not depend on it.
    """
    modules = dict(classify.model.named_modules())
    if layer is not None:
        check_choice("layer", layer, modules)
    if layout is not None:
        check_choice("layout", layout, _CHANNEL_AXIS)
    if layer is None:
        candidates = {name: module for name, module in modules.items() if name and not isinstance(module, _REPEATERS)}
    else:
        candidates = {layer: modules[layer]}
    name, axis = _find_map(classify, images[:1], candidates, layout)
    maps = []
    for part, classes in batches(batch_size, images, target):
        with _outputs({name: modules[name]}) as seen:
            score = classify.score(part.requires_grad_(), classes)
        activation = seen[-1][1]
        (slope,) = torch.autograd.grad(score, activation, allow_unused=True) if activation.requires_grad else (None,)
        if slope is None:
            raise InputError(f"layer {name!r}: the logit does not depend on its output. Name another layer")
        activation, slope = activation.movedim(axis, 1), slope.movedim(axis, 1)
        cam = (slope.mean((2, 3), keepdim=True) * activation).sum(1)
        maps.append(enlarge(cam.detach(), images.shape[-2:]).to(images))
    return Attribution(torch.cat(maps), layer=name)


@contextmanager
def _outputs(modules: dict[str, nn.Module]) -> Iterator[list[tuple[str, Tensor]]]:
    """(name, output) of each call inside the `with`, in order; the model goes on with a copy, to change at will."""
    seen: list[tuple[str, Tensor]] = []

    def keep(name: str, output: object) -> Tensor | None:
        if not isinstance(output, Tensor):
            return None
        seen.append((name, output))
        return output.clone()

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(
                module.register_forward_hook(lambda _module, _args, output, name=name: keep(name, output))
            )
        yield seen


def _find_map(
    classify: Classifier, image: Tensor, modules: dict[str, nn.Module], layout: str | None
) -> tuple[str, int]:
    """Name of the last of `modules` to return a map, and the axis of the map's channels."""
    with torch.no_grad(), _outputs(modules) as seen:
        classify(image)
    axes = _CHANNEL_AXIS.values() if layout is None else [_CHANNEL_AXIS[layout]]
    for name, output in reversed(seen):
        axis = min(axes, key=lambda axis: _mismatch(output.shape, axis, image.shape))
        if _mismatch(output.shape, axis, image.shape) < max(image.shape[2:]):  # right to less than a token
            return name, axis
    what = f"layer {next(iter(modules))!r} does not return" if len(modules) == 1 else "no layer returns"
    shapes = ", ".join(f"{name}: {tuple(output.shape)}" for name, output in seen[-3:]) or "no tensor"
    raise InputError(
        f"{what} a map (B, C, h, w) or (B, h, w, C) in the proportions of the {image.shape[2]} x {image.shape[3]} "
        f"image (last outputs: {shapes}). Name another layer, or use a method that reads pixels, such as "
        "integrated_gradients"
    )


def _mismatch(shape: torch.Size, axis: int, image: torch.Size) -> float:
    """How far a tensor is from the image's proportions, in pixels times tokens; infinite for what is no map."""
    if len(shape) != 4 or shape[0] != 1:
        return math.inf
    height, width = (side for i, side in enumerate(shape) if i not in (0, axis))
    fits = height <= image[2] and width <= image[3] and height * width > 1
    return abs(height * image[3] - width * image[2]) if fits else math.inf
