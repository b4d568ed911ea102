"""A small transformer of sequences that claims about generation share: any pattern, positions as given, a cache."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.mixers import PatternAttention
from saccade.ops import Pattern, softmax_attention

__all__ = ["Cache", "SequenceNet"]

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values, (B, heads, tokens, D), of every layer."""


class _GivenAttention(PatternAttention):
    shown: Pattern

    def pattern(self, space: tuple[int, ...]) -> Pattern:
        return self.shown


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = _GivenAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, pattern: Pattern) -> Tensor:
        self.attention.shown = pattern
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out

    def step(self, x: Tensor, cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """New tokens that see one another and all in the cache; with the cache that they make."""
        query, key, value = self.attention._project(self.norm1(x))
        if cache is not None:
            key, value = torch.cat([cache[0], key], 2), torch.cat([cache[1], value], 2)
        x = x + self.attention._finish(softmax_attention(query, key, value))
        return x + self.mlp(self.norm2(x)), (key, value)


class SequenceNet(nn.Module):
    """Token and learned position embeddings, pre-norm blocks, logits.

    Args:
        vocabulary: numbers of tokens.
        length: positions.
        dim, depth, num_heads: of the blocks.
    """

    def __init__(self, vocabulary: int, length: int, *, dim: int = 32, depth: int = 2, num_heads: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.position = nn.Embedding(length, dim)
        self.blocks = [_Block(dim, num_heads) for _ in range(depth)]
        self.layers = nn.ModuleList(self.blocks)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, tokens: Tensor, pattern: Pattern, places: Tensor | None = None) -> Tensor:
        """Logits (B, N, V) of tokens (B, N), at positions 0 .. N - 1 or `places` (N,)."""
        places = torch.arange(tokens.shape[1]) if places is None else places
        x = self.embed(tokens) + self.position(places)
        for block in self.blocks:
            x = block(x, pattern)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def step(self, tokens: Tensor, places: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Logits of new tokens (B, n), which see one another and all before them; the old cache stays as it is."""
        x, made = self.embed(tokens) + self.position(places), []
        for number, block in enumerate(self.blocks):
            x, grown = block.step(x, None if cache is None else cache[number])
            made.append(grown)
        return self.head(self.norm(x)), made

    def decode(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits (B, N, V) of tokens that come in blocks of these lengths, each seen once."""
        cache, logits = None, []
        for places in torch.arange(tokens.shape[1]).split(list(lengths)):
            found, cache = self.step(tokens[:, places], places, cache)
            logits.append(found)
        return torch.cat(logits, 1)
