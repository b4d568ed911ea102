"""Orders in which the tokens of a map stand in a sequence, so that neighbours share a block: row-major with any order
of the axes, tile by tile, and along a space-filling curve for boxes of any size (generalised Hilbert, "Gilbert").

An order is a tensor of token numbers: `order[i]` is the row-major number of the token that stands at place i.
"""

from collections.abc import Iterator
from functools import lru_cache
from operator import index

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saccade.errors import InputError
from saccade.ops.check import check_positive
from saccade.ops.selection import block_order, token_slots

__all__ = ["axis_order", "gilbert_order", "reorder", "restore", "tile_order"]

Space = tuple[int, ...]
Vector = NDArray[np.int64]


def reorder(x: Tensor, order: Tensor) -> Tensor:
    """Put the tokens of x (..., N, D) into an order.

    Args:
        x: (..., N, D).
        order: (N,), or (..., N) with leading axes that broadcast to those of x, such as an order for each head.

    Returns: (..., N, D), whose token i is token order[i] of x. `restore` undoes it.

    >>> reorder(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([2, 0, 1])).flatten()
    tensor([2., 0., 1.])
    """
    _check_order(x, order)
    if order.ndim == 1:
        return x.index_select(-2, order)
    return x.take_along_dim(order.expand(x.shape[:-1]).unsqueeze(-1), -2)


def restore(x: Tensor, order: Tensor) -> Tensor:
    """Undo `reorder`: put token i of x (..., N, D) back into place order[i].

    >>> order = torch.tensor([2, 0, 1])
    >>> restore(reorder(torch.eye(3), order), order).argmax(-1)
    tensor([0, 1, 2])
    """
    _check_order(x, order)
    return reorder(x, order.argsort(-1))


def axis_order(space: Space, axes: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Row-major order with the axes of space permuted; the last of `axes` runs fastest.

    >>> axis_order((2, 3), (1, 0))
    tensor([0, 3, 1, 4, 2, 5])
    """
    check_positive(space=space)
    if sorted(axes) != list(range(len(space))):
        raise InputError(f"axes is {axes}: give each axis of {space} once, such as {tuple(range(len(space)))[::-1]}")
    return torch.arange(torch.Size(space).numel(), device=device).view(space).permute(axes).flatten()


def tile_order(space: Space, tile: int | tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Tile by tile, tiles and the tokens inside each in row-major order; the last tile along an axis may be smaller.

    >>> tile_order((2, 4), 2)
    tensor([0, 1, 4, 5, 2, 3, 6, 7])
    """
    check_positive(space=space, tile=tile)
    order = block_order(space, tile, torch.device(device)).flatten()
    return order[token_slots(order, space).sort().values]  # without what is past the end of the map


def gilbert_order(space: Space, device: torch.device | str = "cpu") -> Tensor:
    """Along a generalised Hilbert curve through a box of one to three axes of any length.

    The curve begins at the first token and runs along the longest axis. Neighbours on it are neighbours in space, but
    for a few longer steps where a length is odd.

    >>> gilbert_order((2, 4))
    tensor([0, 4, 5, 1, 2, 6, 7, 3])
    """
    check_positive(space=space)
    if not 1 <= len(space) <= 3:
        raise InputError(f"space is {space}: the curve fills one to three axes. Flatten the others")
    return _curve(tuple(map(index, space)))[0].to(device)


@torch.compiler.assume_constant_result
def _curve(space: Space) -> tuple[Tensor]:
    """The order as a constant to compilers; a tuple of one, since they confuse bare tensors of two calls."""
    return (torch.tensor(_number_curve(space)),)


@lru_cache(maxsize=256)
def _number_curve(space: Space) -> NDArray[np.int64]:
    depth, height, width = (1,) * (3 - len(space)) + space
    sides = [np.array(side) for side in ((width, 0, 0), (0, height, 0), (0, 0, depth))]
    longest = int(np.argmax([width, height, depth]))
    places = np.array(list(_walk(np.zeros(3, np.int64), sides.pop(longest), *sides)))
    return places @ np.array([1, width, width * height])


def _walk(start: Vector, a: Vector, b: Vector, c: Vector) -> Iterator[Vector]:
    """Fill the box that a, b and c span at `start`, from there to the end of a: cut it into parts, and turn them so
    that each begins beside the end of the one before."""
    w, h, d = (abs(int(side.sum())) for side in (a, b, c))
    if not w * h * d:
        return
    if sorted((w, h, d))[1] == 1:  # a line
        along = np.sign(max((a, b, c), key=lambda side: abs(side.sum())))
        yield from (start + step * along for step in range(w * h * d))
        return
    (a1, a2), (b1, b2), (c1, c2) = (_halve(side) for side in (a, b, c))
    a_end, c_end, b1_end, c1_end = (side - np.sign(side) for side in (a, c, b1, c1))
    if 2 * w > 3 * max(h, d):
        parts = [(start, a1, b, c), (start + a1, a2, b, c)]
    elif 3 * h > 4 * d:
        parts = [(start, b1, c, a1), (start + b1, a, b2, c), (start + a_end + b1_end, -b1, c, -a2)]
    elif 3 * d > 4 * h:
        parts = [(start, c1, a1, b), (start + c1, a, b, c2), (start + a_end + c1_end, -c1, -a2, b)]
    else:
        parts = [
            (start, b1, c1, a1),
            (start + b1, c, a1, b2),
            (start + b1_end + c_end, a, -b1, -c2),
            (start + a_end + b1 + c_end, -c, -a2, b2),
            (start + a_end + b1_end, -b1, c1, -a2),
        ]
    for part in parts:
        yield from _walk(*part)


def _halve(side: Vector) -> tuple[Vector, Vector]:
    """Cut a side in two, the first part of even length where that can be: an odd one ends on the wrong side."""
    first = side // 2
    if first.sum() % 2 and abs(side.sum()) > 2:
        first = first + np.sign(side)
    return first, side - first


def _check_order(x: Tensor, order: Tensor) -> None:
    if x.ndim < 2 or order.is_floating_point() or not order.ndim or order.shape[-1] != x.shape[-2]:
        raise InputError(
            f"x is {tuple(x.shape)} and order is {order.dtype} {tuple(order.shape)}: give x (..., N, D) and an order "
            "of N whole numbers, or such an order for each of the leading axes"
        )
