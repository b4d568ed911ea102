"""Attention inside tiles: each tile of queries attends to the keys that are gathered for it.

On a CPU the tiles are walked in chunks that stay in its cache, and nothing gathered outlives its chunk: the backward
pass keeps queries, keys, values, outputs and log-sum-exps, gathers again, and forms the weights again from the
log-sum-exps (as FlashAttention does, Dao et al., 2022, arXiv:2205.14135). On other devices, and where a transform
traces or batches the operations, all tiles are computed at once and autograd sees each step.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.pattern import Region
from saccade.ops.position_bias import PositionBias
from saccade.ops.softmax_attention import AttentionResult, attend, fused

__all__ = ["attend_tiles", "is_traced", "join_tiles"]

CHUNK_BYTES = 2**22  # a thread, of a chunk's queries, keys, values and masks: in cache, and few enough chunks

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attend_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region: Region,
    bias: PositionBias | None,
    scale: float,
    need_lse: bool,
) -> AttentionResult:
    """Softmax attention of the queries of every tile over the keys of its region.

    Args:
        query, key, value: (B, heads, N, D), (B, kv_heads, M, D) and (B, kv_heads, M, E).
        region: the tiles, the same for all images and heads.

    Returns: AttentionResult of the tiles one after the other, (B, heads, T Q, E) and (B, heads, T Q).
    """
    batch = len(query)
    walked = _is_walked(query, key, value, region)
    if batch > 1 and (walked or region.kind is None):  # one image with the tiles of all
        region = _of_images(region, batch, query.shape[2], key.shape[2])
        query, key, value = (x.transpose(0, 1).flatten(1, 2).unsqueeze(0) for x in (query, key, value))
        result = attend_tiles(query, key, value, region, bias, scale, need_lse)
        out, lse = (x.squeeze(0).unflatten(1, (batch, -1)).transpose(0, 1) if x.ndim > 1 else x for x in result)
        return AttentionResult(out, lse)
    call = _Call(region, bias, scale, need_lse, query.shape[-1])
    if not walked:
        return _at_once(call, query, key, value)
    device = query.device.type
    if torch.is_autocast_enabled(device) and not need_lse and query.dtype != torch.float64:
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))  # as SDPA does
    width = max(key.shape[-1], value.shape[-1])  # the kernel takes one, and zeros change no product
    padded = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    out, lse = _Walk.apply(call, *padded, *(() if bias is None else bias.tensors()))
    return AttentionResult(out[..., : value.shape[-1]], lse)


def join_tiles(groups: Sequence[AttentionResult], slot: Tensor | None, need_lse: bool) -> AttentionResult:
    """Put results of tiles in the order of the queries: `slot` (N,) says where each stands; None: they are in order."""
    out, lse = groups[0]
    if len(groups) > 1:
        out = torch.cat([group.out.transpose(1, 2) for group in groups], 1).transpose(1, 2)
        lse = torch.cat([group.lse for group in groups], 2) if need_lse else lse
    if slot is None:
        return AttentionResult(out, lse)
    batch, heads, tokens, dim = out.shape
    numbers = (slot + tokens * torch.arange(batch, device=slot.device).unsqueeze(1)).flatten()
    out = _rows(out).index_select(0, numbers).view(batch, len(slot), heads, dim).transpose(1, 2)
    return AttentionResult(out, lse.index_select(2, slot) if need_lse else lse)


class _Call(NamedTuple):
    """What is to be computed, besides the tensors that have gradients."""

    region: Region
    bias: PositionBias | None
    scale: float
    need_lse: bool
    dim: int  # of the query, before it was padded


def is_traced() -> bool:
    """Whether a compiler, an exporter, `torch.func` or forward-mode differentiation looks at each operation."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _is_walked(query: Tensor, key: Tensor, value: Tensor, region: Region) -> bool:
    filled = all(x.numel() for x in (query, key, value, region.query, region.key))
    return query.device.type == "cpu" and filled and not is_traced()


