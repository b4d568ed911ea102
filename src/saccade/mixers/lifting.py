"""From images to space by 3-D deformable attention (DFA3D, Li et al., 2023, arXiv:2307.12972, in the form that it has
inside BEVFormer, 2022, arXiv:2203.17270)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError
from saccade.mixers.mixer import choose_heads, merge_heads, split_heads
from saccade.ops import deformable_attention_3d, deformable_attention_3d_weights, depth_scores
from saccade.ops.check import check_positive

__all__ = ["DeformableLifting"]


class DeformableLifting(nn.Module):
    """Queries in space read the images of several cameras, at places and depths which they choose around anchors.

    It is no mixer: queries and images are different tensors. Its token matrix runs from the queries to the pixels of
    all cameras, one camera after the other, and is what is summed before the projection.

    Args:
        dim: C, channels of queries and images.
        num_heads: attention heads; None takes one for each 32 channels.
        num_levels: maps of each image, coarse and fine.
        num_points: P, samples of a head on each level; the anchors share them, so their number must divide P.
        use_empty: add to what a query has read from a camera a learned vector, times the weight that fell on empty
            depths, 1 - sum(weights * mean of the four depth scores), a mean over the heads.
        drop: dropout before the residual.
        impl: as in `saccade.ops.deformable_attention_3d`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        num_levels: int = 4,
        num_points: int = 8,
        use_empty: bool = False,
        drop: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_positive(num_levels=num_levels, num_points=num_points)
        self.dim = dim
        self.num_heads = choose_heads(dim, num_heads)
        self.num_levels = num_levels
        self.num_points = num_points
        self.impl = impl
        samples = self.num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, 2 * samples)
        self.sampling_offsets_depth = nn.Linear(dim, samples)
        self.attention_weights = nn.Linear(dim, samples)
        self.value_proj = nn.Linear(dim, dim)
        self.empty_query = nn.Parameter(torch.zeros(dim)) if use_empty else None
        self.output_proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every head starts in a direction of its own, its points one step apart, all with the same weight."""
        for layer in (self.sampling_offsets, self.sampling_offsets_depth, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        way = torch.stack([angle.cos(), angle.sin()], -1)  # (heads, 2)
        steps = torch.arange(1, self.num_points + 1)
        shape = self.num_heads, self.num_levels, self.num_points
        with torch.no_grad():
            square = way / way.abs().amax(-1, keepdim=True)
            self.sampling_offsets.bias.view(*shape, 2).copy_(square[:, None, None] * steps[:, None])
            self.sampling_offsets_depth.bias.view(shape).copy_(way.mean(-1)[:, None, None] * steps)

    def forward(
        self,
        query: Tensor,
        images: Tensor,
        depth: Tensor,
        shapes: Sequence[tuple[int, int]],
        anchors: Tensor,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Read the cameras, average over those that see a query, project, and add to the query.

        Args:
            query: (B, Q, C).
            images: (B, cameras, S, C), the pixels of all levels one after the other.
            depth: (B, cameras, S, bins), each pixel's distribution over depth.
            shapes: height and width of each level.
            anchors: (B, cameras, Q, Z, 3), where the anchors of each query stand in each camera: column, row and
                depth, 0 to 1 from edge to edge.
            visible: (B, cameras, Q) booleans, which cameras see a query; None: all. A query that none sees reads
                nothing.

        Returns: (B, Q, C).
        """
        self._check(query, images, depth, shapes, anchors, visible)
        batch, cameras, queries = anchors.shape[:3]
        visible = query.new_ones(batch, cameras, queries, dtype=torch.bool) if visible is None else visible
        # each camera reads for the queries that it sees; the sizes of a graph cannot depend on values
        most = queries if torch.compiler.is_compiling() else int(visible.sum(-1).max()) if visible.numel() else 0
        order = torch.sort(visible.byte(), dim=-1, descending=True, stable=True).indices[..., :most]
        seen = visible.gather(-1, order).flatten(0, 1)  # (B cameras, most)
        points, weights = self._choose(query, shapes, depth.shape[-1], anchors, order)
        value = split_heads(self.value_proj(images).flatten(0, 1), self.num_heads)  # (B cameras, heads, S, D)
        depth = depth.flatten(0, 1).unsqueeze(1)
        read = merge_heads(deformable_attention_3d(value, depth, shapes, points, weights, impl=self.impl))
        if self.empty_query is not None:
            met = (weights * depth_scores(depth, shapes, points).mean(-1)).sum((-2, -1)).mean(1)
            read = read + (1 - met).to(read.dtype).unsqueeze(-1) * self.empty_query
        read = (read * seen.unsqueeze(-1)).unflatten(0, (batch, cameras))
        row = order.unsqueeze(-1).expand_as(read)
        total = torch.zeros_like(query).scatter_add(1, row.flatten(1, 2), read.flatten(1, 2).to(query.dtype))
        count = visible.sum(1).clamp(min=1).unsqueeze(-1)

        def attention() -> Tensor:
            matrix = deformable_attention_3d_weights(depth, shapes, points, weights) * seen[:, None, :, None]
            whole = matrix.new_zeros(*matrix.shape[:2], queries, matrix.shape[-1])
            whole = whole.scatter(2, order.flatten(0, 1)[:, None, :, None].expand_as(matrix), matrix)
            by_camera = whole.unflatten(0, (batch, cameras)).movedim(1, 3).flatten(3)  # (B, heads, Q, cameras S)
            return by_camera / count.unsqueeze(1)

        taps.record(self, "attention", attention)
        out: Tensor = query + self.dropout(self.output_proj(total / count))
        return out

    def _choose(
        self, query: Tensor, shapes: Sequence[tuple[int, int]], bins: int, anchors: Tensor, order: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Points (B cameras, heads, most, levels, P, 3) and their weights, of the queries (B, cameras, most) that each
        camera reads for."""
        samples = (self.num_heads, self.num_levels, self.num_points)
        across = self.sampling_offsets(query).unflatten(-1, (*samples, 2))
        along = self.sampling_offsets_depth(query).unflatten(-1, (*samples, 1))
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        sizes = torch.tensor([(w, h, bins) for h, w in shapes], device=query.device).unsqueeze(1)  # (levels, 1, 3)
        offset = torch.cat([across, along], -1) / sizes  # of a pixel, or a bin, on each level
        image, camera = (torch.arange(n, device=query.device) for n in order.shape[:2])
        image, camera = image.view(-1, 1, 1), camera.view(-1, 1)
        around = offset[image, order].unflatten(-2, (-1, anchors.shape[-2]))  # (..., heads, levels, P / Z, Z, 3)
        points = anchors[image, camera, order][:, :, :, None, None, None] + around
        chosen = weights[image, order].unflatten(-1, samples[1:])
        return points.flatten(5, 6).flatten(0, 1).transpose(1, 2), chosen.flatten(0, 1).transpose(1, 2)

    def _check(
        self,
        query: Tensor,
        images: Tensor,
        depth: Tensor,
        shapes: Sequence[tuple[int, int]],
        anchors: Tensor,
        visible: Tensor | None,
    ) -> None:
        if query.ndim != 3 or query.shape[-1] != self.dim:
            raise InputError(f"query is {tuple(query.shape)}: give (B, Q, {self.dim})")
        batch, queries = query.shape[:2]
        if images.ndim != 4 or images.shape[0] != batch or images.shape[-1] != self.dim:
            raise InputError(f"images is {tuple(images.shape)}: give ({batch}, cameras, S, {self.dim})")
        cameras, pixels = images.shape[1:3]
        if len(shapes) != self.num_levels or sum(h * w for h, w in shapes) != pixels:
            raise InputError(
                f"shapes is {list(shapes)} for {pixels} pixels: give height and width of {self.num_levels} levels, "
                "whose pixels add up to those of an image"
            )
        if depth.ndim != 4 or depth.shape[:3] != images.shape[:3]:
            raise InputError(f"depth is {tuple(depth.shape)}: give ({batch}, {cameras}, {pixels}, bins)")
        if anchors.ndim != 5 or anchors.shape[:3] != (batch, cameras, queries) or anchors.shape[-1] != 3:
            raise InputError(f"anchors is {tuple(anchors.shape)}: give ({batch}, {cameras}, {queries}, Z, 3)")
        if anchors.shape[3] < 1 or self.num_points % anchors.shape[3]:
            raise InputError(
                f"num_points is {self.num_points} and there are {anchors.shape[3]} anchors a query: they share the "
                "points evenly. Give a number of anchors that divides the points"
            )
        if visible is not None and (visible.dtype != torch.bool or visible.shape != (batch, cameras, queries)):
            raise InputError(
                f"visible is {visible.dtype} {tuple(visible.shape)}: give booleans ({batch}, {cameras}, {queries})"
            )
