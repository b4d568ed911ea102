"""One engine for every test that removes pixels: any order, any filler, any readout, one forward pass a batch of pairs.

Pixels go in square patches. An order is a table of ranks (which patch goes first); a removal is a comparison of ranks
with a count, so that no mask is stored. The images with nothing and with everything removed run once for all orders.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

__all__ = ["FILLERS", "patch_relevance", "rank", "removal_curves"]


def _blur(images: Tensor) -> Tensor:
    """Gaussian blur with a sigma of an eighth of the shorter side, borders replicated: keeps colour, loses shape."""
    sigma = max(1.0, min(images.shape[-2:]) / 8)
    radius = math.ceil(2 * sigma)
    steps = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = torch.softmax(-(steps**2) / (2 * sigma**2), 0)
    planes = pad(images.flatten(0, 1)[:, None], (radius,) * 4, mode="replicate")
    return conv2d(conv2d(planes, kernel[None, None, None]), kernel[None, None, :, None]).view_as(images)


FILLERS: dict[str, Callable[[Tensor], Tensor]] = {
    "blur": _blur,
    "mean": lambda images: images.mean((2, 3), keepdim=True).expand_as(images),
    "zero": torch.zeros_like,
}


def patch_relevance(maps: Tensor, patch: int) -> Tensor:
    """Means of maps (B, H, W) over squares of `patch` pixels, cut at the border: (B, patches), row by row."""
    return avg_pool2d(maps[:, None], patch, ceil_mode=True).flatten(1)


def rank(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Place of each score when its row is sorted from large to small: (..., P) from 0; ties in random order."""
    shuffle = torch.rand(scores.shape, generator=generator).argsort(-1).to(scores.device)
    order = shuffle.gather(-1, scores.gather(-1, shuffle).argsort(stable=True, dim=-1, descending=True))
    return order.argsort(-1)


def removal_curves(
    readout: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    filled: Tensor,
    ranks: Tensor,
    counts: Tensor,
    *,
    patch: int,
    batch_size: int,
) -> Tensor:
    """What the readout says while patches of the images become those of `filled`, in each order.

    Args:
        readout: (images (n, C, H, W), index (n,) of the image that each comes from) -> (n, ...) numbers.
        images, filled: (B, C, H, W), the whole images and those with everything removed.
        ranks: (B, orders, P) from `rank`; rank 0 goes first.
        counts: (K + 1,) patches removed at each step, rising from 0 to P.
        patch: side of a patch in pixels; P = ceil(H / patch) * ceil(W / patch).
        batch_size: the most images in one call of `readout`.

    Returns: (B, orders, K + 1, ...).
    """
    batch, orders, _ = ranks.shape
    device = images.device
    owners = torch.arange(batch, device=device)
    ends = [torch.cat([readout(whole[part], part) for part in owners.split(batch_size)]) for whole in (images, filled)]
    rest = ends[0].shape[1:]
    curves = ends[0].new_empty(batch, orders, len(counts), *rest)
    curves[:, :, 0], curves[:, :, -1] = ends[0][:, None], ends[1][:, None]

    middle = counts[1:-1].to(device)
    values = [curves.new_empty(0, *rest)]
    for job in torch.arange(batch * orders * len(middle), device=device).split(batch_size):
        owner, order, step = torch.unravel_index(job, (batch, orders, len(middle)))
        gone = ranks[owner, order] < middle[step, None]
        pixels = _to_pixels(gone, patch, images.shape[-2:])
        values.append(readout(torch.where(pixels, filled[owner], images[owner]), owner))
    curves[:, :, 1:-1] = torch.cat(values).view(batch, orders, len(middle), *rest)
    return curves


def _to_pixels(patches: Tensor, patch: int, size: torch.Size) -> Tensor:
    """(n, P) of patches as (n, 1, H, W) of pixels."""
    height, width = size
    grid = patches.unflatten(1, (-(-height // patch), -(-width // patch)))[:, None]
    return grid.repeat_interleave(patch, 2).repeat_interleave(patch, 3)[..., :height, :width]
