"""Patterns of models that make a sequence block by block: every token of the next block at once (NBP, 2025,
arXiv:2502.07737), or by filling in hidden tokens (block diffusion; Efficient-DLM, 2025, arXiv:2512.14067)."""

from dataclasses import dataclass
from math import prod
from operator import index

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.ops.check import check_positive
from saccade.ops.compose import ComposedPattern, Union
from saccade.ops.pattern import Space, StaticPattern
from saccade.ops.sequence import Causal, Documents

__all__ = ["BlockDiffusion", "next_block_pattern"]


def next_block_pattern(length: int, block_size: int, *, prefix: int = 0, hybrid: bool = False) -> StaticPattern:
    """Causal between blocks and two-sided inside them, with a condition in front that all see.

    The condition is the first block, and sees itself alone. With one token a block and no condition this is `Causal()`.

    Args:
        length: tokens of the whole sequence, the condition included.
        block_size: tokens of a block, counted from the end of the condition; the last block may be smaller.
        prefix: tokens of the condition.
        hybrid: the first block is made token by token, and is causal inside.

    >>> next_block_pattern(5, 2, prefix=1).mask((5,)).int()[:3].tolist()
    [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    """
    check_positive(length=length, block_size=block_size)
    if prefix < 0:
        raise InputError(f"prefix is {prefix}: give the number of tokens in front, 0 or more")
    lengths, left = [], index(length)  # a compiler's symbolic size becomes a number here, not in each turn below
    sizes = [prefix, *[1] * (block_size if hybrid else 0)]
    while left:
        size = min(sizes.pop(0) if sizes else block_size, left)
        lengths += [size] if size else []
        left -= size
    return Union((Causal(), Documents(tuple(lengths))))


@dataclass(frozen=True)
class BlockDiffusion(ComposedPattern):
    """A noised sequence and, behind it, the clean one, so that all blocks learn in one pass.

    A noised token sees the noised tokens of its own block and the clean ones of all blocks before it: what it will see
    when the block is filled in. A clean token sees clean tokens up to the end of its own block.

    Args:
        block_size: tokens of a block; the last one of a half may be smaller.
        clean: "block" lets clean tokens see their block both ways, as the cache of a finished block does; "token" is
            causal.

    The map has as many tokens in each half, in row-major order: a sequence of 2 L tokens, or two sequences as the two
    rows of a map. Both halves have the same positions, which whatever reads positions must be told.

    >>> BlockDiffusion(1).mask((4,)).int().tolist()
    [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """

    block_size: int
    clean: str = "block"

    def __post_init__(self) -> None:
        check_positive(block_size=self.block_size)
        check_choice("clean", self.clean, ("block", "token"))

    def key_space(self, space: Space) -> Space:
        if prod(space) % 2:
            raise InputError(f"the map {space} has an odd number of tokens: give the noised ones, then as many clean")
        return super().key_space(space)

    def sees(self, space: Space, query: Tensor, key: Tensor) -> Tensor:
        half = prod(space) // 2
        step = 1 if self.clean == "token" else self.block_size
        query_block, key_block = query % half // self.block_size, key % half // self.block_size
        clean_query, clean_key = query >= half, key >= half
        own = ~clean_query & ~clean_key & (query_block == key_block)
        past = clean_key & ~clean_query & (key_block < query_block)
        return own | past | (clean_query & clean_key & (key % half // step <= query % half // step))

    def reach(self, space: Space, queries: NDArray[np.int64]) -> NDArray[np.int64]:
        half = prod(space) // 2
        noised = queries[queries < half] // self.block_size * self.block_size
        own = [np.arange(start, min(start + self.block_size, half)) for start in np.unique(noised)]
        end = (int((queries % half).max()) // self.block_size + 1) * self.block_size
        return np.concatenate([*own, half + np.arange(min(end, half))])
