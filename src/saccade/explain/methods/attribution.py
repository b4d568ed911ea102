"""What a method of `explain` returns."""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["Attribution", "enlarge"]


class Attribution(NamedTuple):
    """`map` (B, H, W); `error` (B,) in logits, the `layer` read and what was `inferred` of the model, where the method
    has them."""

    map: Tensor
    error: Tensor | None = None
    layer: str | None = None
    inferred: str | None = None


def enlarge(map: Tensor, size: tuple[int, ...]) -> Tensor:
    """A map (B, h, w) on the grid of a layer, interpolated to pixels (B, H, W)."""
    return interpolate(map[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
