"""OverLoCK (Lou and Yu, 2025, arXiv:2502.20087): a short network looks over the image first, and its coarse map guides
a second one that looks closely, with filters made of context (`saccade.mixers.ContMix`)."""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.backbones.backbone import Backbone, FeatureInfo
from saccade.backbones.convolution import ConvNormAct, LinearNorm
from saccade.backbones.large_kernel import LargeKernel, ResidualDepthwise
from saccade.backbones.patches import channels_first, channels_last
from saccade.backbones.recalibration import ResponseNorm, SqueezeExcite
from saccade.backbones.residual import DropPath, drop_path_rates
from saccade.backbones.variant import Variant
from saccade.mixers import ContMix

__all__ = ["VARIANTS", "OverLoCK", "OverLoCKOutput", "OverLoCKStages"]


class OverLoCKOutput(NamedTuple):
    """What OverLoCK returns in training with `aux_head=True`; its authors add 0.4 times the second's loss.

    Attributes:
        logits: (B, num_classes), of the network.
        overview: (B, num_classes), of the overview alone.
    """

    logits: Tensor
    overview: Tensor


class OverLoCKStages(NamedTuple):
    """The maps of one pass, each (B, channels, H', W').

    Attributes:
        base: after each of the first three stages.
        overview: the coarse map, which the context is made of.
        focus: after each of the two last stages, their features and the context beside them.
    """

    base: list[Tensor]
    overview: Tensor
    focus: list[Tensor]


