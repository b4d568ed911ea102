"""MOAT (Yang et al., 2022, arXiv:2210.01820): mobile convolution, and attention behind it in the later stages."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saccade.backbones.backbone import Backbone, FeatureInfo
from saccade.backbones.mbconv import ConvStem, MBConv, init_normal
from saccade.backbones.patches import channels_first, channels_last
from saccade.backbones.positions import refit_relative_table
from saccade.backbones.residual import drop_path_rates
from saccade.backbones.variant import Variant
from saccade.errors import InputError
from saccade.mixers import WindowAttention

__all__ = ["MOAT", "VARIANTS", "MOATStage"]

Sizes = int | tuple[int, int]


class MOATStage(NamedTuple):
    """Blocks on one map, which halves the one before.

    Attributes:
        depth: how many.
        dim: channels.
        attend: blocks have attention behind their convolution, and no squeeze-and-excitation inside.
        table_size: tokens along each axis of the map, or window, for which position biases are learned; None learns
            none.
        window_size: tokens of a window along each axis; None attends to the whole map.
    """

    depth: int
    dim: int
    attend: bool = False
    table_size: Sizes | None = None
    window_size: Sizes | None = None


class MOAT(Backbone):
    """Stages of mobile convolutions, then stages of MOAT blocks.

    It serves any image size: position biases are interpolated bilinearly to the map or window, and a map that the
    window does not divide has smaller windows at its end. Maps are those before the GELU that the authors' dense heads
    put behind each stage.

    Args:
        stages: what differs from stage to stage.
        stem_dims: channels of the stem's two convolutions.
        dim_head: channels of an attention head.
        position_bias: learn a bias for each relative position, in stages with a table_size.
        global_at_end: the last block of each stage attends to the whole map, whatever the windows of the others.
        expansion: channels inside blocks over outside.
        gate_ratio: channels inside squeeze-and-excitation over those of the block.
        pool_size: pixels along each side of the average in the shortcut of a block that halves the map: 2 to
            classify; the authors take 3 for dense tasks.
        drop_path_rate: probability towards which those of leaving a block's branches out grow linearly; the last block
            stays one step below it, as in the authors' code.
        num_classes, in_chans: as for every backbone.
    """

    def __init__(
        self,
        stages: tuple[MOATStage, ...],
        *,
        stem_dims: tuple[int, int] = (64, 64),
        dim_head: int = 32,
        position_bias: bool = True,
        global_at_end: bool = False,
        expansion: float = 4,
        gate_ratio: float = 0.25,
        pool_size: int = 2,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        stages = tuple(MOATStage(*stage) for stage in stages)
        if any(stage.attend and stage.dim % dim_head for stage in stages):
            dims = tuple(stage.dim for stage in stages)
            raise InputError(
                f"dim_head is {dim_head} and dims are {dims}: heads of this width do not share the channels"
            )
        depths = [stage.depth for stage in stages]
        rates = drop_path_rates(drop_path_rate * (1 - 1 / sum(depths)), depths)
        self.stem = ConvStem(in_chans, stem_dims)
        self.stages = nn.ModuleList()
        before = stem_dims[1]
        for stage, of_stage in zip(stages, rates):
            blocks: list[nn.Module] = []
            for number, rate in enumerate(of_stage):
                widths = before, stage.dim, int(expansion * stage.dim)
                options: dict[str, Any] = {"stride": 1 if number else 2, "pool_size": pool_size, "drop_path": rate}
                before = stage.dim
                if not stage.attend:
                    blocks.append(MBConv(*widths, gate=max(1, int(gate_ratio * stage.dim)), **options))
                    continue
                whole = stage.window_size is None or (global_at_end and number == stage.depth - 1)
                attention = WindowAttention(
                    stage.dim,
                    stage.dim // dim_head,
                    num_windows=1 if whole else None,
                    window_size=None if whole else stage.window_size,
                    table_size=stage.table_size,
                    position_bias=position_bias and stage.table_size is not None,
                )
                blocks.append(_MOATBlock(*widths, attention=attention, **options))
            self.stages.append(nn.Sequential(*blocks))
        self.pre_logits = nn.LayerNorm(before)
        self.num_features = before
        self.feature_info = FeatureInfo.of_stages([stage.dim for stage in stages])
        self.first_conv = "stem.conv1"
        self.apply(init_normal)
        self.reset_classifier(num_classes)

    def run_stages(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        maps = []
        for blocks in self.stages:
            assert isinstance(blocks, nn.Sequential)
            x = self.run_blocks(blocks, x)
            maps.append(x)
        return maps

    def init_classifier(self, layer: nn.Module) -> None:
        """As all layers."""
        init_normal(layer)

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' TensorFlow variables: kernels (height, width, in, out), projections (channels, heads, width)."""
        renamed: dict[str, Tensor] = {}
        for official, tensor in state.items():
            name = _renamed(official)
            renamed[name] = _transposed(official, tensor)
            if name.endswith("running_mean"):  # of steps taken, which TensorFlow does not count
                counter = torch.zeros((), dtype=torch.long, device=tensor.device)
                renamed[name.replace("running_mean", "num_batches_tracked")] = counter
        for name in [name for name in renamed if re.search(r"\.attn\.q\.", name)]:
            parts = [renamed.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
            renamed[name.replace(".q.", ".qkv.")] = torch.cat(parts)
        return renamed

    def refit(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Position tables of another size are interpolated."""
        return refit_relative_table(name, tensor, shape)


class _MOATBlock(MBConv):
    """A convolutional block without gate, then x + attention(norm(x)): (B, C, H, W) to (B, C', H', W')."""

    def __init__(self, *args: Any, attention: WindowAttention, **options: Any) -> None:
        super().__init__(*args, **options)
        self.norm = nn.LayerNorm(attention.dim)
        self.attn = attention

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(super().forward(x))
        return channels_first(x + self.drop_path(self.attn(self.norm(x))))


_NAMES = (
    (r":0$", ""),
    (r"^(moat/)?(stem/)?conv_0/", "stem/conv1/"),
    (r"^(moat/)?(stem/)?norm_0/", "stem/norm1/"),
    (r"^(moat/)?(stem/)?conv_1/", "stem/conv2/"),
    (r"^moat/final_layer_norm/", "pre_logits/"),
    (r"^moat/logits_head/", "head/"),
    (r"/attention/relative_position_embedding$", "/attn/position_bias_table"),
    (r"/attention/o/", "/attn/proj/"),
    (r"/attention/", "/attn/"),
    (r"/attention_norm/", "/norm/"),
    (r"/shortcut_conv/", "/shortcut/"),
    (r"/pre_norm/", "/branch/pre_norm/"),
    (r"/expand_conv/", "/branch/fc1/"),
    (r"/expand_norm/", "/branch/norm1/"),
    (r"/depthwise_conv/", "/branch/conv/"),
    (r"/depthwise_norm/", "/branch/norm2/"),
    (r"/se/reduce_conv2d/", "/branch/gate/fc1/"),
    (r"/se/expand_conv2d/", "/branch/gate/fc2/"),
    (r"/shrink_conv/", "/branch/fc2/"),
    (r"/(depthwise_)?kernel$", "/weight"),
    (r"/gamma$", "/weight"),
    (r"/beta$", "/bias"),
    (r"/moving_mean$", "/running_mean"),
    (r"/moving_variance$", "/running_var"),
    (r"^moat/block_0*(\d+)_0*(\d+)/", r"stages/\1/\2/"),
    (r"/", "."),
)


def _renamed(name: str) -> str:
    for official, ours in _NAMES:
        name = re.sub(official, ours, name)
    return name


def _transposed(name: str, tensor: Tensor) -> Tensor:
    """A TensorFlow variable in the order of a torch parameter."""
    kind = name.removesuffix(":0")
    if kind.endswith("depthwise_kernel"):  # (3, 3, C, 1)
        return tensor.permute(2, 3, 0, 1)
    if kind.endswith("kernel"):  # (height, width, in, out)
        weight = tensor.permute(3, 2, 0, 1)
        return weight.flatten(1) if _LINEAR.search(kind) else weight
    if kind.endswith("attention/o/weight"):  # (heads, width, C)
        return tensor.flatten(0, 1).T
    if kind.endswith("/weight"):  # (C, heads, width)
        return tensor.flatten(1).T
    if re.search(r"attention/[qkv]/bias$", kind):
        return tensor.flatten()
    return tensor


_LINEAR = re.compile(r"/(shortcut_conv|expand_conv|shrink_conv|logits_head)/kernel$")


def _variant(
    dims: tuple[int, ...],
    depths: tuple[int, ...],
    stem: int,
    size: int,
    *,
    tables: tuple[int, int] = (14, 7),
    centred: bool = False,
) -> Variant:
    """Two stages of convolutions and two that attend; `centred` ones were trained on pixels from -1 to 1."""
    convolve = tuple(MOATStage(depth, dim) for depth, dim in zip(depths[:2], dims[:2]))
    attend = tuple(MOATStage(depth, dim, True, table) for depth, dim, table in zip(depths[2:], dims[2:], tables))
    build = partial(MOAT, convolve + attend, stem_dims=(stem, stem))
    half = (0.5, 0.5, 0.5)
    return Variant(build, image_size=size, mean=half, std=half) if centred else Variant(build, image_size=size)


VARIANTS = {
    "moat_test": _variant((16, 24, 64, 96), (1, 2, 2, 1), 16, 64, tables=(4, 2)),
    "moat_0": _variant((96, 192, 384, 768), (2, 3, 7, 2), 64, 224),
    "moat_1": _variant((96, 192, 384, 768), (2, 6, 14, 2), 64, 224),
    "moat_2": _variant((128, 256, 512, 1024), (2, 6, 14, 2), 128, 384, centred=True),
    "moat_3": _variant((160, 320, 640, 1280), (2, 12, 28, 2), 160, 512, centred=True),
    "moat_4": _variant((256, 512, 1024, 2048), (2, 12, 28, 2), 256, 512, centred=True),
    "moat_tiny_0": _variant((32, 64, 128, 256), (2, 3, 7, 2), 32, 256),
    "moat_tiny_1": _variant((40, 80, 160, 320), (2, 3, 7, 2), 40, 256),
    "moat_tiny_2": _variant((56, 112, 224, 448), (2, 3, 7, 2), 56, 256),
    "moat_tiny_3": _variant((80, 160, 320, 640), (2, 3, 7, 2), 80, 256),
}
