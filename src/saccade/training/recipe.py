"""The recipe: which parameters decay, and how large each step is."""

import math
from typing import Any

from torch import nn

from saccade.training.settings import TrainSettings

__all__ = ["learning_rate", "parameter_groups"]

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Sort the parameters that learn into those with and those without weight decay, as an optimizer takes them.

    Norms, biases, one-dimensional parameters and those which `model.no_weight_decay()` names have none.
    """
    no_weight_decay: Any = getattr(model, "no_weight_decay", set)
    named = set(no_weight_decay())
    norms = {id(value) for module in model.modules() if isinstance(module, _NORMS) for value in module.parameters()}
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, value in model.named_parameters():
        if value.requires_grad:
            spare = value.ndim <= 1 or name.endswith("bias") or name in named or id(value) in norms
            (spared if spare else decayed).append(value)
    kinds = ((decayed, weight_decay), (spared, 0.0))
    return [{"params": values, "weight_decay": decay} for values, decay in kinds if values]


def learning_rate(settings: TrainSettings, step: int, steps_per_epoch: int) -> float:
    """Compute the rate of a step, counted from 0: a line up to the peak, then half a cosine down to zero.

    >>> settings = TrainSettings(epochs=3, warmup_epochs=1, learning_rate=1.0)
    >>> [round(learning_rate(settings, step, 2), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    total = settings.epochs * steps_per_epoch
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total // 2)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