class OverLoCK(Backbone):
    """Overview first, look closely next.

    Three stages of large kernels lead to 1/16 of the image, a fourth looks over it at 1/32. What that saw, the context,
    goes back to 1/16: beside the features, and as the regions of which ContMix makes its filters. Two stages look
    closely, at 1/16 and 1/32. Taps show the context as features of `stages.3.context`, and ContMix's token matrices.

    Args:
        depths: blocks of the first four stages.
        focus_depths: of the two that look closely.
        dims: channels of the first four stages; a fourth of the last are the context's.
        num_heads: for both of them; ContMix has as many heads again.
        kernel_sizes: of the first four stages; the third and fourth are those of the two others too.
        small_kernel: of ContMix.
        mlp_ratio, focus_mlp_ratio: hidden channels of the MLPs over channels, one number or one for each stage.
        projection: channels of the 1 x 1 convolution before the pooling.
        scale_shortcut: the learned scales multiply shortcuts, as published, instead of branches.
        layer_scale: where the scales of the first four stages start; None has none.
        reparameterized: build the folded form, for weights that were saved after `reparameterize()`.
        aux_head: a classifier for the overview too; in training the network then returns an `OverLoCKOutput`.
        impl: as in `ContMix`.
        drop_path_rate: probability of leaving the last block's branches out; earlier ones grow towards it linearly.
        num_classes, in_chans: as for every backbone.
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        focus_depths: tuple[int, int],
        dims: tuple[int, ...],
        num_heads: tuple[int, int],
        *,
        kernel_sizes: tuple[int, ...] = (17, 15, 13, 7),
        small_kernel: int = 5,
        mlp_ratio: float | tuple[float, ...] = 4.0,
        focus_mlp_ratio: float | tuple[float, ...] = 3.0,
        projection: int = 1024,
        scale_shortcut: bool = True,
        layer_scale: tuple[float | None, ...] = (None, None, 1.0, 1.0),
        reparameterized: bool = False,
        aux_head: bool = False,
        impl: str = "auto",
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        context = dims[3] // 4
        large = partial(LargeKernel, reparameterized=reparameterized)
        ratios = (*_for_each(mlp_ratio, 4), *_for_each(focus_mlp_ratio, 2))
        rates = drop_path_rates(drop_path_rate, (*depths, *focus_depths))
        self.stem = _make_stem(in_chans, dims[0])
        self.stages = nn.ModuleList()
        for number, dim in enumerate(dims):
            first = ConvNormAct(dims[number - 1], dim, 3, stride=2, act=None) if number else nn.Identity()
            blocks = (
                _OverviewBlock(
                    dim,
                    large(dim, kernel_sizes[number]),
                    ratios[number],
                    scale=layer_scale[number],
                    scale_shortcut=scale_shortcut,
                    drop_path=rate,
                )
                for rate in rates[number]
            )
            self.stages.append(_Stage(first, blocks))
        self.stages[3].context = _Context(dims[3], context, 1)
        for number, dim in enumerate(dims[2:]):
            focus = (
                _FocusBlock(
                    dim,
                    context,
                    large(dim, kernel_sizes[number + 2]),
                    ContMix(
                        dim,
                        2 * num_heads[number],
                        kernel_size=kernel_sizes[number + 2],
                        small_kernel=small_kernel,
                        context_dim=context,
                        project=LinearNorm,
                        projections=False,
                        impl=impl,
                    ),
                    ratios[number + 4],
                    renew=number + index > 0,  # the first block gets the original one alone
                    scale_shortcut=scale_shortcut,
                    drop_path=rate,
                )
                for index, rate in enumerate(rates[number + 4])
            )
            self.stages.append(_Stage(_HalveBoth(dims[2], dim, context) if number else _KeepBoth(), focus))
        self.final_conv = ConvNormAct(dims[3] + context, projection, act=nn.SiLU)
        self.aux_norm = nn.BatchNorm2d(dims[3]) if aux_head else None
        self.classifiers = ("head", "aux_head") if aux_head else ("head",)
        self.num_features = projection
        self.feature_info = FeatureInfo.of_stages((dims[0], dims[1], dims[2] + context, projection))
        self.feature_info[2]["module"], self.feature_info[3]["module"] = "stages.4", "final_conv"
        self.first_conv = "stem.0.conv"
        self.apply(_init)
        self.reset_classifier(num_classes)

    def look(self, images: Tensor) -> OverLoCKStages:
        """Run all stages: (B, in_chans, H, W) to their maps."""
        x, base = self.stem(images.contiguous(memory_format=torch.channels_last)), []
        for number in range(3):
            x = self._overview(number, x)
            base.append(x)
        overview = self._overview(3, x)
        context: Tensor = self.stages[3].get_submodule("context")(overview)
        returned = F.interpolate(context, x.shape[2:], mode="bilinear", align_corners=False)
        first = self._focus(4, (x, returned), returned)
        second = self._focus(5, first, context)
        return OverLoCKStages(base, overview, [torch.cat(each, 1) for each in (first, second)])

    def run_stages(self, images: Tensor) -> list[Tensor]:
        return self._maps(self.look(images))

    def forward(self, images: Tensor) -> Tensor | OverLoCKOutput:  # type: ignore[override]
        """(B, in_chans, H, W) to logits (B, num_classes); in training with `aux_head`, to both."""
        self._check(images)
        seen = self.look(images)
        logits = self.forward_head(self._maps(seen)[-1])
        if self.aux_norm is None or not self.training:
            return logits
        return OverLoCKOutput(logits, self.aux_head(self.aux_norm(seen.overview).mean((2, 3))))

    def reparameterize(self) -> Self:
        """Fold the branches of all large kernels, in place: the same logits in evaluation, faster. Not for training,
        which loses accuracy then."""
        for module in self.modules():
            if isinstance(module, LargeKernel):
                module.reparameterize()
        return self

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if self.aux_norm is not None and num_classes:
            self.aux_head = nn.Linear(self.aux_norm.num_features, num_classes)
            self.init_classifier(self.aux_head)

    def init_classifier(self, layer: nn.Module) -> None:
        """As the other layers start."""
        _init(layer)

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official weights: stages have names of their own, projections are 1 x 1 convolutions, and the classifier of
        the overview is left out where the network has none."""
        renamed = {}
        reparameterized = any(name.endswith(".lk_origin.bias") for name in state)
        for name, tensor in state.items():
            if name.startswith("aux_head.") and self.aux_norm is None:
                continue
            ours = _renamed(name, reparameterized)
            linear = re.search(r"(^(aux_)?head|\.mix\.([qk]\.linear|kernels))\.weight$", ours)
            renamed[ours] = tensor.flatten(1) if linear else tensor
        return renamed

    def _maps(self, seen: OverLoCKStages) -> list[Tensor]:
        return [*seen.base[:2], seen.focus[0], self.final_conv(seen.focus[1])]

    def _overview(self, number: int, x: Tensor) -> Tensor:
        stage = self.stages[number]
        assert isinstance(stage, _Stage)
        return self.run_blocks(stage.blocks, stage.downsample(x))

    def _focus(self, number: int, both: tuple[Tensor, Tensor], original: Tensor) -> tuple[Tensor, Tensor]:
        stage = self.stages[number]
        assert isinstance(stage, _Stage)
        x, context = stage.downsample(*both)
        for block in stage.blocks:
            x, context = self.run_block(block, x, context, original)
        return x, context


