"""A row of a family's table: how a published network is built, and what its weights expect."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saccade.backbones.backbone import Backbone

__all__ = ["ModelSummary", "Variant"]


@dataclass(frozen=True)
class Variant:
    """How to build a network, and with what images it was trained.

    Attributes:
        build: a partial of the family's class; called with num_classes, in_chans and options.
        image_size: pixels along each side.
        weights: hub id of published weights, for `pretrained=True`.
        mean, std: of the channels, by which pixels in [0, 1] are normalised.
        crop: side of the central crop over side of the image, when the network is evaluated.
    """

    build: "Callable[..., Backbone]"
    image_size: int = 224
    weights: str | None = None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop: float = 0.875

    def default_cfg(self, name: str, model: "Backbone") -> dict[str, Any]:
        """What timm keeps with a model under this name."""
        side = self.image_size // model.feature_info.reduction()[-1]
        return {
            "architecture": name,
            "url": "",
            "hf_hub_id": self.weights,
            "num_classes": 1000,
            "input_size": (3, self.image_size, self.image_size),
            "pool_size": (side, side),
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": self.crop,
            "crop_mode": "center",
            "mean": self.mean,
            "std": self.std,
            "first_conv": model.first_conv,
            "classifier": model.classifiers if len(model.classifiers) > 1 else model.classifiers[0],
        }


@dataclass(frozen=True)
class ModelSummary:
    """What a network is, without building it in memory.

    Attributes:
        family: the file that it comes from: "halonet".
        summary: the first sentence of its class.
        params: parameters with 1000 classes.
        image_size: pixels along each side of the images that its weights expect.
        channels, reductions: of the stages' maps.
        weights: hub id of published weights, or None.
        default_cfg, refuses: as the built network has them.
    """

    family: str
    summary: str
    params: int
    image_size: int
    channels: list[int]
    reductions: list[int]
    weights: str | None
    default_cfg: dict[str, Any]
    refuses: Mapping[str, str]
