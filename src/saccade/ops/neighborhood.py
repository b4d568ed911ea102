"""Neighborhood attention's pattern (NAT, 2022, arXiv:2204.07143; faster kernels and causal axes: 2024,
arXiv:2403.04690; strides: generalized neighborhood attention, 2025, arXiv:2504.16922)."""

from dataclasses import dataclass

import numpy as np

from saccade.errors import InputError
from saccade.ops.check import check_positive, per_axis
from saccade.ops.pattern import AxialPattern, Ranges

__all__ = ["Neighborhood"]


@dataclass(frozen=True)
class Neighborhood(AxialPattern):
    """A window slides over the map; at the borders it is shifted inwards, so that every query sees as many keys.

    Args:
        window_size: tokens, one number or one for each axis; an even window has one token more on the left.
        stride: queries that share the window of their leader: 1 is sliding, window_size is blocked attention.
        dilation: distance of neighbouring keys; queries of the same residue form a map of their own.
        causal: no key after the query on this axis; the window is clipped there instead of shifted.

    Raises: InputError if stride > window_size, or window_size * dilation exceeds an axis.

    >>> Neighborhood(3).mask((5,)).int().tolist()
    [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    """

    window_size: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False

    def __post_init__(self) -> None:
        check_positive(window_size=self.window_size, stride=self.stride, dilation=self.dilation)

    def ranges(self, axis: int, axes: int, length: int) -> Ranges:
        window = per_axis("window_size", self.window_size, axes)[axis]
        stride = per_axis("stride", self.stride, axes)[axis]
        dilation = per_axis("dilation", self.dilation, axes)[axis]
        causal = per_axis("causal", self.causal, axes)[axis]
        if stride > window:
            raise InputError(
                f"stride is {stride} and window_size is {window} on axis {axis}: take a stride of 1 to {window}"
            )
        if window * dilation > length:
            raise InputError(
                f"window_size {window} with dilation {dilation} spans {window * dilation} tokens, but axis {axis} has "
                f"{length}: take a window of at most {length // dilation}"
                + ("" if dilation == 1 else f", or a dilation of at most {length // window}")
            )
        place, group = np.divmod(np.arange(length), dilation)
        last = length // dilation + (group < length % dilation) - 1  # of the query's own group
        leader = np.minimum(place // stride * stride + (stride - 1 if causal else stride // 2), last)
        if causal:
            start, stop = (leader - window + 1).clip(min=0), place + 1
        else:
            start = np.minimum((leader - window // 2).clip(min=0), last + 1 - window)
            stop = start + window
        return Ranges(group + dilation * start, group + dilation * (stop - 1) + 1, dilation, length)
