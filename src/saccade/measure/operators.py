"""Time attention patterns over map sizes, beside dense attention under the same mask."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.measure.scaling import Exponent, fit_exponent
from saccade.measure.timing import measure_time
from saccade.ops import (
    Causal,
    Global,
    GlobalTokens,
    Grid,
    Halo,
    Neighborhood,
    Pattern,
    Sinks,
    SlidingWindow,
    Window,
    agent_attention,
    softmax_attention,
    sparse_attention,
)

__all__ = ["OPERATORS", "OperatorTiming", "bench_operators"]

OPERATORS: dict[str, Pattern | None] = {
    "global": Global(),
    "window": Window(7, ragged=True),
    "grid": Grid(7, ragged=True),
    "halo": Halo(8, 3, ragged=True),
    "neighborhood": Neighborhood(7),
    "neighborhood_strided": Neighborhood(8, stride=4),
    "sliding_and_global": SlidingWindow(24, 24) | GlobalTokens((0,)),
    "streaming": (SlidingWindow(48) | Sinks(4)) & Causal(),
    "agent": None,
}
AGENTS = 49
LARGEST_DENSE = 64 * 64  # tokens; beyond, a dense mask takes gigabytes


@dataclass(frozen=True)
class OperatorTiming:
    """One operator over map sizes.

    Attributes:
        operator: its name.
        sides: tokens along each axis of a square map.
        milliseconds: median of a call, at each side.
        dense: the same for torch's scaled_dot_product_attention under the operator's mask (without a mask for global
            and agent attention); None where the map is too large for a dense mask.
        bounds: the speed-up over dense attention that visited tiles of about 64 tokens allow, at each side; None for
            agent attention, which has no pattern.
        exponent: growth of time with the side, where there are three sides or more; 2 is linear in tokens.
    """

    operator: str
    sides: tuple[int, ...]
    milliseconds: tuple[float, ...]
    dense: tuple[float | None, ...]
    bounds: tuple[float | None, ...]
    exponent: Exponent | None

    @property
    def speedups(self) -> tuple[float | None, ...]:
        """Dense time over the operator's, at each side."""
        return tuple(None if d is None else d / own for d, own in zip(self.dense, self.milliseconds))


def bench_operators(
    operators: Sequence[str],
    sides: Sequence[int],
    *,
    batch: int = 1,
    heads: int = 4,
    head_dim: int = 32,
    backward: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[OperatorTiming]:
    """Time operators on square maps, queries, keys and values laid out as mixers lay them out.

    Args:
        operators: names of `OPERATORS`.
        sides: tokens along each axis.
        batch, heads, head_dim: of queries, keys and values.
        backward: time forward and backward together.
        device, dtype: where and in what to compute.

    Raises: InputError for an unknown operator, or a map that its pattern cannot serve.
    """
    for name in operators:
        check_choice("operator", name, OPERATORS)
    for what, least in (("side", min(sides)), ("batch", batch), ("heads", heads), ("head_dim", head_dim)):
        if least < 1:
            raise InputError(f"{what} is {least}: give a whole number of at least 1")
    found = []
    for name in operators:
        own, dense = [], []
        for side in sides:
            shape = (batch, side, side, 3 * heads * head_dim)
            packed = torch.randn(shape, device=device, dtype=dtype, requires_grad=backward)
            mask = _mask(name, side, device)
            own.append(_milliseconds(partial(_attend, name, heads), packed, backward))
            bearable = mask is not None or name in ("global", "agent") or side**2 <= LARGEST_DENSE
            dense.append(_milliseconds(partial(_dense, mask, heads), packed, backward) if bearable else None)
        pattern = OPERATORS[name]
        bounds = [None if pattern is None else pattern.cost((side, side)).bound.mean for side in sides]
        exponent = fit_exponent(sides, own) if len(set(sides)) >= 3 else None
        found.append(OperatorTiming(name, tuple(sides), tuple(own), tuple(dense), tuple(bounds), exponent))
    return found


def _split(packed: Tensor, heads: int) -> list[Tensor]:
    """(B, H, W, 3 heads D) to three of (B, heads, H, W, D)."""
    return [part.unflatten(-1, (heads, -1)).movedim(-2, 1) for part in packed.chunk(3, -1)]


def _attend(name: str, heads: int, packed: Tensor) -> Tensor:
    query, key, value = _split(packed, heads)
    pattern = OPERATORS[name]
    if pattern is not None:
        return sparse_attention(query, key, value, pattern)
    query, key, value = (x.flatten(2, 3) for x in (query, key, value))
    return agent_attention(query, key, value, query[:, :, :: max(1, query.shape[2] // AGENTS)][:, :, :AGENTS])


def _mask(name: str, side: int, device: str) -> Tensor | None:
    """The operator's mask where dense attention needs and bears one."""
    pattern = OPERATORS[name]
    if pattern is None or pattern.sees_all((side, side)) or side**2 > LARGEST_DENSE:
        return None
    return pattern.mask((side, side)).to(device)


def _dense(mask: Tensor | None, heads: int, packed: Tensor) -> Tensor:
    query, key, value = (x.flatten(2, 3) for x in _split(packed, heads))
    return softmax_attention(query, key, value, mask=mask)


def _milliseconds(call: Callable[[Tensor], Tensor], packed: Tensor, backward: bool) -> float:
    def run() -> None:
        out = call(packed)
        if backward:
            torch.autograd.grad(out, packed, torch.ones_like(out))

    with torch.set_grad_enabled(backward):
        return 1e3 * measure_time(run, warmup=2, repeats=7, min_seconds=0.05).median
