"""Mixers without attention, to compare with: a depthwise convolution and average pooling."""

import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError
from saccade.mixers.mixer import Mixer, probe

__all__ = ["DepthwiseConv", "Pooling"]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class DepthwiseConv(Mixer):
    """A depthwise convolution and a linear layer: fixed local weights for each channel (as in ConvNeXt, Liu et al.,
    2022, arXiv:2201.03545).

    Its token matrix is the mean over channels, and leaves the linear layer and the biases out.

    Args:
        dim: C, channels of a token.
        kernel_size: odd, tokens along each axis; zeros stand outside the map.
        axes: axes of space, 1 to 3; 2 for images.
    """

    def __init__(self, dim: int, *, kernel_size: int = 7, axes: int = 2) -> None:
        super().__init__(dim)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(
                f"kernel_size is {kernel_size}: give an odd number, so that the output keeps the map's size"
            )
        self.conv = _CONV[axes](dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        taps.record(self, "attention", lambda: self._token_matrix(x))
        out: Tensor = self.proj(self._convolve(x))
        return out

    def _convolve(self, x: Tensor) -> Tensor:
        if x.ndim != self.conv.weight.ndim:
            raise InputError(
                f"x is {tuple(x.shape)}: the convolution was built for another number of axes. Set axes={x.ndim - 2}"
            )
        out: Tensor = self.conv(x.movedim(-1, 1)).movedim(1, -1)
        return out

    def _token_matrix(self, x: Tensor) -> Tensor:
        mean = self.conv.weight.mean(0, keepdim=True)  # one matrix: those of all channels would take C times the memory
        convolve = _CONVOLVE[x.ndim - 2]

        def mix(tokens: Tensor) -> Tensor:
            return convolve(tokens.movedim(-1, 1), mean, padding=self.conv.padding).movedim(1, -1)

        return probe(mix, tuple(x.shape[1:-1]), x[..., :1]).expand(len(x), -1, -1, -1)


class Pooling(Mixer):
    """Average pooling minus the token itself (PoolFormer, Yu et al., 2021, arXiv:2111.11418); it has no parameters.

    Args:
        dim: C, channels of a token.
        pool_size: odd, tokens along each axis; tokens outside the map are not counted.
    """

    def __init__(self, dim: int, *, pool_size: int = 3) -> None:
        super().__init__(dim)
        if pool_size < 1 or pool_size % 2 == 0:
            raise InputError(f"pool_size is {pool_size}: give an odd number, so that the output keeps the map's size")
        self.pool_size = pool_size

    def mix(self, x: Tensor) -> Tensor:
        taps.record(self, "attention", lambda: self._token_matrix(x))
        return self._pool(x)

    def _pool(self, x: Tensor) -> Tensor:
        size, channels_first = self.pool_size, x.movedim(-1, 1)
        pooled = _POOL[x.ndim - 2](channels_first, size, stride=1, padding=size // 2, count_include_pad=False)
        return pooled.movedim(1, -1) - x

    def _token_matrix(self, x: Tensor) -> Tensor:
        return probe(self._pool, tuple(x.shape[1:-1]), x[..., :1]).expand(len(x), -1, -1, -1)
