"""Does a map lie where the evidence is known to be?"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.errors import InputError
from saccade.explain.attribute import Explanation
from saccade.explain.classifier import check_whole
from saccade.explain.removal import rank
from saccade.explain.score import Score, check_confidence, draw_resamples, summarize

__all__ = ["Localization", "localization"]


@dataclass(frozen=True)
class Localization:
    """What `localization` measured: shares in [0, 1], large is good; a map without relation to the mask has the mask's
    share of the image in all three.

    Attributes:
        mass: share of the map's positive part that lies inside the mask.
        pointing: whether the largest value does (the pointing game); of several, the share that does.
        top: share of the mask's number of most relevant pixels that lie inside (relevance rank accuracy).
        area: mean share of the image that the masks cover.
    """

    mass: Score
    pointing: Score
    top: Score
    area: float


def localization(
    explanation: Explanation | Tensor,
    masks: Tensor,
    *,
    repeats: int | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> Localization:
    """Hold maps against masks of the true evidence, such as those of `saccade.data.known_evidence`.

    Random maps are the map itself with its places shuffled; the oracle is the mask.

    Args:
        explanation: from `explain`, or a map (B, H, W) where large means relevant.
        masks: (B, H, W) booleans, with at least one pixel in and one out of each.
        repeats: random maps an image; None takes 32 in all, at least 3 an image.
        seed: of random maps, ties and intervals.
        confidence: of all intervals.

    Raises: InputError for wrong arguments.

    >>> mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    >>> mask[:, 1:3, 1:3] = True
    >>> found = localization(mask + 0.25, mask)
    >>> round(found.mass.value, 3), found.pointing.value, found.top.value, found.area
    (0.625, 1.0, 1.0, 0.25)
    """
    maps = explanation.map if isinstance(explanation, Explanation) else explanation
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool or masks.ndim != 3:
        given = f"{masks.dtype} of shape {tuple(masks.shape)}" if isinstance(masks, Tensor) else type(masks).__name__
        raise InputError(f"masks are {given}: give booleans (B, H, W), true where the evidence is")
    if not isinstance(maps, Tensor) or maps.shape != masks.shape or not maps.isfinite().all():
        given = f"{tuple(maps.shape)}" if isinstance(maps, Tensor) else type(maps).__name__
        raise InputError(f"the map is {given} but the masks are {tuple(masks.shape)}: give one finite value a pixel")
    inside = masks.flatten(1).cpu()
    if not (inside.any(1) & ~inside.all(1)).all():
        raise InputError("a mask covers nothing, or the whole image: it cannot tell a right map from a wrong one")
    repeats = max(3, math.ceil(32 / len(masks))) if repeats is None else repeats
    check_whole("repeats", repeats)
    check_confidence(confidence, repeats, len(masks))

    generator = torch.Generator().manual_seed(seed)
    values = maps.detach().flatten(1).cpu().double()
    places = torch.rand(len(masks), repeats, values.shape[1], generator=generator).argsort(-1)
    chance = values[:, None].expand_as(places).gather(-1, places)
    candidates = torch.cat([values[:, None], inside.double()[:, None], chance], 1)  # (B, 2 + repeats, P)
    draws = draw_resamples(len(masks), generator)

    def score(numbers: Tensor) -> Score:
        return summarize(numbers[:, 0], numbers[:, 2:], draws, confidence, numbers[:, 1])

    within = inside[:, None]
    return Localization(
        mass=score(_mass(candidates, within)),
        pointing=score(_mean_inside(candidates == candidates.amax(-1, keepdim=True), within)),
        top=score(_mean_inside(rank(candidates, generator) < inside.sum(1)[:, None, None], within)),
        area=inside.double().mean().item(),
    )


def _mass(candidates: Tensor, within: Tensor) -> Tensor:
    """Share of the positive part inside; nowhere positive counts as everywhere the same."""
    positive = candidates.clamp(min=0)
    positive = torch.where(positive.any(-1, keepdim=True), positive, 1)
    return (positive * within).sum(-1) / positive.sum(-1)


def _mean_inside(chosen: Tensor, within: Tensor) -> Tensor:
    return (chosen & within).sum(-1).double() / chosen.sum(-1)
