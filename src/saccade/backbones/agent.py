"""Agent attention (Han et al., 2023, arXiv:2312.08874) in four hosts: DeiT, PVT, Swin and CSWin."""

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from saccade.backbones.backbone import Backbone, FeatureInfo
from saccade.backbones.isotropic import Isotropic
from saccade.backbones.mlp import Mlp, init_linear
from saccade.backbones.patches import PatchEmbed, PatchMerging, channels_first
from saccade.backbones.positions import resize_positions
from saccade.backbones.residual import Block, Stage, TokenBlock, drop_path_rates, layer_norm
from saccade.backbones.variant import Variant
from saccade.errors import InputError
from saccade.mixers import AgentAttention, Attention, CrossShapedAttention, WindowAttention
from saccade.mixers.agent import resize_biases
from saccade.ops import Window

__all__ = ["VARIANTS", "AgentCSwin", "AgentDeiT", "AgentPVT", "AgentPyramid", "AgentSwin"]


class AgentDeiT(Isotropic):
    """DeiT whose first blocks have agent attention; patches are agents, the class token is none.

    Args:
        dim, num_heads: channels of a token, and attention heads.
        depth, agent_depth: blocks, and how many of them, from the first, have agent attention.
        num_agents: a perfect square.
        mlp_ratio: hidden over outer channels of the MLPs.
        drop_path_rate: probability of leaving the last block's branches out; earlier ones grow towards it linearly.
        image_size, patch_size, num_classes, in_chans: as for `Isotropic`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        depth: int = 12,
        agent_depth: int = 12,
        num_agents: int = 49,
        mlp_ratio: float = 4.0,
        image_size: int = 224,
        patch_size: int = 16,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        (rates,) = drop_path_rates(drop_path_rate, (depth,))

        def make_block(number: int) -> TokenBlock:
            mixer: nn.Module = Attention(dim, num_heads)
            if number < agent_depth:
                size = image_size // patch_size
                mixer = AgentAttention(dim, num_heads, num_agents=num_agents, size=size, num_prefix=1)
            return TokenBlock(dim, mixer, Mlp(dim, int(dim * mlp_ratio)), drop_path=rates[number])

        super().__init__(
            make_block,
            dim=dim,
            depth=depth,
            image_size=image_size,
            patch_size=patch_size,
            num_classes=num_classes,
            in_chans=in_chans,
        )
        self.apply(init_linear)

    def init_classifier(self, layer: nn.Module) -> None:
        """As all linear layers start."""
        init_linear(layer)

    def refit(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Positions and biases of another image size are interpolated."""
        return _refit_biases(name, tensor, shape) if _BIAS.search(name) else super().refit(name, tensor, shape)


