"""Windows with holes that cover the map, as FaViT (2023, arXiv:2312.08614) fuses them into one window of keys."""

import torch
from torch import Tensor

from saccade.errors import InputError
from saccade.ops.check import check_positive

__all__ = ["dilated_windows"]


def dilated_windows(x: Tensor, window_size: int, dilation: int = 1) -> Tensor:
    """Cut a map into windows whose tokens are `dilation` apart.

    Windows stand side by side, each (window_size - 1) * dilation + 1 tokens wide; with a dilation they leave out what
    lies between their tokens. A map that they do not cover evenly is reflected at its end, as often as it takes.

    Args:
        x: (B, heads, H, W, D).
        window_size: s, tokens of a window along each axis.
        dilation: distance of two neighbouring tokens of a window.

    Returns: (B, heads, windows, s * s, D), windows and tokens in row-major order.
    Raises: InputError for another number of axes, or a size or dilation below 1.

    >>> x = torch.arange(8.0).reshape(1, 1, 1, 8, 1)
    >>> dilated_windows(x, 2, dilation=2)[0, 0, :, :2, 0]  # 8 tokens: the last window is reflected
    tensor([[0., 2.],
            [3., 5.],
            [6., 6.]])
    """
    check_positive(window_size=window_size, dilation=dilation)
    if x.ndim != 5:
        raise InputError(f"x is {tuple(x.shape)}: give (B, heads, H, W, D)")
    rows, columns = (_numbers(length, window_size, dilation, x.device) for length in x.shape[2:4])
    down = x.index_select(2, rows.flatten()).index_select(3, columns.flatten())
    return down.unflatten(3, columns.shape).unflatten(2, rows.shape).transpose(3, 4).flatten(4, 5).flatten(2, 3)


def _numbers(length: int, size: int, dilation: int, device: torch.device) -> Tensor:
    """(windows, size) numbers of the tokens along one axis."""
    extent = (size - 1) * dilation + 1
    first = torch.arange(0, length, extent, device=device)
    places = first[:, None] + dilation * torch.arange(size, device=device)
    period = 2 * (length - 1)  # of there and back
    places = places % max(period, 1)
    return torch.minimum(places, period - places)
