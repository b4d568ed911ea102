"""Sparse softmax attention = pattern x engine: the pattern says which keys a query may see, the engine computes.

| `impl`      | what it forms                    | serves                                                           |
|-------------|----------------------------------|------------------------------------------------------------------|
| `reference` | all N x M weights under a mask   | everything; the definition                                       |
| `tiled`     | tiles of queries x their regions | everything, memory linear in N; CPU and CUDA                     |
| `triton`    | nothing but the result           | static patterns without bias; CUDA, half precision or float32    |
| `flex`      | nothing but the result           | static patterns without bias; CUDA, and on the CPU forward alone |
| `auto`      | on CUDA `triton`, else `tiled`   | every call; on CUDA `tiled` where `triton` does not serve it     |

Under `auto` and `tiled` a pattern that hides nothing, and plain `Causal()`, are torch's dense attention. In a graph
that is compiled or exported `auto` is `tiled`. The kernels of `triton` have no second derivative.
"""

from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.ops.check import check_attention
from saccade.ops.compose import PerHead, SelectionUnion
from saccade.ops.pair_attention import attend_pairs
from saccade.ops.pattern import Pattern, Region, StaticPattern
from saccade.ops.position_bias import PositionBias
from saccade.ops.selection import Selection, token_slots
from saccade.ops.sequence import Causal
from saccade.ops.softmax_attention import AttentionResult, attend, attention_weights, fused, merge_attention
from saccade.ops.tiles import attend_tiles, is_traced, join_tiles

__all__ = ["sparse_attention", "sparse_attention_weights"]

WIDEST = 256  # channels of a head that fit the registers of the Triton kernels
IMPLS = ("auto", "tiled", "reference", "triton", "flex")


@overload
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    bias: Tensor | PositionBias | None = ...,
    extra_key: Tensor | None = ...,
    extra_value: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    impl: str = ...,
) -> Tensor: ...


@overload
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    bias: Tensor | PositionBias | None = ...,
    extra_key: Tensor | None = ...,
    extra_value: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    impl: str = ...,
) -> AttentionResult: ...


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    bias: Tensor | PositionBias | None = None,
    extra_key: Tensor | None = None,
    extra_value: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | AttentionResult:
    """Softmax attention of every query over the keys that a pattern lets it see.

    Args:
        query: (B, heads, *space, D), one to three axes of space.
        key: (B, kv_heads, *key_space, D); `pattern.key_space(space)` is usually `space` itself. kv_heads divides
            heads, and query head t uses key head t // (heads / kv_heads).
        value: (B, kv_heads, *key_space, E).
        pattern: which keys a query sees.
        bias: added to the logits: a PositionBias, or floats that broadcast to (B, heads, N, M), tokens in row-major
            order ("reference" alone, since it is N x M itself).
        extra_key, extra_value: (B, kv_heads, extra, D) and (..., E), seen by all queries besides the pattern's keys,
            without bias.
        scale: factor of q.k, D^-0.5 by default.
        return_lse: also return the log-sum-exp over all visible keys, (B, heads, *space).
        impl: see the table above.

    Returns: (B, heads, *space, E) in the dtype of the inputs, or AttentionResult.
    Raises: InputError for shapes that do not fit the pattern, or an `impl` that cannot serve the call.

    >>> from saccade.ops import Window
    >>> x = torch.arange(4.0).reshape(1, 1, 4, 1)
    >>> sparse_attention(torch.zeros(1, 1, 4, 1), x, x, Window(2)).flatten()  # no preference: the mean of the window
    tensor([0.5000, 0.5000, 2.5000, 2.5000])
    """
    space = _check(query, key, value, pattern, extra_key, extra_value)
    check_choice("impl", impl, IMPLS)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = query.flatten(2, -2), key.flatten(2, -2), value.flatten(2, -2)
    need_lse = return_lse or extra_key is not None
    if impl == "reference":
        result = attend(query, key, value, _dense_added(query, pattern, space, bias), scale)
    elif isinstance(bias, Tensor):
        raise InputError(
            f"bias is a tensor {tuple(bias.shape)} and impl is {impl!r}: a dense bias has N x M entries, which only "
            "impl='reference' forms. Give a PositionBias such as RelativeTable"
        )
    else:
        result = _compute(query, key, value, pattern, space, bias, scale, need_lse, impl)
    if extra_key is not None and extra_value is not None:
        result = merge_attention([attend(query, extra_key, extra_value, None, scale), result])
    out = result.out.unflatten(2, space)
    return AttentionResult(out, result.lse.unflatten(2, space)) if return_lse else out


