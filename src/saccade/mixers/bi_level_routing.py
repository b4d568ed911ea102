"""Bi-level routing attention (BiFormer, Zhu et al., 2023, arXiv:2303.08810): regions choose regions by content."""

from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError, check_choice
from saccade.mixers.mixer import Mixer, append_zeros, choose_heads, crop, crop_matrix, merge_heads, split_heads
from saccade.ops import Selection, route_regions, sparse_attention, sparse_attention_weights
from saccade.ops.check import check_positive

__all__ = ["BiLevelRoutingAttention"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class BiLevelRoutingAttention(Mixer):
    """Softmax attention of regions over the few regions that match them best (Zhu et al., 2023, arXiv:2303.08810).

    Regions are matched by mean query and mean key; a depthwise convolution of the values, the local position term, is
    added to the result, and is no part of the token matrix.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels. All heads share the regions.
        num_regions: regions along each axis, at most one a token.
        topk: regions that a region attends to, all where there are fewer. BiFormer takes 1, 4 and 16 from its first
            stage to the third.
        qk_dim: channels of query and key; None takes dim.
        scale: factor of q.k; None takes qk_dim^-0.5, the whole width and not a head's, as BiFormer's weights want it.
        lepe_size: side of the convolution's kernel, odd; 0 leaves it out.
        padding: what happens on an axis that num_regions does not divide. "none" has smaller regions at its end.
            Official code appends zeros that are attended to. "input": to the map before it is projected, and they
            count in the means. "projected": to query, key and value, with regions of length // num_regions tokens.
        axes: axes of space, which the convolution needs to know; 2 for images.
        out_proj: end with a linear projection.
        impl: as in `sparse_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        num_regions: int = 7,
        topk: int = 4,
        qk_dim: int | None = None,
        scale: float | None = None,
        lepe_size: int = 5,
        padding: str = "none",
        axes: int = 2,
        out_proj: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        check_positive(num_regions=num_regions, topk=topk)
        check_choice("padding", padding, ("none", "input", "projected"))
        if lepe_size < 0 or (lepe_size and lepe_size % 2 == 0):
            raise InputError(f"lepe_size is {lepe_size}: a kernel has a middle. Give an odd number, or 0 for none")
        if axes not in (1, 2, 3):
            raise InputError(f"axes is {axes}: give 1, 2 or 3 axes of space")
        self.qk_dim = dim if qk_dim is None else qk_dim
        self.num_heads = choose_heads(dim, num_heads)
        if self.qk_dim % self.num_heads:
            raise InputError(f"qk_dim is {qk_dim} and num_heads is {self.num_heads}: the heads share it evenly")
        self.num_regions = num_regions
        self.topk = topk
        self.scale = self.qk_dim**-0.5 if scale is None else scale
        self.padding = padding
        self.axes = axes
        self.impl = impl
        self.qkv = nn.Linear(dim, 2 * self.qk_dim + dim)
        self.lepe = (
            CONVOLUTIONS[axes - 1](dim, dim, lepe_size, padding=lepe_size // 2, groups=dim) if lepe_size else None
        )
        self.proj = nn.Linear(dim, dim) if out_proj else nn.Identity()

    def mix(self, x: Tensor) -> Tensor:
        space = tuple(x.shape[1:-1])
        if len(space) != self.axes:
            raise InputError(f"x is {tuple(x.shape)}: the convolution is for {self.axes} axes. Set axes={len(space)}")
        query, key, value = self.project(self.pad_input(x))
        selection = self.route(query, key)
        detail = value
        if self.padding == "projected":
            margins = [-length % size for length, size in zip(space, self.region_size(space))]
            query, key, value = (append_zeros(part, margins) for part in (query, key, value))
        q, k, v = (split_heads(part, self.num_heads) for part in (query, key, value))  # (B, heads, *space, D)
        taps.record(self, "attention", lambda: self._attention(q, k, selection, space))
        out = merge_heads(sparse_attention(q, k, v, selection, scale=self.scale, impl=self.impl))
        out = crop(out, tuple(detail.shape[1:-1]))
        if self.lepe is not None:
            out = out + self.lepe(detail.movedim(-1, 1)).movedim(1, -1)
        return self.proj(crop(out, space))

    def pad_input(self, x: Tensor) -> Tensor:
        """The map as it is projected, with zeros appended if padding is "input"."""
        if self.padding != "input":
            return x
        return append_zeros(x, [-length % self.num_regions for length in x.shape[1:-1]])

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of a map, (B, *space, C) each."""
        query, key, value = self.qkv(x).split([self.qk_dim, self.qk_dim, self.dim], -1)
        return query, key, value

    def route(self, query: Tensor, key: Tensor) -> Selection:
        """The regions that each region attends to, from projected maps (B, *space, C)."""
        query, key = split_heads(query, self.num_heads), split_heads(key, self.num_heads)
        return route_regions(query, key, self.region_size(tuple(query.shape[2:-1])), self.topk)

    def region_size(self, space: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens of a region along each axis of a map."""
        if self.padding != "projected":
            return tuple(-(-length // self.num_regions) for length in space)
        if min(space) < self.num_regions:
            raise InputError(
                f"the map is {space} and num_regions is {self.num_regions}: padding='projected' needs a token for "
                "each region. Take fewer regions, or padding='none'"
            )
        return tuple(length // self.num_regions for length in space)

    def _attention(self, query: Tensor, key: Tensor, selection: Selection, space: tuple[int, ...]) -> Tensor:
        """(B, heads, N, M) over the map's own tokens: what falls on appended zeros is left out."""
        padded = tuple(query.shape[2:-1])
        weights = sparse_attention_weights(query, key, selection, scale=self.scale)
        return crop_matrix(weights, padded, space)
