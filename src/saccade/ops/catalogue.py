"""Masks by name, as a benchmark of long sequences compares them (Long-Context Attention Benchmark, 2025,
arXiv:2510.17896, whose exact list is not public: these are its twelve static and two dynamic masks as they are usually
defined). Each is a composition of patterns."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch

from saccade.errors import InputError, check_choice
from saccade.ops.check import check_positive
from saccade.ops.pattern import Pattern
from saccade.ops.selection import num_blocks, select_mask, select_top_k
from saccade.ops.sequence import Causal, Documents, GlobalTokens, Sinks, SlidingWindow
from saccade.ops.window import Global

__all__ = ["MASKS", "MaskLayout", "build_mask"]


@dataclass(frozen=True)
class MaskLayout:
    """The sizes from which the masks of the catalogue are made; those that are None follow from the length.

    Attributes:
        length: tokens of the sequence.
        documents: their lengths, which add up to `length`; None takes four, of one, two, three and two eighths.
        window: tokens that a sliding window reaches to each side; None takes an eighth of the length.
        prefix: tokens of a prefix, and of the question of a document, as a share of it.
        num_global: tokens at the beginning that see all and are seen by all; None takes a 64th of the length.
        block_size: tokens of a block.
        kept: share of the key blocks that a block of queries keeps where blocks are chosen at run time.
        generator: of the random choice of blocks, on the CPU.
    """

    length: int
    documents: tuple[int, ...] | None = None
    window: int | None = None
    prefix: float = 0.25
    num_global: int | None = None
    block_size: int = 64
    kept: float = 0.25
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_positive(length=self.length, block_size=self.block_size)
        for name in ("prefix", "kept"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}: give a share above 0 and at most 1")

    @property
    def parts(self) -> tuple[int, ...]:
        """Lengths of the documents."""
        return _cut(self.length, (1, 2, 3, 2)) if self.documents is None else tuple(self.documents)

    @property
    def reach(self) -> int:
        """Tokens that a window reaches to each side."""
        return max(1, self.length // 8) if self.window is None else self.window

    @property
    def first(self) -> tuple[int, ...]:
        """The global tokens."""
        count = max(1, self.length // 64) if self.num_global is None else self.num_global
        return tuple(range(min(count, self.length)))

    def prefix_of(self, length: int) -> int:
        """Tokens of the prefix of a document, at least one."""
        return max(1, int(length * self.prefix))


def build_mask(name: str, length: int, **sizes: object) -> Pattern:
    """Build a mask of the catalogue for sequences of a length.

    Args:
        name: one of `MASKS`.
        length: tokens of the sequence.
        sizes: others of `MaskLayout`.

    Returns: a pattern for maps of so many tokens, in row-major order.
    Raises: InputError for an unknown name, or sizes that do not fit.

    >>> build_mask("causal_document", 3, documents=(1, 2)).mask((3,)).int().tolist()
    [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    """
    check_choice("mask", name, MASKS)
    return MASKS[name](MaskLayout(length, **sizes))  # type: ignore[arg-type]


def _share_question(layout: MaskLayout) -> Pattern:
    """Answers see the question of their document and themselves."""
    questions, segments = _prefixes(layout, rest=(1, 1, 1))
    return Causal() & Documents(layout.parts) & (Documents(segments) | GlobalTokens(questions))


def _causal_blockwise(layout: MaskLayout) -> Pattern:
    """Examples see themselves, and the last one, the test, sees all of them."""
    test = range(layout.length - layout.parts[-1], layout.length)
    return Causal() & (Documents(layout.parts) | GlobalTokens(tuple(test)))


def _prefix_document(layout: MaskLayout) -> Pattern:
    """Causal, but two-sided inside the prefix of each document."""
    tokens, segments = _prefixes(layout, rest=(1,))
    return Documents(layout.parts) & (Causal() | Documents(segments) & GlobalTokens(tokens))


def _uniform_block_sparse(layout: MaskLayout) -> Pattern:
    """Every block of queries sees as many blocks of keys, drawn at random."""
    block = layout.block_size
    count = num_blocks((layout.length,), block)
    scores = torch.rand(1, 1, count, count, generator=layout.generator)
    return select_top_k(scores, max(1, round(count * layout.kept)), query_block=block, key_block=block, ragged=True)


def _variable_block_sparse(layout: MaskLayout) -> Pattern:
    """Every block of queries sees blocks of keys of a number of its own, at least one, drawn at random."""
    block = layout.block_size
    count = num_blocks((layout.length,), block)
    scores = torch.rand(1, 1, count, count, generator=layout.generator)
    share = 2 * layout.kept * torch.rand(1, 1, count, 1, generator=layout.generator)
    chosen = (scores < share) | (scores == scores.amin(-1, keepdim=True))
    return select_mask(chosen, query_block=block, key_block=block, ragged=True)


MASKS: dict[str, Callable[[MaskLayout], Pattern]] = {
    "full": lambda layout: Global(),
    "causal": lambda layout: Causal(),
    "sliding_window": lambda layout: SlidingWindow(layout.reach, layout.reach),
    "causal_sliding_window": lambda layout: SlidingWindow(layout.reach),
    "document": lambda layout: Documents(layout.parts),
    "causal_document": lambda layout: Documents(layout.parts) & Causal(),
    "share_question": _share_question,
    "causal_blockwise": _causal_blockwise,
    "prefix": lambda layout: Causal() | Sinks(layout.prefix_of(layout.length)),
    "prefix_document": _prefix_document,
    "global_sliding_window": lambda layout: SlidingWindow(layout.reach, layout.reach) | GlobalTokens(layout.first),
    "block_causal_document": lambda layout: Documents(layout.parts) & Causal(layout.block_size),
    "uniform_block_sparse": _uniform_block_sparse,
    "variable_block_sparse": _variable_block_sparse,
}
"""Name -> what builds the pattern from a layout; the last two are made at run time."""


def _cut(length: int, shares: tuple[int, ...]) -> tuple[int, ...]:
    """A length in about these shares, without empty ones."""
    ends = [length * end // sum(shares) for end in accumulate(shares)]
    return tuple(end - start for start, end in zip([0, *ends], ends) if end > start)


def _prefixes(layout: MaskLayout, rest: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of all prefixes, and the lengths of all prefixes and shares of the rest of their documents."""
    tokens: list[int] = []
    segments: list[int] = []
    for end, length in zip(accumulate(layout.parts), layout.parts):
        prefix = layout.prefix_of(length)
        tokens += range(end - length, end - length + prefix)
        segments += [prefix, *_cut(length - prefix, rest)]
    return tuple(tokens), tuple(segments)
