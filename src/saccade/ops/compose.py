"""Patterns made of patterns: what both see (`&`), what one of them sees (`|`), what is hidden (`~`), one a head.

A composed pattern is as good as any other: it has a mask, tiles, a cost and a picture, and no N x N form of it is ever
needed. Queries that see far more than their neighbours (global tokens) have tiles of their own.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from operator import and_, or_

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from saccade.errors import InputError
from saccade.ops.pattern import (
    TILE_TOKENS,
    Pattern,
    Plan,
    Space,
    StaticPattern,
    Tiles,
    constant,
    plan_slots,
    token_distance,
)
from saccade.ops.selection import Selection, block_order, select_mask

__all__ = ["Complement", "ComposedPattern", "Intersection", "PerHead", "SelectionUnion", "Union"]

OUTLIER = 4  # times the median of a tile's keys: queries that see more are computed in tiles of their own
FULL = 0.8  # of the pairs of a group's first tile: tiles with fewer begin the next group
MOST_QUERIES = 1024  # in a tile, whose weights are held at once

Tile = tuple[NDArray[np.int64], NDArray[np.int64]]  # the queries, and the keys that any of them sees


class ComposedPattern(StaticPattern):
    """A static pattern that says what pairs it sees, and where to look for them; the tiles are found by looking."""

    @constant(keep=True)
    def key_space(self, space: Space) -> Space:
        if not space:
            raise InputError("space is (): a pattern needs at least one axis. Give (length,), (height, width) or three")
        return space

    @constant(keep=True)
    def sees_all(self, space: Space) -> bool:
        return self.num_visible(space) == prod(space) * prod(self.key_space(space))

    @constant(keep=True)
    def num_visible(self, space: Space) -> int:
        plan = self.plan(space)
        counts = torch.cat([(tiles.visible.sum(-1)).expand(tiles.query.shape).flatten() for tiles in plan.groups])
        return int((counts if plan.slot is None else counts[plan.slot]).sum())

    def build_plan(self, space: Space) -> Plan:
        found = [self._look(space, queries) for queries in _blocks(space)]
        usual = [(queries[~far], keys) for queries, keys, far in found if not far.all()]
        outliers = np.concatenate([queries[far] for queries, _, far in found])
        pieces = np.split(outliers, range(TILE_TOKENS, len(outliers), TILE_TOKENS)) if len(outliers) else []
        tiles = [*usual, *((piece, self._look(space, piece)[1]) for piece in pieces)]
        groups = tuple(self._stack(space, group) for group in _group(_join(tiles)))
        order = np.concatenate([group.query.flatten().numpy() for group in groups])
        return Plan(groups, plan_slots(order, prod(space)))

    def build_plan_offset(self, space: Space) -> tuple[Tensor, ...]:
        keys = self.key_space(space)
        return tuple(
            torch.from_numpy(token_distance(space, keys, tiles.query.numpy(), tiles.key.numpy()))
            for tiles in self.plan(space).groups
        )

    def _look(
        self, space: Space, queries: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Queries of a tile, the keys that the usual ones see, and which queries see far more."""
        candidates = self.reach(space, queries)
        seen = self.sees(space, torch.from_numpy(queries)[:, None], torch.from_numpy(candidates)).numpy()
        counts = seen.sum(1)
        far = counts > OUTLIER * max(np.median(counts), TILE_TOKENS)
        return queries, candidates[seen[~far].any(0)] if not far.all() else candidates, far

    def _stack(self, space: Space, tiles: Sequence[Tile]) -> Tiles:
        """Tiles as one group: queries repeat their last one, keys are filled up with ones that nobody sees."""
        width, length = (max(1, *(len(numbers) for numbers in side)) for side in zip(*tiles, ([], [])))
        query = torch.from_numpy(
            np.stack([np.pad(queries, (0, width - len(queries)), mode="edge") for queries, _ in tiles])
        )
        key = torch.from_numpy(np.stack([np.pad(keys, (0, length - len(keys))) for _, keys in tiles]))
        sizes = torch.from_numpy(np.array([len(keys) for _, keys in tiles]))[:, None, None]
        inside = torch.from_numpy(np.arange(length)) < sizes
        return Tiles(query, key, self.sees(space, query.unsqueeze(-1), key.unsqueeze(1)) & inside)


