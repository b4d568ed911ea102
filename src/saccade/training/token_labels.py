"""Token labelling (Jiang et al., 2021, arXiv:2104.10858), as VOLO learns: a target for the image and one for every
token."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from saccade.errors import InputError

__all__ = ["token_label_loss"]


def token_label_loss(
    logits: Tensor,
    dense: Tensor,
    box: tuple[int, int, int, int],
    target: Tensor,
    dense_target: Tensor | None = None,
    *,
    class_weight: float = 1.0,
    dense_weight: float = 1.0,
) -> Tensor:
    """Cross-entropy of the class token plus that of the patches.

    Where tokens were mixed, the image's target is mixed with that of its partner by the box's share of the map. The
    first three arguments are what `VOLO.forward_dense` returns.

    Args:
        logits: (B, classes).
        dense: (B, H, W, classes), each of its own image.
        box: first row, row behind the last, first column, column behind the last, in tokens; partners stand in the
            batch in reverse order.
        target: (B, classes), shares of classes.
        dense_target: (B, H, W, classes), shares of classes for every token; None takes the image's.
        class_weight, dense_weight: of the two terms. VOLO's class takes 1 and 1, its training script 0.5 for patches
            (recalled).

    Returns: a number, the mean over images and tokens.

    >>> even = torch.zeros(2, 4)
    >>> token_label_loss(even, torch.zeros(2, 3, 3, 4), (0, 0, 0, 0), torch.eye(4)[:2])  # twice the logarithm of 4
    tensor(2.7726)
    """
    if dense.ndim != 4 or target.shape != logits.shape or dense.shape[::3] != logits.shape:
        raise InputError(
            f"logits is {tuple(logits.shape)}, dense is {tuple(dense.shape)} and target is {tuple(target.shape)}: give "
            "(B, classes), (B, H, W, classes) and shares (B, classes)"
        )
    if dense_target is None:
        dense_target = target[:, None, None].expand_as(dense)
    elif dense_target.shape != dense.shape:
        raise InputError(f"dense_target is {tuple(dense_target.shape)}: give {tuple(dense.shape)}, as dense is")
    top, bottom, left, right = box
    share = (bottom - top) * (right - left) / (dense.shape[1] * dense.shape[2])
    mixed = target if share == 0 else torch.lerp(target, target.flip(0), share)
    patches = cross_entropy(dense.flatten(0, 2), dense_target.flatten(0, 2))
    return class_weight * cross_entropy(logits, mixed) + dense_weight * patches
