"""The block of S2AFormer (2025, arXiv:2505.22195): convolution, attention, local interaction and MLP, one by one."""

from collections.abc import Callable

from torch import Tensor, nn

from saccade.backbones.mlp import Mlp
from saccade.backbones.residual import DropPath
from saccade.errors import InputError
from saccade.mixers import StripAttention

__all__ = ["HybridPerceptionBlock", "LocalInteraction"]


class HybridPerceptionBlock(nn.Module):
    """Four residual branches: x + conv(x), then attention, local interaction and MLP, each of the normed map.

    Args:
        dim: C, channels of a token.
        make_mixer: C -> the attention; strip attention by default.
        kernel_size: odd, side of the depthwise convolutions; 3 is a guess of ours.
        mlp_ratio: hidden over outer channels of the MLP; 4 is a guess of ours.
        drop_path: probability of leaving a branch out, image by image.
    """

    def __init__(
        self,
        dim: int,
        make_mixer: Callable[[int], nn.Module] = StripAttention,
        *,
        kernel_size: int = 3,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv = depthwise(dim, kernel_size)
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = make_mixer(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.interaction = LocalInteraction(dim, kernel_size)
        self.norm3 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        if x.ndim != 4:
            raise InputError(f"x is {tuple(x.shape)}: the block is of convolutions of images. Give (B, H, W, C)")
        x = x + self.drop_path(self.conv(x.movedim(-1, 1)).movedim(1, -1))
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        x = x + self.drop_path(self.interaction(self.norm2(x)))
        return x + self.drop_path(self.mlp(self.norm3(x)))


class LocalInteraction(nn.Module):
    """Two depthwise convolutions with a GELU and a batch norm between them (as in XCiT, 2021, arXiv:2106.09681).

    S2AFormer's own form is not public; this is the usual one.

    Args:
        dim: C, channels of a token.
        kernel_size: odd, side of the kernels.
    """

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.conv1 = depthwise(dim, kernel_size)
        self.act = nn.GELU()
        self.norm = nn.BatchNorm2d(dim)
        self.conv2 = depthwise(dim, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        out: Tensor = self.conv2(self.norm(self.act(self.conv1(x.movedim(-1, 1))))).movedim(1, -1)
        return out


def depthwise(dim: int, kernel_size: int) -> nn.Conv2d:
    """A depthwise convolution that keeps the size of the map."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise InputError(f"kernel_size is {kernel_size}: give an odd number, so that the output keeps the map's size")
    return nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
