"""Patterns: which keys a query may see. A pattern is a small frozen object; `sparse_attention` computes with it.

A separable pattern says for each axis of space, in closed form, the range of keys that each query sees (`Ranges`); a
key is visible when it is visible on every axis. Everything else follows from the ranges: the dense mask, the tiles
that the engine computes, and the cost.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from operator import index
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saccade.errors import InputError

__all__ = ["AxialPattern", "Pattern", "Plan", "Ranges"]

Space = tuple[int, ...]
SMALLEST_BLOCK = 4  # queries an axis; blocks smaller than that are computed as if every query saw something else
TILE_TOKENS = 64  # queries in a tile: enough to fill a matrix product, few enough that little of the region is wasted


Method = TypeVar("Method", bound=Callable[..., Any])


def _constant(keep: bool) -> Callable[[Method], Method]:
    """Make a method of (space, *args) a constant to a compiler, which cannot trace the numpy in it; `keep` caches it.

    A compiler may hold a pattern that is not built yet: class and fields go in its place.
    """

    def decorate(method: Method) -> Method:
        @wraps(method)
        def answer(self: "Pattern", space: Space, *args: Any) -> Any:
            options = tuple(getattr(self, each.name) for each in fields(self))  # type: ignore[arg-type]
            return _answer(keep, method, type(self), _static(options), _static(space), args)[0]

        return cast(Method, answer)

    return decorate


class Ranges(NamedTuple):
    """What the queries of one axis see: query x sees keys start[x], start[x] + step, ... below stop[x].

    Attributes:
        start, stop: (N,) integers.
        step: distance of two neighbouring visible keys.
        keys: number of keys on the axis.
        origin: (N,) integers; the relative position of key y to query x is (y - origin[x]) / step, so that position
            tables count what is visible: a grid's or a dilated window's neighbours are 1 apart. None: origin[x] = x.
    """

    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    step: int
    keys: int
    origin: NDArray[np.int64] | None = None


class Plan(NamedTuple):
    """Tiles of queries, each with the region of keys that the engine gathers for it; rows are numbers of tokens.

    Attributes:
        query: (T, Q) queries of each tile; a tile that is not full repeats its last query.
        key: (T, K) keys of each tile's region.
        visible: (T, Q, K) which of them a query sees; T is 1 where all tiles agree.
        slot: (N,) where in the flattened tiles the result of each query stands; None: the tiles are in order.
    """

    query: Tensor
    key: Tensor
    visible: Tensor
    slot: Tensor | None


class Pattern(ABC):
    """Which keys each query may see. Subclasses are frozen dataclasses, so that equal patterns share their plans."""

    @abstractmethod
    def key_space(self, space: Space) -> Space:
        """The axes of the keys that belong to queries with axes `space`; raises InputError if it cannot serve them."""

    @abstractmethod
    def sees_all(self, space: Space) -> bool:
        """Whether every query sees every key, which makes it ordinary attention."""

    @abstractmethod
    def mask(self, space: Space) -> Tensor:
        """The truth: (N, M) booleans, True = may attend, tokens in row-major order."""

    @abstractmethod
    def offset(self, space: Space) -> Tensor:
        """(axes, N, M) relative position of every key to every query, with which position tables are read."""

    @abstractmethod
    def build_plan(self, space: Space) -> Plan:
        """The tiles in which the engine computes, on the CPU; `plan` caches them."""

    @abstractmethod
    def build_plan_offset(self, space: Space) -> Tensor:
        """(axes, T, Q, K), the offsets of the plan's tiles, on the CPU; T is 1 where all tiles agree."""

    @_constant(keep=True)
    def plan(self, space: Space, device: torch.device | str = "cpu") -> Plan:
        """The tiles in which the engine computes, cached by pattern, space and device."""
        query, key, visible, slot = self.build_plan(space)
        return Plan(query.to(device), key.to(device), visible.to(device), None if slot is None else slot.to(device))

    @_constant(keep=True)
    def plan_offset(self, space: Space, device: torch.device | str = "cpu") -> Tensor:
        """(axes, T, Q, K), the offsets of the plan's tiles, cached likewise."""
        return self.build_plan_offset(space).to(device)

    @_constant(keep=True)
    def plan_hidden(self, space: Space, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """(T, 1, Q, K), 0 where the plan's keys are visible and -inf elsewhere, cached likewise."""
        visible = self.plan(space, device).visible.unsqueeze(1)
        return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf)


