"""Top-k attention as a mixer (DFIR-DETR, 2025, arXiv:2512.07078, where the number of keys follows the input)."""

import math

import torch
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError
from saccade.mixers.mixer import Mixer, choose_heads, merge_heads, split_heads
from saccade.ops import top_k_attention, top_k_attention_weights

__all__ = ["TopKAttention"]


class TopKAttention(Mixer):
    """Softmax attention of every token over the share of all tokens that match it best (DFIR-DETR, 2025,
    arXiv:2512.07078).

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels. Each head chooses for itself.
        share: rho; a query keeps ceil(rho N) keys.
        dynamic: predict rho for each image, from the mean of its tokens; it starts at `share`. It then keeps rho N
            keys, at least one, the last of which counts with the fraction, so that rho gets a gradient.
        qkv_bias: give the projection to query, key and value a bias.
        scale: factor of q.k; None takes D^-0.5.
        impl: as in `saccade.ops.top_k_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        share: float = 0.25,
        dynamic: bool = False,
        qkv_bias: bool = True,
        scale: float | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        if not 0 < share <= 1 or (dynamic and share == 1):
            raise InputError(
                f"share is {share} and dynamic is {dynamic}: give a share of the tokens above 0, and at most 1, "
                "or below 1 where a predicted one starts from it"
            )
        self.num_heads = choose_heads(dim, num_heads)
        self.share = share
        self.scale = scale
        self.impl = impl
        self.gate = None
        if dynamic:
            self.gate = nn.Linear(dim, 1)
            nn.init.zeros_(self.gate.weight)
            nn.init.constant_(self.gate.bias, math.log(share / (1 - share)))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1))
        count = self.count(x)
        taps.record(self, "attention", lambda: top_k_attention_weights(query, key, count, scale=self.scale))
        out: Tensor = self.proj(
            merge_heads(top_k_attention(query, key, value, count, scale=self.scale, impl=self.impl))
        )
        return out

    def count(self, x: Tensor) -> int | Tensor:
        """Keys that the queries of a map (B, *space, C) keep: one number, or (B,) predicted ones."""
        tokens = x.shape[1:-1].numel()
        if self.gate is None:
            return max(1, math.ceil(self.share * tokens - 1e-9))  # 0.1 * 30 is above 3 in floating point
        dtype = torch.promote_types(x.dtype, torch.float32)  # bfloat16 cannot count to 1000
        summary = x.flatten(1, -2).mean(1).to(dtype)
        logit = nn.functional.linear(summary, self.gate.weight.to(dtype), self.gate.bias.to(dtype))
        return (logit.squeeze(-1).sigmoid() * tokens).clamp(min=1)
