"""Attention over a sequence that several processes share (context parallelism): each holds some of the tokens.

| `scheme` | what travels                                         | a process computes               | patterns |
|----------|------------------------------------------------------|----------------------------------|----------|
| `gather` | all keys and values to all, once                     | its own queries, all keys        | static   |
| `ring`   | keys and values from neighbour to neighbour, R - 1 x | its own queries, a share of keys | static   |
| `heads`  | queries, keys, values and outputs, once each         | all tokens, heads / R            | all      |

They are those which the Long-Context Attention Benchmark (2025, arXiv:2510.17896) compares: ring attention (Liu et al.,
2023, arXiv:2310.01889), whose parts merge through the log-sum-exp, and Ulysses (Jacobs et al., 2023, arXiv:2309.14509).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.ops.check import check_attention
from saccade.ops.compose import ComposedPattern
from saccade.ops.pattern import Pattern, Space, StaticPattern, constant
from saccade.ops.softmax_attention import merge_attention
from saccade.ops.sparse_attention import sparse_attention

__all__ = ["parallel_attention"]


def parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    places: Tensor | None = None,
    group: Any = None,
    scheme: str = "gather",
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention under a pattern of the whole sequence, whose tokens R processes share; forward and backward.

    It serves tokens as torch's `torch.distributed.tensor.experimental.context_parallel` shares them out: give it
    `torch.arange(N)` among its buffers, and `places` is that buffer inside the `with`.

    Args:
        query, key: (B, heads, N / R, D), this process's tokens.
        value: (B, heads, N / R, E).
        pattern: which of all N tokens see which.
        places: (N / R,) numbers of this process's tokens in the whole sequence; None: processes hold one stretch after
            the other.
        group: a process group or a one-dimensional DeviceMesh; None takes all processes.
        scheme: see the table above. "heads" needs a number of heads that R divides.
        scale, impl: as in `sparse_attention`.

    Returns: (B, heads, N / R, E), of this process's tokens.
    Raises: InputError for shapes or a pattern that the scheme does not serve.
    """
    check_attention(query, key, value, axes=1)
    check_choice("scheme", scheme, ("gather", "ring", "heads"))
    group = group.get_group() if hasattr(group, "get_group") else group
    if not dist.is_initialized():
        raise InputError("no processes share the sequence: start them with torchrun, and call init_process_group")
    share, ranks = query.shape[2], dist.get_world_size(group)
    if key.shape[2] != share or key.shape[1] != query.shape[1]:
        raise InputError(
            f"query is {tuple(query.shape)} and key is {tuple(key.shape)}: give as many keys and key heads as queries"
        )
    if places is None:
        places = dist.get_rank(group) * share + torch.arange(share, device=query.device)
    if places.shape != (share,):
        raise InputError(f"places is {tuple(places.shape)}: give ({share},), the number of each token of this process")
    everywhere = _all_gather(places, group)
    if scheme == "heads":
        with _attention_of_this_process():
            return _by_heads(query, key, value, pattern, torch.cat(everywhere), group, scale, impl)
    if not isinstance(pattern, StaticPattern):
        raise InputError(f"scheme is {scheme!r} and {type(pattern).__name__} is no static pattern: take scheme='heads'")
    rows = [_numbers(each) for each in everywhere]
    mine, space = rows[dist.get_rank(group)], (share * ranks,)
    with _attention_of_this_process():
        if scheme == "gather":
            keys, values = (torch.cat(_Gather.apply(x, group), 2) for x in (key, value))
            columns = tuple(number for row in rows for number in row)
            shown = PatternPart(pattern, space, mine, columns)
            return sparse_attention(query, keys, values, shown, scale=scale, impl=impl)
        parts = []
        travelling = torch.cat([key, value], -1)
        for step in range(ranks):
            if step:
                travelling = _PassOn.apply(travelling, group)
            columns = rows[(dist.get_rank(group) - step) % ranks]
            keys, values = travelling.split([key.shape[-1], value.shape[-1]], -1)
            shown = PatternPart(pattern, space, mine, columns)
            parts.append(sparse_attention(query, keys, values, shown, scale=scale, return_lse=True, impl=impl))
        return merge_attention(parts).out


