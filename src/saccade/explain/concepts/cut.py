"""A model cut at one layer: what the layer gives, and the rest of the model as a function of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from saccade.errors import InputError, check_choice
from saccade.explain.classifier import Classifier, batches, check_whole
from saccade.explain.methods.layers import find_maps
from saccade.explain.relevance.modules import watching

__all__ = ["Cut", "crop", "find_cut"]


@dataclass(frozen=True)
class Cut:
    """Where a model is cut.

    Attributes:
        layer: name of the module.
        axis: of its output's channels.
        point: which of its calls in a forward pass, the last one: "NAME", or "NAME#2" and so on.
    """

    layer: str
    axis: int
    point: str

    @torch.no_grad()
    def read(self, classify: Classifier, images: Tensor, batch_size: int) -> Tensor:
        """The layer's outputs, channels last: (B, *space, dim)."""
        return torch.cat([self._read(classify, part) for (part,) in batches(batch_size, images)])

    def _read(self, classify: Classifier, images: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def keep(point: str, value: Tensor) -> Tensor:
            if point == self.point:
                seen.append(value.clone())
            return value

        self._run(classify, images, keep)
        return seen[0].movedim(self.axis, -1)

    def resume(self, classify: Classifier, images: Tensor, activation: Tensor) -> Tensor:
        """What the model answers, (B, ...), where the layer gives `activation` (B, *space, dim) instead of its output.

        The images feed whatever goes around the layer. Differentiable by the activation.
        """
        return self._run(
            classify,
            images,
            lambda point, value: activation.movedim(-1, self.axis).to(value).clone() if point == self.point else value,
        )

    def _run(self, classify: Classifier, images: Tensor, see: Callable[[str, Tensor], Tensor]) -> Tensor:
        with watching(classify.model, [self.layer], see):
            return classify(images)


def find_cut(classify: Classifier, image: Tensor, layer: str | None = None, layout: str | None = None) -> Cut:
    """Cut at the named layer, or at the one that Grad-CAM reads: the last to run whose output is a map.

    Args:
        image: (1, C, H, W).
        layer: its output may be a map, tokens (B, N, dim) or (B, dim).
        layout: of maps, "NCHW" or "NHWC"; None infers it.

    Raises: InputError if there is no such layer or output.
    """
    axis = None
    if layer is None:
        (found,) = find_maps(classify, image, None, layout)
        layer, axis = found.name, found.axis
    else:
        check_choice("layer", layer, dict(classify.model.named_modules()))
    seen: dict[str, torch.Size] = {}

    def note(point: str, value: Tensor) -> Tensor:
        seen[point] = value.shape
        return value

    with torch.no_grad(), watching(classify.model, [layer], note):
        classify(image)
    if not seen:
        raise InputError(f"layer {layer!r} does not run in a forward pass: name one that does")
    point, shape = list(seen.items())[-1]
    if axis is None:
        axis = _find_axis(classify, image, layer, layout, shape)
    return Cut(layer, axis, point)


def crop(images: Tensor, patch: int, *, overlap: float = 0.2) -> Tensor:
    """Squares of `patch` pixels that overlap by a fifth, each enlarged to the images' size: (n, C, H, W), as in CRAFT.

    Args:
        images: (B, C, H, W).
        patch: side in pixels, at most the shorter side.
        overlap: share of a side; the step is the rest of it, in whole pixels.
    """
    size = images.shape[-2:]
    check_whole("patch", patch, 1, min(size))
    step = max(1, int((1 - overlap) * patch))
    squares = images.unfold(2, patch, step).unfold(3, patch, step)  # (B, C, rows, columns, patch, patch)
    squares = squares.movedim(1, 3).flatten(0, 2)
    return interpolate(squares, size=size, mode="bilinear", align_corners=False)


def _find_axis(classify: Classifier, image: Tensor, layer: str, layout: str | None, shape: torch.Size) -> int:
    if not shape or shape[0] != len(image) or len(shape) not in (2, 3, 4):
        raise InputError(
            f"layer {layer!r} returns {tuple(shape)} for 1 image: concepts need a map, tokens (B, N, dim) or (B, dim)"
        )
    if len(shape) != 4 or shape[2:] == (1, 1):
        return 1 if len(shape) != 3 else 2
    (found,) = find_maps(classify, image, [layer], layout)
    return found.axis