def sparse_attention_weights(
    query: Tensor,
    key: Tensor,
    pattern: Pattern,
    *,
    bias: Tensor | PositionBias | None = None,
    extra_key: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Form the weights with which `sparse_attention` averages, (B, heads, N, extra + M): N x M memory, for looking at.

    The extra keys, where there are any, stand first.
    """
    space = _check(query, key, key, pattern, extra_key, extra_key)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key = query.flatten(2, -2), key.flatten(2, -2)
    added = _dense_added(query, pattern, space, bias)
    if extra_key is not None:
        key = torch.cat([extra_key, key], 2)
        added = torch.nn.functional.pad(added, (extra_key.shape[2], 0))
    return attention_weights(query, key, added, scale)


def _dense_added(query: Tensor, pattern: Pattern, space: tuple[int, ...], bias: Tensor | PositionBias | None) -> Tensor:
    """Bias with -inf at hidden keys, broadcastable to (B, heads, N, M)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if isinstance(bias, PositionBias):
        offset = pattern.offset(space).to(query.device)
        bias = bias(query.to(dtype).unsqueeze(1), offset.unsqueeze(1)).squeeze(-4)  # the map is a single tile
    visible = pattern.mask(space).to(query.device)
    return torch.where(visible, torch.zeros((), dtype=dtype, device=query.device) if bias is None else bias, -torch.inf)


def _compute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    space: tuple[int, ...],
    bias: PositionBias | None,
    scale: float,
    need_lse: bool,
    impl: str,
) -> AttentionResult:
    """Choose the way by the kind of pattern; flat queries, keys and values."""
    if isinstance(pattern, PerHead):
        parts = [
            _compute(*_of_heads(query, key, value, heads), part, space, _bias_of(bias, heads), scale, need_lse, impl)
            for part, heads in pattern.by_pattern()
        ]
        order = [head for _, heads in pattern.by_pattern() for head in heads]
        back = sorted(range(len(order)), key=order.__getitem__)
        out = torch.cat([part.out for part in parts], 1)[:, back]
        return AttentionResult(out, torch.cat([part.lse for part in parts], 1)[:, back] if need_lse else parts[0].lse)
    if isinstance(pattern, SelectionUnion):
        return merge_attention(
            [_compute(query, key, value, part, space, bias, scale, True, impl) for part in pattern.parts()]
        )
    if impl in ("triton", "flex"):
        return _by_kernel(query, key, value, pattern, space, bias, scale, need_lse, impl)
    if isinstance(pattern, Selection):
        return _selected(query, key, value, pattern, space, bias, scale, need_lse)
    assert isinstance(pattern, StaticPattern)
    if bias is None and pattern.sees_all(space):
        return _dense(query, key, value, None, scale, need_lse)
    if bias is None and pattern == Causal() and not need_lse:
        return AttentionResult(fused(query, key, value, None, scale, causal=True), query.new_empty(0))
    if impl == "auto" and _kernels_serve(query, value, bias):
        return _by_kernel(query, key, value, pattern, space, bias, scale, need_lse, "triton")
    return _tiled(query, key, value, pattern, space, bias, scale, need_lse)


def _kernels_serve(query: Tensor, value: Tensor, bias: PositionBias | None) -> bool:
    """Whether `auto` takes the Triton kernels."""
    fits = max(query.shape[-1], value.shape[-1]) <= WIDEST and query.dtype != torch.float64
    return query.is_cuda and bias is None and fits and not torch.compiler.is_compiling()


def _by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    space: tuple[int, ...],
    bias: PositionBias | None,
    scale: float,
    need_lse: bool,
    impl: str,
) -> AttentionResult:
    """Kernels that skip tiles, where they can serve the call."""
    if bias is not None or not isinstance(pattern, StaticPattern):
        what = "a bias is given" if bias is not None else f"the pattern is a {type(pattern).__name__}"
        raise InputError(f"impl is {impl!r} and {what}: it serves static patterns without a bias. Use impl='tiled'")
    if impl == "flex":
        from saccade.ops.flex_attention import attend_flex

        return attend_flex(query, key, value, pattern, space, scale, need_lse)
    try:
        from saccade.ops import triton_attention
    except ImportError as error:
        raise InputError(f"impl is 'triton' and {error}: install triton, or use impl='tiled'") from error
    if query.device.type != "cuda" and not triton_attention.INTERPRETED:
        raise InputError(
            f"impl is 'triton' and the tensors are on {query.device}: its kernels run on CUDA, and on the CPU under "
            "TRITON_INTERPRET=1 alone. Use impl='tiled'"
        )
    if query.dtype == torch.float64:
        raise InputError("impl is 'triton' and query is torch.float64: its kernels sum in float32. Use impl='tiled'")
    lists = pattern.kernel_lists(space, query.device)
    return AttentionResult(*triton_attention.attend_blocks(query, key, value, *lists, scale))


