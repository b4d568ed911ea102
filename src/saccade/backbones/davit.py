"""DaViT (Ding et al., 2022, arXiv:2204.03645): attention among positions in windows, then among channels over the
whole map. Two blocks of this library, one of either kind, are a dual attention block of the paper."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from itertools import cycle

from torch import Tensor, nn

from saccade.backbones.backbone import Backbone, FeatureInfo
from saccade.backbones.mlp import Mlp, init_linear
from saccade.backbones.patches import Downsample, PatchEmbed, channels_first
from saccade.backbones.positions import ConvPosition
from saccade.backbones.residual import DropPath, Stage, drop_path_rates
from saccade.backbones.variant import Variant
from saccade.errors import InputError, check_choice
from saccade.mixers import ChannelAttention, WindowAttention

__all__ = ["VARIANTS", "DaViT", "DaViTBlock"]

KINDS = ("spatial", "channel")


class DaViT(Backbone):
    """Stages of window attention and channel attention in turns.

    Args:
        dims: channels of the stages; each stage has half the map of the one before.
        depths: dual attention blocks of the stages.
        num_heads: heads of window attention, and groups of channel attention, of the stages.
        window_size: tokens of a window along each side; zeros are appended to a map that it does not divide.
        mlp_ratio: hidden over outer channels of the MLPs.
        qkv_bias: give the projections of attention a bias.
        kinds: what a dual block is made of, of "spatial" and "channel", in this order.
        ffn: have an MLP behind every attention.
        overlap: steps down by convolutions of 3 x 3 pixels instead of 2 x 2.
        position_act: an activation behind the convolutions that stand for positions.
        drop_path_rate: probability of leaving the last block's branches out; earlier ones grow towards it linearly.
        num_classes, in_chans: as for every backbone.
    """

    def __init__(
        self,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (1, 1, 3, 1),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        *,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        kinds: tuple[str, ...] = KINDS,
        ffn: bool = True,
        overlap: bool = False,
        position_act: bool = False,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if not len(dims) == len(depths) == len(num_heads):
            raise InputError(
                f"dims is {dims}, depths is {depths} and num_heads is {num_heads}: give one of each for every stage"
            )
        for kind in kinds:
            check_choice("kinds", kind, KINDS)
        self.kinds = len(kinds)
        block = partial(
            DaViTBlock,
            window_size=window_size,
            mlp_ratio=mlp_ratio if ffn else None,
            qkv_bias=qkv_bias,
            position_act=position_act,
        )
        step = partial(Downsample, kernel_size=3 if overlap else 2, padding=1 if overlap else "same")
        self.patch_embed = PatchEmbed(in_chans, dims[0], 7, stride=4, padding=3, norm=nn.LayerNorm)
        self.stages = nn.ModuleList()
        rates = drop_path_rates(drop_path_rate, [len(kinds) * depth for depth in depths])
        for stage, (dim, heads) in enumerate(zip(dims, num_heads)):
            down = step(dims[stage - 1], dim) if stage else nn.Identity()
            blocks = (block(dim, heads, kind, drop_path=rate) for kind, rate in zip(cycle(kinds), rates[stage]))
            self.stages.append(Stage(down, nn.Sequential(*blocks)))
        self.num_features = dims[-1]
        self.pre_logits = nn.LayerNorm(dims[-1])
        self.feature_info = FeatureInfo.of_stages(dims)
        self.first_conv = "patch_embed.proj"
        self.apply(init_linear)
        self.reset_classifier(num_classes)

    def run_stages(self, images: Tensor) -> list[Tensor]:
        x = self.patch_embed(images)
        maps = []
        for stage in self.stages:
            assert isinstance(stage, Stage)
            x = self.run_blocks(stage.blocks, stage.downsample(x))
            maps.append(channels_first(x))
        return maps

    def init_classifier(self, layer: nn.Module) -> None:
        """As all linear layers start."""
        init_linear(layer)

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' weights, whose blocks have a number for the dual block and one inside it, and timm's."""
        return {_renamed(name, self.kinds): tensor for name, tensor in state.items()}


