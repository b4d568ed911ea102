"""What a method of `explain` returns."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from torch.nn.functional import interpolate

if TYPE_CHECKING:
    from saccade.explain.relevance import Relevance

__all__ = ["Attribution", "Detail", "LayerMap", "enlarge"]


class LayerMap(NamedTuple):
    """A module whose values lie on a grid over the image.

    Attributes:
        name: of the module.
        layout: "NCHW", "NHWC" or "NLC" (tokens one after the other, row by row).
        grid: rows and columns.
        prefix: tokens before those of the grid, which belong to no place.
        inferred: what was found out, and not given or told by the model: of "layer", "layout", "grid", "prefix".
    """

    name: str
    layout: str
    grid: tuple[int, int]
    prefix: int = 0
    inferred: tuple[str, ...] = ()

    @property
    def axis(self) -> int:
        """Of the channels."""
        return self.layout.index("C")


@dataclass(frozen=True)
class Detail:
    """How a map came about.

    Attributes:
        layers: the modules that were read, and how; () for methods that read none.
        account: of the method relevance, where the logits went: `absorbed`, the conservation ledger; `unknown`,
            operations without a rule with their share; `served`, which rule served which operation. None for others.
    """

    layers: tuple[LayerMap, ...] = ()
    account: "Relevance | None" = None


class Attribution(NamedTuple):
    """`map` (B, H, W); `error` (B,) in logits, the `layer` read, what was `inferred` of the model and more in
    `detail`, where the method has them."""

    map: Tensor
    error: Tensor | None = None
    layer: str | None = None
    inferred: str | None = None
    detail: Detail = Detail()


def enlarge(map: Tensor, size: tuple[int, ...]) -> Tensor:
    """A map (B, h, w) on the grid of a layer, interpolated to pixels (B, H, W)."""
    return interpolate(map[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
