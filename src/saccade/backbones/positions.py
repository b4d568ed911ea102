"""Learned positions: at other image sizes, by interpolation; from a convolution, at any size."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.errors import InputError, check_choice
from saccade.ops.position_bias import resize_relative_table

__all__ = ["ConvPosition", "refit_relative_table", "resize_positions", "resize_relative_table"]


class ConvPosition(nn.Module):
    """x + a depthwise convolution of x, channels last: (B, H, W, C) to the same (Chu et al., 2021, arXiv:2102.10882).

    Args:
        dim: C, channels of a token.
        kernel_size: odd; zeros stand outside the map.
        act: makes an activation behind the convolution; None has none.
    """

    def __init__(self, dim: int, kernel_size: int = 3, *, act: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.act = None if act is None else act()

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        if self.act is not None:
            return (x + self.act(self.proj(x))).permute(0, 2, 3, 1)
        margin = self.proj.kernel_size[0] // 2
        centre = F.pad(self.proj.weight.new_ones(1, 1, 1, 1), [margin] * 4)  # adds x without a pass over the map
        kernel = self.proj.weight + centre
        return F.conv2d(x, kernel, self.proj.bias, padding=margin, groups=self.proj.groups).permute(0, 2, 3, 1)


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