def _at_once(call: _Call, query: Tensor, key: Tensor, value: Tensor) -> AttentionResult:
    """All tiles in one call, (T, B heads, Q, D): the images join the heads, since each tile may have its own mask."""
    region, bias, scale, need_lse, dim = call
    batch, heads = query.shape[:2]
    q, k, v = (
        _gather(_rows(x), _numbers(numbers, x.shape[2], range(batch)), x.shape[-1])
        for x, numbers in ((query, region.query), (key, region.key), (value, region.key))
    )
    every = slice(0, len(region.query))
    added = None if region.hidden is None else _of_kind(region.hidden, region.kind, every)
    if bias is not None and region.offset is not None:
        offset = _of_kind(region.offset.transpose(0, 1), region.kind, every).transpose(0, 1)
        term = _for_images(bias(q[..., :dim], offset), heads, batch)
        added = term if added is None else term + added
    if added is not None:
        added = added.to(torch.promote_types(query.dtype, torch.float32) if need_lse else query.dtype)
    if need_lse:
        out, lse = attend(q, k, v, added, scale)
        lse = lse.unflatten(1, (batch, heads)).permute(1, 2, 0, 3).flatten(2)
    else:
        out, lse = fused(q, k, v, added, scale), query.new_empty(0)
    return AttentionResult(out.unflatten(1, (batch, heads)).permute(1, 2, 0, 3, 4).flatten(2, 3), lse)


class _Walk(torch.autograd.Function):
    """Attention of one image in tiles, chunk by chunk; without `need_lse` the log-sum-exp that is returned is empty."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, query: Tensor, key: Tensor, value: Tensor, *tables: Tensor
    ) -> tuple[Tensor, Tensor]:
        walk = _Chunks(call, query, key, value, tables)
        (tiles, queries), (_, heads, _, dim) = call.region.query.shape, query.shape
        out = query.new_empty(tiles, queries, heads, dim)
        lse = query.new_empty(tiles, queries, heads, dtype=walk.wide)
        blind = lse.new_zeros(lse.shape, dtype=torch.bool) if call.need_lse else None
        keep = call.need_lse or any(ctx.needs_input_grad)
        with torch.autocast(query.device.type, enabled=False):
            for chunk in walk:
                for member, (q, k, v, added) in enumerate(chunk.members()):
                    o, sums = _flash(q, k, v, attn_mask=added, scale=call.scale)
                    chunk.of_member(out, member).copy_(o)
                    if keep:
                        chunk.of_member(lse, member).copy_(sums)
                    if blind is not None and added is not None:  # where nothing is visible the kernel's sum is 0
                        chunk.of_member(blind, member).copy_((added.amax(-1) == -torch.inf).expand(sums.shape))
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, *tables, out, lse)
        result = out.flatten(0, 1).transpose(0, 1).unsqueeze(0)
        if blind is None:
            return result, query.new_empty(0)
        return result, lse.masked_fill(blind, -torch.inf).flatten(0, 1).T.unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, out, lse = ctx.saved_tensors
        call, needed = ctx.call, ctx.needs_input_grad[1:]
        d_lse = d_lse if call.need_lse else None
        if d_out is None and d_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():  # somebody will differentiate this derivative
            return None, *_gradients_at_once(call, inputs, needed, d_out, d_lse)
        query, key, value, *tables = inputs
        walk = _Chunks(call, query, key, value, tables, needed)
        d_out = torch.zeros_like(out) if d_out is None else d_out[0].transpose(0, 1).reshape(out.shape).contiguous()
        d_lse = None if d_lse is None else d_lse.squeeze(0).T.reshape(lse.shape)
        with torch.autocast(out.device.type, enabled=False):
            for chunk in walk:
                found = []
                for member, (q, k, v, added) in enumerate(chunk.members()):
                    o, d_o, sums = (chunk.of_member(x, member) for x in (out, d_out, lse))
                    if d_lse is None and not walk.bias_learns:
                        grads = _flash_backward(d_o, q, k, v, o, sums, 0.0, False, attn_mask=added, scale=call.scale)
                    else:
                        d_sums = None if d_lse is None else chunk.of_member(d_lse, member)
                        grads = _equation_backward(q, k, v, added, call.scale, o, sums, d_o, d_sums)
                    found.append(grads)
                chunk.add(*zip(*found))
        return None, *walk.gradients()


def _equation_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    added: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to query, key, value and logits; the weights are formed again from the log-sum-exp."""
    query, key, value, out, d_out = (x.to(lse.dtype) for x in (query, key, value, out, d_out))
    query = query * scale
    weights = query @ key.mT
    weights = weights if added is None else weights.add_(added)
    weights = weights.sub_(lse.unsqueeze(-1)).exp_()
    mean = (d_out * out).sum(-1)
    mean = mean if d_lse is None else mean - d_lse
    d_logits = (d_out @ value.mT).sub_(mean.unsqueeze(-1)).mul_(weights)
    return (d_logits @ key).mul_(scale), d_logits.mT @ query, weights.mT @ d_out, d_logits


