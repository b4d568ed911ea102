"""RFxG: a map answers one of four questions, and each has a score of its own."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from saccade.claims.framework import (
    Case,
    Compare,
    Paper,
    at_least,
    at_most,
    claim,
    play,
    rounding,
)
from saccade.claims.framework.convnet import make_convnet, train_convnet
from saccade.claims.framework.experiment import load_digits
from saccade.errors import InputError
from saccade.explain import FrameScores, explain, frame_scores, list_methods
from saccade.explain.removal import blur_mirrored, rank, remove

PAPER = Paper(
    title="Rethinking Saliency Maps: A Cognitive Human Aligned Taxonomy and Evaluation Framework for Explanations",
    arxiv="2511.13081",
    published="2025-11-17",
    summary="A saliency map answers why this class, why this group, or why one of them and not another. Four scores "
    "read probabilities while the most relevant pixels go, one for each question; usual ones know the first question "
    "alone.",
    home=("saccade.explain.explain", "saccade.explain.frame_scores"),
    missing=(
        "IIA, the authors' own method, and its figures on ImageNet, COCO and VOC",
        "groups of ImageNet's classes from WordNet, whose files are not published",
    ),
    differences=(
        "Official code adds the two terms of the contrasts within a group and between groups, which makes them no "
        "contrasts; so do we by default, and combine='difference' subtracts.",
        "A group's map is of the sum of its logits, a contrast's of one logit minus the sum of all others; ours takes "
        "means on both sides, so that what all logits share, which softmax does not see, has no part in a contrast. "
        "For one class against another, and for a group alone but for its scale, that is the same.",
        "Official code skips the scaling of maps that lie in 0..1; ranks alone matter, so ours never scales.",
        "Equal values are ordered by sorting in official code, at random in ours.",
        "Groups from WordNet, and the figures on COCO, are second-hand.",
    ),
)

DEFINITION = "the scores' definition"
EXPERIMENT = "an experiment of ours: digits, round 0, 6, 8, 9 and straight 1, 4, 7"
ROUND, STRAIGHT = frozenset({0, 6, 8, 9}), frozenset({1, 4, 7})
SIGNED = ("grad_cam", "input_x_gradient", "integrated_gradients", "occlusion", "relevance")
NAMES = ("ccs", "cgc", "pgs", "cgs")


@claim("property", {"ccs": 0.0, "cgs": 0.0, "pgs": 0.0}, rounding, source=DEFINITION)
def symmetries_of_the_scores() -> dict[str, float]:
    """For one map CCS(A, B) = -CCS(B, A), CGS is symmetric in its groups as coded, and PGS of a group of one class is
    the area of the usual fall of its probability: the differences."""
    model, images, maps = _random_network()
    one, two = (
        frame_scores(model, images, maps, target=a, against=b, group={a, c}, group_against={b, d})
        for a, b, c, d in ((0, 1, 2, 3), (1, 0, 3, 2))
    )
    single = frame_scores(model, images, maps, target=0, against=1, group={0}).pgs
    assert single is not None
    assert one.cgs is not None
    assert two.cgs is not None
    order = maps.flatten(1).argsort(descending=True)
    falls = []
    for step in range(1, 10):
        changed = images.clone().flatten(2)
        gone = order[:, : step * order.shape[1] // 10]
        changed.scatter_(2, gone[:, None].expand(-1, 3, -1), 0)
        falls.append((model(images).softmax(1) - model(changed.view_as(images)).softmax(1))[:, 0])
    area = torch.trapezoid(torch.stack(falls), dx=0.1, dim=0).mean().item()
    return {
        "ccs": abs(one.ccs.value + two.ccs.value),
        "cgs": abs(one.cgs.value - two.cgs.value),
        "pgs": abs(single.value - area),
    }


@claim("property", True, source=DEFINITION)
def what_is_specific_to_a_class_lowers_its_contrast() -> bool:
    """On a linear model the order of the difference of two logits has a CCS below the interval of random orders, and
    not below -0.8."""
    model, images, _ = _random_network()
    contrast = explain(model, images, method="input_x_gradient", target=0, against=1)
    found = frame_scores(model, images, contrast, target=0, against=1).ccs
    return -0.8 <= found.value < found.random_low


@claim("property", True, source=DEFINITION)
def a_constant_map_is_a_random_order() -> bool:
    """A constant map differs from random orders by the order of its ties alone: its scores lie in their intervals."""
    model, images, maps = _random_network()
    found = frame_scores(
        model, images, torch.zeros_like(maps), target=0, against=1, group={0, 2}, group_against={1, 3}, repeats=20
    )
    scores = [getattr(found, name) for name in NAMES]
    return all(score.random_low <= score.value <= score.random_high for score in scores)


@claim(
    "accuracy",
    "lower",
    at_least(0, "the order is claimed"),
    source="contrastive maps by contrastive scores; " + EXPERIMENT,
    slow=True,
)
def asking_for_the_contrast_improves_its_score() -> dict[str, float]:
    """Maps of logit A minus logit B have a lower CCS than maps of logit A, for every method of ours whose maps have a
    sign: by how much."""
    return {method: _value(method, "class", "ccs") - _value(method, "contrast", "ccs") for method in SIGNED}


@claim(
    "accuracy",
    "higher",
    at_least(0, "the order is claimed"),
    source="group maps by group scores; " + EXPERIMENT,
    slow=True,
)
def asking_for_the_group_improves_its_score() -> dict[str, float]:
    """Maps of a group's logits have a higher PGS than maps of the class's logit: by how much."""
    return {method: _value(method, "group", "pgs") - _value(method, "class", "pgs") for method in SIGNED}


@claim(
    "accuracy",
    "not higher",
    at_most(0, "the order is claimed"),
    source="contrastive maps by group scores; " + EXPERIMENT,
    slow=True,
    guess="differences of less than a hundredth are within what 100 images can tell",
)
def asking_for_the_contrast_does_not_improve_the_group_score() -> dict[str, float]:
    """Maps of logit A minus logit B have no higher PGS than maps of logit A: by how much."""
    return {method: _value(method, "contrast", "pgs") - _value(method, "class", "pgs") for method in SIGNED}


@claim(
    "accuracy",
    "lowest of the four questions",
    at_least(0, "the order is claimed"),
    source="contrastive group maps by contrastive group scores, as a difference; " + EXPERIMENT,
    slow=True,
)
def asking_for_the_group_contrast_improves_its_score() -> dict[str, float]:
    """Maps of one group minus the other have the lowest CGS, taken as a difference, of the maps for all four questions:
    by how much, for every method of ours whose maps have a sign."""
    return {
        method: min(_value(method, question, "cgs") for question in ("class", "contrast", "group"))
        - _value(method, "groups", "cgs")
        for method in SIGNED
    }


@claim(
    "property",
    "areas of at most 0.8",
    Compare(
        "between -0.8 and 0.8",
        "the axis has this length",
        lambda measured, _: all(abs(x) <= 0.8 for row in measured.values() for x in row.values()),
    ),
    source=DEFINITION + "; " + EXPERIMENT,
    slow=True,
)
def four_scores_of_all_methods() -> dict[str, dict[str, float]]:
    """CCS, CGC, PGS and CGS of all our methods that need no attention and no mask, each map asked about the class."""
    needs_more = {"attention_flow", "attention_rollout", "selection"}
    methods = [method for method in list_methods() if method not in needs_more]
    return {method: {name: _value(method, "class", name, "sum") for name in NAMES} for method in methods}


@claim(
    "accuracy",
    {"CCS": (25.17, 25.20), "PGS": (46.03, 46.57)},
    source="figures of IIA on COCO with convolutional networks, second-hand; percent",
    needs="COCO, and IIA with its networks",
)
def the_authors_method_is_first() -> None:
    """IIA ranks first in nearly all cells."""


def replay(case: Case) -> dict[str, Tensor]:
    """The four scores, their curves and the masked images of metrics.py, for a softmax of a linear map."""

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        image = inputs["image"].movedim(-1, 0)[None]
        model, map = _LastChannels(inputs["W"], inputs["b"]), inputs["saliency"][None]
        question: dict[str, Any] = {
            "target": int(inputs["class_a"]),
            "against": int(inputs["class_b"]),
            "group": set(inputs["group_a"].tolist()),
            "group_against": set(inputs["group_b"].tolist()),
        }
        scores = {mode: frame_scores(model, image, map, filler=filler, **question) for mode, filler in _FILLERS.items()}
        outputs = {}
        for name in case.expected:
            what, *rest = name.removeprefix("out.").split(".", 2)
            if what == "masked":
                outputs[f"masked.{'.'.join(rest)}"] = _masked(image, map, rest[0], float(rest[1]))
            elif what in scores and rest[0] in NAMES:
                found = scores[what]
                outputs[f"{what}.{rest[0]}"] = torch.tensor([getattr(found, rest[0]).value], dtype=torch.float64)
                outputs[f"{what}.{rest[0]}.curve"] = found.curves[rest[0]][0]
            else:
                raise InputError(f"{case.key}/{case.name} has {name}: known are masked images and {', '.join(NAMES)}")
        return outputs

    return play(case, forward)


_FILLERS = {"black": "zero", "blur": "blur"}


class _LastChannels(nn.Module):
    """The recorded classifier: a linear map of pixels with channels last."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1).flatten(1) @ self.weight + self.bias


