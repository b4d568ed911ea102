"""Channels of a map (B, C, H, W) weighed by gates made from their means or their norms."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from saccade import taps

__all__ = ["EfficientChannelGate", "ResponseNorm", "SqueezeExcite"]


class SqueezeExcite(nn.Module):
    """Gates from two 1 x 1 convolutions (squeeze-and-excitation, Hu et al., 2018, arXiv:1709.01507).

    Args:
        dim: C, channels.
        hidden: channels between the convolutions.
        act: makes the activation between them.
    """

    def __init__(self, dim: int, hidden: int, *, act: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = act()
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()
        taps.record(self, "gate", lambda: gate)
        return x * gate


class EfficientChannelGate(nn.Module):
    """Gates from a convolution over neighbouring channels (ECA-Net, Wang et al., 2020, arXiv:1910.03151).

    Args:
        dim: C, channels; the kernel grows with their logarithm.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        size = int((math.log2(dim) + 1) / 2)
        size = max(size if size % 2 else size + 1, 3)
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid().mT.unsqueeze(-1)  # (B, C, 1, 1)
        taps.record(self, "gate", lambda: gate)
        return x * gate


class ResponseNorm(nn.Module):
    """Channels weighed by their norm over the map, relative to the mean of all (global response normalization, ConvNeXt
    V2, Woo et al., 2023, arXiv:2301.00808); it starts as the identity.

    Args:
        dim: C, channels.
        eps: added to the mean of the norms.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        squares = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum((2, 3), keepdim=True)
        norm = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()  # the gradient of a channel of zeros is 0
        gate = (1 + self.gamma * norm / (norm.mean(1, keepdim=True) + self.eps)).to(x.dtype)
        taps.record(self, "gate", lambda: gate)
        return torch.addcmul(self.beta, x, gate)