def _gradients_at_once(
    call: _Call, inputs: Sequence[Tensor], needed: Sequence[bool], d_out: Tensor | None, d_lse: Tensor | None
) -> list[Tensor | None]:
    """Gradients that can be differentiated again: those of the equation, as autograd writes them down."""
    query, key, value, *tables = inputs
    bias = None if call.bias is None else call.bias.like(tables)
    result = _at_once(call._replace(bias=bias, need_lse=True), query, key, value)
    outs, upstream = zip(*((x, d) for x, d in zip(result, (d_out, d_lse)) if d is not None))
    wanted = [x for x, need in zip(inputs, needed) if need]
    grads = iter(torch.autograd.grad(outs, wanted, upstream, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needed]


class _Chunks:
    """The chunks of a walk over tiles: what they share, and the gradients that they add up."""

    def __init__(
        self,
        call: _Call,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tables: Sequence[Tensor],
        needed: Sequence[bool] = (),
    ) -> None:
        self.region, self.dim, self.inputs = call.region, call.dim, (query, key, value)
        self.rows = [_rows(x) for x in self.inputs]
        self.group = query.shape[1] // key.shape[1]
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self.totals = [rows.new_zeros(rows.shape, dtype=self.wide) for rows in self.rows] if needed else []
        self.bias, self.tables = None, [x.detach() for x in tables]
        self.table_totals = [torch.zeros_like(x, dtype=self.wide) for x in self.tables]
        self.term, self.added = None, self.region.hidden
        self.bias_learns = False
        if call.bias is not None:
            self.bias_learns = any(needed[3:]) or (call.bias.reads_query and any(needed[:1]))
            for table in self.tables:
                table.requires_grad_(self.bias_learns)
            self.bias = call.bias.like(self.tables)
            if not self.bias.reads_query:  # a term for each kind of tile serves all chunks
                self.term = self.form_term(query.new_empty(0), None)
                self.term_total = torch.zeros_like(self.term)
                self.added = _plus(self.term.detach(), self.region.hidden)

    def __iter__(self) -> "Iterator[_Chunk]":
        (tiles, queries), keys = self.region.query.shape, self.region.key.shape[1]
        size = sum(rows.shape[1] * n * rows.element_size() for rows, n in zip(self.rows, (queries, keys, keys)))
        size += 0 if self.added is None or len(self.added) == 1 else self.added[0].nbytes
        pieces = min(tiles, -(-tiles * size // (CHUNK_BYTES * torch.get_num_threads())))
        return (_Chunk(self, slice(i * tiles // pieces, (i + 1) * tiles // pieces)) for i in range(pieces))

    def form_term(self, query: Tensor, tiles: slice | None) -> Tensor:
        """The bias of some tiles, or of each kind, (tiles, heads, Q, K)."""
        offset = self.region.offset
        assert self.bias is not None
        assert offset is not None
        if tiles is not None:
            offset = _of_kind(offset.transpose(0, 1), self.region.kind, tiles).transpose(0, 1)
        with torch.set_grad_enabled(self.bias_learns):
            return self.bias(query[..., : self.dim], offset).to(self.wide)

    def learn(self, term: Tensor, d_term: Tensor, *query: Tensor) -> Tensor | None:
        """Add up the gradients of the tables, and return that of the query."""
        grads = torch.autograd.grad(term, [*self.tables, *query], d_term, allow_unused=True)
        for total, grad in zip(self.table_totals, grads):
            if grad is not None:
                total += grad
        return grads[-1] if query else None

    def gradients(self) -> list[Tensor]:
        """Of query, key, value and tables."""
        if self.term is not None and self.bias_learns:
            self.learn(self.term, self.term_total)
        inputs = (
            total.view(x.shape[2], x.shape[1], -1).transpose(0, 1).unsqueeze(0).to(x.dtype)
            for total, x in zip(self.totals, self.inputs)
        )
        return [*inputs, *(total.to(x.dtype) for total, x in zip(self.table_totals, self.tables))]


class _Chunk:
    """Some tiles, (tiles, heads, Q, D); query heads that share a key head are its members, computed one by one."""

    def __init__(self, walk: _Chunks, tiles: slice) -> None:
        self.walk, self.tiles = walk, tiles
        queries, keys = walk.region.query[tiles], walk.region.key[tiles]
        self.numbers = (queries, keys, keys)

    def members(self) -> "Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]":
        """Query, key, value and what is added to the logits, of each member."""
        walk = self.walk
        query, key, value = (
            _gather(rows, numbers.unsqueeze(-1), x.shape[-1])
            for rows, numbers, x in zip(walk.rows, self.numbers, walk.inputs)
        )
        added = walk.added if walk.added is None else _of_kind(walk.added, walk.region.kind, self.tiles)
        if walk.bias is not None and walk.term is None:
            self.query = query.detach().requires_grad_(walk.bias_learns)
            self.term = walk.form_term(self.query, self.tiles)
            added = _plus(self.term.detach(), added)
        for member in range(walk.group):
            mine = slice(member, None, walk.group)
            yield query[:, mine], key, value, added if added is None or added.shape[1] == 1 else added[:, mine]

    def of_member(self, x: Tensor, member: int) -> Tensor:
        """(tiles, heads, Q, ...) of a member, from (T, Q, heads, ...)."""
        return x[self.tiles, :, member :: self.walk.group].transpose(1, 2)

    def add(self, d_query: Sequence[Tensor], d_key: Sequence[Tensor], d_value: Sequence[Tensor], *rest: Any) -> None:
        """Add the gradients of the members to those of all tokens and tables."""
        walk = self.walk
        from_query = _joined(d_query)
        if walk.bias_learns:
            (d_logits,) = rest
            term = self.term if walk.term is None else walk.term
            d_added = _joined(d_logits)
            d_term = d_added.sum_to_size(1 if len(term) == 1 else len(d_added), *term.shape[1:])
            if walk.term is None:
                d_more = walk.learn(term, d_term, self.query)
                from_query = from_query if d_more is None else from_query + d_more
            elif len(term) == 1:
                walk.term_total += d_term
            else:
                assert walk.region.kind is not None
                walk.term_total.index_add_(0, walk.region.kind[self.tiles], d_term)
        grads = (from_query, _added_up(d_key), _added_up(d_value))
        for total, numbers, grad in zip(walk.totals, self.numbers, grads):
            grad = grad.to(walk.wide).transpose(1, 2).reshape(numbers.numel(), -1)
            total.index_add_(0, numbers.flatten(), grad)


def _of_images(region: Region, images: int, queries: int, keys: int) -> Region:
    """The tiles of all images, whose tokens stand one after the other."""
    first = torch.arange(images, device=region.query.device).view(-1, 1, 1)
    query, key = ((n + first * length).flatten(0, 1) for n, length in ((region.query, queries), (region.key, keys)))
    kind = None if region.kind is None else region.kind.repeat(images)
    return Region(query, key, region.hidden, region.offset, kind)


def _rows(x: Tensor) -> Tensor:
    """(B, heads, N, D) to (B N, heads D), a row for each token: no copy for channels-last x."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


def _numbers(tokens: Tensor, per_image: int, images: range) -> Tensor:
    """(T, Q) tokens of an image to (T, Q, images) rows."""
    if images == range(1):
        return tokens.unsqueeze(-1)
    return tokens.unsqueeze(-1) + per_image * torch.arange(images.start, images.stop, device=tokens.device)


def _gather(rows: Tensor, numbers: Tensor, dim: int) -> Tensor:
    """(T, images heads, Q, D) from rows of (heads D)."""
    tiles, queries, images = numbers.shape
    found = rows.index_select(0, numbers.flatten())
    return found.view(tiles, queries, images * (rows.shape[1] // dim), dim).transpose(1, 2)


def _of_kind(each: Tensor, kind: Tensor | None, tiles: slice) -> Tensor:
    """Entries of some tiles from those of all kinds."""
    if len(each) == 1:
        return each
    return each[tiles] if kind is None else each.index_select(0, kind[tiles])


def _for_images(added: Tensor, heads: int, images: int) -> Tensor:
    """(T, heads, Q, K) to (T, images heads, Q, K), unless it serves all heads alike or has them all."""
    return added if images == 1 or added.shape[1] != heads or heads == 1 else added.repeat(1, images, 1, 1)


def _plus(term: Tensor, hidden: Tensor | None) -> Tensor:
    return term if hidden is None else term + hidden


def _added_up(members: Sequence[Tensor]) -> Tensor:
    return members[0] if len(members) == 1 else torch.stack(list(members)).sum(0)


def _joined(members: Sequence[Tensor]) -> Tensor:
    """Members, (tiles, heads, ...) each, next to each other as the heads of the queries are."""
    return members[0] if len(members) == 1 else torch.stack(list(members), 2).flatten(1, 2)
