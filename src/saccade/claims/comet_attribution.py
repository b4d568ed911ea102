"""COMET: a classifier that shows its evidence, and a detector that punishes evidence left out."""

from collections.abc import Iterator
from copy import deepcopy
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.claims.framework import Paper, at_least, claim, relative_difference, rounding
from saccade.claims.framework.convnet import make_convnet, train_convnet
from saccade.claims.framework.experiment import load_digits
from saccade.explain import explain, localization
from saccade.training import SelectionGame, selection_loss, train_selection

PAPER = Paper(
    title="Comprehensive Attribution: Inherently Explainable Vision Model with Feature Detector",
    arxiv="2407.19308",
    published="2024-07-27",
    summary="A selector makes a soft mask and a predictor classifies what it shows. A detector classifies what it "
    "hides, and the selector is punished while the class is still found there, so that masks cover all the evidence.",
    home=(
        "saccade.training.SelectionGame",
        "saccade.training.selection_loss",
        "saccade.explain.methods.selection.selection",
    ),
    missing=("figures on ImageNet-9 and NICO++, whose numbers were not seen either",),
    differences=(
        "Official code divides the area of every mask by 224 x 224; ours by the mask's own size.",
        "Official code separates the players by freezing them and clearing gradients in a certain order between "
        "backward passes, with an optimizer each; ours names each pass's parameters, and one optimizer may step for "
        "all. Gradients are the same.",
        "The frozen detector is in training mode in the official script, so that its running statistics and its "
        "answers follow the batch; ours stays in eval mode.",
        "Masks multiply normalised images: hidden pixels have the mean colour, not black. fill is another value; the "
        "official one-player form takes black.",
        "The official selector is LR-ASPP on MobileNetV3; ours is a vote over the maps of any network.",
    ),
)

CODE = "official code"
EXPERIMENT = "an experiment of ours: a digit twice on gravel"


@claim("property", {"complete": 0.0, "not complete": 1.0}, source="loss")
def the_detector_counts_only_within_the_gap() -> dict[str, float]:
    """Whether the selector's loss has a gradient by the detector's logits: none where the detector's loss exceeds the
    predictor's by the gap or more."""
    shown, target = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 0, 1])
    mask = torch.rand(6, 1, 5, 7, dtype=torch.float64)
    found = {}
    for name, excess in (("complete", 1.01), ("not complete", 0.99)):
        hidden = shown.detach().clone()
        wanted = F.cross_entropy(shown, target) + 2 * excess
        for _ in range(60):  # away from the classes until the loss is as wanted
            step = (wanted - F.cross_entropy(hidden, target)) / 2
            hidden = hidden - step * F.one_hot(target, 4)
        hidden.requires_grad_()
        loss = selection_loss(mask, shown, hidden, target, gap=2.0)
        (slope,) = torch.autograd.grad(loss.selector, hidden)
        found[name] = float(slope.abs().sum() > 0)
    return found


@claim("equivalence", 0.0, rounding, source="definition")
def what_is_shown_and_what_is_hidden_make_the_image() -> float:
    """x m + x (1 - m) = x, as predictor and detector get them: relative difference."""
    seen: list[Tensor] = []
    game, images, labels = _random_game(2)
    hooks = [each.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for each in _judges(game)]
    game.losses(images, labels)
    for hook in hooks:
        hook.remove()
    return relative_difference(seen[0] + seen[1], images)


@claim("equivalence", {"within": 0.0, "beyond": 0.1}, rounding, source="definition")
def area_is_free_up_to_its_share() -> dict[str, float]:
    """The area term of masks whose means are all within the free share, and of two masks of which one exceeds it by
    0.2, less 0.1: an excess of one image is not made up for by another."""
    logits, target = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1])
    within = torch.tensor([0.6, 0.1], dtype=torch.float64)[:, None, None, None].expand(2, 1, 5, 7)
    beyond = torch.tensor([0.8, 0.1], dtype=torch.float64)[:, None, None, None].expand(2, 1, 5, 7)
    areas = [selection_loss(mask, logits, logits, target, free_area=0.6).area.item() for mask in (within, beyond)]
    return {"within": areas[0], "beyond": areas[1] - 0.1}


