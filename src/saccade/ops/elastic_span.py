"""Spans that grow with the length, a rule for each head, and what each rule loses (mixture of attention spans, MoA,
2024, arXiv:2406.14909). `assign_spans` chooses one rule for each head."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import InputError
from saccade.ops.check import check_positive
from saccade.ops.pattern import AxialPattern, Pattern, Ranges
from saccade.ops.sequence import Causal, GlobalTokens, Sinks

__all__ = ["ElasticSpan", "attention_influence", "span_candidates", "span_densities", "span_losses", "sum_blocks"]

GRID = 1024  # tokens between the published candidates for alpha
SLOPES = tuple(step / 8 for step in range(9))  # the published candidates for beta


@dataclass(frozen=True)
class ElasticSpan(AxialPattern):
    """A query sees the blocks around its own: as many as a span of alpha + beta * length tokens on an axis holds.

    The span counts one side, the own block included; the other side is as long. `with_sinks` makes of it the pattern
    of a language model's head.

    Args:
        alpha: tokens of the span of an empty axis; below 0 it needs a longer axis to begin to grow.
        beta: tokens by which the span grows for each token of the axis.
        block_size: tokens of a block; alpha is rounded down to whole blocks, and so is the sum. At least the own block
            is seen. The last block may be smaller.

    >>> ElasticSpan(0, 0.5, 1).mask((4,)).int().tolist()  # two blocks, the own one included
    [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    """

    alpha: float
    beta: float
    block_size: int = 64

    def __post_init__(self) -> None:
        check_positive(block_size=self.block_size)
        if self.beta < 0:
            raise InputError(f"beta is {self.beta}: a span does not shrink as the map grows. Give 0 or more")

    def tokens(self, length: int) -> float:
        """The span by its rule, which may exceed the axis or be below 0."""
        return self.alpha + self.beta * length

    def blocks(self, length: int) -> int:
        """Blocks that a query sees on one side, its own included, on an axis of so many tokens."""
        total = -(-length // self.block_size)
        return min(total, max(1, int(self.alpha // self.block_size + self.beta * total)))

    def ranges(self, axis: int, axes: int, length: int) -> Ranges:
        block, span = np.arange(length) // self.block_size, self.blocks(length)
        start, stop = ((block + side) * self.block_size for side in (1 - span, span))
        return Ranges(start.clip(min=0), stop.clip(max=length), 1, length)

    def with_sinks(self, sinks: int | None = None, *, causal: bool = True) -> Pattern:
        """Add the first tokens, which all queries see, and hide what comes behind a query.

        Args:
            sinks: tokens, 0 for none; None takes a block.
            causal: see no later token, in row-major order.
        """
        count = self.block_size if sinks is None else sinks
        pattern = self | Sinks(count) if count else self
        return pattern & Causal() if causal else pattern

    def layout(self, length: int) -> Tensor:
        """Blocks that meet, (n, n) booleans: the span, and the first block, which sees all and is seen by all."""
        total = -(-length // self.block_size)
        return (ElasticSpan(self.alpha // self.block_size, self.beta, 1) | GlobalTokens((0,))).mask((total,))


def span_candidates(
    shortest: int,
    profiled: int,
    longest: int,
    *,
    alphas: Sequence[float] | None = None,
    betas: Sequence[float] = SLOPES,
    block_size: int = 64,
) -> list[ElasticSpan]:
    """List the rules among which heads choose: those that fit their lengths, by their span at the longest.

    Args:
        shortest: tokens at which a span must be above 0.
        profiled, longest: tokens at which a span must not exceed the length: of what is profiled at most, and of what
            will be served.
        alphas: candidates; None takes every 1024th number from -shortest to `profiled`.
        betas: candidates.
        block_size: of the rules.

    >>> [(rule.alpha, rule.beta) for rule in span_candidates(32, 64, 256, alphas=[-16, 0], betas=[0, 0.5, 1])]
    [(0, 0.5), (-16, 1), (0, 1)]
    """
    check_positive(shortest=shortest, profiled=profiled, longest=longest)
    if alphas is None:
        alphas = np.linspace(-shortest, profiled, (profiled + shortest) // GRID + 1).tolist()
    rules = [ElasticSpan(alpha, beta, block_size) for alpha, beta in product(alphas, betas)]
    fitting = [
        rule
        for rule in rules
        if all(rule.tokens(length) <= length for length in (profiled, longest)) and rule.tokens(shortest) > 0
    ]
    if not fitting:
        raise InputError(
            f"no rule of {len(rules)} has a span above 0 at {shortest} tokens and within {profiled} and {longest} "
            "tokens: give other alphas or betas"
        )
    return sorted(fitting, key=lambda rule: rule.tokens(longest))


def attention_influence(attention: Tensor, grad: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Estimate for each entry of an attention map by how much the loss rises if it is masked and its row renormalised.

    E = A (sum_n A_n G_n - G) / (1 - A), the change to first order: without entry j, A_n becomes A_n / (1 - A_j). For a
    loss that is linear in A it is exact. Where a query sees a single key nothing is left to renormalise: E = -G A.

    Args:
        attention: A (..., N, M), whose rows sum to 1.
        grad: G, the gradient of the loss by it.
        eps: added to 1 - A.

    Returns: E (..., N, M), signed: below 0, masking helps.

    >>> attention_influence(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))  # without the first, 0.5 is 0
    tensor([[-0.5000,  0.5000]])
    """
    if attention.shape != grad.shape:
        raise InputError(f"attention is {tuple(attention.shape)} and grad is {tuple(grad.shape)}: give one gradient")
    mean = (attention * grad).sum(-1, keepdim=True)
    influence = attention * (mean - grad) / (1 - attention + eps)
    alone = (attention > 0).sum(-1, keepdim=True) == 1
    return torch.where(alone, -grad * attention, influence)


def sum_blocks(influence: Tensor, block_size: int, *, absolute: bool = True) -> Tensor:
    """Sum an influence (B, ..., N, M) over blocks of queries and keys and average it over the samples B.

    Args:
        influence: from `attention_influence`.
        block_size: tokens of a block; the last may be smaller.
        absolute: take magnitudes before averaging. It changes plans: masking what helps then counts as a loss.

    Returns: (..., T, S).
    """
    check_positive(block_size=block_size)
    mean = (influence.abs() if absolute else influence).mean(0)
    over = [-length % block_size for length in mean.shape[-2:]]
    filled = F.pad(mean, (0, over[1], 0, over[0]))
    return filled.unflatten(-1, (-1, block_size)).unflatten(-3, (-1, block_size)).sum((-3, -1))


def span_losses(blocks: Tensor, rules: Sequence[ElasticSpan], length: int, *, causal: bool = True) -> Tensor:
    """Sum for each rule the influence of what it masks, blocks (..., n, n) to (..., rules).

    Args:
        blocks: from `sum_blocks`, with the rules' block size.
        rules: candidates.
        length: tokens of the profiled sequences.
        causal: only blocks up to the diagonal were visible.
    """
    layouts = torch.stack([rule.layout(length) for rule in rules]).to(blocks.device)
    if blocks.shape[-2:] != layouts.shape[-2:]:
        raise InputError(
            f"blocks is {tuple(blocks.shape)} and the rules cut {length} tokens into {layouts.shape[-1]} blocks: "
            "sum over blocks of the rules' size"
        )
    masked = (~layouts).tril() if causal else ~layouts
    return torch.einsum("...ij,rij->...r", blocks, masked.to(blocks.dtype))


def span_densities(rules: Sequence[ElasticSpan], length: int) -> Tensor:
    """The share of keys that a cache must hold for each rule, (rules,): blocks of the fullest row, over all blocks."""
    layouts = torch.stack([rule.layout(length) for rule in rules]).tril()
    return layouts.sum(-1).amax(-1) / layouts.shape[-1]
