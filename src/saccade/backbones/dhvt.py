"""DHVT (Lu et al., 2022, arXiv:2210.05958): a vision transformer for small data, with convolutions in its patches and
MLPs and a token for each head in its attention."""

import math
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.backbones.isotropic import Isotropic
from saccade.backbones.patches import channels_first, channels_last
from saccade.backbones.residual import TokenBlock
from saccade.backbones.variant import Variant
from saccade.errors import InputError
from saccade.mixers import HeadTokenAttention

__all__ = ["DHVT", "VARIANTS", "AggregationMlp", "OverlappingPatches"]


class DHVT(Isotropic):
    """Overlapping patches, then blocks of head-token attention and aggregation MLPs, without positions.

    Args:
        dim: C, channels of a token.
        depth: blocks.
        num_heads: attention heads, as many as head tokens.
        patch_size: pixels along each side of a token: 2, 4, 8 or 16.
        mlp_ratio: hidden over outer channels of the MLPs.
        qkv_bias: give the projections of attention a bias.
        scale: factor of q.k; None takes D^-0.5.
        norm_eps: of the norms of blocks.
        drop_path_rate: probability of leaving the last block's branches out; earlier ones grow towards it linearly.
        num_classes, in_chans: as for every backbone.
    """

    def __init__(
        self,
        dim: int = 192,
        depth: int = 12,
        num_heads: int = 4,
        *,
        patch_size: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        scale: float | None = None,
        norm_eps: float = 1e-6,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        norm = partial(nn.LayerNorm, eps=norm_eps)

        def make_block(number: int) -> "DHVTBlock":
            return DHVTBlock(
                dim,
                HeadTokenAttention(dim, num_heads, qkv_bias=qkv_bias, scale=scale),
                AggregationMlp(dim, int(dim * mlp_ratio)),
                norm=norm,
                drop_path=drop_path_rate * number / max(1, depth - 1),
            )

        super().__init__(
            make_block,
            dim=dim,
            depth=depth,
            patch_size=patch_size,
            patch_embed=OverlappingPatches(in_chans, dim, patch_size),
            first_conv="patch_embed.proj.0.0",
            positions=None,
            norm=norm,
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(_init)

    def init_classifier(self, layer: nn.Module) -> None:
        """As all linear layers start."""
        _init(layer)

    def refit(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Scales and shifts of the images' channels are repeated for more channels, and averaged for one."""
        if not name.startswith("patch_embed.pre_affine."):
            return super().refit(name, tensor, shape)
        if shape[1] == 1:
            return tensor.mean(1, keepdim=True)
        return tensor.repeat(1, -(-shape[1] // tensor.shape[1]), 1, 1)[:, : shape[1]]


class OverlappingPatches(nn.Module):
    """3 x 3 convolutions with norms that each halve the image, between a learned scale and shift of channels on either
    side: (B, in_chans, H, W) to (B, H', W', C).

    Args:
        in_chans, dim: channels before and after.
        patch_size: 2, 4, 8 or 16.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        if patch_size not in (2, 4, 8, 16):
            raise InputError(f"patch_size is {patch_size}: every convolution halves the image. Take 2, 4, 8 or 16")
        steps = int(math.log2(patch_size))
        dims = [in_chans, *(dim // 2**step for step in reversed(range(steps)))]
        layers: list[nn.Module] = []
        for before, after in pairwise(dims):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(conv, nn.BatchNorm2d(after)), nn.GELU()]
        self.pre_affine = _Affine(in_chans)
        self.proj = nn.Sequential(*(layers if steps == 1 else layers[:-1]))  # only a single one ends in a GELU
        self.post_affine = _Affine(dim)

    def forward(self, images: Tensor) -> Tensor:
        return channels_last(self.post_affine(self.proj(self.pre_affine(images))))


class AggregationMlp(nn.Module):
    """An MLP with a depthwise convolution on the map (B, H, W, C), from whose mean factors for the channels of class
    tokens (B, P, C) are made, which go through nothing else. Returns both. Taps see the factors, (B, C).

    Args:
        dim: C, channels.
        hidden: channels between the layers.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, dim, 1)
        self.bn3 = nn.BatchNorm2d(dim)
        self.compress = nn.Linear(dim, dim // 4)
        self.excitation = nn.Linear(dim // 4, dim)

    def forward(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        out = F.gelu(self.bn1(self.conv1(channels_first(x))))
        out = out + F.gelu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        factors: Tensor = self.excitation(F.gelu(self.compress(out.mean((2, 3)))))
        taps.record(self, "gate", lambda: factors)
        return channels_last(out), prefix * factors.unsqueeze(1)


class DHVTBlock(TokenBlock):
    """A block whose MLP sees the map and the class tokens apart, too."""

    def forward(self, x: Tensor, space: tuple[int, ...] = ()) -> Tensor:
        x = x + self.drop_path(self.mix(self.norm1(x), space))
        count, x_norm = x.shape[1] - torch.Size(space).numel(), self.norm2(x)
        tokens, prefix = self.mlp(x_norm[:, count:].unflatten(1, space), x_norm[:, :count])
        return x + self.drop_path(torch.cat([prefix, tokens.flatten(1, -2)], 1))


class _Affine(nn.Module):
    """A learned scale and shift of each channel, channels first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha + self.beta


def _init(layer: nn.Module) -> None:
    """Truncated normal weights of standard deviation 0.02 and biases of 0 for linear layers; others stay."""
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _variant(dim: int, heads: int, patch_size: int, *, size: int = 224) -> Variant:
    return Variant(partial(DHVT, dim, 12, heads, patch_size=patch_size), image_size=size)


VARIANTS = {
    "dhvt_test": Variant(partial(DHVT, 32, 3, 4, patch_size=4, mlp_ratio=3.0), image_size=32),
    "dhvt_tiny_cifar_patch2": _variant(192, 4, 2, size=32),
    "dhvt_tiny_cifar_patch4": _variant(192, 4, 4, size=32),
    "dhvt_tiny_domain_patch16": _variant(192, 4, 16),
    "dhvt_tiny_imagenet_patch16": _variant(192, 3, 16),
    "dhvt_small_cifar_patch2": _variant(384, 8, 2, size=32),
    "dhvt_small_cifar_patch4": _variant(384, 8, 4, size=32),
    "dhvt_small_domain_patch16": _variant(384, 6, 16),
    "dhvt_small_imagenet_patch16": _variant(384, 6, 16),
}
