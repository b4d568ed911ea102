"""How cost grows with the side of the image: FLOPs and time at several sizes, and the exponent of their growth."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy
import torch
from torch import nn

from saccade.errors import InputError
from saccade.measure.flops import count_flops
from saccade.measure.timing import measure_time

__all__ = ["Exponent", "Scaling", "fit_exponent", "measure_scaling"]


@dataclass(frozen=True)
class Exponent:
    """The p of cost ~ side^p: 2 is linear in the number of pixels, 4 quadratic.

    Attributes:
        value: p.
        error: its standard error, which a curve that is no power law makes large.
    """

    value: float
    error: float


@dataclass(frozen=True)
class Scaling:
    """Cost of one call at several image sides, and how it grows.

    Attributes:
        sides: pixels.
        flops: of the whole batch, at each side.
        seconds: median time of the whole batch, at each side.
        flops_exponent: of FLOPs against side.
        time_exponent: of time against side. Small images take their time in overhead, so it may be the smaller one.
    """

    sides: tuple[int, ...]
    flops: tuple[int, ...]
    seconds: tuple[float, ...]
    flops_exponent: Exponent
    time_exponent: Exponent


def fit_exponent(sides: Sequence[float], costs: Sequence[float]) -> Exponent:
    """Fit the p of cost ~ side^p by ordinary least squares of log cost against log side.

    Args:
        sides: positive, three of them different or more: two give a slope without an error.
        costs: positive, one for each side, in any unit.

    Raises: InputError if they are not so.

    >>> round(fit_exponent([32, 64, 128], [1.0, 4.0, 16.0]).value, 6)
    2.0
    """
    if len(sides) != len(costs) or len(set(sides)) < 3:
        raise InputError(
            f"{len(sides)} sides, {len(set(sides))} of them different, and {len(costs)} costs: "
            "an exponent and its error need at least 3 different sides, and one cost for each"
        )
    x, y = numpy.asarray(sides, dtype=float), numpy.asarray(costs, dtype=float)
    if not all((values > 0).all() and numpy.isfinite(values).all() for values in (x, y)):
        raise InputError(f"sides are {list(sides)} and costs {list(costs)}: all must be positive and finite")
    x, y = numpy.log(x), numpy.log(y)
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    rest = y - slope * x
    return Exponent(float(slope), float(numpy.sqrt(rest @ rest / (len(x) - 2) / (x @ x))))


def measure_scaling(
    model: nn.Module,
    sides: Sequence[int],
    *,
    batch: int = 1,
    in_chans: int = 3,
    warmup: int = 1,
    repeats: int = 7,
    min_seconds: float = 0.1,
) -> Scaling:
    """Measure FLOPs and time of a model on square images of several sides, and how they grow.

    Runs without gradients, in the mode (training or not) in which the model is, on random images in the device and
    dtype of its parameters.

    Args:
        model: takes (batch, in_chans, side, side).
        sides: pixels; three or more different ones.
        batch: images in a call.
        in_chans: channels of an image.
        warmup, repeats, min_seconds: as in `measure_time`, for each side.

    Returns: Scaling.
    Raises: InputError for fewer than three different sides; whatever the model raises at a side that it refuses.
    """
    fit_exponent(sides, sides)  # a wrong list of sides is told before the work, not after
    like = next(model.parameters(), torch.empty(0))
    flops, seconds = [], []
    for side in sides:
        images = torch.randn(batch, in_chans, side, side, generator=torch.Generator().manual_seed(0)).to(like)
        flops.append(count_flops(model, images).total)
        with torch.no_grad():
            timing = measure_time(partial(model, images), warmup=warmup, repeats=repeats, min_seconds=min_seconds)
        seconds.append(timing.median)
    return Scaling(tuple(sides), tuple(flops), tuple(seconds), fit_exponent(sides, flops), fit_exponent(sides, seconds))
