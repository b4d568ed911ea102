"""BiFormer (Zhu et al., 2023, arXiv:2303.08810): bi-level routing attention in three stages, attention in the last."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from saccade import taps
from saccade.backbones.backbone import Backbone, FeatureInfo
from saccade.backbones.mlp import Mlp, init_linear
from saccade.backbones.patches import channels_first, channels_last
from saccade.backbones.positions import ConvPosition
from saccade.backbones.residual import Block, Stage, drop_path_rates
from saccade.backbones.variant import Variant
from saccade.errors import InputError, check_choice
from saccade.mixers import Attention, BiLevelRoutingAttention, DepthwiseConv
from saccade.mixers.mixer import split_heads
from saccade.ops import Global, sparse_attention, sparse_attention_weights

__all__ = ["VARIANTS", "BiFormer"]

ATTENTION, LOCAL_ATTENTION, CONVOLUTION = -1, -2, 0  # what takes the place of routing, as the paper's code numbers it


class BiFormer(Backbone):
    """Stages whose blocks attend to few regions, and a last one that attends to all tokens.

    Args:
        dims, depths: channels and blocks of the stages; each stage has half the map of the one before.
        topks: regions that a region attends to, for each stage. -1 has attention over all tokens, -2 the same with a
            convolution of its input added, 0 a depthwise convolution.
        num_regions: regions along each side of the map.
        head_dim: channels of a head where regions are routed.
        dense_heads: heads of attention over all tokens, whatever the width.
        qk_dims: channels of query and key, for each stage; None takes dims.
        scale: factor of the logits where regions are routed; None takes qk_dim^-0.5.
        mlp_ratio: hidden over outer channels of the MLPs, one number or one for each stage.
        lepe_size: side of the convolutions that are added to attention.
        position_size: side of the convolution for positions before each block; 0 has none.
        stem: "conv" steps down by convolutions of 3 x 3 pixels; "patch" as Swin does, by patches of 4 and 2.
        padding: what happens on a map that the regions do not divide, as in `BiLevelRoutingAttention`.
        route_options: further options of `BiLevelRoutingAttention`.
        layer_scale: where a learned factor for each channel of a branch starts; None has none.
        drop_path_rate: probability of leaving the last block's branches out; earlier ones grow towards it linearly.
        num_classes, in_chans: as for every backbone.
    """

    def __init__(
        self,
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 8, 2),
        *,
        topks: tuple[int, ...] = (1, 4, 16, LOCAL_ATTENTION),
        num_regions: int = 7,
        head_dim: int = 32,
        dense_heads: int = 8,
        qk_dims: tuple[int, ...] | None = None,
        scale: float | None = None,
        mlp_ratio: float | tuple[float, ...] = 3.0,
        lepe_size: int = 5,
        position_size: int = 3,
        stem: str = "conv",
        padding: str = "none",
        route_options: tuple[Mapping[str, Any], ...] | None = None,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        check_choice("stem", stem, _STEMS)
        ratios = mlp_ratio if isinstance(mlp_ratio, tuple) else (mlp_ratio,) * len(dims)
        qk_dims, extra = qk_dims or dims, route_options or ({},) * len(dims)
        given = {"depths": depths, "topks": topks, "qk_dims": qk_dims, "mlp_ratio": ratios, "route_options": extra}
        for name, values in given.items():
            if len(values) != len(dims):
                raise InputError(f"{name} is {values} and dims is {dims}: give one for each stage")
        if min(topks) < LOCAL_ATTENTION:
            raise InputError(f"topks is {topks}: give a number of regions, or 0, -1 or -2")

        def mixer(stage: int) -> nn.Module:
            dim = dims[stage]
            if topks[stage] > 0:
                return BiLevelRoutingAttention(
                    dim,
                    dim // head_dim,
                    num_regions=num_regions,
                    topk=topks[stage],
                    qk_dim=qk_dims[stage],
                    scale=scale,
                    lepe_size=lepe_size,
                    padding=padding,
                    **extra[stage],
                )
            if topks[stage] == CONVOLUTION:
                return nn.Sequential(nn.Linear(dim, dim), DepthwiseConv(dim, kernel_size=5))
            if topks[stage] == ATTENTION:
                return Attention(dim, dense_heads, qkv_bias=False)
            return _LocalAttention(dim, dense_heads, lepe_size)

        first, step = _STEMS[stem]
        self.patch_embed = first(in_chans, dims[0])
        self.stages = nn.ModuleList()
        for stage, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            dim = dims[stage]
            blocks = (
                _Block(
                    dim,
                    mixer(stage),
                    Mlp(dim, int(ratios[stage] * dim)),
                    position_size=position_size,
                    drop_path=rate,
                    layer_scale=layer_scale,
                )
                for rate in rates
            )
            down = _Down(*step(dims[stage - 1], dim)) if stage else nn.Identity()
            self.stages.append(Stage(down, nn.Sequential(*blocks)))
        self.norm = nn.BatchNorm2d(dims[-1])
        self.num_features = dims[-1]
        self.feature_info = FeatureInfo.of_stages(dims)
        self.first_conv = "patch_embed.0"
        self.apply(init_linear)
        self.reset_classifier(num_classes)

    def run_stages(self, images: Tensor) -> list[Tensor]:
        x = channels_last(self.patch_embed(images))
        maps = []
        for stage in self.stages:
            assert isinstance(stage, Stage)
            x = self.run_blocks(stage.blocks, stage.downsample(x))
            maps.append(channels_first(x))
        maps[-1] = self.norm(maps[-1])
        return maps

    def init_classifier(self, layer: nn.Module) -> None:
        """As all linear layers start."""
        init_linear(layer)

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official weights; the newer code has 1 x 1 convolutions for linear layers."""
        return {
            _renamed(name): tensor.flatten(1) if tensor.ndim == 4 and _LINEAR.search(name) else tensor
            for name, tensor in state.items()
        }


