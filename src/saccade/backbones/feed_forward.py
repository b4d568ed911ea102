"""Feed-forward networks of blocks that do more than two linear layers: convolutional GLU (TransNeXt, Shi, 2023,
arXiv:2311.17132)."""

import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError
from saccade.ops.check import check_positive

__all__ = ["ConvolutionalGLU"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ConvolutionalGLU(nn.Module):
    """Gated linear unit whose gate looks at its neighbours through a depthwise 3 x 3 convolution.

    A tap sees the gate, (B, *space, hidden).

    Args:
        dim: C, channels of a token.
        hidden_features: hidden channels of the two-layer network whose place it takes: it has two thirds of them,
            rounded down, and so about as many parameters. None takes dim.
        dim_out: channels of the output; None keeps C.
        drop: dropout before and after the last layer.
        axes: axes of space, which the convolution needs to know; 2 for images.
    """

    def __init__(
        self,
        dim: int,
        hidden_features: int | None = None,
        dim_out: int | None = None,
        *,
        drop: float = 0.0,
        axes: int = 2,
    ) -> None:
        super().__init__()
        if axes not in (1, 2, 3):
            raise InputError(f"axes is {axes}: give 1, 2 or 3 axes of space")
        hidden = 2 * (dim if hidden_features is None else hidden_features) // 3
        check_positive(dim=dim, hidden_channels=hidden)
        self.dim = dim
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.dwconv = CONVOLUTIONS[axes - 1](hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim if dim_out is None else dim_out)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *space, C) -> (B, *space, dim_out)."""
        if x.ndim != self.dwconv.weight.ndim or x.shape[-1] != self.dim:
            axes = self.dwconv.weight.ndim - 2
            raise InputError(
                f"x is {tuple(x.shape)}: give (B, *space, {self.dim}) with {axes} axes of space, channels last"
            )
        gate, value = self.fc1(x).chunk(2, -1)
        gate = F.gelu(self.dwconv(gate.movedim(-1, 1)).movedim(1, -1))
        taps.record(self, "gate", lambda: gate)
        out: Tensor = self.drop(self.fc2(self.drop(gate * value)))
        return out
