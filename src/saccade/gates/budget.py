"""A loss that holds decisions to a target, whose weights grow while it is missed (Flux Attention, 2026,
arXiv:2604.07394)."""

import torch
from torch import Tensor, nn

from saccade.errors import InputError

__all__ = ["SparsityBudget"]


class SparsityBudget(nn.Module):
    """Hold the share of sparse decisions of each sample near the target of its task.

    The loss of a sample is linear |s - s*| + quadratic (s - s*)^2, averaged over the samples of a task, then over the
    tasks of the batch. Both weights are parameters that any optimizer raises where it lowers everything else: their
    gradient has its sign turned, as Lagrange multipliers want it.

    Args:
        num_tasks: tasks with weights of their own. 0 has none, and the loss is the mean |s - s*|.
    """

    def __init__(self, num_tasks: int = 1) -> None:
        super().__init__()
        if num_tasks < 0:
            raise InputError(f"num_tasks is {num_tasks}: give 0 or more")
        self.linear = nn.Parameter(torch.rand(num_tasks) / 2)
        self.quadratic = nn.Parameter(torch.rand(num_tasks) / 2)

    def forward(self, gates: Tensor, target: Tensor | float, task: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            gates: (B, layers), or (B, layers, heads): 1 where a sample's layer is full, 0 where it is sparse.
            target: s*, the share of sparse decisions, one for all or (B,).
            task: (B,) integers; None is task 0 for all.
        """
        missed = 1 - gates.flatten(1).mean(1) - target  # (B,)
        tasks = len(self.linear)
        if not tasks:
            return missed.abs().mean()
        task = torch.zeros(len(gates), dtype=torch.long, device=gates.device) if task is None else task
        if task.shape != missed.shape:
            raise InputError(f"task is {tuple(task.shape)} and there are {len(gates)} samples: give one for each")
        linear, quadratic = (2 * weight.detach() - weight for weight in (self.linear, self.quadratic))
        loss = linear[task] * missed.abs() + quadratic[task] * missed.square()
        samples = torch.zeros_like(self.linear).index_add(0, task, torch.ones_like(loss))
        means = torch.zeros_like(self.linear).index_add(0, task, loss) / samples.clamp(min=1)
        return means.sum() / (samples > 0).sum()
