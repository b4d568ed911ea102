"""Softmax attention over a pattern, as a mixer: global attention, windows, grids and neighborhoods."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError
from saccade.mixers.mixer import (
    Mixer,
    append_zeros,
    choose_heads,
    crop,
    crop_matrix,
    even_size,
    merge_heads,
    split_heads,
)
from saccade.ops import (
    Global,
    Grid,
    Neighborhood,
    Pattern,
    PositionBias,
    RelativeTable,
    Window,
    softmax_attention,
    sparse_attention,
    sparse_attention_weights,
)
from saccade.ops.check import check_positive, per_axis
from saccade.ops.position_bias import resize_relative_table

__all__ = [
    "Attention",
    "GridAttention",
    "NeighborhoodAttention",
    "PatternAttention",
    "TableAttention",
    "WindowAttention",
]

Sizes = int | tuple[int, ...]
DEFAULT_WINDOW = 7  # tokens an axis, as in Swin, MaxViT and NAT


class PatternAttention(Mixer):
    """Multi-head softmax attention in which a pattern says which keys a query may see.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels.
        qkv_bias: give the projection to query, key and value a bias.
        scale: factor of q.k; None takes D^-0.5.
        proj_drop: dropout after the output projection.
        impl: as in `sparse_attention`.

    Prefix tokens are served: they see every token and are seen by every query.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        self.num_heads = choose_heads(dim, num_heads)
        self.scale = scale
        self.impl = impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @abstractmethod
    def pattern(self, space: tuple[int, ...]) -> Pattern:
        """The pattern for a map with these axes."""

    def position_bias(self, space: tuple[int, ...]) -> PositionBias | None:
        """What is added to the logits on a map with these axes."""
        return None

    def mix(self, x: Tensor) -> Tensor:
        query, key, value = self._project(x)
        space = tuple(x.shape[1:-1])
        pattern, bias = self.pattern(space), self.position_bias(space)
        taps.record(
            self, "attention", lambda: sparse_attention_weights(query, key, pattern, bias=bias, scale=self.scale)
        )
        out = sparse_attention(query, key, value, pattern, bias=bias, scale=self.scale, impl=self.impl)
        return self._finish(out)

    def mix_with_prefix(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = self._project(x)  # (B, heads, *space, D)
        prefix_query, prefix_key, prefix_value = self._project(prefix)  # (B, heads, P, D)
        space = tuple(x.shape[1:-1])
        pattern, bias = self.pattern(space), self.position_bias(space)
        all_keys = torch.cat([prefix_key, key.flatten(2, -2)], 2)
        all_values = torch.cat([prefix_value, value.flatten(2, -2)], 2)

        def attention() -> Tensor:
            everything = sparse_attention_weights(
                prefix_query, prefix_key, Global(), extra_key=key.flatten(2, -2), scale=self.scale
            )  # (B, heads, P, N + P): the map stands first
            top = everything.roll(prefix.shape[1], -1)
            rest = sparse_attention_weights(query, key, pattern, bias=bias, extra_key=prefix_key, scale=self.scale)
            return torch.cat([top, rest], 2)

        taps.record(self, "attention", attention)
        out = sparse_attention(
            query,
            key,
            value,
            pattern,
            bias=bias,
            extra_key=prefix_key,
            extra_value=prefix_value,
            scale=self.scale,
            impl=self.impl,
        )
        seen = softmax_attention(prefix_query, all_keys, all_values, scale=self.scale)
        return self._finish(out), self._finish(seen)

    def _project(self, x: Tensor) -> list[Tensor]:
        return [split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1)]

    def _finish(self, out: Tensor) -> Tensor:
        projected: Tensor = self.proj_drop(self.proj(merge_heads(out)))
        return projected


class Attention(PatternAttention):
    """Softmax attention of every token over all tokens (Vaswani et al., 2017, arXiv:1706.03762)."""

    def pattern(self, space: tuple[int, ...]) -> Pattern:
        return Global()


