"""Grad-CAM (Selvaraju et al., 2017, arXiv:1610.02391), on the last map of any network, channels first or last."""

import torch
from torch import Tensor

from saccade.explain.classifier import Classifier, batches
from saccade.explain.methods.attribution import Attribution, Detail, enlarge
from saccade.explain.methods.layers import activations_and_slopes, find_maps

__all__ = ["grad_cam"]


def grad_cam(
    classify: Classifier,
    images: Tensor,
    target: Tensor,
    *,
    batch_size: int,
    layer: str | None = None,
    layout: str | None = None,
) -> Attribution:
    """Activations of one layer, weighted by each channel's mean gradient and summed over channels, at pixel resolution.

    Signed, in logits: the paper keeps the positive part for its pictures, but ranking pixels needs both.
    Interpolation is bilinear.

    Args:
        layer: module whose output is a map, or patch tokens; None takes the last one to run that the logit depends on,
            that is the last before global pooling. Where only the class token of the last tokens is read, it is the
            last norm after which patches still count.
        layout: "NCHW", "NHWC" or "NLC" (tokens), how the layer's output lies; None infers it from the sides, which
            must have the image's proportions, and reads a cube, which could be both, as NCHW.

    Raises: InputError if no layer returns a map, if the named one does not, or if the logit does not depend on it.
    """
    found = find_maps(classify, images[:1], None if layer is None else [layer], layout)
    maps = []
    for part, classes in batches(batch_size, images, target):
        ((activation, slope),) = activations_and_slopes(classify, part, classes, found)
        cam = (slope.mean((2, 3), keepdim=True) * activation).sum(1)
        maps.append(enlarge(cam, images.shape[-2:]).to(images))
    return Attribution(torch.cat(maps), layer=found[0].name, detail=Detail(tuple(found)))
