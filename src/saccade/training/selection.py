"""Classifiers that show their evidence: a selector makes a mask, a predictor classifies what the mask shows, and a
detector looks for the class in what it hides (COMET, 2024, arXiv:2407.19308)."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from saccade import taps
from saccade.errors import DivergedError, InputError
from saccade.training.recipe import parameter_groups

__all__ = ["SelectionGame", "SelectionLoss", "Selector", "selection_loss", "train_selection"]


class SelectionLoss(NamedTuple):
    """What each player minimises, and the parts of the selector's loss; numbers, or (steps,) of a training.

    Attributes:
        selector: the predictor's loss, weighted completeness and weighted area.
        predictor: cross-entropy on what the mask shows.
        detector: cross-entropy on what the mask hides.
        completeness: by how much the detector's loss falls short of the predictor's and the gap; 0 where it does not.
        area: mean share of the image that is shown beyond what is free.
    """

    selector: Tensor
    predictor: Tensor
    detector: Tensor
    completeness: Tensor
    area: Tensor


def selection_loss(
    mask: Tensor,
    shown: Tensor,
    hidden: Tensor,
    target: Tensor,
    *,
    prediction_weight: float = 1.0,
    completeness_weight: float = 4.0,
    gap: float = 2.0,
    area_weight: float = 100.0,
    free_area: float = 0.6,
) -> SelectionLoss:
    """Losses of the three players, of one batch.

    Without completeness a mask of any small region that tells the classes apart is best; with it the selector pays
    until the detector knows nothing of the class from what is hidden. Defaults are the published ones for ImageNet-9;
    the notes beside them start from completeness_weight 1, gap 1 and free_area 0.2.

    Args:
        mask: (B, 1, H, W) in 0..1, the share of each pixel that is shown.
        shown, hidden: (B, classes), logits of the predictor and of the detector.
        target: (B,) class indices, or (B, classes) shares of classes.
        prediction_weight, completeness_weight, area_weight: of the parts of the selector's loss.
        gap: nats by which the detector's loss should exceed the predictor's, both as means over the batch.
        free_area: mean of an image's mask, a share of the image, up to which it costs nothing.

    >>> even = torch.zeros(2, 4)  # both losses are the logarithm of 4, so that the gap of 2 is missing
    >>> selection_loss(torch.ones(2, 1, 3, 5), even, even, torch.tensor([0, 3]), area_weight=1.0)
    SelectionLoss(selector=tensor(9.7863), predictor=tensor(1.3863), detector=tensor(1.3863), completeness=tensor(2.),
    area=tensor(0.4000))
    """
    if mask.ndim != 4 or mask.shape[1] != 1 or shown.shape != hidden.shape or len(mask) != len(shown):
        raise InputError(
            f"mask is {tuple(mask.shape)}, shown is {tuple(shown.shape)} and hidden is {tuple(hidden.shape)}: give "
            "(B, 1, H, W) and two tables of logits (B, classes)"
        )
    predictor, detector = cross_entropy(shown, target), cross_entropy(hidden, target)
    completeness = (predictor - detector + gap).relu()
    area = (mask.mean((1, 2, 3)) - free_area).relu().mean()
    selector = prediction_weight * predictor + completeness_weight * completeness + area_weight * area
    return SelectionLoss(selector, predictor, detector, completeness, area)


class Selector(nn.Module):
    """Mask logits (B, 1, H, W) from maps of any network: each map votes through a 1 x 1 convolution, and votes add up.

    Args:
        encoder: images (B, C, H, W) -> a map (B, channels, h, w), or a list of such at several resolutions, such as
            `saccade.create_model(name, features_only=True)`.
        channels: of each map, such as `encoder.feature_info.channels()`.
    """

    def __init__(self, encoder: nn.Module, channels: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.votes = nn.ModuleList(nn.Conv2d(each, 1, 1) for each in channels)

    def forward(self, images: Tensor) -> Tensor:
        found = self.encoder(images)
        maps = [found] if isinstance(found, Tensor) else list(found)
        if len(maps) != len(self.votes):
            raise InputError(f"the encoder gives {len(maps)} map(s), channels has {len(self.votes)}: give one a map")
        votes = [
            interpolate(vote(each), size=images.shape[-2:], mode="bilinear", align_corners=False)
            for vote, each in zip(self.votes, maps)
        ]
        return torch.stack(votes).sum(0)


class SelectionGame(nn.Module):
    """A classifier (B, C, H, W) -> (B, classes) that sees of its images what its own mask shows.

    A tap sees the mask as "gate"; `saccade.explain(game, images, method="selection")` makes an explanation of it.
    Masks are soft and multiply images as they come: of normalised ones a hidden pixel becomes the mean colour, unless
    `fill` says otherwise.

    Args:
        selector: images -> mask logits (B, 1, H, W), such as a `Selector`.
        predictor: images -> logits (B, classes).
        detector: the same; None with one player, where the predictor stands in for it.
        num_players: how many learn. 3: all. 2, as published: selector and predictor, beside a detector that was trained
            on whole images. 1: the selector alone, as explanation of a predictor that was trained before. Who does not
            learn stays in eval mode.
        fill: value of hidden pixels, one, or one a channel. The published one-player form takes black, which for
            normalised images is -mean / std.
        loss: with the arguments of `selection_loss`, such as functools.partial(selection_loss, gap=1.0).

    Raises: InputError for numbers of players and detectors that do not fit together.
    """

    def __init__(
        self,
        selector: nn.Module,
        predictor: nn.Module,
        detector: nn.Module | None = None,
        *,
        num_players: int = 2,
        fill: float | Sequence[float] = 0.0,
        loss: Callable[[Tensor, Tensor, Tensor, Tensor], SelectionLoss] = selection_loss,
    ) -> None:
        super().__init__()
        if num_players not in (1, 2, 3) or (num_players == 1) != (detector is None):
            given = "no detector" if detector is None else "a detector"
            raise InputError(
                f"num_players is {num_players!r} with {given}: give 3 or 2 with a detector, or 1 without, where the "
                "predictor stands in for it"
            )
        self.selector, self.predictor, self.detector = selector, predictor, detector
        self.num_players, self.loss = num_players, loss
        self.register_buffer("fill", torch.as_tensor(fill).view(-1, 1, 1), persistent=False)
        self.train(self.training)

    @property
    def players(self) -> dict[str, nn.Module]:
        """Those that learn, by name."""
        names = ("selector", "predictor", "detector")[: self.num_players]
        return {name: self.get_submodule(name) for name in names}

    def train(self, mode: bool = True) -> "SelectionGame":
        super().train(mode)
        for player in (self.predictor, self.detector)[self.num_players - 1 :]:
            if player is not None:
                player.eval()
        return self

    def mask(self, images: Tensor) -> Tensor:
        """(B, 1, H, W) in 0..1, the share of each pixel that is shown."""
        logits = self.selector(images)
        expected = (len(images), 1, *images.shape[-2:])
        if not isinstance(logits, Tensor) or logits.shape != expected:
            given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(f"the selector returns {given}: give a module that returns mask logits {expected}")
        mask = logits.sigmoid()
        taps.record(self, "gate", lambda: mask)
        return mask

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.predictor(self._show(images, self.mask(images)))
        return logits

    def losses(self, images: Tensor, target: Tensor) -> SelectionLoss:
        """Every player's loss on a batch, in one graph."""
        mask = self.mask(images)
        detector = self.predictor if self.detector is None else self.detector
        shown, hidden = self.predictor(self._show(images, mask)), detector(self._show(images, 1 - mask))
        return self.loss(mask, shown, hidden, target)

    def backward(self, images: Tensor, target: Tensor) -> SelectionLoss:
        """Add to each learning player's `.grad` the gradient of its own loss, and to nothing else.

        One optimizer may then step for all. Returns: the losses, cut from the graph.
        """
        losses = self.losses(images, target)
        own = {"selector": losses.selector, "predictor": losses.predictor, "detector": losses.detector}
        for name, player in reversed(self.players.items()):  # the selector's loss comes last: it needs all graphs
            inputs = [parameter for parameter in player.parameters() if parameter.requires_grad]
            if inputs:
                own[name].backward(inputs=inputs, retain_graph=name != "selector")
        return SelectionLoss(*(each.detach() for each in losses))

    def _show(self, images: Tensor, mask: Tensor) -> Tensor:
        return images * mask + self.fill.to(images) * (1 - mask)  # type: ignore[operator]


