"""ContMix (OverLoCK, Lou and Yu, 2025, arXiv:2502.20087): filters for each token, made of its affinities to regions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError, check_choice
from saccade.mixers.mixer import Mixer, merge_heads, split_heads
from saccade.ops import dynamic_filter, dynamic_filter_weights, window_bias
from saccade.ops.check import check_positive

__all__ = ["ContMix"]


class ContMix(Mixer):
    """Convolution whose kernels each token makes from its affinities to all regions of the map (OverLoCK, Lou and Yu,
    2025, arXiv:2502.20087).

    The map is averaged to a grid of regions. Affinities of a token to them go through one linear layer, which all heads
    share, and a softmax over the places of its window: the kernel is local, what it is made of is not. A small kernel
    filters the first half of the channels, a large one the second. A map that is smaller than the large kernel is
    enlarged before and averaged back after, as in OverLoCK.

    Taps show the small kernels' heads first, then the large ones'.

    Args:
        dim: C, channels of a token; even.
        num_heads: heads of each half; None takes one for each 32 channels, or as many as divide C / 2.
        kernel_size, small_kernel: sides of both kernels, odd.
        num_regions: regions along each side of the grid.
        context_dim: channels of the map of which regions are made, where `filter` is called with one; None takes C.
        scale: factor of the affinities; None takes (C / num_heads)^-0.5, as OverLoCK does although a head has half of
            those channels.
        project: makes the projections to query and key from (channels, channels); None takes linear layers.
        projections: project values before, and results after. OverLoCK's block does both itself and takes False.
        impl: "reference" forms affinities and windows as the paper writes them; "tiled" (and "auto") neither.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        kernel_size: int = 7,
        small_kernel: int = 5,
        num_regions: int = 7,
        context_dim: int | None = None,
        scale: float | None = None,
        project: Callable[[int, int], nn.Module] | None = None,
        projections: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        check_positive(kernel_size=kernel_size, small_kernel=small_kernel, num_regions=num_regions)
        check_choice("impl", impl, ("auto", "tiled", "reference"))
        if kernel_size % 2 == 0 or small_kernel % 2 == 0 or small_kernel > kernel_size:
            raise InputError(
                f"kernel_size is {kernel_size} and small_kernel is {small_kernel}: take odd ones, the large not smaller"
            )
        self.num_heads = heads = _choose_heads(dim, num_heads)
        self.kernel_sizes = small_kernel, kernel_size
        self.num_regions = num_regions
        self.scale = (dim // heads) ** -0.5 if scale is None else scale
        self.impl = impl
        project = nn.Linear if project is None else project
        self.q = project(dim, dim // 2)
        self.k = project(dim if context_dim is None else context_dim, dim // 2)
        self.kernels = nn.Linear(num_regions**2, small_kernel**2 + kernel_size**2)
        self.small_bias = nn.Parameter(torch.empty(heads, 2 * small_kernel - 1, 2 * small_kernel - 1))
        self.large_bias = nn.Parameter(torch.empty(heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        for table in (self.small_bias, self.large_bias):
            nn.init.trunc_normal_(table, std=0.02)
        self.v = nn.Linear(dim, dim) if projections else nn.Identity()
        self.proj = nn.Linear(dim, dim) if projections else nn.Identity()

    def mix(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise InputError(f"x is {tuple(x.shape)}: regions and kernels are square. Give (B, H, W, {self.dim})")
        out: Tensor = self.proj(self.filter(self.v(x), x, x))
        return out

    def filter(self, value: Tensor, query: Tensor, context: Tensor) -> Tensor:
        """Filter values by kernels made of other maps.

        Args:
            value, query: (B, H, W, C).
            context: (B, H, W, context_dim).

        Returns: (B, H, W, C).
        """
        space = (value.shape[1], value.shape[2])
        large = _enlarged(space, self.kernel_sizes[1])
        if large != space:
            value, query, context = (_resize(x, large) for x in (value, query, context))
        kernels = self.make_kernels(query, context)
        taps.record(self, "attention", lambda: _token_matrix(kernels, space))
        halves = (split_heads(half, self.num_heads) for half in value.chunk(2, -1))
        impl = "reference" if self.impl == "reference" else "auto"
        out = torch.cat([merge_heads(dynamic_filter(*each, impl=impl)) for each in zip(halves, kernels)], -1)
        return out if large == space else _pool(out, space)

    def make_kernels(self, query: Tensor, context: Tensor) -> list[Tensor]:
        """The small and the large kernel of each token, (B, heads, H, W, K^2): positive, and a sum of 1."""
        space = (query.shape[1], query.shape[2])
        q = split_heads(self.q(query), self.num_heads).flatten(2, 3) * self.scale  # (B, heads, N, D)
        k = split_heads(self.k(_pool(context, (self.num_regions,) * 2)), self.num_heads).flatten(2, 3).mT
        kernels, counts = [], [size**2 for size in self.kernel_sizes]
        weights, biases = self.kernels.weight.split(counts), self.kernels.bias.split(counts)
        affinities = q @ k if self.impl == "reference" else None
        for size, weight, bias, table in zip(self.kernel_sizes, weights, biases, (self.small_bias, self.large_bias)):
            # D is far below the number of regions: it is cheaper to make a head's own layer than its affinities
            logits = q @ (k @ weight.mT) if affinities is None else affinities @ weight.mT
            logits += bias
            logits.view(*logits.shape[:2], *space, size, size).add_(window_bias(table, space))
            shares = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
            kernels.append(shares.unflatten(2, space))
        return kernels


def _choose_heads(dim: int, asked: int | None) -> int:
    possible = [n for n in range(1, dim // 2 + 1) if dim % (2 * n) == 0]
    heads = max((n for n in possible if n <= max(1, dim // 32)), default=0) if asked is None else asked
    if heads not in possible:
        raise InputError(
            f"num_heads is {asked} and dim is {dim}: the heads share half of the channels evenly. "
            + (f"Take one of {possible}" if possible else "Take an even number of channels")
        )
    return heads


def _enlarged(space: tuple[int, int], size: int) -> tuple[int, int]:
    """The map, enlarged evenly until its shorter side holds the kernel.

    >>> _enlarged((4, 5), 7), _enlarged((9, 7), 7)
    ((7, 8), (9, 7))
    """
    shorter = min(space)
    if shorter >= size:
        return space
    height, width = (max(size, int(size / shorter * length)) for length in space)
    return height, width


def _resize(x: Tensor, space: tuple[int, int]) -> Tensor:
    return F.interpolate(x.movedim(-1, 1), space, mode="bilinear", align_corners=False).movedim(1, -1)


def _pool(x: Tensor, space: tuple[int, int]) -> Tensor:
    return F.adaptive_avg_pool2d(x.movedim(-1, 1), space).movedim(1, -1)


def _token_matrix(kernels: list[Tensor], space: tuple[int, int]) -> Tensor:
    """(B, 2 heads, N, N), with the enlarging before and the averaging after in it."""
    matrix = torch.cat([dynamic_filter_weights(each) for each in kernels], 1)
    large = (kernels[0].shape[2], kernels[0].shape[3])
    if large == space:
        return matrix

    def tokens(of: tuple[int, int]) -> Tensor:
        return torch.eye(of[0] * of[1], dtype=matrix.dtype, device=matrix.device).unflatten(1, of).unsqueeze(-1)

    before, after = _resize(tokens(space), large).flatten(1), _pool(tokens(large), space).flatten(1)
    return after.mT @ matrix @ before.mT
