"""Feature complexity: from which layer on a feature can be read, when it is learnt, and how much it matters."""

from copy import deepcopy
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.claims.framework import Paper, at_least, at_most, claim, relative_difference, rounding
from saccade.claims.framework.experiment import load_digits
from saccade.explain.complexity import (
    Complexity,
    complexity_over_checkpoints,
    feature_complexity,
    residual_flow,
    v_information,
)
from saccade.explain.concepts import ConceptExplanation, explain_concepts
from saccade.explain.score import correlate, place_on_ranks

PAPER = Paper(
    title="Understanding Visual Feature Reliance through the Lens of Complexity",
    arxiv="2407.06076",
    published="2024-07-08",
    summary="A feature is simple if an easy decoder reads it from early layers already: its complexity is 1 minus the "
    "mean share of V-information about it over the layers. With it one asks when, where and how important features of "
    "each complexity are.",
    home=(
        "saccade.explain.complexity.feature_complexity",
        "saccade.explain.complexity.complexity_over_checkpoints",
        "saccade.explain.complexity.residual_flow",
    ),
    missing=("10 000 features of ResNet-50 on ImageNet and their meta-features",),
    differences=(
        "The formula is recalled: V-information of linear Gaussian predictors, measured on held-out images and clipped "
        "at 0, and its mean over a stated list of layers.",
        "Flow is read from a block's input and from what the block adds to it; how the paper splits blocks that end "
        "with an activation is not recorded.",
    ),
)

DEFINITION = "definition, recalled"
EXPERIMENT = "an experiment of ours: digits of different brightness in six residual blocks, 20 features by NMF"
EPOCHS = 12
SEEN = (0, 1, 2, 3, 4, 6, 8, 10, 12)


@claim("equivalence", {"variance explained": 0.0, "K": 0.0}, rounding, source=DEFINITION)
def information_is_explained_variance() -> dict[str, float]:
    """Without penalty and on the fitted rows V-information over variance is 1 minus the mean squared error of least
    squares over the variance; a feature that is linear in the images has complexity 0 in an invertible linear
    network."""
    x, z = torch.randn(90, 7, dtype=torch.float64), torch.randn(90, 3, dtype=torch.float64)
    design = torch.cat([x, torch.ones(90, 1, dtype=torch.float64)], 1)
    error = (z - design @ torch.linalg.lstsq(design, z).solution).square().mean(0)
    images = torch.randn(90, 1, 2, 4, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 2)).double()
    feature = images.flatten(1) @ torch.randn(8, 2, dtype=torch.float64)
    found = feature_complexity(model, images, feature, ridge=0.0)
    return {
        "variance explained": relative_difference(
            v_information(x, z, ridge=0.0, held_out=0.0), 1 - error / z.var(0, correction=0)
        ),
        "K": found.complexity.abs().max().item(),
    }


@claim("property", "in 0..1", at_least(0, "complexity lies in 0..1"), source=DEFINITION, slow=True)
def complexity_is_a_share() -> dict[str, float]:
    """Complexity of all features: by how much it is above 0 and below 1."""
    found = _final().complexity
    return {"above 0": found.min().item(), "below 1": 1 - found.max().item()}


@claim(
    "property",
    "never less",
    at_least(-1e-10, "rounding"),
    source=DEFINITION,
)
def richer_families_read_no_less() -> float:
    """On the rows that were fitted, without penalty, predictors with squares read at least what linear ones read: the
    least difference over 20 features and 3 layers of a random network."""
    images = torch.randn(200, 1, 3, 4, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), *(nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(3)))
    model = nn.Sequential(*model, nn.Linear(12, 20)).double()
    with torch.no_grad():
        features = model(images)
    linear, quadratic = (
        feature_complexity(
            model,
            images,
            features,
            layers=["1.0", "2.0", "3.0"],
            family=family,
            ridge=0.0,
            held_out=0.0,
        ).information
        for family in ("linear", "quadratic")
    )
    return (quadratic - linear).min().item()


@claim(
    "property",
    "lowest",
    at_most(0.2, "among the simplest fifth: networks from other seeds move it by a few places"),
    source=EXPERIMENT,
    slow=True,
    guess="the first block shows it best, but later blocks forget part of it, which counts as complexity",
)
def brightness_is_among_the_simplest_features() -> float:
    """Share of the 20 features that have a lower complexity than the images' mean brightness, given as another one."""
    found = _final().complexity
    return (found[:-1] < found[-1]).double().mean().item()


@claim(
    "property",
    "positive",
    at_least(0.01, "the sign is claimed"),
    source="dynamics of training; " + EXPERIMENT,
    slow=True,
)
def simple_features_are_learnt_first() -> float:
    """Rank correlation of a feature's final complexity with the first epoch at which the last block shows more than
    nine tenths of its variance; half of it a random network of this size shows."""
    learnt = torch.stack([each.information[-1] > 0.9 for each in _over_training().values()])
    first = torch.tensor(SEEN)[learnt.double().argmax(0)].double()
    first[~learnt.any(0)] = EPOCHS + 1
    return _rank_correlation(_final().complexity[:-1], first[:-1])