class TableAttention(PatternAttention):
    """Attention inside blocks of a given size, with a learned bias for each head and relative position.

    Args:
        window_size: tokens of a block along each axis. None takes at most 7, so that an axis is cut into as few
            blocks as possible of about equal size; a size that is asked for and larger than the map is an error.
        num_windows: cut every axis into so many blocks instead, whatever the map.
        table_size: tokens along each axis of the block for which the table is learned; on other blocks it is
            interpolated. None takes window_size, and 7 where that is None; smaller blocks then read its middle, and
            with num_windows it is interpolated.
        axes: axes of space, which the table needs to know; 2 for images.
        position_bias: learn a number for each head and offset inside a block (Swin's relative position bias).
        options: as for PatternAttention.
    """

    default_window = DEFAULT_WINDOW

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        window_size: Sizes | None = None,
        num_windows: int | None = None,
        table_size: Sizes | None = None,
        axes: int = 2,
        position_bias: bool = True,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, scale=scale, proj_drop=proj_drop, impl=impl)
        if num_windows is not None:
            check_positive(num_windows=num_windows)
            if window_size is not None:
                raise InputError(
                    f"window_size is {window_size} and num_windows is {num_windows}: one follows from the other and "
                    "the map. Give one; table_size says for which window the table is learned"
                )
        self.window_size = window_size
        self.num_windows = num_windows
        self.interpolates = table_size is not None or num_windows is not None
        self.position_bias_table = None
        if position_bias:
            name, learned = ("window_size", window_size) if table_size is None else ("table_size", table_size)
            sizes = per_axis(name, self.default_window if learned is None else learned, axes)
            self.position_bias_table = nn.Parameter(torch.empty(self.num_heads, *_rows(sizes)))
            nn.init.trunc_normal_(self.position_bias_table, std=0.02)

    def position_bias(self, space: tuple[int, ...]) -> PositionBias | None:
        table: Tensor | None = self.position_bias_table
        if table is not None and self.interpolates and table.ndim == len(space) + 1:
            table = resize_relative_table(table, _rows(self.window(space)))
        return None if table is None else RelativeTable(table)

    def window(self, space: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens of a block along each axis of a map."""
        if self.num_windows is not None:
            return tuple(-(-length // self.num_windows) for length in space)
        return fit_window("window_size", self.window_size, space, largest=self.default_window)


class WindowAttention(TableAttention):
    """Softmax attention inside non-overlapping windows (Swin, Liu et al., 2021, arXiv:2103.14030).

    A map that the window does not divide has smaller windows at its end.

    Args:
        shift: move the partition by half a window, as every other layer of Swin does.
        padded: append zeros to the map instead, up to whole windows, before it is projected; they are attended to, as
            in official code of Swin and DaViT. Serves no prefix tokens.
    """

    def __init__(  # type: ignore[no-untyped-def]
        self, dim: int, num_heads: int | None = None, *, shift: bool = False, padded: bool = False, **options
    ) -> None:
        super().__init__(dim, num_heads, **options)
        self.shift = shift
        self.padded = padded

    def pattern(self, space: tuple[int, ...]) -> Pattern:
        sizes = self.window(space)
        return Window(sizes, shift=tuple(size // 2 if self.shift else 0 for size in sizes), ragged=True)

    def mix(self, x: Tensor) -> Tensor:
        space, sizes = tuple(x.shape[1:-1]), self._sizes(tuple(x.shape[1:-1]))
        x = append_zeros(x, [-length % size if self.padded else 0 for length, size in zip(space, sizes)])
        padded = tuple(x.shape[1:-1])
        pattern, bias = self.pattern(padded), self.position_bias(padded)

        def attention() -> Tensor:
            query, key, _ = self._project(x)
            weights = sparse_attention_weights(query, key, pattern, bias=bias, scale=self.scale)
            return crop_matrix(weights, padded, space)

        taps.record(self, "attention", attention)
        if bias is None and not self.shift and not any(length % size for length, size in zip(padded, sizes)):
            query, key, value = self._project(_cut(x, sizes))  # cut before projecting: a third of the copies
            out = self._finish(sparse_attention(query, key, value, Global(), scale=self.scale, impl=self.impl))
            return crop(_join(out, padded), space)
        query, key, value = self._project(x)
        out = sparse_attention(query, key, value, pattern, bias=bias, scale=self.scale, impl=self.impl)
        return self._finish(crop(out, space, first=2))

    def mix_with_prefix(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        if self.padded:
            raise InputError(
                f"padded is True and there are {prefix.shape[1]} prefix tokens: padded windows serve none. Take "
                "padded=False, which has smaller windows at the end of the map"
            )
        return super().mix_with_prefix(x, prefix)

    def _sizes(self, space: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens of a window along each axis."""
        if self.padded and self.window_size is not None:
            return per_axis("window_size", self.window_size, len(space))
        return self.window(space)


class GridAttention(TableAttention):
    """Softmax attention over a uniform grid that spans the map (MaxViT, Tu et al., 2022, arXiv:2204.01697)."""

    def pattern(self, space: tuple[int, ...]) -> Pattern:
        return Grid(self.window(space), ragged=True)


class NeighborhoodAttention(PatternAttention):
    """Softmax attention of every token over its nearest neighbours (NAT, Hassani et al., 2022, arXiv:2204.07143).

    Strides are those of generalized neighborhood attention (2025, arXiv:2504.16922).

    Args:
        window_size: tokens that a query sees along each axis. None takes 7, half of an axis of 8 to 13 tokens, and
            the whole of a smaller one; a size that is asked for and larger than the map is an error.
        stride, dilation, causal: as in `saccade.ops.Neighborhood`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        window_size: Sizes | None = None,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        causal: bool | tuple[bool, ...] = False,
        qkv_bias: bool = True,
        scale: float | None = None,
        proj_drop: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, scale=scale, proj_drop=proj_drop, impl=impl)
        self.window_size = window_size
        self.stride = stride
        self.dilation = dilation
        self.causal = causal

    def pattern(self, space: tuple[int, ...]) -> Pattern:
        sizes = self.window_size
        if sizes is None:
            dilation = per_axis("dilation", self.dilation, len(space))
            groups = [max(1, length // d) for length, d in zip(space, dilation)]
            sizes = tuple(
                even_size(length, DEFAULT_WINDOW) if length < 2 * DEFAULT_WINDOW else DEFAULT_WINDOW
                for length in groups
            )
        return Neighborhood(sizes, self.stride, self.dilation, self.causal)


def _cut(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """(B, *space, C) to windows, (B T, *sizes, C)."""
    axes = len(sizes)
    for axis in reversed(range(axes)):
        x = x.unflatten(axis + 1, (-1, sizes[axis]))
    return x.permute(0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), -1).flatten(0, axes)


def _join(windows: Tensor, space: tuple[int, ...]) -> Tensor:
    """Windows (B T, *sizes, C) back to (B, *space, C)."""
    sizes, axes = windows.shape[1:-1], len(space)
    x = windows.unflatten(0, (-1, *(length // size for length, size in zip(space, sizes))))
    x = x.permute(0, *(axis for pair in zip(range(1, axes + 1), range(axes + 1, 2 * axes + 1)) for axis in pair), -1)
    for axis in range(1, axes + 1):
        x = x.flatten(axis, axis + 1)
    return x


def fit_window(
    name: str, size: Sizes | None, space: tuple[int, ...], *, largest: int = DEFAULT_WINDOW
) -> tuple[int, ...]:
    """One size for each axis: as asked, which must fit the map, or at most the largest.

    >>> fit_window("window_size", None, (4, 8))
    (4, 4)
    """
    if size is None:
        return tuple(even_size(length, largest) for length in space)
    sizes = per_axis(name, size, len(space))
    if any(s > length for s, length in zip(sizes, space)):
        raise InputError(
            f"{name} is {sizes} and the map is {space}: a window must fit into the map. Take a smaller window, "
            f"or {name}=None, which takes what fits"
        )
    return sizes


def _rows(sizes: Sequence[int]) -> tuple[int, ...]:
    """Rows of a table of relative positions inside a block, along each axis."""
    return tuple(2 * size - 1 for size in sizes)
