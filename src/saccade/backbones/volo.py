"""VOLO (Yuan et al., 2021, arXiv:2106.13112): outlook attention on a fine map, attention on a coarse one, then a class
token that reads all patches. It learns from a label for every token, and patches have a classifier of their own."""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.backbones.backbone import Backbone, FeatureInfo
from saccade.backbones.mlp import Mlp, init_linear
from saccade.backbones.patches import Downsample, channels_first, channels_last
from saccade.backbones.positions import resize_positions
from saccade.backbones.residual import Block, Stage, drop_path_rates
from saccade.backbones.variant import Variant
from saccade.errors import InputError
from saccade.mixers import Attention, OutlookAttention
from saccade.mixers.mixer import Mixer, choose_heads, merge_heads, split_heads
from saccade.ops import softmax_attention
from saccade.ops.softmax_attention import attention_weights

__all__ = ["VARIANTS", "VOLO", "DenseLogits"]


class DenseLogits(NamedTuple):
    """What a network says about the image and about each of its tokens.

    Attributes:
        logits: (B, classes), of the class token.
        dense: (B, H, W, classes), of the patches' tokens, each of its own image even if tokens were mixed.
        box: first row, row behind the last, first column, column behind the last, in tokens: inside it images were
            mixed with those of the batch in reverse order. All 0 where nothing was mixed.
    """

    logits: Tensor
    dense: Tensor
    box: tuple[int, int, int, int] = (0, 0, 0, 0)


