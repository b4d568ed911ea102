"""Does a map depend on what it claims to explain: on the weights that were learnt, and on the class?"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.errors import InputError
from saccade.explain.attribute import Explanation, explain, read_method
from saccade.explain.classifier import check_images, check_whole, evaluating
from saccade.explain.parameters import parameters_of, shuffle_parameters, with_parameters
from saccade.explain.question import Classes
from saccade.explain.score import Score, check_confidence, correlate, draw_resamples, place_on_ranks, summarize

__all__ = ["Randomization", "class_sensitivity", "parameter_randomization"]


@dataclass(frozen=True)
class Randomization:
    """What `parameter_randomization` found.

    Attributes:
        similarity: rank correlation in [-1, 1] of the model's maps with those of the model with shuffled weights, for
            each stage; a map that follows the weights is near 0. `random` is that of the map with its own places
            shuffled.
        fractions: share of the modules with parameters that were shuffled at each stage, from the output down.
        verdict: "follows the weights" or "shuffled weights give the same map", by the side of `same` on which the
            interval of the last stage lies; "undecided" where it holds `same`.
        same: the similarity from which maps count as the same.
        method: name of the method.
        seconds: time that the method took, over all stages.
    """

    similarity: tuple[Score, ...]
    fractions: tuple[float, ...]
    verdict: str
    same: float
    method: str
    seconds: float


def parameter_randomization(
    model: nn.Module,
    images: Tensor,
    *,
    method: str = "integrated_gradients",
    target: Classes | None = None,
    against: Classes | None = None,
    stages: int = 1,
    same: float = 0.5,
    repeats: int | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    explanation: Explanation | None = None,
    **options: Any,
) -> Randomization:
    """Hold the maps of a model against those of the same model with shuffled weights (Adebayo et al., 2018,
    arXiv:1810.03292): a picture that does not change cannot show what was learnt.

    Each parameter tensor keeps its numbers in a random order, so that sizes of activations stay about as they were.
    The class explained stays that of the intact model, and afterwards its parameters are bit for bit as before.

    Args:
        model, images, method, target, against, options: as in `explain`.
        stages: in how many steps modules are shuffled, those registered last first; 1 shuffles all at once.
        same: rank correlation from which two maps count as the same. 0.5 is a convention of ours.
        repeats: place-shuffled maps an image, which stand for maps that know nothing; None takes 32 in all, at least 3
            an image.
        seed: of shuffling and intervals.
        confidence: of all intervals.
        explanation: of the intact model, by the same method and question, where it is at hand; else it is made.

    Returns: Randomization.
    Raises: InputError as `explain`, for an `explanation` by another method, and for a model without parameters.
    """
    check_images(images)
    repeats = max(3, math.ceil(32 / len(images))) if repeats is None else repeats
    check_whole("stages", stages)
    check_whole("repeats", repeats)
    check_confidence(confidence, repeats, len(images))
    method = read_method(method)
    if explanation is not None and explanation.method != method:
        raise InputError(f"explanation is by {explanation.method} but method is {method!r}: give one by {method}")
    intact = explanation or explain(model, images, method=method, target=target, against=against, **options)
    parameters = parameters_of(model)
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    if not owners:
        raise InputError(f"{type(model).__name__} has no parameters: there is nothing to shuffle")

    generator = torch.Generator().manual_seed(seed)
    shuffled = shuffle_parameters(parameters, generator)
    ranks, seconds = place_on_ranks(intact.map), intact.seconds
    chance = _shuffled_places(ranks, repeats, generator)
    draws = draw_resamples(len(images), generator)
    similarity, fractions = [], []
    for stage in range(1, stages + 1):
        chosen = set(owners[len(owners) - math.ceil(len(owners) * stage / stages) :])
        changed = {name: value for name, value in shuffled.items() if name.rpartition(".")[0] in chosen}
        with with_parameters(model, changed):
            other = explain(model, images, method=method, target=intact.target, against=intact.against, **options)
        seconds += other.seconds
        similarity.append(summarize(correlate(ranks, place_on_ranks(other.map)), chance, draws, confidence))
        fractions.append(len(chosen) / len(owners))
    last = similarity[-1]
    verdict = "undecided"
    if last.low > same:
        verdict = "shuffled weights give the same map"
    elif last.high < same:
        verdict = "follows the weights"
    return Randomization(tuple(similarity), tuple(fractions), verdict, same, method, seconds)


def class_sensitivity(
    model: nn.Module,
    images: Tensor,
    *,
    method: str = "normgrad",
    repeats: int | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    batch_size: int = 32,
    **options: Any,
) -> Score:
    """Correlation over pixels of the maps for the most and the least likely class (arXiv:2004.02866).

    In [-1, 1]; the lower, the more a map depends on the class. A constant map correlates with nothing: 0. `random` is
    the correlation of the first map with the second one's places shuffled.

    Args:
        model, images, method, batch_size, options: as in `explain`.
        repeats, seed, confidence: as in `parameter_randomization`.

    Raises: InputError as `explain`.
    """
    check_images(images)
    repeats = max(3, math.ceil(32 / len(images))) if repeats is None else repeats
    check_whole("repeats", repeats)
    check_confidence(confidence, repeats, len(images))
    with evaluating(model, grad=False, output=options.get("output")) as classify:
        logits = torch.cat([classify(part) for part in images.split(batch_size)])
    if logits.shape[1] < 2:
        raise InputError("the model knows 1 class: sensitivity to the class needs two")
    most, least = (
        explain(model, images, method=method, target=classes, batch_size=batch_size, **options).map
        for classes in (logits.argmax(1), logits.argmin(1))
    )
    generator = torch.Generator().manual_seed(seed)
    first, second = (each.flatten(1).cpu().double() for each in (most, least))
    places = torch.rand(len(images), repeats, first.shape[1], generator=generator).argsort(-1)
    chance = correlate(first[:, None], second[:, None].expand_as(places).gather(-1, places))
    return summarize(correlate(first, second), chance, draw_resamples(len(images), generator), confidence)


def _shuffled_places(ranks: Tensor, repeats: int, generator: torch.Generator) -> Tensor:
    """(B, repeats): correlation of ranks (B, P) with themselves in random places."""
    places = torch.rand(len(ranks), repeats, ranks.shape[1], generator=generator).argsort(-1)
    return correlate(ranks[:, None], ranks[:, None].expand_as(places).gather(-1, places))
