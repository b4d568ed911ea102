"""What every gate is: a module that decides, from a channels-last map, what passes."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError

__all__ = ["Gate"]


class Gate(nn.Module, ABC):
    """A module that looks at a channels-last map (B, *space, C) and returns gate values that broadcast to it.

    Subclasses implement `decide`. What it returns is what taps see, and what whoever called the gate multiplies with.

    Args:
        dim: C, channels of a token.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @abstractmethod
    def decide(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Gate values for x (B, *space, C), with 1 for each axis along which all share one value."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Decide what of x (B, *space, C) passes; more arguments are for `decide`."""
        if x.ndim < 3 or x.shape[-1] != self.dim:
            raise InputError(
                f"x is {tuple(x.shape)}: {type(self).__name__} takes (B, *space, {self.dim}), channels last. "
                "Move the channels with x.movedim(1, -1) if they stand second"
            )
        if 0 in x.shape[1:]:
            raise InputError(f"x is {tuple(x.shape)}: every axis of space needs at least one token. Leave the map out")
        gate = self.decide(x, *args, **kwargs)
        taps.record(self, "gate", lambda: gate)
        return gate
