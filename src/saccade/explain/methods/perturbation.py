"""Methods that change pixels and watch the logit."""

import torch
from torch import Tensor

from saccade.explain.classifier import Classifier, batches, check_whole
from saccade.explain.methods.attribution import Attribution

__all__ = ["occlusion"]


def occlusion(
    classify: Classifier,
    images: Tensor,
    target: Tensor,
    *,
    batch_size: int,
    window: int | None = None,
    stride: int | None = None,
    filler: float = 0.0,
) -> Attribution:
    """Fall of the logit when a square hides part of the image, mean over the squares that cover a pixel.

    Signed, in logits (Zeiler and Fergus, 2014, arXiv:1311.2901).

    Args:
        window: side of the square in pixels; None takes an eighth of the image's shorter side.
        stride: pixels between windows; None takes half a window. With both defaults a square image costs about 225
            forward passes, whatever its size.
        filler: what a hidden pixel becomes; 0 is the training images' mean colour in normalised floats.
    """
    from captum.attr import Occlusion

    side = min(images.shape[-2:])
    window = max(1, side // 8) if window is None else window
    check_whole("window", window, 1, side)
    stride = max(1, window // 2) if stride is None else stride
    check_whole("stride", stride, 1, window)

    method, channels = Occlusion(classify), images.shape[1]
    maps = []
    for part, classes in batches(batch_size, images, target):
        relevance = method.attribute(
            part,
            sliding_window_shapes=(channels, window, window),
            strides=(channels, stride, stride),
            baselines=float(filler),
            target=classes,
            perturbations_per_eval=max(1, batch_size // len(part)),
        )
        maps.append(relevance[:, 0])  # all channels are hidden together, so each holds the same fall
    return Attribution(torch.cat(maps).to(images))
