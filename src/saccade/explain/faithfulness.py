"""Does a map name the pixels that the model's answer rests on? Removal in the map's order beside random orders."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.errors import InputError, check_choice
from saccade.explain.attribute import Explanation
from saccade.explain.classifier import Classifier, Output, check_images, check_whole, evaluating
from saccade.explain.maps import read_asked, read_maps
from saccade.explain.question import Classes
from saccade.explain.removal import FILLERS, patch_relevance, rank, removal_curves
from saccade.explain.score import Score, check_confidence, draw_resamples, summarize

__all__ = ["Faithfulness", "compare_faithfulness", "faithfulness"]


@dataclass(frozen=True)
class Faithfulness:
    """What `faithfulness` measured.

    Areas are means of the target's softmax probability over the removed fraction x from 0 to 1: they compare maps of
    the same model on the same images with the same filler, steps and patch, and nothing else; other libraries scale
    otherwise. What is read of a group is its classes' mean probability, and of a contrast the mean probability of
    `target` minus that of `against`, whose areas lie in [-1, 1].

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
        target, against: the question whose answer was read, as in `Explanation`.
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
    against: Tensor | None
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
    target: Classes | None = None,
    against: Classes | None = None,
    oracle: Tensor | None = None,
    steps: int = 20,
    filler: str = "blur",
    patch: int | None = None,
    repeats: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    confidence: float = 0.95,
    output: Output | None = None,
) -> Faithfulness:
    """Measure how the target's probability falls as pixels are removed in a map's order, beside random orders.

    Deletion and insertion are those of Petsiuk et al. (2018, arXiv:1806.07421), ABPC, the area between perturbation
    curves, compares most- with least-relevant-first (Samek et al., 2017, arXiv:1509.06321).

    Args:
        model: maps (B, 3, H, W) to logits (B, classes); runs in eval mode without gradients, and is left as it was.
        images: (B, 3, H, W), normalised floats, at least one.
        explanation: from `explain`, or a map (B, H, W) where large means relevant. Equal values are ordered at random.
        target, against: the question, as in `explain`. A target of None takes the explanation's, or for a bare map the
            predicted classes; so it does with `against`, where both are None.
        oracle: a map (B, H, W) that is known to be right, such as the masks of `known_evidence`, to be measured beside
            this one; its orders come on top of those below.
        steps: steps from the whole image to the filled one; at most one a patch.
        filler: what removed pixels become: "blur" (sigma of an eighth of the shorter side: stays closest to real
            images), "mean" (of the image, each channel) or "zero" (the training images' mean colour).
        patch: side in pixels of the squares that go together; None takes a sixteenth of the shorter side, about 256
            squares an image. Single pixels seldom move a network.
        repeats: random orders an image, each also used backwards; None takes 32 in all, at least 3 an image.
        batch_size: the most images in one forward pass. An image costs 2 (repeats + 1)(steps - 1) + 2 of them.
        seed: of random orders, ties and intervals; the same seed gives the same numbers whatever the batch size.
        confidence: of all intervals.
        output: where the logits are in what the model returns, as in `explain`.

    Returns: Faithfulness.
    Raises: InputError for wrong arguments, and where images and repeats are too few to support `confidence`; WorkError
        when the model gives NaN.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
    >>> _ = nn.init.constant_(model[1].weight[0], 0.5), nn.init.zeros_(model[1].weight[1])
    >>> image = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    >>> faithfulness(model, image, image[:, 0], target=0, filler="zero").verdict
    'better than random'
    """
    (found,) = compare_faithfulness(
        model,
        images,
        {"": explanation},
        target=target,
        against=against,
        oracle=oracle,
        steps=steps,
        filler=filler,
        patch=patch,
        repeats=repeats,
        batch_size=batch_size,
        seed=seed,
        confidence=confidence,
        output=output,
    ).values()
    return found


