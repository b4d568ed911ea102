"""Classes that are built by name: what mixers and gates share. A floor's exported classes are its registry."""

import inspect
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from saccade.errors import InputError, nearest

__all__ = ["build", "buildable", "describe"]

T = TypeVar("T")


def buildable(exported: Iterable[Any], base: type[T], suffix: str = "") -> dict[str, type[T]]:
    """The classes of a base that can be built, by the name made of their own: `DepthwiseConv` is "depthwise_conv".

    Args:
        exported: what a floor exports.
        base: of its classes; abstract ones are left out.
        suffix: ending of a name that is dropped: "_attention".
    """
    kinds = [
        each for each in exported if isinstance(each, type) and issubclass(each, base) and not inspect.isabstract(each)
    ]
    return {re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower().removesuffix(suffix): kind for kind in kinds}


def build(kind: type[T], dim: int, options: dict[str, Any]) -> T:
    """Build a class with its options; InputError for an unknown one, with the nearest that exist."""
    known = _options(kind)
    for option in options:
        if option not in known:
            raise InputError(f"{kind.__name__} has no option {option!r}: {nearest(option, known)}")
    return kind(dim, **options)  # type: ignore[call-arg]


def describe(kind: type) -> str:
    """Say in a sentence what a class does: the first of its docstring."""
    summary = inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0]
    return " ".join(summary.split())


def _options(kind: type) -> set[str]:
    """Arguments of the class; of its bases too, where it hands **options on."""
    known: set[str] = set()
    for base in kind.__mro__:
        parameters = inspect.signature(vars(base)["__init__"]).parameters if "__init__" in vars(base) else {}
        known |= {p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and parameters:
            break
    return known - {"self", "dim"}
