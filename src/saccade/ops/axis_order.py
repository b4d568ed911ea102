"""In which order of the axes a head's map falls into blocks, and which blocks to keep (PAROAttention, 2025,
arXiv:2506.16054).

Attention commutes with any order that queries, keys and values share, so a head may read the tokens in the order in
which its map falls into blocks: whole blocks can then be left out, and what is left can be rounded block by block.
"""

from itertools import permutations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import InputError
from saccade.ops.block_weights import pool_attention
from saccade.ops.check import check_positive
from saccade.ops.token_order import axis_order

__all__ = [
    "OrderChoice",
    "axis_orders",
    "block_incoherence",
    "choose_axis_order",
    "static_blocks",
]


class OrderChoice(NamedTuple):
    """Which order of the axes each head takes, and what was said of all.

    Attributes:
        order: (heads,) numbers in `axis_orders`.
        dense: (heads, orders) share of the blocks that hold something.
        incoherence: (heads, orders) of the blocks.
    """

    order: Tensor
    dense: Tensor
    incoherence: Tensor


def axis_orders(axes: int) -> list[tuple[int, ...]]:
    """All sequences in which a map's axes can be read, slowest first; number 0 is row-major order.

    >>> axis_orders(2)
    [(0, 1), (1, 0)]
    """
    check_positive(axes=axes)
    return list(permutations(range(axes)))


def block_incoherence(weights: Tensor, block_size: int) -> Tensor:
    """How unevenly the entries of a block are spread, max / mean, as a mean over the blocks of (..., N, M): (...).

    The larger it is, the more of a block is lost when it is rounded to multiples of a share of its largest entry. A
    block of zeros counts as even, 1.

    >>> block_incoherence(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), 2)
    tensor(4.)
    """
    blocks = _cut(weights.abs(), block_size)
    top, total = blocks.amax((-3, -1)), blocks.sum((-3, -1))
    return (top * _entries(weights, block_size) / total).where(total > 0, 1.0).mean((-2, -1))


def choose_axis_order(
    weights: Tensor,
    space: tuple[int, ...],
    *,
    block_size: int = 64,
    threshold: float = 0.1,
    balance: float = 0.5,
) -> OrderChoice:
    """Choose for each head the order of the axes in which its maps have few full blocks, and even ones.

    Every order is scored by the share of its blocks that hold something and by their incoherence, each divided by its
    sum over the orders; the lowest balance * share + (1 - balance) * incoherence is taken, the first where two are
    equal. The paper's way to combine the two is recalled, and so `threshold` and `balance` are ours to set.

    Args:
        weights: (samples, heads, N, N) attention of a few inputs, tokens in row-major order; samples are averaged.
        space: the axes of the map.
        block_size: tokens of a block of the sequence, the last of which may be smaller.
        threshold: a block holds something from this share of what uniform attention would put into it.
        balance: 1 asks for empty blocks alone, 0 for even ones alone.

    >>> frames = torch.arange(6) // 3
    >>> alike = (frames.view(-1, 1) != frames).float() / 3  # tokens see the other frame, whole
    >>> choose_axis_order(alike[None, None], (2, 3), block_size=3).order
    tensor([0])
    """
    tokens = torch.Size(space).numel()
    check_positive(block_size=block_size)
    if weights.ndim != 4 or weights.shape[-2:] != (tokens, tokens):
        raise InputError(
            f"weights is {tuple(weights.shape)} and the map is {space}: give (samples, heads, {tokens}, {tokens})"
        )
    if not 0 <= balance <= 1 or threshold < 0:
        raise InputError(f"balance is {balance} and threshold is {threshold}: give 0 to 1, and 0 or more")
    weights = weights.detach().to(torch.promote_types(weights.dtype, torch.float32))
    uniform = _entries(weights, block_size) / tokens
    dense, incoherence = [], []
    for axes in axis_orders(len(space)):
        order = axis_order(space, axes, weights.device)
        ordered = weights[..., order, :][..., order]
        held = block_size**2 * pool_attention(ordered, block_size)
        dense.append((held >= threshold * uniform).to(weights.dtype).mean((0, -2, -1)))
        incoherence.append(block_incoherence(ordered, block_size).mean(0))
    shares, unevenness = torch.stack(dense, -1), torch.stack(incoherence, -1)  # (heads, orders)
    score = balance * _relative(shares) + (1 - balance) * _relative(unevenness)
    return OrderChoice(torch.sort(score, dim=-1, stable=True).indices[:, 0], shares, unevenness)


def static_blocks(
    weights: Tensor, block_size: int, *, density: float | None = None, mass: float | None = None
) -> Tensor:
    """Keep the blocks of each head that hold most, once and for all inputs.

    Args:
        weights: (samples, heads, N, N) attention of a few inputs, in the order that each head takes; samples are
            averaged.
        block_size: tokens of a block of the sequence. Where it does not divide N, the smaller block at the end stays
            whole, as row and as column.
        density: share of the blocks that is kept; or
        mass: keep the largest until they hold this share of the attention.

    Returns: (heads, T, T) booleans, for `select_mask` (with a batch of 1).

    >>> static_blocks(torch.eye(4).view(1, 1, 4, 4), 2, density=0.5).int()
    tensor([[[1, 0],
             [0, 1]]], dtype=torch.int32)
    """
    check_positive(block_size=block_size)
    if weights.ndim != 4 or weights.shape[-1] != weights.shape[-2]:
        raise InputError(f"weights is {tuple(weights.shape)}: give (samples, heads, N, N)")
    if (density is None) == (mass is None) or not 0 < (density or mass or 0) <= 1:
        raise InputError(f"density is {density} and mass is {mass}: give one of them, above 0 and at most 1")
    sums = pool_attention(weights.detach().double().mean(0, keepdim=True), block_size)[0]  # of all blocks, scaled alike
    ordered, place = torch.sort(sums.flatten(1), dim=-1, descending=True, stable=True)
    if density is not None:
        kept = torch.arange(ordered.shape[-1], device=sums.device) < max(1, round(density * ordered.shape[-1]))
    else:
        assert mass is not None
        kept = (ordered.cumsum(-1) - ordered) / ordered.sum(-1, keepdim=True) < mass
    blocks = torch.zeros_like(ordered, dtype=torch.bool).scatter(-1, place, kept.expand_as(place)).view_as(sums)
    if weights.shape[-1] % block_size:
        blocks[:, -1] = blocks[:, :, -1] = True
    return blocks


def _cut(weights: Tensor, block_size: int) -> Tensor:
    """(..., N, M) to (..., T, block_size, S, block_size), zeros past the end."""
    rows, columns = (-length % block_size for length in weights.shape[-2:])
    padded = F.pad(weights, (0, columns, 0, rows)) if rows or columns else weights
    return padded.unflatten(-1, (-1, block_size)).unflatten(-3, (-1, block_size))


def _entries(weights: Tensor, block_size: int) -> Tensor:
    """(T, S) how many entries each block of (..., N, M) has."""
    rows, columns = (
        (length - torch.arange(0, length, block_size, device=weights.device)).clamp(max=block_size)
        for length in weights.shape[-2:]
    )
    return rows.unsqueeze(1) * columns


def _relative(x: Tensor) -> Tensor:
    """Each entry over the sum of its row; 0 where all are."""
    total = x.sum(-1, keepdim=True)
    return (x / total).where(total > 0, 0.0)
