"""Gates: modules that decide what passes, from a channels-last map. The exported
classes are the registry; gates that read queries and keys are exported beside them."""

from typing import Any

from saccade.errors import check_choice
from saccade.gates.block_gate import BlockGate, TokenGate
from saccade.gates.budget import SparsityBudget
from saccade.gates.gate import Gate
from saccade.gates.layer_router import LayerRouter
from saccade.gates.schedules import anneal_temperature, warm_target
from saccade.registry import build, buildable, describe

__all__ = [
    "BlockGate",
    "Gate",
    "LayerRouter",
    "SparsityBudget",
    "TokenGate",
    "anneal_temperature",
    "create_gate",
    "describe_gate",
    "list_gates",
    "warm_target",
]


def list_gates() -> list[str]:
    """List the names that `create_gate` takes.

    >>> "layer_router" in list_gates()
    True
    """
    return list(_gates())


def create_gate(name: str, dim: int, **options: Any) -> Gate:
    """Build a gate by name: `LayerRouter` is "layer_router".

    Args:
        name: one of `list_gates()`.
        dim: C, channels of a token.
        options: arguments of the class.

    Raises: InputError for an unknown name or option, with the nearest ones that exist.
    """
    return build(_gate(name), dim, options)


def describe_gate(name: str) -> str:
    """Say in a sentence what a gate decides: the first of its docstring."""
    return describe(_gate(name))


def _gate(name: str) -> type[Gate]:
    check_choice("gate", name, _gates())
    return _gates()[name]


def _gates() -> dict[str, type[Gate]]:
    return buildable([globals()[name] for name in __all__], Gate)  # type: ignore[type-abstract]
