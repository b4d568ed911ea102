"""Aggregated attention and the length-scaled cosine attention that it is made of (TransNeXt, Shi, 2023,
arXiv:2311.17132)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError
from saccade.mixers.mixer import Mixer, choose_heads, merge_heads, probe, split_heads
from saccade.ops import (
    aggregated_attention,
    aggregated_attention_weights,
    pooled_coordinates,
    softmax_attention,
    window_lengths,
)
from saccade.ops.aggregated_attention import odd_window
from saccade.ops.check import check_positive, per_axis
from saccade.ops.softmax_attention import attention_weights

__all__ = ["AggregatedAttention", "LengthScaledAttention", "rename"]

Sizes = int | tuple[int, ...]
POOLS: tuple[Callable[..., Tensor], ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
TEMPERATURE = math.log(math.expm1(1 / 0.24))  # softplus of it is 1 / 0.24
POSITION_WIDTH = 512


class _CosineAttention(Mixer):
    """Parts of both mixers: unit queries with a learned part, a temperature that follows the number of keys, and a
    position bias that a small network makes of log-spaced coordinates."""

    def __init__(self, dim: int, num_heads: int | None, pretrain_size: Sizes | None, axes: int) -> None:
        super().__init__(dim)
        if axes not in (1, 2, 3):
            raise InputError(f"axes is {axes}: give 1, 2 or 3 axes of space")
        self.num_heads = heads = choose_heads(dim, num_heads)
        self.axes = axes
        self.pretrain_size = None if pretrain_size is None else per_axis("pretrain_size", pretrain_size, axes)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), TEMPERATURE))
        self.query_embedding = nn.Parameter(_small(heads, 1, dim // heads))
        self.cpb_fc1 = nn.Linear(axes, POSITION_WIDTH)
        self.cpb_fc2 = nn.Linear(POSITION_WIDTH, heads)

    def scale_query(self, query: Tensor, keys: Tensor | int) -> Tensor:
        """Unit queries (B, heads, N, D) to those of the logits; `keys`, (N,) or one number, is how many each sees."""
        length = torch.as_tensor(keys, device=query.device).to(query.dtype).log().view(-1, 1)
        return (query + self.query_embedding) * F.softplus(self.temperature) * length

    def position_bias(self, space: tuple[int, ...], cells: tuple[int, ...]) -> Tensor:
        """(heads, N, P) on the logits of the tokens of a map and its pooled cells."""
        weight = self.cpb_fc1.weight
        table, rows = pooled_coordinates(space, cells, self.pretrain_size, weight.device)
        bias = self.cpb_fc2(self.cpb_fc1(table.to(weight.dtype)).relu())  # (U_1, U_2 ..., heads)
        places = []
        for axis, row in enumerate(rows):
            shape = [1] * (2 * self.axes)
            shape[axis], shape[self.axes + axis] = row.shape
            places.append(row.view(shape))
        by_pair = bias[tuple(places)]  # (*space, *cells, heads)
        return by_pair.flatten(self.axes, -2).flatten(0, self.axes - 1).movedim(-1, 0)

    def _check_axes(self, x: Tensor) -> None:
        if x.ndim - 2 != self.axes:
            raise InputError(f"x is {tuple(x.shape)}: the position bias is for {self.axes} axes. Set axes={x.ndim - 2}")


class AggregatedAttention(_CosineAttention):
    """Softmax attention over a window around each token and a pooled map at once (TransNeXt, Shi, 2023,
    arXiv:2311.17132).

    Queries and keys are unit vectors, and logits grow with the log of the number of keys. After the softmax the query
    adds weights of its own to the values of the window, so that rows of the token matrix need not sum to 1. In that
    matrix the share of a pooled cell is spread evenly over its tokens.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels. TransNeXt has one for each 24.
        window_size: tokens of the window along each axis, odd; it is clipped at the border.
        sr_ratio: tokens of a pooled cell along each axis; TransNeXt takes 8, 4 and 2 from its first stage to the third.
        pool_size: cells along each axis, one number or one for each, in place of sr_ratio: cost is then linear in the
            map.
        pretrain_size: tokens along each axis of the map for which the position bias is scaled; None takes the map
            at hand.
        qkv_bias: give the projections to query, key and value a bias.
        proj_drop: dropout after the output projection.
        axes: axes of space, which the position bias needs to know; 2 for images.
        impl: as in `saccade.ops.aggregated_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        window_size: Sizes = 3,
        sr_ratio: int = 4,
        pool_size: Sizes | None = None,
        pretrain_size: Sizes | None = None,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        axes: int = 2,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, pretrain_size, axes)
        check_positive(sr_ratio=sr_ratio, pool_size=1 if pool_size is None else pool_size)
        self.window_size = odd_window(window_size, axes)
        heads, places = self.num_heads, math.prod(self.window_size)
        self.sr_ratio = sr_ratio
        self.pool_size = None if pool_size is None else per_axis("pool_size", pool_size, axes)
        self.impl = impl
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.sr = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)  # of tokens and of pooled cells
        self.relative_pos_bias_local = nn.Parameter(_small(heads, places, std=0.0004))
        self.learnable_tokens = nn.Parameter(_small(heads, dim // heads, places))
        self.learnable_bias = nn.Parameter(torch.zeros(heads, 1, places))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor) -> Tensor:
        self._check_axes(x)
        space = tuple(x.shape[1:-1])
        cells = self.cells(space)
        unit = F.normalize(split_heads(self.q(x), self.num_heads), dim=-1).flatten(2, -2)  # (B, heads, N, D)
        seen = window_lengths(space, self.window_size, x.device).flatten() + math.prod(cells)
        query = self.scale_query(unit, seen).unflatten(2, space)
        key, value = self._keys(x)
        pooled_key, pooled_value = self._keys(self.pool(x, cells).flatten(1, -2))  # (B, heads, P, D)
        options = {
            "window_bias": self.relative_pos_bias_local.unflatten(1, self.window_size),
            "pooled_bias": self.position_bias(space, cells),
            "window_weights": (unit @ self.learnable_tokens + self.learnable_bias).unflatten(2, space),
        }

        def attention() -> Tensor:
            window, pooled = aggregated_attention_weights(
                query, key, pooled_key, self.window_size, scale=1.0, **options
            )
            spread = probe(lambda tokens: _pool(tokens, cells), space, x[..., :1])[0]  # (P, N)
            return window + pooled @ spread.to(pooled.dtype)

        taps.record(self, "attention", attention)
        out = aggregated_attention(
            query, key, value, pooled_key, pooled_value, self.window_size, scale=1.0, impl=self.impl, **options
        )
        projected: Tensor = self.proj_drop(self.proj(merge_heads(out)))
        return projected

    def cells(self, space: tuple[int, ...]) -> tuple[int, ...]:
        """Pooled cells along each axis of a map."""
        if self.pool_size is None:
            return tuple(max(1, length // self.sr_ratio) for length in space)
        if any(size > length for size, length in zip(self.pool_size, space)):
            raise InputError(
                f"pool_size is {self.pool_size} and the map is {space}: a cell has a token at least. Take a smaller "
                "pool_size, or sr_ratio, which takes what fits"
            )
        return self.pool_size

    def pool(self, x: Tensor, cells: tuple[int, ...]) -> Tensor:
        """(B, *space, C) to (B, *cells, C), before the projection to keys and values."""
        pooled: Tensor = self.norm(_pool(F.gelu(self.sr(x)), cells))
        return pooled

    def _keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key, value = (split_heads(part, self.num_heads) for part in self.kv(x).chunk(2, -1))
        return F.normalize(key, dim=-1), value


class LengthScaledAttention(_CosineAttention):
    """Softmax attention of all tokens by cosines that grow with the log of their number (TransNeXt, Shi, 2023,
    arXiv:2311.17132; its last stage).

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels. TransNeXt has one for each 24.
        pretrain_size, qkv_bias, proj_drop, axes: as in `AggregatedAttention`.
        impl: as in `saccade.ops.softmax_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        pretrain_size: Sizes | None = None,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        axes: int = 2,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim, num_heads, pretrain_size, axes)
        self.impl = impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor) -> Tensor:
        self._check_axes(x)
        space = tuple(x.shape[1:-1])
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(x.flatten(1, -2)).chunk(3, -1))
        query = self.scale_query(F.normalize(query, dim=-1), math.prod(space))
        key, bias = F.normalize(key, dim=-1), self.position_bias(space, space)
        taps.record(self, "attention", lambda: attention_weights(query, key, bias, 1.0))
        out = softmax_attention(query, key, value, bias=bias, scale=1.0, impl=self.impl)
        projected: Tensor = self.proj_drop(self.proj(merge_heads(out)))
        return projected.unflatten(1, space)


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names and shapes of TransNeXt to ours, of a layer or a whole network: its 1 x 1 convolution is a linear
    layer, and the depthwise convolution of its feed-forward network needs no module of its own."""
    renamed = {}
    for name, tensor in state.items():
        is_reduction = f".{name}".endswith(".sr.weight")
        renamed[name.replace("dwconv.dwconv.", "dwconv.")] = tensor.flatten(1) if is_reduction else tensor
    return renamed


def _pool(x: Tensor, cells: tuple[int, ...]) -> Tensor:
    """Adaptive average of a channels-last map."""
    return POOLS[len(cells) - 1](x.movedim(-1, 1), cells).movedim(1, -1)


def _small(*shape: int, std: float = 0.02) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(shape), std=std)
