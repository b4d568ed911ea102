"""MaxViT (Tu et al., 2022, arXiv:2204.01697): blocks of a convolution, attention in windows and attention in grids."""

import re
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from saccade.backbones.backbone import Backbone, FeatureInfo
from saccade.backbones.convolution import divisible
from saccade.backbones.mbconv import ConvStem, MBConv, init_normal
from saccade.backbones.mlp import Mlp
from saccade.backbones.patches import channels_first, channels_last
from saccade.backbones.positions import refit_relative_table
from saccade.backbones.residual import Block, drop_path_rates
from saccade.backbones.variant import Variant
from saccade.errors import InputError
from saccade.mixers import GridAttention, WindowAttention
from saccade.ops.check import per_axis

__all__ = ["VARIANTS", "MaxViT"]

Sizes = int | tuple[int, int]
PARTITION = 32  # a window, and a grid, has the 32nd part of the image's side: one window at the last of four stages


class MaxViT(Backbone):
    """Stages of MaxViT blocks, each with half the map of the one before.

    Windows and grids follow the image: their side is the 32nd part of its own, on every map, and position tables are
    interpolated bilinearly where that is not the side for which they were learned.

    Args:
        dims: channels of the stages.
        depths: their blocks.
        stem_dims: channels of the stem's two convolutions, or one number for both.
        head_dim: channels of the layer before the classifier; None takes those of the last stage, 0 has no such layer.
        dim_head: channels of an attention head.
        image_size: pixels along each side of the images for which position tables are learned.
        window_size, grid_size: tokens of a window, and of a grid, along each side of every map, instead of what follows
            from the image; grid_size takes window_size where it is not given. A smaller map is then an error.
        position_bias: learn a bias for each relative position.
        expansion: channels inside convolutional blocks over outside, to the nearest multiple of 8.
        mlp_ratio: channels inside MLPs over outside.
        kernel_size: of depthwise convolutions.
        gate_ratio: channels inside squeeze-and-excitation over those of the block; 0 leaves it out.
        act: name of the GELU: "tanh" for its approximation, "none" for the exact one.
        stem_bias, out_bias: give the stem's convolutions, and the last layers of convolutional blocks, a bias.
        conv_eps, norm_eps: of batch norms and of layer norms.
        drop_path_rate: probability of leaving the last block's branches out; earlier ones grow towards it linearly.
        num_classes, in_chans: as for every backbone.
    """

    def __init__(
        self,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        *,
        stem_dims: Sizes = 64,
        head_dim: int | None = None,
        dim_head: int = 32,
        image_size: Sizes = 224,
        window_size: Sizes | None = None,
        grid_size: Sizes | None = None,
        position_bias: bool = True,
        expansion: float = 4,
        mlp_ratio: float = 4,
        kernel_size: int = 3,
        gate_ratio: float = 0.25,
        act: str = "tanh",
        stem_bias: bool = True,
        out_bias: bool = True,
        conv_eps: float = 1e-3,
        norm_eps: float = 1e-5,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if len(dims) != len(depths):
            raise InputError(f"dims is {dims} and depths is {depths}: give one of each for every stage")
        if any(dim % dim_head for dim in dims):
            raise InputError(
                f"dim_head is {dim_head} and dims is {dims}: heads of this width do not share the channels"
            )
        learned = tuple(side // PARTITION for side in per_axis("image_size", image_size, 2))
        if window_size is None and grid_size is None and min(learned) < 1:
            raise InputError(f"image_size is {image_size}: a window has the 32nd part of its side. Give 32 or more")
        gelu = partial(nn.GELU, act)
        norm = partial(nn.LayerNorm, eps=norm_eps)

        def attend(kind: type[WindowAttention | GridAttention], dim: int, stage: int, size: Sizes | None) -> Block:
            windows = max(1, PARTITION // 2 ** (stage + 2))  # a stage's map has the side of the image over 4, 8, 16, 32
            sizes = {"window_size": size} if size else {"num_windows": windows, "table_size": learned}
            mixer = kind(dim, dim // dim_head, position_bias=position_bias, **sizes)
            return Block(dim, mixer, Mlp(dim, int(mlp_ratio * dim), act=gelu), norm=norm)

        widths = per_axis("stem_dims", stem_dims, 2)
        self.stem = ConvStem(in_chans, (widths[0], widths[1]), act=gelu, eps=conv_eps, bias=stem_bias)
        self.stages = nn.ModuleList()
        before = widths[1]
        for stage, (dim, rates) in enumerate(zip(dims, drop_path_rates(drop_path_rate, depths))):
            blocks = []
            for number, rate in enumerate(rates):
                conv = MBConv(
                    before,
                    dim,
                    divisible(expansion * dim),
                    stride=1 if number else 2,
                    kernel_size=kernel_size,
                    gate=int(gate_ratio * dim),
                    act=gelu,
                    out_bias=out_bias,
                    eps=conv_eps,
                    drop_path=rate,
                )
                windows = attend(WindowAttention, dim, stage, window_size)
                grid = attend(GridAttention, dim, stage, grid_size or window_size)
                blocks.append(_MaxViTBlock(conv, windows, grid))
                before = dim
            self.stages.append(nn.Sequential(*blocks))
        self.num_features = before
        self.hidden = before if head_dim is None else head_dim
        self.norm = nn.Identity() if self.hidden else norm(before)
        if self.hidden:
            layers = [("norm", norm(before)), ("fc", nn.Linear(before, self.hidden)), ("act", nn.Tanh())]
            self.pre_logits = nn.Sequential(OrderedDict(layers))
        self.feature_info = FeatureInfo.of_stages(dims)
        self.first_conv = "stem.conv1"
        self.apply(init_normal)
        self.reset_classifier(num_classes)

    @property
    def head_hidden_size(self) -> int:
        """Channels that the classifier takes."""
        return self.hidden or self.num_features

    def run_stages(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        maps = []
        for blocks in self.stages:
            assert isinstance(blocks, nn.Sequential)
            x = self.run_blocks(blocks, x)
            maps.append(x)
        maps[-1] = channels_first(self.norm(channels_last(x)))
        return maps

    def init_classifier(self, layer: nn.Module) -> None:
        """As all layers."""
        init_normal(layer)

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """timm's names of the authors' weights."""
        return rename_official(state)

    def refit(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Position tables of another image size are interpolated."""
        return refit_relative_table(name, tensor, shape)


class _MaxViTBlock(nn.Module):
    """A convolutional block, attention in windows, attention in a grid: (B, C, H, W) to (B, C', H', W')."""

    def __init__(self, conv: MBConv, attn_block: Block, attn_grid: Block) -> None:
        super().__init__()
        self.conv = conv
        self.attn_block = attn_block
        self.attn_grid = attn_grid
        attn_block.drop_path = attn_grid.drop_path = conv.drop_path  # a block has one rate

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(self.conv(x))
        return channels_first(self.attn_grid(self.attn_block(x)))


_NAMES = (
    (r"^(stages\.\d+)\.blocks\.", r"\1."),
    (r"\.conv\.(?!shortcut)", ".conv.branch."),
    (r"\.conv1_1x1\.", ".fc1."),
    (r"\.conv2_kxk\.", ".conv."),
    (r"\.conv3_1x1\.", ".fc2."),
    (r"\.se\.", ".gate."),
    (r"\.shortcut\.expand\.", ".shortcut."),
    (r"(^|\.)rel_pos\.relative_position_bias_table$", r"\1position_bias_table"),
    (r"^head\.norm\.", "pre_logits.norm."),
    (r"^head\.pre_logits\.", "pre_logits."),
    (r"^head\.fc\.", "head."),
)
_POINTWISE = re.compile(r"\.(conv1_1x1|conv3_1x1|shortcut\.expand)\.weight$")


def rename_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to ours; its 1 x 1 convolutions are linear layers here."""
    renamed = {}
    for name, tensor in state.items():
        tensor = tensor.flatten(1) if _POINTWISE.search(name) else tensor
        for official, ours in _NAMES:
            name = re.sub(official, ours, name)
        renamed[name] = tensor
    return renamed


def _variant(
    depths: tuple[int, ...], dims: tuple[int, ...], stem: int, *, weights: str | None = None, size: int = 224
) -> Variant:
    half = (0.5, 0.5, 0.5)
    build = partial(MaxViT, dims, depths, stem_dims=stem, image_size=size)
    return Variant(build, image_size=size, weights=weights, mean=half, std=half, crop=0.95)


VARIANTS = {
    "maxvit_test": _variant((1, 1, 2, 1), (32, 32, 64, 64), 16, size=64),
    "maxvit_tiny": _variant((2, 2, 5, 2), (64, 128, 256, 512), 64, weights="timm/maxvit_tiny_tf_224.in1k"),
    "maxvit_small": _variant((2, 2, 5, 2), (96, 192, 384, 768), 64, weights="timm/maxvit_small_tf_224.in1k"),
    "maxvit_base": _variant((2, 6, 14, 2), (96, 192, 384, 768), 64, weights="timm/maxvit_base_tf_224.in1k"),
    "maxvit_large": _variant((2, 6, 14, 2), (128, 256, 512, 1024), 128, weights="timm/maxvit_large_tf_224.in1k"),
    "maxvit_xlarge": _variant((2, 6, 14, 2), (192, 384, 768, 1536), 192, weights="timm/maxvit_xlarge_tf_224.in21k"),
}
