"""Four scores for four questions (RFxG, arXiv:2511.13081): why a class, why not another, why a group, why not another.

Each is the area under a curve of probabilities while the most relevant pixels go, read out in its own way.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from saccade.errors import InputError, check_choice
from saccade.explain.attribute import Explanation
from saccade.explain.classifier import check_images, check_whole, evaluating, read_target
from saccade.explain.maps import read_maps
from saccade.explain.question import Classes, group_mask
from saccade.explain.removal import FILLERS, blur_mirrored, patch_relevance, rank, removal_curves
from saccade.explain.score import Score, check_confidence, draw_resamples, summarize

__all__ = ["FrameScores", "frame_scores"]

_ALPHAS = np.linspace(0.1, 0.9, 9)
_NAMES = ("ccs", "cgc", "pgs", "cgs")


@dataclass(frozen=True)
class FrameScores:
    """What `frame_scores` measured: areas over the removed share from 0.1 to 0.9, not divided by that width.

    An area is at most 0.8, either way. Removal of nothing and of all is not on the curve, so areas of other libraries,
    and those of `faithfulness`, are on another scale.

    Attributes:
        ccs: class contrastive score, the area of p[A] - p[B]: small is good.
        cgc: class-group contrast, of what A and its group lost, or with `combine` "difference" of what A lost more than
            the group's other members: small is good, both ways.
        pgs: pointwise group score, of the fall of the group's mean probability: large is good.
        cgs: contrastive group score, of what both groups lost, or with "difference" of what the first lost more than
            the second: small is good, both ways.
        curves: name -> (B, 9), of the scores that were asked for.
        alphas: (9,), share of removed pixels.
        combine, filler, patch, repeats, seed: the settings that were used.
    """

    ccs: Score
    cgc: Score | None
    pgs: Score | None
    cgs: Score | None
    curves: dict[str, Tensor]
    alphas: Tensor
    combine: str
    filler: str
    patch: int
    repeats: int
    seed: int


def frame_scores(
    model: nn.Module,
    images: Tensor,
    explanation: Explanation | Tensor,
    *,
    target: int | Tensor,
    against: int | Tensor,
    group: Classes | None = None,
    group_against: Classes | None = None,
    combine: str = "sum",
    filler: str = "zero",
    sigma: float = 5.0,
    patch: int = 1,
    oracle: Tensor | None = None,
    repeats: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    confidence: float = 0.95,
) -> FrameScores:
    """Score a map by each of the four questions, beside random orders, in one set of forward passes.

    Args:
        model, images, explanation, oracle, batch_size, seed, confidence: as in `faithfulness`.
        target, against: the classes A and B, one or (B,) of them.
        group: the classes G_A, for cgc and pgs, a set or (B, classes) booleans.
        group_against: the classes G_B, for cgs.
        combine: "sum" adds the two terms of cgc and cgs, as the paper's code does; "difference" takes the second from
            the first, which is a contrast, and leaves A out of its group.
        filler: what removed pixels become: "zero"; "blur", Gaussian with `sigma` and mirrored borders as in the paper;
            "mean" of each channel; "noise", uniform in [0, 1].
        sigma: of the blur, in pixels.
        patch: side of the squares that go together; the paper takes single pixels.
        repeats: random orders an image; None takes 32 in all, at least 3 an image.

    Raises: InputError for wrong arguments; WorkError when the model gives NaN.
    """
    check_images(images)
    maps = read_maps(explanation, images)
    known = None if oracle is None else read_maps(oracle, images, "oracle")
    repeats = max(3, math.ceil(32 / len(images))) if repeats is None else repeats
    check_choice("combine", combine, ("difference", "sum"))
    check_choice("filler", filler, ("blur", "mean", "noise", "zero"))
    check_whole("patch", patch, 1, min(images.shape[-2:]))
    for name, value in {"repeats": repeats, "batch_size": batch_size}.items():
        check_whole(name, value)
    if not 0 < sigma < math.inf:
        raise InputError(f"sigma is {sigma}: give the blur's width in pixels, above 0")
    check_confidence(confidence, repeats, len(images))

    generator = torch.Generator().manual_seed(seed)
    orders = [rank(patch_relevance(maps, patch), generator)[:, None]]
    equal = torch.zeros(len(images), repeats, orders[0].shape[-1])
    orders.append(rank(equal, generator))
    if known is not None:
        orders.append(rank(patch_relevance(known, patch), generator)[:, None])
    ranks = torch.cat(orders, 1)
    total = ranks.shape[-1]
    counts = torch.tensor([0, *(int(alpha * total) for alpha in _ALPHAS), total])
    with evaluating(model, grad=False) as classify:
        sides = [
            read_target(each, classify, images, batch_size, n) for each, n in ((target, "target"), (against, "against"))
        ]
        num_classes = classify(images[:1]).shape[1]
        groups = [
            None if each is None else group_mask(n, each, num_classes, images)
            for each, n in ((group, "group"), (group_against, "group_against"))
        ]
        names, weights = _readouts(sides, groups, num_classes, combine)
        curves = removal_curves(
            lambda part, owner: torch.einsum(
                "nk,nrk->nr", classify(part).cpu().double().softmax(1), weights[owner.cpu()]
            ),
            images,
            _fill(filler, images, sigma, generator),
            ranks.to(images.device),
            counts,
            patch=patch,
            batch_size=batch_size,
        )
    against_whole = torch.tensor([name != "ccs" for name in names])
    shown = curves[:, :, 1:-1] - curves[:, :, :1] * against_whole  # (B, orders, 9, readouts)
    areas = torch.trapezoid(shown, torch.from_numpy(_ALPHAS), dim=2)
    draws = draw_resamples(len(images), generator)
    scores: dict[str, Score | None] = dict.fromkeys(_NAMES)
    for at, name in enumerate(names):
        column = areas[..., at]
        last = None if known is None else column[:, -1]
        scores[name] = summarize(column[:, 0], column[:, 1 : 1 + repeats], draws, confidence, last)
    return FrameScores(
        **scores,  # type: ignore[arg-type]
        curves={name: shown[:, 0, :, at] for at, name in enumerate(names)},
        alphas=torch.from_numpy(_ALPHAS.copy()),
        combine=combine,
        filler=filler,
        patch=patch,
        repeats=repeats,
        seed=seed,
    )


def _readouts(
    sides: list[Tensor], groups: list[Tensor | None], num_classes: int, combine: str
) -> tuple[list[str], Tensor]:
    """Names of the scores, and (B, scores, classes) weights of the probabilities that each curve sums."""
    one, other = (nn.functional.one_hot(each, num_classes).double().cpu() for each in sides)
    own, foreign = (None if each is None else each.double().cpu() for each in groups)
    rows = {"ccs": one - other}
    if own is not None:
        members = own if combine == "sum" else own * (1 - one)
        if not members.any(1).all():
            raise InputError("group holds no class beside target: the contrast within a group needs another member")
        rows["cgc"] = 0.5 * (one + (1 if combine == "sum" else -1) * _mean(members))
        rows["pgs"] = -_mean(own)
        if foreign is not None:
            rows["cgs"] = 0.5 * (_mean(own) + (1 if combine == "sum" else -1) * _mean(foreign))
    elif foreign is not None:
        raise InputError("group_against is given without group: a contrast of groups needs both")
    return list(rows), torch.stack(list(rows.values()), 1)


def _mean(mask: Tensor) -> Tensor:
    return mask / mask.sum(1, keepdim=True)


def _fill(filler: str, images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    if filler == "blur":
        return blur_mirrored(images, sigma)
    if filler == "noise":
        return torch.rand(images.shape, generator=generator, dtype=images.dtype).to(images.device)
    return FILLERS[filler](images)
