"""A small convolutional classifier with three resolutions, for experiments on what explanations show of it."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.claims.framework.experiment import load_digits

__all__ = ["BLOCKS", "make_convnet", "place_digit_pairs", "train_convnet", "train_on_digit_pairs"]

BLOCKS = ("features.1", "features.4", "features.7")  # after each block's ReLU, at full, half and quarter resolution


class _ConvNet(nn.Module):
    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for block, out in enumerate((width, 2 * width, 4 * width)):
            layers += [nn.MaxPool2d(2)] if block else []
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
            channels = out
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).amax((2, 3)))
        return logits


def make_convnet(channels: int, classes: int, width: int = 8) -> nn.Module:
    """Three blocks of convolution and ReLU with poolings between them, the largest value of each channel, classes."""
    return _ConvNet(channels, classes, width)


def train_convnet(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> nn.Module:
    """Adam with a learning rate that falls from 5e-3 to 0 as a cosine, 64 images a step; returns the model in eval."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(images) // 64))
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            loss(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def place_digit_pairs(digits: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Canvases with two digits of different classes: (count, 1, 24, 24), classes (count, 2), corners (count, 2, 2).

    Digits are 8 x 8 and do not overlap: one lies in the upper half and one in the lower half of the canvas.
    """
    canvas, classes, corners = torch.full((count, 1, 24, 24), -1.0), [], []
    for image in canvas:
        first, second = torch.randint(len(digits), (2,)).tolist()
        while labels[first] == labels[second]:
            second = int(torch.randint(len(digits), ()))
        tops, lefts = torch.randint(5, (2,)) + torch.tensor([0, 12]), torch.randint(17, (2,))
        for digit, top, left in zip((first, second), tops.tolist(), lefts.tolist()):
            image[:, top : top + 8, left : left + 8] = digits[digit]
        classes.append(labels[[first, second]])
        corners.append(torch.stack([tops, lefts], -1))
    return canvas, torch.stack(classes), torch.stack(corners)


@cache
def train_on_digit_pairs() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network that names both digits of a canvas, and 128 canvases of other digits: images, classes, corners.

    Trained once, from a random state of its own, so that claims which share it measure the same network.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        (digits, labels), (held, truth) = load_digits(8)
        images, classes, _ = place_digit_pairs(digits, labels, 3000)
        both = F.one_hot(classes, 10).sum(1).float()
        loss = F.binary_cross_entropy_with_logits
        model = train_convnet(make_convnet(1, 10), images, both, epochs=12, loss=loss)
        return model, *place_digit_pairs(held, truth, 128)