class _Stage(nn.Module):
    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)


class _Context(nn.Conv2d):
    """The overview's map to the context that is handed back."""

    def forward(self, x: Tensor) -> Tensor:
        context = super().forward(x)
        taps.record(self, "features", lambda: channels_last(context))
        return context


class _HalveBoth(nn.Module):
    """Features and context to half the map."""

    def __init__(self, dim: int, dim_out: int, context: int) -> None:
        super().__init__()
        self.features = ConvNormAct(dim, dim_out, 3, stride=2, act=None)
        self.context = ConvNormAct(context, context, 3, stride=2, act=None)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.features(x), self.context(context)


class _KeepBoth(nn.Module):
    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return x, context


class ChannelAffine(nn.Module):
    """A learned factor and summand for each channel, (B, C, H, W) to the same."""

    def __init__(self, dim: int, init: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim, 1, 1, 1), float(init)))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias.view(-1, 1, 1), x, self.weight.squeeze(-1))


class _MapNorm(nn.LayerNorm):
    """A norm over the channels of (B, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return channels_first(super().forward(channels_last(x)))


class _ConvMlp(nn.Module):
    """1 x 1 convolution, activation, 3 x 3 depthwise convolution, norm of responses, 1 x 1 convolution."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = nn.GELU()
        self.conv = ResidualDepthwise(hidden)
        self.norm = ResponseNorm(hidden)
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.norm(self.conv(self.act(self.fc1(x)))))
        return out


class _ScaledSum(nn.Module):
    """A shortcut and a branch, one of which is scaled; the branch is left out of some images in training.

    Args:
        dim: C, channels.
        scale: where the learned scale starts; None has none.
        of_shortcut: it is the shortcut's, or the branch's.
    """

    def __init__(self, dim: int, scale: float | None, of_shortcut: bool) -> None:
        super().__init__()
        self.scale = nn.Identity() if scale is None else ChannelAffine(dim, scale)
        self.of_shortcut = of_shortcut

    def forward(self, x: Tensor, branch: Tensor, drop_path: DropPath) -> Tensor:
        if self.of_shortcut:
            out: Tensor = self.scale(x) + drop_path(branch)
            return out
        return x + drop_path(self.scale(branch))


