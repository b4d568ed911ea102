"""Focal modulation (FocalNet, Yang et al., 2022, arXiv:2203.11926): context gathered at several granularities.

| impl | what it does |
|---|---|
| "reference" | adds shifted maps, one for each tap of a kernel: the paper's equation |
| "conv" | depthwise convolutions |
| "auto" | "conv" |
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import InputError, check_choice

__all__ = ["focal_context"]

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CHUNK = 64  # tokens shown at once while a token matrix is formed


def focal_context(
    context: Tensor, gates: Tensor, kernels: Sequence[Tensor], *, normalize: bool = False, impl: str = "auto"
) -> Tensor:
    """Sum over levels of gate times context, where each level is a depthwise convolution and a GELU of the one before,
    and the last one the mean over the map of the coarsest, through a GELU too.

    Args:
        context: (B, *space, C), one to three axes of space.
        gates: (B, *space, L + 1), a factor for each token and level, not squashed; the last is for the mean.
        kernels: L tensors (C, 1, *sizes) of odd sizes, with zeros outside the map.
        normalize: divide by L + 1.
        impl: see the table above.

    Returns: (B, *space, C) in the dtype of the context.
    Raises: InputError for shapes that do not fit together and even kernels.

    >>> context, gates = torch.ones(1, 5, 1), torch.tensor([[[1.0, 0.0]]]).expand(1, 5, 2)
    >>> focal_context(context, gates, [torch.ones(1, 1, 3)]).flatten()  # GELU of the number of neighbours
    tensor([1.9545, 2.9959, 2.9959, 2.9959, 1.9545])
    """
    check_choice("impl", impl, ("auto", "conv", "reference"))
    _check(context, gates, kernels)
    total = _reference(context, gates, kernels) if impl == "reference" else _conv(context, gates, kernels)
    return total / gates.shape[-1] if normalize else total


def focal_context_weights(
    context: Tensor, gates: Tensor, kernels: Sequence[Tensor], *, normalize: bool = False
) -> Tensor:
    """Form the token matrix of a context, (B, N, N), a mean over channels: N x N memory, for looking at.

    GELU(x) = x P(x), with P the normal distribution's function: with the factors P as they are for this content, the
    context of a channel is a product of a matrix and that channel.
    """
    space, channels, size = context.shape[1:-1], context.shape[-1], context.shape[1:-1].numel()
    weights = gates.movedim(-1, 0).unsqueeze(2) / (gates.shape[-1] if normalize else 1)  # (L + 1, B, 1, *space)
    level, passes = context.movedim(-1, 1), []
    for kernel in kernels:
        level = _depthwise(level, kernel)
        passes.append(_passed(level))
        level = level * passes[-1]
    passes.append(_passed(_mean(level)))
    tokens = torch.eye(size, dtype=context.dtype, device=context.device).unflatten(1, (1, *space))
    matrices = []
    for image in range(len(context)):
        columns = []
        for shown in tokens.split(_CHUNK):
            level, total = shown.expand(-1, channels, *space), torch.zeros_like(shown)
            for kernel, passed, weight in zip(kernels, passes, weights):
                level = _depthwise(level, kernel) * passed[image]
                total = total + level * weight[image]
            total = total + _mean(level) * passes[-1][image] * weights[-1][image]
            columns.append(total.mean(1).flatten(1))
        matrices.append(torch.cat(columns).mT)
    return torch.stack(matrices) if matrices else context.new_zeros(0, size, size)


def _reference(context: Tensor, gates: Tensor, kernels: Sequence[Tensor]) -> Tensor:
    axes = tuple(range(1, context.ndim - 1))
    level, total = context, torch.zeros_like(context)
    for kernel, gate in zip(kernels, gates.split(1, -1)):
        level = F.gelu(sum(weight * shifted for weight, shifted in _shifts(level, kernel)))  # type: ignore[arg-type]
        total = total + level * gate
    return total + F.gelu(level.mean(axes, keepdim=True)) * gates[..., -1:]


def _shifts(x: Tensor, kernel: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A kernel's taps, each (C,), and the map as that tap sees it."""
    sizes, space = kernel.shape[2:], x.shape[1:-1]
    padded = F.pad(x, [0, 0, *(size // 2 for size in reversed(sizes) for _ in range(2))])
    for number, place in enumerate(product(*map(range, sizes))):
        view = padded
        for axis, (start, length) in enumerate(zip(place, space), 1):
            view = view.narrow(axis, start, length)
        yield kernel.flatten(1)[:, number], view


def _conv(context: Tensor, gates: Tensor, kernels: Sequence[Tensor]) -> Tensor:
    level, weights = context.movedim(-1, 1), gates.movedim(-1, 0).unsqueeze(2)  # (B, C, *space), (L + 1, B, 1, *space)
    total: Tensor | None = None
    for kernel, weight in zip(kernels, weights):
        level = F.gelu(_depthwise(level, kernel))
        total = level * weight if total is None else torch.addcmul(total, level, weight)
    mean = F.gelu(_mean(level))
    total = mean * weights[-1] if total is None else torch.addcmul(total, mean, weights[-1])
    return total.movedim(1, -1)


def _depthwise(x: Tensor, kernel: Tensor) -> Tensor:
    padding = tuple(size // 2 for size in kernel.shape[2:])
    return _CONVOLVE[x.ndim - 2](x, kernel, padding=padding, groups=len(kernel))


def _mean(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def _passed(x: Tensor) -> Tensor:
    """What a GELU multiplies x by."""
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _check(context: Tensor, gates: Tensor, kernels: Sequence[Tensor]) -> None:
    shapes = f"context is {tuple(context.shape)} and gates is {tuple(gates.shape)}"
    for name, tensor in (("context", context), ("gates", gates)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}: focal modulation takes floating-point tensors. Convert it")
    if not 3 <= context.ndim <= 5:
        raise InputError(f"{shapes}: give context (B, *space, C), with one to three axes of space")
    if gates.shape != (*context.shape[:-1], len(kernels) + 1):
        raise InputError(
            f"{shapes}: with {len(kernels)} kernels give gates {(*context.shape[:-1], len(kernels) + 1)}, one for each "
            "level and one for the mean"
        )
    for kernel in kernels:
        if kernel.ndim != context.ndim or kernel.shape[:2] != (context.shape[-1], 1):
            raise InputError(
                f"a kernel is {tuple(kernel.shape)} and context is {tuple(context.shape)}: give "
                f"({context.shape[-1]}, 1, a size for each axis of space)"
            )
        if not all(size % 2 for size in kernel.shape[2:]):
            raise InputError(f"a kernel is {tuple(kernel.shape)}: give odd sizes, so that the map keeps its own")