@dataclass(frozen=True)
class PatternPart(ComposedPattern):
    """Some of the queries and keys of a pattern, in an order of their own."""

    pattern: StaticPattern
    whole: Space
    queries: tuple[int, ...]
    keys: tuple[int, ...]

    def key_space(self, space: Space) -> Space:
        return (len(self.keys),)

    def sees(self, space: Space, query: Tensor, key: Tensor) -> Tensor:
        rows, columns = self._numbers(space, query.device)
        return self.pattern.sees(self.whole, rows[query], columns[key])

    def reach(self, space: Space, queries: NDArray[np.int64]) -> NDArray[np.int64]:
        rows, columns = (numbers.numpy() for numbers in self._numbers(space, torch.device("cpu")))
        return np.flatnonzero(np.isin(columns, self.pattern.reach(self.whole, np.sort(rows[queries]))))

    @constant(keep=True)
    def _numbers(self, space: Space, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.queries, device=device), torch.tensor(self.keys, device=device)


def _by_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    places: Tensor,
    group: Any,
    scale: float | None,
    impl: str,
) -> Tensor:
    """Trade heads for tokens, attend to the whole sequence, and trade back."""
    ranks, rank, heads = dist.get_world_size(group), dist.get_rank(group), query.shape[1]
    if heads % ranks:
        raise InputError(f"query has {heads} heads and {ranks} processes share them: take scheme='gather' or 'ring'")
    own = heads // ranks
    order = places.argsort()
    query, key, value = (_to_heads(x, group)[:, :, order] for x in (query, key, value))  # (B, heads / R, N, D)
    shown = pattern.for_heads(range(rank * own, (rank + 1) * own))
    out = sparse_attention(query, key, value, shown, scale=scale, impl=impl)
    tokens = out[:, :, places].unflatten(2, (ranks, -1)).movedim(2, 0)  # (R, B, heads / R, N / R, E)
    back = _AllToAll.apply(tokens.contiguous(), group)
    return back.movedim(0, 1).flatten(1, 2)


def _to_heads(x: Tensor, group: Any) -> Tensor:
    """(B, heads, N / R, D) to (B, heads / R, N, D), tokens in the order of the processes."""
    ranks = dist.get_world_size(group)
    parts = x.unflatten(1, (ranks, -1)).movedim(1, 0).contiguous()  # (R, B, heads / R, N / R, D)
    return _AllToAll.apply(parts, group).movedim(0, 2).flatten(2, 3)


class _AllToAll(torch.autograd.Function):
    """Entry r of the first axis goes to process r, and comes from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grads[0].contiguous(), ctx.group), None


class _Gather(torch.autograd.Function):
    """What each process holds, to all of them; gradients are summed where the tensor came from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(_all_gather(x, group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = torch.stack(grads)
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None


class _PassOn(torch.autograd.Function):
    """To the next process, from the one before; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _shift(x, 1, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _shift(grads[0], -1, ctx.group), None


def _shift(x: Tensor, by: int, group: Any) -> Tensor:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    to, source = ((rank + step) % ranks for step in (by, -by))
    x, out = x.contiguous(), torch.empty_like(x)
    if group is not None:
        to, source = (dist.get_global_rank(group, each) for each in (to, source))
    calls = [dist.P2POp(dist.isend, x, to, group), dist.P2POp(dist.irecv, out, source, group)]
    for work in dist.batch_isend_irecv(calls):
        work.wait()
    return out


def _all_gather(x: Tensor, group: Any) -> list[Tensor]:
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, x.contiguous(), group=group)
    return found


def _numbers(places: Tensor) -> tuple[int, ...]:
    return tuple(int(place) for place in places.tolist())


@contextmanager
def _attention_of_this_process() -> Iterator[None]:
    """Torch's own attention: inside its context_parallel the name stands for one over all processes."""
    shown = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = shown
