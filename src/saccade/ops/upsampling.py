"""Nearest-neighbour up-sampling that keeps a norm (DFIR-DETR, 2025, arXiv:2512.07078; its exponent is a guess of
ours. With norm 1 it is soft nearest neighbour interpolation)."""

from torch import Tensor

from saccade.errors import InputError
from saccade.ops.check import check_positive

__all__ = ["upsample_nearest"]


def upsample_nearest(x: Tensor, factor: int, *, norm: float | None = None) -> Tensor:
    """Repeat every token along each axis; with `norm`, scaled so that this norm of the map stays what it was.

    Args:
        x: (B, *space, C).
        factor: s, copies along each axis.
        norm: p; the map is scaled by s^(-axes / p). 1 keeps the sum of magnitudes, 2 the energy, None the values.

    Returns: (B, *space times s, C).

    >>> import torch
    >>> upsample_nearest(torch.ones(1, 2, 1), 2, norm=1).flatten()
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    check_positive(factor=factor)
    if x.ndim < 3:
        raise InputError(f"x is {tuple(x.shape)}: give (B, *space, C), channels last")
    if norm is not None and not norm > 0:
        raise InputError(f"norm is {norm}: give 1, 2 or another number above 0, or None")
    axes = x.ndim - 2
    if norm is not None:
        x = x * factor ** (-axes / norm)
    for axis in range(1, axes + 1):
        x = x.repeat_interleave(factor, axis)
    return x