def compare_faithfulness(
    model: nn.Module,
    images: Tensor,
    explanations: Mapping[str, Explanation | Tensor],
    *,
    target: Classes | None = None,
    against: Classes | None = None,
    oracle: Tensor | None = None,
    steps: int = 20,
    filler: str = "blur",
    patch: int | None = None,
    repeats: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    confidence: float = 0.95,
    output: Output | None = None,
) -> dict[str, Faithfulness]:
    """`faithfulness` of several maps of the same images, in the same numbers and for less: random orders run once.

    Args:
        explanations: name -> what `faithfulness` takes as `explanation`, all about the same question, which is read
            from the first one where `target` is None.
        model, images, target, against, oracle, steps, filler, patch, repeats, batch_size, seed, confidence, output: as
            in `faithfulness`. An image costs 2 (repeats + maps)(steps - 1) + 2 forward passes.

    Returns: Faithfulness by name; `seconds` is the time of all together.
    Raises: InputError as `faithfulness`.
    """
    start = time.perf_counter()
    check_images(images)
    if not explanations:
        raise InputError("there is no explanation: give at least one by name")
    asked = next(iter(explanations.values()))
    maps = [read_maps(each, images) for each in explanations.values()]
    oracle = None if oracle is None else read_maps(oracle, images, "oracle")
    height, width = images.shape[-2:]
    patch = max(1, round(min(height, width) / 16)) if patch is None else patch
    repeats = max(3, math.ceil(32 / len(images))) if repeats is None else repeats
    check_choice("filler", filler, FILLERS)
    check_whole("patch", patch, 1, min(height, width))
    for name, value in {"steps": steps, "repeats": repeats, "batch_size": batch_size}.items():
        check_whole(name, value)
    check_confidence(confidence, repeats, len(images))

    known = None if oracle is None else patch_relevance(oracle, patch)
    ranks, generator = _rank_orders([patch_relevance(each, patch) for each in maps], repeats, known, seed)
    counts = torch.linspace(0, ranks.shape[-1], min(steps, ranks.shape[-1]) + 1).round().long()
    with evaluating(model, grad=False, output=output) as classify:
        question = read_asked(asked, target, against, classify, images, batch_size)
        curves = removal_curves(
            lambda part, owner: _probability(classify, part, question.weights[owner]),
            images,
            FILLERS[filler](images),
            ranks.to(images.device),
            counts.to(images.device),
            patch=patch,
            batch_size=batch_size,
        )
    fractions = counts.double() / ranks.shape[-1]
    # (B, maps + repeats) each, and the oracle: the maps' orders and the random ones, forwards and backwards
    most_first, least_first = torch.trapezoid(curves, fractions).chunk(2, 1)
    draws = draw_resamples(len(images), generator)
    half, chances = curves.shape[1] // 2, slice(len(maps), len(maps) + repeats)

    def score(place: int, forth: Tensor, back: Tensor) -> Score:
        chance = torch.cat([forth[:, chances], back[:, chances]], 1)
        return summarize(forth[:, place], chance, draws, confidence, None if oracle is None else forth[:, -1])

    found, forwards, backwards = {}, curves[:, :half], curves[:, half:]
    for place, name in enumerate(explanations):
        abpc = score(place, least_first - most_first, most_first - least_first)
        found[name] = Faithfulness(
            deletion=score(place, most_first, least_first),
            insertion=score(place, least_first, most_first),
            abpc=abpc,
            verdict=_verdict(abpc),
            fractions=fractions,
            deletion_curves=forwards[:, place],
            insertion_curves=backwards[:, place].flip(-1),
            random_curves=torch.cat([forwards[:, chances], backwards[:, chances]], 1).mean(1),
            target=question.target,
            against=question.against,
            filler=filler,
            patch=patch,
            repeats=repeats,
            seed=seed,
            confidence=confidence,
            seconds=time.perf_counter() - start,
        )
    return found


def _rank_orders(maps: list[Tensor], repeats: int, oracle: Tensor | None, seed: int) -> tuple[Tensor, torch.Generator]:
    """(B, orders, P): ranks in each map's order, in random ones and in the oracle's, then all of these backwards."""
    ranks = []
    for relevance in maps:  # each from the same seed, so that a map's figures do not depend on its company
        generator = torch.Generator().manual_seed(seed)
        ranks.append(rank(relevance, generator)[:, None])
    equal = maps[0].new_zeros(len(maps[0]), repeats, maps[0].shape[1])  # nothing but ties: random orders
    ranks.append(rank(equal, generator))
    if oracle is not None:
        ranks.append(rank(oracle, generator)[:, None])
    forth = torch.cat(ranks, 1)
    return torch.cat([forth, forth.shape[-1] - 1 - forth], 1), generator


def _probability(classify: Classifier, images: Tensor, weights: Tensor) -> Tensor:
    return (classify(images).cpu().double().softmax(1) * weights.cpu()).sum(1)


def _verdict(abpc: Score) -> str:
    if abpc.difference_low > 0:
        return "better than random"
    return "worse than random" if abpc.difference_high < 0 else "not distinguishable from random"
