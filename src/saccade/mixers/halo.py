"""Halo attention (HaloNet, Vaswani et al., 2021, arXiv:2103.12731): blocks that see themselves and a halo around."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError
from saccade.mixers.mixer import Mixer, choose_heads, even_size, merge_heads, split_heads
from saccade.ops import Halo, QueryTables, sparse_attention, sparse_attention_weights

__all__ = ["HaloAttention"]

DEFAULT_BLOCK = 8  # tokens an axis, with a halo of 3, as in HaloNet H0 to H2


class HaloAttention(Mixer):
    """Softmax attention of blocks over themselves and a halo (HaloNet, Vaswani et al., 2021, arXiv:2103.12731).

    Keys outside the map are zeros that stay in the softmax, with the position term as their logit, as in HaloNet.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels.
        block_size: tokens of a block along each axis. None takes at most 8, so that an axis is cut into two or more
            blocks of about equal size; a size that is asked for and larger than the map is an error.
        clip_block: take the whole map as one block where block_size is larger, instead.
        halo_size: tokens that a block sees beyond itself on every side.
        stride: 1, or 2 to keep every second query along each axis: the output is then half the map, rounded up.
        avg_down: with stride 2, attend with all queries and average 2 x 2; an odd block does so in any case.
        dim_out: channels of the output; None keeps C.
        dim_head: width of queries and keys of a head; None takes dim_out / num_heads.
        axes: axes of space, which the position tables need to know; 2 for images.
        qkv_bias: give the projections to query, key and value a bias.
        scale_position: multiply the position term by dim_head^-0.5 too; the paper scales the products alone.
        out_proj: a linear layer after the heads are merged. HaloNet's block has its own and takes False.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        block_size: int | None = None,
        clip_block: bool = False,
        halo_size: int = 3,
        stride: int = 1,
        avg_down: bool = False,
        dim_out: int | None = None,
        dim_head: int | None = None,
        axes: int = 2,
        qkv_bias: bool = False,
        scale_position: bool = False,
        out_proj: bool = True,
    ) -> None:
        super().__init__(dim)
        if stride not in (1, 2):
            raise InputError(f"stride is {stride}: HaloNet's attention keeps every query (1) or every second one (2)")
        dim_out = dim if dim_out is None else dim_out
        block = DEFAULT_BLOCK if block_size is None else block_size
        self.num_heads = choose_heads(dim_out, num_heads)
        self.dim_head = dim_out // self.num_heads if dim_head is None else dim_head
        self.block_size = block_size
        self.clip_block = clip_block
        self.halo_size = halo_size
        self.pool = stride == 2 and (avg_down or block % 2 == 1)
        self.query_stride = 1 if self.pool else stride
        self.scale_position = scale_position
        self.q = nn.Linear(dim, self.num_heads * self.dim_head, bias=qkv_bias)
        self.kv = nn.Linear(dim, self.num_heads * self.dim_head + dim_out, bias=qkv_bias)  # by head: its key, its value
        rows = 2 * (block + 2 * halo_size) - 1
        self.tables = nn.ParameterList(torch.empty(rows, self.dim_head) for _ in range(axes))
        self.proj = nn.Linear(dim_out, dim_out) if out_proj else nn.Identity()
        for weight, std in [(self.q.weight, dim**-0.5), (self.kv.weight, dim**-0.5)]:
            nn.init.trunc_normal_(weight, std=std)
        for table in self.tables:
            nn.init.trunc_normal_(table, std=self.dim_head**-0.5)

    def mix(self, x: Tensor) -> Tensor:
        space = tuple(x.shape[1:-1])
        if len(space) != len(self.tables):
            raise InputError(
                f"x is {tuple(x.shape)}: the position tables are for {len(self.tables)} axes. Set axes={len(space)}"
            )
        query = split_heads(self.q(self._keep_queries(x)), self.num_heads)  # (B, heads, *space / stride, D)
        key, value = split_heads(self.kv(x), self.num_heads).split(
            [self.dim_head, self.kv.out_features // self.num_heads - self.dim_head], -1
        )
        # the projected map is padded, not x: a padded key is 0, and not the bias of the projection
        margin = [0, 0]
        for length in reversed(space):  # whole strides, then the halo
            margin += [self.halo_size, self.halo_size + length % self.query_stride]
        key, value = F.pad(key, margin), F.pad(value, margin)
        pattern, bias = self.pattern(space), self.position_bias()
        taps.record(
            self,
            "attention",
            lambda: self._without_margin(sparse_attention_weights(query, key, pattern, bias=bias), space),
        )
        out = self.proj(merge_heads(sparse_attention(query, key, value, pattern, bias=bias)))
        return _halve(out) if self.pool else out

    def pattern(self, space: tuple[int, ...]) -> Halo:
        """Blocks and halo for a map with these axes."""
        if self.block_size is None:
            sizes = [even_size(length, DEFAULT_BLOCK, fewest=2) for length in space]
            block = tuple(size + size % self.query_stride for size in sizes)  # whole strides
        else:
            whole = [length + length % self.query_stride for length in space]
            block = tuple(min(self.block_size, length) if self.clip_block else self.block_size for length in whole)
            if any(size > length for size, length in zip(block, whole)):
                raise InputError(
                    f"block_size is {self.block_size} and the map is {space}: a block must fit into the map. "
                    "Take a smaller block, block_size=None, which takes what fits, or clip_block=True"
                )
        return Halo(block, self.halo_size, padded=True, query_stride=self.query_stride, ragged=True)

    def position_bias(self) -> QueryTables:
        """The position term, unscaled unless asked for."""
        scale = self.dim_head**-0.5 if self.scale_position else 1.0
        return QueryTables([table * scale for table in self.tables])

    def _without_margin(self, weights: Tensor, space: tuple[int, ...]) -> Tensor:
        """(B, heads, N, M) over the map's own tokens: what falls on the zeros around it adds nothing to the output."""
        stride = self.query_stride
        inner = weights.unflatten(-1, tuple(length + length % stride + 2 * self.halo_size for length in space))
        for axis, length in enumerate(space):
            inner = inner.narrow(3 + axis, self.halo_size, length)
        return inner.flatten(3)

    def _keep_queries(self, x: Tensor) -> Tensor:
        if self.query_stride == 1:
            return x
        return x[(slice(None), *(slice(None, None, 2) for _ in self.tables))]


def _halve(x: Tensor) -> Tensor:
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[x.ndim - 2]
    return pool(x.movedim(-1, 1), 2, 2, ceil_mode=True).movedim(1, -1)
