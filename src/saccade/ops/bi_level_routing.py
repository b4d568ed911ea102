"""Bi-level routing (BiFormer, Zhu et al., 2023, arXiv:2303.08810): regions choose regions, then tokens meet tokens."""

from torch import Tensor

from saccade.errors import InputError
from saccade.ops.check import check_attention, check_positive
from saccade.ops.selection import Selection, block_means, select_top_k

__all__ = ["region_scores", "route_regions"]


def region_scores(query: Tensor, key: Tensor, region_size: int | tuple[int, ...]) -> Tensor:
    """Score every pair of regions by the product of their mean query and mean key, over all heads together.

    Args:
        query, key: (B, heads, *space, D).
        region_size: tokens of a region, one number or one for each axis; the last region may be smaller.

    Returns: (B, 1, T, T) of query region and key region, unscaled and without gradient.

    >>> import torch
    >>> x = torch.tensor([1.0, 3.0, 0.0, 2.0]).reshape(1, 1, 4, 1)
    >>> region_scores(x, x, 2)  # means 2 and 1
    tensor([[[[4., 2.],
              [2., 1.]]]])
    """
    check_attention(query, key, key)
    check_positive(region_size=region_size)
    if query.shape != key.shape:
        raise InputError(f"query is {tuple(query.shape)} and key is {tuple(key.shape)}: regions are of one map")
    means = (block_means(x.detach(), region_size).transpose(1, 2).flatten(2) for x in (query, key))
    query_means, key_means = means  # (B, T, heads D)
    return (query_means @ key_means.mT).unsqueeze(1)


def route_regions(query: Tensor, key: Tensor, region_size: int | tuple[int, ...], count: int) -> Selection:
    """Choose for each region the `count` regions whose mean key has the largest product with its mean query.

    With `sparse_attention`, which then lets all tokens of a region attend to all tokens of its chosen regions, this is
    bi-level routing attention. Choosing is not differentiable.

    Args:
        query, key: (B, heads, *space, D); all heads share one choice.
        region_size: as in `region_scores`.
        count: regions that a region attends to; all, where there are fewer.

    Returns: Selection, the best region first; equal scores go to the lower region.

    >>> import torch
    >>> x = torch.tensor([1.0, 3.0, 0.0, 2.0]).reshape(1, 1, 4, 1)
    >>> route_regions(x, x, 2, 1).blocks.flatten()  # both prefer the first region
    tensor([0, 0])
    """
    check_positive(count=count)
    scores = region_scores(query, key, region_size)
    return select_top_k(scores, count, query_block=region_size, key_block=region_size, ragged=True)
