"""What every backbone is: a network of timm's shape, so that timm's habits work on it."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saccade.errors import InputError

__all__ = ["Backbone", "DropPath", "FeatureExtractor", "FeatureInfo"]


class FeatureInfo(list[dict[str, Any]]):
    """For each stage `num_chs`, `reduction` (input side / map side) and `module`, with timm's readers."""

    def channels(self) -> list[int]:
        """Channels of each stage's map."""
        return [stage["num_chs"] for stage in self]

    def reduction(self) -> list[int]:
        """Input side over map side, for each stage."""
        return [stage["reduction"] for stage in self]

    def module_name(self) -> list[str]:
        """Name of the module that returns each stage's map."""
        return [stage["module"] for stage in self]


class Backbone(nn.Module, ABC):
    """An image network: (B, in_chans, H, W) to logits (B, num_classes).

    Subclasses set `num_features` and `feature_info`, implement `forward_stages`, and end with
    `reset_classifier(num_classes)`.

    Attributes:
        num_classes: 0 leaves the classifier out: `forward` then returns pooled features (B, num_features).
        num_features: channels of the last map.
        feature_info: the stages' maps.
        grad_checkpointing: recompute blocks in the backward pass, for less memory.
    """

    num_classes: int
    num_features: int
    feature_info: FeatureInfo
    head: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    @abstractmethod
    def forward_stages(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) to the maps of all stages, each (B, C, H', W')."""

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the last map, (B, num_features, H', W')."""
        return self.forward_stages(images)[-1]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits; pre_logits stops before the classifier, at (B, num_features)."""
        pooled = self.pool(features)
        return pooled if pre_logits else self.head(pooled)

    def pool(self, features: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C)."""
        return features.mean((-2, -1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier in; 0 leaves it out."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping what they computed."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone, besides biases and norms."""
        return {name for name, _ in self.named_parameters() if name.endswith(("_bias", "position_bias_table"))}

    def run_blocks(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        """Run blocks one after the other, recomputing them in the backward pass where that was asked for."""
        for block in blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class FeatureExtractor(nn.Module):
    """A backbone that returns the maps of its stages: (B, in_chans, H, W) to a list of (B, C, H', W')."""

    def __init__(self, model: Backbone, out_indices: tuple[int, ...] | None = None) -> None:
        super().__init__()
        stages = range(len(model.feature_info))
        chosen = tuple(stages) if out_indices is None else tuple(out_indices)
        if not all(-len(stages) <= i < len(stages) for i in chosen):
            raise InputError(f"out_indices is {chosen}: the network has stages 0 to {len(stages) - 1}")
        model.reset_classifier(0)
        self.model = model
        self.out_indices = chosen
        self.feature_info = FeatureInfo(model.feature_info[i] for i in chosen)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.model.forward_stages(images)
        return [maps[i] for i in self.out_indices]


class DropPath(nn.Module):
    """Leave a residual branch out, image by image, with some probability (stochastic depth, 2016, arXiv:1603.09382)."""

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        keep = 1 - self.probability
        kept = x.new_empty(len(x), *(1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * kept / keep

    def extra_repr(self) -> str:
        return f"probability={self.probability}"
