"""FocalNet (Yang et al., 2022, arXiv:2203.11926): a pyramid, or one map, of blocks of focal modulation."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from saccade.backbones.backbone import Backbone, FeatureInfo
from saccade.backbones.mlp import Mlp
from saccade.backbones.patches import PatchEmbed, channels_first
from saccade.backbones.residual import Block, PostNormBlock, Stage, drop_path_rates
from saccade.backbones.variant import Variant
from saccade.errors import InputError
from saccade.mixers import FocalModulation

__all__ = ["VARIANTS", "FocalNet"]


class FocalNet(Backbone):
    """Stages of focal modulation; each has half the map of the one before and twice its channels.

    Args:
        dim: channels of the first stage.
        depths: blocks of the stages.
        focal_levels, focal_windows: of the modulation in each stage; `saccade.mixers.FocalModulation` explains them.
        patch_size: pixels along each side of a token of the first stage.
        patch_norm: a norm behind the patch embedding and each step down.
        overlap: patches that overlap: 7 x 7 pixels, then 3 x 3, with strides 4 and 2.
        mlp_ratio: hidden over outer channels of the MLPs.
        layer_scale: where a learned factor for each channel of a branch starts; None has none.
        post_norm: norms behind the branches instead of before them.
        norm_in_modulation: a norm in the modulation, before its output projection.
        normalize_modulator: divide the context by the number of levels.
        norm_eps: of the norms outside the modulation.
        drop_path_rate: probability of leaving the last block's branches out; earlier ones grow towards it linearly.
        num_classes, in_chans: as for every backbone.
    """

    def __init__(
        self,
        dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        focal_levels: tuple[int, ...] = (2, 2, 2, 2),
        focal_windows: tuple[int, ...] = (3, 3, 3, 3),
        *,
        patch_size: int = 4,
        patch_norm: bool = True,
        overlap: bool = False,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        post_norm: bool = False,
        norm_in_modulation: bool = False,
        normalize_modulator: bool = False,
        norm_eps: float = 1e-5,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if not len(depths) == len(focal_levels) == len(focal_windows):
            raise InputError(
                f"depths is {depths}, focal_levels is {focal_levels} and focal_windows is {focal_windows}: give one of "
                "each for every stage"
            )
        norm = partial(nn.LayerNorm, eps=norm_eps)
        embed = partial(PatchEmbed, norm=norm if patch_norm else None)
        step = partial(embed, kernel_size=3, stride=2, padding=1) if overlap else partial(embed, kernel_size=2)
        make_block = partial(PostNormBlock if post_norm else Block, norm=norm, layer_scale=layer_scale)
        dims = [dim * 2**stage for stage in range(len(depths))]
        self.reduction = 4 if overlap else patch_size
        self.patch_embed = embed(in_chans, dim, 7, stride=4, padding=2) if overlap else embed(in_chans, dim, patch_size)
        self.stages = nn.ModuleList()
        for stage, (width, rates) in enumerate(zip(dims, drop_path_rates(drop_path_rate, depths))):
            modulation = partial(
                FocalModulation,
                width,
                focal_window=focal_windows[stage],
                focal_levels=focal_levels[stage],
                normalize=normalize_modulator,
                post_norm=norm_in_modulation,
            )
            blocks = (make_block(width, modulation(), Mlp(width, int(width * mlp_ratio)), drop_path=r) for r in rates)
            self.stages.append(Stage(step(dims[stage - 1], width) if stage else nn.Identity(), nn.Sequential(*blocks)))
        self.norm = norm(dims[-1])
        self.num_features = dims[-1]
        self.feature_info = FeatureInfo.of_stages(dims, reduction=self.reduction)
        self.first_conv = "patch_embed.proj"
        self.apply(_init)
        self.reset_classifier(num_classes)

    def run_stages(self, images: Tensor) -> list[Tensor]:
        least = self.feature_info.reduction()[-1]
        if min(images.shape[2:]) < least:
            raise InputError(
                f"images is {tuple(images.shape)}: a token of the last map has {least} x {least} pixels. Give images "
                "of one such token at least"
            )
        x = self.patch_embed(images)
        maps: list[Tensor] = []
        for number, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            x = self.run_blocks(stage.blocks, stage.downsample(maps[-1]) if number else x)
            maps.append(channels_first(x))
        maps[-1] = channels_first(self.norm(x))
        return maps

    def init_classifier(self, layer: nn.Module) -> None:
        """As all linear layers start."""
        _init(layer)

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' weights, whose steps down stand at the end of stages and one of whose linear layers is a 1 x 1
        convolution, and timm's, in which all of them are."""
        shift = 0 if any(name.startswith("stem.") for name in state) else 1
        return {
            _renamed(name, shift): tensor.flatten(1) if tensor.ndim == 4 and _LINEAR.search(name) else tensor
            for name, tensor in state.items()
        }


