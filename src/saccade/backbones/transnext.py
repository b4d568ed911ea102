"""TransNeXt (Shi, 2023, arXiv:2311.17132): aggregated attention, and feed-forward networks that look at their
neighbours."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from saccade.backbones.backbone import Backbone, FeatureInfo
from saccade.backbones.convolution import init_convolution
from saccade.backbones.feed_forward import ConvolutionalGLU
from saccade.backbones.mlp import init_linear
from saccade.backbones.patches import PatchEmbed, channels_first
from saccade.backbones.residual import Block, Stage, drop_path_rates
from saccade.backbones.variant import Variant
from saccade.errors import InputError
from saccade.mixers import AggregatedAttention, LengthScaledAttention
from saccade.mixers.aggregated import rename

__all__ = ["VARIANTS", "TransNeXt"]

HEAD_WIDTH = 24


class TransNeXt(Backbone):
    """Stages of aggregated attention; one whose map is not pooled attends to all tokens.

    Positions, numbers of keys and pooled cells follow the map at hand, so that weights serve images of any size.

    Args:
        dims, depths: channels and blocks of each stage.
        num_heads: attention heads of each stage; None takes one for each 24 channels.
        mlp_ratios: hidden over outer channels of the two-layer network that convolutional GLU stands in for.
        sr_ratios: tokens of a pooled cell along each axis; a stage with 1 attends to all tokens.
        window_sizes: tokens along each axis of the window around each token, one number or one for each stage.
        pool_size: cells along each axis, whatever the map, in place of sr_ratios above 1: cost is then linear in the
            tokens. None takes sr_ratios.
        qkv_bias: give the projections to query, key and value a bias.
        drop: dropout after attention and inside feed-forward networks.
        norm_eps: of the norms around blocks; those of patches and of pooled maps have 1e-5.
        image_size: pixels along each side of the images by which positions are scaled: those of the training.
        drop_path_rate: probability of leaving the last block's branches out; earlier ones grow towards it linearly.
        num_classes, in_chans: as for every backbone.
    """

    def __init__(
        self,
        dims: Sequence[int] = (72, 144, 288, 576),
        depths: Sequence[int] = (2, 2, 15, 2),
        *,
        num_heads: Sequence[int] | None = None,
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        window_sizes: int | Sequence[int | None] = 3,
        pool_size: int | None = None,
        qkv_bias: bool = True,
        drop: float = 0.0,
        norm_eps: float = 1e-6,
        image_size: int = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        heads = [dim // HEAD_WIDTH for dim in dims] if num_heads is None else num_heads
        windows = (window_sizes,) * len(dims) if isinstance(window_sizes, int) else window_sizes
        given = {"depths": depths, "num_heads": heads, "mlp_ratios": mlp_ratios, "sr_ratios": sr_ratios}
        for name, values in {**given, "window_sizes": windows}.items():
            if len(values) != len(dims):
                raise InputError(f"{name} is {values} and dims is {dims}: give one for each stage")

        def mixer(stage: int) -> nn.Module:
            size = max(1, image_size // 2 ** (stage + 2))
            options: dict[str, Any] = {"pretrain_size": size, "qkv_bias": qkv_bias, "proj_drop": drop}
            if sr_ratios[stage] == 1:
                return LengthScaledAttention(dims[stage], heads[stage], **options)
            options |= {"window_size": windows[stage], "sr_ratio": sr_ratios[stage], "pool_size": pool_size}
            return AggregatedAttention(dims[stage], heads[stage], **options)

        norm = partial(nn.LayerNorm, eps=norm_eps)
        self.patch_embed = PatchEmbed(in_chans, dims[0], 7, stride=4, padding=3, norm=nn.LayerNorm)
        self.stages = nn.ModuleList()
        for stage, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            dim = dims[stage]
            hidden = int(dim * mlp_ratios[stage])
            blocks = (
                Block(dim, mixer(stage), ConvolutionalGLU(dim, hidden, drop=drop), norm=norm, drop_path=rate)
                for rate in rates
            )
            down = _Down(dims[stage - 1], dim) if stage else nn.Identity()
            self.stages.append(_Stage(down, nn.Sequential(*blocks), norm(dim)))
        self.num_features = dims[-1]
        self.feature_info = FeatureInfo.of_stages(dims)
        self.first_conv = "patch_embed.proj"
        self.apply(_init)
        self.reset_classifier(num_classes)

    def run_stages(self, images: Tensor) -> list[Tensor]:
        x = self.patch_embed(images)
        maps = []
        for stage in self.stages:
            assert isinstance(stage, _Stage)
            x = stage.norm(self.run_blocks(stage.blocks, stage.downsample(x)))
            maps.append(channels_first(x))
        return maps

    def init_classifier(self, layer: nn.Module) -> None:
        """As all linear layers start."""
        init_linear(layer)

    def no_weight_decay(self) -> set[str]:
        """What the authors leave alone: temperatures, query embeddings, and all that makes position biases."""
        return {name for name, _ in self.named_parameters() if _UNDECAYED.search(name)}

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official weights: stages are numbered from 1 in the names of their parts."""
        return {_renamed(name): tensor for name, tensor in rename(dict(state)).items()}


class _Stage(Stage):
    def __init__(self, downsample: nn.Module, blocks: nn.Sequential, norm: nn.Module) -> None:
        super().__init__(downsample, blocks)
        self.norm = norm


class _Down(PatchEmbed):
    """Overlapping patches of a map: (B, H, W, C) to (B, H', W', C')."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(dim, dim_out, 3, stride=2, padding=1, norm=nn.LayerNorm)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(channels_first(x))


def _init(layer: nn.Module) -> None:
    init_linear(layer)
    init_convolution(layer)
    if isinstance(layer, AggregatedAttention):  # official code has a 1 x 1 convolution there
        nn.init.normal_(layer.sr.weight, std=(2 / layer.dim) ** 0.5)


_UNDECAYED = re.compile(r"\.(?:temperature|query_embedding|relative_pos_bias_local|cpb_fc\d\.\w+)$")
_NAMES = (
    (r"^patch_embed1\.", "patch_embed."),
    (r"^patch_embed(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.downsample."),
    (r"^block(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.blocks."),
    (r"^norm(\d+)\.", lambda found: f"stages.{int(found[1]) - 1}.norm."),
)


def _renamed(name: str) -> str:
    for official, ours in _NAMES:
        name = re.sub(official, ours, name)
    return name


MICRO = (48, 96, 192, 384)
VARIANTS = {
    "transnext_test": Variant(
        partial(
            TransNeXt, (24, 48, 72, 96), (1, 1, 2, 1), mlp_ratios=(2, 2, 2, 2), sr_ratios=(4, 2, 2, 1), image_size=64
        ),
        image_size=64,
    ),
    "transnext_micro": Variant(partial(TransNeXt, MICRO)),
    "transnext_micro_aaaa": Variant(partial(TransNeXt, MICRO, sr_ratios=(16, 8, 4, 2), image_size=256), image_size=256),
    "transnext_tiny": Variant(partial(TransNeXt)),
    "transnext_small": Variant(partial(TransNeXt, depths=(5, 5, 22, 5))),
    "transnext_base": Variant(partial(TransNeXt, (96, 192, 384, 768), (5, 5, 23, 5))),
}
