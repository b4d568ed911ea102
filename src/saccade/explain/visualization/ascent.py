"""Activation maximisation from given starts: normalised steps, jittered crops, total variation, octaves.

As in multifaceted feature visualization (2016, arXiv:1602.03616).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from saccade.errors import InputError, WorkError, check_choice
from saccade.explain.classifier import check_images, check_whole, evaluating
from saccade.explain.overlay import write_picture
from saccade.explain.visualization.denoise import denoise_total_variation
from saccade.explain.visualization.unit import READINGS, Unit

__all__ = [
    "CENTRE_BIAS",
    "MEAN_IMAGE",
    "Octave",
    "Visualization",
    "draw_noise",
    "save_sheet",
    "sheet",
    "visualize",
]

Values = float | Sequence[float]  # one, or one a channel

_GREY = 255  # steps and weights are of images in 0..255


@dataclass(frozen=True)
class Octave:
    """A stretch of the ascent at one size. Steps and weights are of images in 0..255, whatever the model takes.

    Attributes:
        iterations: steps.
        step: mean change of a pixel by the first step and, on a line, by one after the last.
        weight: of the distance in total-variation denoising, likewise; larger smooths less.
        scale: by which the image is enlarged before.
        reading: "logit" or "probability" of the class.
        window: standard deviation of the crop's place around the centre, as a share of the room there is. Small ones
            keep it in the centre.
        margin: border of the crop that does not change by itself, as a share of its shorter side. What changes does so
            more, as the step is a mean over the whole crop.
    """

    iterations: int
    step: tuple[float, float]
    weight: tuple[float, float]
    scale: float = 1.0
    reading: str = "logit"
    window: float = 0.3
    margin: float = 0.0

    def __post_init__(self) -> None:
        check_whole("iterations", self.iterations)
        check_choice("reading", self.reading, READINGS)
        if min(self.weight) <= 0 or min(self.step) <= 0 or self.window < 0 or not 0 <= self.margin < 0.5:
            raise InputError(f"{self}: give steps and weights above 0, a window from 0 and a margin below 0.5")
        if not self.scale >= 1:
            raise InputError(f"scale is {self.scale}: an octave enlarges; give 1 or more")


_MARGIN = 50 / 227  # pixels of AlexNet's crop

MEAN_IMAGE = (
    Octave(190, (1, 2), (0.4, 0.4)),
    Octave(150, (1, 1), (0.01, 2), scale=1.2),
    Octave(20, (2, 2), (0.1, 2), window=0.2, margin=_MARGIN),
    Octave(10, (2, 2), (0.4, 2)),
)
"""The published schedule from mean images."""

CENTRE_BIAS = (
    Octave(190, (11, 11), (0.001, 0.05), reading="probability"),
    Octave(150, (6, 6), (0.01, 0.08), scale=1.2, reading="probability"),
    Octave(150, (1, 1), (0.01, 2), scale=1.2),
    Octave(30, (3, 3), (0.1, 2), window=0.1, margin=_MARGIN),
    Octave(10, (6, 3), (0.01, 2)),
)
"""The published schedule from noise, such as `draw_noise` makes."""


@dataclass(frozen=True)
class Visualization:
    """What `visualize` grew.

    Attributes:
        images: (B, C, H, W), the centre of each canvas, in the model's unit.
        activations: (B,), the unit's, of these images; a class is read as its logit.
        starts: (B, C, H, W), where they started.
        canvas: (B, C, H', W'), the whole of what was grown: larger where octaves enlarge.
        target, layer: the unit.
        low, high: (C, 1, 1), the least and the largest value of a pixel.
        seconds: time it took.
    """

    images: Tensor
    activations: Tensor
    starts: Tensor
    canvas: Tensor
    target: int
    layer: str | None
    low: Tensor
    high: Tensor
    seconds: float


def visualize(
    model: nn.Module,
    starts: Tensor,
    *,
    target: int,
    bounds: tuple[Values, Values],
    layer: str | None = None,
    axis: int = 1,
    schedule: Sequence[Octave] = MEAN_IMAGE,
    crop: tuple[int, int] | None = None,
    tv_iterations: int = 100,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
) -> Visualization:
    """Grow images that excite a unit, each from its start: from mean images of facets, one picture a facet.

    A step goes up the gradient, scaled to a mean absolute change; values are clipped to the bounds, and the crop is
    denoised. All images share the crop's place, so that none depends on its companions.

    Args:
        model: runs in eval mode; its parameters may be frozen; it is left as it was.
        starts: (B, C, H, W), normalised floats within the bounds, such as `find_facets(...).starts`.
        target: class index; with a layer, index of its channel, which is averaged over places.
        bounds: least and largest value of a pixel in the model's unit, each a number or one a channel; for images that
            were normalised, (0 - mean) / std and (1 - mean) / std.
        layer: name of the module whose unit it is; None takes the logits.
        axis: where the layer's output has its channels: 1, or -1 where they are last.
        schedule: octaves in turn: `MEAN_IMAGE`, `CENTRE_BIAS` or your own.
        crop: height and width of what the model sees; None takes the starts' size. Only where the canvas is larger
            than the crop does the crop move.
        tv_iterations: of the denoising.
        batch_size: the most images in one pass.
        generator: of the crop's places, on the CPU; None takes torch's own.

    Raises: InputError for wrong arguments and starts out of bounds; WorkError for activations or gradients that are NaN
        or infinite.
    """
    began = time.perf_counter()
    check_images(starts)
    for name, value in {"tv_iterations": tv_iterations, "batch_size": batch_size}.items():
        check_whole(name, value)
    if not schedule:
        raise InputError("schedule is empty: give at least one Octave")
    with evaluating(model, grad=True) as classify:
        starts = starts.detach().clone()  # a tensor made in inference mode could not be grown
        low, high = _read_bounds(bounds, starts)
        canvas = (starts - low) / (high - low) * _GREY
        if canvas.min() < -1 or canvas.max() > _GREY + 1:
            raise InputError(
                f"starts hold values from {starts.min():.3g} to {starts.max():.3g}, out of the bounds {bounds}: give "
                "both in the model's unit"
            )
        size = tuple(starts.shape[-2:]) if crop is None else crop
        if len(size) != 2 or not all(0 < side <= whole for side, whole in zip(size, starts.shape[-2:])):
            raise InputError(f"crop is {crop} of starts {tuple(starts.shape)}: give a height and a width within them")
        unit = Unit(classify, target, layer, axis, _centre(starts[:1], size))

        def climb(pixels: Tensor, octave: Octave, step: float, weight: float) -> Tensor:
            slopes = torch.cat([_slope(unit, part, low, high, octave.reading) for part in pixels.split(batch_size)])
            slopes = _spare_border(slopes, round(octave.margin * min(size)))
            length = slopes.abs().mean((1, 2, 3), keepdim=True)
            moved = pixels + step * slopes / torch.where(length > 0, length, 1)
            return denoise_total_variation(moved.clamp(0, _GREY), weight, iterations=tv_iterations)

        for octave in schedule:
            if octave.scale != 1:
                canvas = interpolate(canvas, scale_factor=octave.scale, mode="bilinear", align_corners=False)
            for i in range(octave.iterations):
                step, weight = (_between(ends, i / octave.iterations) for ends in (octave.step, octave.weight))
                top, left = _place(canvas.shape[-2:], size, octave.window, generator)
                here = (..., slice(top, top + size[0]), slice(left, left + size[1]))
                canvas[here] = climb(canvas[here], octave, step, weight)
        canvas = _scale_to(canvas, low, high)
        images = _centre(canvas, size).contiguous()
        with torch.no_grad():
            activations = torch.cat([unit(part) for part in images.split(batch_size)])
    seconds = time.perf_counter() - began
    return Visualization(images, activations, starts, canvas, target, layer, low, high, seconds)


def draw_noise(
    count: int,
    size: tuple[int, int, int],
    bounds: tuple[Values, Values],
    *,
    mean: float = 175.0,
    std: float = 8.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(count, *size) starts of noise in the model's unit; mean and std are of images in 0..255, the published ones.

    Args:
        size: C, H and W.
        bounds: as in `visualize`.
    """
    noise = (mean + std * torch.randn(count, *size, generator=generator)).clamp(0, _GREY)
    return _scale_to(noise, *_read_bounds(bounds, noise))


