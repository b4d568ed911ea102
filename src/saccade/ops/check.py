"""Checks of shapes that operators share."""

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from saccade.errors import InputError

T = TypeVar("T")

__all__ = ["check_attention", "check_positive", "per_axis"]


def check_attention(query: Tensor, key: Tensor, value: Tensor, *, axes: int | None = None) -> None:
    """Raise InputError unless the shapes are (B, heads, *space, D), (B, kv_heads, *keys, D) and (..., E)."""
    shapes = {"query": query, "key": key, "value": value}
    for name, tensor in shapes.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}: attention takes floating-point tensors. Convert it first")
        if axes is not None and tensor.ndim != axes + 3:
            raise InputError(f"{name} is {_shape(tensor)}: give (B, heads, {'space, ' * axes}D)")
    if query.ndim < 4 or key.ndim != query.ndim or value.ndim != query.ndim:
        raise InputError(
            f"query is {_shape(query)}, key is {_shape(key)}, value is {_shape(value)}: each takes "
            "(B, heads, *space, D) with the same number of axes. Add the axes that are missing"
        )
    if key.shape[:-1] != value.shape[:-1]:
        raise InputError(
            f"value is {_shape(value)} but key is {_shape(key)}: both share (B, heads, *space). Give one value per key"
        )
    if query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1]:
        raise InputError(
            f"key is {_shape(key)} but query is {_shape(query)}: both share B and D. "
            "Give keys of the query's batch and width"
        )
    if query.shape[1] % key.shape[1]:
        raise InputError(
            f"query has {query.shape[1]} heads and key has {key.shape[1]}: each key head serves a "
            f"whole number of query heads. Give a number of key heads that divides {query.shape[1]}"
        )
    if len({t.dtype for t in shapes.values()}) > 1 or len({t.device for t in shapes.values()}) > 1:
        given = ", ".join(f"{name} is {t.dtype} on {t.device}" for name, t in shapes.items())
        raise TypeError(f"{given}: all three share one dtype and one device. Convert them first")


def check_positive(**values: int | tuple[int, ...]) -> None:
    """Raise InputError unless every value is an integer of at least 1, or a tuple of such.

    >>> check_positive(window_size=(7, 0))
    Traceback (most recent call last):
    saccade.errors.InputError: window_size is (7, 0): give an integer of at least 1, or one for each axis
    """
    for name, value in values.items():
        if not all(isinstance(v, int) and v >= 1 for v in (value if isinstance(value, (tuple, list)) else (value,))):
            raise InputError(f"{name} is {value}: give an integer of at least 1, or one for each axis")


def per_axis(name: str, value: T | Sequence[T], axes: int) -> tuple[T, ...]:
    """One value for each axis: a single one is repeated, a tuple must have the right length.

    >>> per_axis("window_size", 7, 2)
    (7, 7)
    """
    if not isinstance(value, (tuple, list)):
        return (value,) * axes  # type: ignore[return-value]
    if len(value) != axes:
        raise InputError(f"{name} is {tuple(value)}: the map has {axes} axes. Give one value, or {axes}")
    return tuple(value)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
