"""Attention over lists of tiles as Triton kernels, forward and backward: for CUDA tensors, or Triton's interpreter.

The online softmax is FlashAttention's (2022, arXiv:2205.14135). Rows are read where they lie, by token number: nothing
is permuted or padded in memory, and what is kept for the backward pass is the result and its log-sum-exp.
"""

# mypy: allow-untyped-defs

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from saccade.ops.block_lists import BlockLists

__all__ = ["attend_blocks"]

LOG2E = tl.constexpr(math.log2(math.e))


def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, lists: BlockLists, transposed: BlockLists, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the tiles that each tile of queries visits.

    Args:
        query: (B, heads, N, D), in float16, bfloat16 or float32.
        key, value: (B, kv_heads, M, D) and (..., E).
        lists, transposed: as `BlockLists.to` and `.transposed().to` give them, on the device of the tensors.
        scale: factor of q.k.

    Returns: (B, heads, N, E) in the dtype of the inputs, and its log-sum-exp (B, heads, N) in float32.
    """
    out, lse = _Attend.apply(query, key, value, scale, lists, transposed)
    return out, lse


class _Attend(Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, lists: BlockLists, transposed: BlockLists
    ) -> tuple[Tensor, Tensor]:
        query, key, value = map(_rows, (query, key, value))
        batch, heads, num_queries, _ = query.shape
        # channels last, as mixers merge their heads
        out = query.new_empty(batch, num_queries, heads, value.shape[-1]).transpose(1, 2)
        lse = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=query.device)
        grid = (len(lists.query), batch * heads)
        if query.numel():
            _forward[grid](
                query, key, value, out, lse, *lists, *_strides(query, key, value, out), scale, lists.blocks.shape[1],
                num_queries, **_sizes(query, key, value, lists), **_run(8, 3, 3, lists, query.shape[-1]),
            )  # fmt: skip
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.rest = scale, lists, transposed
        return out, lse

    @staticmethod
    @once_differentiable  # a second derivative is refused, not wrong
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        scale, lists, transposed = ctx.rest
        grad = _rows(grad)
        batch, heads, num_queries, _ = query.shape
        delta = torch.empty_like(lse)
        grad_query, grad_key, grad_value = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
        )
        sizes = _sizes(query, key, value, lists)
        if query.numel():
            grad_lse = grad_lse.contiguous()
            _subtrahend[(triton.cdiv(num_queries, 64), batch * heads)](
                grad, out, grad_lse, delta, *_strides(grad, out), num_queries, heads, value.shape[-1],
                sizes["BLOCK_E"],
            )  # fmt: skip
            _backward_query[(len(lists.query), batch * heads)](
                query, key, value, grad, lse, delta, grad_query, *lists,
                *_strides(query, key, value, grad, grad_query), scale, lists.blocks.shape[1], num_queries, **sizes,
                **_run(4, 3, 2, lists, query.shape[-1]),
            )  # fmt: skip
            _backward_key[(len(transposed.key), batch * key.shape[1])](
                query, key, value, grad, lse, delta, grad_key, grad_value, *transposed,
                *_strides(query, key, value, grad, grad_key, grad_value), scale, transposed.blocks.shape[1],
                num_queries, **sizes, **_run(4, 3, 2, lists, query.shape[-1]),
            )  # fmt: skip
        return grad_query, grad_key, grad_value, None, None, None


def _rows(x: Tensor) -> Tensor:
    """With the channels of a row side by side, as kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _sizes(query: Tensor, key: Tensor, value: Tensor, lists: BlockLists) -> dict[str, Any]:
    """The kernels' compile-time sizes, and how they are run."""
    dim, value_dim = query.shape[-1], value.shape[-1]
    return {
        "HEADS": query.shape[1],
        "GROUP": query.shape[1] // key.shape[1],
        "D": dim,
        "E": value_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_E": max(16, triton.next_power_of_2(value_dim)),
        "Q": lists.query.shape[1],
        "K": lists.key.shape[1],
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }


