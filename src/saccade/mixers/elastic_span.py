"""Softmax attention whose heads have spans of their own, which grow with the map (MoA, 2024, arXiv:2406.14909)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saccade import taps
from saccade.errors import InputError
from saccade.mixers.attention import PatternAttention
from saccade.ops import ElasticSpan, Pattern, PerHead, sparse_attention_weights

__all__ = ["ElasticSpanAttention"]


class ElasticSpanAttention(PatternAttention):
    """Softmax attention in which each head sees a span of its own, which grows with the map (MoA, 2024,
    arXiv:2406.14909).

    To choose the spans of a trained model, run it with spans that cover everything under
    `saccade.tap(model, kinds=("attention",), detach=False)`: while it is watched the output is made from the attention
    map that the tap gets, so that the loss has a gradient by it, which `saccade.ops.attention_influence` takes.

    Args:
        rules: a rule for each head, or one for all (`saccade.ops.ElasticSpan`). None spreads spans of 0 + beta n
            evenly over the heads, with betas of mean 1/2, in blocks of one token.
        sinks: tokens at the start of the map that all queries see, 0 for none; None takes a block of the rule.
        causal: see no later token, in row-major order.
        options: as for PatternAttention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        rules: ElasticSpan | Sequence[ElasticSpan] | None = None,
        sinks: int | None = None,
        causal: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        heads = self.num_heads
        if rules is None:
            rules = [ElasticSpan(0, (head + 0.5) / heads, 1) for head in range(heads)]
        self.rules = (rules,) * heads if isinstance(rules, ElasticSpan) else tuple(rules)
        if len(self.rules) != heads:
            raise InputError(f"rules has {len(self.rules)} entries and there are {heads} heads: give one for each")
        self.sinks = sinks
        self.causal = causal

    def pattern(self, space: tuple[int, ...]) -> Pattern:
        return PerHead(tuple(rule.with_sinks(self.sinks, causal=self.causal) for rule in self.rules))

    def mix(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not taps.watched(self, "attention"):
            return super().mix(x)
        query, key, value = self._project(x)
        space = tuple(x.shape[1:-1])
        weights = sparse_attention_weights(query, key, self.pattern(space), scale=self.scale)
        taps.record(self, "attention", lambda: weights)
        out = weights @ value.flatten(2, -2).to(weights.dtype)
        return self._finish(out.to(value.dtype).unflatten(2, space))
