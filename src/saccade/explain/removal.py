"""One engine for every test that removes pixels: any order, any filler, any readout, one forward pass a batch of pairs.

Pixels go in square patches. An order is a table of ranks (which patch goes first); a removal is a comparison of ranks
with a count, so that no mask is stored. The images with nothing and with everything removed run once for all orders.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

__all__ = ["FILLERS", "blur_mirrored", "patch_areas", "patch_relevance", "rank", "removal_curves", "remove"]


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


def blur_mirrored(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `sigma` pixels, cut at 4 sigma, of an image mirrored at its edges as often as that takes."""
    radius = int(4 * sigma + 0.5)
    steps = torch.arange(-radius, radius + 1, device=images.device)
    weights = torch.softmax(-(steps.to(images.dtype) ** 2) / (2 * sigma**2), 0)
    rows, columns = (_mirrored_filter(side, steps, weights) for side in images.shape[-2:])
    return rows @ images @ columns.mT


def _mirrored_filter(side: int, steps: Tensor, weights: Tensor) -> Tensor:
    """(side, side), whose row i holds the weights of the pixels that are seen from i: d c b a | a b c d | d c b a."""
    seen = (torch.arange(side, device=steps.device)[:, None] + steps) % (2 * side)
    seen = torch.where(seen < side, seen, 2 * side - 1 - seen)
    return weights.new_zeros(side, side).scatter_add_(1, seen, weights.expand(side, -1))


def patch_areas(size: torch.Size, patch: int) -> Tensor:
    """(P,), pixels of each patch of an image (H, W): less at the border where `patch` does not divide it."""
    sides = [
        (torch.arange(0, length, patch) + patch).clamp(max=length) - torch.arange(0, length, patch) for length in size
    ]
    return (sides[0][:, None] * sides[1]).flatten().double()


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
        batch_size: the most images in one call of `readout`, which must not keep them: the next call finds others in
            their place.

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
    jobs = torch.arange(batch * orders * len(middle), device=device)
    room = images.new_empty(min(batch_size, len(jobs)), *images.shape[1:])  # one for all batches: memory is what costs
    for job in jobs.split(batch_size):
        owner, order, step = torch.unravel_index(job, (batch, orders, len(middle)))
        pixels = _to_pixels(ranks[owner, order] < middle[step, None], patch, images.shape[-2:])
        part, start = room[: len(job)], 0
        for image, count in zip(*(each.tolist() for each in owner.unique_consecutive(return_counts=True))):
            here = slice(start, start + count)
            torch.where(pixels[here], filled[image], images[image], out=part[here])
            start += count
        values.append(readout(part, owner))
    curves[:, :, 1:-1] = torch.cat(values).view(batch, orders, len(middle), *rest)
    return curves


def remove(images: Tensor, filled: Tensor, gone: Tensor, patch: int) -> Tensor:
    """Images (n, C, H, W) with the patches of `gone` (n, P) as in `filled`."""
    return torch.where(_to_pixels(gone, patch, images.shape[-2:]), filled, images)


def _to_pixels(patches: Tensor, patch: int, size: torch.Size) -> Tensor:
    """(n, P) of patches as (n, 1, H, W) of pixels."""
    height, width = size
    grid = patches.unflatten(1, (-(-height // patch), -(-width // patch)))[:, None]
    return grid.repeat_interleave(patch, 2).repeat_interleave(patch, 3)[..., :height, :width]
