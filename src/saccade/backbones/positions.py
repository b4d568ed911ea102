"""Learned positions at other image sizes, by interpolation."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.ops.position_bias import resize_relative_table

__all__ = ["refit_relative_table", "resize_positions", "resize_relative_table"]


def resize_positions(
    positions: Tensor, space: tuple[int, int], *, old: tuple[int, int] | None = None, mode: str = "bicubic"
) -> Tensor:
    """Interpolate an embedding of absolute positions to another map, as DeiT does.

    Args:
        positions: (1, P + N, C), of which the first P belong to class tokens and stay.
        space: the map's height and width in tokens.
        old: the one for which the positions were learned; None takes the largest square of at most P + N tokens.
        mode: of the interpolation, "bicubic" or "bilinear".

    Returns: (1, P + height width, C).
    """
    check_choice("mode", mode, ("bicubic", "bilinear"))
    old = (math.isqrt(positions.shape[1]),) * 2 if old is None else old
    if old == tuple(space):
        return positions
    count = positions.shape[1] - old[0] * old[1]
    if count < 0:
        raise InputError(f"positions is {tuple(positions.shape)} for a map of {old}: give a row for each token")
    grid = positions[:, count:].unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, tuple(space), mode=mode, align_corners=False)
    return torch.cat([positions[:, :count], grid.flatten(2).mT], 1)


def refit_relative_table(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mixer's table of relative positions, interpolated; any other tensor stays as it is.

    Args:
        name, tensor, shape: as `Backbone.refit` takes them.
    """
    if name.endswith("position_bias_table") and tensor.ndim == len(shape) and len(tensor) == shape[0]:
        return resize_relative_table(tensor, shape[1:])
    return tensor
