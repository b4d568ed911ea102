"""`Score`: a mean over images beside what knows nothing and what knows all, each with a bootstrap interval."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import InputError

__all__ = ["Score", "check_confidence", "correlate", "draw_resamples", "place_on_ranks", "summarize"]

_RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """A mean over images, the same for random maps, and their difference, each with a bootstrap interval.

    Attributes:
        value, low, high: mean over images, and its interval over images; a single image gives an interval without
            width.
        random, random_low, random_high: mean over images and random orders or maps; the interval is that of one random
            order an image.
        difference, difference_low, difference_high: value - random, where each image meets its own random orders; the
            interval is over images and, for each, over its random orders, so that it has a width for a single image
            too.
        oracle, oracle_low, oracle_high: the same as value for the map that is known to be right, where one was given.
    """

    value: float
    low: float
    high: float
    random: float
    random_low: float
    random_high: float
    difference: float
    difference_low: float
    difference_high: float
    oracle: float | None = None
    oracle_low: float | None = None
    oracle_high: float | None = None


def draw_resamples(num_images: int, generator: torch.Generator) -> Tensor:
    """(2, resamples, num_images) whole numbers, which choose the images and their random orders in each resample."""
    return torch.randint(2**31, (2, _RESAMPLES, num_images), generator=generator)


def summarize(
    values: Tensor, randoms: Tensor, draws: Tensor, confidence: float, oracles: Tensor | None = None
) -> Score:
    """From values (B,), those of random orders (B, R) and of the oracle (B,) to their means and intervals."""
    image, order = draws[0] % len(values), draws[1] % randoms.shape[1]
    resampled, chance = values[image].mean(1), randoms[image, order].mean(1)
    rows = [
        (values.mean(), resampled),
        (randoms.mean(), chance),
        (values.mean() - randoms.mean(), resampled - chance),
    ]
    if oracles is not None:
        rows.append((oracles.mean(), oracles[image].mean(1)))
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.double)
    return Score(*(number for mean, each in rows for number in (mean.item(), *each.double().quantile(tails).tolist())))


def check_confidence(confidence: float, repeats: int, num_images: int) -> None:
    """Raise InputError unless images and random orders are enough for intervals of this confidence."""
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}: give a share between 0 and 1, such as 0.95")
    needed = math.ceil((2 / (1 - confidence)) ** (1 / num_images) / 2)
    if repeats < needed:
        raise InputError(
            f"{num_images} image(s) with {repeats} random orders cannot support confidence {confidence}: give at least "
            f"{needed} repeats, or more images"
        )


def correlate(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation along the last axis; 0 where one side is constant.

    >>> round(correlate(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])).item(), 6)
    -1.0
    """
    a, b = (each - each.mean(-1, keepdim=True) for each in (first.double(), second.double()))
    scale = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(scale > 0, (a * b).sum(-1) / torch.where(scale > 0, scale, 1), 0)


def place_on_ranks(maps: Tensor) -> Tensor:
    """Maps (B, ...) as ranks (B, P), from small to large, equal values on the mean of their places; on the CPU.

    >>> place_on_ranks(torch.tensor([[5.0, 1.0, 5.0, 9.0]])).tolist()
    [[1.5, 0.0, 1.5, 3.0]]
    """
    rows = []
    for row in maps.flatten(1).cpu():
        _, level, counts = row.unique(return_inverse=True, return_counts=True)
        middle = counts.cumsum(0).double() - (counts + 1) / 2
        rows.append(middle[level])
    return torch.stack(rows)