class VOLO(Backbone):
    """Stages of outlook attention or attention, class attention, and classifiers of class token and patches.

    Logits are those of the class token, and half of the largest that any patch has for the class.

    Args:
        depths, dims, num_heads: blocks of the stages, their channels and heads.
        outlook: which stages have outlook attention; None takes the first.
        down: which stages end with a step down, a convolution of 2 x 2 tokens; None takes the first.
        mlp_ratio: hidden over outer channels of the MLPs, one number or one for each stage.
        stem_dim: channels of the convolutions before the patches.
        patch_size: pixels along each side of a token of the first stage, even.
        image_size: pixels along each side of the images for which `pos_embed` has rows.
        kernel_size, stride, padding: of outlook attention.
        qkv_bias: give queries, keys and values a bias.
        scale: factor of the logits of all attention; None takes D^-0.5.
        class_layers: blocks of class attention. Without any there is no class token: patches are averaged.
        dense: have a classifier of the patches.
        mix_tokens: in training `forward` mixes tokens and returns `DenseLogits`, as `forward_dense` does.
        drop_path_rate: probability of leaving the last block's branches out; earlier ones grow towards it linearly.
            Blocks of outlook attention are never left out, as in official code.
        num_classes, in_chans: as for every backbone.
    """

    pools: tuple[str, ...] = ("token", "avg", "max", "all")

    def __init__(
        self,
        depths: tuple[int, ...] = (4, 4, 8, 2),
        dims: tuple[int, ...] = (192, 384, 384, 384),
        num_heads: tuple[int, ...] = (6, 12, 12, 12),
        *,
        outlook: tuple[bool, ...] | None = None,
        down: tuple[bool, ...] | None = None,
        mlp_ratio: float | tuple[float, ...] = 3.0,
        stem_dim: int = 64,
        patch_size: int = 8,
        image_size: int = 224,
        kernel_size: int = 3,
        stride: int = 2,
        padding: int = 1,
        qkv_bias: bool = False,
        scale: float | None = None,
        class_layers: int = 2,
        dense: bool = True,
        mix_tokens: bool = False,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        stages = range(len(depths))
        first = tuple(stage == 0 for stage in stages)
        outlook, down = outlook or first, down or first
        ratios = mlp_ratio if isinstance(mlp_ratio, tuple) else (mlp_ratio,) * len(depths)
        given = {"depths": depths, "dims": dims, "num_heads": num_heads, "outlook": outlook, "down": down}
        for name, values in (given | {"mlp_ratio": ratios}).items():
            if len(values) != len(depths):
                raise InputError(f"{name} is {values} and depths is {depths}: give one for each stage")
        for stage in stages[1:]:
            if dims[stage] != dims[stage - 1] and not down[stage - 1]:
                raise InputError(f"dims is {dims} and down is {down}: channels change at a step down. Take one there")
        if dense and not class_layers:
            raise InputError(
                "dense is True and class_layers is 0: patches are judged beside a class token. Set dense=False"
            )
        if patch_size < 2 or patch_size % 2:
            raise InputError(f"patch_size is {patch_size}: the stem halves the image first. Give an even number")
        self.down, self.mix_tokens = down, mix_tokens
        self.pools = VOLO.pools if class_layers else Backbone.pools
        self.global_pool = self.pools[0]
        self.num_prefix_tokens = 1 if class_layers else 0
        self.pooling = 2 ** sum(down[:-1])  # tokens of the first map along each side of one of the last
        self.patch_size = patch_size
        self.positions_at = 1 if down[0] else 2  # official code counts steps down as stages
        side = image_size // patch_size // 2 ** sum(down[: self.positions_at])
        self.pos_embed = nn.Parameter(torch.empty(1, side, side, dims[-1]))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dims[-1])) if class_layers else None
        self.patch_embed = _PatchEmbed(in_chans, stem_dim, dims[0], patch_size)

        def make(stage: int, rate: float) -> Block:
            dim, heads = dims[stage], num_heads[stage]
            options: dict[str, Any] = {"qkv_bias": qkv_bias, "scale": scale}
            windows: dict[str, Any] = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
            attn = OutlookAttention(dim, heads, **windows, **options) if outlook[stage] else None
            return Block(
                dim,
                attn or Attention(dim, heads, **options),
                Mlp(dim, int(dim * ratios[stage])),
                norm=nn.LayerNorm,
                drop_path=0.0 if outlook[stage] else rate,
            )

        self.stages = nn.ModuleList()
        for stage, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            step = stage > 0 and down[stage - 1]
            before = Downsample(dims[stage - 1], dims[stage], 2, padding=0, norm=nn.Identity) if step else nn.Identity()
            self.stages.append(Stage(before, nn.Sequential(*(make(stage, rate) for rate in rates))))
        self.post_network = nn.ModuleList(
            _ClassBlock(dims[-1], num_heads[-1], ratios[-1], qkv_bias=qkv_bias, scale=scale)
            for _ in range(class_layers)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.num_features = dims[-1]
        self.feature_info = FeatureInfo(
            {"num_chs": dims[stage], "reduction": patch_size * 2 ** sum(down[:stage]), "module": f"stages.{stage}"}
            for stage in stages
        )
        self.first_conv = "patch_embed.conv.0"
        self.classifiers = ("head", "aux_head") if dense else ("head",)
        self.apply(init_linear)
        for parameter in (self.pos_embed, self.cls_token):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)
        self.reset_classifier(num_classes)

    def run_stages(self, images: Tensor) -> list[Tensor]:
        maps = self._run(self._embed(images))
        maps[-1] = self.norm(maps[-1])
        return [channels_first(x) for x in maps]

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) to tokens (B, P + N, C), the class token first."""
        self._check(images)
        return self._read(self._run(self._embed(images))[-1])

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` returns to logits; pre_logits stops before the classifiers."""
        out = super().forward_head(features, pre_logits)
        if pre_logits or not self.num_classes or len(self.classifiers) == 1 or self.global_pool != "token":
            return out
        return out + 0.5 * self.get_submodule("aux_head")(features[:, 1:]).amax(1)

    def forward(self, images: Tensor) -> Tensor | DenseLogits:  # type: ignore[override]
        """(B, in_chans, H, W) to logits (B, num_classes); with `mix_tokens`, in training, to DenseLogits."""
        if self.training and self.mix_tokens:
            return self.forward_dense(images, mix=True)
        return super().forward(images)

    def forward_dense(
        self, images: Tensor, *, mix: bool = False, generator: torch.Generator | None = None
    ) -> DenseLogits:
        """Logits of the class token and of every patch, for learning from a label for every token.

        Args:
            images: (B, in_chans, H, W).
            mix: fill a box of random size and place in every image with the tokens of the batch in reverse order.
            generator: of the box, on the CPU.
        """
        self._check(images)
        if len(self.classifiers) == 1 or not self.num_classes:
            raise InputError("this network has no classifier of patches: build it with dense=True and num_classes > 0")
        x = self._embed(images)
        space = x.shape[1] // self.pooling, x.shape[2] // self.pooling
        box = _draw_box(space, generator) if mix else (0, 0, 0, 0)
        if mix:
            x = _swap(x, tuple(self.pooling * side for side in box))
        tokens = self._read(self._run(x)[-1])
        dense = self.get_submodule("aux_head")(tokens[:, 1:]).unflatten(1, space)
        dropped = F.dropout(tokens[:, 0], self.drop_rate, self.training)
        return DenseLogits(self.head(dropped), _swap(dense, box) if mix else dense, box)

    def pool(self, features: Tensor) -> Tensor:
        """Tokens (B, P + N, C) to (B, C): the class token, or the patches' mean or maximum, or the mean of all."""
        patches = features[:, self.num_prefix_tokens :]
        match self.global_pool:
            case "token":
                return features[:, 0]
            case "avg":
                return patches.mean(1)
            case "max":
                return patches.amax(1)
            case "all":
                return features.mean(1)
        return features

    def init_classifier(self, layer: nn.Module) -> None:
        """As all linear layers start."""
        init_linear(layer)

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official weights, where steps down are counted among the stages."""
        places: list[str] = []
        for stage, step in enumerate(self.down):
            places += [f"stages.{stage}.blocks."] + [f"stages.{stage + 1}.downsample."] * step
        return {_renamed(name, places): tensor for name, tensor in state.items()}

    def refit(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Positions of another image size are interpolated."""
        if name == "pos_embed" and tensor.ndim == 4 and tensor.shape[-1] == shape[-1]:
            return _resize(tensor, (shape[1], shape[2]))
        return tensor

    def _embed(self, images: Tensor) -> Tensor:
        least = self.patch_size * self.pooling
        if min(images.shape[2:]) < least:
            raise InputError(f"images is {tuple(images.shape)}: give {least} x {least} pixels at least, one token")
        x: Tensor = self.patch_embed(images)
        return x

    def _run(self, x: Tensor) -> list[Tensor]:
        """The first map, channels last, to those of all stages."""
        maps = []
        for number, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            x = stage.downsample(x)
            if number == self.positions_at:
                x = x + _resize(self.pos_embed, (x.shape[1], x.shape[2]))
            x = self.run_blocks(stage.blocks, x)
            maps.append(x)
        return maps

    def _read(self, x: Tensor) -> Tensor:
        """The last map (B, H, W, C) to tokens (B, P + N, C), after class attention and norm."""
        patches = x.flatten(1, 2)
        if self.cls_token is None:
            return self.norm(patches)
        token = self.cls_token.expand(len(x), -1, -1)
        for block in self.post_network:
            token = self.run_block(block, x, token)
        return self.norm(torch.cat([token, patches], 1))


