"""Gated positional self-attention (ConViT, d'Ascoli et al., 2021, arXiv:2103.10697) as a mixer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError
from saccade.mixers.mixer import Mixer, choose_heads, merge_heads, split_heads
from saccade.ops import gated_positional_attention
from saccade.ops.gated_positional_attention import gated_positional_weights

__all__ = ["GatedPositionalAttention"]


class GatedPositionalAttention(Mixer):
    """Softmax attention mixed by a learned gate with attention to places, which starts as a convolution (ConViT,
    d'Ascoli et al., 2021, arXiv:2103.10697).

    Taps see the gates, (heads,), too.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels.
        locality_strength: alpha, how narrow the heads start: head by head, the place logits of a key at distance d
            from the head's own offset are -alpha d^2.
        axes: axes of space; 2 for images.
        qkv_bias: give the projections to query, key and value a bias.
        scale: factor of q.k; None takes D^-0.5.
        proj_drop: dropout after the output projection.
        impl: as in `gated_positional_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        locality_strength: float = 1.0,
        axes: int = 2,
        qkv_bias: bool = False,
        scale: float | None = None,
        proj_drop: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        self.num_heads = choose_heads(dim, num_heads)
        self.locality_strength, self.axes, self.scale, self.impl = locality_strength, axes, scale, impl
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.pos_proj = nn.Linear(axes + 1, self.num_heads)  # its bias is the same for all keys: no output shows it
        self.gating_param = nn.Parameter(torch.ones(self.num_heads))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.start_local()

    @torch.no_grad()
    def start_local(self) -> None:
        """Let the values start as the tokens, and the heads at the offsets of a kernel of as many places: the first
        K^axes heads, K the largest whole number for which there are as many. Other heads start at random."""
        nn.init.eye_(self.v.weight)
        nn.init.trunc_normal_(self.pos_proj.weight, std=0.02)
        nn.init.zeros_(self.pos_proj.bias)
        for head, offset in enumerate(self.kernel_offsets()):  # that of the last axis stands first
            for axis, step in enumerate(offset):
                self.pos_proj.weight[head, axis] = 2 * step
            self.pos_proj.weight[head, -1] = -1
        self.pos_proj.weight.mul_(self.locality_strength)

    def kernel_offsets(self) -> list[list[float]]:
        """Offsets, last axis first, at which the heads that tile a kernel start; halves where K is even."""
        side = 1
        while (side + 1) ** self.axes <= self.num_heads:
            side += 1
        centre = (side - 1) / 2  # as side // 2 for odd ones
        places = [side**axis for axis in reversed(range(self.axes))]
        return [[head // place % side - centre for place in places] for head in range(side**self.axes)]

    def mix(self, x: Tensor) -> Tensor:
        if x.ndim != self.axes + 2:
            raise InputError(f"x is {tuple(x.shape)}: its positions have {self.axes} axes. Set axes={x.ndim - 2}")
        query, key = (split_heads(part, self.num_heads) for part in self.qk(x).chunk(2, -1))
        value, gate = split_heads(self.v(x), self.num_heads), self.gating_param.sigmoid()
        positions = self.position_logits(tuple(x.shape[1:-1]))
        taps.record(self, "attention", lambda: gated_positional_weights(query, key, positions, gate, scale=self.scale))
        taps.record(self, "gate", lambda: gate)
        out = gated_positional_attention(query, key, value, positions, gate, scale=self.scale, impl=self.impl)
        projected: Tensor = self.proj_drop(self.proj(merge_heads(out)))
        return projected

    def position_logits(self, space: Sequence[int]) -> list[Tensor]:
        """For each axis (heads, n, n): what an offset along it adds to the logits of places."""
        weight = self.pos_proj.weight
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # squares of offsets are large
        logits = []
        for axis, length in enumerate(space):
            places = torch.arange(length, device=weight.device, dtype=weight.dtype)
            offset = places - places.unsqueeze(1)  # of the key, seen from the query
            linear, square = weight[:, len(space) - 1 - axis], weight[:, -1]
            logits.append(linear.view(-1, 1, 1) * offset + square.view(-1, 1, 1) * offset.square())
        logits[0] = logits[0] + self.pos_proj.bias.view(-1, 1, 1)
        return logits
