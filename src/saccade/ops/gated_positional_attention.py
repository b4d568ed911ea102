"""Gated positional attention (ConViT, d'Ascoli et al., 2021, arXiv:2103.10697): content and position mixed by a gate.

| impl | what it does |
|---|---|
| "reference" | forms both N x N maps and mixes them: the paper's equation |
| "separable" | fused attention for the content; position axis by axis, whose softmax over the map is a product of one |
| | softmax for each axis: N (H + W) instead of N^2 products |
| "auto" | "separable" |
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.ops.check import check_attention
from saccade.ops.softmax_attention import attention_weights, softmax_attention

__all__ = ["gated_positional_attention"]


def gated_positional_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Sequence[Tensor],
    gate: Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Average the values with weights (1 - gate) softmax(scale q.k) + gate softmax(position), over the whole map.

    Args:
        query, key: (B, heads, *space, D).
        value: (B, heads, *space, E).
        positions: for each axis of space logits (heads, n, n) of its query and key places; they add up.
        gate: (heads,), each between 0 and 1.
        scale: factor of q.k, D^-0.5 by default.
        impl: see the table above.

    Returns: (B, heads, *space, E) in the dtype of the inputs.
    Raises: InputError for shapes that do not fit together.

    >>> query, value = torch.zeros(1, 1, 3, 4), torch.tensor([[[[0.0], [3.0], [6.0]]]])
    >>> itself = 1000 * torch.eye(3).unsqueeze(0)
    >>> gated_positional_attention(query, query, value, [itself], torch.tensor([1.0])).flatten()
    tensor([0., 3., 6.])
    """
    check_choice("impl", impl, ("auto", "reference", "separable"))
    _check(query, key, value, positions, gate)
    if impl == "reference":
        weights = gated_positional_weights(query, key, positions, gate, scale=scale)
        out = weights @ value.flatten(2, -2).to(weights.dtype)
        return out.to(value.dtype).unflatten(2, query.shape[2:-1])
    content = softmax_attention(*(x.flatten(2, -2) for x in (query, key, value)), scale=scale)
    content = content.unflatten(2, query.shape[2:-1])
    share = gate.view(-1, *(1,) * (value.ndim - 2)).to(value.dtype)
    return torch.lerp(content, _average(value, positions), share)


def gated_positional_weights(
    query: Tensor, key: Tensor, positions: Sequence[Tensor], gate: Tensor, *, scale: float | None = None
) -> Tensor:
    """Form the weights, (B, heads, N, N)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    content = attention_weights(query.flatten(2, -2), key.flatten(2, -2), None, scale)
    logits = positions[0]
    for axis in positions[1:]:
        logits = (logits[:, :, None, :, None] + axis[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)
    share = gate.view(-1, 1, 1)
    weights = (1 - share) * content + share * logits.to(content.dtype).softmax(-1)
    return weights / weights.sum(-1, keepdim=True)


def _average(value: Tensor, positions: Sequence[Tensor]) -> Tensor:
    """Softmax averages along one axis after the other."""
    space, out = value.shape[2:-1], value
    for number, logits in enumerate(positions):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        weights = logits.to(dtype).softmax(-1).to(value.dtype)
        before, behind = prod(space[:number]), prod(space[number + 1 :])
        lines = out.reshape(*value.shape[:2], before, space[number], behind * value.shape[-1])
        out = weights.unsqueeze(1) @ lines  # (B, heads, before, n, behind E)
    return out.reshape(value.shape)


def _check(query: Tensor, key: Tensor, value: Tensor, positions: Sequence[Tensor], gate: Tensor) -> None:
    check_attention(query, key, value)
    heads, space = query.shape[1], query.shape[2:-1]
    if key.shape[:-1] != query.shape[:-1]:
        raise InputError(
            f"key is {tuple(key.shape)} and query is {tuple(query.shape)}: both are of one map. Give one key per query"
        )
    expected = [(heads, length, length) for length in space]
    if [tuple(logits.shape) for logits in positions] != expected:
        raise InputError(
            f"positions are {[tuple(logits.shape) for logits in positions]}: give {expected}, logits for each axis"
        )
    if gate.shape != (heads,):
        raise InputError(f"gate is {tuple(gate.shape)}: give ({heads},), one number for each head")
