"""Multifaceted feature visualization: one picture of a unit for each kind of image that it answers to."""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.claims.framework import Paper, at_least, at_most, claim, relative_difference
from saccade.claims.framework.convnet import BLOCKS, make_convnet, train_convnet
from saccade.claims.framework.experiment import load_digits
from saccade.explain.visualization import (
    Octave,
    Visualization,
    denoise_total_variation,
    draw_noise,
    excitation,
    find_facets,
    total_variation,
    visualize,
)

PAPER = Paper(
    title="Multifaceted Feature Visualization: Uncovering the Different Types of Features Learned By Each Neuron in "
    "Deep Neural Networks",
    arxiv="1602.03616",
    published="2016-02-11",
    summary="A unit answers to several kinds of images. Its images are clustered by what a layer makes of them, and "
    "activation maximisation starts from each cluster's mean, with total-variation denoising and crops around the "
    "centre: one picture a facet.",
    home=("saccade.explain.visualization.find_facets", "saccade.explain.visualization.visualize"),
    missing=("pictures of AlexNet's units, whose weights are not here",),
    differences=(
        "Official code meant to move the weight of the denoising on a line from start to end, but a bracket is "
        "misplaced: it goes from start (1 - 1/n) to start + end; ours is the line.",
        "The step is divided by the mean over the whole crop, so that a margin enlarges it; so is ours. Margins are "
        "pixels there, shares of the crop here.",
        "Official code denoises on the CPU by scikit-image's split Bregman; ours finds the same minimum on any device, "
        "and at the border too, where that one does not.",
        "The clustering (principal components, t-SNE, k-means) is recalled. Ours leaves t-SNE out unless asked.",
        "How crops are enlarged, and that the crop alone is denoised, is not recorded (uncertain): ours is bilinear.",
    ),
)

CODE = "official code"
EXPERIMENT = "an experiment of ours: digits, unit round (0, 6, 8, 9) beside straight (1, 4, 7)"
ROUND, STRAIGHT = (0, 6, 8, 9), (1, 4, 7)
BOUNDS = (-1.0, 1.0)
SCHEDULE = (Octave(100, (1, 1), (1, 4)),)  # strokes are one or two pixels wide: they want larger weights than photos


@claim("property", {"variation falls": True, "constants stay": True}, source=CODE)
def denoising_lowers_variation() -> dict[str, bool]:
    """The denoising lowers the total variation of noise at every weight of the schedules, and leaves a constant as it
    is."""
    noise, flat = 255 * torch.rand(3, 12, 15, dtype=torch.float64), torch.full((3, 12, 15), 70.0, dtype=torch.float64)
    weights = (0.001, 0.01, 0.1, 0.4, 2.0)
    falls = [(total_variation(denoise_total_variation(noise, each)) < total_variation(noise)).all() for each in weights]
    return {
        "variation falls": bool(torch.stack(falls).all()),
        "constants stay": all(torch.equal(denoise_total_variation(flat, each), flat) for each in weights),
    }


