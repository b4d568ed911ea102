"""Inverted-residual ("mobile") convolution, and MOAT's attention behind it (Yang et al., 2022, arXiv:2210.01820)."""

from collections.abc import Callable

from torch import Tensor, nn

from saccade.errors import InputError
from saccade.mixers.attention import TableAttention
from saccade.mixers.mixer import Mixer
from saccade.ops import Pattern, Window

__all__ = ["MobileConvAttention", "MobileConvolution", "by_token"]

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class MobileConvolution(nn.Module):
    """The branch of an inverted-residual block (MobileNetV2, Sandler et al., 2018, arXiv:1801.04381) with a norm
    before it: widen, convolve each channel, narrow. Channels first, (B, C, *space) to (B, C', *space').

    Args:
        dim, dim_out: channels before and after.
        hidden: channels in between.
        depthwise: the convolution of `hidden` channels; None has one of 3 tokens along each axis, without stride.
        gate: what weighs the channels behind it.
        act: makes the activation behind the first two layers.
        out_bias: give the last layer a bias.
        eps: of the norms.
        axes: axes of space, 1 to 3; 2 for images.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        hidden: int,
        *,
        depthwise: nn.Module | None = None,
        gate: nn.Module | None = None,
        act: Callable[[], nn.Module] = nn.GELU,
        out_bias: bool = True,
        eps: float = 1e-3,
        axes: int = 2,
    ) -> None:
        super().__init__()
        norm = _NORM[axes]
        if depthwise is None:
            depthwise = _CONV[axes](hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.pre_norm = norm(dim, eps)
        self.fc1 = nn.Linear(dim, hidden, bias=False)
        self.norm1 = norm(hidden, eps)
        self.conv = depthwise
        self.norm2 = norm(hidden, eps)
        self.act = act()
        self.gate = nn.Identity() if gate is None else gate
        self.fc2 = nn.Linear(hidden, dim_out, bias=out_bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(by_token(self.fc1, self.pre_norm(x))))
        x = self.gate(self.act(self.norm2(self.conv(x))))
        return by_token(self.fc2, x)


def by_token(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer to the channels of (B, C, *space): on a channels-last map faster than a 1 x 1 convolution."""
    out: Tensor = layer(x.movedim(1, -1)).movedim(-1, 1)
    return out


class MobileConvAttention(TableAttention):
    """A mobile convolution, then softmax attention inside windows (MOAT, Yang et al., 2022, arXiv:2210.01820).

    What it returns is what a block of MOAT adds to its map: u + attention(norm(x + u)) with u = convolution(x). Windows
    need no shift, since the convolution looks beyond them. Its token matrix is that of the attention.

    Args:
        dim, num_heads, window_size, num_windows, table_size, axes, position_bias, options: as for WindowAttention; by
            default windows have at most 14 tokens along an axis, and the table is learned for 14.
        expansion: channels inside the convolution over C.
    """

    default_window = 14  # MOAT's map at a 16th of the image's side

    def __init__(  # type: ignore[no-untyped-def]
        self, dim: int, num_heads: int | None = None, *, expansion: int = 4, axes: int = 2, **options
    ) -> None:
        if options.get("window_size") is None:
            options.setdefault("table_size", self.default_window)
        super().__init__(dim, num_heads, axes=axes, **options)
        self.axes = axes
        self.conv = MobileConvolution(dim, dim, expansion * dim, axes=axes)
        self.norm = nn.LayerNorm(dim)

    def mix(self, x: Tensor) -> Tensor:
        if x.ndim != self.axes + 2:
            raise InputError(
                f"x is {tuple(x.shape)}: the convolution was built for {self.axes} axes. Set axes={x.ndim - 2}"
            )
        update = self.conv(x.movedim(-1, 1)).movedim(1, -1)
        out: Tensor = update + super().mix(self.norm(x + update))
        return out

    def mix_with_prefix(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        return Mixer.mix_with_prefix(self, x, prefix)  # a token outside the map has no neighbours

    def pattern(self, space: tuple[int, ...]) -> Pattern:
        return Window(self.window(space), ragged=True)
