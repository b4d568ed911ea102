"""A pattern that is chosen once and kept for the steps that follow, as a denoising model can (SparseD, 2025,
arXiv:2509.24014): its attention hardly changes from one step to the next, and its first steps decide the quality."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from saccade.errors import InputError
from saccade.ops.pattern import Pattern
from saccade.ops.sparse_attention import sparse_attention
from saccade.ops.window import Global

__all__ = ["ReuseResult", "ReuseState", "choosing_step", "reuse_attention"]


class ReuseState(NamedTuple):
    """What one layer carries from step to step of a generation; `ReuseState()` begins one.

    Attributes:
        step: number of the step that comes next.
        pattern: what the steps since choosing see; None before.
    """

    step: int = 0
    pattern: Pattern | None = None


class ReuseResult(NamedTuple):
    """What `reuse_attention` returns.

    Attributes:
        out: (B, heads, *space, E).
        state: for the next step.
    """

    out: Tensor
    state: ReuseState


def choosing_step(num_steps: int, skip: float) -> int:
    """The step, counted from 0, that chooses and is the last with full attention: int(num_steps * skip) + 1.

    >>> choosing_step(128, 0.2)
    26
    """
    if not 0 <= skip <= 1 or num_steps < 1:
        raise InputError(f"num_steps is {num_steps} and skip is {skip}: give steps of at least 1 and a share of 0 to 1")
    return int(num_steps * skip) + 1


def reuse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: ReuseState,
    choose: Callable[[Tensor, Tensor], Pattern],
    *,
    choose_at: int,
    scale: float | None = None,
    impl: str = "auto",
) -> ReuseResult:
    """Attend in one of many steps: in full up to the step that chooses a pattern, and in this pattern from then on.

    Args:
        query: (B, heads, *space, D).
        key: (B, kv_heads, *space, D).
        value: (B, kv_heads, *space, E).
        state: `ReuseState()` in the first step, then that of the step before.
        choose: (query, key) to a pattern, such as a `select_blocks_by_weight` with its options. Called in one step.
        choose_at: that step, which itself still attends in full (`choosing_step`).
        scale: factor of q.k, D^-0.5 by default.
        impl: as in `sparse_attention`.

    >>> import torch
    >>> from saccade.ops import Window
    >>> x, state = torch.arange(4.0).reshape(1, 1, 4, 1), ReuseState()
    >>> for step in range(3):
    ...     out, state = reuse_attention(0 * x, x, x, state, lambda query, key: Window(2), choose_at=1)
    ...     print(out.flatten().tolist())
    [1.5, 1.5, 1.5, 1.5]
    [1.5, 1.5, 1.5, 1.5]
    [0.5, 0.5, 2.5, 2.5]
    """
    if state.pattern is None and state.step > choose_at:
        raise InputError(
            f"state is at step {state.step} without a pattern, and choose_at is {choose_at}: begin with ReuseState(), "
            "pass on the state of each step, and keep choose_at"
        )
    pattern = Global() if state.pattern is None else state.pattern
    out = sparse_attention(query, key, value, pattern, scale=scale, impl=impl)
    kept = choose(query, key) if state.step == choose_at else state.pattern
    return ReuseResult(out, ReuseState(state.step + 1, kept))
