"""Attention with a token for each head (DHVT, Lu et al., 2022, arXiv:2210.05958) as a mixer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.mixers.mixer import Mixer, choose_heads, merge_heads, split_heads
from saccade.ops import softmax_attention
from saccade.ops.softmax_attention import attention_weights

__all__ = ["HeadTokenAttention"]


class HeadTokenAttention(Mixer):
    """Softmax attention in which each head adds a token that sums its channels up over the map (DHVT, Lu et al., 2022,
    arXiv:2210.05958).

    Class tokens take part, and what the head tokens became is averaged into each of them. Its token matrix is that of
    the tokens alone: rows sum to less than 1, the rest is the head tokens'.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads, as many as head tokens; None takes one for each 32 channels.
        qkv_bias: give the projection to query, key and value a bias.
        scale: factor of q.k; None takes D^-0.5.
        proj_drop: dropout after the output projection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(dim)
        self.num_heads = heads = choose_heads(dim, num_heads)
        self.scale = (dim // heads) ** -0.5 if scale is None else scale
        self.ht_proj = nn.Linear(dim // heads, dim)
        self.ht_norm = nn.LayerNorm(dim // heads)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, heads, dim), std=0.02))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def head_tokens(self, tokens: Tensor) -> Tensor:
        """(B, N, C) to (B, heads, C): every head's channels, a mean over all tokens, as all heads' channels."""
        groups = tokens.mean(1).unflatten(-1, (self.num_heads, -1))  # (B, heads, D)
        slices = self.ht_norm(self.ht_proj(groups).unflatten(-1, (self.num_heads, -1)))
        return F.gelu(slices).flatten(2) + self.pos_embed

    def mix(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2)
        return self._attend(tokens, tokens.shape[1]).unflatten(1, x.shape[1:-1])

    def mix_with_prefix(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([prefix, x.flatten(1, -2)], 1)
        count, size = prefix.shape[1], tokens.shape[1]
        out = self._attend(tokens, size + self.num_heads)
        prefix = out[:, :count] + out[:, size:].mean(1, keepdim=True)
        return out[:, count:size].unflatten(1, x.shape[1:-1]), prefix

    def _attend(self, tokens: Tensor, queries: int) -> Tensor:
        """(B, N, C) to (B, queries, C): the first of tokens and head tokens, which see all of both."""
        size = tokens.shape[1]
        both = torch.cat([tokens, self.head_tokens(tokens)], 1)
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(both).chunk(3, -1))
        taps.record(self, "attention", lambda: attention_weights(query[:, :, :size], key, None, self.scale)[..., :size])
        out = softmax_attention(query[:, :, :queries], key, value, scale=self.scale)
        projected: Tensor = self.proj_drop(self.proj(merge_heads(out)))
        return projected
