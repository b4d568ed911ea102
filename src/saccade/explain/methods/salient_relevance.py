"""Salient Relevance (Li et al., 2017, arXiv:1712.08268): what stands out in a map of relevance.

Relevance marks dots; what stands out of the map, seen as an image, are areas. The second step is context-aware
saliency (Goferman, Zelnik-Manor and Tal, 2010), and serves the map of any method.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad, unfold

from saccade.errors import InputError, check_choice
from saccade.explain.classifier import Classifier, check_whole
from saccade.explain.methods.attribution import Attribution, enlarge
from saccade.explain.methods.normgrad import stretch
from saccade.explain.methods.operations import trace_images

if TYPE_CHECKING:
    from saccade.explain.relevance import On, Recipe

__all__ = ["context_aware_saliency", "salient_relevance"]

_SCALES = (1.0, 0.8, 0.5, 0.3)
_PARTS = {"absolute": torch.abs, "positive": torch.relu}


def salient_relevance(
    classify: Classifier,
    images: Tensor,
    target: Tensor,
    *,
    batch_size: int,
    recipe: "str | Recipe" = "salient_relevance",
    rules: "Sequence[On]" = (),
    part: str = "absolute",
    patch: int = 7,
    neighbours: int = 64,
    scales: Sequence[float] = _SCALES,
    stride: int | None = None,
    size: int = 250,
) -> Attribution:
    """Areas of attention: context-aware saliency of the map of relevance, whose channels are its colours.

    Without sign or unit, 0 to 1. Patches that differ from those most like them, near ones above all, stand out.

    Args:
        recipe, rules: of the relevance, as in the method of that name.
        part: "absolute", as published, where relevance below 0 draws attention too; "positive" leaves it out.
        patch, neighbours, scales, stride, size: see `saccade.explain.context_aware_saliency`.

    Raises: InputError for wrong options.
    """
    check_choice("part", part, _PARTS)
    found = trace_images(classify, images, target, batch_size, recipe, rules).map
    map = context_aware_saliency(
        _PARTS[part](found), patch=patch, neighbours=neighbours, scales=scales, stride=stride, size=size
    )
    return Attribution(map)


@torch.no_grad()
def context_aware_saliency(
    maps: Tensor,
    *,
    patch: int = 7,
    neighbours: int = 64,
    scales: Sequence[float] = _SCALES,
    stride: int | None = None,
    nearness: float = 3.0,
    focus: float | None = 0.8,
    size: int = 250,
    pairs: int = 2**22,
) -> Tensor:
    """Say of each pixel how much the patch around it differs from the patches most like it, wherever they are.

    At each scale r a pixel's saliency is 1 - exp(-mean d) over the `neighbours` patches with the smallest d among those
    at r, r / 2 and r / 4, with d = |difference of the patches| / (1 + `nearness` distance of their centres). It is then
    stretched to 0..1, falls with the distance from the nearest focus, and the mean over scales is taken. Differences
    are in units of the largest that the range of the map allows, distances in units of its longer side. The numbers
    are recalled from the cited paper; there, patches have colours of CIE Lab, where a map has its channels as they are.

    Args:
        maps: (B, H, W) or (B, C, H, W), of any method and scale. The sign counts: give `map.abs()` or `map.relu()`
            where it should not.
        patch: pixels of a patch's side, odd; beyond the border the map goes on as it ends.
        neighbours: K; fewer where there are fewer patches.
        scales: r, above 0 and at most 1.
        stride: pixels between the centres of patches, at each scale; between them saliency is interpolated. None takes
            half a patch, which takes 4 s for 224 x 224 pixels on one core; 1 looks at every pixel, for up to 81 times
            that.
        nearness: c, how much less a difference counts far away.
        focus: saliency above which a pixel is a focus of attention; None leaves the foci out.
        size: longer side in pixels down to which larger maps are resized first.
        pairs: of patches that are compared at once, which bounds memory.

    Returns: (B, H, W), from 0 to 1, in the dtype of the maps; 0 where a map is the same everywhere.
    Raises: InputError for wrong arguments.

    >>> map = torch.zeros(1, 24, 24)
    >>> map[:, 6:10, 6:10] = 1
    >>> found = context_aware_saliency(map, patch=3, neighbours=16)
    >>> [index.item() for index in torch.unravel_index(found.argmax(), found.shape)][1] in range(4, 12)
    True
    """
    _check(maps, patch, neighbours, scales, stride, nearness, focus, size, pairs)
    stride = max(1, patch // 2) if stride is None else stride
    found = []
    for image in maps.double() if maps.ndim == 4 else maps.double()[:, None]:
        height, low = image.amax() - image.amin(), image.amin()
        if not stretch(image.flatten()[None]).any():  # the same everywhere, up to rounding
            found.append(image.new_zeros(image.shape[1:]))
            continue
        image = _resize((image - low) / height, min(1.0, size / max(image.shape[1:])))
        each = []
        for scale in scales:
            levels = [_cut(image, scale / part, patch, stride) for part in (1, 2, 4)]
            alone = _compare(levels, neighbours, nearness, pairs).view(levels[0].shape)
            saliency = stretch(enlarge(alone[None], maps.shape[-2:]))[0]
            each.append(saliency if focus is None else saliency * (1 - _distance(saliency > focus)).clamp(min=0))
        found.append(torch.stack(each).mean(0))
    return torch.stack(found).to(maps.dtype)


class _Level(NamedTuple):
    """Patches (N, C * patch ** 2), their centres (N, 2), and how many rows and columns of them there are."""

    patches: Tensor
    centres: Tensor
    shape: tuple[int, int]


def _resize(image: Tensor, scale: float) -> Tensor:
    """(C, H, W) at a scale of at most 1, at least a pixel a side."""
    size = [max(1, round(side * scale)) for side in image.shape[1:]]
    if size == list(image.shape[1:]):
        return image
    return interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def _cut(image: Tensor, scale: float, patch: int, stride: int) -> _Level:
    """The patches of an image at a scale; centres in units of its longer side, so that scales share them."""
    image = _resize(image, scale)
    sides = image.shape[1:]
    places = []
    for side in sides:
        count = math.ceil(side / stride)
        places.append(((torch.arange(count, device=image.device) + 0.5) * side / count).long())
    columns = unfold(pad(image[None], (patch // 2,) * 4, mode="replicate"), patch)[0]  # (C * patch ** 2, H * W)
    chosen = (places[0][:, None] * sides[1] + places[1]).flatten()
    y, x = ((place + 0.5) / max(sides) for place in places)
    centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1).to(image)
    return _Level(columns.T[chosen], centres, (len(y), len(x)))


def _compare(levels: list[_Level], neighbours: int, nearness: float, pairs: int) -> Tensor:
    """(N,) saliency of the patches of the first level, each compared with all but itself."""
    patches, centres = torch.cat([level.patches for level in levels]), torch.cat([level.centres for level in levels])
    count = len(levels[0].patches)
    rows = max(1, pairs // len(patches))
    saliency = []
    for start in range(0, count, rows):
        own = slice(start, min(count, start + rows))
        apart = torch.cdist(patches[own], patches) / patches.shape[1] ** 0.5
        apart /= 1 + nearness * torch.cdist(centres[own], centres)
        index = torch.arange(own.start, own.stop, device=apart.device)
        apart[index - start, index] = torch.inf
        nearest = apart.topk(min(neighbours, len(patches) - 1), largest=False).values
        saliency.append(1 - (-nearest.mean(1)).exp())
    return torch.cat(saliency)


def _distance(foci: Tensor) -> Tensor:
    """(H, W), exact, from each pixel to the nearest true one, in units of the longer side: along rows, then across."""
    height, width = foci.shape
    column = torch.arange(width, device=foci.device, dtype=torch.double)
    before = torch.where(foci, column, -torch.inf).cummax(1).values
    after = -torch.where(foci, -column, -torch.inf).flip(1).cummax(1).values.flip(1)
    along = torch.minimum(column - before, after - column).square()  # infinite in rows without a focus
    row = torch.arange(height, device=foci.device, dtype=torch.double)
    nearest = torch.stack([(along + (row - own).square()[:, None]).amin(0) for own in row])
    return nearest.sqrt() / max(height, width)


def _check(
    maps: Tensor,
    patch: int,
    neighbours: int,
    scales: Sequence[float],
    stride: int | None,
    nearness: float,
    focus: float | None,
    size: int,
    pairs: int,
) -> None:
    if not isinstance(maps, Tensor) or maps.ndim not in (3, 4) or not maps.numel() or not maps.is_floating_point():
        given = f"{maps.dtype} {tuple(maps.shape)}" if isinstance(maps, Tensor) else f"a {type(maps).__name__}"
        raise InputError(f"the maps are {given}: give floats (B, H, W) or (B, C, H, W), such as explanation.map")
    if not maps.isfinite().all():
        raise InputError("the maps hold NaN or infinite values: nothing can be compared with them")
    check_whole("patch", patch)
    if patch % 2 == 0:
        raise InputError(f"patch is {patch}: give an odd number, so that a pixel is its centre")
    check_whole("neighbours", neighbours)
    check_whole("size", size)
    check_whole("pairs", pairs)
    if stride is not None:
        check_whole("stride", stride)
    if not scales or not all(0 < scale <= 1 for scale in scales):
        raise InputError(f"scales are {tuple(scales)}: give one or more numbers above 0 and at most 1")
    if not 0 <= nearness < math.inf:
        raise InputError(f"nearness is {nearness}: give a number of at least 0")
    if focus is not None and not 0 < focus < 1:
        raise InputError(f"focus is {focus}: give a number between 0 and 1, or None to leave the foci out")