@claim("equivalence", {"2 players": 0.0, "3 players": 0.0}, rounding, source=CODE)
def gradients_are_those_of_the_official_order() -> dict[str, float]:
    """The official order, for two players the predictor's loss backward, the predictor frozen, the selector's gradients
    cleared, its loss backward, gives the gradients of our passes that name their parameters: relative differences."""
    differences = {}
    for number in (2, 3):
        game, images, labels = _random_game(number)
        game.backward(images, labels)
        ours = _read_gradients(game)
        game.zero_grad()
        losses = game.losses(images, labels)
        losses.predictor.backward(retain_graph=True)
        for parameter in game.predictor.parameters():
            parameter.requires_grad_(False)
        game.selector.zero_grad()
        if number == 3:
            losses.detector.backward(retain_graph=True)
            game.selector.zero_grad()
        for judge in _judges(game):
            for parameter in judge.parameters():
                parameter.requires_grad_(False)  # works on a graph that is already there
        losses.selector.backward()
        differences[f"{number} players"] = relative_difference(_read_gradients(game), ours)
    return differences


@claim(
    "property",
    "near 1, and clearly less without",
    at_least(0, "above 0.8 is expected; 0.3 more than without is a bound of ours"),
    source="completeness; " + EXPERIMENT,
    slow=True,
)
def completeness_covers_all_evidence() -> dict[str, float]:
    """The share of a digit's pixels that masks show by more than a half, of the less covered of its two copies: by how
    much it is above 0.8 with the completeness term, and above that without the term by more than 0.3."""
    whole, without = _trained()[4.0], _trained()[0.0]
    return {"with it": whole.covered - 0.8, "more than without": whole.covered - without.covered - 0.3}


@claim(
    "accuracy",
    "not lower",
    at_least(-0.02, "6 of 300 images"),
    source="beside a plain classifier, whose figures were not seen; " + EXPERIMENT,
    slow=True,
)
def accuracy_is_not_lower_than_that_of_a_plain_classifier() -> dict[str, float]:
    """Accuracy on what masks show, less that of the same network trained on whole images, and less that of a selector
    without the completeness term."""
    found = _trained()
    return {
        "plain": found[4.0].accuracy - _players().accuracy,
        "without the term": found[4.0].accuracy - found[0.0].accuracy,
    }


@claim(
    "property",
    "masks lie on the digits",
    at_least(0.5, "a bound of ours; a mask without relation to them has 0.11, their share of the image"),
    source="masks as explanations; " + EXPERIMENT,
    slow=True,
)
def masks_are_explanations() -> float:
    """The trained mask as method selection of explain, held against the digits' pixels: the share of them among as many
    pixels with the largest values."""
    game, players = _trained()[4.0].game, _players()
    found = explain(game, players.images, method="selection")
    return localization(found, players.digits.any(1)).top.value


@claim(
    "property",
    {"with the term": True, "without it less than a tenth": True},
    source="interlocking; " + EXPERIMENT,
    slow=True,
)
def the_detector_undoes_interlocking() -> dict[str, bool]:
    """A selector keeps the background (0.8) more than the digits (0.2), and a predictor has learnt 32 such images by
    heart. Whether the mean gradient of the selector's loss, without its area, by the mask at the digits' pixels is
    below 0 with the completeness term, so that a step shows more of them, and without it less than a tenth in size."""
    players = _players()
    images, labels, digits = (each[:32] for each in players.train)
    digits = digits.any(1, keepdim=True)
    mask = torch.where(digits, 0.2, 0.8)
    noise = train_convnet(make_convnet(1, 10, 16), (images * mask).repeat(12, 1, 1, 1), labels.repeat(12), epochs=40)
    slopes = []
    for weight in (4.0, 0.0):
        here = mask.clone().requires_grad_()
        shown, hidden = noise(images * here), players.detector(images * (1 - here))
        loss = selection_loss(here, shown, hidden, labels, completeness_weight=weight, area_weight=0.0)
        (slope,) = torch.autograd.grad(loss.selector, here)
        slopes.append(slope[digits].mean().item())
    return {"with the term": slopes[0] < 0, "without it less than a tenth": abs(slopes[1]) < -slopes[0] / 10}