class AgentPyramid(Backbone):
    """Stages whose first blocks have agent attention, and the others what the host has.

    Maps of any size are served: biases are interpolated to the map at hand.

    Args:
        dims, depths, num_heads: channels, blocks and attention heads of each stage.
        agent_depths: blocks of each stage that have agent attention; None: all.
        num_agents: of each stage, perfect squares.
        mlp_ratios: hidden over outer channels of the MLPs of each stage.
        image_size: pixels along each side of the images for which biases and positions are learned.
        drop_path_rate: probability of leaving the last block's branches out; earlier ones grow towards it linearly.
        num_classes, in_chans: as for every backbone.
    """

    smallest = 4  # pixels along each side
    block_norm: ClassVar[Callable[[int], nn.Module]] = nn.LayerNorm
    last_norm: ClassVar[Callable[[int], nn.Module]] = nn.LayerNorm
    positions = False

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        *,
        agent_depths: Sequence[int] | None = None,
        num_agents: Sequence[int] = (9, 16, 49, 49),
        mlp_ratios: Sequence[float] = (4.0, 4.0, 4.0, 4.0),
        image_size: int = 224,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        agent_depths = depths if agent_depths is None else agent_depths
        given = {"depths": depths, "num_heads": num_heads, "agent_depths": agent_depths, "num_agents": num_agents}
        for name, values in {**given, "mlp_ratios": mlp_ratios}.items():
            if len(values) != len(dims):
                raise InputError(f"{name} is {values} and dims is {dims}: give one for each stage")

        def make_block(stage: int, number: int, rate: float) -> Block:
            dim, heads = dims[stage], num_heads[stage]
            if number < agent_depths[stage]:
                size = max(1, image_size // 2 ** (stage + 2))
                mixer: nn.Module = AgentAttention(dim, heads, num_agents=num_agents[stage], size=size)
            else:
                mixer = self.make_mixer(dim, heads, stage, number)
            return Block(dim, mixer, Mlp(dim, int(dim * mlp_ratios[stage])), norm=type(self).block_norm, drop_path=rate)

        self.patch_embed = self.make_patches(in_chans, dims[0])
        self.stages = nn.ModuleList()
        for stage, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
            blocks = (make_block(stage, number, rate) for number, rate in enumerate(rates))
            down = self.make_step(dims[stage - 1], dims[stage]) if stage else nn.Identity()
            side = max(1, image_size // 2 ** (stage + 2))
            self.stages.append(_Stage(down, nn.Sequential(*blocks), dims[stage], side if self.positions else None))
        self.norm = type(self).last_norm(dims[-1])
        self.num_features = dims[-1]
        self.feature_info = FeatureInfo.of_stages(dims)
        self.first_conv = "patch_embed.proj"
        self.apply(init_linear)
        self.reset_classifier(num_classes)

    @abstractmethod
    def make_patches(self, in_chans: int, dim: int) -> nn.Module:
        """Images (B, in_chans, H, W) to a map (B, H / 4, W / 4, C)."""

    @abstractmethod
    def make_step(self, dim: int, dim_out: int) -> nn.Module:
        """A map to half of it, channels last."""

    @abstractmethod
    def make_mixer(self, dim: int, num_heads: int, stage: int, number: int) -> nn.Module:
        """The attention of a host's block."""

    @abstractmethod
    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def run_stages(self, images: Tensor) -> list[Tensor]:
        if min(images.shape[2:]) < self.smallest:
            raise InputError(
                f"images is {tuple(images.shape)}: give {self.smallest} x {self.smallest} pixels at least, of which "
                "the last stage makes a token"
            )
        x, maps = self.patch_embed(images), []
        for stage in self.stages:
            assert isinstance(stage, _Stage)
            x = self.run_blocks(stage.blocks, stage.place(stage.downsample(x)))
            maps.append(x)
        maps[-1] = self.norm(x)
        return [channels_first(x) for x in maps]

    def init_classifier(self, layer: nn.Module) -> None:
        """As all linear layers start."""
        init_linear(layer)

    def refit(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Positions and biases of another image size are interpolated."""
        if name.endswith("pos_embed") and tensor.ndim == 3 and tensor.shape[-1] == shape[-1]:
            side = round(shape[1] ** 0.5)
            return resize_positions(tensor, (side, side), mode="bilinear")
        return _refit_biases(name, tensor, shape)


class AgentPVT(AgentPyramid):
    """Pyramid vision transformer (Wang et al., 2021, arXiv:2102.12122) with agent attention in all blocks, learned
    positions in all stages, and no norm at the end."""

    smallest = 32
    block_norm = layer_norm
    last_norm = nn.Identity
    positions = True

    def make_patches(self, in_chans: int, dim: int) -> nn.Module:
        return PatchEmbed(in_chans, dim, 4, norm=nn.LayerNorm)

    def make_step(self, dim: int, dim_out: int) -> nn.Module:
        return _Patches(dim, dim_out, 2, norm=nn.LayerNorm)

    def make_mixer(self, dim: int, num_heads: int, stage: int, number: int) -> nn.Module:
        raise InputError(f"stage {stage} has blocks without agents: PVT's own attention is none of the published ones")

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official weights: stages are numbered from 1, and queries have a projection of their own."""
        renamed: dict[str, Tensor] = {}
        queries: dict[str, Tensor] = {}
        for name, tensor in state.items():
            name = re.sub(r"^patch_embed1\.", "patch_embed.", name)
            name = re.sub(r"^patch_embed(\d)\.", lambda found: f"stages.{int(found[1]) - 1}.downsample.", name)
            name = re.sub(r"^pos_embed(\d)$", lambda found: f"stages.{int(found[1]) - 1}.pos_embed", name)
            name = re.sub(r"^block(\d)\.", lambda found: f"stages.{int(found[1]) - 1}.blocks.", name)
            (queries if re.search(r"\.attn\.q\.", name) else renamed)[name] = tensor
        for name, tensor in queries.items():
            both = name.replace(".q.", ".kv.")
            if both in renamed:
                renamed[name.replace(".q.", ".qkv.")] = torch.cat([tensor, renamed.pop(both)])
            else:
                renamed[name] = tensor
        return renamed


class AgentSwin(AgentPyramid):
    """Swin (Liu et al., 2021, arXiv:2103.14030), windows of 7 that every second block shifts, with agent attention over
    the whole map in the first blocks of its stages."""

    def make_patches(self, in_chans: int, dim: int) -> nn.Module:
        return PatchEmbed(in_chans, dim, 4, norm=nn.LayerNorm)

    def make_step(self, dim: int, dim_out: int) -> nn.Module:
        return PatchMerging(dim, dim_out)

    def make_mixer(self, dim: int, num_heads: int, stage: int, number: int) -> nn.Module:
        return _ShiftedWindows(dim, num_heads, shift=number % 2 == 1)

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official weights: a step down belongs to the stage before it, offsets count from key to query, and indices
        and masks are stored too."""
        renamed = {}
        for name, tensor in state.items():
            if name.endswith(("relative_position_index", "attn_mask")):
                continue
            name = re.sub(r"^layers\.(\d)\.downsample\.", lambda found: f"stages.{int(found[1]) + 1}.downsample.", name)
            name = re.sub(r"^layers\.", "stages.", name)
            if name.endswith("relative_position_bias_table"):
                name = name.replace("relative_position_bias_table", "position_bias_table")
                side = round(len(tensor) ** 0.5)
                tensor = tensor.T.unflatten(1, (side, side)).flip(1, 2)
            renamed[name] = tensor
        return renamed


class AgentCSwin(AgentPyramid):
    """CSWin (Dong et al., 2021, arXiv:2107.00652), stripes of 7 tokens in the third stage and the whole map in the
    fourth, with agent attention in the first two."""

    def make_patches(self, in_chans: int, dim: int) -> nn.Module:
        return PatchEmbed(in_chans, dim, 7, stride=4, padding=2, norm=nn.LayerNorm)

    def make_step(self, dim: int, dim_out: int) -> nn.Module:
        return _Patches(dim, dim_out, 3, stride=2, padding=1, norm=nn.LayerNorm)

    def make_mixer(self, dim: int, num_heads: int, stage: int, number: int) -> nn.Module:
        return CrossShapedAttention(dim, num_heads, stripe_size=(1, 2, 7, None)[stage])

    def rename(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Official weights: stages are numbered from 1, projections stand in blocks, and parts of attention have a list
        of their own."""
        return {_renamed_cswin(name, state): tensor for name, tensor in state.items()}


class _Stage(Stage):
    """With learned positions, if it has any: for a map of side x side tokens."""

    def __init__(self, downsample: nn.Module, blocks: nn.Sequential, dim: int, side: int | None) -> None:
        super().__init__(downsample, blocks)
        self.pos_embed = None if side is None else nn.Parameter(torch.empty(1, side**2, dim))
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def place(self, x: Tensor) -> Tensor:
        """Add positions to a map."""
        if self.pos_embed is None:
            return x
        space = (x.shape[1], x.shape[2])
        return x + resize_positions(self.pos_embed, space, mode="bilinear").unflatten(1, space)


class _Patches(PatchEmbed):
    """Patches of a map: (B, H, W, C) to (B, H', W', C')."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(channels_first(x))


class _ShiftedWindows(WindowAttention):
    """Along an axis with one window nothing is shifted."""

    def pattern(self, space: tuple[int, ...]) -> Window:
        sizes = self.window(space)
        shift = tuple(size // 2 if self.shift and size < length else 0 for size, length in zip(sizes, space))
        return Window(sizes, shift=shift, ragged=True)


_BIAS = re.compile(r"\.attn\.(ah|aw|ha|wa)_bias$")


def _refit_biases(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    fits = _BIAS.search(name) and tensor.ndim == len(shape) and tensor.shape[1] == shape[1]
    return resize_biases(tensor, shape) if fits else tensor


def _renamed_cswin(name: str, state: Mapping[str, Tensor]) -> str:
    name = re.sub(r"^stage1_conv_embed\.0\.", "patch_embed.proj.", name)
    name = re.sub(r"^stage1_conv_embed\.2\.", "patch_embed.norm.", name)
    name = re.sub(r"^merge(\d)\.conv\.", lambda found: f"stages.{found[1]}.downsample.proj.", name)
    name = re.sub(r"^merge(\d)\.norm\.", lambda found: f"stages.{found[1]}.downsample.norm.", name)
    block = re.fullmatch(r"stage(\d)\.(\d+)\.(.+)", name)
    if not block:
        return name
    agents = f"stage{block[1]}.{block[2]}.attns.0.an_bias" in state
    part = re.sub(r"^(qkv|proj)\.", r"attn.\1.", block[3])
    part = re.sub(r"^attns\.(\d)\.get_v\.", r"attn.dwc." if agents else r"attn.lepe.\1.", part)
    return f"stages.{int(block[1]) - 1}.blocks.{block[2]}.{re.sub(r'^attns.0.', 'attn.', part)}"


DEIT = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
PVT = {"tiny": (2, 2, 2, 2), "small": (3, 4, 6, 3), "medium": (3, 4, 18, 3), "large": (3, 8, 27, 3)}
SWIN = {  # dims of the first stage, depths, blocks with agents
    "tiny": (96, (2, 2, 6, 2), (2, 2, 6, 0)),
    "small": (96, (2, 2, 18, 2), (2, 2, 0, 0)),
    "base": (128, (2, 2, 18, 2), (2, 2, 2, 0)),
}
CSWIN = {  # dims of the first stage, depths, heads of the first stage
    "tiny": (64, (2, 4, 18, 1), 2),
    "small": (64, (3, 6, 29, 2), 2),
    "base": (96, (3, 6, 29, 2), 4),
}


def _doubled(first: int) -> tuple[int, ...]:
    return tuple(first * 2**stage for stage in range(4))


def _small(host: type[AgentPyramid], agent_depths: tuple[int, ...]) -> Variant:
    build = partial(
        host,
        (16, 24, 32, 40),
        (1, 1, 2, 2),
        (1, 2, 2, 4),
        agent_depths=agent_depths,
        num_agents=(4, 4, 9, 9),
        mlp_ratios=(2.0, 2.0, 2.0, 2.0),
        image_size=64,
    )
    return Variant(build, image_size=64)


VARIANTS = {
    "agent_cswin_test": _small(AgentCSwin, (1, 1, 0, 0)),
    "agent_deit_test": Variant(
        partial(AgentDeiT, 32, 2, depth=3, agent_depth=2, num_agents=4, patch_size=8, image_size=64), image_size=64
    ),
    "agent_pvt_test": _small(AgentPVT, (1, 1, 2, 2)),
    "agent_swin_test": _small(AgentSwin, (1, 1, 1, 0)),
    **{
        f"agent_deit_{size}": Variant(
            partial(AgentDeiT, dim, heads, **({"agent_depth": 4, "num_agents": 81} if size == "base" else {}))
        )
        for size, (dim, heads) in DEIT.items()
    },
    **{
        f"agent_pvt_{size}": Variant(
            partial(AgentPVT, (64, 128, 320, 512), depths, (1, 2, 5, 8), mlp_ratios=(8.0, 8.0, 4.0, 4.0))
        )
        for size, depths in PVT.items()
    },
    **{
        f"agent_swin_{size}": Variant(
            partial(AgentSwin, _doubled(dim), depths, _doubled(dim // 32), agent_depths=agents)
        )
        for size, (dim, depths, agents) in SWIN.items()
    },
    **{
        f"agent_cswin_{size}": Variant(
            partial(AgentCSwin, _doubled(dim), depths, _doubled(heads), agent_depths=(*depths[:2], 0, 0))
        )
        for size, (dim, depths, heads) in CSWIN.items()
    },
}
