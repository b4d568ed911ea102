"""Aggregated attention (TransNeXt, Shi, 2023, arXiv:2311.17132): one softmax over a sliding window and a pooled map.

The log-spaced coordinates of its position bias are those of Swin v2 (Liu et al., 2021, arXiv:2111.09883).
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.ops.check import check_attention, check_positive, per_axis
from saccade.ops.position_bias import RelativeTable
from saccade.ops.sequence import SlidingWindow
from saccade.ops.softmax_attention import attention_weights, merge_attention, softmax_attention
from saccade.ops.sparse_attention import sparse_attention

__all__ = ["aggregated_attention", "aggregated_attention_weights", "pooled_coordinates", "window_lengths"]

Sizes = int | tuple[int, ...]


def aggregated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    window_size: Sizes,
    *,
    window_bias: Tensor | None = None,
    pooled_bias: Tensor | None = None,
    window_weights: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of every query over the window around it and a pooled map, as one set of keys.

    Args:
        query: (B, heads, *space, D).
        key, value: (B, heads, *space, D) and (..., E), seen in a window that is clipped at the border.
        pooled_key, pooled_value: (B, heads, P, D) and (..., E), seen by all.
        window_size: tokens of the window along each axis, odd, one number or one for each axis.
        window_bias: (heads, *window), added to the logits of the window, in row-major order of its places.
        pooled_bias: floats added to the logits of the pooled keys, broadcastable to (B, heads, N, P).
        window_weights: (B, heads, *space, T) for the T places of the window: weights of its values that are added
            after the softmax, so that they need not be positive.
        scale: factor of q.k, D^-0.5 by default.
        impl: "reference" forms the N x (M + P) weights and defines what is right; "tiled" merges the window, computed
            as in `sparse_attention`, with the pooled map through the log-sum-exp; "auto" is "tiled".

    Returns: (B, heads, *space, E) in the dtype of the inputs.

    >>> x, pooled = torch.tensor([0.0, 3.0, 6.0]).view(1, 1, 3, 1), torch.tensor([9.0]).view(1, 1, 1, 1)
    >>> aggregated_attention(torch.zeros(1, 1, 3, 1), x, x, pooled, pooled, 3).flatten()  # means of 3 and 4
    tensor([4.0000, 4.5000, 6.0000])
    """
    sizes = _check(query, key, value, pooled_key, pooled_value, window_size, window_bias, window_weights)
    check_choice("impl", impl, ("auto", "tiled", "reference"))
    if impl == "reference":
        window, pooled = aggregated_attention_weights(
            query,
            key,
            pooled_key,
            sizes,
            window_bias=window_bias,
            pooled_bias=pooled_bias,
            window_weights=window_weights,
            scale=scale,
        )
        out = window @ value.flatten(2, -2).to(window.dtype) + pooled @ pooled_value.to(pooled.dtype)
        return out.to(query.dtype).unflatten(2, query.shape[2:-1])
    near = sparse_attention(
        query, key, value, _pattern(sizes), bias=_table(window_bias), scale=scale, return_lse=True, impl=impl
    )
    far = softmax_attention(
        query.flatten(2, -2), pooled_key, pooled_value, bias=pooled_bias, scale=scale, return_lse=True
    )
    out = merge_attention([(near.out.flatten(2, -2), near.lse.flatten(2)), far]).out.view_as(near.out)
    return out if window_weights is None else out + _mix_window(window_weights, value, sizes)


