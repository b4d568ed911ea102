"""Deformable attention in three dimensions (DFA3D, Li et al., 2023, arXiv:2307.12972): queries in space sample images
that are lifted by a distribution over depth.

The lifted volume is value * depth, an outer product, which need not exist: trilinear sampling of it is bilinear
sampling of the image, whose four pixels are weighted by their own depth distribution at the point's depth.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from saccade.errors import InputError, check_choice

__all__ = ["deformable_attention_3d", "deformable_attention_3d_weights", "depth_scores"]

Shapes = Sequence[tuple[int, int]]
# the four pixels around a point: left-top, right-top, right-bottom, left-bottom
ACROSS, DOWN = (0, 1, 1, 0), (0, 0, 1, 1)
MOST_POINTS = 2**18  # sampled at once, with some 300 bytes each; more are taken in turn, and again in the backward pass


def deformable_attention_3d(
    value: Tensor, depth: Tensor, shapes: Shapes, points: Tensor, weights: Tensor, *, impl: str = "auto"
) -> Tensor:
    """Average samples of the volume value * depth at given points, trilinearly interpolated, 0 outside.

    Args:
        value: (B, heads, S, E), the pixels of all levels one after the other.
        depth: (B, heads or 1, S, bins), each pixel's distribution over depth.
        shapes: height and width of each level; their pixels add up to S.
        points: (B, heads, Q, levels, P, 3), column, row and depth of each sample: 0 to 1 from edge to edge, so that
            the first of w pixels is centred at 0.5 / w.
        weights: (B, heads, Q, levels, P), usually a softmax over levels and points.
        impl: "reference" forms the volume, S E bins numbers a head, and defines what is right; "sampled" never does: it
            sums weighted pixels, and keeps nothing but its inputs where points are many; "auto" is "sampled".

    Returns: (B, heads, Q, E) in the dtype of value. Places are computed in float32 at least. Gradients reach all
        tensors, with those of the places through both interpolations.
    Raises: InputError for shapes that do not fit, or an unknown `impl`.

    >>> value = torch.tensor([4.0, 8.0]).reshape(1, 1, 2, 1)  # one row of two pixels
    >>> depth = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 1, 2, 2)  # the left one near, the right one far
    >>> points = torch.tensor([[0.5, 0.5, 0.25], [0.5, 0.5, 0.75]]).reshape(1, 1, 2, 1, 1, 3)  # between them
    >>> deformable_attention_3d(value, depth, [(1, 2)], points, torch.ones(1, 1, 2, 1, 1)).flatten()
    tensor([2., 4.])
    """
    check_choice("impl", impl, ("auto", "sampled", "reference"))
    _check(depth, shapes, points, weights)
    if value.ndim != 4 or value.shape[:2] != points.shape[:2] or value.shape[2] != depth.shape[2]:
        raise InputError(
            f"value is {tuple(value.shape)}: with these points and this depth it takes "
            f"(B, heads, S, E) = ({points.shape[0]}, {points.shape[1]}, {depth.shape[2]}, E)"
        )
    dtype = torch.promote_types(value.dtype, torch.float32)
    maps, depth, points, weights = (x.to(dtype) for x in (value, depth, points, weights))
    if impl == "reference":
        return _sample_volume(maps, depth, shapes, points, weights).to(value.dtype)
    per_query = max(1, points.shape[0] * points.shape[1] * points.shape[3:5].numel())
    queries = max(1, MOST_POINTS // per_query)
    pieces = list(zip(points.split(queries, 2), weights.split(queries, 2)))
    if len(pieces) == 1:
        out = _sample_pixels(maps, depth, shapes, points, weights)
    else:
        out = torch.cat([_recomputed(maps, depth, shapes, *piece) for piece in pieces], 2)
    return out.to(value.dtype)


def deformable_attention_3d_weights(depth: Tensor, shapes: Shapes, points: Tensor, weights: Tensor) -> Tensor:
    """Form the matrix with which `deformable_attention_3d` sums the pixels, (B, heads, Q, S), for looking at.

    Its rows sum to less than 1: what falls on other depths or outside the image is missing.
    """
    _check(depth, shapes, points, weights)
    number, share = _entries(depth, shapes, points, weights)
    return share.new_zeros(*share.shape[:3], depth.shape[2]).scatter_add(-1, number, share)


def depth_scores(depth: Tensor, shapes: Shapes, points: Tensor) -> Tensor:
    """Interpolate the depth distribution of the four pixels around each point at the point's depth.

    Args:
        depth, shapes, points: as in `deformable_attention_3d`.

    Returns: (B, heads, Q, levels, P, 4): left-top, right-top, right-bottom, left-bottom; 0 for a pixel outside.
    """
    _check(depth, shapes, points, None)
    return _interpolate_depth(depth, points, *_corners(shapes, points)[:2])


def _sample_pixels(value: Tensor, depth: Tensor, shapes: Shapes, points: Tensor, weights: Tensor) -> Tensor:
    """Sum for each query the pixels around its points, without a copy of them."""
    number, share = _entries(depth, shapes, points, weights)
    batch, heads, pixels, _ = value.shape
    # rows by image, pixel and head: no copy of a value whose heads were split off the channels
    rows = value.transpose(1, 2).flatten(0, 2)
    image, head = (torch.arange(n, device=value.device) for n in (batch, heads))
    number = (image.view(-1, 1, 1, 1) * pixels + number) * heads + head.view(-1, 1, 1)
    out = F.embedding_bag(number.flatten(0, 2), rows, per_sample_weights=share.flatten(0, 2), mode="sum")
    return out.unflatten(0, points.shape[:3])


def _recomputed(*args: Any) -> Tensor:
    """The same, of which nothing is kept for the backward pass."""
    out: Tensor = checkpoint(_sample_pixels, *args, use_reentrant=False, preserve_rng_state=False)
    return out


def _entries(depth: Tensor, shapes: Shapes, points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels that each query sums, and with which weights: (B, heads, Q, 4 levels P) each."""
    number, inside, bilinear = _corners(shapes, points)
    share = weights.unsqueeze(-1) * bilinear * _interpolate_depth(depth, points, number, inside)
    return number.flatten(3), share.flatten(3)


