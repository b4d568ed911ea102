"""Outlook attention (VOLO, Yuan et al., 2021, arXiv:2106.13112): every window is mixed by weights that its centre alone
has made, and overlapping windows are summed.

| `impl`      | how windows are cut and summed                    | forward + backward, CPU |
|-------------|---------------------------------------------------|-------------------------|
| `reference` | torch's unfold and fold, channels first           | 1                       |
| `windows`   | channels last, each step the other one's gradient | 2 to 3 times as fast    |
| `auto`      | `windows`                                         |                         |
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from saccade.errors import InputError, check_choice
from saccade.ops.check import check_positive

__all__ = ["outlook_attention", "outlook_attention_weights"]


def outlook_attention(
    value: Tensor,
    logits: Tensor,
    *,
    stride: int = 1,
    padding: int | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Mix the values of every K x K window by softmax(scale * logits), and sum where windows overlap.

    Window (i, j) begins at token (stride i - padding, stride j - padding). Zeros stand outside the map and take part
    in the mixing. The sum is not divided by the number of windows; a token that none covers gets 0.

    Args:
        value: (B, heads, H, W, E).
        logits: (B, heads, ceil(H / stride), ceil(W / stride), K^2, K^2): for each window and each of its tokens, in
            row-major order, what that token takes from each.
        stride: tokens from window to window.
        padding: tokens by which the first window sticks out; None takes K // 2, which centres odd windows.
        scale: factor of the logits; None takes E^-0.5, as the paper does although there are no products of queries
            and keys.
        impl: see the table above.

    Returns: (B, heads, H, W, E) in the dtype of the values.
    Raises: InputError for shapes that do not fit together, or sizes that are not positive.

    >>> outlook_attention(torch.ones(1, 1, 1, 3, 1), torch.zeros(1, 1, 1, 3, 9, 9)).flatten()  # the means of 2, 3, 2
    tensor([0.5556, 0.7778, 0.5556])
    """
    check_choice("impl", impl, ("auto", "windows", "reference"))
    size = _check(value, logits, stride)
    padding = size // 2 if padding is None else padding
    if not 0 <= padding < size:
        raise InputError(f"padding is {padding} and a window has {size} x {size} tokens: take 0 to {size - 1}")
    dtype = torch.promote_types(value.dtype, torch.float32)
    scale = value.shape[-1] ** -0.5 if scale is None else scale
    weights = (logits.to(dtype) * scale).softmax(-1)
    height, width = value.shape[2:4]
    below, right = (
        (windows - 1) * stride + size - padding - length for windows, length in zip(logits.shape[2:4], (height, width))
    )  # negative where the last tokens are in no window
    padded = F.pad(value, (0, 0, padding, right, padding, below))
    mix = _reference if impl == "reference" else _windows
    out = F.pad(mix(padded, weights, size, stride), (0, 0, -padding, -right, -padding, -below))
    return out.to(value.dtype)


def outlook_attention_weights(
    logits: Tensor, space: tuple[int, int], *, stride: int = 1, padding: int | None = None, scale: float
) -> Tensor:
    """Form the token matrix of outlook attention on a map (H, W), (B, heads, N, N): N x N memory, for looking at."""
    tokens = torch.eye(math.prod(space), dtype=logits.dtype, device=logits.device).unflatten(0, space)
    value = tokens.expand(*logits.shape[:2], *tokens.shape)
    return outlook_attention(value, logits, stride=stride, padding=padding, scale=scale).flatten(2, 3)


def _reference(padded: Tensor, weights: Tensor, size: int, stride: int) -> Tensor:
    heads, dim = padded.shape[1], padded.shape[-1]
    channels = padded.to(weights.dtype).movedim(-1, 2).flatten(1, 2)  # (B, heads E, H, W)
    windows = F.unfold(channels, size, stride=stride).unflatten(1, (heads, dim, size**2))
    mixed = torch.einsum("bnlrc,bnecl->bnerl", weights.flatten(2, 3), windows).flatten(1, 3)
    return F.fold(mixed, padded.shape[2:4], size, stride=stride).unflatten(1, (heads, dim)).movedim(2, -1)


def _windows(padded: Tensor, weights: Tensor, size: int, stride: int) -> Tensor:
    compiling = torch.compiler.is_compiling()  # a compiler derives the way back itself, and fuses it
    cut = _cut if compiling else _Cut.apply
    mixed, space = weights.to(padded.dtype) @ cut(padded, size, stride), (padded.shape[2], padded.shape[3])
    out: Tensor = _sum(mixed, space, size, stride) if compiling else _Sum.apply(mixed, space, size, stride)
    return out


def _cut(x: Tensor, size: int, stride: int) -> Tensor:
    """(B, heads, H, W, E) to windows (B, heads, h, w, K^2, E)."""
    windows = x.unfold(2, size, stride).unfold(3, size, stride)  # (B, heads, h, w, E, K, K)
    return windows.movedim(4, -1).flatten(4, 5)


def _sum(windows: Tensor, space: tuple[int, int], size: int, stride: int) -> Tensor:
    """The adjoint: windows summed where they overlap, (B, heads, H, W, E)."""
    out = windows.new_zeros(*windows.shape[:2], *space, windows.shape[-1])
    rows, columns = (stride * (number - 1) + 1 for number in windows.shape[2:4])
    for place in range(size**2):
        row, column = divmod(place, size)
        reached = out[:, :, row : row + rows : stride, column : column + columns : stride]
        reached += windows[:, :, :, :, place]
    return out


class _Cut(Function):
    """`_cut` with `_sum` as its gradient: autograd's own would fill a map for each place in a window."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, stride: int) -> Tensor:
        ctx.arguments = (x.shape[2], x.shape[3]), size, stride
        return _cut(x, size, stride)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Sum.apply(grad, *ctx.arguments), None, None


class _Sum(Function):
    """`_sum` with `_cut` as its gradient."""

    @staticmethod
    def forward(ctx: Any, windows: Tensor, space: tuple[int, int], size: int, stride: int) -> Tensor:
        ctx.arguments = size, stride
        return _sum(windows, space, size, stride)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Cut.apply(grad, *ctx.arguments), None, None, None


def _check(value: Tensor, logits: Tensor, stride: int) -> int:
    """K, if all shapes fit together."""
    check_positive(stride=stride)
    for name, tensor in (("value", value), ("logits", logits)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}: outlook attention takes floating-point tensors. Convert it")
    if value.ndim != 5:
        raise InputError(f"value is {tuple(value.shape)}: give (B, heads, H, W, E)")
    windows = [-(-length // stride) for length in value.shape[2:4]]
    expected = [*value.shape[:2], *windows]
    size = math.isqrt(logits.shape[-1])
    if list(logits.shape[:-2]) != expected or logits.shape[-1] != logits.shape[-2] or size**2 != logits.shape[-1]:
        raise InputError(
            f"logits is {tuple(logits.shape)} and value is {tuple(value.shape)}: with stride {stride} give "
            f"({', '.join(map(str, expected))}, K^2, K^2), a square matrix for each window of K x K tokens"
        )
    return size