def aggregated_attention_weights(
    query: Tensor,
    key: Tensor,
    pooled_key: Tensor,
    window_size: Sizes,
    *,
    window_bias: Tensor | None = None,
    pooled_bias: Tensor | None = None,
    window_weights: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Form the weights of the tokens (B, heads, N, M), and of the pooled keys (B, heads, N, P), for looking at.

    Without `window_weights` the two sum to 1 for every query.
    """
    sizes = _check(query, key, key, pooled_key, pooled_key, window_size, window_bias, window_weights)
    space, pattern = tuple(query.shape[2:-1]), _pattern(sizes)
    query, key = query.flatten(2, -2), key.flatten(2, -2)
    visible = pattern.mask(space).to(query.device)
    offset = pattern.offset(space).to(query.device)  # (axes, N, M)
    none = torch.zeros((), dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    table = _table(window_bias)
    bias = none if table is None else table(query, offset.unsqueeze(1))[0]
    near = torch.where(visible, bias, -torch.inf).expand(*query.shape[:3], -1)
    far = (none if pooled_bias is None else pooled_bias).expand(*query.shape[:3], pooled_key.shape[2])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    weights = attention_weights(query, torch.cat([key, pooled_key], 2), torch.cat([near, far], -1), scale)
    window, pooled = weights.split([key.shape[2], pooled_key.shape[2]], -1)
    if window_weights is not None:
        number = torch.zeros_like(offset[0])
        for size, along in zip(sizes, offset):
            number = number * size + (along + size // 2).clamp(0, size - 1)
        window = window + window_weights.flatten(2, -2).gather(-1, number.expand_as(window)) * visible
    return window, pooled


def window_lengths(space: tuple[int, ...], window_size: Sizes, device: torch.device | None = None) -> Tensor:
    """Count the tokens of each query's window that lie inside the map, (*space).

    >>> window_lengths((3, 4), 3)
    tensor([[4, 6, 6, 4],
            [6, 9, 9, 6],
            [4, 6, 6, 4]])
    """
    total = torch.ones((1,) * len(space), dtype=torch.long, device=device)
    for axis, (length, size) in enumerate(zip(space, per_axis("window_size", window_size, len(space)))):
        place = torch.arange(length, device=device)
        inside = (place + size // 2).clamp(max=length - 1) - (place - size // 2).clamp(min=0) + 1
        total = total * inside.view([-1 if other == axis else 1 for other in range(len(space))])
    return total


def pooled_coordinates(
    space: tuple[int, ...],
    pooled: tuple[int, ...],
    reference: tuple[int, ...] | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Give the relative positions of tokens and pooled cells, log-spaced, each distinct one once.

    A cell of adaptive average pooling stands in the middle of its tokens. An offset d of query and cell along an axis
    becomes sign(d) log2(|d'| + 1) / 3 with d' = 8 d / (reference - 1), as in Swin v2.

    Args:
        space: tokens along each axis.
        pooled: cells along each axis, at most one a token.
        reference: the map for which d' is 8 from one end to the other; None takes `space`. An axis of one token
            counts as two.
        device: of the results.

    Returns: a table of coordinates (U_1, U_2 ..., axes), and for each axis the rows (tokens, cells) to read there:
        the pair of token n and cell m has table[rows[0][n_1, m_1], rows[1][n_2, m_2] ...].

    >>> table, rows = pooled_coordinates((4,), (2,))
    >>> rows[0].tolist()  # cells at 0.5 and 2.5
    [[2, 0], [3, 1], [4, 2], [5, 3]]
    """
    reference = space if reference is None else reference
    along, rows = [], []
    for length, cells, full in zip(space, pooled, reference, strict=True):
        # twice the middle of each cell, so that all is whole
        middle = [cell * length // cells + -(-(cell + 1) * length // cells) - 1 for cell in range(cells)]
        step = 2 if all((each - middle[0]) % 2 == 0 for each in middle) else 1
        twice = torch.arange(-middle[-1], 2 * length - 1 - middle[0], step, device=device)
        offset = 8 / max(full - 1, 1) * twice / 2
        along.append(offset.sign() * (offset.abs() + 1).log2() / 3)
        place = 2 * torch.arange(length, device=device).unsqueeze(1) - torch.tensor(middle, device=device)
        rows.append((place + middle[-1]) // step)
    return torch.stack(torch.meshgrid(*along, indexing="ij"), -1), rows


def odd_window(window_size: Sizes, axes: int) -> tuple[int, ...]:
    """The size of a centred window along each axis; InputError unless it is odd."""
    check_positive(window_size=window_size)
    sizes = per_axis("window_size", window_size, axes)
    if any(size % 2 == 0 for size in sizes):
        raise InputError(f"window_size is {window_size}: a window has its query in the middle. Give odd numbers")
    return sizes


def _mix_window(weights: Tensor, value: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Sum of the window's values with given weights, place by place; there is nothing outside the map."""
    space = value.shape[2:-1]
    padded = F.pad(value, [0, 0, *(size // 2 for size in reversed(sizes) for _ in range(2))])
    total = torch.zeros((), dtype=value.dtype, device=value.device)
    for number, place in enumerate(product(*map(range, sizes))):
        shifted = padded
        for axis, (first, length) in enumerate(zip(place, space), start=2):
            shifted = shifted.narrow(axis, first, length)
        total = total + weights[..., number, None] * shifted
    return total


def _pattern(sizes: tuple[int, ...]) -> SlidingWindow:
    reach = tuple(size // 2 for size in sizes)
    return SlidingWindow(reach, reach)


def _table(window_bias: Tensor | None) -> RelativeTable | None:
    return None if window_bias is None else RelativeTable(window_bias)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    window_size: Sizes,
    window_bias: Tensor | None,
    window_weights: Tensor | None,
) -> tuple[int, ...]:
    """The window's size along each axis."""
    check_attention(query, key, value)
    check_attention(query.flatten(2, -2), pooled_key, pooled_value, axes=1)
    sizes = odd_window(window_size, query.ndim - 3)
    if key.shape[:-1] != query.shape[:-1] or pooled_key.shape[1] != query.shape[1]:
        raise InputError(
            f"query is {tuple(query.shape)}, key is {tuple(key.shape)} and pooled_key is {tuple(pooled_key.shape)}: "
            "all share B and heads, and the keys stand where the queries are. Repeat shared heads"
        )
    if window_bias is not None and tuple(window_bias.shape) != (query.shape[1], *sizes):
        raise InputError(f"window_bias is {tuple(window_bias.shape)}: give {(query.shape[1], *sizes)}, heads first")
    expected = (*query.shape[:-1], torch.Size(sizes).numel())
    if window_weights is not None and tuple(window_weights.shape) != expected:
        raise InputError(f"window_weights is {tuple(window_weights.shape)}: give {expected}, a weight for each place")
    return sizes