def sheet(found: Visualization, *, gap: int = 2) -> Tensor:
    """A picture (3, height, width) uint8 on the CPU: starts in the upper row, what grew from each below."""
    rows = []
    for images in (found.starts, found.images):
        grey = ((images - found.low) / (found.high - found.low)).clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
        if grey.shape[1] not in (1, 3):
            raise InputError(f"images have {grey.shape[1]} channels: a picture needs 1 or 3")
        padded = pad(grey.expand(-1, 3, -1, -1), (gap,) * 4, value=255)
        rows.append(torch.cat(list(padded), -1))
    width = max(row.shape[-1] for row in rows)
    return torch.cat([pad(row, (0, width - row.shape[-1]), value=255) for row in rows], 1)


def save_sheet(path: str | Path, found: Visualization, *, gap: int = 2) -> Path:
    """Write `sheet(found)` as a picture in the format that the path's suffix names, making its folder.

    Returns: the path.
    Raises: InputError for an unknown suffix; WorkError if the file cannot be written.
    """
    return write_picture(path, sheet(found, gap=gap))


def _slope(unit: Unit, pixels: Tensor, low: Tensor, high: Tensor, reading: str) -> Tensor:
    pixels = pixels.detach().clone().requires_grad_()
    answer = unit(_scale_to(pixels, low, high), reading).sum()
    if not answer.requires_grad:
        raise InputError(
            f"layer {unit.layer!r} carries no gradient of the images: name one that depends on them smoothly"
        )
    (slope,) = torch.autograd.grad(answer, pixels)
    if not slope.isfinite().all():
        raise WorkError("a gradient of the unit is NaN or infinite: check the model's weights")
    return slope


