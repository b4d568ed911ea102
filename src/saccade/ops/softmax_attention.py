"""Softmax attention (Vaswani et al., 2017, arXiv:1706.03762), and the exact merging of its parts through the
log-sum-exp (as in FlashAttention, Dao et al., 2022, arXiv:2205.14135)."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.ops.check import check_attention

__all__ = ["AttentionResult", "attention_weights", "merge_attention", "softmax_attention"]


class AttentionResult(NamedTuple):
    """What attention returns with `return_lse=True`.

    Attributes:
        out: (B, heads, N, E).
        lse: (B, heads, N), the natural log of the sum over visible keys of exp(logit); float32 at least, and -inf
            where a query may see nothing.
    """

    out: Tensor
    lse: Tensor


@overload
def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    causal: str | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    impl: str = ...,
) -> Tensor: ...


@overload
def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    causal: str | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    impl: str = ...,
) -> AttentionResult: ...


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: str | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | AttentionResult:
    """Average the values with weights softmax(scale * q.k + bias) over the keys that each query may see.

    Args:
        query: (B, heads, N, D).
        key: (B, kv_heads, M, D); kv_heads divides heads, and query head t uses key head t // (heads / kv_heads).
        value: (B, kv_heads, M, E).
        mask: broadcastable to (B, heads, N, M). Boolean: True = may attend. Floats are added to the logits.
        bias: floats added to the logits, broadcastable likewise; unlike a mask it may stand beside `causal`.
        causal: None, or the corner in which the diagonal is anchored: "top_left" lets query n see keys 0..n,
            "bottom_right" lets the last query see every key. An error together with `mask`.
        scale: factor of q.k, D^-0.5 by default.
        return_lse: also return the log-sum-exp, with which parts merge exactly (`merge_attention`).
        impl: "reference" forms the N x M weights and defines what is right; "fused" is torch's
            scaled_dot_product_attention, which has no log-sum-exp to return; "auto" is "fused" wherever it can serve.

    Returns: (B, heads, N, E) in the dtype of the inputs, or AttentionResult. A query that may see nothing gets 0.
    Raises: InputError for shapes that do not fit, a mask beside `causal`, or an `impl` that cannot serve the call.

    >>> q, k, v = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4), torch.tensor([[[[0.0], [3.0], [6.0]]]])
    >>> softmax_attention(q, k, v, causal="bottom_right").flatten()  # equal keys: the mean of what is visible
    tensor([1.5000, 3.0000])
    """
    check_attention(query, key, value, axes=1)
    check_choice("impl", impl, ("auto", "fused", "reference"))
    if impl == "fused" and return_lse:
        raise InputError(
            "impl is 'fused' and return_lse is True: torch's fused attention returns none. Use impl='reference'"
        )
    if causal is not None:
        check_choice("causal", causal, ("top_left", "bottom_right"))
        if mask is not None:
            raise InputError(
                f"mask is given and causal is {causal!r}: give one of the two, or fold the causal part into the mask"
            )
        mask = _causal_mask(query.shape[-2], key.shape[-2], causal, query.device)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    added = _added(mask, bias, query)
    if impl == "reference" or return_lse:
        result = attend(query, key, value, added, scale)
        return result if return_lse else result.out
    return fused(query, key, value, added, scale)


def merge_attention(parts: Sequence[AttentionResult | tuple[Tensor, Tensor]]) -> AttentionResult:
    """Merge attention over disjoint sets of keys into attention over their union, exactly.

    Args:
        parts: results of the same queries, each (out (..., N, E), lse (..., N)).

    Returns: AttentionResult of the union. A query that no part lets see anything gets 0 and -inf.

    >>> left, right = (torch.ones(1, 2), torch.zeros(1)), (torch.zeros(1, 2), torch.zeros(1))
    >>> merge_attention([left, right]).out  # equal mass on both sides
    tensor([[0.5000, 0.5000]])
    """
    if not parts:
        raise InputError("parts is empty: give at least one (out, lse)")
    outs, lses = zip(*parts)
    lse = torch.stack(lses)
    shares, total = _exp_over_sum(lse, dim=0)
    dtype = outs[0].dtype
    out = (torch.stack([o.to(lse.dtype) for o in outs]) * shares.unsqueeze(-1)).sum(0)
    return AttentionResult(out.to(dtype), total)


def attention_weights(query: Tensor, key: Tensor, added: Tensor | None, scale: float) -> Tensor:
    """Form the weights softmax(scale * q.k + added), (..., N, M), in float32 at least; rows that see nothing are 0."""
    return _exp_over_sum(_logits(query, key, added, scale), dim=-1)[0]


def attend(query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, scale: float) -> AttentionResult:
    """Softmax attention as its equation: any leading axes, logits in float32 at least."""
    weights, lse = _exp_over_sum(_logits(query, key, added, scale), dim=-1)
    value = _repeat_heads(value, query.shape[-3])
    return AttentionResult((weights @ value.to(weights.dtype)).to(query.dtype), lse)


def fused(
    query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, scale: float, *, causal: bool = False
) -> Tensor:
    """The same without the log-sum-exp, by torch's scaled_dot_product_attention."""
    grouped = query.shape[-3] != key.shape[-3]
    added = None if added is None else added.to(query.dtype)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=added, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    # its strides are the device's choice: a graph whose views rely on them fails where attention is decomposed (ONNX)
    return out.clone(memory_format=torch.contiguous_format) if is_exporting() else out


def is_exporting() -> bool:
    """Whether torch.export traces what runs."""
    return getattr(torch.compiler, "is_exporting", lambda: False)()  # torch 2.6 has none


def _logits(query: Tensor, key: Tensor, added: Tensor | None, scale: float) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = _repeat_heads(key, query.shape[-3])
    logits = (query.to(dtype) * scale) @ key.to(dtype).mT
    return logits if added is None else logits + added


def _exp_over_sum(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """exp(logits) / sum and log(sum) along `dim`; where every logit is -inf: 0, -inf and a gradient of 0."""
    top = logits.detach().amax(dim, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = (logits - top).exp()
    total = weights.sum(dim, keepdim=True)
    empty = total == 0
    safe = total.masked_fill(empty, 1)
    lse = (safe.log() + top).masked_fill(empty, -torch.inf)
    return weights / safe, lse.squeeze(dim)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[-3] == heads else x.repeat_interleave(heads // x.shape[-3], -3)


def _causal_mask(queries: int, keys: int, anchor: str, device: torch.device) -> Tensor:
    last = keys - queries if anchor == "bottom_right" else 0
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(last)


def _added(mask: Tensor | None, bias: Tensor | None, like: Tensor) -> Tensor | None:
    """Mask and bias as one tensor of floats that is added to the logits."""
    for name, given in (("mask", mask), ("bias", bias)):
        if given is not None and not (given.is_floating_point() or (name == "mask" and given.dtype == torch.bool)):
            also = ", or booleans, True = may attend" if name == "mask" else ""
            raise TypeError(f"{name} is {given.dtype}: give floats to add to the logits{also}")
    if mask is None or mask.is_floating_point():
        return bias if mask is None else (mask if bias is None else mask + bias)
    bias = torch.zeros((), dtype=like.dtype, device=like.device) if bias is None else bias
    return torch.where(mask, bias, -torch.inf)
