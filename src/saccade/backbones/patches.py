"""From images to a channels-last map of tokens, and from a map to the next smaller one."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.backbones.convolution import SameConv2d
from saccade.errors import check_choice

__all__ = ["Downsample", "PatchEmbed", "PatchMerging", "TieredStem", "channels_first", "channels_last"]


def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H, W, C), a view."""
    return x.permute(0, 2, 3, 1)


def channels_first(x: Tensor) -> Tensor:
    """(B, H, W, C) to (B, C, H, W), a view."""
    return x.permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """A strided convolution, and a norm over channels: (B, in_chans, H, W) to (B, H', W', C).

    Args:
        in_chans, dim: channels before and after.
        kernel_size: pixels of a patch along each side; larger than the stride, patches overlap.
        stride: None takes the kernel's, for patches that do not overlap.
        padding: of the convolution.
        norm: makes the norm; None has none.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        kernel_size: int,
        *,
        stride: int | None = None,
        padding: int = 0,
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride or kernel_size, padding)
        self.norm = nn.Identity() if norm is None else norm(dim)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.norm(channels_last(self.proj(images)))
        return out


class Downsample(nn.Module):
    """A norm over channels and a strided convolution: (B, H, W, C) to (B, H', W', C').

    Args:
        dim, dim_out: channels before and after.
        kernel_size: of the convolution, whose stride is 2.
        padding: zeros on every side, or "same": as many as a map of odd sides lacks, at its end.
        norm: makes the norm before it.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        kernel_size: int = 3,
        *,
        padding: int | str = 1,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.norm = norm(dim)
        if isinstance(padding, int):
            self.reduction = nn.Conv2d(dim, dim_out, kernel_size, stride=2, padding=padding)
        else:
            check_choice("padding", padding, ("same",))
            self.reduction = SameConv2d(dim, dim_out, kernel_size, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(self.reduction(channels_first(self.norm(x))))


class PatchMerging(nn.Module):
    """Four neighbours side by side, a norm and a linear layer (Swin, Liu et al., 2021, arXiv:2103.14030): (B, H, W, C)
    to (B, H', W', C'). A map of odd sides gets zeros at its end.

    Args:
        dim, dim_out: C and C'.
        norm: makes the norm.
    """

    def __init__(self, dim: int, dim_out: int, *, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(4 * dim)
        self.reduction = nn.Linear(4 * dim, dim_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = (-length % 2 for length in x.shape[1:3])
        x = F.pad(x, (0, 0, 0, width, 0, height)) if height or width else x
        neighbours = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)  # down, then across
        out: Tensor = self.reduction(self.norm(neighbours.flatten(3)))
        return out


class TieredStem(nn.Sequential):
    """Convolutions with norm and activation of which the first halves the image, and a pooling that halves it again.

    Args:
        in_chans: channels of the images.
        dims: channels of the convolutions.
        kernel_size: of all of them.
        pool: a 3 x 3 maximum at the end; without it the last convolution is strided too.
        layer: makes a convolution from (dim, dim_out, kernel_size, stride=...).
    """

    def __init__(
        self,
        in_chans: int,
        dims: tuple[int, ...],
        kernel_size: int = 3,
        *,
        pool: bool = True,
        layer: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        for number, dim in enumerate(dims):
            strided = number == 0 or (number == len(dims) - 1 and not pool)
            self.add_module(f"conv{number + 1}", layer(in_chans, dim, kernel_size, stride=2 if strided else 1))
            in_chans = dim
        if pool:
            self.add_module("pool", nn.MaxPool2d(3, 2, 1))
