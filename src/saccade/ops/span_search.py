"""Which head gets which span: losses at several lengths are minimised at once under budgets of memory (MoA, 2024,
arXiv:2406.14909), as a mixed-integer program that scipy's HiGHS solves."""

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saccade.errors import InputError

__all__ = ["SpanPlan", "assign_spans", "choose_plan"]


TIE = 1e-6  # of the sum over all lengths: of equal plans the one that is best elsewhere


class SpanPlan(NamedTuple):
    """A rule for each head.

    Attributes:
        rules: (layers, heads) numbers of rules.
        losses: (lengths,) the sum over heads.
        densities: (lengths,) the mean over heads.
    """

    rules: Tensor
    losses: Tensor
    densities: Tensor


def assign_spans(
    losses: Tensor,
    densities: Tensor,
    budgets: Sequence[float],
    *,
    rules_per_layer: int = 2,
    least: float = 0.9,
    points: int = 5,
) -> list[SpanPlan]:
    """Find plans that no other plan beats at every length: each length's loss is minimised in turn, with bounds on the
    others.

    Args:
        losses: (lengths, layers, heads, rules), such as `span_losses` at each length.
        densities: (lengths, rules), such as `span_densities`.
        budgets: for each length the largest mean density over all heads.
        rules_per_layer: different rules within a layer, at most.
        least: share of the budget that is used at least.
        points: bounds that are tried for each other length: points^(lengths - 1) programs are solved.

    Returns: the plans, by their loss at the first length. None beats another at all lengths.
    Raises: InputError if no plan keeps to the budgets.

    >>> plans = assign_spans(torch.tensor([[[[4.0, 1.0], [2.0, 0.0]]]]), torch.tensor([[0.25, 0.75]]), [0.5])
    >>> plans[0].rules  # the head that gains more gets the longer span
    tensor([[1, 0]])
    """
    if losses.ndim != 4 or densities.shape != (losses.shape[0], losses.shape[3]) or len(budgets) != len(losses):
        raise InputError(
            f"losses is {tuple(losses.shape)}, densities is {tuple(densities.shape)}, with {len(budgets)} budgets: "
            "give (lengths, layers, heads, rules), (lengths, rules), and a budget for each length"
        )
    program = _Program(losses, densities, budgets, rules_per_layer, least)
    corners = [program.solve(first) for first in range(len(losses))]
    plans = [corner for corner in corners if corner is not None]
    if len(plans) < len(corners):
        raise InputError(
            f"no plan keeps to budgets {tuple(budgets)} with {rules_per_layer} rules in a layer and densities of "
            f"{_span(densities)}: raise the budgets or rules_per_layer, lower least ({least}), or give more rules"
        )
    ends = torch.stack([plan.losses for plan in plans]).aminmax(dim=0)
    grid = [np.linspace(low.item(), high.item(), points) for low, high in zip(ends.min[1:], ends.max[1:])]
    plans += [plan for bounds in product(*grid) if bounds and (plan := program.solve(0, bounds)) is not None]
    front = {tuple(plan.losses.tolist()): plan for plan in plans if not any(_beats(other, plan) for other in plans)}
    return [front[losses] for losses in sorted(front)]


def choose_plan(plans: Sequence[SpanPlan], losses: Tensor) -> SpanPlan:
    """The plan with the least loss at a length that was not optimised, from its losses (layers, heads, rules)."""
    if not plans:
        raise InputError("plans is empty: give those of assign_spans")
    return min(plans, key=lambda plan: losses.gather(-1, plan.rules.unsqueeze(-1)).sum().item())


class _Program:
    """Binary variables: x, whether a head has a rule (layers, heads, rules); y, whether a layer has it (layers, rules).

    Everything is a sparse row over both, x first.
    """

    def __init__(
        self, losses: Tensor, densities: Tensor, budgets: Sequence[float], rules_per_layer: int, least: float
    ) -> None:
        from scipy import sparse
        from scipy.optimize import LinearConstraint

        self.losses, self.densities = losses.detach().cpu().double(), densities.detach().cpu().double()
        _, layers, heads, rules = losses.shape
        one_rule = sparse.kron(sparse.eye(layers * heads), np.ones((1, rules)))
        heads_of_layers = sparse.kron(sparse.eye(layers), np.ones((heads, 1)))
        uses = sparse.kron(heads_of_layers, sparse.eye(rules))  # (x, y): a head's rule is one of its layer's
        rules_of_layer = sparse.kron(sparse.eye(layers), np.ones((1, rules)))
        mean_density = np.tile(self.densities.numpy(), layers * heads) / (layers * heads)
        limits = np.array(budgets, dtype=float)
        rounding = 1e-9  # a mean that meets its budget exactly
        self.constraints = [
            LinearConstraint(sparse.hstack([one_rule, _zeros(one_rule, uses)]), 1, 1),
            LinearConstraint(sparse.hstack([sparse.eye(uses.shape[0]), -uses]), -np.inf, 0),
            LinearConstraint(sparse.hstack([_zeros(rules_of_layer, one_rule), rules_of_layer]), 0, rules_per_layer),
            LinearConstraint(self._row(mean_density), least * limits - rounding, limits + rounding),
        ]

    def solve(self, first: int, bounds: Sequence[float] = ()) -> SpanPlan | None:
        """Minimise the loss at length number `first`, with bounds on those of the second length and all after it."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        flat = self.losses.flatten(1).numpy()
        scaled = flat / np.abs(flat).sum(1, keepdims=True).clip(min=1e-30)
        objective = scaled[first] + TIE * scaled.sum(0)
        extra = [LinearConstraint(self._row(flat[1:]), -np.inf, np.array(bounds))] if len(bounds) else []
        size = self.constraints[0].A.shape[1]
        result = milp(
            np.pad(objective, (0, size - len(objective))),
            integrality=np.ones(size),
            bounds=Bounds(0, 1),
            constraints=[*self.constraints, *extra],
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            return None
        shape = self.losses.shape
        rules = torch.from_numpy(result.x[: flat.shape[1]]).view(shape[1:]).argmax(-1)
        losses = self.losses.gather(-1, rules.expand(shape[0], *rules.shape).unsqueeze(-1)).flatten(1).sum(1)
        return SpanPlan(rules, losses, self.densities[:, rules.flatten()].mean(1))

    def _row(self, values: NDArray[np.float64]) -> Any:
        """Rows over x, (rows, x), as rows over both."""
        from scipy import sparse

        layers, rules = self.losses.shape[1], self.losses.shape[3]
        return sparse.hstack([sparse.csr_matrix(values), sparse.csr_matrix((len(values), layers * rules))])


def _zeros(rows: Any, columns: Any) -> Any:
    from scipy import sparse

    return sparse.csr_matrix((rows.shape[0], columns.shape[1]))


def _beats(left: SpanPlan, right: SpanPlan) -> bool:
    return bool((left.losses <= right.losses).all() and (left.losses < right.losses).any())


def _span(densities: Tensor) -> str:
    return f"{densities.min().item():.3g} to {densities.max().item():.3g}"