def _scale_to(pixels: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """From 0..255 to the model's unit."""
    return low + pixels / _GREY * (high - low)


def _spare_border(slopes: Tensor, margin: int) -> Tensor:
    if not margin:
        return slopes
    inner = torch.zeros_like(slopes)
    here = (..., slice(margin, -margin), slice(margin, -margin))
    inner[here] = slopes[here]
    return inner


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * share


def _place(
    whole: torch.Size, size: tuple[int, ...], window: float, generator: torch.Generator | None
) -> tuple[int, int]:
    """Upper left corner of the crop, normal around the centre and within the canvas."""
    free = torch.tensor([side - cut for side, cut in zip(whole, size)])
    drawn = free / 2 + window * free * torch.randn(2, generator=generator)
    top, left = drawn.round().long().clamp(min=0).minimum(free).tolist()
    return top, left


def _centre(images: Tensor, size: tuple[int, ...]) -> Tensor:
    top, left = ((side - cut) // 2 for side, cut in zip(images.shape[-2:], size))
    return images[..., top : top + size[0], left : left + size[1]]


def _read_bounds(bounds: tuple[Values, Values], images: Tensor) -> tuple[Tensor, Tensor]:
    """(C, 1, 1) each."""
    channels = images.shape[1]
    given = [torch.as_tensor(value, dtype=images.dtype, device=images.device) for value in bounds]
    if len(given) != 2 or not all(each.shape in ((), (channels,)) and each.isfinite().all() for each in given):
        raise InputError(
            f"bounds are {bounds}: give two finite numbers, or two lists of one for each of {channels} channels"
        )
    low, high = (each.expand(channels).view(-1, 1, 1) for each in given)
    if not (low < high).all():
        raise InputError(f"bounds are {bounds}: the first has to be below the second in every channel")
    return low, high
