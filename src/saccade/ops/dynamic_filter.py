"""Dynamic filters: every token sums its K x K window by weights of its own. Windows are those of `Neighborhood`: at the
border they are shifted inwards (NATTEN's second product; ContMix of OverLoCK, Lou and Yu, 2025, arXiv:2502.20087).

| `impl`      | how                                                                          | beside the result |
|-------------|------------------------------------------------------------------------------|-------------------|
| `reference` | all windows, unfolded                                                        | K^2 maps          |
| `tiled`     | a matrix product for each group of tokens whose windows share their K rows   | K rows of kernels |
| `auto`      | `tiled`                                                                      |                   |
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from saccade.errors import InputError, check_choice

__all__ = ["dynamic_filter", "dynamic_filter_weights", "window_bias"]

WIDEST = 48  # columns of a tile: a wider one has more zeros, a narrower one costs more calls


def dynamic_filter(value: Tensor, kernels: Tensor, *, impl: str = "auto") -> Tensor:
    """Sum the values of each token's K x K window, weighed by the token's own kernel.

    Args:
        value: (B, heads, H, W, E).
        kernels: (B, heads, H, W, K^2), K odd and at most H and W: the weights of the window's places, row by row. At
            the border the window is shifted inwards, so that all of its places are on the map.
        impl: see the table above.

    Returns: (B, heads, H, W, E) in the dtype of the values, summed in float32 at least.
    Raises: InputError for shapes that do not fit together, and for kernels that are even or larger than the map.

    >>> line = torch.arange(5.0).expand(1, 1, 3, 5).unsqueeze(-1)
    >>> dynamic_filter(line, torch.full((1, 1, 3, 5, 9), 1 / 9))[0, 0, 0].flatten()  # means of the nearest window
    tensor([1., 1., 2., 3., 3.])
    """
    check_choice("impl", impl, ("auto", "tiled", "reference"))
    size = _check(value, kernels)
    dtype = torch.promote_types(value.dtype, torch.float32)
    values, kernels = value.to(dtype), kernels.to(dtype)
    if impl == "reference":
        out = _reference(values, kernels, size)
    elif torch.compiler.is_compiling():  # a compiler derives the way back itself
        out = _filter(values, kernels, size)
    else:
        out = _Form.apply(0, values, kernels, size)
    return out.to(value.dtype)


def dynamic_filter_weights(kernels: Tensor) -> Tensor:
    """Form the token matrix of dynamic filters (B, heads, H, W, K^2), (B, heads, N, N): for looking at."""
    space = kernels.shape[2:4]
    tokens = torch.eye(math.prod(space), dtype=kernels.dtype, device=kernels.device).unflatten(0, space)
    return dynamic_filter(tokens.expand(*kernels.shape[:2], *tokens.shape), kernels).flatten(2, 3)


def window_bias(table: Tensor, space: tuple[int, int]) -> Tensor:
    """Read learned numbers for each place of each token's window, (heads, H, W, K, K), from a table by offset.

    Args:
        table: (heads, 2 K - 1, 2 K - 1), whose middle is the token itself, as for `RelativeTable`.
        space: H and W.

    >>> window_bias(torch.arange(25.0).view(1, 5, 5), (3, 3))[0, 1, 1]  # the token in the middle
    tensor([[ 6.,  7.,  8.],
            [11., 12., 13.],
            [16., 17., 18.]])
    """
    size = (table.shape[-1] + 1) // 2
    if table.ndim != 3 or table.shape[1:] != (2 * size - 1,) * 2:
        raise InputError(f"table is {tuple(table.shape)}: give (heads, 2 K - 1, 2 K - 1)")
    _check_size(size, space)
    rows, columns = (
        _starts(length, size, table) + size - 1 - torch.arange(length, device=table.device).unsqueeze(1)
        for length in space
    )
    read = table.index_select(2, columns.flatten()).index_select(1, rows.flatten())  # whole rows last: faster
    return read.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)


def _starts(length: int, size: int, like: Tensor) -> Tensor:
    """(length, K), the places of each token's window along an axis."""
    first = (torch.arange(length, device=like.device) - size // 2).clamp(0, length - size)
    return first.unsqueeze(1) + torch.arange(size, device=like.device)


def _reference(value: Tensor, kernels: Tensor, size: int) -> Tensor:
    rows, columns = (_starts(length, size, value) for length in value.shape[2:4])
    windows = value[:, :, rows[:, None, :, None], columns[None, :, None, :]].flatten(4, 5)  # (B, heads, H, W, K^2, E)
    return torch.einsum("bnhwk,bnhwke->bnhwe", kernels, windows)


class _Tile(NamedTuple):
    """Tokens of some rows, which share the rows of their windows, and of some columns; and the places that they see.

    Attributes:
        rows, columns: of the tokens.
        down, across: of the places; as many rows as a kernel has.
        offsets: (columns, K), where among the places' columns a token's own stand; None if they are all of them.
    """

    rows: slice
    columns: slice
    down: slice
    across: slice
    offsets: Tensor | None


def _tiles(space: tuple[int, int], size: int, like: Tensor) -> Iterator[_Tile]:
    height, width = space
    for columns, across in _along(width, size, shared=width <= size + 1):
        offsets = None
        if across.stop - across.start > size:
            offsets = _starts(width, size, like)[columns] - across.start
        for rows, down in _along(height, size, shared=True):
            yield _Tile(rows, columns, down, across, offsets)


def _along(length: int, size: int, *, shared: bool) -> Iterator[tuple[slice, slice]]:
    """Tokens along an axis and the places that they see: those that share a window, or equal parts of the axis."""
    half = size // 2
    if shared:
        firsts = [0, *range(half + 1, length - half)]  # of the tokens of each window
    else:
        firsts = list(range(0, length, -(-length // -(-length // WIDEST))))
    for first, end in pairwise([*firsts, length]):
        start, last = (min(max(token - half, 0), length - size) for token in (first, end - 1))
        yield slice(first, end), slice(start, last + size)


def _dense(kernels: Tensor, tile: _Tile, size: int) -> Tensor:
    """The kernels of a tile's tokens as a matrix, (B, heads, tokens, places), with zeros for places of others."""
    mine = kernels[:, :, tile.rows, tile.columns]
    if tile.offsets is not None:
        mine = mine.unflatten(-1, (size, size))
        wide = mine.new_zeros(*mine.shape[:-1], tile.across.stop - tile.across.start)
        mine = wide.scatter(-1, tile.offsets.unsqueeze(1).expand(mine.shape), mine).flatten(-2)
    return mine.flatten(2, 3)


def _filter(value: Tensor, kernels: Tensor, size: int) -> Tensor:
    out, places = torch.empty_like(value), value.contiguous()
    for tile in _tiles((value.shape[2], value.shape[3]), size, value):
        seen = places[:, :, tile.down, tile.across].flatten(2, 3)
        mine = out[:, :, tile.rows, tile.columns]
        mine.copy_((_dense(kernels, tile, size) @ seen).view(mine.shape))
    return out


def _spread(kernels: Tensor, out: Tensor, size: int) -> Tensor:
    """The gradient by the values, from that of the result."""
    value = torch.zeros_like(out)
    for tile in _tiles((out.shape[2], out.shape[3]), size, out):
        grad = out[:, :, tile.rows, tile.columns].flatten(2, 3)
        seen = value[:, :, tile.down, tile.across]
        seen += (_dense(kernels, tile, size).mT @ grad).view(seen.shape)
    return value


def _correlate(out: Tensor, value: Tensor, size: int) -> Tensor:
    """The gradient by the kernels, from that of the result."""
    kernels, places = value.new_empty(*value.shape[:4], size**2), value.contiguous()
    for tile in _tiles((value.shape[2], value.shape[3]), size, value):
        grad = out[:, :, tile.rows, tile.columns].flatten(2, 3)
        mine = kernels[:, :, tile.rows, tile.columns].unflatten(-1, (size, size))
        products = (grad @ places[:, :, tile.down, tile.across].flatten(2, 3).mT).view(*mine.shape[:-1], -1)
        if tile.offsets is not None:
            products = products.gather(-1, tile.offsets.unsqueeze(1).expand(mine.shape))
        mine.copy_(products)
    return kernels


_FORMS = (_filter, _spread, _correlate)


class _Form(Function):
    """One of the three: each takes two of value, kernels and result, in this cyclic order, and gives the third. The sum
    of result * filter(value, kernels) is linear in all, so that each is the others' gradient."""

    @staticmethod
    def forward(ctx: Any, form: int, x: Tensor, y: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.form, ctx.size = form, size
        return _FORMS[form % 3](x, y, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y = ctx.saved_tensors
        by_x = _Form.apply(ctx.form + 1, y, grad, ctx.size) if ctx.needs_input_grad[1] else None
        by_y = _Form.apply(ctx.form + 2, grad, x, ctx.size) if ctx.needs_input_grad[2] else None
        return None, by_x, by_y, None


def _check(value: Tensor, kernels: Tensor) -> int:
    """K, if all shapes fit together."""
    for name, tensor in (("value", value), ("kernels", kernels)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}: filters take floating-point tensors. Convert it")
        if tensor.ndim != 5:
            raise InputError(f"{name} is {tuple(tensor.shape)}: give (B, heads, H, W, channels or places)")
    size = math.isqrt(kernels.shape[-1])
    if kernels.shape[:-1] != value.shape[:-1] or size**2 != kernels.shape[-1]:
        raise InputError(
            f"kernels is {tuple(kernels.shape)} and value is {tuple(value.shape)}: both share (B, heads, H, W), and a "
            "kernel has K^2 weights"
        )
    _check_size(size, (value.shape[2], value.shape[3]))
    return size


def _check_size(size: int, space: tuple[int, int]) -> None:
    if size % 2 == 0 or size > min(space):
        raise InputError(
            f"kernels have {size} x {size} places and the map is {space}: take an odd side of at most {min(space)}, or "
            "resize the map"
        )
