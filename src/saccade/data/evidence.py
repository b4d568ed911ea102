"""Images whose evidence is known pixel by pixel: what an explanation finds can be held against what there is."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from saccade.errors import InputError

__all__ = ["Evidence", "known_evidence"]

_SMALLEST = 18  # pixels of a side: a sign of 4 x 4 still tells the classes apart
_DISTRACTORS = 3


@dataclass(frozen=True)
class Evidence:
    """Images, their classes, and the pixels that decide them.

    Attributes:
        images: (N, 3, S, S) uint8.
        labels: (N,) long.
        masks: (N, S, S) booleans: the pixels whose value would be another, were the class another one and all else
            drawn the same. All other pixels are independent of the class.
        classes: names of the signs.
    """

    images: Tensor
    labels: Tensor
    masks: Tensor
    classes: tuple[str, ...]


def known_evidence(count: int, *, image_size: int = 32, seed: int = 0) -> Evidence:
    """Draw images with one sign each, a cross, a ring, bars or a saltire, whose shape is all that the class decides.

    The sign, a quarter of a side wide, lies at a random place on a ground of smooth and fine noise, in a random colour.
    Three squares of its size in colours drawn alike lie beside it and mean nothing. Place, colours and ground are drawn
    independently of the class, so that a network can only know it from the sign.

    Args:
        count: images, at least 1. Classes take turns.
        image_size: S, in pixels, at least 18.
        seed: the same seed gives the same images; other images come from another one.

    >>> found = known_evidence(8)
    >>> found.images.shape, found.labels.tolist(), found.classes
    (torch.Size([8, 3, 32, 32]), [0, 1, 2, 3, 0, 1, 2, 3], ('cross', 'ring', 'bars', 'saltire'))
    """
    for name, value, least in (("count", count, 1), ("image_size", image_size, _SMALLEST)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} is {value!r}: give a whole number, {least} or more")
    generator = torch.Generator().manual_seed(seed)
    signs = _draw_signs(image_size // 4)
    labels = torch.arange(count) % len(signs)
    differs = signs.any(0) & ~signs.all(0)

    images = _draw_ground(count, image_size, generator)
    masks = torch.zeros(count, image_size, image_size, dtype=torch.bool)
    side, slot = signs.shape[-1], image_size // 3
    slots = torch.rand(count, 9, generator=generator).argsort(1)[:, : 1 + _DISTRACTORS]
    shifts = torch.randint(slot - side + 1, (count, 1 + _DISTRACTORS, 2), generator=generator)
    colours = 0.5 + 0.5 * torch.rand(count, 1 + _DISTRACTORS, 3, 1, generator=generator)
    corners = torch.stack([slots // 3, slots % 3], -1) * slot + shifts
    for image, label in enumerate(labels.tolist()):
        for item, (top, left) in enumerate(corners[image].tolist()):
            shape = signs[label] if item == 0 else torch.ones_like(differs)
            window = images[image, :, top : top + side, left : left + side]
            window[:, shape] = colours[image, item]
        top, left = corners[image, 0].tolist()
        masks[image, top : top + side, left : left + side] = differs
    return Evidence((images * 255).round().to(torch.uint8), labels, masks, tuple(_SIGNS))


def _draw_ground(count: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, 3, S, S) in [0, 0.5]: clouds and grain."""
    clouds = torch.rand(count, 3, 4, 4, generator=generator)
    grain = torch.rand(count, 3, size, size, generator=generator)
    return 0.35 * interpolate(clouds, size=(size, size), mode="bilinear", align_corners=False) + 0.15 * grain


def _draw_signs(side: int) -> Tensor:
    """(classes, side, side) booleans."""
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    return torch.stack([draw(axis[:, None], axis[None]).expand(side, side) for draw in _SIGNS.values()])


_SIGNS = {  # of coordinates from -1 to 1
    "cross": lambda y, x: (y.abs() < 0.3) | (x.abs() < 0.3),
    "ring": lambda y, x: (y**2 + x**2).sqrt().sub(0.75).abs() < 0.3,
    "bars": lambda y, x: ((y + 1) * 2).floor() % 2 + 0 * x == 0,
    "saltire": lambda y, x: (y.abs() - x.abs()).abs() < 0.3,
}
