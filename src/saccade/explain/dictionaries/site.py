"""A place in a model where activations are read and written, and what a reconstruction does when it is written there.

Sufficiency, necessity and control are those of Makelov et al. (2024, arXiv:2405.08366).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saccade.errors import InputError
from saccade.explain.classifier import evaluating
from saccade.explain.relevance.modules import check_points, watching

__all__ = ["Approximation", "Site", "approximation", "control", "run_once"]

Metric = Callable[[Any], Tensor]


class Site:
    """Activations at one place of a model.

    Args:
        model: runs in eval mode without gradients.
        point: name of a module, whose output is meant, or "NAME:in", its first input.
        position: of a token, along the axis before the channels; None takes all.
        channels: those that are read and written, such as those of a head; None takes all.
        axis: where the channels are: -1, or 1 for maps (B, C, H, W).

    Raises: InputError for an unknown module.
    """

    def __init__(
        self,
        model: nn.Module,
        point: str,
        *,
        position: int | None = None,
        channels: slice | None = None,
        axis: int = -1,
    ) -> None:
        check_points(model, [point])
        self.model, self.point, self.axis = model, point, axis
        tokens = () if position is None else (position,)
        self.where = (..., *tokens, slice(None) if channels is None else channels)

    def read(self, inputs: Tensor) -> Tensor:
        """(B, dim) with a position, (B, ..., dim) without."""
        seen: list[Tensor] = []

        def see(_point: str, value: Tensor) -> Tensor:
            seen.append(value.movedim(self.axis, -1)[self.where].clone())
            return value

        run_once(self.model, (inputs,), [self.point], see)
        return seen[0]

    def write(self, inputs: Tensor, values: Tensor) -> Any:
        """What the model returns with these values in place of those that `read` gives."""

        def see(_point: str, value: Tensor) -> Tensor:
            value = value.clone()
            place = value.movedim(self.axis, -1)[self.where]
            if place.shape != values.shape:
                raise InputError(
                    f"values are {tuple(values.shape)}, but {self.point!r} has {tuple(place.shape)} there: give what "
                    "`read` gives"
                )
            place.copy_(values)
            return value

        return run_once(self.model, (inputs,), [self.point], see)


class Approximation(NamedTuple):
    """How much of what a site does for a metric a reconstruction has.

    Attributes:
        sufficiency: with the reconstruction in place of the activation, the metric's share of the way from that with
            the mean activation to that of the model. 1 is perfect.
        necessity: with what the reconstruction leaves, and the mean, in place of it: the share of the way back. 1 says
            that nothing of use is left.
        clean, ablated, sufficient, necessary: the metric of the model, with the mean activation, with the
            reconstruction, and with what it leaves.
    """

    sufficiency: float
    necessity: float
    clean: float
    ablated: float
    sufficient: float
    necessary: float


def approximation(site: Site, inputs: Tensor, reconstruction: Tensor, metric: Metric) -> Approximation:
    """Write a reconstruction of a site's activations, and what it leaves, back into the model.

    Args:
        site: where.
        inputs: of the model.
        reconstruction: of `site.read(inputs)`, in its shape and scale.
        metric: what the model returns -> a number, or one for each input, of which the mean is taken.

    Raises: InputError where the mean activation gives the same metric: the site then does nothing for it.
    """
    x = site.read(inputs)
    mean = x.mean(0).expand_as(x)
    with torch.no_grad():
        clean, ablated, sufficient, necessary = (
            metric(site.write(inputs, values)).double().mean().item()
            for values in (x, mean, reconstruction, x - reconstruction + mean)
        )
    if clean == ablated:
        raise InputError(
            f"the metric is {clean:g} with the mean activation at {site.point!r} too: it does not depend on this site"
        )
    span = clean - ablated
    return Approximation(
        (sufficient - ablated) / span, (clean - necessary) / span, clean, ablated, sufficient, necessary
    )


def control(
    site: Site, inputs: Tensor, edited: Tensor, patched: Tensor, predict: Callable[[Any], Tensor] | None = None
) -> float:
    """Share of the inputs for which an edit changes the prediction as activation patching does.

    Args:
        site: where both are written.
        inputs: of the model.
        edited: activations after the edit.
        patched: activations that the site has on counterfactual inputs. The edit is judged by what these bring about,
            not by a label, since other sites still carry the old value.
        predict: what the model returns -> (B,) classes; None takes the largest entry of the last axis of (B, classes).
    """
    predict = predict or (lambda output: output.argmax(-1))
    ours, theirs = (predict(site.write(inputs, values)) for values in (edited, patched))
    if ours.shape != inputs.shape[:1]:
        raise InputError(f"predictions are {tuple(ours.shape)} for {len(inputs)} inputs: give `predict`, one an input")
    return (ours == theirs).double().mean().item()


def run_once(model: nn.Module, args: Sequence[Any], points: Sequence[str], see: Callable[[str, Tensor], Tensor]) -> Any:
    """What a model returns in eval mode without gradients when `see(point, tensor)` stands in at some points.

    Raises: InputError unless each of them runs exactly once.
    """
    ran = set()

    def pass_through(point: str, value: Tensor) -> Tensor:
        name, _, again = point.partition("#")
        if again:
            raise InputError(f"{name!r} runs more than once in a call: name a module that runs once")
        ran.add(name)
        return see(name, value)

    with evaluating(model, grad=False), watching(model, points, pass_through):
        output = model(*args)
    for point in points:
        if point not in ran:
            raise InputError(f"{point!r} did not run in this call")
    return output