@claim("accuracy", "higher than a plain classifier's", source="figures not seen", needs="ImageNet-9 and NICO++")
def accuracy_on_shifted_backgrounds() -> None:
    """Accuracy on ImageNet-9 and NICO++ beside a plain ResNet-18 and other classifiers with selectors."""


class _Players(NamedTuple):
    train: tuple[Tensor, Tensor, Tensor]  # images, labels, pixels of each copy
    images: Tensor
    labels: Tensor
    digits: Tensor
    detector: nn.Module
    accuracy: float


class _Result(NamedTuple):
    game: SelectionGame
    covered: float
    accuracy: float


@cache
def _players() -> _Players:
    """2000 canvases, 300 of other digits, and a detector trained on whole ones, from a random state of its own."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        (digits, labels), (held, truth) = load_digits(8)
        train = _paste_twice(digits, labels, 2000)
        images, classes, pixels = _paste_twice(held, truth, 300)
        detector = train_convnet(make_convnet(1, 10), *train[:2], epochs=8)
        with torch.no_grad():
            accuracy = (detector(images).argmax(1) == classes).double().mean().item()
    return _Players(train, images, classes, pixels, detector, accuracy)


@cache
def _trained() -> dict[float, _Result]:
    """By the weight of completeness: selector and predictor, which starts from the detector's weights."""
    players, found = _players(), {}
    for weight in (0.0, 4.0):
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            loss = partial(selection_loss, completeness_weight=weight, area_weight=10.0, free_area=0.05)
            game = SelectionGame(_make_selector(), deepcopy(players.detector), players.detector, loss=loss)
            train_selection(game, _Shuffled(*players.train[:2]), steps=94, rate=5e-3)
        with torch.no_grad():
            shown = game.mask(players.images) > 0.5
            right = game(players.images).argmax(1) == players.labels
        covered = (shown & players.digits).sum((2, 3)) / players.digits.sum((2, 3))  # (B, copies)
        found[weight] = _Result(game, covered.amin(1).mean().item(), right.double().mean().item())
    return found


class _Shuffled:
    """Batches of 64 in another order each time."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(self.images)).split(64):
            yield self.images[chosen], self.labels[chosen]


def _paste_twice(digits: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Canvases (count, 1, 20, 20) of gravel with the ink of one digit in two of the four quadrants, its class, and the
    pixels of each copy (count, 2, 20, 20)."""
    from skimage.data import gravel

    photo = torch.from_numpy(gravel()).float() / 255 - 0.9  # darker than the ink
    chosen = torch.randint(len(digits), (count,))
    images, pixels = torch.empty(count, 1, 20, 20), torch.zeros(count, 2, 20, 20, dtype=torch.bool)
    for image, mask, digit in zip(images, pixels, digits[chosen, 0]):
        top, left = torch.randint(512 - 20, (2,)).tolist()
        image[0] = photo[top : top + 20, left : left + 20]
        ink = digit > -0.2
        for copy, quadrant in enumerate(torch.randperm(4)[:2].tolist()):
            down, across = (torch.randint(3, (2,)) + 10 * torch.tensor(divmod(quadrant, 2))).tolist()
            image[0, down : down + 8, across : across + 8][ink] = digit[ink]
            mask[copy, down : down + 8, across : across + 8] = ink
    return images, labels[chosen], pixels


def _make_selector() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 1, 3, padding=1),
    )


def _random_game(num_players: int) -> tuple[SelectionGame, Tensor, Tensor]:
    """Networks without what differs between training and eval mode, and five images."""
    game = SelectionGame(_make_selector(), make_convnet(1, 4), make_convnet(1, 4), num_players=num_players)
    return game.double(), torch.randn(5, 1, 12, 16, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 3])


def _judges(game: SelectionGame) -> list[nn.Module]:
    assert game.detector is not None
    return [game.predictor, game.detector]


def _read_gradients(game: SelectionGame) -> Tensor:
    return torch.cat([each.grad.flatten() for player in game.players.values() for each in player.parameters()])  # type: ignore[union-attr]
