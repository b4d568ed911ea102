"""A plain network for fair comparison of mixers: convolutional stem, stages of (mixer, MLP) blocks, mean pooling.

Whatever the mixer, everything else stays the same. Fixed sine-cosine positions after the stem give every mixer the
same knowledge of place, at any image size.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saccade.backbones.backbone import Backbone, FeatureInfo
from saccade.backbones.mlp import Mlp
from saccade.backbones.patches import Downsample, channels_first, channels_last
from saccade.backbones.residual import DropPath, Stage, drop_path_rates
from saccade.backbones.variant import Variant
from saccade.errors import InputError
from saccade.mixers import create_mixer

__all__ = ["VARIANTS", "StudyNet"]


class StudyNet(Backbone):
    """The study's network.

    Args:
        mixer: a name that `create_mixer` takes.
        mixer_options: its options, the same in every block.
        dims: channels of the stages; each stage has half the map of the one before.
        depths: blocks of the stages.
        patch_size: input pixels along each side of a token of the first stage, a power of two.
        mlp_ratio: hidden over outer channels of the MLPs.
        drop_path_rate: probability of leaving the last block's branches out; earlier ones grow towards it linearly.
        num_classes: classes; 0 leaves the classifier out.
        in_chans: channels of the images.
    """

    def __init__(
        self,
        mixer: str = "attention",
        mixer_options: Mapping[str, Any] | None = None,
        *,
        dims: tuple[int, ...] = (64, 128, 256),
        depths: tuple[int, ...] = (2, 2, 2),
        patch_size: int = 4,
        mlp_ratio: float = 2.0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if len(dims) != len(depths):
            raise InputError(f"dims is {dims} and depths is {depths}: give one of each for every stage")
        self.stem = _stem(in_chans, dims[0], patch_size)
        make_mixer = partial(create_mixer, mixer, **(mixer_options or {}))
        self.stages = nn.ModuleList()
        for stage, (dim, rates) in enumerate(zip(dims, drop_path_rates(drop_path_rate, depths))):
            down = nn.Identity() if stage == 0 else Downsample(dims[stage - 1], dim)
            blocks = [_Block(dim, make_mixer, mlp_ratio, rate) for rate in rates]
            self.stages.append(Stage(down, nn.Sequential(*blocks)))
        self.norm = nn.LayerNorm(dims[-1])
        self.num_features = dims[-1]
        self.feature_info = FeatureInfo.of_stages(dims, reduction=patch_size)
        self.first_conv = "stem.0"
        self.reset_classifier(num_classes)

    def run_stages(self, images: Tensor) -> list[Tensor]:
        x = channels_last(self.stem(images))  # from here (B, H, W, C)
        x = x + sine_positions(x)
        maps = []
        for stage in self.stages:
            assert isinstance(stage, Stage)
            x = self.run_blocks(stage.blocks, stage.downsample(x))
            maps.append(x)
        maps[-1] = self.norm(maps[-1])
        return [channels_first(x) for x in maps]


class _Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)), channels last."""

    def __init__(self, dim: int, make_mixer: partial[Any], mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = make_mixer(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _stem(in_chans: int, dim: int, patch_size: int) -> nn.Sequential:
    """Strided 3 x 3 convolutions, one for each halving, with half the channels until the last."""
    halvings = int(math.log2(patch_size)) if patch_size >= 1 else 0
    if patch_size < 2 or 2**halvings != patch_size:
        raise InputError(f"patch_size is {patch_size}: the stem halves the image a few times. Take 2, 4, 8 or 16")
    layers: list[nn.Module] = []
    for step in range(halvings):
        width = dim if step == halvings - 1 else dim // 2
        layers += [nn.Conv2d(in_chans, width, 3, stride=2, padding=1), nn.GELU()]
        in_chans = width
    return nn.Sequential(*layers[:-1])


def sine_positions(x: Tensor) -> Tensor:
    """Sines and cosines of row and column, (H, W, C), for a map x (B, H, W, C); wavelengths 2 pi to 20000 pi tokens."""
    height, width, dim = x.shape[1:]
    quarter = -(-dim // 4)
    wavelength = 10000 ** (torch.arange(quarter, device=x.device, dtype=torch.float32) / quarter)
    rows = torch.arange(height, device=x.device)[:, None, None] / wavelength
    columns = torch.arange(width, device=x.device)[None, :, None] / wavelength
    parts = [rows.sin(), rows.cos(), columns.sin(), columns.cos()]
    return torch.cat([part.expand(height, width, -1) for part in parts], -1)[..., :dim].to(x.dtype)


VARIANTS = {
    "study_xxs": Variant(partial(StudyNet, dims=(32, 64), depths=(1, 2))),
    "study_xs": Variant(partial(StudyNet, dims=(64, 128, 256), depths=(2, 2, 2))),
    "study_s": Variant(partial(StudyNet, dims=(64, 128, 256, 512), depths=(2, 2, 6, 2))),
}
