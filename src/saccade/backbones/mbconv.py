"""The convolutional block and the stem that MaxViT and MOAT share, channels first, padded as in TensorFlow."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from saccade.backbones.convolution import SameAvgPool2d, SameConv2d
from saccade.backbones.recalibration import SqueezeExcite
from saccade.backbones.residual import DropPath
from saccade.mixers.mobile_convolution import MobileConvolution, by_token

__all__ = ["ConvStem", "MBConv", "init_normal"]

Act = Callable[[], nn.Module]


class ConvStem(nn.Module):
    """Two 3 x 3 convolutions, of which the first halves the image, with norm and activation between them.

    Images come out in torch's channels_last format, in which all that follows runs without copies.

    Args:
        in_chans: channels of the images.
        dims: channels of the convolutions.
        act: makes the activation.
        eps: of the norm.
        bias: give the convolutions a bias.
    """

    def __init__(
        self, in_chans: int, dims: tuple[int, int], *, act: Act = nn.GELU, eps: float = 1e-3, bias: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = SameConv2d(in_chans, dims[0], 3, stride=2, bias=bias)
        self.norm1 = nn.BatchNorm2d(dims[0], eps)
        self.act = act()
        self.conv2 = SameConv2d(dims[0], dims[1], 3, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        x = images.contiguous(memory_format=torch.channels_last)
        out: Tensor = self.conv2(self.act(self.norm1(self.conv1(x))))
        return out


class MBConv(nn.Module):
    """An inverted-residual block: (B, C, H, W) to (B, C', H', W'), the halves of odd sides rounded up.

    The shortcut is an average over pixels where the map is halved, and a linear layer where the width changes.

    Args:
        dim, dim_out, hidden: channels before, after and inside.
        stride, kernel_size: of the depthwise convolution.
        gate: channels inside squeeze-and-excitation; 0 leaves it out.
        pool_size: pixels along each side of the shortcut's average.
        act: makes the activation.
        out_bias: give the last layer, and the shortcut's, a bias.
        eps: of the norms.
        drop_path: probability of leaving the branch out.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        hidden: int,
        *,
        stride: int = 1,
        kernel_size: int = 3,
        gate: int = 0,
        pool_size: int = 2,
        act: Act = nn.GELU,
        out_bias: bool = True,
        eps: float = 1e-3,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.branch = MobileConvolution(
            dim,
            dim_out,
            hidden,
            depthwise=SameConv2d(hidden, hidden, kernel_size, stride=stride, groups=hidden, bias=False),
            gate=SqueezeExcite(hidden, gate, act=nn.SiLU) if gate else None,
            act=act,
            out_bias=out_bias,
            eps=eps,
        )
        self.pool = SameAvgPool2d(pool_size, stride) if stride > 1 else nn.Identity()
        self.shortcut = nn.Linear(dim, dim_out, bias=out_bias) if dim != dim_out else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = by_token(self.shortcut, self.pool(x)) + self.drop_path(self.branch(x))
        return out


def init_normal(layer: nn.Module) -> None:
    """Normal weights of standard deviation 0.02, biases of 0; norms stay."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
