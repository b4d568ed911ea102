"""What every mixer is: a module that mixes tokens, (B, *space, C) -> (B, *space, C)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError

__all__ = [
    "Mixer",
    "append_zeros",
    "choose_heads",
    "crop",
    "crop_matrix",
    "even_size",
    "merge_heads",
    "probe",
    "split_heads",
]


class Mixer(nn.Module, ABC):
    """A module that mixes the tokens of a channels-last map.

    Subclasses implement `mix`, and `mix_with_prefix` where class or register tokens can take part. They call
    `self.show_attention` with a function that forms their token matrix, for taps.

    Args:
        dim: C, channels of a token.

    Attributes:
        mixes_tokens: False where an output token is a sum of its own channels alone, so that the token matrix that taps
            see says nothing about places.
    """

    mixes_tokens: ClassVar[bool] = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @abstractmethod
    def mix(self, x: Tensor) -> Tensor:
        """(B, *space, C) -> (B, *space, C)."""

    def mix_with_prefix(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        """The same with tokens (B, P, C) that see all and are seen by all; mixers that cannot raise InputError."""
        raise InputError(
            f"{type(self).__name__} cannot serve prefix tokens (class or register tokens), and got {prefix.shape[1]}. "
            "Pool the map instead, or choose a mixer of softmax attention"
        )

    def forward(self, x: Tensor, prefix: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Mix the tokens of x (B, *space, C); with prefix tokens (B, P, C), return both."""
        if x.ndim < 3 or x.shape[-1] != self.dim:
            raise InputError(
                f"x is {tuple(x.shape)}: {type(self).__name__} takes (B, *space, {self.dim}), channels last. "
                "Move the channels with x.movedim(1, -1) if they stand second"
            )
        if 0 in x.shape[1:]:
            raise InputError(f"x is {tuple(x.shape)}: every axis of space needs at least one token. Leave the map out")
        if prefix is None:
            out = self.mix(x)
            taps.record(self, "features", lambda: out)
            return out
        if prefix.ndim != 3 or prefix.shape[-1] != self.dim or prefix.shape[0] != x.shape[0]:
            raise InputError(f"prefix is {tuple(prefix.shape)}: give ({x.shape[0]}, tokens, {self.dim})")
        out, prefix = self.mix_with_prefix(x, prefix)
        taps.record(self, "features", lambda: out)
        return out, prefix


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, *space, heads * D) to (B, heads, *space, D), a view."""
    return x.unflatten(-1, (num_heads, -1)).movedim(-2, 1)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, *space, D) to (B, *space, heads * D)."""
    return x.movedim(1, -2).flatten(-2)


def append_zeros(x: Tensor, margins: Sequence[int]) -> Tensor:
    """Append so many tokens of zeros to each axis of (B, *space, C)."""
    return F.pad(x, [0, 0, *(n for margin in reversed(margins) for n in (0, margin))]) if any(margins) else x


def crop(x: Tensor, space: tuple[int, ...], first: int = 1) -> Tensor:
    """The beginning of each axis of space, the first of which is axis number `first`."""
    for axis, length in enumerate(space, start=first):
        x = x.narrow(axis, 0, length)
    return x


def crop_matrix(weights: Tensor, padded: tuple[int, ...], space: tuple[int, ...]) -> Tensor:
    """A token matrix over a padded map, (B, heads, N', N'), without what belongs to the padding: (B, heads, N, N)."""
    rows = crop(weights.unflatten(2, padded), space, first=2).flatten(2, 1 + len(space))
    return crop(rows.unflatten(3, padded), space, first=3).flatten(3)


def choose_heads(dim: int, num_heads: int | None) -> int:
    """The number of heads: as asked, or as many of 32 channels as fit, at least one.

    >>> choose_heads(96, None)
    3
    """
    heads = max(1, dim // 32) if num_heads is None else num_heads
    if heads < 1 or dim % heads:
        divisors = [n for n in range(1, dim + 1) if dim % n == 0]
        raise InputError(
            f"num_heads is {heads} and dim is {dim}: the heads share the channels evenly. Take one of {divisors}"
        )
    return heads


def even_size(length: int, largest: int, *, fewest: int = 1) -> int:
    """The size of blocks that cover an axis: as few as possible of at most `largest` tokens, all about equal.

    >>> even_size(8, 7), even_size(56, 7), even_size(5, 7)
    (4, 7, 5)
    """
    blocks = max(-(-length // largest), min(fewest, length))
    return -(-length // blocks)


def probe(mix: Callable[[Tensor], Tensor], space: tuple[int, ...], like: Tensor) -> Tensor:
    """Form the token matrix of a fixed linear map over space, (C, N, M), by showing it one token at a time.

    Args:
        mix: (N, *space, C) -> (N, *space, C), linear and the same for every input.
        space: the axes of the map.
        like: (..., C), whose channels, dtype and device are used.
    """
    tokens = torch.eye(torch.Size(space).numel(), dtype=like.dtype, device=like.device)
    shown = tokens.unflatten(1, space).unsqueeze(-1).expand(*tokens.shape[:1], *space, like.shape[-1])
    return mix(shown).flatten(1, -2).permute(2, 1, 0)