def train_selection(
    game: SelectionGame,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int,
    rate: float = 5e-4,
    weight_decay: float = 0.03,
    warmup: float = 0.01,
    milestones: Sequence[float] = (0.4, 0.6, 0.8),
    decay: float = 0.2,
) -> SelectionLoss:
    """Train the learning players in place with AdamW, a step for all of them after each backward pass.

    The defaults are the published ones: 200 epochs of batches of 128, of which 2 warm up.

    Args:
        game: goes back to eval mode.
        batches: (images, target) each; read again when they end.
        steps: of the optimizer.
        rate: learning rate after warm-up; one for all players.
        weight_decay: of weights, not of norms and biases.
        warmup: share of the steps in which the rate rises.
        milestones: shares of the steps at which the rate is multiplied by `decay`.

    Returns: losses (steps,).
    Raises: InputError for batches that are empty or cannot be read again; DivergedError for a loss that is not finite.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps is {steps!r}: give a whole number of at least 1")
    groups = [group for player in game.players.values() for group in parameter_groups(player, weight_decay)]
    optimizer = torch.optim.AdamW(groups, rate)
    rising = max(1, round(warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / rising) * decay ** sum(step >= share * steps for share in milestones),
    )
    game.train()
    seen = []
    for step, (images, target) in enumerate(itertools.islice(_again(batches), steps)):
        optimizer.zero_grad()
        losses = game.backward(images, target)
        if not all(each.isfinite() for each in losses):
            raise DivergedError(f"a loss is not finite in step {step}: lower the rate ({rate:g}), or check the images")
        optimizer.step()
        schedule.step()
        seen.append(losses)
    game.eval()
    return SelectionLoss(*(torch.stack(each) for each in zip(*seen)))


def _again(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise InputError("batches are empty or at their end: give what can be read again, as a list or a loader")