@dataclass(frozen=True)
class Union(ComposedPattern):
    """What at least one of several patterns sees.

    >>> from saccade.ops import Sinks, Window
    >>> (Window(2) | Sinks(1)).mask((4,)).int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 1], [1, 0, 1, 1]]
    """

    parts: tuple[StaticPattern, ...]

    def __str__(self) -> str:
        return " | ".join(f"({part})" if isinstance(part, Union | Intersection) else str(part) for part in self.parts)

    @constant(keep=True)
    def key_space(self, space: Space) -> Space:
        return _agree(self.parts, space)

    @constant(keep=True)
    def sees_all(self, space: Space) -> bool:
        return any(part.sees_all(space) for part in self.parts) or super().sees_all(space)

    def sees(self, space: Space, query: Tensor, key: Tensor) -> Tensor:
        return reduce(or_, (part.sees(space, query, key) for part in self.parts))

    def reach(self, space: Space, queries: NDArray[np.int64]) -> NDArray[np.int64]:
        return reduce(np.union1d, (part.reach(space, queries) for part in self.parts))


@dataclass(frozen=True)
class Intersection(ComposedPattern):
    """What all of several patterns see.

    >>> from saccade.ops import Causal, Window
    >>> (Window(2) & Causal()).mask((4,)).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """

    parts: tuple[StaticPattern, ...]

    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, Union | Intersection) else str(part) for part in self.parts)

    @constant(keep=True)
    def key_space(self, space: Space) -> Space:
        return _agree(self.parts, space)

    def sees(self, space: Space, query: Tensor, key: Tensor) -> Tensor:
        return reduce(and_, (part.sees(space, query, key) for part in self.parts))

    def reach(self, space: Space, queries: NDArray[np.int64]) -> NDArray[np.int64]:
        # what a complement reaches is nearly everything: the others say less, and `sees` does the rest
        parts = [part for part in self.parts if not isinstance(part, Complement)] or self.parts[:1]
        found = (part.reach(space, queries) for part in parts)
        return reduce(lambda a, b: np.intersect1d(a, b, assume_unique=True), found)