class _OverviewBlock(nn.Module):
    """Depthwise convolution of a large kernel, channel gates, MLP: (B, C, H, W) to the same."""

    def __init__(
        self,
        dim: int,
        large: LargeKernel,
        mlp_ratio: float,
        *,
        scale: float | None,
        scale_shortcut: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.conv = ResidualDepthwise(dim)
        self.norm = _MapNorm(dim)
        self.large = large
        self.gate = _make_gate(dim)
        self.mlp = _ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.sum = _ScaledSum(dim, scale, scale_shortcut)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        branch = self.mlp(self.gate(self.large(self.norm(x))))
        out: Tensor = self.sum(x, branch, self.drop_path)
        return out


class _FocusBlock(nn.Module):
    """ContMix and an MLP on features and context: (B, C, H, W) and (B, D, H, W) to the same.

    Args:
        dim, context: C and D.
        large: a convolution beside ContMix.
        mix: ContMix.
        mlp_ratio: hidden channels of the MLP over C.
        renew: add the original context to the one that the block before returned, both scaled.
        scale_shortcut, drop_path: as for the network.
    """

    def __init__(
        self,
        dim: int,
        context: int,
        large: LargeKernel,
        mix: ContMix,
        mlp_ratio: float,
        *,
        renew: bool,
        scale_shortcut: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        both = dim + context
        self.widths = (dim, context)
        self.own_scale = ChannelAffine(context) if renew else None
        self.original_scale = ChannelAffine(context) if renew else None
        self.conv1 = ResidualDepthwise(both)
        self.norm1 = _MapNorm(both)
        self.fusion = nn.Sequential(
            nn.Conv2d(both, both, 3, padding=1, groups=both),
            nn.BatchNorm2d(both),
            nn.GELU(),
            nn.Conv2d(both, dim, 1),
            ResponseNorm(dim),
        )
        self.gate = ConvNormAct(dim, dim, act=nn.SiLU)
        self.large = large
        self.mix = mix
        nn.init.zeros_(mix.small_bias)
        nn.init.zeros_(mix.large_bias)
        self.mixed = ConvNormAct(dim, dim, act=None)
        self.channels = _make_gate(dim)
        self.proj_norm = nn.BatchNorm2d(dim)
        self.proj = nn.Conv2d(dim, both, 1)
        self.drop_path = DropPath(drop_path)
        self.sum1 = _ScaledSum(both, 1.0, scale_shortcut)
        self.conv2 = ResidualDepthwise(both)
        self.norm2 = _MapNorm(both)
        self.mlp = _ConvMlp(both, int(dim * mlp_ratio))
        self.sum2 = _ScaledSum(both, 1.0, scale_shortcut)

    def forward(self, x: Tensor, context: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
        if self.own_scale is not None and self.original_scale is not None:
            context = self.own_scale(context) + self.original_scale(original)
        x = self.conv1(torch.cat([x, context], 1))
        x = self.sum1(x, self._mix(self.norm1(x)), self.drop_path)
        x = self.conv2(x)
        x = self.sum2(x, self.mlp(self.norm2(x)), self.drop_path)
        features, context = x.split(self.widths, 1)
        return features, context

    def _mix(self, x: Tensor) -> Tensor:
        value = self.fusion(x)
        query, regions = channels_last(x).split(self.widths, -1)
        mixed = channels_first(self.mix.filter(channels_last(value), query, regions))
        mixed = self.mixed(mixed) + self.large(value)
        out: Tensor = self.proj(self.proj_norm(self.channels(mixed) * self.gate(value)))
        return out


def _make_stem(in_chans: int, dim: int) -> nn.Sequential:
    """Four convolutions, to a quarter of the image."""
    layer = partial(ConvNormAct, kernel_size=3, act=nn.GELU)
    return nn.Sequential(
        layer(in_chans, dim // 2, stride=2),
        layer(dim // 2, dim // 2),
        layer(dim // 2, dim, stride=2),
        layer(dim, dim, act=None),
    )


def _make_gate(dim: int) -> SqueezeExcite:
    return SqueezeExcite(dim, max(dim // 8, 16), act=nn.GELU)


def _for_each(value: float | tuple[float, ...], count: int) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * count


def _init(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


_OUTSIDE = {
    **{f"patch_embed1.{3 * n}": f"stem.{n}.conv" for n in range(4)},
    **{f"patch_embed1.{3 * n + 1}": f"stem.{n}.bn" for n in range(4)},
    **{f"patch_embed{n}.0": f"stages.{n - 1}.downsample.conv" for n in (2, 3, 4)},
    **{f"patch_embed{n}.1": f"stages.{n - 1}.downsample.bn" for n in (2, 3, 4)},
    "patch_embedx.x_proj.0": "stages.5.downsample.features.conv",
    "patch_embedx.x_proj.1": "stages.5.downsample.features.bn",
    "patch_embedx.h_proj.0": "stages.5.downsample.context.conv",
    "patch_embedx.h_proj.1": "stages.5.downsample.context.bn",
    "high_level_proj": "stages.3.context",
    "head.0": "final_conv.conv",
    "head.1": "final_conv.bn",
    "head.4": "head",
    "aux_head.0": "aux_norm",
    "aux_head.2": "aux_head",
}
_OVERVIEW = {
    "dwconv": "conv",
    "proj.0": "norm",
    "proj.1": "large",
    "proj.2": "large.norm",
    "proj.3.proj.1": "gate.fc1",
    "proj.3.proj.3": "gate.fc2",
    "proj.4": "mlp.fc1",
    "proj.6": "mlp.conv",
    "proj.7": "mlp.norm",
    "proj.8": "mlp.fc2",
    "ls": "sum.scale",
}
_FOCUS = {
    "x_scale": "own_scale",
    "h_scale": "original_scale",
    "dwconv1": "conv1",
    "rpb1": "mix.small_bias",
    "rpb2": "mix.large_bias",
    "weight_query.0": "mix.q.linear",
    "weight_query.1": "mix.q.bn",
    "weight_key.1": "mix.k.linear",
    "weight_key.2": "mix.k.bn",
    "weight_proj": "mix.kernels",
    "dyconv_proj.0": "mixed.conv",
    "dyconv_proj.1": "mixed.bn",
    "lepe.0": "large",
    "lepe.1": "large.norm",
    "se_layer.proj.1": "channels.fc1",
    "se_layer.proj.3": "channels.fc2",
    "gate.0": "gate.conv",
    "gate.1": "gate.bn",
    "proj.0": "proj_norm",
    "proj.1": "proj",
    "dwconv2": "conv2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.conv",
    "mlp.3": "mlp.norm",
    "mlp.4": "mlp.fc2",
    "ls1": "sum1.scale",
    "ls2": "sum2.scale",
}


def _renamed(name: str, reparameterized: bool) -> str:
    block = re.fullmatch(r"(sub_)?blocks(\d)\.(\d+)\.(.+)", name)
    before, names = "", _OUTSIDE
    if block:
        focus, stage, index, name = block.groups()
        before, names = f"stages.{int(stage) + (1 if focus else -1)}.blocks.{index}.", _FOCUS if focus else _OVERVIEW
    for official, ours in names.items():
        if name == official or name.startswith(f"{official}."):
            name = ours + name.removeprefix(official)
            break
    name = name.replace("lk_origin", "conv" if reparameterized else "conv.conv").replace("origin_bn", "conv.bn")
    return before + re.sub(r"dil_(conv|bn)_(k\d+_\d+)", r"branches.\2.\1", name)


def _published(
    depths: tuple[int, ...],
    focus_depths: tuple[int, int],
    dims: tuple[int, ...],
    num_heads: tuple[int, int],
    crop: float = 0.95,
) -> Variant:
    return Variant(partial(OverLoCK, depths, focus_depths, dims, num_heads), crop=crop)


VARIANTS = {
    "overlock_test": Variant(
        partial(
            OverLoCK,
            (1, 1, 1, 1),
            (2, 2),
            (16, 24, 32, 48),
            (1, 2),
            kernel_sizes=(9, 7, 7, 5),
            small_kernel=3,
            projection=64,
        ),
        image_size=64,
    ),
    "overlock_xt": _published((2, 2, 3, 2), (6, 2), (56, 112, 256, 336), (4, 6), crop=0.925),
    "overlock_t": _published((4, 4, 6, 2), (12, 2), (64, 128, 256, 512), (4, 8)),
    "overlock_s": _published((6, 6, 8, 3), (16, 3), (64, 128, 320, 512), (8, 16)),
    "overlock_b": _published((8, 8, 10, 4), (20, 4), (80, 160, 384, 576), (6, 9), crop=0.975),
}
