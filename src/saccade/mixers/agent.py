"""Agent attention (Han et al., 2023, arXiv:2312.08874), with its position biases and depthwise convolution."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError
from saccade.mixers.mixer import Mixer, choose_heads, merge_heads, split_heads
from saccade.ops import agent_attention, agent_attention_weights

__all__ = ["AgentAttention"]

TABLE = 7  # side of the resized bias tables, whatever the map


class AgentAttention(Mixer):
    """Softmax attention through a few pooled agent tokens, linear in the map (Han et al., 2023, arXiv:2312.08874).

    Its token matrix is the product of the two softmax matrices, and leaves the depthwise convolution out.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels.
        num_agents: agent tokens, a perfect square.
        size: height and width of the map for which the row and column biases are learned; on another map they are
            resized bilinearly.
        num_prefix: class or register tokens that stand beside the map; they are no agents and skip the convolution.
        sr_ratio: keys and values are taken from a map reduced by this factor (a strided convolution and a norm), as
            in the pyramid transformer of the paper; size must then be divisible by it.
        qkv_bias: give the projections to query, key and value a bias.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        num_agents: int = 16,
        size: int | tuple[int, int] = 14,
        num_prefix: int = 0,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim)
        self.num_heads = heads = choose_heads(dim, num_heads)
        self.side = math.isqrt(num_agents)
        if self.side**2 != num_agents or num_agents < 1:
            raise InputError(f"num_agents is {num_agents}: agents are pooled to a square. Take 1, 4, 9, 16, 25, 49 ...")
        if sr_ratio > 1 and num_prefix:
            raise InputError(
                f"sr_ratio is {sr_ratio} and num_prefix is {num_prefix}: the reduced map has no prefix tokens"
            )
        self.num_prefix = num_prefix
        self.sr_ratio = sr_ratio
        if sr_ratio == 1:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        else:
            self.q = nn.Linear(dim, dim, bias=qkv_bias)
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        height, width = (size, size) if isinstance(size, int) else size
        reduced = height // sr_ratio, width // sr_ratio

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))

        self.an_bias = table(heads, num_agents, TABLE, TABLE)  # agents (a) to keys (n), and back
        self.na_bias = table(heads, num_agents, TABLE, TABLE)
        self.ah_bias = table(1, heads, num_agents, reduced[0], 1)  # rows (h) and columns (w)
        self.aw_bias = table(1, heads, num_agents, 1, reduced[1])
        self.ha_bias = table(1, heads, height, 1, num_agents)
        self.wa_bias = table(1, heads, 1, width, num_agents)
        if num_prefix:
            self.ac_bias = table(1, heads, num_agents, num_prefix)  # class token (c)
            self.ca_bias = table(1, heads, num_prefix, num_agents)

    def mix(self, x: Tensor) -> Tensor:
        return self._attend(x, None)[0]

    def mix_with_prefix(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        if prefix.shape[1] != self.num_prefix:
            raise InputError(f"prefix has {prefix.shape[1]} tokens: num_prefix is {self.num_prefix}")
        return self._attend(x, prefix)

    def _attend(self, x: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor]:
        if x.ndim != 4:
            raise InputError(f"x is {tuple(x.shape)}: agents are pooled from an image. Give (B, H, W, {self.dim})")
        if prefix is None and self.num_prefix:
            raise InputError(f"num_prefix is {self.num_prefix} and no prefix was given: pass mixer(x, prefix)")
        height, width = x.shape[1:-1]
        tokens = x.flatten(1, 2) if prefix is None else torch.cat([prefix, x.flatten(1, 2)], 1)
        query, key, value, key_size = self._project(tokens, height, width)
        q, k, v = (split_heads(part, self.num_heads) for part in (query, key, value))  # (B, heads, N, D)
        pooled = F.adaptive_avg_pool2d(_to_map(query[:, self.num_prefix :], (height, width)), self.side)
        agent = split_heads(pooled.flatten(2).mT, self.num_heads)  # pooled from unscaled queries
        agent_bias, query_bias = self._agent_bias(key_size), self._query_bias((height, width))
        taps.record(
            self,
            "attention",
            lambda: agent_attention_weights(q, k, agent, agent_bias=agent_bias, query_bias=query_bias),
        )
        out = merge_heads(agent_attention(q, k, v, agent, agent_bias=agent_bias, query_bias=query_bias))
        detail = _to_map(value[:, self.num_prefix :], key_size)
        if key_size != (height, width):
            detail = F.interpolate(detail, (height, width), mode="bilinear")
        detail = F.pad(self.dwc(detail).flatten(2).mT, (0, 0, self.num_prefix, 0))
        out = self.proj(out + detail)
        return out[:, self.num_prefix :].unflatten(1, (height, width)), out[:, : self.num_prefix]

    def _project(self, tokens: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Query, key and value, (B, N, C), and the size of the keys' map."""
        if self.sr_ratio == 1:
            query, key, value = self.qkv(tokens).chunk(3, -1)
            return query, key, value, (height, width)
        reduced = self.sr(_to_map(tokens, (height, width)))
        key, value = self.kv(self.norm(reduced.flatten(2).mT)).chunk(2, -1)
        return self.q(tokens), key, value, (reduced.shape[2], reduced.shape[3])

    def _agent_bias(self, size: tuple[int, int]) -> Tensor:
        """(1, heads, agents, P + N) on the logits of agents and keys."""
        table = F.interpolate(self.an_bias, size, mode="bilinear").unsqueeze(0)
        bias = (table + _resize(self.ah_bias, size[0], 3) + _resize(self.aw_bias, size[1], 4)).flatten(-2)
        return torch.cat([self.ac_bias, bias], -1) if self.num_prefix else bias

    def _query_bias(self, size: tuple[int, int]) -> Tensor:
        """(1, heads, P + N, agents) on the logits of queries and agents."""
        table = F.interpolate(self.na_bias, size, mode="bilinear").permute(0, 2, 3, 1).unsqueeze(0)
        bias = (table + _resize(self.ha_bias, size[0], 2) + _resize(self.wa_bias, size[1], 3)).flatten(2, 3)
        return torch.cat([self.ca_bias, bias], 2) if self.num_prefix else bias


def resize_biases(bias: Tensor, shape: Sequence[int]) -> Tensor:
    """Biases of rows and columns for a map of another size, as they are used on one: interpolated linearly."""
    for axis, length in enumerate(shape):
        bias = _resize(bias, length, axis)
    return bias


def _to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H W, C) to (B, C, H, W)."""
    return tokens.mT.unflatten(-1, size)


def _resize(bias: Tensor, length: int, axis: int) -> Tensor:
    """The same bias along another number of rows or columns, interpolated linearly."""
    if bias.shape[axis] == length:
        return bias
    rows = bias.movedim(axis, -1)
    flat = F.interpolate(rows.reshape(1, -1, rows.shape[-1]), length, mode="linear")
    return flat.view(*rows.shape[:-1], length).movedim(-1, axis)
