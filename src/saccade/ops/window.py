"""Patterns of equal blocks: windows (Swin, 2021, arXiv:2103.14030), grids (MaxViT, 2022, arXiv:2204.01697), blocks
with a halo (HaloNet, 2021, arXiv:2103.12731), and the whole map."""

from dataclasses import dataclass

import numpy as np

from saccade.errors import InputError
from saccade.ops.check import check_positive, per_axis
from saccade.ops.pattern import AxialPattern, Ranges

__all__ = ["Global", "Grid", "Halo", "Window"]

Sizes = int | tuple[int, ...]


@dataclass(frozen=True)
class Global(AxialPattern):
    """Every query sees every key.

    >>> Global().mask((2,)).int().tolist()
    [[1, 1], [1, 1]]
    """

    def ranges(self, axis: int, axes: int, length: int) -> Ranges:
        return Ranges(np.zeros(length, np.int64), np.full(length, length), 1, length)


@dataclass(frozen=True)
class Window(AxialPattern):
    """Non-overlapping windows: a query sees the keys of its own window.

    Args:
        window_size: tokens, one number or one for each axis.
        shift: tokens by which the partition is moved (Swin shifts every other layer by half a window). The parts of
            windows that stick out at both ends stay apart, as Swin's mask of the cyclic shift keeps them.
        ragged: allow a length that window_size does not divide; the last window is then smaller.
        causal: hide the keys that stand behind the query on any axis.

    >>> Window(2).mask((4,)).int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """

    window_size: Sizes
    shift: Sizes = 0
    ragged: bool = False
    causal: bool = False

    def __post_init__(self) -> None:
        check_positive(window_size=self.window_size)

    def ranges(self, axis: int, axes: int, length: int) -> Ranges:
        size = per_axis("window_size", self.window_size, axes)[axis]
        shift = per_axis("shift", self.shift, axes)[axis]
        if not 0 <= shift < size:
            raise InputError(
                f"shift is {shift} and window_size is {size} on axis {axis}: take a shift of 0 to {size - 1}"
            )
        _check_divides("window_size", size, axis, length, self.ragged)
        start = (np.arange(length) - shift) // size * size + shift
        stop = np.arange(1, length + 1) if self.causal else (start + size).clip(max=length)
        return Ranges(start.clip(min=0), stop, 1, length)


@dataclass(frozen=True)
class Grid(AxialPattern):
    """A uniform grid over the map: a query sees the grid_size tokens an axis that stand at its own offset.

    Tokens length / grid_size apart see each other, so that every query reaches over the whole map.

    Args:
        grid_size: tokens that a query sees along each axis, one number or one for each axis.
        ragged: allow a length that grid_size does not divide; some grids then have fewer tokens.

    >>> Grid(2).mask((4,)).int().tolist()
    [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    """

    grid_size: Sizes
    ragged: bool = False

    def __post_init__(self) -> None:
        check_positive(grid_size=self.grid_size)

    def ranges(self, axis: int, axes: int, length: int) -> Ranges:
        size = per_axis("grid_size", self.grid_size, axes)[axis]
        _check_divides("grid_size", size, axis, length, self.ragged)
        step = -(-length // size)
        return Ranges(np.arange(length) % step, np.full(length, length), step, length)


@dataclass(frozen=True)
class Halo(AxialPattern):
    """Blocks that see themselves and a halo around them.

    Args:
        block_size: tokens of a block, one number or one for each axis.
        halo_size: tokens that a block sees beyond itself on every side; 0 is window attention.
        padded: the keys have halo_size more tokens on both ends of every axis (HaloNet fills them with zeros, which
            stay in the softmax). Otherwise keys outside the map do not exist.
        query_stride: the queries are every query_stride-th token of the keys' map (HaloNet's strided attention).
        ragged: allow a length that the block does not divide; the last block is then smaller.

    Relative positions count from the first token of a block's region, as HaloNet's tables do.

    >>> Halo(2, 1).mask((4,)).int().tolist()
    [[1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 1, 1, 1]]
    """

    block_size: Sizes
    halo_size: Sizes
    padded: bool = False
    query_stride: Sizes = 1
    ragged: bool = False

    def __post_init__(self) -> None:
        check_positive(block_size=self.block_size, query_stride=self.query_stride)

    def ranges(self, axis: int, axes: int, length: int) -> Ranges:
        size = per_axis("block_size", self.block_size, axes)[axis]
        halo = per_axis("halo_size", self.halo_size, axes)[axis]
        stride = per_axis("query_stride", self.query_stride, axes)[axis]
        if halo < 0:
            raise InputError(f"halo_size is {halo} on axis {axis}: give 0 or more tokens")
        if size % stride:
            raise InputError(
                f"query_stride is {stride} and block_size is {size} on axis {axis}: the stride must divide the block"
            )
        _check_divides("block_size / query_stride", size // stride, axis, length, self.ragged)
        block, place = np.divmod(np.arange(length), size // stride)
        first = block * size  # of the region, counted on the padded axis
        keys = length * stride + 2 * halo
        stop = (first + size + 2 * halo).clip(max=keys)
        origin = first + place
        if self.padded:
            return Ranges(first, stop, 1, keys, origin)
        inside = length * stride
        return Ranges((first - halo).clip(min=0), (stop - halo).clip(max=inside), 1, inside, origin - halo)


def _check_divides(name: str, size: int, axis: int, length: int, ragged: bool) -> None:
    if length % size and not ragged:
        raise InputError(
            f"{name} is {size} and axis {axis} has {length} tokens, which {size} does not divide. "
            f"Resize or pad the map to {-(-length // size) * size}, take another size, or set ragged=True"
        )