def _init(layer: nn.Module) -> None:
    """Truncated normal weights of standard deviation 0.02 and biases of 0 for linear layers; others stay."""
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)


_LINEAR = re.compile(r"\.(?:modulation|mlp)\.\w+\.weight$")
_NAMES = (
    (r"^stem\.", "patch_embed."),  # timm's
    (r"^head\.fc\.", "head."),
    (r"\.norm([12])_post\.", r".norm\1."),
    (r"\.modulation\.ln\.", ".attn.norm."),
    (r"\.modulation\.", ".attn."),
    (r"\.focal_layers\.(\d+)\.0\.", r".focal_layers.\1."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
)


def _renamed(name: str, shift: int) -> str:
    """Our name; a step down stands in the stage so many further on."""
    if name.startswith("layers."):
        _, stage, rest = name.split(".", 2)
        name = f"stages.{int(stage) + shift * rest.startswith('downsample.')}.{rest}"
    for official, ours in _NAMES:
        name = re.sub(official, ours, name)
    return name


def _pyramid(dim: int, depth: int, levels: int, weights: str, **options: Any) -> Variant:
    build = partial(FocalNet, dim, (2, 2, depth, 2), (levels,) * 4, **options)
    return Variant(build, weights=f"timm/focalnet_{weights}.ms_in1k", crop=0.9)


def _isotropic(dim: int, **options: Any) -> Variant:
    return Variant(partial(FocalNet, dim, (12,), (3,), (3,), patch_size=16, **options), crop=0.9)


LARGE: dict[str, Any] = {"overlap": True, "post_norm": True, "layer_scale": 1e-4}


def _large(dim: int, window: int, levels: int, weights: str, *, size: int = 384, **options: Any) -> Variant:
    """Trained on ImageNet-22K, with 21842 classes."""
    build = partial(FocalNet, dim, (2, 2, 18, 2), (levels,) * 4, (window,) * 4, **LARGE, **options)
    return Variant(build, image_size=size, weights=f"timm/focalnet_{weights}.ms_in22k", crop=1.0 if size > 224 else 0.9)


VARIANTS = {
    "focalnet_test": Variant(
        partial(FocalNet, 16, (1, 1, 2), (2, 3, 2), (3, 3, 5), mlp_ratio=2.0, norm_in_modulation=True, **LARGE),
        image_size=64,
    ),
    "focalnet_tiny_srf": _pyramid(96, 6, 2, "tiny_srf"),
    "focalnet_tiny_lrf": _pyramid(96, 6, 3, "tiny_lrf"),
    "focalnet_small_srf": _pyramid(96, 18, 2, "small_srf"),
    "focalnet_small_lrf": _pyramid(96, 18, 3, "small_lrf"),
    "focalnet_base_srf": _pyramid(128, 18, 2, "base_srf"),
    "focalnet_base_lrf": _pyramid(128, 18, 3, "base_lrf"),
    "focalnet_tiny_iso_16": _isotropic(192),
    "focalnet_small_iso_16": _isotropic(384),
    "focalnet_base_iso_16": _isotropic(768, post_norm=True, layer_scale=1e-4),
    "focalnet_large_fl3": _large(192, 5, 3, "large_fl3"),
    "focalnet_large_fl4": _large(192, 3, 4, "large_fl4", normalize_modulator=True),
    "focalnet_xlarge_fl3": _large(256, 5, 3, "xlarge_fl3"),
    "focalnet_xlarge_fl4": _large(256, 3, 4, "xlarge_fl4"),
    "focalnet_huge_fl3": _large(352, 3, 3, "huge_fl3", size=224, norm_in_modulation=True),
    "focalnet_huge_fl4": _large(352, 3, 4, "huge_fl4", size=224, norm_in_modulation=True),
}