def _run(large_warps: int, large_stages: int, stages: int, lists: BlockLists, dim: int) -> dict[str, int]:
    """Warps and stages, measured on an H200 at 64 channels; wider rows take the shared memory of a stage."""
    large = lists.query.shape[1] > 64
    depth = large_stages if large else stages
    return {"num_warps": large_warps if large or dim > 64 else 4, "num_stages": depth if dim <= 64 else 2}


@triton.jit
def _load(pointer, tokens, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """(tokens, BLOCK) rows of a tensor, 0 where there is no token."""
    column = tl.arange(0, BLOCK)
    return tl.load(
        pointer + tokens[:, None] * stride + column[None, :],
        mask=(tokens[:, None] >= 0) & (column[None, :] < SIZE),
        other=0.0,
    )


@triton.jit
def _store(pointer, tokens, stride, x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    place = pointer + tokens[:, None] * stride + column[None, :]
    tl.store(place, x.to(pointer.dtype.element_ty), mask=(tokens[:, None] >= 0) & (column[None, :] < SIZE))


@triton.jit
def _hide(logits, masks, number, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """-inf where the mask of that number says so, a byte an entry: bits took more registers than they saved reads."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    visible = tl.load(masks + number * ROWS * COLUMNS + row[:, None] * COLUMNS + column[None, :])
    return tl.where(visible != 0, logits, float("-inf"))


@triton.jit
def _forward_step(
    entry, q, acc, top, total, k_pointer, v_pointer, key_tokens, blocks, mask, masks, stride_kn, stride_vn, factor,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys joins the online softmax."""
    block = tl.load(blocks + entry)
    tokens = tl.load(key_tokens + block * K + tl.arange(0, K))
    k = _load(k_pointer, tokens, stride_kn, D, BLOCK_D)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
    if MASKED:
        logits = _hide(logits, masks, tl.load(mask + entry), Q, K)
    new_top = tl.maximum(top, tl.max(logits, 1))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - safe[:, None])
    shrink = tl.exp2(top - safe)
    total = total * shrink + tl.sum(weights, 1)
    v = _load(v_pointer, tokens, stride_vn, E, BLOCK_E)
    acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def _forward(
    query, key, value, out, lse, query_tokens, key_tokens, blocks, full, visits, mask, masks,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, scale, most, num_queries,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    image, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    factor = scale * LOG2E
    rows = tl.load(query_tokens + tile * Q + tl.arange(0, Q))
    q = _load(query + image * stride_qb + head * stride_qh, rows, stride_qn, D, BLOCK_D)
    k_pointer = key + image * stride_kb + head // GROUP * stride_kh
    v_pointer = value + image * stride_vb + head // GROUP * stride_vh
    acc = tl.zeros((Q, BLOCK_E), tl.float32)
    top = tl.full((Q,), float("-inf"), tl.float32)
    total = tl.zeros((Q,), tl.float32)
    first, whole, last = tile * most, tl.load(full + tile), tl.load(visits + tile)
    for entry in range(first, first + whole):
        acc, top, total = _forward_step(
            entry, q, acc, top, total, k_pointer, v_pointer, key_tokens, blocks, mask, masks, stride_kn, stride_vn,
            factor, D, E, BLOCK_D, BLOCK_E, Q, K, PRECISION, MASKED=False,
        )  # fmt: skip
    for entry in range(first + whole, first + last):
        acc, top, total = _forward_step(
            entry, q, acc, top, total, k_pointer, v_pointer, key_tokens, blocks, mask, masks, stride_kn, stride_vn,
            factor, D, E, BLOCK_D, BLOCK_E, Q, K, PRECISION, MASKED=True,
        )  # fmt: skip
    empty = total == 0.0
    safe = tl.where(empty, 1.0, total)
    _store(out + image * stride_ob + head * stride_oh, rows, stride_on, acc / safe[:, None], E, BLOCK_E)
    sums = tl.where(empty, float("-inf"), (top + tl.log2(safe)) / LOG2E)
    tl.store(lse + tl.program_id(1).to(tl.int64) * num_queries + rows, sums, mask=rows >= 0)


@triton.jit
def _logits(a, b, factor, masks, number, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
            MASKED: tl.constexpr):  # fmt: skip
    """factor a b^T, hidden where the mask says so."""
    logits = tl.dot(a, tl.trans(b), input_precision=PRECISION) * factor
    return _hide(logits, masks, number, ROWS, COLUMNS) if MASKED else logits


@triton.jit
def _sums(lse, pair, rows, num_queries):
    """(Q,) log-sum-exp in powers of two; 0 where nothing is seen, whose weights are all 0."""
    sums = tl.load(lse + pair * num_queries + rows, mask=rows >= 0, other=0.0)
    return tl.where(sums == float("-inf"), 0.0, sums * LOG2E)


@triton.jit
def _subtrahend(
    grad, out, grad_lse, delta, stride_gb, stride_gh, stride_gn, stride_ob, stride_oh, stride_on, num_queries, heads,
    E: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """What the softmax subtracts from every gradient of a weight; the log-sum-exp's own gradient joins it."""
    rows = tl.program_id(0) * 64 + tl.arange(0, 64)
    pair = tl.program_id(1).to(tl.int64)
    inside = rows < num_queries
    tokens = tl.where(inside, rows, -1)
    g = _load(grad + pair // heads * stride_gb + pair % heads * stride_gh, tokens, stride_gn, E, BLOCK_E)
    o = _load(out + pair // heads * stride_ob + pair % heads * stride_oh, tokens, stride_on, E, BLOCK_E)
    total = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    place = pair * num_queries + rows
    tl.store(delta + place, total - tl.load(grad_lse + place, mask=inside, other=0.0), mask=inside)


@triton.jit
def _query_step(
    entry, acc, q, grad, sums, delta, k_pointer, v_pointer, key_tokens, blocks, mask, masks, stride_kn, stride_vn,
    factor, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, Q: tl.constexpr,
    K: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    tokens = tl.load(key_tokens + tl.load(blocks + entry) * K + tl.arange(0, K))
    k = _load(k_pointer, tokens, stride_kn, D, BLOCK_D)
    v = _load(v_pointer, tokens, stride_vn, E, BLOCK_E)
    logits = _logits(q, k, factor, masks, tl.load(mask + entry), Q, K, PRECISION, MASKED)
    weights = tl.exp2(logits - sums[:, None])
    of_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    of_logits = weights * (of_weights - delta[:, None])
    return acc + tl.dot(of_logits.to(k.dtype), k, input_precision=PRECISION)


@triton.jit
def _backward_query(
    query, key, value, grad_out, lse, delta_pointer, grad_query,
    query_tokens, key_tokens, blocks, full, visits, mask, masks,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn, scale, most, num_queries,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries of a tile: over the key tiles that it visits."""
    tile, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    image, head = pair // HEADS, pair % HEADS
    rows = tl.load(query_tokens + tile * Q + tl.arange(0, Q))
    q = _load(query + image * stride_qb + head * stride_qh, rows, stride_qn, D, BLOCK_D)
    grad = _load(grad_out + image * stride_ob + head * stride_oh, rows, stride_on, E, BLOCK_E)
    sums = _sums(lse, pair, rows, num_queries)
    delta = tl.load(delta_pointer + pair * num_queries + rows, mask=rows >= 0, other=0.0)
    k_pointer = key + image * stride_kb + head // GROUP * stride_kh
    v_pointer = value + image * stride_vb + head // GROUP * stride_vh
    acc = tl.zeros((Q, BLOCK_D), tl.float32)
    first, whole, last = tile * most, tl.load(full + tile), tl.load(visits + tile)
    for entry in range(first, first + whole):
        acc = _query_step(
            entry, acc, q, grad, sums, delta, k_pointer, v_pointer, key_tokens, blocks, mask, masks, stride_kn,
            stride_vn, scale * LOG2E, D, E, BLOCK_D, BLOCK_E, Q, K, PRECISION, MASKED=False,
        )  # fmt: skip
    for entry in range(first + whole, first + last):
        acc = _query_step(
            entry, acc, q, grad, sums, delta, k_pointer, v_pointer, key_tokens, blocks, mask, masks, stride_kn,
            stride_vn, scale * LOG2E, D, E, BLOCK_D, BLOCK_E, Q, K, PRECISION, MASKED=True,
        )  # fmt: skip
    _store(grad_query + image * stride_gb + head * stride_gh, rows, stride_gn, acc * scale, D, BLOCK_D)


@triton.jit
def _key_step(
    entry, of_k, of_v, k, v, q_pointer, grad_pointer, lse, delta_pointer, pair, query_tokens, blocks, mask, masks,
    stride_qn, stride_on, factor, num_queries, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    rows = tl.load(query_tokens + tl.load(blocks + entry) * Q + tl.arange(0, Q))
    q = _load(q_pointer, rows, stride_qn, D, BLOCK_D)
    grad = _load(grad_pointer, rows, stride_on, E, BLOCK_E)
    sums = _sums(lse, pair, rows, num_queries)
    delta = tl.load(delta_pointer + pair * num_queries + rows, mask=rows >= 0, other=0.0)
    # keys down, queries across: no product needs its weights turned around
    logits = _logits(k, q, factor, masks, tl.load(mask + entry), K, Q, PRECISION, MASKED)
    weights = tl.exp2(logits - sums[None, :])
    of_v += tl.dot(weights.to(grad.dtype), grad, input_precision=PRECISION)
    of_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    of_logits = weights * (of_weights - delta[None, :])
    of_k += tl.dot(of_logits.to(q.dtype), q, input_precision=PRECISION)
    return of_k, of_v


@triton.jit
def _backward_key(
    query, key, value, grad_out, lse, delta_pointer, grad_key, grad_value,
    query_tokens, key_tokens, blocks, full, visits, mask, masks,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_gb, stride_gh, stride_gn, stride_wb, stride_wh, stride_wn,
    scale, most, num_queries,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of a tile: over the query tiles that visit it, of all heads that share it."""
    tile, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    image, kv_head = pair // (HEADS // GROUP), pair % (HEADS // GROUP)
    tokens = tl.load(key_tokens + tile * K + tl.arange(0, K))
    k = _load(key + image * stride_kb + kv_head * stride_kh, tokens, stride_kn, D, BLOCK_D)
    v = _load(value + image * stride_vb + kv_head * stride_vh, tokens, stride_vn, E, BLOCK_E)
    of_k = tl.zeros((K, BLOCK_D), tl.float32)
    of_v = tl.zeros((K, BLOCK_E), tl.float32)
    first, whole, last = tile * most, tl.load(full + tile), tl.load(visits + tile)
    for shared in range(GROUP):
        head = kv_head * GROUP + shared
        q_pointer = query + image * stride_qb + head * stride_qh
        grad_pointer = grad_out + image * stride_ob + head * stride_oh
        for entry in range(first, first + whole):
            of_k, of_v = _key_step(
                entry, of_k, of_v, k, v, q_pointer, grad_pointer, lse, delta_pointer, image * HEADS + head,
                query_tokens, blocks, mask, masks, stride_qn, stride_on, scale * LOG2E, num_queries, D, E, BLOCK_D,
                BLOCK_E, Q, K, PRECISION, MASKED=False,
            )  # fmt: skip
        for entry in range(first + whole, first + last):
            of_k, of_v = _key_step(
                entry, of_k, of_v, k, v, q_pointer, grad_pointer, lse, delta_pointer, image * HEADS + head,
                query_tokens, blocks, mask, masks, stride_qn, stride_on, scale * LOG2E, num_queries, D, E, BLOCK_D,
                BLOCK_E, Q, K, PRECISION, MASKED=True,
            )  # fmt: skip
    _store(grad_key + image * stride_gb + kv_head * stride_gh, tokens, stride_gn, of_k * scale, D, BLOCK_D)
    _store(grad_value + image * stride_wb + kv_head * stride_wh, tokens, stride_wn, of_v, E, BLOCK_E)


INTERPRETED = not isinstance(_forward, triton.JITFunction)  # TRITON_INTERPRET was set when triton was imported