@dataclass(frozen=True)
class Complement(ComposedPattern):
    """What a pattern hides.

    >>> from saccade.ops import Window
    >>> (~Window(2)).mask((4,)).int().tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]
    """

    part: StaticPattern

    def __str__(self) -> str:
        return f"~({self.part})" if isinstance(self.part, Union | Intersection) else f"~{self.part}"

    @constant(keep=True)
    def key_space(self, space: Space) -> Space:
        return self.part.key_space(space)

    def sees(self, space: Space, query: Tensor, key: Tensor) -> Tensor:
        return ~self.part.sees(space, query, key)

    def reach(self, space: Space, queries: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.arange(prod(self.key_space(space)))


@dataclass(frozen=True)
class SelectionUnion(Pattern):
    """What a selection or a static pattern sees: the parts are computed one by one and merged exactly."""

    selection: Selection
    static: StaticPattern

    def __str__(self) -> str:
        return f"{self.selection} | {self.static}"

    def key_space(self, space: Space) -> Space:
        keys = self.selection.key_space(space)
        if self.static.key_space(space) != keys:
            raise InputError(f"{self.static} and a selection with keys on {keys} do not take the same keys")
        return keys

    def sees_all(self, space: Space) -> bool:
        return self.static.sees_all(space)

    def mask(self, space: Space) -> Tensor:
        chosen = self.selection.mask(space)
        return chosen | self.static.mask(space).to(chosen.device)

    def for_heads(self, heads: Sequence[int]) -> Pattern:
        return replace(self, selection=self.selection.for_heads(heads))

    def parts(self) -> tuple[StaticPattern, Selection]:
        """Two patterns that see no pair twice and all pairs together."""
        rest = intersect(self.selection, Complement(self.static))
        assert isinstance(rest, Selection)
        return self.static, rest


@dataclass(frozen=True)
class PerHead(Pattern):
    """A pattern for each head, computed in one call.

    Args:
        patterns: one for each head of the queries, all for the same keys; equal ones are computed together.

    >>> from saccade.ops import Global, Window
    >>> PerHead([Window(1), Global()]).mask((2,)).int().tolist()
    [[[1, 0], [0, 1]], [[1, 1], [1, 1]]]
    """

    patterns: tuple[Pattern, ...]

    def __str__(self) -> str:
        return f"PerHead({'; '.join(map(str, self.patterns))})"

    def __post_init__(self) -> None:
        object.__setattr__(self, "patterns", tuple(self.patterns))
        if not self.patterns:
            raise InputError("patterns is empty: give one for each head")
        if any(isinstance(each, PerHead) for each in self.patterns):
            raise InputError("patterns holds a PerHead: give one pattern of all keys for each head")

    def key_space(self, space: Space) -> Space:
        return _agree(self.patterns, space)

    def sees_all(self, space: Space) -> bool:
        return all(each.sees_all(space) for each in self.patterns)

    def mask(self, space: Space) -> Tensor:
        masks = [_of_head(each.mask(space), head) for head, each in enumerate(self.patterns)]
        device = next((mask.device for mask in masks if mask.ndim == 3), masks[0].device)  # a selection's
        images = max(mask.shape[0] if mask.ndim == 3 else 1 for mask in masks)
        if all(mask.ndim == 2 for mask in masks):
            return torch.stack(masks)
        return torch.stack([mask.to(device).expand(images, *mask.shape[-2:]) for mask in masks], 1)

    def for_heads(self, heads: Sequence[int]) -> Pattern:
        return PerHead(tuple(self.patterns[head] for head in heads))

    def by_pattern(self) -> list[tuple[Pattern, list[int]]]:
        """Each different pattern, as its heads see it, and the heads."""
        heads: dict[Pattern, list[int]] = {}
        for head, pattern in enumerate(self.patterns):
            heads.setdefault(pattern, []).append(head)
        return [(pattern.for_heads(mine), mine) for pattern, mine in heads.items()]


def intersect(*patterns: Pattern) -> Pattern:
    """What all patterns see; `a & b` calls it."""
    if any(isinstance(each, PerHead) for each in patterns):
        return PerHead(tuple(intersect(*each) for each in _heads(patterns)))
    selections, static = _sort(_flat(patterns, Intersection))
    if not selections:
        return Intersection(static)
    if any(isinstance(each, SelectionUnion) for each in selections):
        raise InputError("a union of a selection and a pattern cannot be cut further: intersect the two first")
    first, *others = selections
    for other in others:
        first = _combine(first, other, and_)
    static = (*((first.within,) if first.within else ()), *static)
    within = Intersection(static) if len(static) > 1 else static[0] if static else None
    return replace(first, within=within)


def unite(*patterns: Pattern) -> Pattern:
    """What one of the patterns sees at least; `a | b` calls it."""
    if any(isinstance(each, PerHead) for each in patterns):
        return PerHead(tuple(unite(*each) for each in _heads(patterns)))
    unfolded = [part for each in patterns for part in _unfold(each)]
    selections, static = _sort(_flat(unfolded, Union))
    if not selections:
        return Union(static)
    first, *others = selections
    for other in others:
        if first.within != other.within:
            raise InputError("selections that are cut by different patterns cannot be united. Cut their union instead")
        first = _combine(first, other, or_)
    return SelectionUnion(first, Union(static) if len(static) > 1 else static[0]) if static else first


def complement(pattern: Pattern) -> Pattern:
    """What a pattern hides; `~a` calls it."""
    if isinstance(pattern, Complement):
        return pattern.part
    if isinstance(pattern, PerHead):
        return PerHead(tuple(map(complement, pattern.patterns)))
    if isinstance(pattern, StaticPattern):
        return Complement(pattern)
    raise InputError(
        f"a {type(pattern).__name__} does not know how many blocks it hides. Invert its pairs: "
        "select_mask(~selection.pairs(space), ...)"
    )


def _unfold(pattern: Pattern) -> Iterable[Pattern]:
    return (pattern.selection, pattern.static) if isinstance(pattern, SelectionUnion) else (pattern,)


def _flat(patterns: Iterable[Pattern], kind: type[Union] | type[Intersection]) -> list[Pattern]:
    """The patterns, and in place of one of this kind its parts."""
    return [part for each in patterns for part in (each.parts if isinstance(each, kind) else (each,))]


def _sort(patterns: Iterable[Pattern]) -> tuple[list[Selection], tuple[StaticPattern, ...]]:
    patterns = list(patterns)
    static = tuple(each for each in patterns if isinstance(each, StaticPattern))
    return [each for each in patterns if not isinstance(each, StaticPattern)], static  # type: ignore[misc]


def _heads(patterns: Sequence[Pattern]) -> list[tuple[Pattern, ...]]:
    """For each head the patterns that meet on it."""
    counts = {len(each.patterns) for each in patterns if isinstance(each, PerHead)}
    if len(counts) > 1:
        raise InputError(f"patterns for {' and '.join(map(str, sorted(counts)))} heads meet: give one number of heads")
    (count,) = counts
    each_head = [
        each.patterns if isinstance(each, PerHead) else tuple(each.for_heads([head]) for head in range(count))
        for each in patterns
    ]
    return list(zip(*each_head))


def _combine(first: Selection, second: Selection, combine: Callable[[Tensor, Tensor], Tensor]) -> Selection:
    blocks = [(each.query_block, each.key_block, each.key_size) for each in (first, second)]
    if blocks[0] != blocks[1]:
        raise InputError(f"selections of blocks {blocks[0]} and {blocks[1]} meet: both need the same blocks")
    pairs = [each.listed_pairs() for each in (first, second)]
    count = max(each.shape[-1] for each in pairs)
    a, b = (F.pad(each, (0, count - each.shape[-1])) for each in pairs)  # a block that is not listed is not seen
    given = {"query_block": first.query_block, "key_block": first.key_block, "key_size": first.key_size}
    both = select_mask(combine(a, b), ragged=first.ragged or second.ragged, **given)  # type: ignore[arg-type]
    cuts = tuple(dict.fromkeys(each.within for each in (first, second) if each.within))
    return replace(both, within=Intersection(cuts) if len(cuts) > 1 else cuts[0] if cuts else None)


def _agree(parts: Sequence[Pattern], space: Space) -> Space:
    """The keys' axes on which all parts agree."""
    if not parts:
        raise InputError("parts is empty: compose at least one pattern")
    found = [part.key_space(space) for part in parts]
    if any(keys != found[0] for keys in found):
        takes = "; ".join(f"{part} takes keys on {keys}" for part, keys in zip(parts, found))
        raise InputError(f"patterns that are composed need the same keys: {takes}")
    return found[0]


def _of_head(mask: Tensor, head: int) -> Tensor:
    """(N, M), or (B, N, M) of a mask that differs for each image."""
    return mask[:, min(head, mask.shape[1] - 1)] if mask.ndim == 4 else mask


def _blocks(space: Space) -> list[NDArray[np.int64]]:
    """Numbers of the queries in blocks of about a tile's size."""
    side = round(TILE_TOKENS ** (1 / len(space)))
    order = block_order(space, side, torch.device("cpu")).numpy()
    return [tokens[tokens >= 0] for tokens in order]


def _join(tiles: Iterable[Tile]) -> list[Tile]:
    """Tiles that look at the same keys as one, so that these are gathered once: blocks and documents have many."""
    joined: dict[bytes, list[NDArray[np.int64]]] = {}
    keys_of = {}
    for queries, keys in tiles:
        name = keys.tobytes()
        keys_of[name] = keys
        joined.setdefault(name, []).append(queries)
    return [
        (queries, keys_of[name])
        for name, parts in joined.items()
        for queries in np.array_split(np.concatenate(parts), -(-sum(map(len, parts)) // MOST_QUERIES))
    ]


def _group(tiles: Iterable[Tile]) -> list[list[Tile]]:
    """Tiles of about as many keys and queries together, the largest first."""
    groups: list[list[Tile]] = []
    most = 0
    for tile in sorted(tiles, key=lambda tile: (-len(tile[0]), -len(tile[1]))):
        pairs = len(tile[0]) * len(tile[1])
        if not groups or pairs < FULL * most or len(tile[1]) > len(groups[-1][0][1]):
            groups.append([])
            most = pairs
        groups[-1].append(tile)
    return groups
