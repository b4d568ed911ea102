"""Attention that is full or sparse as a router decides (Flux Attention, 2026, arXiv:2604.07394)."""

import torch
from torch import Tensor, nn

from saccade import taps
from saccade.gates import LayerRouter
from saccade.mixers.mixer import Mixer, choose_heads, merge_heads, split_heads
from saccade.ops import Causal, ElasticSpan, Global, Pattern, sparse_attention, sparse_attention_weights
from saccade.ops.check import check_positive

__all__ = ["RoutedAttention"]


class RoutedAttention(Mixer):
    """Softmax attention that a router makes full or sparse, for each sample and all heads (Flux Attention, 2026,
    arXiv:2604.07394).

    The sparse form sees the first tokens and the blocks around a query. In training both forms are computed and mixed
    by the decision, which is 0 or 1 and has a gradient; in evaluation each sample computes its own alone, and the
    router gets no gradient.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels.
        window: tokens on one side of a query, its own included, that the sparse form sees on each axis, in whole
            blocks; 1024 is published, for prompts.
        sinks: tokens at the start of the map that it sees too, in whole blocks; 128 is published.
        block_size: tokens of a block along each axis; 128 is published.
        causal: see no later token, in row-major order.
        pool_size, form, start: as for `saccade.gates.LayerRouter`, which looks at the queries, averaged over the heads.
        scale: factor of q.k; None takes D^-0.5.
        qkv_bias: give the projection to query, key and value a bias.
        impl: as in `saccade.ops.sparse_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        window: int = 4,
        sinks: int = 1,
        block_size: int = 1,
        causal: bool = False,
        pool_size: int | None = None,
        form: str = "softmax",
        start: float = 4.5,
        scale: float | None = None,
        qkv_bias: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        check_positive(window=window, block_size=block_size)
        self.num_heads = choose_heads(dim, num_heads)
        window, sinks = (-(-tokens // block_size) * block_size for tokens in (window, sinks))
        self.full: Pattern = Causal() if causal else Global()
        self.sparse = ElasticSpan(window, 0, block_size).with_sinks(sinks, causal=causal)
        self.scale = scale
        self.impl = impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.router = LayerRouter(dim // self.num_heads, pool_size=pool_size, form=form, start=start)
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1))
        gate = self.router(query.mean(1)).unsqueeze(1)  # (B, 1, ..., 1)
        taps.record(self, "attention", lambda: self._attention(query, key, gate))
        attend = self._mixed if self.training or torch.compiler.is_compiling() else self._apart
        projected: Tensor = self.proj(merge_heads(attend(query, key, value, gate)))
        return projected

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
        return sparse_attention(query, key, value, pattern, scale=self.scale, impl=self.impl)

    def _mixed(self, query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        """Both forms for all samples."""
        full, sparse = (self._attend(query, key, value, pattern) for pattern in (self.full, self.sparse))
        return gate * full + (1 - gate) * sparse

    def _apart(self, query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        """For each sample its own form alone."""
        full = gate.flatten() > 0.5
        if bool(full.all()):
            return self._attend(query, key, value, self.full)
        if not bool(full.any()):
            return self._attend(query, key, value, self.sparse)
        out = torch.empty_like(value)
        for pattern, samples in ((self.full, full), (self.sparse, ~full)):
            out[samples] = self._attend(query[samples], key[samples], value[samples], pattern)
        return out

    def _attention(self, query: Tensor, key: Tensor, gate: Tensor) -> Tensor:
        full, sparse = (
            sparse_attention_weights(query, key, pattern, scale=self.scale) for pattern in (self.full, self.sparse)
        )
        share = gate.view(-1, 1, 1, 1)
        return share * full + (1 - share) * sparse
