"""Blocks of DFIR-DETR (2025, arXiv:2512.07078): dynamic aggregation for its backbone, refinement for its pyramid.

The formulas of the aggregation are published, those of the gate, of the dual path and of the refinement are proposals
of ours. All blocks take and return channels-last maps.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.backbones.hybrid_perception import depthwise
from saccade.errors import InputError
from saccade.mixers import FourierFilter, TopKAttention

__all__ = [
    "DualPathShuffle",
    "DynamicAggregation",
    "DynamicFusionBlock",
    "FrequencyRefinement",
    "SpatialGatedUnit",
    "shuffle_channels",
]


class DynamicAggregation(nn.Module):
    """A chain of blocks of which every link is kept: out(cat(F1, F2, G1(F2), G2(G1(F2)), ...)) with F1, F2 = in(x).

    This is the paper's DCFA, a cross-stage partial layer of dynamic fusion blocks.

    Args:
        dim: channels of the input.
        dim_out: channels of the output; None keeps those of the input.
        depth: blocks in the chain.
        make_block: C -> a block of that many channels.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        *,
        depth: int = 1,
        make_block: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        self.conv1 = _Unit(dim, dim_out // 2 * 2)
        self.blocks = nn.ModuleList((make_block or DynamicFusionBlock)(dim_out // 2) for _ in range(depth))
        self.conv2 = _Unit((2 + depth) * (dim_out // 2), dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C')."""
        kept = list(self.conv1(x).chunk(2, -1))
        for block in self.blocks:
            kept.append(block(kept[-1]))
        out: Tensor = self.conv2(torch.cat(kept, -1))
        return out


class DynamicFusionBlock(nn.Module):
    """H = x + local(x), then gated(H + attention(H)): the paper's dynamic attention fusion block.

    Args:
        dim: C, channels of a token.
        make_mixer: C -> the attention; top-k attention by default.
    """

    def __init__(self, dim: int, make_mixer: Callable[[int], nn.Module] = TopKAttention) -> None:
        super().__init__()
        self.local = nn.Sequential(depthwise(dim, 3), nn.Conv2d(dim, dim, 1))  # depthwise separable
        self.mixer = make_mixer(dim)
        self.gated = SpatialGatedUnit(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        _check_map(x)
        x = x + _convolve(self.local, x)
        out: Tensor = self.gated(x + self.mixer(x))
        return out


class SpatialGatedUnit(nn.Module):
    """A gated linear unit whose gate sees its neighbours: fc2(u * gelu(depthwise(g))) with u, g = fc1(x).

    Args:
        dim: C, channels of a token.
        hidden: channels of u and of g; None takes C.
    """

    def __init__(self, dim: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.conv = depthwise(hidden, 3)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        _check_map(x)
        signal, gate = self.fc1(x).chunk(2, -1)
        out: Tensor = self.fc2(signal * F.gelu(_convolve(self.conv, gate)))
        return out


class DualPathShuffle(nn.Module):
    """Half of the channels by a convolution, the other half from these by a cheaper one, then shuffled together.

    Args:
        dim: channels of the input.
        dim_out: channels of the output, even; None keeps those of the input.
    """

    def __init__(self, dim: int, dim_out: int | None = None) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        if dim_out % 2:
            raise InputError(f"dim_out is {dim_out}: each path makes half of the channels. Give an even number")
        self.first = _Unit(dim, dim_out // 2)
        self.second = nn.Sequential(nn.Conv2d(dim_out // 2, dim_out // 2, 3, padding=1), depthwise(dim_out // 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C')."""
        first = self.first(x)
        return shuffle_channels(torch.cat([first, F.gelu(_convolve(self.second, first))], -1), 2)


class FrequencyRefinement(nn.Module):
    """Two paths, of which one is refined in the frequency domain: out(cat(filters(left(x)), right(x))).

    This is the paper's FIRC3, a C3 layer around Fourier filters.

    Args:
        dim: channels of the input.
        dim_out: channels of the output; None keeps those of the input.
        steps: of the filter.
        make_mixer: C -> what refines; None takes `FourierFilter` with so many steps, and no projection of its own.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        *,
        steps: int = 3,
        make_mixer: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        half = max(1, dim_out // 2)
        self.left = _Unit(dim, half)
        self.mixer = FourierFilter(half, steps=steps, out_proj=False) if make_mixer is None else make_mixer(half)
        self.right = _Unit(dim, half)
        self.out = _Unit(2 * half, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C')."""
        out: Tensor = self.out(torch.cat([self.mixer(self.left(x)), self.right(x)], -1))
        return out


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Deal the channels of `groups` groups one by one: (..., C), channel i of group g goes to i * groups + g.

    >>> shuffle_channels(torch.arange(6), 2)
    tensor([0, 3, 1, 4, 2, 5])
    """
    if x.shape[-1] % groups:
        raise InputError(f"x has {x.shape[-1]} channels and groups is {groups}: groups must divide the channels")
    return x.unflatten(-1, (groups, -1)).transpose(-1, -2).flatten(-2)


class _Unit(nn.Module):
    """A 1 x 1 convolution, a batch norm and a SiLU, as in the detectors that these layers come from."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim_out, 1, bias=False)
        self.norm = nn.BatchNorm2d(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        _check_map(x)
        return F.silu(self.norm(self.conv(x.movedim(-1, 1)))).movedim(1, -1)


def _convolve(conv: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = conv(x.movedim(-1, 1)).movedim(1, -1)
    return out


def _check_map(x: Tensor) -> None:
    if x.ndim != 4:
        raise InputError(f"x is {tuple(x.shape)}: the block is of convolutions of images. Give (B, H, W, C)")