class DaViTBlock(nn.Module):
    """Attention of either kind and an MLP, with a convolution for positions before each: (B, H, W, C) to the same.

    Args:
        dim: C, channels of a token.
        num_heads: heads, or groups.
        kind: "spatial" or "channel".
        window_size: of spatial attention.
        mlp_ratio: hidden over outer channels; None has no MLP.
        qkv_bias, position_act: as for `DaViT`.
        drop_path: probability of leaving a branch out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kind: str,
        *,
        window_size: int = 7,
        mlp_ratio: float | None = 4.0,
        qkv_bias: bool = True,
        position_act: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        position: Callable[[], nn.Module] = partial(ConvPosition, dim, act=nn.GELU if position_act else None)
        self.cpe1 = position()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = (
            WindowAttention(
                dim, num_heads, window_size=window_size, padded=True, position_bias=False, qkv_bias=qkv_bias
            )
            if kind == "spatial"
            else ChannelAttention(dim, num_heads, qkv_bias=qkv_bias)
        )
        self.cpe2 = position()
        self.norm2 = None if mlp_ratio is None else nn.LayerNorm(dim)
        self.mlp = None if mlp_ratio is None else Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = self.cpe2(x + self.drop_path(self.attn(self.norm1(x))))
        return x if self.mlp is None or self.norm2 is None else x + self.drop_path(self.mlp(self.norm2(x)))


_BLOCK = re.compile(r"^(?:main_blocks|stages)\.(\d+)(?:\.blocks)?\.(\d+)\.(\d+)\.")  # stage, dual block, kind
_NAMES = (
    (r"^patch_embeds\.0\.", "patch_embed."),
    (r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.downsample.reduction."),
    (r"^patch_embeds\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^norms\.", "pre_logits."),
    (r"\.cpe\.0\.", ".cpe1."),
    (r"\.cpe\.1\.", ".cpe2."),
    (r"^stem\.conv\.", "patch_embed.proj."),  # timm's
    (r"^stem\.norm\.", "patch_embed.norm."),
    (r"\.downsample\.conv\.", ".downsample.reduction."),
    (r"^head\.norm\.", "pre_logits."),
    (r"^head\.fc\.", "head."),
)


def _renamed(name: str, kinds: int) -> str:
    def number(block: re.Match[str]) -> str:
        stage, dual, kind = map(int, block.groups())
        return f"stages.{stage}.blocks.{dual * kinds + kind}."

    name = _BLOCK.sub(number, name)
    for official, ours in _NAMES:
        name = re.sub(official, ours, name)
    return name


def _variant(
    dim: int, depths: tuple[int, ...], *, window_size: int = 7, size: int = 224, weights: str | None = None
) -> Variant:
    """A network whose stages double their channels, 32 to a head."""
    dims = tuple(dim * 2**stage for stage in range(4))
    build = partial(DaViT, dims, depths, tuple(width // 32 for width in dims), window_size=window_size)
    return Variant(build, image_size=size, weights=weights, crop=0.95)


VARIANTS = {
    "davit_test": Variant(
        partial(DaViT, (24, 48, 72, 96), (1, 1, 1, 1), (1, 2, 3, 3), window_size=4, mlp_ratio=2.0), image_size=64
    ),
    "davit_tiny": _variant(96, (1, 1, 3, 1), weights="timm/davit_tiny.msft_in1k"),
    "davit_small": _variant(96, (1, 1, 9, 1), weights="timm/davit_small.msft_in1k"),
    "davit_base": _variant(128, (1, 1, 9, 1), weights="timm/davit_base.msft_in1k"),
    "davit_large": _variant(192, (1, 1, 9, 1)),
    "davit_large_w12_384": _variant(192, (1, 1, 9, 1), window_size=12, size=384),
    "davit_huge": _variant(256, (1, 1, 9, 1)),
    "davit_giant": _variant(384, (1, 1, 12, 3)),
}
