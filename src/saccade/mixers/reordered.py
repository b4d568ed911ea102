"""Attention whose heads read the tokens along axes of their own and keep blocks (PAROAttention, 2025,
arXiv:2506.16054)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError
from saccade.mixers.mixer import Mixer, choose_heads, even_size, merge_heads, split_heads
from saccade.ops import (
    OrderChoice,
    Selection,
    axis_order,
    axis_orders,
    choose_axis_order,
    quantized_attention,
    reorder,
    restore,
    select_mask,
    select_top_k,
    softmax_attention,
    sparse_attention,
    static_blocks,
)
from saccade.ops.check import check_positive
from saccade.ops.selection import num_blocks
from saccade.ops.softmax_attention import attention_weights

__all__ = ["ReorderedAttention"]

LARGEST_BLOCK, FEWEST_BLOCKS = 64, 8


class ReorderedAttention(Mixer):
    """Softmax attention whose heads read the axes in orders of their own and keep some blocks (PARO, arXiv:2506.16054).

    Which order a head takes, and which blocks it keeps, is the same for all inputs. It starts with head h in order h of
    `axis_orders`, again from the first when all are taken, and with the blocks nearest the diagonal; `calibrate` sees
    a few inputs and chooses both. Prefix tokens are served: they stay first, see every token and are seen by all.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels.
        block_size: tokens of a block of the sequence. None cuts it into eight, or more of at most 64 tokens.
        density: share of the blocks that a head keeps.
        space: axes of the map to calibrate for, which are then the only ones served: the kept blocks become part of
            the state. None serves all, without calibration.
        bits: round as `quantized_attention` does, in blocks of block_size or 64 tokens, to integers of so many bits;
            None leaves numbers as they are. It is a simulation, with N x M weights.
        qkv_bias: give the projection to query, key and value a bias.
        scale: factor of q.k; None takes D^-0.5.
        impl: as in `sparse_attention`, without bits.
    """

    order: Tensor
    kept: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        block_size: int | None = None,
        density: float = 0.3,
        space: tuple[int, ...] | None = None,
        bits: int | None = None,
        qkv_bias: bool = True,
        scale: float | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        check_positive(block_size=1 if block_size is None else block_size)
        if not 0 < density <= 1:
            raise InputError(f"density is {density}: give a share above 0 and at most 1")
        self.num_heads = choose_heads(dim, num_heads)
        self.block_size = block_size
        self.density = density
        self.space = space
        self.bits = bits
        self.scale = scale
        self.impl = impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("order", torch.arange(self.num_heads))
        self.register_buffer("kept", None if space is None else self._near_blocks(space).repeat(self.num_heads, 1, 1))

    def mix(self, x: Tensor) -> Tensor:
        return self._mix(x, x.new_empty(len(x), 0, self.dim))[0]

    def mix_with_prefix(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        return self._mix(x, prefix)

    def size(self, space: tuple[int, ...]) -> int:
        """Tokens of a block of a map's sequence."""
        tokens = torch.Size(space).numel()
        if self.block_size is None:
            return even_size(tokens, LARGEST_BLOCK, fewest=FEWEST_BLOCKS)
        return min(self.block_size, tokens)

    def token_order(self, space: tuple[int, ...]) -> Tensor:
        """(heads, N) the row-major token that each head has at each place."""
        table = torch.stack([axis_order(space, axes, self.order.device) for axes in axis_orders(len(space))])
        return table[self.order % len(table)]

    def selection(self, space: tuple[int, ...]) -> Selection:
        """The blocks that are kept of each head's sequence."""
        self._check_space(space)
        kept = self._near_blocks(space) if self.kept is None else self.kept
        size = self.size(space)
        return select_mask(kept.unsqueeze(0), query_block=size, key_block=size, ragged=True)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> OrderChoice:
        """Choose orders and blocks by the attention of a few maps (samples, *space, C), which is formed whole."""
        space = tuple(x.shape[1:-1])
        if self.kept is None:
            raise InputError("this mixer has no place to keep blocks: build it with space=, the axes of its maps")
        self._check_space(space)
        query, key, _ = (part.flatten(2, -2) for part in self._project(x))
        weights = attention_weights(query, key, None, self._scale(query))
        size = self.size(space)
        choice = choose_axis_order(weights, space, block_size=size)
        self.order.copy_(choice.order)
        order = self.token_order(space)
        self.kept.copy_(static_blocks(reorder(reorder(weights, order).mT, order).mT, size, density=self.density))
        return choice

    def _mix(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        space = tuple(x.shape[1:-1])
        order, selection = self.token_order(space), self.selection(space)
        tokens = [reorder(part.flatten(2, -2), order) for part in self._project(x)]  # (B, heads, N, D)
        first = self._project(prefix)  # (B, heads, P, D)
        query, key, value = [torch.cat(pair, 2) for pair in zip(first, tokens)] if prefix.shape[1] else tokens
        taps.record(self, "attention", lambda: self._attention(query, key, order, selection))
        if self.bits is not None:
            mixed = self._quantized(query, key, value, order, selection)
            seen, out = mixed[:, :, : prefix.shape[1]], mixed[:, :, prefix.shape[1] :]
        else:
            out = sparse_attention(
                tokens[0],
                tokens[1],
                tokens[2],
                selection,
                extra_key=first[1] if prefix.shape[1] else None,
                extra_value=first[2] if prefix.shape[1] else None,
                scale=self.scale,
                impl=self.impl,
            )
            seen = softmax_attention(first[0], key, value, scale=self.scale)
        out = restore(out, order).unflatten(2, space)
        return self.proj(merge_heads(out)), self.proj(merge_heads(seen))

    def _attention(self, query: Tensor, key: Tensor, order: Tensor, selection: Selection) -> Tensor:
        """(B, heads, P + N, P + N), tokens in row-major order behind the prefix."""
        if self.bits is None:
            hidden = torch.zeros((), device=key.device).where(self._visible(key, order, selection), -torch.inf)
            weights = attention_weights(query, key, hidden, self._scale(query))
        else:
            eye = torch.eye(key.shape[2], dtype=key.dtype, device=key.device)  # ones are not rounded
            weights = self._quantized(query, key, eye.expand(*key.shape[:2], -1, -1), order, selection)
        prefix = torch.arange(key.shape[2] - order.shape[1], device=order.device)
        places = torch.cat([prefix.expand(len(order), -1), order + len(prefix)], 1)
        return restore(restore(weights, places).mT, places).mT

    def _quantized(self, query: Tensor, key: Tensor, value: Tensor, order: Tensor, selection: Selection) -> Tensor:
        """Over prefix and sequence as one, whose blocks are cut from the first prefix token on."""
        assert self.bits is not None
        return quantized_attention(
            query,
            key,
            value,
            mask=self._visible(key, order, selection),
            bits=self.bits,
            block_size=LARGEST_BLOCK if self.block_size is None else self.block_size,
            scale=self.scale,
        )

    def _visible(self, key: Tensor, order: Tensor, selection: Selection) -> Tensor:
        """(1, heads | 1, P + N, P + N): the kept blocks, behind a prefix that sees all and is seen by all."""
        tokens = order.shape[1]
        prefix = key.shape[2] - tokens
        return F.pad(selection.mask((tokens,)), (prefix, 0, prefix, 0), value=True)

    def _near_blocks(self, space: tuple[int, ...]) -> Tensor:
        """(1, T, T), the share of `density` nearest to the diagonal, as many in each row."""
        count = num_blocks((torch.Size(space).numel(),), self.size(space))
        place = torch.arange(count, device=self.order.device)
        near = -(place.unsqueeze(1) - place).abs().float()
        return select_top_k(near[None, None], max(1, round(self.density * count))).pairs((count,))[0]

    def _check_space(self, space: tuple[int, ...]) -> None:
        if self.space is not None and tuple(self.space) != space:
            raise InputError(
                f"the map is {space} and the blocks are kept for {tuple(self.space)}. Build it with space={space}, "
                "or with space=None, which keeps the blocks nearest the diagonal of any map"
            )

    def _scale(self, query: Tensor) -> float:
        return query.shape[-1] ** -0.5 if self.scale is None else self.scale

    def _project(self, x: Tensor) -> list[Tensor]:
        return [split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1)]