@claim(
    "property",
    "positive",
    at_least(0, "the sign is claimed"),
    source="flow in residual blocks; " + EXPERIMENT,
    slow=True,
    guess="a small block reads the whole stream, and what it adds shows nearly all that the stream shows",
)
def simple_features_go_around_blocks() -> float:
    """Of the simpler half of the features the skip branch shows more than the main branch, as a mean over the blocks
    after the first: by how much."""
    lead, simple = _leads()
    return lead[simple].mean().item()


@claim(
    "property",
    "positive",
    at_least(0, "the sign is claimed"),
    source="flow in residual blocks; " + EXPERIMENT,
    slow=True,
)
def simple_features_go_around_blocks_more_than_complex_ones() -> float:
    """The skip branch's lead over the main branch for the simpler half less that for the other half."""
    lead, simple = _leads()
    return (lead[simple].mean() - lead[~simple].mean()).item()


@claim("property", "negative", at_least(0, "the sign is claimed"), source="importance; " + EXPERIMENT, slow=True)
def complex_features_matter_less() -> float:
    """Minus the rank correlation of complexity with importance, the mean absolute product of a code with the
    gradient of the predicted logit by it."""
    found = _final()
    importance = _features()[0].per_image.double().abs().mean(0)
    return -_rank_correlation(found.complexity[:-1], importance)


@claim("property", "negative", at_least(0, "the sign is claimed"), source="sedimentation; " + EXPERIMENT, slow=True)
def important_features_move_to_earlier_layers() -> float:
    """Complexity of the important half of the features at epoch 1 less that at the end: how far they became readable
    earlier."""
    found = _over_training()
    importance = _features()[0].per_image.double().abs().mean(0)
    chosen = importance >= importance.median()
    return (found["1"].complexity[:-1] - found[str(EPOCHS)].complexity[:-1])[chosen].mean().item()


@claim(
    "property",
    "stable",
    at_least(0.9, "a bound of ours"),
    source="probe regularisation; " + EXPERIMENT,
    slow=True,
    guess="a penalty of a tenth hides directions of small variance, and features that need them look complex",
)
def order_is_stable_across_ridges() -> dict[str, float]:
    """Rank correlation of complexity with that by penalties of 1e-4, 1e-2 and 1e-1 in place of 1e-3."""
    model, images = _trained()[0], _digits()[1]
    return {
        f"ridge {ridge:g}": _rank_correlation(
            feature_complexity(model, images, _features()[1], ridge=ridge).complexity, _final().complexity
        )
        for ridge in (1e-4, 1e-2, 1e-1)
    }


@claim(
    "accuracy",
    "complex features matter less, simple ones take the skip branch",
    source="10 000 features of ResNet-50",
    needs="ImageNet, ResNet-50 and its checkpoints",
)
def features_of_resnet_50() -> None:
    """The same relations among ten features a class of ResNet-50 on ImageNet."""


class _Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(dim), nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.branch(x)
        return out


class _ResidualNet(nn.Module):
    """Pixels to channels by a convolution, six residual blocks, ReLU, the mean over places, ten classes."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, dim, 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(dim) for _ in range(6)))
        self.last = nn.ReLU()
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))
        return logits


@cache
def _digits() -> tuple[tuple[Tensor, Tensor], Tensor]:
    """1438 digits to train with, and 1000 of them to probe; even ones are brighter by 0.5, all by random amounts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        (images, labels), _ = load_digits(8)
        images = images + 0.5 * (1 - labels % 2).view(-1, 1, 1, 1) + 0.2 * torch.randn(len(images), 1, 1, 1)
    return (images, labels), images[:1000]


@cache
def _trained() -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    """The network, and its state after some epochs."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        (images, labels), _ = _digits()
        model = _ResidualNet()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        states = {}
        for epoch in range(EPOCHS + 1):
            if epoch in SEEN:
                states[str(epoch)] = deepcopy(model.state_dict())
            for chosen in torch.randperm(len(images)).split(64) if epoch < EPOCHS else ():
                optimizer.zero_grad()
                F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimizer.step()
        return model.eval(), states


@cache
def _features() -> tuple[ConceptExplanation, Tensor]:
    """20 features after the last ReLU, and a table of them with the images' mean brightness as the last column."""
    model, images = _trained()[0], _digits()[1]
    found = explain_concepts(
        model, images, layer="last", num_concepts=20, importance="input_x_gradient", batch_size=1000
    )
    codes = found.codes.mean((1, 2))
    return found, torch.cat([codes, images.mean((1, 2, 3))[:, None]], 1)


@cache
def _final() -> Complexity:
    return feature_complexity(_trained()[0], _digits()[1], _features()[1])


@cache
def _over_training() -> dict[str, Complexity]:
    model, states = _trained()
    return complexity_over_checkpoints(model, _digits()[1], _features()[1], states)


@cache
def _leads() -> tuple[Tensor, Tensor]:
    """By how much the skip branch shows more of each of the 20 than the main branch, and which are the simpler half."""
    flow, complexity = residual_flow(_trained()[0], _digits()[1], _features()[1]), _final().complexity[:-1]
    return (flow.skip - flow.main)[1:, :-1].mean(0), complexity <= complexity.median()


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    first, second = (place_on_ranks(each[None]) for each in (a, b))
    return correlate(first, second).item()
