"""Channel attention (DaViT, Ding et al., 2022, arXiv:2204.03645): the channels of a head are the tokens, and the
positions their features."""

import torch
from torch import Tensor

from saccade.ops.check import check_attention

__all__ = ["channel_attention", "channel_attention_weights"]


def channel_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
    """Average the channels of the values with weights softmax(scale * query^T key) over the channels of a head.

    Every weight is a sum over all positions, so that each output sees the whole map at a cost linear in N. The order
    of the positions does not matter. Nothing divides by N: the logits grow with the map.

    Args:
        query: (B, heads, N, D).
        key: (B, heads, N, D).
        value: (B, heads, N, D).
        scale: factor of the products, D^-0.5 by default.

    Returns: (B, heads, N, D) in the dtype of the inputs.
    Raises: InputError for shapes that do not fit together.

    >>> x = torch.tensor([[[[0.0, 4.0], [2.0, 2.0]]]])
    >>> channel_attention(torch.zeros_like(x), x, x).flatten()  # no preference: the mean of the channels
    tensor([2., 2., 2., 2.])
    """
    weights = channel_attention_weights(query, key, scale=scale)
    check_attention(query, key, value, axes=1)
    return (value.to(weights.dtype) @ weights.mT).to(value.dtype)


def channel_attention_weights(query: Tensor, key: Tensor, *, scale: float | None = None) -> Tensor:
    """Form the weights of channel attention, (B, heads, D, D): a row for each channel of the output, with sum 1.

    Weights below 1e-31 (1e-292 of float64) are 0.
    """
    check_attention(query, key, key, axes=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    weights = ((query.to(dtype).mT @ key.to(dtype)) * scale).softmax(-1)
    # logits that grow with the map leave weights near the least number there is, whose products take a CPU many times
    # as long as others; what is dropped is below rounding beside the largest weight of a row, which is 1 / D at least
    limits = torch.finfo(dtype)
    return weights.masked_fill(weights < limits.tiny / limits.eps, 0.0)
