"""Patterns of sequences, which maps in row-major order are too: causal, sliding, documents, global tokens, sinks.

They are small, and meant to be composed: `(SlidingWindow(128) | Sinks(4)) & Causal() & Documents(lengths)`.
"""

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saccade.errors import InputError
from saccade.ops.check import check_positive, per_axis
from saccade.ops.compose import ComposedPattern
from saccade.ops.pattern import AxialPattern, Ranges, Space, constant

__all__ = ["Causal", "Documents", "GlobalTokens", "Sinks", "SlidingWindow"]


@dataclass(frozen=True)
class Causal(ComposedPattern):
    """No key behind the query's block, in row-major order; as many keys as queries, both counted from the first.

    Args:
        block_size: tokens of a block, which see one another both ways; 1 is ordinary causal attention.

    >>> Causal(2).mask((4,)).int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """

    block_size: int = 1

    def __post_init__(self) -> None:
        check_positive(block_size=self.block_size)

    def sees(self, space: Space, query: Tensor, key: Tensor) -> Tensor:
        return key // self.block_size <= query // self.block_size

    def reach(self, space: Space, queries: NDArray[np.int64]) -> NDArray[np.int64]:
        end = (int(queries.max()) // self.block_size + 1) * self.block_size
        return np.arange(min(end, prod(space)))


@dataclass(frozen=True)
class SlidingWindow(AxialPattern):
    """Every query sees the keys from `before` tokens before it to `after` tokens behind it, on each axis.

    The window is cut off at the borders of the map, where `Neighborhood` shifts it inwards.

    Args:
        before, after: tokens, one number or one for each axis.
        dilation: distance of neighbouring keys; before and after count keys.

    >>> SlidingWindow(1).mask((3,)).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    before: int | tuple[int, ...]
    after: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        check_positive(dilation=self.dilation)
        for name, value in (("before", self.before), ("after", self.after)):
            if not all(isinstance(v, int) and v >= 0 for v in (value if isinstance(value, tuple | list) else (value,))):
                raise InputError(f"{name} is {value}: give an integer of at least 0, or one for each axis")

    def ranges(self, axis: int, axes: int, length: int) -> Ranges:
        before, after, dilation = (
            per_axis(name, value, axes)[axis]
            for name, value in (("before", self.before), ("after", self.after), ("dilation", self.dilation))
        )
        place = np.arange(length)
        first = place % dilation + (place // dilation - before).clip(min=0) * dilation
        return Ranges(first, (place + after * dilation + 1).clip(max=length), dilation, length)


@dataclass(frozen=True)
class Documents(ComposedPattern):
    """Several documents in one sequence: a token sees those of its own.

    Args:
        lengths: tokens of the documents, which add up to those of the map, in row-major order.

    >>> Documents((1, 2)).mask((3,)).int().tolist()
    [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))
        check_positive(lengths=self.lengths)

    @constant(keep=True)
    def key_space(self, space: Space) -> Space:
        if sum(self.lengths) != prod(space):
            raise InputError(
                f"lengths add up to {sum(self.lengths)} tokens and the map {space} has {prod(space)}: "
                "give the length of every document"
            )
        return super().key_space(space)

    def sees(self, space: Space, query: Tensor, key: Tensor) -> Tensor:
        document = self._document(space, query.device)
        return document[query] == document[key]

    def reach(self, space: Space, queries: NDArray[np.int64]) -> NDArray[np.int64]:
        ends = np.cumsum(self.lengths)
        documents = np.unique(np.searchsorted(ends, queries, side="right"))
        return np.concatenate([np.arange(ends[each] - self.lengths[each], ends[each]) for each in documents])

    @constant(keep=True)
    def _document(self, space: Space, device: torch.device) -> Tensor:
        return torch.from_numpy(np.repeat(np.arange(len(self.lengths)), self.lengths)).to(device)


@dataclass(frozen=True)
class GlobalTokens(ComposedPattern):
    """Some tokens see all and are seen by all; the others see these alone.

    Args:
        tokens: their numbers, in row-major order.

    >>> GlobalTokens((1,)).mask((3,)).int().tolist()
    [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    """

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(sorted(set(self.tokens))))

    @constant(keep=True)
    def key_space(self, space: Space) -> Space:
        if not self.tokens or self.tokens[0] < 0 or self.tokens[-1] >= prod(space):
            raise InputError(f"tokens is {self.tokens}: give numbers of 0 to {prod(space) - 1}, at least one")
        return super().key_space(space)

    def sees(self, space: Space, query: Tensor, key: Tensor) -> Tensor:
        is_global = self._is_global(space, query.device)
        return is_global[query] | is_global[key]

    def reach(self, space: Space, queries: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.arange(prod(space)) if np.isin(queries, self.tokens).any() else np.array(self.tokens)

    @constant(keep=True)
    def _is_global(self, space: Space, device: torch.device) -> Tensor:
        return torch.from_numpy(np.isin(np.arange(prod(space)), self.tokens)).to(device)


@dataclass(frozen=True)
class Sinks(ComposedPattern):
    """The first tokens, in row-major order, are seen by all (attention sinks: StreamingLLM, 2023, arXiv:2309.17453).

    Args:
        count: tokens; all, where there are fewer.

    >>> Sinks(1).mask((2,)).int().tolist()
    [[1, 0], [1, 0]]
    """

    count: int

    def __post_init__(self) -> None:
        check_positive(count=self.count)

    def sees(self, space: Space, query: Tensor, key: Tensor) -> Tensor:
        return (key < self.count) & (query >= 0)

    def reach(self, space: Space, queries: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.arange(min(self.count, prod(space)))
