"""Channel attention (DaViT, Ding et al., 2022, arXiv:2204.03645) as a mixer."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from saccade import taps
from saccade.mixers.mixer import Mixer, choose_heads, merge_heads
from saccade.ops import channel_attention, channel_attention_weights

__all__ = ["ChannelAttention"]


class ChannelAttention(Mixer):
    """Softmax attention among the channels of a group, whose features are all positions (DaViT, Ding et al., 2022,
    arXiv:2204.03645).

    Prefix tokens are served: they are positions like all others.

    Taps see the channels' weights as the gate, (B, groups, C / groups, C / groups). The token matrix beside it is the
    identity: an output token is made of its own values, and other tokens act through the weights alone.

    Args:
        dim: C, channels of a token.
        num_heads: groups of channels; None takes one for each 32 channels.
        qkv_bias: give the projection to value, query and key a bias.
        scale: factor of the products; None takes (C / num_heads)^-0.5.
        proj_drop: dropout after the output projection.
    """

    mixes_tokens: ClassVar[bool] = False

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
        self.num_heads = choose_heads(dim, num_heads)
        self.scale = scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)  # as in published weights, in the order value, query, key
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor) -> Tensor:
        return self._attend(x.flatten(1, -2)).unflatten(1, x.shape[1:-1])

    def mix_with_prefix(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        out = self._attend(torch.cat([prefix, x.flatten(1, -2)], 1))
        first, rest = out.split([prefix.shape[1], out.shape[1] - prefix.shape[1]], 1)
        return rest.unflatten(1, x.shape[1:-1]), first

    def _attend(self, tokens: Tensor) -> Tensor:
        parts = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if len(tokens) > 1:  # of a single image each product reads the matrices where they are
            parts = parts.contiguous()  # one copy here, or one for each product
        value, query, key = parts.unbind(0)
        taps.record(self, "gate", lambda: channel_attention_weights(query, key, scale=self.scale))
        taps.record(self, "attention", lambda: torch.eye(value.shape[2]).to(value).expand(*value.shape[:2], -1, -1))
        out = merge_heads(channel_attention(query, key, value, scale=self.scale))
        projected: Tensor = self.proj_drop(self.proj(out))
        return projected