def _of_heads(query: Tensor, key: Tensor, value: Tensor, heads: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Some heads of the queries, and the keys and values of each."""
    shared = [head // (query.shape[1] // key.shape[1]) for head in heads]
    return query[:, heads], key[:, shared], value[:, shared]


def _bias_of(bias: PositionBias | None, heads: list[int]) -> PositionBias | None:
    return None if bias is None else bias.for_heads(heads)


def _tiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: StaticPattern,
    space: tuple[int, ...],
    bias: PositionBias | None,
    scale: float,
    need_lse: bool,
) -> AttentionResult:
    """Gather tiles of queries and their regions of keys, and attend inside each: all tensors are linear in N."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    regions, slot = pattern.plan_regions(space, bias is not None, dtype, query.device)
    results = [attend_tiles(query, key, value, region, bias, scale, need_lse) for region in regions]
    return join_tiles(results, slot, need_lse)


def _selected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    space: tuple[int, ...],
    bias: PositionBias | None,
    scale: float,
    need_lse: bool,
) -> AttentionResult:
    """Attend in tiles, a block of queries and the key blocks that were selected for it, of all images and heads.

    Single queries that select blocks share them: there each key block gathers its queries (`attend_pairs`).
    """
    if bias is not None:
        raise InputError("bias is given with a Selection: only impl='reference' adds one there")
    batch, heads = query.shape[:2]
    rows, columns = (order.to(query.device) for order in selection.block_shapes(space))
    if rows.shape[1] == 1 < columns.shape[1]:
        if torch.compiler.is_compiling():  # the sizes of a graph cannot depend on values
            return attend(query, key, value, _dense_added(query, selection, space, None), scale)
        sees = None if selection.within is None else partial(selection.within.sees, space)
        return attend_pairs(query, key, value, selection.pairs(space), columns, scale, sees)
    lists = selection.blocks.shape[1]  # one for each head, or one for all
    blocks, used = (x.expand(batch, -1, -1, -1) for x in (selection.blocks, selection.used))
    chosen = columns[blocks]  # (B, lists, T, entries, tokens of a block)
    visible = (used.unsqueeze(-1) & (chosen >= 0)).flatten(3).unsqueeze(3)
    if selection.within is not None:
        some = rows.clamp(min=0).unsqueeze(-1)
        visible = visible & selection.within.sees(space, some, chosen.flatten(3).unsqueeze(3))
    hidden = None
    if is_traced() or query.device.type != "cpu" or not visible.all():  # a look at values would wait for the device
        hidden = torch.zeros(visible.shape, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
        hidden = hidden.masked_fill(~visible, -torch.inf).flatten(0, 2).unsqueeze(1)

    def flat(x: Tensor) -> Tensor:
        """(1, heads of a list, lists N, D), all images and lists one after the other."""
        return x.flatten(0, 2)[None, None] if lists > 1 else x.transpose(0, 1).flatten(1, 2).unsqueeze(0)

    def numbers(tokens: Tensor, x: Tensor) -> Tensor:
        """(lists T, Q) rows of `flat(x)`, from tokens (B | 1, lists | 1, T, Q)."""
        share = heads // x.shape[1] if lists > 1 else 1
        first = torch.arange(batch * lists // share, device=x.device).view(batch, lists // share, 1, 1) * x.shape[2]
        return (tokens.clamp(min=0) + first.repeat_interleave(share, 1)).flatten(0, 2)  # -1: one that nobody sees

    region = Region(numbers(rows[None, None], query), numbers(chosen.flatten(3), key), hidden)
    result = attend_tiles(flat(query), flat(key), flat(value), region, None, scale, need_lse)
    shape = (batch, heads, rows.numel()) if lists > 1 else (heads, batch, rows.numel())
    out, lse = result.out.reshape(*shape, value.shape[-1]), result.lse.reshape(shape) if need_lse else result.lse
    if lists == 1:
        out, lse = out.transpose(0, 1), lse.transpose(0, 1) if need_lse else lse
    return join_tiles([AttentionResult(out, lse)], token_slots(rows, space), need_lse)


def _dense(
    query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, scale: float, need_lse: bool
) -> AttentionResult:
    """Fused attention; with the log-sum-exp, which fused kernels do not give with a gradient, as its equation."""
    if need_lse:
        return attend(query, key, value, added, scale)
    return AttentionResult(fused(query, key, value, added, scale), query.new_empty(0))


def _check(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, extra_key: Tensor | None, extra_value: Tensor | None
) -> tuple[int, ...]:
    check_attention(query, key, value)
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern is {type(pattern).__name__}: give a Pattern such as Window(7)")
    if not 4 <= query.ndim <= 6:
        raise InputError(f"query is {tuple(query.shape)}: give (B, heads, *space, D) with one to three axes of space")
    space, keys = tuple(query.shape[2:-1]), tuple(key.shape[2:-1])
    expected = pattern.key_space(space)
    if keys != expected:
        raise InputError(f"key has space {keys}: {pattern} with queries on {space} takes keys on {expected}")
    if (extra_key is None) != (extra_value is None):
        raise InputError("extra_key and extra_value go together: give both or none")
    if isinstance(pattern, PerHead) and len(pattern.patterns) != query.shape[1]:
        raise InputError(f"pattern is for {len(pattern.patterns)} heads and query has {query.shape[1]}: give one each")
    if extra_key is not None and extra_value is not None:
        check_attention(query.flatten(2, -2), extra_key, extra_value, axes=1)
    return space
