"""Do sums of a map over pixels say how far the answer falls when these pixels go? Sensitivity-n and infidelity."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.errors import InputError, check_choice
from saccade.explain.attribute import Explanation
from saccade.explain.classifier import check_images, check_whole, evaluating
from saccade.explain.maps import read_asked, read_maps
from saccade.explain.question import Classes
from saccade.explain.removal import FILLERS, patch_areas, patch_relevance, rank, removal_curves
from saccade.explain.score import Score, check_confidence, correlate, draw_resamples, summarize

__all__ = ["Additivity", "additivity"]


@dataclass(frozen=True)
class Additivity:
    """What `additivity` measured, over random sets of patches and as a mean over their sizes.

    Attributes:
        sensitivity_n: correlation in [-1, 1] of the map's sum over a set with the fall of the answer without it, among
            sets of one size; 1 is perfect, and the map's unit does not matter.
        infidelity: mean square of sum minus fall, over the mean square of the fall; 0 is perfect. With `scale`
            "fitted" each image's map is first multiplied by the number that fits best, and the result lies in [0, 1].
        fractions: (K,), share of the patches in the sets of each size.
        by_fraction: (B, K), sensitivity-n of each image and size.
        target, against: the question whose answer was read, in logits, as in `Explanation`.
        scale, filler, patch, subsets, seed: the settings that were used, defaults resolved.
    """

    sensitivity_n: Score
    infidelity: Score
    fractions: Tensor
    by_fraction: Tensor
    target: Tensor
    against: Tensor | None
    scale: str
    filler: str
    patch: int
    subsets: int
    seed: int


def additivity(
    model: nn.Module,
    images: Tensor,
    explanation: Explanation | Tensor,
    *,
    target: Classes | None = None,
    against: Classes | None = None,
    oracle: Tensor | None = None,
    fractions: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    subsets: int = 32,
    scale: str = "fitted",
    filler: str = "zero",
    patch: int | None = None,
    repeats: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    confidence: float = 0.95,
) -> Additivity:
    """Remove random sets of patches and hold the fall of the answer's logit against the map's sums over them.

    Sensitivity-n is that of Ancona et al. (2018, arXiv:1711.06104), infidelity that of Yeh et al. (2019,
    arXiv:1901.09392) with removal as its perturbation. Random maps are the map with its patches shuffled: they need no
    further forward pass, and neither does the oracle. An image costs subsets x sizes + 2 passes.

    Args:
        model, images, explanation, target, against, oracle, filler, patch, batch_size, confidence: as in
            `faithfulness`.
        fractions: sizes of the sets, as shares of the patches, between 0 and 1; each at least one patch.
        subsets: random sets of each size an image, at least 3.
        scale: of the map in `infidelity`: "fitted", or "given" for maps in logits that should sum to the fall.
        repeats: shuffled maps an image; None takes 32 in all, at least 3 an image.
        seed: of sets, shuffling and intervals.

    Raises: InputError for wrong arguments; WorkError when the model gives NaN.
    """
    check_images(images)
    maps = read_maps(explanation, images)
    known = None if oracle is None else read_maps(oracle, images, "oracle")
    side = min(images.shape[-2:])
    patch = max(1, round(side / 16)) if patch is None else patch
    repeats = max(3, math.ceil(32 / len(images))) if repeats is None else repeats
    check_choice("filler", filler, FILLERS)
    check_choice("scale", scale, ("fitted", "given"))
    check_whole("patch", patch, 1, side)
    check_whole("subsets", subsets, 3)
    for name, value in {"repeats": repeats, "batch_size": batch_size}.items():
        check_whole(name, value)
    if not len(fractions) or not all(0 < fraction < 1 for fraction in fractions):
        raise InputError(f"fractions are {tuple(fractions)}: give at least one share between 0 and 1")
    check_confidence(confidence, repeats, len(images))

    generator = torch.Generator().manual_seed(seed)
    areas = patch_areas(images.shape[-2:], patch)
    relevance = patch_relevance(maps, patch) * areas
    total = relevance.shape[1]
    if total < 2:
        raise InputError(f"patch is {patch}: one patch covers the {side}-pixel image, and a set needs others beside it")
    sizes = sorted({min(total - 1, max(1, round(fraction * total))) for fraction in fractions})
    ranks = rank(relevance.new_zeros(len(images), subsets, total), generator)
    places = torch.rand(len(images), repeats, total, generator=generator).argsort(-1)
    candidates = [relevance[:, None], relevance[:, None].expand_as(places).gather(-1, places)]
    if known is not None:
        candidates.append((patch_relevance(known, patch) * areas)[:, None])
    with evaluating(model, grad=False) as classify:
        question = read_asked(explanation, target, against, classify, images, batch_size)
        answers = removal_curves(
            lambda part, owner: (classify(part).cpu().double() * question.weights[owner].cpu()).sum(1),
            images,
            FILLERS[filler](images),
            ranks.to(images.device),
            torch.tensor([0, *sizes, total]),
            patch=patch,
            batch_size=batch_size,
        )
    fall = (answers[..., :1] - answers[..., 1:-1])[:, None]  # (B, 1, subsets, K)
    removed = (ranks[..., None, :] < torch.tensor(sizes)[:, None]).double()  # (B, subsets, K, P)
    sums = torch.einsum("bskp,bcp->bcsk", removed, torch.cat(candidates, 1))
    together = correlate(sums.movedim(2, -1), fall.movedim(2, -1))  # (B, candidates, K)
    apart = _infidelity(sums, fall, scale).mean(-1)
    draws = draw_resamples(len(images), generator)

    def score(numbers: Tensor) -> Score:
        last = None if known is None else numbers[:, -1]
        return summarize(numbers[:, 0], numbers[:, 1 : 1 + repeats], draws, confidence, last)

    return Additivity(
        sensitivity_n=score(together.mean(-1)),
        infidelity=score(apart),
        fractions=torch.tensor(sizes).double() / total,
        by_fraction=together[:, 0],
        target=question.target,
        against=question.against,
        scale=scale,
        filler=filler,
        patch=patch,
        subsets=subsets,
        seed=seed,
    )


def _infidelity(sums: Tensor, fall: Tensor, scale: str) -> Tensor:
    """(B, candidates, K); where nothing falls, a map that sums to 0 is perfect and any other is as wrong as none."""
    product, ours, theirs = ((a * b).sum(2) for a, b in ((sums, fall), (sums, sums), (fall, fall)))
    factor = torch.ones_like(product)
    if scale == "fitted":
        factor = product / torch.where(ours > 0, ours, 1)
    missed = ((factor[:, :, None] * sums - fall) ** 2).sum(2)
    flat = (ours > 0).double()
    return torch.where(theirs > 0, missed / torch.where(theirs > 0, theirs, 1), flat)
