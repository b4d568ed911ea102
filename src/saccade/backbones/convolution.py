"""Convolutions of networks, channels first: with norm and activation, and with TensorFlow's "same" padding."""

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ConvNormAct", "LinearNorm", "SameAvgPool2d", "SameConv2d", "divisible", "init_convolution", "pad_same"]


class ConvNormAct(nn.Module):
    """A convolution without bias, a norm, and an activation unless that is None.

    Args:
        dim, dim_out: channels.
        kernel_size, stride, dilation, groups: of the convolution, which is padded by half its kernel's reach.
        norm: makes the norm.
        act: makes the activation.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        act: Callable[[], nn.Module] | None = nn.ReLU,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2 * dilation
        self.conv = nn.Conv2d(dim, dim_out, kernel_size, stride, padding, dilation, groups, bias=False)
        self.bn = norm(dim_out)
        self.act = nn.Identity() if act is None else act()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class LinearNorm(nn.Module):
    """A linear layer without bias and a norm over images and places, channels last: (B, H, W, C) to (B, H, W, C').

    Args:
        dim, dim_out: C and C'.
    """

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim_out, bias=False)
        self.bn = nn.BatchNorm2d(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.linear(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return out


class SameConv2d(nn.Conv2d):
    """A convolution that pads as TensorFlow's "same" does: the output's side is ceil(side / stride)."""

    def __init__(
        self, dim: int, dim_out: int, kernel_size: int, *, stride: int = 1, groups: int = 1, bias: bool = True
    ):
        super().__init__(dim, dim_out, kernel_size, stride, groups=groups, bias=bias)
        self.odd = kernel_size // 2 if stride == 1 and kernel_size % 2 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.odd is not None:  # the same on both sides: no copy
            return F.conv2d(x, self.weight, self.bias, padding=self.odd, groups=self.groups)
        return super().forward(pad_same(x, self.kernel_size[0], self.stride[0]))


class SameAvgPool2d(nn.Module):
    """Average pooling that pads as TensorFlow's "same" does, and divides by the number of real elements."""

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, x: Tensor) -> Tensor:
        size, stride = self.kernel_size, self.stride
        if all(length % stride == 0 for length in x.shape[2:]) and size == stride:
            return F.avg_pool2d(x, size, stride)
        real = pad_same(x.new_ones(1, 1, *x.shape[2:]), size, stride)
        return F.avg_pool2d(pad_same(x, size, stride), size, stride) / F.avg_pool2d(real, size, stride)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}"


def pad_same(x: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Zeros around (B, C, H, W) as TensorFlow's "same" puts them: half of what is missing, the odd one at the end.

    >>> import torch
    >>> pad_same(torch.ones(1, 1, 1, 4), 3, 2).shape  # none before a row of 4, one after it
    torch.Size([1, 1, 3, 5])
    """
    margins: list[int] = []
    for length in reversed(x.shape[2:]):
        total = max((-(-length // stride) - 1) * stride + kernel_size - length, 0)
        margins += [total // 2, total - total // 2]
    return F.pad(x, margins) if any(margins) else x


def divisible(channels: float, by: int = 8, *, least: float = 0.9) -> int:
    """The nearest multiple of `by`, at least one of it, that keeps the share `least` of the channels.

    >>> divisible(511.5), divisible(36), divisible(11)
    (512, 40, 16)
    """
    nearest = max(by, int(channels + by / 2) // by * by)
    return nearest + by if nearest < least * channels else nearest


def init_convolution(layer: nn.Module) -> None:
    """Normal weights of variance 2 / fan-out (He et al., 2015, arXiv:1502.01852), biases of 0; other layers stay."""
    if isinstance(layer, nn.Conv2d):
        fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels // layer.groups
        nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