@claim("equivalence", 0.0, at_most(1e-10, "what float64 loses to rounding"), source=CODE)
def the_step_does_not_depend_on_the_scale_of_the_unit() -> float:
    """The unit multiplied by 1000, the ascent gives the same image: relative difference."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).double()
    starts = draw_noise(2, (3, 9, 11), BOUNDS).double()

    def grow() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        schedule = [Octave(5, (4, 2), (0.1, 1)), Octave(5, (4, 2), (0.1, 1), scale=1.2, margin=0.1)]
        return visualize(model, starts, target=0, bounds=BOUNDS, schedule=schedule, generator=generator).images

    before = grow()
    with torch.no_grad():
        for parameter in model[-1].parameters():
            parameter.mul_(1000)
    return relative_difference(grow(), before)


@claim(
    "property",
    "larger in the centre",
    at_least(1, "the order is claimed"),
    source="crops around the centre",
)
def centred_crops_change_the_centre_more() -> dict[str, float]:
    """A unit that answers to every pixel alike, but for signs, grows on a canvas of 32 x 32 seen through 16 x 16: the
    mean squared change of the central 16 x 16 over that of the rest, and that ratio for crops close to the centre
    (window 0.1) over crops that are not (0.3)."""
    signs = torch.randn(1, 3 * 16 * 16, dtype=torch.float64).sign()
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 1, bias=False)).double()
    model[1].weight = nn.Parameter(signs)
    ratios = {}
    for window in (0.1, 0.3):
        start = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        found = visualize(
            model,
            start,
            target=0,
            bounds=BOUNDS,
            schedule=[Octave(60, (1, 1), (1e3, 1e3), window=window)],
            crop=(16, 16),
            tv_iterations=1,
            generator=generator,
        )
        change = (found.canvas - start).square().mean((0, 1))
        inner = change[8:24, 8:24]
        ratios[window] = (inner.mean() / ((change.sum() - inner.sum()) / (32 * 32 - 16 * 16))).item()
    return {"window 0.1": ratios[0.1], "window 0.3": ratios[0.3], "0.1 over 0.3": ratios[0.1] / ratios[0.3]}


@claim(
    "property",
    "facets differ more",
    at_least(0, "the order is claimed"),
    source="pictures from mean images; " + EXPERIMENT,
    slow=True,
)
def facets_differ_more_than_seeds() -> dict[str, float]:
    """The mean distance of two pixels' values, as a root mean square, between pictures from two facets' means: by how
    much it is larger than between pictures from one mean with other places of the crop, and from two noises."""
    found = _grown()
    facets = _distance(found.facets.images)
    return {
        "other crops": facets - _distance(torch.stack([found.facets.images[0], found.again.images[0]])),
        "other noise": facets - _distance(found.noise.images),
    }


@claim(
    "property",
    "above the 99th percentile",
    at_least(0, "the order is claimed"),
    source="pictures from mean images; " + EXPERIMENT,
    slow=True,
)
def every_facet_excites_the_unit() -> float:
    """The least activation of a facet's picture, less the 99th percentile of real images, in logits."""
    found = _grown()
    return (found.facets.activations.min() - found.real.quantile(0.99)).item()


@claim(
    "property",
    {"all four from facets": True, "one or two from noise": True},
    source="one unit has many facets; " + EXPERIMENT,
    slow=True,
    guess="the network of ten classes knows clean digits alone: the picture of an eight, plain to the eye, is a two to "
    "it",
)
def facets_cover_the_kinds_of_images() -> dict[str, bool]:
    """Whether a network of ten classes names all four round digits in the pictures from four
    facets, and in those from four noises at most two."""
    found = _grown()
    kinds, others = (len(set(each) & set(ROUND)) for each in (found.named, found.named_noise))
    return {"all four from facets": kinds == 4, "one or two from noise": others <= 2}


@claim(
    "accuracy",
    "the most interpretable pictures so far",
    source="abstract",
    needs="AlexNet with its weights, ImageNet, and people who look at the pictures",
)
def pictures_are_interpretable() -> None:
    """People recognise more in the pictures than in those of earlier methods."""


class _Grown(NamedTuple):
    facets: Visualization
    again: Visualization
    noise: Visualization
    real: Tensor  # activations of real images
    named: list[int]  # class of each facet's picture
    named_noise: list[int]


@cache
def _grown() -> _Grown:
    """Pictures of the unit round, trained and grown once, from a random state of their own."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        (images, labels), _ = load_digits(16)
        judge = train_convnet(make_convnet(1, 10, 16), images, labels, epochs=12)
        round_, straight = (torch.isin(labels, torch.tensor(group)) for group in (ROUND, STRAIGHT))
        known = round_ | straight
        model = train_convnet(make_convnet(1, 2), images[known], round_[known].long(), epochs=4)
        real = excitation(model, images, target=1)
        kinds = find_facets(model, images[round_], layer=BLOCKS[-1], num_facets=4)

        def grow(starts: Tensor, seed: int) -> Visualization:
            """On a canvas with 2 pixels of background around, so that the crop can move."""
            return visualize(
                model,
                F.pad(starts, (2,) * 4, value=BOUNDS[0]),
                target=1,
                bounds=BOUNDS,
                schedule=SCHEDULE,
                crop=(16, 16),
                tv_iterations=30,
                generator=torch.Generator().manual_seed(seed),
            )

        facets, again = grow(kinds.starts, 0), grow(kinds.starts[:1], 1)
        noise = grow(draw_noise(4, (1, 16, 16), BOUNDS), 0)
        with torch.no_grad():
            named, named_noise = (judge(each.images).argmax(1).tolist() for each in (facets, noise))
    return _Grown(facets, again, noise, real, named, named_noise)


def _distance(images: Tensor) -> float:
    """Mean over pairs of the root mean square difference."""
    return (F.pdist(images.flatten(1).double()) / images[0].numel() ** 0.5).mean().item()
