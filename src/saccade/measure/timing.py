"""How long a call takes: median and quartiles over repeats, after a warm-up, with the device waited for."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from saccade.errors import InputError

__all__ = ["Timing", "measure_time"]


@dataclass(frozen=True)
class Timing:
    """Seconds that one call takes.

    Attributes:
        median: half of the repeats were quicker.
        low: the lower quartile.
        high: the upper quartile.
        repeats: how many repeats the three come from.
    """

    median: float
    low: float
    high: float
    repeats: int

    def throughput(self, items: int = 1) -> float:
        """Items a second, where one call serves `items` of them: the images in its batch.

        >>> Timing(median=0.5, low=0.4, high=0.7, repeats=20).throughput(8)
        16.0
        """
        return items / self.median


def measure_time(fn: Callable[[], Any], *, warmup: int = 3, repeats: int = 20, min_seconds: float = 0.2) -> Timing:
    """Measure how long `fn()` takes, in seconds.

    Args:
        fn: what to time; gradients are its own affair (call a model under `torch.no_grad()`).
        warmup: calls before the clock starts: first calls allocate, choose algorithms and compile.
        repeats: measurements. The median and quartiles of 20 change little when one of them is disturbed.
        min_seconds: the least that all repeats take together. When `fn` is quicker than `min_seconds / repeats`, each
            repeat is the mean over a group of calls, so that neither the clock nor waiting for the device shows.

    Returns: Timing.
    Raises: InputError if `warmup` or `min_seconds` is negative, or `repeats` below 1.
    """
    if warmup < 0 or repeats < 1 or min_seconds < 0:
        raise InputError(
            f"warmup is {warmup}, repeats {repeats}, min_seconds {min_seconds}: "
            "give warmup >= 0, repeats >= 1 and min_seconds >= 0"
        )
    for _ in range(warmup):
        fn()
    calls = 1
    while _seconds(fn, calls) < min_seconds / repeats:
        calls *= 2
    low, median, high = numpy.quantile([_seconds(fn, calls) / calls for _ in range(repeats)], [0.25, 0.5, 0.75])
    return Timing(float(median), float(low), float(high), repeats)


def _seconds(fn: Callable[[], Any], calls: int) -> float:
    _wait()
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
