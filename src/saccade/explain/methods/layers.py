"""The maps inside a network: the outputs of named layers, and which layer to read where none is named.

A map lies as (B, C, h, w), (B, h, w, C) or as tokens (B, prefix + h w, C). Nothing of that needs to be named: sides
follow from the image's proportions, prefix tokens from the model's `num_prefix_tokens` or from what a grid leaves over.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from saccade.errors import InputError, check_choice
from saccade.explain.classifier import Classifier
from saccade.explain.methods.attribution import LayerMap

__all__ = ["activations_and_slopes", "find_maps", "token_grid"]

_CHANNEL_AXIS = {"NCHW": 1, "NHWC": 3}
_LAYOUTS = (*_CHANNEL_AXIS, "NLC")
_REPEATERS = (nn.Dropout, nn.Identity, nn.Softmax)  # make no features; their output may be an attention map
_MOST_PREFIX = 16  # tokens: registers come by four or eight


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
        layers: names; None looks for the last layer to run whose output is a map larger than 1 x 1 on which the answer
            depends. Behind the last attention of a network that is read at its class token no patch counts any more:
            there it is the last norm before that.
        layout: "NCHW", "NHWC" or "NLC"; None infers it from the sides, which must have the image's proportions, and
            reads a cube, which could be both, as NCHW.
        count: how many to look for, each the last with more tokens than those after it.

    Returns: in the order of the forward pass.
    """
    modules = dict(classify.model.named_modules())
    if layout is not None:
        check_choice("layout", layout, _LAYOUTS)
    if layers is not None:
        for name in layers:
            check_choice("layer", name, modules)
        return [_find_named(classify, image, name, modules[name], layout) for name in layers]
    candidates = {name: module for name, module in modules.items() if name and not isinstance(module, _REPEATERS)}
    return _find_last(classify, image, candidates, layout, count)


def activations_and_slopes(
    classify: Classifier, images: Tensor, target: Tensor, layers: Sequence[LayerMap]
) -> list[tuple[Tensor, Tensor]]:
    """(B, C, h, w) of each layer's last output, and the gradient of the target's logit by it."""
    modules = dict(classify.model.named_modules())
    with outputs({each.name: modules[each.name] for each in layers}) as seen:
        score = classify.score(images.requires_grad_(), target)
    last = dict(seen)  # of several calls of a layer the last stays
    wanted = [last[each.name] for each in layers]
    reached = [each for each in wanted if each.requires_grad]
    slopes = iter(torch.autograd.grad(score, reached, allow_unused=True) if reached else ())
    found = []
    for layer, activation in zip(layers, wanted):
        slope = next(slopes) if activation.requires_grad else None
        if slope is None:
            raise InputError(f"layer {layer.name!r}: the logit does not depend on its output. Name another layer")
        found.append((_to_map(activation.detach(), layer), _to_map(slope, layer)))
    return found


