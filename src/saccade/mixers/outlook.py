"""Outlook attention (VOLO, Yuan et al., 2021, arXiv:2106.13112) as a mixer."""

import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError
from saccade.mixers.mixer import Mixer, choose_heads, merge_heads, split_heads
from saccade.ops import outlook_attention, outlook_attention_weights
from saccade.ops.check import check_positive

__all__ = ["OutlookAttention"]


class OutlookAttention(Mixer):
    """Windows mixed by matrices that their centres make, without queries and keys (VOLO, Yuan et al., 2021,
    arXiv:2106.13112).

    A linear layer turns the mean of stride x stride tokens into a K^2 x K^2 matrix for each head; overlapping windows
    are summed. Its token matrix is exact, and its rows do not sum to 1.

    Args:
        dim: C, channels of a token.
        num_heads: heads, with a matrix each; None takes one for each 32 channels.
        kernel_size: K, tokens of a window along each side.
        stride: tokens from window to window; 2 as in all published networks, at a quarter of the cost of 1.
        padding: tokens by which the first window sticks out of the map, where zeros are; None takes K // 2.
        qkv_bias: give the projection to values a bias.
        scale: factor of the logits; None takes (C / num_heads)^-0.5.
        proj_drop: dropout after the output projection.
        impl: as in `outlook_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        kernel_size: int = 3,
        stride: int = 2,
        padding: int | None = None,
        qkv_bias: bool = False,
        scale: float | None = None,
        proj_drop: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        check_positive(kernel_size=kernel_size, stride=stride)
        self.num_heads = choose_heads(dim, num_heads)
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.scale = (dim // self.num_heads) ** -0.5 if scale is None else scale
        self.impl = impl
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn = nn.Linear(dim, self.num_heads * kernel_size**4)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise InputError(f"x is {tuple(x.shape)}: its windows are square. Give (B, H, W, {self.dim})")
        value, logits = split_heads(self.v(x), self.num_heads), self.logits(x)
        space = x.shape[1], x.shape[2]
        stride, padding, scale = self.stride, self.padding, self.scale
        taps.record(
            self,
            "attention",
            lambda: outlook_attention_weights(logits, space, stride=stride, padding=padding, scale=scale),
        )
        out = outlook_attention(value, logits, stride=stride, padding=padding, scale=scale, impl=self.impl)
        projected: Tensor = self.proj_drop(self.proj(merge_heads(out)))
        return projected

    def logits(self, x: Tensor) -> Tensor:
        """(B, heads, h, w, K^2, K^2), the matrix that each window's centre makes, before the softmax."""
        if self.stride > 1:
            x = F.avg_pool2d(x.movedim(-1, 1), self.stride, ceil_mode=True).movedim(1, -1)
        matrices: Tensor = self.attn(x).unflatten(-1, (self.num_heads, self.kernel_size**2, -1))
        return matrices.movedim(3, 1)
