"""Which component carries a difference between two runs: patched in, by gradients, or by relevance coefficients.

Activation patching runs the corrupted input once for each component, with that component's clean activation.
Attribution patching (Nanda, 2023) estimates all of them from one gradient; RelP (2025, arXiv:2508.21258) takes the
coefficients of relevance propagation in place of the gradient. All three give scores of the same shape and sign.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from saccade.errors import InputError
from saccade.explain.relevance.modules import check_points, watching
from saccade.explain.relevance.recipes import Recipe, read_recipe
from saccade.explain.relevance.tape import Recorder, record
from saccade.explain.relevance.walk import walk

__all__ = ["activation_patching", "attribution_patching", "coefficients", "relevance_patching"]

Metric = Callable[[Any], Tensor]


def activation_patching(
    model: nn.Module,
    clean: Tensor,
    corrupted: Tensor,
    metric: Metric,
    components: Sequence[str],
    *,
    axes: tuple[int, ...] = (),
) -> dict[str, Tensor]:
    """Rise of the metric when one component of the corrupted run gets its clean activation.

    Args:
        model: any module.
        clean, corrupted: inputs of the same shape.
        metric: what the model returns -> one number.
        components: names of modules, whose output is patched, or "NAME:in" for their first input.
        axes: of an activation, along which entries are patched one by one: (1,) patches each position by itself.

    Returns: component -> scores, one for each entry along `axes`. Costs a forward pass for each score, and two.
    """
    _check(model, clean, corrupted, components)
    with torch.no_grad():
        kept = _activations(model, clean, components)
        base = metric(model(corrupted))
        scores: dict[str, Tensor] = {}
        for name, activation in kept.items():
            shape = [activation.shape[axis] for axis in axes]
            rises = [
                metric(_patched(model, corrupted, name, activation, axes, place)) - base
                for place in product(*(range(n) for n in shape))
            ]
            scores[name] = torch.stack(rises).reshape(shape)
    return scores


def attribution_patching(
    model: nn.Module,
    clean: Tensor,
    corrupted: Tensor,
    metric: Metric,
    components: Sequence[str],
    *,
    axes: tuple[int, ...] = (),
) -> dict[str, Tensor]:
    """(clean - corrupted activation) times gradient of the metric on the corrupted run; see `activation_patching`."""
    return relevance_patching(model, clean, corrupted, metric, components, axes=axes, recipe="gradient")


def relevance_patching(
    model: nn.Module,
    clean: Tensor,
    corrupted: Tensor,
    metric: Metric,
    components: Sequence[str],
    *,
    axes: tuple[int, ...] = (),
    recipe: str | Recipe = "relp",
) -> dict[str, Tensor]:
    """(clean - corrupted activation) times relevance coefficient on the corrupted run; see `activation_patching`.

    Two forward passes and one walk back, whatever the number of components.
    """
    _check(model, clean, corrupted, components)
    with torch.no_grad():
        kept = _activations(model, clean, components)
        found = coefficients(model, corrupted, metric, components, recipe=recipe)
        scores = {}
        for name, (activation, c) in found.items():
            part = c * (kept[name] - activation)
            others = [axis for axis in range(part.ndim) if axis not in [a % part.ndim for a in axes]]
            scores[name] = part.sum(others) if others else part
    return scores


def coefficients(
    model: nn.Module, inputs: Tensor, metric: Metric, components: Sequence[str], *, recipe: str | Recipe = "relp"
) -> dict[str, tuple[Tensor, Tensor]]:
    """Activation a and coefficient c of each component; a * c is its relevance for the metric.

    Raises: InputError for a recipe whose messages are relevance and not coefficients.
    """
    chosen = read_recipe(recipe)
    if chosen.message != "coefficient":
        raise InputError(
            f"recipe {chosen.name!r} propagates relevance: give 'relp' or 'gradient', which have coefficients"
        )
    check_points(model, components)

    def run(recorder: Recorder, given: tuple[Tensor, ...]) -> Tensor:
        with watching(model, components, recorder.mark):
            returned = model(*given)
        return recorder.mark("output", metric(returned))

    named = dict(model.named_parameters()) | dict(model.named_buffers())
    tape, out = record(run, [inputs.detach()], named, chosen.needs)
    if out.numel() != 1:
        raise InputError(f"metric gives a tensor of shape {tuple(out.shape)}: it must give one number")
    if "output" not in tape.marks:
        raise InputError("the metric does not depend on the inputs")
    marks = {name: value for name, value in tape.marks.items() if name != "output" and not name.startswith("input.")}
    found = walk(tape, chosen, {tape.marks["output"]: torch.ones_like(out)}, marks.values())
    return {
        name: (value.tensor, found.values.get(value, torch.zeros_like(value.tensor))) for name, value in marks.items()
    }


def _check(model: nn.Module, clean: Tensor, corrupted: Tensor, components: Sequence[str]) -> None:
    check_points(model, components)
    if clean.shape != corrupted.shape:
        raise InputError(
            f"clean is {tuple(clean.shape)} but corrupted is {tuple(corrupted.shape)}: give the same shape"
        )


def _activations(model: nn.Module, inputs: Tensor, components: Sequence[str]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}

    def see(name: str, value: Tensor) -> Tensor:
        kept[name] = value.clone()
        return value

    with watching(model, components, see):
        model(inputs)
    return kept


def _patched(
    model: nn.Module, inputs: Tensor, name: str, clean: Tensor, axes: tuple[int, ...], place: tuple[int, ...]
) -> Any:
    def see(called: str, value: Tensor) -> Tensor:
        if called != name:
            return value
        where: list[Any] = [slice(None)] * value.ndim
        for axis, entry in zip(axes, place):
            where[axis] = entry
        value = value.clone()
        value[tuple(where)] = clean[tuple(where)]
        return value

    with watching(model, [name.partition("#")[0]], see):
        return model(inputs)
