"""The maps inside a network: the outputs of named layers, and which layer to read where none is named."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from saccade.errors import InputError, check_choice
from saccade.explain.classifier import Classifier

__all__ = ["LayerMap", "activations_and_slopes", "find_maps"]

_CHANNEL_AXIS = {"NCHW": 1, "NHWC": 3}
_REPEATERS = (nn.Dropout, nn.Identity, nn.Softmax)  # make no features; their output may be an attention map

LayerMap = tuple[str, int]  # name of a layer, and the axis of its map's channels


def find_maps(
    classify: Classifier,
    image: Tensor,
    layers: Sequence[str] | None,
    layout: str | None,
    count: int = 1,
) -> list[LayerMap]:
    """The named layers, checked to return a map; or the last layer that does, and the last at larger resolutions.

    Args:
        image: (1, C, H, W).
        layers: names; None looks for the last layer to run whose output is a map larger than 1 x 1, that is the last
            before global pooling.
        layout: "NCHW" or "NHWC"; None infers it from the sides, which must have the image's proportions, and reads a
            cube, which could be both, as NCHW.
        count: how many to look for, each the last with more tokens than those after it.

    Returns: in the order of the forward pass.
    """
    modules = dict(classify.model.named_modules())
    if layout is not None:
        check_choice("layout", layout, _CHANNEL_AXIS)
    if layers is not None:
        for name in layers:
            check_choice("layer", name, modules)
        return [_find_maps(classify, image, {name: modules[name]}, layout, 1)[0] for name in layers]
    candidates = {name: module for name, module in modules.items() if name and not isinstance(module, _REPEATERS)}
    return _find_maps(classify, image, candidates, layout, count)


def activations_and_slopes(
    classify: Classifier, images: Tensor, target: Tensor, layers: Sequence[LayerMap]
) -> list[tuple[Tensor, Tensor]]:
    """(B, C, h, w) of each layer's last output, and the gradient of the target's logit by it."""
    modules = dict(classify.model.named_modules())
    with outputs({name: modules[name] for name, _ in layers}) as seen:
        score = classify.score(images.requires_grad_(), target)
    last = dict(seen)  # of several calls of a layer the last stays
    wanted = [last[name] for name, _ in layers]
    reached = [each for each in wanted if each.requires_grad]
    slopes = iter(torch.autograd.grad(score, reached, allow_unused=True) if reached else ())
    found = []
    for (name, axis), activation in zip(layers, wanted):
        slope = next(slopes) if activation.requires_grad else None
        if slope is None:
            raise InputError(f"layer {name!r}: the logit does not depend on its output. Name another layer")
        found.append((activation.detach().movedim(axis, 1), slope.movedim(axis, 1)))
    return found


@contextmanager
def outputs(modules: dict[str, nn.Module]) -> Iterator[list[tuple[str, Tensor]]]:
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


def _find_maps(
    classify: Classifier, image: Tensor, modules: dict[str, nn.Module], layout: str | None, count: int
) -> list[LayerMap]:
    with torch.no_grad(), outputs(modules) as seen:
        classify(image)
    axes = _CHANNEL_AXIS.values() if layout is None else [_CHANNEL_AXIS[layout]]
    found: list[LayerMap] = []
    tokens = 0
    for name, output in reversed(seen):
        axis = min(axes, key=lambda axis: _mismatch(output.shape, axis, image.shape))
        if _mismatch(output.shape, axis, image.shape) >= max(image.shape[2:]):  # wrong by a token or more
            continue
        here = output.numel() // output.shape[axis]
        if here > tokens:
            found.insert(0, (name, axis))
            tokens = here
        if len(found) == count:
            return found
    if found:
        return found
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
