"""Rotary position embedding (RoFormer, Su et al., 2021, arXiv:2104.09864) on one to three axes of space."""

import torch
from torch import Tensor

from saccade.errors import InputError

__all__ = ["rotary_angles", "rotate"]


def rotary_angles(places: Tensor, dim: int, *, base: float = 10000.0) -> Tensor:
    """The angles by which pairs of channels are turned.

    Args:
        places: (axes, N) positions along each axis.
        dim: channels of a head; the axes share them evenly, and each takes pairs.
        base: pair p of the P of an axis turns by base^(-p / P) for each step.

    Returns: (N, dim / 2), float32 at least.

    >>> rotary_angles(torch.tensor([[0, 1, 2]]), 4)
    tensor([[0.0000, 0.0000],
            [1.0000, 0.0100],
            [2.0000, 0.0200]])
    """
    axes = len(places)
    if dim % (2 * axes):
        raise InputError(
            f"dim is {dim} and places has {axes} axes: each axis turns pairs. Give a multiple of {2 * axes}"
        )
    pairs = dim // (2 * axes)
    dtype = torch.promote_types(places.dtype, torch.float32)
    turn = base ** (-torch.arange(pairs, device=places.device, dtype=dtype) / pairs)
    return (places.to(dtype).unsqueeze(-1) * turn).movedim(0, 1).flatten(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel c and channel c + D / 2 of x (..., N, D) into each other.

    Args:
        x: (..., N, D).
        cos, sin: of the angles, broadcastable to (..., N, D / 2).

    >>> rotate(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 1), torch.ones(1, 1))  # a quarter turn
    tensor([[0., 1.]])
    """
    first, second = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
