"""Pyramid sparse attention (2025, arXiv:2512.04025): a block of queries reads the blocks of keys that matter most token
by token, others as means of 2, 4 or 8 tokens, and skips the rest. Tokens stand in one sequence, whose order decides
what a block holds (`saccade.ops.gilbert_order`)."""

from collections.abc import Mapping, Sequence
from math import ceil, log
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.ops.block_map import block_map
from saccade.ops.check import check_attention, check_positive
from saccade.ops.pattern import Pattern
from saccade.ops.selection import select_mask
from saccade.ops.sequence import Causal
from saccade.ops.softmax_attention import AttentionResult, attend, merge_attention
from saccade.ops.sparse_attention import sparse_attention

__all__ = [
    "block_importance",
    "pyramid_attention",
    "pyramid_attention_weights",
    "pyramid_density",
    "pyramid_levels",
    "similar_levels",
]

LEVELS = (1, 2, 4, 8)
SLACK = 1e-6  # of a bound on importance, as in official code


def block_importance(
    query: Tensor,
    key: Tensor,
    query_block: int,
    key_block: int,
    *,
    sample: float = 1.0,
    causal: bool = False,
    scale: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate how much each block of queries needs each block of keys: the largest exp(logit) of a pair of their
    tokens, where each query's largest is 1.

    Args:
        query: (B, heads, N, D).
        key: (B, kv_heads, M, D).
        query_block, key_block: tokens of a block; the last may have fewer.
        sample: share of the tokens of a block that are looked at, drawn anew for each head, at the same places of all
            its blocks. Official code takes 0.25, at a sixteenth of the cost.
        causal: query n sees keys 0..n; it takes all tokens.
        scale: factor of q.k, D^-0.5 by default.
        generator: for the sample.

    Returns: (B, heads, T, M), rows that sum to 1, without gradient.

    >>> x = torch.tensor([0.0, 2.0, 0.0, 0.0]).reshape(1, 1, 4, 1)
    >>> block_importance(x, x, 4, 2)  # to the query that stands out, the first block is exp(4) times the second
    tensor([[[[0.5000, 0.5000]]]])
    """
    check_attention(query, key, key, axes=1)
    check_positive(query_block=query_block, key_block=key_block)
    if not 0 < sample <= 1 or (causal and sample < 1):
        raise InputError(f"sample is {sample} and causal is {causal}: give a share above 0 and up to 1, causal 1")
    if sample < 1:
        query, query_block = _sample(query, query_block, sample, generator)
        key, key_block = _sample(key, key_block, sample, generator)
    return block_map(query, key, query_block, key_block, causal=causal, divisor="max", scale=scale)


def _sample(x: Tensor, block: int, share: float, generator: torch.Generator | None) -> tuple[Tensor, int]:
    """Tokens at random places, the same in all blocks of a head, and how many there are in a block."""
    count, blocks = max(1, int(block * share)), -(-x.shape[2] // block)
    draw = torch.rand(*x.shape[:2], 1, block, device=x.device, generator=generator)
    places = draw.argsort(-1)[..., :count] + block * torch.arange(blocks, device=x.device).view(-1, 1)
    places = places.clamp(max=x.shape[2] - 1)  # the last token stands for those past the end
    return x.take_along_dim(places.flatten(2).unsqueeze(-1), 2), count


def pyramid_levels(
    importance: Tensor,
    ends: Mapping[int, float],
    *,
    by: str = "mass",
    least: float | None = 0.06,
    tiles: int | None = None,
    full_blocks: int = 0,
    causal: bool = False,
) -> Tensor:
    """Assign a level to each pair of blocks: the most important are read token by token, the least are skipped.

    Args:
        importance: (B, heads | 1, T, M), above 0 or equal.
        ends: level -> where its range ends in the row, most important block first: {1: 0.4, 2: 0.5, 4: 0.6, 8: 0.8}.
            A range begins where the one before ended; level 0 is skipped, as is all that is left.
        by: "count", shares of the number of key blocks, in the order of the mapping; "mass", shares of the row's
            importance, in ascending order: a range takes the block that crosses its end. A peaked row then has fewer
            fine blocks than a flat one.
        least: share of the blocks that have level 1 in any case, at least one block; None: no such blocks, and rows
            may be skipped as a whole. 0.06 is official code's, there with "mass" alone.
        tiles: hardware tiles of a block at level 1. The blocks of a level then come in multiples that fill whole tiles,
            rounded up where there are so many.
        full_blocks: key blocks at the end that have level 1 for all, such as those of text tokens.
        causal: of the blocks up to a query block's own; its own and the first have level 1. No later block counts,
            though all queries of a block do.

    Returns: (B, heads | 1, T, M) integers, 0 where the block is skipped.

    >>> pyramid_levels(torch.tensor([[[[0.1, 0.2, 0.6, 0.05, 0.05]]]]), {1: 0.4, 2: 0.7, 4: 0.85})
    tensor([[[[4, 2, 1, 0, 0]]]])
    """
    check_choice("by", by, ("count", "mass"))
    check_positive(tiles=1 if tiles is None else tiles)
    if importance.ndim != 4:
        raise InputError(f"importance is {tuple(importance.shape)}: give (B, heads or 1, query blocks, key blocks)")
    for level, end in ends.items():
        if level < 0 or not 0 <= end <= 1:
            raise InputError(f"ends is {dict(ends)}: give level -> share, levels from 0 and shares from 0 to 1")
    rows, columns = importance.shape[-2:]
    rank = torch.arange(columns, device=importance.device)
    row = torch.arange(rows, device=importance.device).unsqueeze(-1)
    seen = (row + 1 if causal else torch.full_like(row, columns)).clamp(max=columns)  # (T, 1) blocks of a row
    importance = importance.detach().double()
    if causal:
        importance = importance.masked_fill(rank > row, 0)
    ranked = torch.sort(importance, dim=-1, descending=True, stable=True)
    reached = ranked.values.cumsum(-1) / ranked.values.sum(-1, keepdim=True)
    start = seen.expand(*importance.shape[:-1], 1) * 0
    levels = torch.zeros_like(ranked.indices)
    for level, end in ends.items() if by == "count" else sorted(ends.items(), key=lambda entry: entry[1]):
        if by == "count":
            stop = (seen.double() * end).long().expand_as(start)
        else:
            below = (reached <= end + SLACK).sum(-1, keepdim=True)
            stop = torch.where(below > 0, below + 1, start)
        if level == 1 and least is not None:
            stop = stop.maximum((seen.double() * least).long() + 1)
        stop = stop.maximum(start).minimum(seen)
        if tiles is not None and level:
            step = ceil(level / tiles)
            length = stop - start
            up = -(-length // step) * step
            stop = start + torch.where(start + up > seen, length // step * step, up)
        levels = levels.masked_fill((rank >= start) & (rank < stop), level)
        start = stop
    levels = torch.zeros_like(levels).scatter(-1, ranked.indices, levels)
    if full_blocks:
        levels = levels.masked_fill(rank >= columns - full_blocks, 1)
    return _causal_levels(levels.masked_fill(rank == 0, 1)) if causal else levels


def _causal_levels(levels: Tensor) -> Tensor:
    """Later blocks are skipped, and the own block is read token by token."""
    own = torch.eye(*levels.shape[-2:], dtype=torch.bool, device=levels.device)
    return levels.tril().masked_fill(own, 1)


def similar_levels(key: Tensor, key_block: int, thresholds: Mapping[int, float]) -> Tensor:
    """The coarsest level at which each block of keys may be read: the largest whose first and last tokens are alike.

    Args:
        key: (B, kv_heads, M, D).
        key_block: tokens of a block.
        thresholds: level -> which mean cosine of the first and the last token of its groups must be exceeded;
            official code takes {2: 0.7, 4: 0.65, 8: 0.6}.

    Returns: (B, kv_heads, M) integers of at least 1; `levels.minimum(similar.unsqueeze(-2))` leaves skipped blocks
        skipped.

    >>> similar_levels(torch.tensor([1.0, 1.0, 1.0, -1.0]).reshape(1, 1, 4, 1), 2, {2: 0.7})
    tensor([[[2, 1]]])
    """
    check_attention(key, key, key, axes=1)
    tokens, blocks = key.shape[2], -(-key.shape[2] // key_block)
    largest = torch.ones(*key.shape[:2], blocks, dtype=torch.long, device=key.device)
    for level, threshold in thresholds.items():
        _check_divides(key_block, level)
        first = torch.arange(0, tokens, level, device=key.device)
        cosine = F.cosine_similarity(key[:, :, first], key[:, :, (first + level - 1).clamp(max=tokens - 1)], dim=-1)
        groups = key_block // level
        cosine = F.pad(cosine, (0, -cosine.shape[-1] % groups)).unflatten(-1, (-1, groups)).sum(-1)
        number = F.pad(torch.ones_like(first), (0, -len(first) % groups)).view(-1, groups).sum(-1)
        largest = largest.maximum((cosine / number > threshold) * level)
    return largest


def pyramid_density(levels: Tensor) -> Tensor:
    """Share of the products of dense attention that is left: the mean of 1 / level, 0 where a block is skipped.

    >>> pyramid_density(torch.tensor([1, 8, 0, 2]))
    tensor(0.4062)
    """
    return torch.where(levels > 0, 1 / levels.clamp(min=1), 0.0).mean()


@overload
def pyramid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    query_block: int,
    key_block: int,
    *,
    sizes: Sequence[int] | None = ...,
    causal: bool = ...,
    replicate: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    impl: str = ...,
) -> Tensor: ...


@overload
def pyramid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    query_block: int,
    key_block: int,
    *,
    sizes: Sequence[int] | None = ...,
    causal: bool = ...,
    replicate: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    impl: str = ...,
) -> AttentionResult: ...


def pyramid_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    query_block: int,
    key_block: int,
    *,
    sizes: Sequence[int] | None = None,
    causal: bool = False,
    replicate: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | AttentionResult:
    """Softmax attention of each block of queries over blocks of keys at their levels.

    At level l a block stands as the means of its groups of l neighbouring keys and values, and the logit of a mean has
    log(l) added, so that it weighs as much as l equal keys. One softmax runs over all that a query sees.

    Args:
        query: (B, heads, N, D).
        key: (B, kv_heads, M, D); kv_heads divides heads.
        value: (B, kv_heads, M, E).
        levels: (B, heads | 1, T, M') integers from `pyramid_levels`; 0 skips a block.
        query_block, key_block: tokens of a block; the last may have fewer.
        sizes: the levels that may occur; each divides key_block. None: those of 1, 2, 4 and 8 that do.
        causal: later blocks are skipped, and the own block is read at level 1 under a causal mask, whatever `levels`
            says; blocks of queries and keys are the same.
        replicate: repeat the last token until its block is full, as official code does: the copies are seen at levels
            above 1. By default a group at the end has fewer tokens and weighs less.
        scale: factor of q.k, D^-0.5 by default.
        return_lse: also return the log-sum-exp of what a query sees, (B, heads, N).
        impl: "reference" is the equation, one softmax over the keys of all levels; "tiled" gathers the blocks of each
            level and merges levels through the log-sum-exp; "auto" is "tiled".

    Returns: (B, heads, N, E) in the dtype of the inputs, or AttentionResult. A query that sees nothing gets 0.

    >>> x = torch.arange(4.0).reshape(1, 1, 4, 1)
    >>> levels = torch.tensor([[[[1, 2]]]])
    >>> pyramid_attention(torch.zeros(1, 1, 1, 1), x, x, levels, 1, 2).item()  # 0, 1 and twice the mean of 2 and 3
    1.5
    """
    check_choice("impl", impl, ("auto", "reference", "tiled"))
    sizes = _sizes(sizes, key_block)
    levels = _check(query, key, value, levels, query_block, key_block, sizes, causal)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    parts = (_reference if impl == "reference" else _tiled)(
        query, key, value, levels, (query_block, key_block), sizes, causal, replicate, scale
    )
    return parts if return_lse else parts.out


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    blocks: tuple[int, int],
    sizes: Sequence[int],
    causal: bool,
    replicate: bool,
    scale: float,
) -> AttentionResult:
    """Keys of all levels side by side, under a mask, with the log of what each stands for added."""
    rows = levels.repeat_interleave(blocks[0], 2)[:, :, : query.shape[2]]
    place = torch.arange(query.shape[2], device=query.device).unsqueeze(-1)
    keys, values, added = [], [], []
    for size in sizes:
        pooled, count = _pool(key, size, blocks[1], replicate)
        keys.append(pooled)
        values.append(_pool(value, size, blocks[1], replicate)[0])
        seen = (rows == size).repeat_interleave(blocks[1] // size, 3)[..., : len(count)]
        if causal:  # the last token of a group counts
            seen = seen & (place >= (torch.arange(len(count), device=key.device) + 1) * size - 1)
        added.append(torch.where(seen, count.log(), -torch.inf))
    return attend(query, torch.cat(keys, 2), torch.cat(values, 2), torch.cat(added, -1), scale)


def _tiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    blocks: tuple[int, int],
    sizes: Sequence[int],
    causal: bool,
    replicate: bool,
    scale: float,
) -> AttentionResult:
    """Each level is a selection of blocks of its own keys; above level 1 all that causal queries see is past."""
    parts: list[AttentionResult] = []
    for size in sizes:
        chosen = levels == size
        last = size == sizes[-1] and not parts  # which says that nothing is seen
        if not torch.compiler.is_compiling() and not last and not chosen.any():  # a graph cannot look at values
            continue
        pooled, count = _pool(key, size, blocks[1], replicate)
        means, _ = _pool(value, size, blocks[1], replicate)
        asked = query
        if key.shape[2] % size and not replicate:  # a channel more brings each key a logarithm of its own
            asked = F.pad(query, (0, 1), value=1 / scale)
            extra = (count / size).log().to(key.dtype).expand(pooled.shape[:3])
            pooled = torch.cat([pooled, extra.unsqueeze(-1)], -1)
        pattern: Pattern = select_mask(
            chosen, query_block=blocks[0], key_block=blocks[1] // size, key_size=(len(count),), ragged=True
        )
        if causal and size == 1:
            pattern = pattern & Causal()
        out, lse = sparse_attention(asked, pooled, means, pattern, scale=scale, return_lse=True)
        parts.append(AttentionResult(out, lse + log(size)))
    return merge_attention(parts)


def _pool(x: Tensor, size: int, block: int, replicate: bool) -> tuple[Tensor, Tensor]:
    """Means of groups of `size` tokens, (B, heads, groups, D), and how many tokens each is of, (groups,)."""
    if replicate and x.shape[2] % block and size > 1:
        x = torch.cat([x, x[:, :, -1:].expand(-1, -1, -x.shape[2] % block, -1)], 2)
    first = size * torch.arange(-(-x.shape[2] // size), device=x.device)
    count = (x.shape[2] - first).clamp(max=size).to(torch.promote_types(x.dtype, torch.float32))
    total = F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size)).sum(3)
    return (total / count.unsqueeze(-1)).to(x.dtype), count


def pyramid_attention_weights(
    query: Tensor,
    key: Tensor,
    levels: Tensor,
    query_block: int,
    key_block: int,
    *,
    sizes: Sequence[int] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Form the weights with which `pyramid_attention` averages the values of single tokens, (B, heads, N, M): the
    tokens of a group share its weight."""
    sizes = _sizes(sizes, key_block)
    levels = _check(query, key, key, levels, query_block, key_block, sizes, causal)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    pairs = levels.repeat_interleave(query_block, 2)[:, :, : query.shape[2]]
    pairs = pairs.repeat_interleave(key_block, 3)[..., : key.shape[2]].expand(-1, query.shape[1], -1, -1)
    if causal:
        pairs = pairs.tril()
    logits = query.new_full(pairs.shape, -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32))
    for size in sizes:
        means = _pool(key, size, key_block, False)[0].repeat_interleave(size, 2)[:, :, : key.shape[2]]
        logits = torch.where(pairs == size, (query * scale).to(logits.dtype) @ means.to(logits.dtype).mT, logits)
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


def _sizes(sizes: Sequence[int] | None, key_block: int) -> Sequence[int]:
    check_positive(key_block=key_block)
    return tuple(size for size in LEVELS if key_block % size == 0) if sizes is None else sizes


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    query_block: int,
    key_block: int,
    sizes: Sequence[int],
    causal: bool,
) -> Tensor:
    """The levels, with what `causal` asks of them."""
    check_attention(query, key, value, axes=1)
    check_positive(query_block=query_block, key_block=key_block, sizes=tuple(sizes))
    for size in sizes:
        _check_divides(key_block, size)
    expected = (-(-query.shape[2] // query_block), -(-key.shape[2] // key_block))
    if (
        levels.ndim != 4
        or levels.is_floating_point()
        or levels.shape[2:] != expected
        or (levels.shape[0] != query.shape[0] or levels.shape[1] not in (1, query.shape[1]))
    ):
        raise InputError(
            f"levels is {levels.dtype} {tuple(levels.shape)}: give whole numbers ({query.shape[0]}, "
            f"{query.shape[1]} or 1, {expected[0]}, {expected[1]}), one for each pair of blocks"
        )
    if not torch.compiler.is_compiling():  # a graph cannot look at values
        unknown = set(levels.unique().tolist()) - {0, *sizes}
        if unknown:
            raise InputError(f"levels has {sorted(unknown)} and sizes is {tuple(sizes)}: name all levels in sizes")
    if not causal:
        return levels
    if 1 not in sizes:
        raise InputError(f"causal is True and sizes is {tuple(sizes)}: the own block is read at level 1. Add it")
    if query_block != key_block or query.shape[2] != key.shape[2]:
        raise InputError(
            f"causal is True with {query.shape[2]} queries in blocks of {query_block} and {key.shape[2]} keys in "
            f"blocks of {key_block}: give one sequence, cut alike"
        )
    return _causal_levels(levels)


def _check_divides(key_block: int, level: int) -> None:
    if level < 1 or key_block % level:
        raise InputError(f"key_block is {key_block} and a level is {level}: a level is a divisor of the block")