def _corners(shapes: Shapes, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For the four pixels around each point, (B, heads, Q, levels, P, 4): the number among all pixels, 0 outside;
    whether it is inside; its bilinear weight."""
    dtype = torch.promote_types(points.dtype, torch.float32)
    sizes = torch.tensor([(w, h) for h, w in shapes], device=points.device).unsqueeze(1)  # (levels, 1, 2)
    first = torch.tensor([0, *(h * w for h, w in shapes)][:-1], device=points.device).cumsum(0).view(-1, 1, 1)
    place = points[..., :2].to(dtype) * sizes - 0.5
    low = place.detach().floor()
    share = place - low
    step = torch.tensor([ACROSS, DOWN], dtype=dtype, device=points.device).mT  # (4, 2)
    corner = low.unsqueeze(-2) + step
    inside = ((corner >= 0) & (corner < sizes.unsqueeze(-2))).all(-1)
    # only now to integers: a place far outside may not fit into one
    column, row = corner.where(inside.unsqueeze(-1), 0.0).long().unbind(-1)
    number = (first + row * sizes[..., :1] + column).where(inside, 0)
    along = torch.where(step.bool(), share.unsqueeze(-2), 1 - share.unsqueeze(-2))
    return number, inside, along.prod(-1)


def _interpolate_depth(depth: Tensor, points: Tensor, number: Tensor, inside: Tensor) -> Tensor:
    """Linear between the two bins around each point's depth, of the given pixels (..., 4); a missing bin counts 0."""
    bins = depth.shape[-1]
    place = points[..., 2, None].to(torch.promote_types(points.dtype, torch.float32)) * bins - 0.5
    low = place.detach().floor()
    total = torch.zeros((), dtype=place.dtype, device=place.device)
    for bin_, share in ((low, 1 - (place - low)), (low + 1, place - low)):
        seen = inside & (bin_ >= 0) & (bin_ < bins)
        index = number * bins + bin_.where((bin_ >= 0) & (bin_ < bins), 0.0).long()
        # one distribution for all heads is not expanded, nor would its gradient be
        rows = index.flatten(2) if depth.shape[1] > 1 else index.flatten(1).unsqueeze(1)
        found = depth.flatten(2).gather(2, rows).view(index.shape)
        total = total + (share * found).where(seen, 0.0)
    return total


def _sample_volume(value: Tensor, depth: Tensor, shapes: Shapes, points: Tensor, weights: Tensor) -> Tensor:
    """The equation: lift every level, sample it trilinearly, average."""
    total = value.new_zeros(*points.shape[:3], value.shape[-1])
    levels = [h * w for h, w in shapes]
    for level, (maps, bins) in enumerate(zip(value.split(levels, 2), depth.split(levels, 2))):
        volume = torch.einsum("bhse,bhsd->bheds", maps, bins.expand(-1, maps.shape[1], -1, -1))
        volume = volume.unflatten(-1, shapes[level]).flatten(0, 1)  # (B heads, E, bins, H, W)
        grid = (2 * points[:, :, :, level] - 1).flatten(0, 1).unsqueeze(-2)  # (B heads, Q, P, 1, 3), -1 and 1 the edges
        sampled = F.grid_sample(volume, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        sampled = sampled.squeeze(-1).unflatten(0, value.shape[:2])  # (B, heads, E, Q, P)
        total = total + torch.einsum("bheqp,bhqp->bhqe", sampled, weights[:, :, :, level])
    return total


def _check(depth: Tensor, shapes: Shapes, points: Tensor, weights: Tensor | None) -> None:
    pixels = sum(h * w for h, w in shapes)
    if points.ndim != 6 or points.shape[3] != len(shapes) or points.shape[-1] != 3 or not points.shape[4]:
        raise InputError(
            f"points is {tuple(points.shape)} for {len(shapes)} levels: give (B, heads, Q, {len(shapes)}, P, 3), "
            "column, row and depth of at least one point"
        )
    if weights is not None and weights.shape != points.shape[:-1]:
        raise InputError(f"weights is {tuple(weights.shape)}: give one a point, {tuple(points.shape[:-1])}")
    batch, heads = points.shape[:2]
    if depth.ndim != 4 or depth.shape[0] != batch or depth.shape[1] not in (1, heads) or depth.shape[2] != pixels:
        raise InputError(
            f"depth is {tuple(depth.shape)}: levels of {', '.join(f'{h} x {w}' for h, w in shapes)} pixels take "
            f"(B, heads or 1, S, bins) = ({batch}, {heads} or 1, {pixels}, bins)"
        )