class AxialPattern(Pattern):
    """A pattern that is separable over the axes: it needs to give the ranges of one axis, and gets all the rest."""

    @abstractmethod
    def ranges(self, axis: int, axes: int, length: int) -> Ranges:
        """What the `length` queries along axis number `axis` of `axes` see; InputError if it cannot serve them."""

    def all_ranges(self, space: Space) -> list[Ranges]:
        """The ranges of every axis."""
        if not space:
            raise InputError("space is (): a pattern needs at least one axis. Give (length,), (height, width) or three")
        return [self.ranges(axis, len(space), length) for axis, length in enumerate(space)]

    @_constant(keep=True)
    def key_space(self, space: Space) -> Space:
        return tuple(ranges.keys for ranges in self.all_ranges(space))

    @_constant(keep=True)
    def sees_all(self, space: Space) -> bool:
        return all((r.stop - r.start == r.keys).all() and r.step == 1 for r in self.all_ranges(space))

    @_constant(keep=False)
    def mask(self, space: Space) -> Tensor:
        mask = np.ones((1, 1), dtype=bool)
        for ranges in self.all_ranges(space):
            mask = _outer(mask, _visible(ranges, np.arange(len(ranges.start)), np.arange(ranges.keys)), np.logical_and)
        return torch.tensor(mask)

    @_constant(keep=False)
    def offset(self, space: Space) -> Tensor:
        per_axis = [_offset(r, np.arange(len(r.start)), np.arange(r.keys)) for r in self.all_ranges(space)]
        return torch.tensor(_spread(per_axis))

    def num_visible(self, space: Space) -> int:
        """Pairs of query and key that may attend; without forming the mask."""
        pairs = 1
        for ranges in self.all_ranges(space):
            pairs *= int((-(-(ranges.stop - ranges.start) // ranges.step)).sum())
        return pairs

    def build_plan(self, space: Space) -> Plan:
        all_ranges, tiled = self._tiles(space)
        key_space = [ranges.keys for ranges in all_ranges]
        query = _flatten([query for query, _ in tiled], list(space))
        key = _flatten([key for _, key in tiled], key_space).clip(max=int(np.prod(key_space)) - 1)
        visible = np.ones((1, 1, 1), dtype=bool)
        for ranges, (queries, keys) in zip(all_ranges, tiled):
            visible = _outer(visible, _visible(ranges, queries, keys), np.logical_and)
        order = query.reshape(-1)
        slot = None
        if len(order) != np.prod(space) or (order != np.arange(len(order))).any():
            slot = torch.tensor(np.unique(order, return_index=True)[1])  # the first of a repeated query
        return Plan(torch.tensor(query), torch.tensor(key), torch.tensor(_shared(visible, 0)), slot)

    def build_plan_offset(self, space: Space) -> Tensor:
        all_ranges, tiled = self._tiles(space)
        offset = _spread([_offset(r, queries, keys) for r, (queries, keys) in zip(all_ranges, tiled)])
        return torch.tensor(_shared(offset, 1))

    def _tiles(self, space: Space) -> tuple[list[Ranges], list[tuple[NDArray[np.int64], NDArray[np.int64]]]]:
        all_ranges = self.all_ranges(space)
        side = round(TILE_TOKENS ** (1 / len(space)))
        return all_ranges, [_tile_axis(ranges, side) for ranges in all_ranges]


def _visible(ranges: Ranges, query: NDArray[np.int64], key: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(..., Q, K) from query (..., Q) and key (..., K) numbers along one axis."""
    start, stop = ranges.start[query][..., None], ranges.stop[query][..., None]
    key = key[..., None, :]
    return (key >= start) & (key < stop) & ((key - start) % ranges.step == 0)


def _offset(ranges: Ranges, query: NDArray[np.int64], key: NDArray[np.int64]) -> NDArray[np.int64]:
    origin = query if ranges.origin is None else ranges.origin[query]
    return (key[..., None, :] - origin[..., None]) // ranges.step


def _overlap(start: NDArray[np.int64], stop: NDArray[np.int64]) -> bool:
    """Whether neighbouring blocks share keys; queries of one block do in any case."""
    return bool(((start[1:] > start[:-1]) & (start[1:] < stop[:-1])).any())


def _tile_axis(ranges: Ranges, side: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Queries (T, Q) and keys (T, K) along one axis: a block that sees alike is a tile; where a window slides, with
    hardly two neighbours that see alike, each residue's run is cut into even pieces of at most `side`."""
    residue = ranges.start % ranges.step
    order = np.lexsort((np.arange(len(residue)), ranges.start, residue))
    runs = np.split(order, np.flatnonzero(np.diff(residue[order])) + 1)
    blocks = [block for run in runs for block in np.split(run, np.flatnonzero(np.diff(ranges.start[run])) + 1)]
    overlap = any(_overlap(ranges.start[run], ranges.stop[run]) for run in runs)
    slides = overlap and len(order) < SMALLEST_BLOCK * len(blocks)
    tiles = [piece for run in runs for piece in np.array_split(run, -(-len(run) // side))] if slides else blocks
    width = max(map(len, tiles))
    query = np.stack([np.pad(tile, (0, width - len(tile)), mode="edge") for tile in tiles])
    first = ranges.start[query].min(1)
    num_keys = int((-(-(ranges.stop[query].max(1) - first) // ranges.step)).max())
    # a region at the border reaches inwards instead of past the last key, so that numbers stay valid
    over = first + (num_keys - 1) * ranges.step - (ranges.keys - 1)
    first = first - (-(-over.clip(min=0) // ranges.step)) * ranges.step  # ceil
    key = first[:, None] + ranges.step * np.arange(num_keys)
    return query, np.where(key < 0, ranges.keys, key)  # a run shorter than the region: numbers that nobody sees


def _flatten(per_axis: list[NDArray[np.int64]], lengths: list[int]) -> NDArray[np.int64]:
    """Numbers along each axis, (T_a, Q_a), to token numbers (T_1 T_2 ..., Q_1 Q_2 ...)."""
    total = np.zeros((1, 1), dtype=np.int64)
    for numbers, length in zip(per_axis, lengths):
        total = _outer(total * length, numbers, np.add)
    return total


def _outer(left: NDArray, right: NDArray, combine: np.ufunc) -> NDArray:
    """Combine every pair of entries on every axis: (a, b, ...) and (c, d, ...) give (a c, b d, ...)."""
    pairs = combine(
        left.reshape([n for length in left.shape for n in (length, 1)]),
        right.reshape([n for length in right.shape for n in (1, length)]),
    )
    return pairs.reshape([a * b for a, b in zip(left.shape, right.shape)])


def _spread(per_axis: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """(axes, ...) so that entry a has the values of axis a over all combinations of axes."""
    spread = []
    for axis, _ in enumerate(per_axis):
        total = np.zeros((1,) * per_axis[0].ndim, dtype=np.int64)
        for other, values in enumerate(per_axis):
            total = _outer(total, values if other == axis else np.zeros_like(values), np.add)
        spread.append(total)
    return np.stack(spread)


def _shared(per_tile: NDArray, axis: int) -> NDArray:
    """Keep one tile where all are equal."""
    first = per_tile.take([0], axis)
    return first if (per_tile == first).all() else per_tile


def _static(value: Any) -> Any:
    """Plain numbers: a compiler that traces with symbolic sizes specialises on them here."""
    if isinstance(value, (tuple, list)):
        return tuple(_static(each) for each in value)
    return index(value) if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) else value


_KEPT: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
_MOST_KEPT = 2048


@torch.compiler.assume_constant_result
def _answer(
    keep: bool, method: Callable[..., Any], kind: type[Pattern], options: Any, space: Space, args: Any
) -> tuple[Any]:
    """A tuple of one, since a compiler confuses bare tensors of two calls (torch 2.13)."""
    question = (method, kind, options, space, args)
    if question in _KEPT:
        _KEPT.move_to_end(question)
        return (_KEPT[question],)
    with torch.inference_mode(False):  # an inference tensor could not be saved for a later backward pass
        value = method(kind(*options), space, *args)
    if keep and _is_real(value):
        _KEPT[question] = value
        if len(_KEPT) > _MOST_KEPT:
            _KEPT.popitem(last=False)
    return (value,)


def _is_real(value: Any) -> bool:
    """Whether no part is the fake tensor of a trace."""
    if isinstance(value, tuple):
        return all(map(_is_real, value))
    return not isinstance(value, Tensor) or type(value) is Tensor
