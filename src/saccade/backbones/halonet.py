"""HaloNet (Vaswani et al., 2021, arXiv:2103.12731): residual bottlenecks with halo attention, and timm's variants.

A stage's blocks attend or convolve; the paper's networks attend in all of them.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from saccade.backbones.backbone import Backbone, FeatureInfo
from saccade.backbones.convolution import ConvNormAct, divisible, init_convolution
from saccade.backbones.patches import TieredStem, channels_first, channels_last
from saccade.backbones.recalibration import EfficientChannelGate, SqueezeExcite
from saccade.backbones.residual import DropPath, drop_path_rates
from saccade.backbones.variant import Variant
from saccade.errors import check_choice
from saccade.mixers import HaloAttention

__all__ = ["VARIANTS", "HaloNet", "Stage"]

ACTS: dict[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),
    "silu": partial(nn.SiLU, inplace=True),
}
GATES: dict[str | None, Callable[[int, float], nn.Module]] = {
    None: lambda dim, ratio: nn.Identity(),
    "se": lambda dim, ratio: SqueezeExcite(dim, divisible(dim * ratio, least=0)),
    "eca": lambda dim, ratio: EfficientChannelGate(dim),
}
SHORTCUTS: dict[str | None, Callable[[int, int, int], nn.Module | None]] = {
    None: lambda dim, dim_out, stride: None,
    "conv": lambda dim, dim_out, stride: ConvNormAct(dim, dim_out, stride=stride, act=None),
    "avg": lambda dim, dim_out, stride: nn.Sequential(
        nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity(),
        ConvNormAct(dim, dim_out, act=None),
    ),
}
STEMS = ("7x7", "tiered", "3x3")


class Stage(NamedTuple):
    """Blocks on one map.

    Attributes:
        depth: how many.
        dim: channels that they return.
        stride: of the first block.
        ratio: width inside the block over its width outside.
        attend: numbers of the blocks that attend; None means all. The others have a 3 x 3 convolution.
        num_heads: attention heads.
    """

    depth: int
    dim: int
    stride: int = 2
    ratio: float = 1.0
    attend: tuple[int, ...] | None = None
    num_heads: int = 8


class HaloNet(Backbone):
    """Residual network of halo attention.

    Args:
        stages: what differs from stage to stage.
        block_size, halo_size, dim_head: of the attention; `saccade.mixers.HaloAttention` explains them.
        attention_options: further options of it: avg_down, qkv_bias, scale_position.
        qk_ratio: width of queries and keys over width inside the block, where dim_head does not say it.
        value_ratio: width of values over width inside the block (the paper's r_v).
        stem: "7x7" (one convolution), "tiered" (three of 3 x 3) or "3x3" (one, without pooling).
        stem_dim: channels after it.
        stem_pool: a 3 x 3 maximum of stride 2 at its end.
        act: "relu" or "silu".
        gate: channel gates in blocks with a convolution: None, "se" or "eca".
        gate_ratio: width inside gates of squeeze-and-excitation.
        group_size: channels of a group of 3 x 3 convolutions; 0 has one group.
        final_dim: channels of a 1 x 1 convolution behind the stages (the paper's d_f); None has none.
        ratio_of: the width that a block's `ratio` multiplies: the one it returns ("out") or the one it takes ("in").
        shortcut: how the input is added where a block changes its map or width: through a strided 1 x 1 convolution
            ("conv"), through one behind a 2 x 2 mean ("avg"), or not at all (None).
        last_act: an activation at the end of blocks.
        drop_path_rate: probability of leaving the last block's branch out; earlier ones grow towards it linearly.
        num_classes, in_chans: as for every backbone.
    """

    def __init__(
        self,
        stages: tuple[Stage, ...],
        *,
        block_size: int = 8,
        halo_size: int = 3,
        dim_head: int | None = None,
        attention_options: Mapping[str, Any] | None = None,
        qk_ratio: float = 1.0,
        value_ratio: float = 1.0,
        stem: str = "7x7",
        stem_dim: int = 64,
        stem_pool: bool = True,
        act: str = "relu",
        gate: str | None = None,
        gate_ratio: float = 1 / 16,
        group_size: int = 0,
        final_dim: int | None = None,
        ratio_of: str = "out",
        shortcut: str | None = "conv",
        last_act: bool = True,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        check_choice("stem", stem, STEMS)
        check_choice("act", act, ACTS)
        check_choice("ratio_of", ratio_of, ("in", "out"))
        check_choice("gate", str(gate), map(str, GATES))
        check_choice("shortcut", str(shortcut), map(str, SHORTCUTS))
        stages = tuple(Stage(*stage) for stage in stages)
        layer = partial(ConvNormAct, act=ACTS[act])

        def attention(width: int, stage: Stage, stride: int) -> nn.Module:
            return HaloAttention(
                width,
                stage.num_heads,
                block_size=block_size,
                clip_block=True,
                halo_size=halo_size,
                stride=stride,
                dim_out=int(width * value_ratio),
                dim_head=dim_head or divisible(width * qk_ratio) // stage.num_heads,
                out_proj=False,
                **(attention_options or {}),
            )

        def convolution(width: int, stride: int) -> nn.Module:
            groups = width // group_size if group_size else 1
            return layer(width, width, 3, stride=stride, groups=groups)

        if stem == "3x3" and not stem_pool:
            self.stem: nn.Module = layer(in_chans, stem_dim, 3, stride=2)
        else:
            dims = (3 * stem_dim // 8, stem_dim // 2, stem_dim) if stem == "tiered" else (stem_dim,)
            self.stem = TieredStem(in_chans, dims, 7 if stem == "7x7" else 3, pool=stem_pool, layer=layer)
        dim, reduction, infos = stem_dim, 2 if stem == "3x3" and not stem_pool else 4, []
        self.stages = nn.ModuleList()
        for number, (stage, rates) in enumerate(
            zip(stages, drop_path_rates(drop_path_rate, [s.depth for s in stages]))
        ):
            blocks = []
            for index, rate in enumerate(rates):
                stride = stage.stride if index == 0 else 1
                width = divisible((dim if ratio_of == "in" else stage.dim) * stage.ratio)
                attends = stage.attend is None or index in stage.attend
                same = stride == 1 and dim == stage.dim
                blocks.append(
                    _Bottleneck(
                        layer(dim, width),
                        attention(width, stage, stride) if attends else convolution(width, stride),
                        nn.Identity() if attends else GATES[gate](width, gate_ratio),
                        layer(int(width * value_ratio) if attends else width, stage.dim, act=None),
                        shortcut=nn.Identity() if same else SHORTCUTS[shortcut](dim, stage.dim, stride),
                        act=ACTS[act] if last_act else nn.Identity,
                        make_act=ACTS[act],
                        drop_path=rate,
                    )
                )
                dim = stage.dim
            self.stages.append(nn.Sequential(*blocks))
            reduction *= stage.stride
            infos.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{number}"})
        self.final_conv = nn.Identity() if final_dim is None else layer(dim, final_dim)
        if final_dim is not None:
            infos[-1] |= {"num_chs": final_dim, "module": "final_conv"}
        self.num_features = final_dim or dim
        self.feature_info = FeatureInfo(infos)
        self.first_conv = "stem.conv" if isinstance(self.stem, ConvNormAct) else "stem.conv1.conv"
        self.apply(init_convolution)
        self.reset_classifier(num_classes)

    def run_stages(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        maps = []
        for blocks in self.stages:
            assert isinstance(blocks, nn.Sequential)
            x = self.run_blocks(blocks, x)
            maps.append(x)
        maps[-1] = self.final_conv(x)
        return maps

    def init_classifier(self, layer: nn.Module) -> None:
        """Small weights, as timm's networks start."""
        assert isinstance(layer, nn.Linear)
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """timm's weights: projections of attention are 1 x 1 convolutions, tables have names of their own."""
        return {
            _renamed(name): tensor.flatten(1) if re.search(r"\.self_attn\.k?[qv]\.weight$", name) else tensor
            for name, tensor in state.items()
        }


class _Bottleneck(nn.Module):
    """1 x 1 convolution, attention or 3 x 3 convolution, 1 x 1 convolution, and the input added: channels first."""

    def __init__(
        self,
        reduce: nn.Module,
        mix: nn.Module,
        gate: nn.Module,
        expand: ConvNormAct,
        *,
        shortcut: nn.Module | None,
        act: Callable[[], nn.Module],
        make_act: Callable[[], nn.Module],
        drop_path: float,
    ) -> None:
        super().__init__()
        self.conv1 = reduce
        if isinstance(mix, HaloAttention):
            self.attn: nn.Module | None = mix
            self.norm = nn.BatchNorm2d(expand.conv.in_channels)
            self.norm_act = make_act()
        else:
            self.attn = None
            self.conv2 = mix
        self.gate = gate
        self.conv3 = expand
        self.drop_path = DropPath(drop_path)
        self.shortcut = shortcut
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        if self.attn is None:
            out = self.conv2(out)
        else:
            out = self.norm_act(self.norm(channels_first(self.attn(channels_last(out)))))
        out = self.drop_path(self.conv3(self.gate(out)))
        if self.shortcut is not None:
            out += self.shortcut(x)  # the map is its own: another would cost time where maps are largest
        activated: Tensor = self.act(out)
        return activated


_NAMES = (
    (r"\.conv1_1x1\.", ".conv1."),
    (r"\.conv2_kxk\.", ".conv2."),
    (r"\.conv3_1x1\.", ".conv3."),
    (r"\.attn\.", ".gate."),
    (r"\.self_attn\.", ".attn."),
    (r"\.post_attn\.", ".norm."),
    (r"\.shortcut\.conv\.(conv|bn)\.", r".shortcut.1.\1."),
    (r"\.pos_embed\.height_rel$", ".tables.0"),
    (r"\.pos_embed\.width_rel$", ".tables.1"),
    (r"^head\.fc\.", "head."),
)


def _renamed(name: str) -> str:
    for official, ours in _NAMES:
        name = re.sub(official, ours, name)
    return name


def _paper(
    block_size: int, halo_size: int, value_ratio: float, ratio: float, depth: int, final_dim: int | None, size: int
) -> Variant:
    """A row of the paper's table: b, h, r_v, r_b, l_3, d_f and the image size."""
    widths, depths = (64, 128, 256, 512), (3, 3, depth, 3)
    stages = tuple(
        Stage(blocks, int(width * ratio), 1 if number == 0 else 2, 1 / ratio)
        for number, (width, blocks) in enumerate(zip(widths, depths))
    )
    build = partial(
        HaloNet, stages, block_size=block_size, halo_size=halo_size, value_ratio=value_ratio, final_dim=final_dim
    )
    return Variant(build, image_size=size)


def _timm(*stages: Stage, stem: str = "tiered", size: int = 256, weights: str | None = None, **options: Any) -> Variant:
    return Variant(partial(HaloNet, stages, stem=stem, **options), image_size=size, weights=weights, crop=0.95)


VARIANTS = {
    "halonet_test": Variant(
        partial(
            HaloNet,
            (Stage(1, 32, 1, 1.0), Stage(2, 64, 2, 0.5), Stage(2, 96, 2, 0.5)),
            block_size=4,
            halo_size=2,
            stem_dim=32,
            stem="3x3",
            stem_pool=True,
        ),
        image_size=64,
    ),
    "halonet_h0": _paper(8, 3, 1.0, 0.5, 7, None, 256),
    "halonet_h1": _paper(8, 3, 1.0, 1.0, 10, None, 256),
    "halonet_h2": _paper(8, 3, 1.0, 1.25, 11, None, 256),
    "halonet_h3": _paper(10, 3, 1.0, 1.5, 12, 1024, 320),
    "halonet_h4": _paper(12, 2, 1.0, 3.0, 12, 1280, 384),
    "halonet_h5": _paper(14, 2, 2.5, 2.0, 23, 1536, 448),
    "halonet_h6": _paper(8, 4, 3.0, 2.75, 24, 1536, 512),
    "halonet_h7": _paper(10, 3, 4.0, 3.5, 26, 2048, 600),
    "halonet26t": _timm(
        Stage(2, 256, 1, 0.25, ()),
        Stage(2, 512, 2, 0.25, ()),
        Stage(2, 1024, 2, 0.25, (1,)),
        Stage(2, 2048, 2, 0.25),
        halo_size=2,
        weights="timm/halonet26t.a1h_in1k",
    ),
    "halonet50ts": _timm(
        Stage(3, 256, 1, 0.25, ()),
        Stage(4, 512, 2, 0.25, (3,), 4),
        Stage(6, 1024, 2, 0.25, (1, 3, 5)),
        Stage(3, 2048, 2, 0.25, (1,)),
        act="silu",
        weights="timm/halonet50ts.a1h_in1k",
    ),
    "sehalonet33ts": _timm(
        Stage(2, 256, 1, 0.25, ()),
        Stage(3, 512, 2, 0.25, (2,)),
        Stage(3, 1024, 2, 0.25, (2,)),
        Stage(2, 1536, 2, 0.333),
        stem_pool=False,
        act="silu",
        gate="se",
        final_dim=1280,
        weights="timm/sehalonet33ts.ra2_in1k",
    ),
    "eca_halonext26ts": _timm(
        Stage(2, 256, 1, 0.25, ()),
        Stage(2, 512, 2, 0.25, ()),
        Stage(2, 1024, 2, 0.25, (1,)),
        Stage(2, 2048, 2, 0.25),
        halo_size=2,
        dim_head=16,
        act="silu",
        gate="eca",
        group_size=16,
        weights="timm/eca_halonext26ts.c1_in1k",
    ),
    "haloregnetz_b": _timm(
        Stage(2, 48, 2, 3.0, ()),
        Stage(6, 96, 2, 3.0, ()),
        Stage(12, 192, 2, 3.0, (3, 7, 11)),
        Stage(2, 288, 2, 3.0),
        stem="3x3",
        stem_dim=32,
        stem_pool=False,
        block_size=7,
        halo_size=2,
        qk_ratio=0.33,
        act="silu",
        gate="se",
        gate_ratio=0.25,
        group_size=16,
        final_dim=1536,
        ratio_of="in",
        shortcut=None,
        last_act=False,
        size=224,
        weights="timm/haloregnetz_b.ra3_in1k",
    ),
}
