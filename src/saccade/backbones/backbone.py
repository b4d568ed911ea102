"""What every backbone is: a network of timm's shape, so that timm's habits work on it."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saccade.errors import InputError, check_choice

__all__ = ["Backbone", "FeatureExtractor", "FeatureInfo"]

_WITH_THE_GROUP_BEFORE = (99999,)  # timm's sign in a group matcher
_UNDECAYED = ("_bias", "cls_token", "pos_embed", "position_bias_table")


class FeatureInfo(list[dict[str, Any]]):
    """For each stage `num_chs`, `reduction` (input side / map side) and `module`, with timm's readers."""

    @classmethod
    def of_stages(cls, dims: Sequence[int], *, reduction: int = 4, module: str = "stages.{}") -> "FeatureInfo":
        """Stages of which each has half the map of the one before.

        Args:
            dims: channels of the stages.
            reduction: of the first one.
            module: name of a stage's module, with {} for its number.
        """
        return cls(
            {"num_chs": dim, "reduction": reduction * 2**stage, "module": module.format(stage)}
            for stage, dim in enumerate(dims)
        )

    def channels(self) -> list[int]:
        """Channels of each stage's map."""
        return [stage["num_chs"] for stage in self]

    def reduction(self) -> list[int]:
        """Input side over map side, for each stage."""
        return [stage["reduction"] for stage in self]

    def module_name(self) -> list[str]:
        """Name of the module that returns each stage's map."""
        return [stage["module"] for stage in self]

    def get_dicts(self, keys: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """What is known of each stage, or these entries of it."""
        return [{key: stage[key] for key in keys or stage} for stage in self]


class Backbone(nn.Module, ABC):
    """An image network: (B, in_chans, H, W) to logits (B, num_classes).

    Subclasses set `num_features`, `feature_info` and `first_conv`, implement `run_stages`, and end with
    `reset_classifier(num_classes)`. Where official weights have other names or shapes, they write `rename`.

    Attributes:
        num_classes: 0 leaves the classifier out: `forward` then returns pooled features.
        num_features: channels of the last map.
        head_hidden_size: channels that the classifier takes; those of the last map unless `pre_logits` changes them.
        num_prefix_tokens: class tokens that stand before the patches in what `forward_features` returns.
        feature_info: the stages' maps.
        first_conv: name of the convolution that sees the images.
        classifiers: names of the layers that depend on the number of classes.
        global_pool: how the last map becomes a vector: one of `pools`, or "" to leave it a map.
        drop_rate: dropout before the classifier.
        pre_logits: a module between the pooled features and the classifier; most networks have none.
        grad_checkpointing: recompute blocks in the backward pass, for less memory.
        default_cfg: what timm calls by that name: image size, mean, std, classifier and so on.
        refuses: what the network cannot do, of "compile", "export" and "onnx", with the reason.
    """

    num_classes: int
    num_features: int
    feature_info: FeatureInfo
    first_conv: str
    head: nn.Module
    num_prefix_tokens = 0
    classifiers: tuple[str, ...] = ("head",)
    pools: tuple[str, ...] = ("avg", "max")
    refuses: Mapping[str, str] = {}

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.global_pool = self.pools[0]
        self.drop_rate = 0.0
        self.default_cfg: dict[str, Any] = {}

    @abstractmethod
    def run_stages(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) to the maps of all stages, each (B, C, H', W'), the last as the head takes it."""

    def forward_stages(self, images: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) to the maps of all stages, each (B, C, H', W')."""
        self._check(images)
        return self.run_stages(images)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) to the last map, (B, num_features, H', W')."""
        return self.forward_stages(images)[-1]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` returns to logits; pre_logits stops before the classifier."""
        pooled = self.pool(features)
        if self.global_pool:
            between = getattr(self, "pre_logits", None)
            pooled = pooled if between is None else between(pooled)
            pooled = F.dropout(pooled, self.drop_rate, self.training)
        return pooled if pre_logits else self.head(pooled)

    def pool(self, features: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C)."""
        if self.global_pool == "max":
            return features.amax((-2, -1))
        return features.mean((-2, -1)) if self.global_pool else features

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(images))

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.get_submodule(self.first_conv).in_channels  # type: ignore[return-value]

    @property
    def head_hidden_size(self) -> int:
        """Channels that the classifier takes."""
        return self.num_features

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's newer name of `default_cfg`."""
        return self.default_cfg

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in; 0 leaves it out.

        Args:
            num_classes: its outputs.
            global_pool: as the attribute; None keeps it.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool or num_classes:
            check_choice("global_pool", pool, self.pools)
        self.num_classes, self.global_pool = num_classes, pool
        for name in self.classifiers:
            new = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
            if num_classes:
                self.init_classifier(new)
            setattr(self, name, new)

    def init_classifier(self, layer: nn.Module) -> None:
        """Start a new classifier; unless a subclass says otherwise, as torch does."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping what they computed."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone, besides biases and norms."""
        return {name for name, _ in self.named_parameters() if name.endswith(_UNDECAYED)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order parameters from input to output, for layer-wise learning rates.

        Made from the order in which modules stand. The stages are the numbered modules that `feature_info` names, and
        their blocks are numbered too, in the stage itself or in its `blocks`.

        Args:
            coarse: a group for each stage, rather than for each block.

        Returns: "stem", where something stands before the stages, and "blocks".
        """
        bodies = {name.split(".")[0] for name in self.feature_info.module_name() if "." in name}
        children = [name for name, _ in self.named_children()]
        first = min(map(children.index, bodies))
        stem = [*(name for name, _ in self.named_parameters(recurse=False)), *children[:first]]
        last = [name for name in children[first:] if name not in bodies and name not in self.classifiers]
        body = _one_of(sorted(bodies))
        blocks: list[tuple[str, tuple[int, ...] | None]] = [(rf"^{body}\.(\d+)", None)]
        if not coarse:
            stages = [stage for each in bodies for stage in self.get_submodule(each).children()]
            after = {name for stage in stages for name in _after_blocks(stage)}
            blocks = [(rf"^{body}\.(\d+)(?:\.blocks)?\.(\d+)\.", None), (rf"^{body}\.(\d+)\.", (-1,))]
            if after:
                blocks.insert(0, (rf"^{body}\.(\d+)\.{_one_of(sorted(after))}\.", _WITH_THE_GROUP_BEFORE))
        blocks += [(rf"^{_one_of(last)}\b", _WITH_THE_GROUP_BEFORE)] if last else []
        return ({"stem": rf"^{_one_of(stem)}\b"} if stem else {}) | {"blocks": blocks}

    def run_blocks(self, blocks: Iterable[nn.Module], x: Tensor, *args: Any) -> Tensor:
        """Run blocks one after the other, recomputing them in the backward pass where that was asked for."""
        for block in blocks:
            x = self.run_block(block, x, *args)
        return x

    def run_block(self, block: Callable[..., Any], *args: Any) -> Any:
        """Run one block, recomputing it in the backward pass where that was asked for."""
        if self.grad_checkpointing and self.training:
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official weights under our names and in our shapes; called for a state dict that has not our names."""
        return dict(state)

    def refit(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Make a tensor that was learned at another image size fit this network, by interpolation.

        Args:
            name: ours.
            tensor: from the checkpoint, of another shape than `shape`.
            shape: that of this network.
        """
        return tensor

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise InputError(f"images is {tuple(images.shape)}: give a batch (B, {self.in_chans}, H, W)")


class FeatureExtractor(nn.Module):
    """A backbone that returns the maps of its stages: (B, in_chans, H, W) to a list of (B, C, H', W').

    Args:
        model: loses its classifier.
        out_indices: numbers of stages, negative ones from the end; a single number is that many of the last ones, and
            None all.
    """

    def __init__(self, model: Backbone, out_indices: Sequence[int] | int | None = None) -> None:
        super().__init__()
        stages = range(len(model.feature_info))
        if isinstance(out_indices, int):
            out_indices = tuple(range(-out_indices, 0))
        chosen = tuple(stages) if out_indices is None else tuple(out_indices)
        if not all(-len(stages) <= i < len(stages) for i in chosen):
            raise InputError(f"out_indices is {chosen}: the network has stages 0 to {len(stages) - 1}")
        model.reset_classifier(0)
        if hasattr(model, "pre_logits"):
            model.pre_logits = nn.Identity()
        self.model = model
        self.out_indices = chosen
        self.feature_info = FeatureInfo(model.feature_info[i] for i in chosen)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.model.forward_stages(images)
        return [maps[i] for i in self.out_indices]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As the backbone's."""
        self.model.set_grad_checkpointing(enable)


def _one_of(names: Iterable[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, names))})"


def _after_blocks(stage: nn.Module) -> list[str]:
    """Names of the modules that stand behind the blocks of a stage."""
    names = [name for name, _ in stage.named_children()]
    return names[names.index("blocks") + 1 :] if "blocks" in names else []
