"""What training sets from step to step: temperatures and targets of gates (Flux Attention, 2026, arXiv:2604.07394)."""

from math import cos, pi

__all__ = ["anneal_temperature", "warm_target"]


def anneal_temperature(progress: float, start: float = 1.5, stop: float = 1.0, until: float = 0.6) -> float:
    """The temperature of a gate's decisions: from `start` to `stop` as a cosine, then constant.

    Args:
        progress: share of the steps that are done.
        start, stop: temperatures.
        until: share of the steps after which it is `stop`.

    >>> [round(anneal_temperature(progress), 2) for progress in (0, 0.3, 0.6, 1)]
    [1.5, 1.25, 1.0, 1.0]
    """
    done = min(progress / until, 1.0) if until > 0 else 1.0
    return stop + (start - stop) * (1 + cos(pi * done)) / 2


def warm_target(progress: float, stop: float, start: float = 0.0, warmup: float = 0.0) -> float:
    """The share of sparse decisions that is aimed at: from `start` to `stop` linearly over a share `warmup` of the
    steps, then constant.

    >>> warm_target(0.1, 0.5, warmup=0.2), warm_target(0.1, 0.5)
    (0.25, 0.5)
    """
    done = min(progress / warmup, 1.0) if warmup > 0 else 1.0
    return start + (stop - start) * done
