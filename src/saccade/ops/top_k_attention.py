"""Top-k attention: each query attends to the keys with its k highest scores (KVT, 2021, arXiv:2106.00515; with a k that
follows the input: DFIR-DETR, 2025, arXiv:2512.07078).

Scores of all pairs are formed to choose from, N M D multiply-adds; what follows takes N k (D + E).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.ops.check import check_attention, check_positive
from saccade.ops.selection import Selection, select_top_k
from saccade.ops.softmax_attention import attention_weights, merge_attention
from saccade.ops.sparse_attention import sparse_attention, sparse_attention_weights

__all__ = ["top_k_attention", "top_k_attention_weights"]


def top_k_attention(
    query: Tensor, key: Tensor, value: Tensor, count: int | Tensor, *, scale: float | None = None, impl: str = "auto"
) -> Tensor:
    """Softmax attention of every query over the keys with its highest scores.

    Choosing is not differentiable: gradients flow through the scores that are kept. A fractional count has a gradient
    of its own, that of the last key's part.

    Args:
        query: (B, heads, *space, D).
        key: (B, kv_heads, *key_space, D); kv_heads divides heads.
        value: (B, kv_heads, *key_space, E).
        count: k, at most all keys: a number, or (B,) floats above 0, one for each image. Of k = 2.3 keys two count
            fully, and 0.3 times exp(score) of the third enters the softmax.
        scale: factor of q.k, D^-0.5 by default.
        impl: "reference" forms the N x M weights and defines what is right; "auto" and "tiled" gather the keys that
            are kept, as in `sparse_attention`.

    Returns: (B, heads, *space, E) in the dtype of the inputs. Equal scores go to the earlier key.
    Raises: InputError for shapes that do not fit, or a count that is not positive.

    >>> query, key = torch.ones(1, 1, 1, 1), torch.tensor([3.0, 1.0, 3.0]).reshape(1, 1, 3, 1)
    >>> top_k_attention(query, key, torch.tensor([5.0, 7.0, 9.0]).reshape(1, 1, 3, 1), 2).item()  # of equal scores
    7.0
    """
    check_attention(query, key, value)
    check_choice("impl", impl, ("auto", "tiled", "reference"))
    scores, count = _score(query, key, scale), _check_count(query, count)
    if isinstance(count, int):
        return sparse_attention(query, key, value, _select(scores, count, key), scale=scale, impl=impl)
    if impl == "reference":
        weights = top_k_attention_weights(query, key, count, scale=scale)
        values = value.flatten(2, -2).repeat_interleave(query.shape[1] // value.shape[1], 1)
        return (weights @ values.to(weights.dtype)).to(query.dtype).unflatten(2, query.shape[2:-1])
    last = count.detach().clamp(max=scores.shape[-1]).ceil() - 1  # rank of the key that counts in part
    share = (count.clamp(max=scores.shape[-1]) - last).view(-1, *(1,) * (query.ndim - 2))
    # the sizes of a graph cannot depend on values
    most = scores.shape[-1] if torch.compiler.is_compiling() else int(F.pad(last, (0, 1)).max()) + 1
    chosen, last = _select(scores, most, key), last.long().view(-1, 1, 1, 1)
    full = replace(chosen, used=chosen.used & (torch.arange(most, device=query.device) < last))
    last = last.expand(*scores.shape[:-1], 1)
    part = replace(chosen, blocks=chosen.blocks.gather(-1, last), used=chosen.used.gather(-1, last))
    out, lse = sparse_attention(query, key, value, part, scale=scale, return_lse=True, impl=impl)
    whole = sparse_attention(query, key, value, full, scale=scale, return_lse=True, impl=impl)
    return merge_attention([whole, (out, lse + share.log())]).out


def top_k_attention_weights(query: Tensor, key: Tensor, count: int | Tensor, *, scale: float | None = None) -> Tensor:
    """Form the weights with which `top_k_attention` averages, (B, heads, N, M): N x M memory, for looking at."""
    check_attention(query, key, key)
    scores, count = _score(query, key, scale), _check_count(query, count)
    if isinstance(count, int):
        return sparse_attention_weights(query, key, _select(scores, count, key), scale=scale)
    rank = _select(scores, scores.shape[-1], key).blocks.argsort(-1)
    part = (count.view(-1, 1, 1, 1) - rank).clamp(0, 1)
    kept = part > 0
    added = part.where(kept, 1.0).log().where(kept, -torch.inf)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return attention_weights(query.flatten(2, -2), key.flatten(2, -2), added, scale)


def _score(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """(B, heads, N, M) without gradient, in float32 at least."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys = key.detach().to(dtype).flatten(2, -2).repeat_interleave(query.shape[1] // key.shape[1], 1)
    queries = query.detach().to(dtype).flatten(2, -2)
    return queries @ keys.mT * (1.0 if scale is None else scale)  # a positive scale would not change the order


def _select(scores: Tensor, count: int, key: Tensor) -> Selection:
    return select_top_k(scores, count, key_size=tuple(key.shape[2:-1]))


def _check_count(query: Tensor, count: int | Tensor) -> int | Tensor:
    if not isinstance(count, Tensor):
        check_positive(count=count)
        return count
    if not count.is_floating_point() or count.shape != query.shape[:1]:
        raise InputError(
            f"count is {count.dtype} {tuple(count.shape)}: give an integer, or floats ({query.shape[0]},), one an image"
        )
    if not torch.compiler.is_compiling() and not (count > 0).all():  # a graph cannot look at values
        raise InputError(f"count is {count.tolist()}: each image keeps a part of a key at least. Give numbers above 0")
    return count.to(torch.promote_types(count.dtype, torch.float32))