class _PatchEmbed(nn.Module):
    """Three convolutions of which the first halves the image, and patches of what they make, channels last."""

    def __init__(self, in_chans: int, stem_dim: int, dim: int, patch_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []  # one after the other: a block of three would keep its input until it ends
        for width, kernel, stride in ((in_chans, 7, 2), (stem_dim, 3, 1), (stem_dim, 3, 1)):
            conv = nn.Conv2d(width, stem_dim, kernel, stride, kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(stem_dim), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(stem_dim, dim, patch_size // 2, patch_size // 2)

    def forward(self, images: Tensor) -> Tensor:
        return channels_last(self.proj(self.conv(images)))


class _ClassAttention(Mixer):
    """The class token reads itself and the patches (CaiT, Touvron et al., 2021, arXiv:2103.17239).

    Only with a prefix; the map comes back as it was. Taps see rows of zeros for the patches, which read nothing.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = False, scale: float | None = None) -> None:
        super().__init__(dim)
        self.num_heads, self.scale = choose_heads(dim, num_heads), scale
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        raise InputError("class attention is for a class token: give it as prefix")

    def mix_with_prefix(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        tokens = torch.cat([prefix, x.flatten(1, -2)], 1)
        key, value = (split_heads(part, self.num_heads) for part in self.kv(tokens).chunk(2, -1))
        query = split_heads(self.q(prefix), self.num_heads)

        def attention() -> Tensor:
            scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
            return F.pad(attention_weights(query, key, None, scale), (0, 0, 0, key.shape[2] - query.shape[2]))

        taps.record(self, "attention", attention)
        out: Tensor = self.proj(merge_heads(softmax_attention(query, key, value, scale=self.scale)))
        return x, out


class _ClassBlock(nn.Module):
    """Class attention and an MLP for the class token (B, 1, C) alone, beside a map (B, H, W, C) that stays."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, *, qkv_bias: bool, scale: float | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _ClassAttention(dim, num_heads, qkv_bias=qkv_bias, scale=scale)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        _, read = self.attn(self.norm1(x), self.norm1(token))
        token = token + read
        return token + self.mlp(self.norm2(token))


def _resize(positions: Tensor, space: tuple[int, int]) -> Tensor:
    """(1, H, W, C) to another map."""
    old = positions.shape[1], positions.shape[2]
    return positions if old == space else resize_positions(positions.flatten(1, 2), space, old=old).unflatten(1, space)


def _draw_box(space: tuple[int, int], generator: torch.Generator | None) -> tuple[int, int, int, int]:
    """A box whose share of the map is uniform before it is cut at the border, around a uniform token."""
    share, *places = torch.rand(3, generator=generator, device="cpu").tolist()
    box: list[int] = []
    for length, place in zip(space, places):
        half, centre = int(length * math.sqrt(share)) // 2, int(length * place)
        box += [max(centre - half, 0), min(centre + half, length)]
    return box[0], box[1], box[2], box[3]


def _swap(x: Tensor, box: tuple[int, ...]) -> Tensor:
    """(B, H, W, C) with the box filled from the batch in reverse order."""
    top, bottom, left, right = box
    out = x.clone()
    out[:, top:bottom, left:right] = x.flip(0)[:, top:bottom, left:right]
    return out


def _renamed(name: str, places: list[str]) -> str:
    name = re.sub(r"^network\.(\d+)\.", lambda found: places[int(found[1])], name)
    name = name.replace(".downsample.proj.", ".downsample.reduction.")
    return _BLOCK.sub(lambda found: f"patch_embed.conv.{3 * int(found[1]) + (found[2] == 'bn')}.", name)


_BLOCK = re.compile(r"^patch_embed\.conv\.(\d)\.(conv|bn)\.")  # how our own weights had it before


def _variants(
    name: str,
    depths: tuple[int, ...],
    dim: int,
    heads: tuple[int, int],
    sizes: Mapping[int, float],
    *,
    mlp_ratio: float = 3.0,
    stem_dim: int = 64,
) -> dict[str, Variant]:
    """A network for several image sizes, each with its central crop."""
    make: Callable[..., partial[VOLO]] = partial(
        partial,
        VOLO,
        depths,
        (dim, 2 * dim, 2 * dim, 2 * dim),
        (heads[0], *(heads[1],) * 3),
        mlp_ratio=mlp_ratio,
        stem_dim=stem_dim,
    )
    return {
        name if size == 224 else f"{name}_{size}": Variant(
            make(image_size=size), image_size=size, weights=f"timm/{name}_{size}.sail_in1k", crop=crop
        )
        for size, crop in sizes.items()
    }


VARIANTS = {
    "volo_test": Variant(
        partial(VOLO, (1, 1, 1), (32, 48, 48), (2, 3, 3), stem_dim=16, patch_size=4, image_size=64), image_size=64
    ),
    **_variants("volo_d1", (4, 4, 8, 2), 192, (6, 12), {224: 0.96, 384: 1.0}),
    **_variants("volo_d2", (6, 4, 10, 4), 256, (8, 16), {224: 0.96, 384: 1.0}),
    **_variants("volo_d3", (8, 8, 16, 4), 256, (8, 16), {224: 0.96, 448: 1.0}),
    **_variants("volo_d4", (8, 8, 16, 4), 384, (12, 16), {224: 0.96, 448: 1.15}),
    **_variants(
        "volo_d5", (12, 12, 20, 4), 384, (12, 16), {224: 0.96, 448: 1.15, 512: 1.15}, mlp_ratio=4.0, stem_dim=128
    ),
}