def _masked(image: Tensor, map: Tensor, mode: str, alpha: float) -> Tensor:
    """The image (H, W, C) without its share `alpha` of most relevant pixels."""
    ranks = rank(map.flatten(1), torch.Generator().manual_seed(0))
    filled = blur_mirrored(image, 5.0) if mode == "blur" else torch.zeros_like(image)
    return remove(image, filled, ranks < int(alpha * ranks.shape[1]), 1)[0].movedim(0, -1)


def _random_network() -> tuple[nn.Module, Tensor, Tensor]:
    """A linear model of four classes, twelve images of 10 x 10 pixels, and maps."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(300, 4)).double()
    return model, torch.randn(12, 3, 10, 10, dtype=torch.float64), torch.randn(12, 10, 10, dtype=torch.float64)


@cache
def _digits() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network, 100 round digits in 0..1 whose ground is black, their classes, and the likeliest straight class."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        (train, labels), (held, truth) = load_digits(16)
        model = train_convnet(make_convnet(1, 10), (train + 1) / 2, labels, epochs=10)
        chosen = torch.isin(truth, torch.tensor(sorted(ROUND))).nonzero()[:100, 0]
        images = (held[chosen] + 1) / 2
        straight = torch.tensor(sorted(STRAIGHT))
        with torch.no_grad():
            rivals = straight[model(images)[:, straight].argmax(1)]
        return model, images, truth[chosen], rivals


@cache
def _score(method: str, question: str, combine: str) -> FrameScores:
    """The scores of a method's maps, asked one of the four questions."""
    model, images, classes, rivals = _digits()
    questions: dict[str, dict[str, Any]] = {
        "class": {"target": classes},
        "contrast": {"target": classes, "against": rivals},
        "group": {"target": ROUND},
        "groups": {"target": ROUND, "against": STRAIGHT},
    }
    map = explain(model, images, method=method, **questions[question])
    frame: dict[str, Any] = {"target": classes, "against": rivals, "group": ROUND, "group_against": STRAIGHT}
    return frame_scores(model, images, map, combine=combine, batch_size=256, **frame)


def _value(method: str, question: str, name: str, combine: str = "difference") -> float:
    value: float = getattr(_score(method, question, combine), name).value
    return value
