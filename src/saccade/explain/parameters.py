"""Other parameters for a while: a step of learning, or their own values shuffled; afterwards bit for bit as before."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

__all__ = ["parameters_of", "shuffle_parameters", "step_downhill", "with_parameters"]


@contextmanager
def with_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with these parameters; tensors change places, so that nothing of the old ones is lost."""
    parameters = parameters_of(model)
    before = {name: parameters[name].data for name in values}
    try:
        for name, value in values.items():
            parameters[name].data = value
        yield
    finally:
        for name, value in before.items():
            parameters[name].data = value


def step_downhill(
    model: nn.Module, images: Tensor, classes: Tensor, rate: float, *, read: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """theta - rate * d cross-entropy / d theta for every parameter, frozen ones too; `model` stays as it is.

    `read` finds the logits in what the model returns.
    """
    leaves = {name: each.detach().clone().requires_grad_() for name, each in parameters_of(model).items()}
    with torch.enable_grad():
        logits = read(functional_call(model, leaves, (images.detach().clone(),)))
        slopes = torch.autograd.grad(cross_entropy(logits, classes), list(leaves.values()), allow_unused=True)
    return {
        name: leaf.detach() if slope is None else leaf.detach() - rate * slope
        for (name, leaf), slope in zip(leaves.items(), slopes)
    }


def shuffle_parameters(values: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Each tensor's own values in a random order: the same numbers, and nothing of what was learnt."""
    shuffled = {}
    for name, value in values.items():
        order = torch.randperm(value.numel(), generator=generator).to(value.device)
        shuffled[name] = value.detach().flatten()[order].view_as(value)
    return shuffled


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Floating-point parameters by name, each once."""
    return {name: each for name, each in model.named_parameters() if each.is_floating_point()}
