"""Does a map name the pixels that the model's answer rests on? Removal in the map's order beside random orders."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.errors import InputError, check_choice
from saccade.explain.attribute import Explanation
from saccade.explain.classifier import Classifier, check_images, check_whole, evaluating, read_target
from saccade.explain.removal import FILLERS, patch_relevance, rank, removal_curves

__all__ = ["Faithfulness", "Score", "faithfulness"]

_RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """A mean over images, the same for random orders, and their difference, each with a bootstrap interval.

    Attributes:
        value, low, high: mean over images, and its interval over images; a single image gives an interval without
            width.
        random, random_low, random_high: mean over images and random orders; the interval is that of one random order
            an image.
        difference, difference_low, difference_high: value - random, where each image meets its own random orders; the
            interval is over images and, for each, over its random orders, so that it has a width for a single image
            too.
    """

    value: float
    low: float
    high: float
    random: float
    random_low: float
    random_high: float
    difference: float
    difference_low: float
    difference_high: float


@dataclass(frozen=True)
class Faithfulness:
    """What `faithfulness` measured.

    Areas are means of the target's softmax probability over the removed fraction x from 0 to 1: they compare maps of
    the same model on the same images with the same filler, steps and patch, and nothing else; other libraries scale
    otherwise.

    Attributes:
        deletion: area while the most relevant patches are removed first, in [0, 1]; small is good.
        insertion: area while the most relevant patches are put into the filled image first, in [0, 1]; large is good.
        abpc: area between the curves that remove the least and the most relevant first, in [-1, 1]; 0 is a random map.
            It equals insertion - deletion, since inserting is removing the least relevant first, read backwards.
        verdict: "better than random", "worse than random" or "not distinguishable from random", by the side of 0 on
            which the interval of `abpc`'s difference lies. At confidence 0.95 about 7 % of meaningless maps of a single
            image, and 2 % of those of 16 images, are told from random.
        fractions: (K + 1,), the removed fraction of patches at each step.
        deletion_curves, insertion_curves, random_curves: (B, K + 1), probabilities at these fractions (removed;
            inserted; removed in random order, mean over orders).
        target: (B,) the classes whose probability was read.
        filler, patch, repeats, seed, confidence: the settings that were used, defaults resolved.
        seconds: time it took.
    """

    deletion: Score
    insertion: Score
    abpc: Score
    verdict: str
    fractions: Tensor
    deletion_curves: Tensor
    insertion_curves: Tensor
    random_curves: Tensor
    target: Tensor
    filler: str
    patch: int
    repeats: int
    seed: int
    confidence: float
    seconds: float


def faithfulness(
    model: nn.Module,
    images: Tensor,
    explanation: Explanation | Tensor,
    *,
    target: int | Tensor | None = None,
    steps: int = 20,
    filler: str = "blur",
    patch: int | None = None,
    repeats: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    confidence: float = 0.95,
) -> Faithfulness:
    """Measure how the target's probability falls as pixels are removed in a map's order, beside random orders.

    Deletion and insertion are those of Petsiuk et al. (2018, arXiv:1806.07421), ABPC, the area between perturbation
    curves, compares most- with least-relevant-first (Samek et al., 2017, arXiv:1509.06321).

    Args:
        model: maps (B, 3, H, W) to logits (B, classes); runs in eval mode without gradients, and is left as it was.
        images: (B, 3, H, W), normalised floats, at least one.
        explanation: from `explain`, or a map (B, H, W) where large means relevant. Equal values are ordered at random.
        target: class index or (B,) of them; None takes the explanation's, or for a bare map the predicted classes.
        steps: steps from the whole image to the filled one; at most one a patch.
        filler: what removed pixels become: "blur" (sigma of an eighth of the shorter side: stays closest to real
            images), "mean" (of the image, each channel) or "zero" (the training images' mean colour).
        patch: side in pixels of the squares that go together; None takes a sixteenth of the shorter side, about 256
            squares an image. Single pixels seldom move a network.
        repeats: random orders an image, each also used backwards; None takes 32 in all, at least 3 an image.
        batch_size: the most images in one forward pass. An image costs 2 (repeats + 1)(steps - 1) + 2 of them.
        seed: of random orders, ties and intervals; the same seed gives the same numbers whatever the batch size.
        confidence: of all intervals.

    Returns: Faithfulness.
    Raises: InputError for wrong arguments, and where images and repeats are too few to support `confidence`; WorkError
        when the model gives NaN.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
    >>> _ = nn.init.constant_(model[1].weight[0], 0.5), nn.init.zeros_(model[1].weight[1])
    >>> image = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    >>> faithfulness(model, image, image[:, 0], target=0, filler="zero").verdict
    'better than random'
    """
    start = time.perf_counter()
    check_images(images)
    maps = _read_maps(explanation, images)
    if target is None and isinstance(explanation, Explanation):
        target = explanation.target
    height, width = images.shape[-2:]
    patch = max(1, round(min(height, width) / 16)) if patch is None else patch
    repeats = max(3, math.ceil(32 / len(images))) if repeats is None else repeats
    check_choice("filler", filler, FILLERS)
    check_whole("patch", patch, 1, min(height, width))
    for name, value in {"steps": steps, "repeats": repeats, "batch_size": batch_size}.items():
        check_whole(name, value)
    _check_confidence(confidence, repeats, len(images))

    generator = torch.Generator().manual_seed(seed)
    ranks = _rank_orders(patch_relevance(maps, patch), repeats, generator)
    counts = torch.linspace(0, ranks.shape[-1], min(steps, ranks.shape[-1]) + 1).round().long()
    with evaluating(model, grad=False) as classify:
        chosen = read_target(target, classify, images, batch_size)
        curves = removal_curves(
            lambda part, owner: _probability(classify, part, chosen[owner]),
            images,
            FILLERS[filler](images),
            ranks.to(images.device),
            counts.to(images.device),
            patch=patch,
            batch_size=batch_size,
        )
    fractions = counts.double() / ranks.shape[-1]
    # (B, 1 + repeats) each: the map's order and the random ones, forwards and backwards
    most_first, least_first = torch.trapezoid(curves, fractions).chunk(2, 1)
    draws = torch.randint(2**31, (2, _RESAMPLES, len(images)), generator=generator)
    abpc = _score(least_first - most_first, most_first - least_first, draws, confidence)
    return Faithfulness(
        deletion=_score(most_first, least_first, draws, confidence),
        insertion=_score(least_first, most_first, draws, confidence),
        abpc=abpc,
        verdict=_verdict(abpc),
        fractions=fractions,
        deletion_curves=curves[:, 0],
        insertion_curves=curves[:, 1 + repeats].flip(-1),
        random_curves=torch.cat([curves[:, 1 : 1 + repeats], curves[:, 2 + repeats :]], 1).mean(1),
        target=chosen,
        filler=filler,
        patch=patch,
        repeats=repeats,
        seed=seed,
        confidence=confidence,
        seconds=time.perf_counter() - start,
    )


def _rank_orders(relevance: Tensor, repeats: int, generator: torch.Generator) -> Tensor:
    """(B, 2 (1 + repeats), P): ranks in the map's order and in random ones, then all of these backwards."""
    equal = relevance.new_zeros(len(relevance), repeats, relevance.shape[1])  # nothing but ties: random orders
    ranks = torch.cat([rank(relevance, generator)[:, None], rank(equal, generator)], 1)
    return torch.cat([ranks, ranks.shape[-1] - 1 - ranks], 1)


def _probability(classify: Classifier, images: Tensor, target: Tensor) -> Tensor:
    return classify(images).cpu().double().softmax(1).gather(1, target.cpu()[:, None])[:, 0]


def _score(forth: Tensor, back: Tensor, draws: Tensor, confidence: float) -> Score:
    """From (B, 1 + repeats) areas: the map's in column 0 of `forth`, those of random orders in the others of both."""
    value, random = forth[:, 0], torch.cat([forth[:, 1:], back[:, 1:]], 1)
    image, order = draws[0] % len(value), draws[1] % random.shape[1]
    values, randoms = value[image].mean(1), random[image, order].mean(1)
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.double)
    numbers = []
    for mean, resampled in (
        (value.mean(), values),
        (random.mean(), randoms),
        (value.mean() - random.mean(), values - randoms),
    ):
        numbers += [mean.item(), *resampled.quantile(tails).tolist()]
    return Score(*numbers)


def _verdict(abpc: Score) -> str:
    if abpc.difference_low > 0:
        return "better than random"
    return "worse than random" if abpc.difference_high < 0 else "not distinguishable from random"


def _read_maps(explanation: Explanation | Tensor, images: Tensor) -> Tensor:
    maps = explanation.map if isinstance(explanation, Explanation) else explanation
    expected = (len(images), *images.shape[-2:])
    if not isinstance(maps, Tensor) or tuple(maps.shape) != expected:
        given = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise InputError(f"the map is {given} but the images ask for (B, H, W) = {expected}: give one value a pixel")
    if not maps.isfinite().all():
        raise InputError("the map holds NaN or infinite values: it gives no order")
    return maps.detach().cpu().double()


def _check_confidence(confidence: float, repeats: int, num_images: int) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}: give a share between 0 and 1, such as 0.95")
    needed = math.ceil((2 / (1 - confidence)) ** (1 / num_images) / 2)
    if repeats < needed:
        raise InputError(
            f"{num_images} image(s) with {repeats} random orders cannot support confidence {confidence}: give at least "
            f"{needed} repeats, or more images"
        )
