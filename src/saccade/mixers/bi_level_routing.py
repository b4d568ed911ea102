"""Bi-level routing attention (BiFormer, Zhu et al., 2023, arXiv:2303.08810): regions choose regions by content."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError, check_choice
from saccade.mixers.mixer import Mixer, append_zeros, choose_heads, crop, crop_matrix, merge_heads, split_heads
from saccade.ops import Selection, merge_attention, select_top_k, sparse_attention, sparse_attention_weights
from saccade.ops.check import check_positive, per_axis
from saccade.ops.selection import block_means, block_order, token_slots

__all__ = ["BiLevelRoutingAttention"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
POOLS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {  # to a size, and by a ratio
    "avg": (F.adaptive_avg_pool2d, F.avg_pool2d),
    "max": (F.adaptive_max_pool2d, F.max_pool2d),
}
Parts = list[tuple[Selection, Tensor]]


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
        pool: "avg" or "max" of the keys and values of a region, before they are attended to; None has none. On maps of
            two axes in whole regions, as padding makes them. Regions are matched before.
        pool_size: keys that are left of a region along each side; None takes one for each pool_ratio of its tokens.
        pool_ratio: tokens along each side that become one.
        soft: multiply the keys and values that a region sees by the weight of their region, a softmax over the chosen
            regions' scores.
        differentiable: let the weights' gradient reach query and key; choosing itself has none.
        learned: put one linear layer on the mean queries and keys before they are matched.
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
        pool: str | None = None,
        pool_size: int | None = None,
        pool_ratio: int = 4,
        soft: bool = False,
        differentiable: bool = False,
        learned: bool = False,
        axes: int = 2,
        out_proj: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        check_positive(num_regions=num_regions, topk=topk)
        check_choice("padding", padding, ("none", "input", "projected"))
        if lepe_size < 0 or (lepe_size and lepe_size % 2 == 0):
            raise InputError(f"lepe_size is {lepe_size}: a kernel has a middle. Give an odd number, or 0 for none")
        if pool is not None:
            check_choice("pool", pool, POOLS)
            check_positive(pool_ratio=pool_ratio, **({} if pool_size is None else {"pool_size": pool_size}))
            if axes != 2:
                raise InputError(f"pool is {pool!r} and axes is {axes}: keys are pooled on maps of two axes")
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
        self.pool, self.pool_size, self.pool_ratio = pool, pool_size, pool_ratio
        self.soft, self.differentiable = soft, differentiable
        self.axes = axes
        self.impl = impl
        self.qkv = nn.Linear(dim, 2 * self.qk_dim + dim)
        self.lepe = (
            CONVOLUTIONS[axes - 1](dim, dim, lepe_size, padding=lepe_size // 2, groups=dim) if lepe_size else None
        )
        self.proj = nn.Linear(dim, dim) if out_proj else nn.Identity()
        self.match = nn.Linear(self.qk_dim, self.qk_dim) if learned else None

    def mix(self, x: Tensor) -> Tensor:
        space = tuple(x.shape[1:-1])
        if len(space) != self.axes:
            raise InputError(f"x is {tuple(x.shape)}: the convolution is for {self.axes} axes. Set axes={len(space)}")
        query, key, value = self.project(self.pad_input(x))
        scores = self.scores(query, key)
        selection = self._select(scores, tuple(query.shape[1:-1]))
        detail = value
        if self.padding == "projected":
            margins = [-length % size for length, size in zip(space, self.region_size(space))]
            query, key, value = (append_zeros(part, margins) for part in (query, key, value))
        if self.pool is not None:
            selection, key, value = self._pool_keys(selection, key, value)
        q, k, v = (split_heads(part, self.num_heads) for part in (query, key, value))  # (B, heads, *space, D)
        parts = self._soft_parts(q, scores, selection) if self.soft else [(selection, q.new_ones(()))]
        taps.record(self, "attention", lambda: self._attention(q, k, parts, space))
        out = self._attend(q, k, v, parts)
        out = crop(merge_heads(out), tuple(detail.shape[1:-1]))
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
        return self._select(self.scores(query, key), tuple(query.shape[1:-1]))

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """How well pairs of regions match, (B, 1, T, T), from projected maps (B, *space, C)."""
        size = self.region_size(tuple(query.shape[1:-1]))
        if not self.differentiable:
            query, key = query.detach(), key.detach()
        means = [block_means(part.unsqueeze(1), size) for part in (query, key)]
        query, key = means if self.match is None else (self.match(part) for part in means)
        return self.scale * query @ key.mT

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

    def _select(self, scores: Tensor, space: tuple[int, ...]) -> Selection:
        size = self.region_size(space)
        return select_top_k(scores, self.topk, query_block=size, key_block=size, ragged=True)

    def _pool_keys(self, selection: Selection, key: Tensor, value: Tensor) -> tuple[Selection, Tensor, Tensor]:
        """The selection of pooled regions, and the maps of pooled keys and values."""
        space = tuple(key.shape[1:-1])
        regions = per_axis("region", selection.key_block, 2)
        if any(length % size for length, size in zip(space, regions)):
            raise InputError(
                f"the map is {space} and a region has {regions} tokens: pooled keys need whole regions. Set "
                "padding='input', or take another num_regions"
            )
        left = [self.pool_size or size // self.pool_ratio for size in regions]
        if 0 in left:
            raise InputError(f"a region has {regions} tokens and pool_ratio is {self.pool_ratio}: take a smaller ratio")
        counts = [length // size for length, size in zip(space, regions)]

        def pool(x: Tensor) -> Tensor:
            cells = x.unflatten(2, (counts[1], -1)).unflatten(1, (counts[0], -1)).permute(0, 1, 3, 5, 2, 4)
            cells = cells.flatten(0, 2)  # (B T, C, h, w)
            if self.pool_size is None:
                cells = POOLS[str(self.pool)][1](cells, self.pool_ratio)
            else:
                cells = POOLS[str(self.pool)][0](cells, self.pool_size)
            cells = cells.unflatten(0, (len(x), *counts)).permute(0, 1, 4, 2, 5, 3)
            return cells.flatten(3, 4).flatten(1, 2)

        size = tuple(left)
        keys = tuple(count * each for count, each in zip(counts, size))
        return replace(selection, key_block=size, key_size=keys), pool(key), pool(value)

    def _soft_parts(self, query: Tensor, scores: Tensor, selection: Selection) -> Parts:
        """One selection for each rank, and the weight of the region that has it, (B, 1, *space, 1) of the queries."""
        space = tuple(query.shape[2:-1])
        weights = scores.gather(-1, selection.blocks).softmax(-1)  # (B, 1, T, K)
        rows = block_order(space, selection.query_block, query.device)
        slots = token_slots(rows, space)
        parts: Parts = []
        for rank in range(weights.shape[-1]):
            one = replace(selection, blocks=selection.blocks[..., rank : rank + 1], used=selection.used[..., :1])
            of_tokens = weights[..., rank].repeat_interleave(rows.shape[1], 2)[:, :, slots]
            parts.append((one, of_tokens.unflatten(2, space).unsqueeze(-1)))
        return parts

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Tensor:
        """Attention over the regions of all parts; keys and values of a part are multiplied by its weight."""
        attend = partial(sparse_attention, scale=self.scale, impl=self.impl)
        if not self.soft:
            return attend(query, key, value, parts[0][0])
        results = [attend(query * weight, key, value, one, return_lse=True) for one, weight in parts]
        return merge_attention([(out * weight, lse) for (out, lse), (_, weight) in zip(results, parts)]).out

    def _attention(self, query: Tensor, key: Tensor, parts: Parts, space: tuple[int, ...]) -> Tensor:
        """(B, heads, N, M) over the map's own tokens: what falls on appended zeros is left out; M are pooled keys where
        there are any."""
        shown = [sparse_attention_weights(query * weight, key, one, scale=self.scale) for one, weight in parts]
        if self.soft:
            results = [
                sparse_attention(query * weight, key, key, one, scale=self.scale, return_lse=True)
                for one, weight in parts
            ]
            shares = torch.stack([lse.flatten(2) for _, lse in results]).softmax(0).unsqueeze(-1)
            shown = [each * share * weight.flatten(2, -2) for each, share, (_, weight) in zip(shown, shares, parts)]
        weights, padded = sum(shown[1:], shown[0]), tuple(query.shape[2:-1])
        if self.pool is not None:
            return crop(weights.unflatten(2, padded), space, first=2).flatten(2, 1 + len(space))
        return crop_matrix(weights, padded, space)
