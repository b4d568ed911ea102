"""Varied-size window attention (VSA, Zhang et al., 2022, arXiv:2204.08446): windows that learn where to look."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError, check_choice
from saccade.mixers.attention import DEFAULT_WINDOW, fit_window
from saccade.mixers.mixer import Mixer, choose_heads, merge_heads, split_heads
from saccade.ops import (
    RelativeTable,
    Window,
    resample_windows,
    resampling_weights,
    sparse_attention,
    sparse_attention_weights,
)
from saccade.ops.check import per_axis

__all__ = ["VariedWindowAttention"]

Region = tuple[Tensor, Tensor]


class VariedWindowAttention(Mixer):
    """Window attention whose keys come from regions that each head moves and stretches (VSA, 2022, arXiv:2204.08446).

    Queries stay in their windows. A map that the window does not divide is padded with keys of 0, which stay in the
    softmax, as do points of a region that fall outside the map.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels.
        window_size: tokens of a window along each axis. None takes at most 7, so that an axis is cut into as few
            windows as possible of about equal size; a size that is asked for and larger than the map is an error.
        dim_out: channels of the output; None keeps C.
        qkv_bias: give the projection to query, key and value a bias.
        scale: factor of q.k; None takes D^-0.5, of the output's width a head.
        impl: "auto" or "reference", for sampling and attention alike.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        window_size: int | tuple[int, int] | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = True,
        scale: float | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        check_choice("impl", impl, ("auto", "reference"))
        dim_out = dim if dim_out is None else dim_out
        self.num_heads = choose_heads(dim_out, num_heads)
        self.window_size = window_size
        self.scale = scale
        self.impl = impl
        self.sampling_offsets = nn.Linear(dim, 2 * self.num_heads)  # by head: columns, rows
        self.sampling_scales = nn.Linear(dim, 2 * self.num_heads)
        self.qkv = nn.Linear(dim, 3 * dim_out, bias=qkv_bias)
        sizes = per_axis("window_size", DEFAULT_WINDOW if window_size is None else window_size, 2)
        self.position_bias_table = nn.Parameter(torch.empty(self.num_heads, *(2 * size - 1 for size in sizes)))
        self.proj = nn.Linear(dim_out, dim_out)
        nn.init.trunc_normal_(self.position_bias_table, std=0.02)

    def mix(self, x: Tensor) -> Tensor:
        move, stretch = self.regions(x)
        height, width = x.shape[1:-1]
        window = self._window((height, width))
        # the projected map is padded, not x: a padded key is 0, and not the bias of the projection
        qkv = _pad(self.qkv(x), window)
        query, key, value = (split_heads(part, self.num_heads) for part in qkv.chunk(3, -1))  # (B, heads, H, W, D)
        key, value = resample_windows(torch.cat([key, value], -1), window, move, stretch, impl=self.impl).chunk(2, -1)
        pattern, bias = Window(window), RelativeTable(self.position_bias_table)

        def attention() -> Tensor:
            """Over the map's own tokens: what falls on zeros adds nothing to the output."""
            space = (query.shape[2], query.shape[3])
            to_points = sparse_attention_weights(query, key, pattern, bias=bias, scale=self.scale)
            weights = to_points @ resampling_weights(space, window, move, stretch).to(to_points.dtype)
            by_axis = weights.unflatten(3, space).unflatten(2, space)
            return by_axis[:, :, :height, :width, :height, :width].flatten(4).flatten(2, 3)

        taps.record(self, "attention", attention)
        out = sparse_attention(query, key, value, pattern, bias=bias, scale=self.scale, impl=self.impl)
        projected: Tensor = self.proj(merge_heads(out)[:, :height, :width])
        return projected

    def regions(self, x: Tensor) -> Region:
        """Where the heads of each window look: `move` and `stretch` of `resample_windows`, from x (B, H, W, C)."""
        if x.ndim != 4:
            raise InputError(f"x is {tuple(x.shape)}: windows are sampled from an image. Give (B, H, W, {self.dim})")
        space = (x.shape[1], x.shape[2])
        window = self._window(space)
        padded = _pad(x, window)
        # float32 at least: a place that is rounded to bfloat16 misses by a good part of a token
        pooled = padded.to(torch.promote_types(x.dtype, torch.float32)).movedim(-1, 1)
        summary = F.leaky_relu(F.avg_pool2d(pooled, window)).movedim(1, -1)  # (B, windows, windows, C)
        offset, scale = (
            split_heads(F.linear(summary, layer.weight.to(summary.dtype), layer.bias.to(summary.dtype)), self.num_heads)
            for layer in (self.sampling_offsets, self.sampling_scales)
        )
        # an offset of 1 is half the padded map, shared among the windows that fit into the map itself
        reach = [(length - 1) / 2 / (real // size) for length, real, size in zip(padded.shape[1:3], space, window)]
        return offset.flip(-1) * offset.new_tensor(reach), 1 + scale.flip(-1)

    def _window(self, space: tuple[int, int]) -> tuple[int, int]:
        height, width = fit_window("window_size", self.window_size, space)
        return height, width


def _pad(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, H, W, C) with zeros at the bottom and on the right, up to whole windows."""
    height, width = (-length % size for length, size in zip(x.shape[1:3], window))
    return F.pad(x, (0, 0, 0, width, 0, height))
