"""Attention on integers of few bits, block by block (PAROAttention, 2025, arXiv:2506.16054; queries and keys as in
SageAttention), simulated: numbers are rounded as kernels round them, and computed as floats."""

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import InputError
from saccade.ops.check import check_attention, check_positive
from saccade.ops.softmax_attention import attention_weights
from saccade.ops.straight_through import straight_through

__all__ = ["quantize_blocks", "quantized_attention"]


def quantize_blocks(x: Tensor, block_size: tuple[int, int], bits: int = 8) -> Tensor:
    """Round each block of (..., N, D) to multiples of its largest magnitude / (2^(bits - 1) - 1).

    Args:
        x: floats.
        block_size: rows and columns of a block that shares a scale; 0 for all of them. Blocks at the end are smaller.
        bits: of the signed integers, 2 to 16; their range is symmetric, -127 to 127 with 8 bits.

    Returns: what the integers stand for, in the dtype of x. The gradient is that of x itself (straight through).

    >>> quantize_blocks(torch.tensor([[1.27, 0.004], [100.0, 127.0]]), (1, 0))
    tensor([[  1.2700,   0.0000],
            [100.0000, 127.0000]])
    """
    if x.ndim < 2 or len(block_size) != 2 or min(block_size) < 0:
        raise InputError(
            f"x is {tuple(x.shape)} and block_size is {block_size}: give (..., N, D) and two sizes, 0 for all"
        )
    if not isinstance(bits, int) or not 2 <= bits <= 16:
        raise InputError(f"bits is {bits}: give 2 to 16")
    if not x.numel():
        return x
    length, width = x.shape[-2:]
    rows, columns = block_size[0] or length, block_size[1] or width
    padded = F.pad(x.detach(), (0, -width % columns, 0, -length % rows))
    blocks = padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))  # (..., T, rows, S, columns)
    scale = blocks.abs().amax((-3, -1), keepdim=True) / (2 ** (bits - 1) - 1)
    rounded = (blocks / scale.where(scale > 0, 1.0)).round() * scale
    rounded = rounded.flatten(-4, -3).flatten(-2)[..., :length, :width]
    return straight_through(rounded, x)


def quantized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bits: int = 8,
    weight_bits: int | None = None,
    block_size: int = 64,
    center_keys: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention whose queries, keys, weights and values are rounded block by block to integers of few bits.

    `block_size` rows of a head's queries share a scale, and as many of its keys; so does each square block of the
    weights, and each channel of the values. The mean key, which the softmax does not see, is taken out of the keys
    before they are rounded.

    Args:
        query: (B, heads, N, D).
        key, value: (B, kv_heads, M, D) and (B, kv_heads, M, E); kv_heads divides heads.
        mask: booleans, broadcastable to (B, heads, N, M), True = may attend.
        bits: of queries, keys and values.
        weight_bits: of the weights; None takes `bits`.
        block_size: tokens, 32 or 64 in kernels.
        center_keys: take the mean key out.
        scale: factor of q.k, D^-0.5 by default.

    Returns: (B, heads, N, E) in the dtype of the inputs, with the gradient of attention on the rounded numbers, passed
        straight through the rounding. It forms all N x M weights: a simulation, to see what rounding does.

    >>> x = torch.tensor([0.0, 4.0, 1.0]).view(1, 1, 3, 1)
    >>> quantized_attention(x, x, x, bits=16).round(decimals=2).flatten()  # as without rounding
    tensor([1.6700, 4.0000, 3.7900])
    """
    check_attention(query, key, value, axes=1)
    check_positive(block_size=block_size)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}: give booleans, True = may attend")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (query, key, value))
    if center_keys:
        k = k - k.mean(-2, keepdim=True)
    rows = (block_size, 0)
    hidden = None if mask is None else torch.zeros((), dtype=dtype, device=q.device).where(mask, -torch.inf)
    weights = attention_weights(quantize_blocks(q, rows, bits), quantize_blocks(k, rows, bits), hidden, scale)
    weights = quantize_blocks(weights, (block_size, block_size), bits if weight_bits is None else weight_bits)
    v = quantize_blocks(v, (0, 1), bits).repeat_interleave(q.shape[1] // v.shape[1], 1)
    return (weights @ v).to(query.dtype)