class _Block(Block):
    """A block with a convolution for positions before it."""

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module, *, position_size: int, **options: Any) -> None:
        super().__init__(dim, mixer, mlp, **options)
        self.pos_embed = ConvPosition(dim, position_size) if position_size else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.pos_embed(x))


class _LocalAttention(Attention):
    """Attention over all tokens, and a depthwise convolution of its input added before the last projection."""

    def __init__(self, dim: int, num_heads: int, lepe_size: int) -> None:
        super().__init__(dim, num_heads, qkv_bias=False)
        self.lepe = nn.Conv2d(dim, dim, lepe_size, padding=lepe_size // 2, groups=dim)

    def mix(self, x: Tensor) -> Tensor:
        query, key, value = self._project(x)
        taps.record(self, "attention", lambda: sparse_attention_weights(query, key, Global()))
        detail = channels_last(self.lepe(channels_first(x)))
        return self._finish(sparse_attention(query, key, value, Global()) + split_heads(detail, self.num_heads))


class _Down(nn.Sequential):
    """Layers on channels first, between maps with channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(super().forward(channels_first(x)))


def _conv_stem(in_chans: int, dim: int) -> nn.Sequential:
    return nn.Sequential(*_conv_step(in_chans, dim // 2), nn.GELU(), *_conv_step(dim // 2, dim))


def _conv_step(dim: int, dim_out: int) -> list[nn.Module]:
    return [nn.Conv2d(dim, dim_out, 3, 2, 1), nn.BatchNorm2d(dim_out)]


def _patch_stem(in_chans: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_chans, dim, 4, 4), nn.BatchNorm2d(dim))


def _patch_step(dim: int, dim_out: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(dim), nn.Conv2d(dim, dim_out, 2, 2)]


_STEMS: dict[str, tuple[Callable[[int, int], nn.Sequential], Callable[[int, int], list[nn.Module]]]] = {
    "conv": (_conv_stem, _conv_step),
    "patch": (_patch_stem, _patch_step),
}
_LINEAR = re.compile(r"(?:\.attn\.(?:qkv|proj|qkv_linear|output_linear|[13])|\.mlp\.\d)\.weight$")
_NAMES = (
    (r"^downsample_layers\.0\.", "patch_embed."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.pos_embed\.", ".pos_embed.proj."),
    (r"\.attn\.(?:qkv\.qkv|qkv_linear)\.", ".attn.qkv."),
    (r"\.attn\.(?:wo|output_linear)\.", ".attn.proj."),
    (r"\.attn\.router\.emb\.", ".attn.match."),
    (r"\.attn\.1\.", ".attn.0."),  # the convolution in place of attention
    (r"\.attn\.2\.", ".attn.1.conv."),
    (r"\.attn\.3\.", ".attn.1.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"\.gamma([12])$", r".ls\1.gamma"),
)


def _renamed(name: str) -> str:
    for official, ours in _NAMES:
        name = re.sub(official, ours, name)
    return name


VARIANTS = {
    "biformer_test": Variant(
        partial(BiFormer, (16, 32, 48, 64), (1, 1, 2, 1), topks=(1, 2, 4, -2), num_regions=4, head_dim=16),
        image_size=64,
    ),
    "biformer_tiny": Variant(partial(BiFormer, depths=(2, 2, 8, 2))),
    "biformer_small": Variant(partial(BiFormer, depths=(4, 4, 18, 4))),
    "biformer_base": Variant(partial(BiFormer, (96, 192, 384, 768), (4, 4, 18, 4))),
    "biformer_stl": Variant(
        partial(BiFormer, (96, 192, 384, 768), (2, 2, 6, 2), mlp_ratio=4.0, position_size=0, stem="patch")
    ),
}