def token_grid(tokens: int, image: Sequence[int], prefix: int | None = None) -> tuple[int, int, int] | None:
    """(rows, columns, prefix tokens) of tokens that cover an image; None where they fit no grid of its proportions.

    Args:
        tokens: their number, prefix tokens among them.
        image: its sides, (..., H, W).
        prefix: how many the model says it has; a layer may come before they are put in. None takes the fewest that
            leave a grid.

    >>> token_grid(197, (3, 224, 224))
    (14, 14, 1)
    """
    height, width = image[-2:]
    for extra in range(_MOST_PREFIX + 1) if prefix is None else sorted({prefix, 0}, reverse=True):
        rows = math.isqrt(max(0, tokens - extra) * height // width)
        columns = rows * width // height
        covers = rows * columns == tokens - extra > 1 and rows * width == columns * height
        if covers and (prefix is not None or height % rows == 0):
            return rows, columns, extra
    return None


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


def _find_named(classify: Classifier, image: Tensor, name: str, module: nn.Module, layout: str | None) -> LayerMap:
    with torch.no_grad(), outputs({name: module}) as seen:
        classify(image)
    found = _read_map(classify, name, seen[-1][1], image, layout) if seen else None
    if found is None:
        raise _no_map(f"layer {name!r} does not return", seen, image)
    return found._replace(inferred=tuple(part for part in found.inferred if part != "layer"))


def _find_last(
    classify: Classifier, image: Tensor, modules: dict[str, nn.Module], layout: str | None, count: int
) -> list[LayerMap]:
    """The last map that counts, and those before it with more tokens."""
    with torch.enable_grad(), outputs(modules) as seen:
        answer = classify(image.clone().requires_grad_()).max()
    last: dict[str, Tensor] = {}  # of several calls of a layer the last stays, at its place
    for name, output in seen:
        last.pop(name, None)
        last[name] = output
    read = {name: _read_map(classify, name, output, image, layout) for name, output in last.items()}
    maps = {name: layer for name, layer in read.items() if layer is not None and last[name].requires_grad}
    slopes = torch.autograd.grad(answer, [last[name] for name in maps], allow_unused=True) if maps else ()
    alive = [
        layer
        for layer, slope in zip(maps.values(), slopes)
        if slope is not None and (layer.layout != "NLC" or _to_map(slope, layer).any())
    ]
    if alive and alive[-1].layout == "NLC" and alive[-1] is not [*maps.values()][-1]:
        norms = [layer for layer in alive if "norm" in type(modules[layer.name]).__name__.lower()]
        alive = alive[: alive.index(norms[-1]) + 1] if norms else alive
    found: list[LayerMap] = []
    tokens = 0
    for layer in reversed(alive):
        here = layer.grid[0] * layer.grid[1]
        if here > tokens:
            found.insert(0, layer)
            tokens = here
        if len(found) == count:
            break
    if not found:
        raise _no_map("no layer returns", seen, image)
    return found


def _read_map(classify: Classifier, name: str, output: Tensor, image: Tensor, layout: str | None) -> LayerMap | None:
    """How a layer's output for one image lies on it; None for what is no map."""
    guessed = ("layer", "grid", *["layout"] * (layout is None))
    if output.ndim == 3 and len(output) == 1 and layout in (None, "NLC"):
        told = getattr(classify.model, "num_prefix_tokens", None)
        grid = token_grid(output.shape[1], image.shape, told if isinstance(told, int) else None)
        guessed += ("prefix",) * (told is None)
        return None if grid is None else LayerMap(name, "NLC", grid[:2], grid[2], guessed)
    if layout == "NLC":
        return None
    layouts = [layout] if layout else list(_CHANNEL_AXIS)
    best = min(layouts, key=lambda each: _mismatch(output.shape, _CHANNEL_AXIS[each], image.shape))
    if _mismatch(output.shape, _CHANNEL_AXIS[best], image.shape) >= max(image.shape[2:]):  # wrong by a token or more
        return None
    height, width = (side for i, side in enumerate(output.shape) if i not in (0, _CHANNEL_AXIS[best]))
    return LayerMap(name, best, (height, width), inferred=guessed)


def _to_map(values: Tensor, layer: LayerMap) -> Tensor:
    """(B, C, h, w)."""
    if layer.layout == "NLC":
        return values[:, layer.prefix :].unflatten(1, layer.grid).movedim(3, 1)
    return values.movedim(_CHANNEL_AXIS[layer.layout], 1)


def _no_map(what: str, seen: Sequence[tuple[str, Tensor]], image: Tensor) -> InputError:
    shapes = ", ".join(f"{name}: {tuple(output.shape)}" for name, output in seen[-3:]) or "no tensor"
    return InputError(
        f"{what} a map (B, C, h, w), (B, h, w, C) or tokens (B, N, C) in the proportions of the {image.shape[2]} x "
        f"{image.shape[3]} image (last outputs: {shapes}). Name another layer, or use a method that reads pixels, such "
        "as integrated_gradients"
    )


def _mismatch(shape: torch.Size, axis: int, image: torch.Size) -> float:
    """How far a tensor is from the image's proportions, in pixels times tokens; infinite for what is no map."""
    if len(shape) != 4 or shape[0] != 1:
        return math.inf
    height, width = (side for i, side in enumerate(shape) if i not in (0, axis))
    fits = height <= image[2] and width <= image[3] and height * width > 1
    return abs(height * image[3] - width * image[2]) if fits else math.inf
