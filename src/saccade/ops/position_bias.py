"""Relative-position terms that are added to attention logits, read from tables by the offset of key and query.

Offset 0 stands in the middle row of a table. What the offset counts is the pattern's to say (`Pattern.offset`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import InputError

__all__ = ["PositionBias", "QueryTables", "RelativeTable", "resize_relative_table"]

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class PositionBias(ABC):
    """A term added to the logits that depends on relative position, and perhaps on the query.

    Attributes:
        reads_query: whether it depends on the query; otherwise tiles with the same offsets share it.
    """

    reads_query = True

    @abstractmethod
    def __call__(self, query: Tensor, offset: Tensor) -> Tensor:
        """(..., heads, Q, K) or broadcastable, from query (..., T, heads, Q, D) and offset (axes, T, Q, K)."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All that may learn."""

    @abstractmethod
    def like(self, tensors: Sequence[Tensor]) -> "PositionBias":
        """The same term with other `tensors()`."""

    def for_heads(self, heads: Sequence[int]) -> "PositionBias":
        """The term of some of the heads."""
        return self


class RelativeTable(PositionBias):
    """One learned number for each head and offset (Swin, 2021, arXiv:2103.14030).

    Args:
        table: (heads, *rows), rows odd on each axis: 2 * window - 1 holds every offset inside a window.
    """

    reads_query = False

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.table,)

    def like(self, tensors: Sequence[Tensor]) -> "RelativeTable":
        return RelativeTable(*tensors)

    def for_heads(self, heads: Sequence[int]) -> "RelativeTable":
        return RelativeTable(self.table[list(heads)])

    def __call__(self, query: Tensor, offset: Tensor) -> Tensor:
        heads, *rows = self.table.shape
        _check_rows(rows, offset)
        number = torch.zeros_like(offset[0])
        for length, along in zip(rows, offset):
            number = number * length + (along + length // 2).clamp(0, length - 1)
        return self.table.reshape(heads, -1)[:, number].transpose(0, 1)  # (T, heads, Q, K)


class QueryTables(PositionBias):
    """The query's product with a learned vector for each offset, summed over the axes (HaloNet, 2021,
    arXiv:2103.12731; Shaw et al., 2018, arXiv:1803.02155). All heads share the tables.

    Args:
        tables: for each axis (rows, D), rows odd.
    """

    def __init__(self, tables: Sequence[Tensor]) -> None:
        self.tables = tuple(tables)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.tables

    def like(self, tensors: Sequence[Tensor]) -> "QueryTables":
        return QueryTables(tensors)

    def __call__(self, query: Tensor, offset: Tensor) -> Tensor:
        _check_rows([len(table) for table in self.tables], offset)
        total = torch.zeros((), dtype=query.dtype, device=query.device)
        for table, along in zip(self.tables, offset):
            products = query @ table.to(query.dtype).T  # (..., T, heads, Q, rows)
            number = (along + len(table) // 2).clamp(0, len(table) - 1).unsqueeze(1)  # (T, 1, Q, K)
            total = total + products.gather(-1, number.expand(*products.shape[:-1], number.shape[-1]))
        return total


def resize_relative_table(table: Tensor, rows: Sequence[int]) -> Tensor:
    """Interpolate biases for relative positions, (heads, 2 H - 1, 2 W - 1), to another window, linearly on each axis.

    Args:
        table: as `RelativeTable` takes it.
        rows: of the new table, 2 H' - 1 and 2 W' - 1.
    """
    if tuple(table.shape[1:]) == tuple(rows):
        return table
    mode = _LINEAR[table.ndim - 1]
    return F.interpolate(table.unsqueeze(0), tuple(rows), mode=mode, align_corners=False).squeeze(0)


def _check_rows(rows: Sequence[int], offset: Tensor) -> None:
    if len(rows) != len(offset) or any(length % 2 == 0 for length in rows):
        raise InputError(
            f"the tables have {tuple(rows)} rows for {len(offset)} axes: "
            "give an odd number for each axis, 2 * window - 1"
        )
