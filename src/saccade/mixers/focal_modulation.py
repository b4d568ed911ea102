"""Focal modulation (FocalNet, Yang et al., 2022, arXiv:2203.11926) as a mixer."""

from typing import NamedTuple

from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError
from saccade.mixers.mixer import Mixer
from saccade.ops import focal_context
from saccade.ops.check import check_positive
from saccade.ops.focal_modulation import focal_context_weights

__all__ = ["FocalModulation", "Modulation"]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Modulation(NamedTuple):
    """What focal modulation multiplies, and the gates that made it.

    Attributes:
        query: (B, *space, C).
        modulator: (B, *space, C).
        gates: (B, *space, L + 1).
    """

    query: Tensor
    modulator: Tensor
    gates: Tensor


class FocalModulation(Mixer):
    """Each token times a modulator: its surroundings at several granularities, weighed by gates of its own (FocalNet,
    Yang et al., 2022, arXiv:2203.11926).

    Its token matrix is that of the context before the projection `h`, a mean over channels, with the factors of every
    GELU as they are for this content. Taps see the gates, (B, *space, L + 1), too.

    Args:
        dim: C, channels of a token.
        focal_window: odd, tokens along each axis of the first level's kernel.
        focal_factor: even, by how many a level's kernel is larger than that of the one before.
        focal_levels: L, levels besides the mean over the map; 3 in the "lrf" networks, 2 in the "srf" ones.
        axes: axes of space, 1 to 3; 2 for images.
        bias: give `f`, which makes query, context and gates, and `h` a bias.
        normalize: divide the context by L + 1.
        post_norm: a norm before the output projection.
        impl: as in `focal_context`.
    """

    def __init__(
        self,
        dim: int,
        *,
        focal_window: int = 3,
        focal_levels: int = 3,
        focal_factor: int = 2,
        axes: int = 2,
        bias: bool = True,
        normalize: bool = False,
        post_norm: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        check_positive(focal_window=focal_window, focal_levels=focal_levels)
        if axes not in _CONV:
            raise InputError(f"axes is {axes}: give 1, 2 or 3")
        sizes = [focal_window + focal_factor * level for level in range(focal_levels)]
        if not all(size % 2 for size in sizes):
            raise InputError(
                f"focal_window is {focal_window} and focal_factor is {focal_factor}: kernels of {sizes} tokens would "
                "change the map's size. Give an odd window and an even factor"
            )
        self.levels, self.axes, self.normalize, self.impl = focal_levels, axes, normalize, impl
        self.f = nn.Linear(dim, 2 * dim + focal_levels + 1, bias=bias)
        self.focal_layers = nn.ModuleList(
            _CONV[axes](dim, dim, size, padding=size // 2, groups=dim, bias=False) for size in sizes
        )
        self.h = nn.Linear(dim, dim, bias=bias)
        self.norm = nn.LayerNorm(dim) if post_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        query, modulator, _ = self.modulate(x)
        out: Tensor = self.proj(self.norm(query * modulator))
        return out

    def modulate(self, x: Tensor) -> Modulation:
        """What the output projection gets the product of, from x (B, *space, C)."""
        if x.ndim != self.axes + 2:
            raise InputError(f"x is {tuple(x.shape)}: its kernels have {self.axes} axes. Set axes={x.ndim - 2}")
        query, context, gates = self.f(x).split([self.dim, self.dim, self.levels + 1], -1)
        kernels: list[Tensor] = [layer.weight for layer in self.focal_layers]  # type: ignore[misc]
        taps.record(
            self,
            "attention",
            lambda: focal_context_weights(context, gates, kernels, normalize=self.normalize).unsqueeze(1),
        )
        taps.record(self, "gate", lambda: gates)
        gathered = focal_context(context, gates, kernels, normalize=self.normalize, impl=self.impl)
        return Modulation(query, self.h(gathered), gates)
