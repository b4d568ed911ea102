"""Depthwise convolutions of large kernels that are trained beside dilated small ones, and folded into one for use
(UniRepLKNet, Ding et al., 2023, arXiv:2311.15599)."""

import torch
from torch import Tensor, nn

from saccade.backbones.convolution import ConvNormAct
from saccade.errors import InputError

__all__ = ["LargeKernel", "ResidualDepthwise"]

# kernel: sides and dilations of the branches beside it
BRANCHES = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    9: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (7, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    19: ((5, 1), (7, 1), (9, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class LargeKernel(nn.Module):
    """A depthwise convolution of a large kernel and dilated ones of smaller kernels, each normed; a norm of the sum.

    Args:
        dim: C, channels.
        kernel_size: one of 5, 7 ... 19.
        reparameterized: build the folded form, a single convolution with a bias.
    """

    def __init__(self, dim: int, kernel_size: int, *, reparameterized: bool = False) -> None:
        super().__init__()
        if kernel_size not in BRANCHES:
            raise InputError(f"kernel_size is {kernel_size}: branches are known for {', '.join(map(str, BRANCHES))}")
        self.dim, self.kernel_size = dim, kernel_size
        self.conv: nn.Module = self._folded() if reparameterized else self._branch(kernel_size, 1)
        sides = () if reparameterized else BRANCHES[kernel_size]
        self.branches = nn.ModuleDict({f"k{side}_{dilation}": self._branch(side, dilation) for side, dilation in sides})
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.conv, nn.Conv2d) and not self.training:  # a kernel is smaller than a map
            scale, shift = _as_affine(self.norm)
            assert self.conv.bias is not None
            kernel, bias = self.conv.weight * scale.view(-1, 1, 1, 1), self.conv.bias * scale + shift
            return self.conv._conv_forward(x, kernel, bias)
        out = self.conv(x)
        for branch in self.branches.values():
            out = out + branch(x)
        normed: Tensor = self.norm(out)
        return normed

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold norms and branches into one convolution, which gives what this gives in evaluation."""
        if isinstance(self.conv, nn.Conv2d):
            return
        folded = self._folded().to(next(self.parameters()))
        assert folded.bias is not None
        folded.weight.zero_()
        folded.bias.zero_()
        for branch in (self.conv, *self.branches.values()):
            assert isinstance(branch, ConvNormAct)
            scale, shift = _as_affine(branch.bn)
            kernel, step = branch.conv.weight * scale.view(-1, 1, 1, 1), branch.conv.dilation[0]
            reach = step * (kernel.shape[-1] - 1) + 1
            first = (self.kernel_size - reach) // 2
            places = slice(first, first + reach, step)
            folded.weight[:, :, places, places] += kernel
            folded.bias += shift
        self.conv, self.branches = folded.train(self.training), nn.ModuleDict()

    def _branch(self, side: int, dilation: int) -> ConvNormAct:
        return ConvNormAct(self.dim, self.dim, side, dilation=dilation, groups=self.dim, act=None)

    def _folded(self) -> nn.Conv2d:
        size = self.kernel_size
        return nn.Conv2d(self.dim, self.dim, size, padding=size // 2, groups=self.dim)


def _as_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a norm multiplies a channel by and adds to it, in evaluation."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


class ResidualDepthwise(nn.Conv2d):
    """A depthwise 3 x 3 convolution whose input is added to its output.

    Args:
        dim: C, channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).add_(x)
