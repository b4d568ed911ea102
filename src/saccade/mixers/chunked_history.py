"""Attention of a video that is made chunk by chunk to the frames so far (Light Forcing, 2026, arXiv:2602.04789)."""

from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.mixers.mixer import Mixer, choose_heads, even_size, merge_heads, split_heads
from saccade.ops import Global, Pattern, grow_sparsity, select_history, sparse_attention, sparse_attention_weights
from saccade.ops.check import check_positive, per_axis

__all__ = ["ChunkedHistoryAttention"]

CHUNKS = 4
LARGEST_SIDE, FEWEST_BLOCKS = 8, 2  # of a block along an axis of a frame

History = tuple[Tensor, Tensor]


class ChunkedHistoryAttention(Mixer):
    """Softmax attention of chunks of frames to themselves and to the best of all before (Light Forcing, 2602.04789).

    The first axis of the map is time. Chunks of it are made one after the other, so that none sees a later one: the
    first chunk is dense, and each block of a later one chooses frames, then blocks in these, fewer from chunk to chunk.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels. Each head chooses for itself.
        chunk_frames: frames of a chunk, the last of which may be shorter; None cuts time in four.
        block_size: tokens of a block along each further axis, one number or one for each axis; None takes at most 8,
            and cuts such an axis in two at least.
        sparsity: mean share of the pairs of blocks that chunks after the first leave out.
        base: as in `saccade.ops.grow_sparsity`.
        frames, sink_frames, recent_frames, whole_chunk: as in `saccade.ops.select_history`.
        qkv_bias: give the projection to query, key and value a bias.
        scale: factor of q.k; None takes D^-0.5.
        impl: as in `sparse_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        chunk_frames: int | None = None,
        block_size: int | tuple[int, ...] | None = None,
        sparsity: float = 0.75,
        base: float | None = None,
        frames: int | None = 6,
        sink_frames: int = 1,
        recent_frames: int = 1,
        whole_chunk: bool = False,
        qkv_bias: bool = True,
        scale: float | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        check_positive(chunk_frames=1 if chunk_frames is None else chunk_frames)
        grow_sparsity(2, sparsity, base=base)  # whose errors are due here
        self.num_heads = choose_heads(dim, num_heads)
        self.chunk_frames = chunk_frames
        self.block_size = block_size
        self.sparsity = sparsity
        self.base = base
        self.frames = frames
        self.sink_frames = sink_frames
        self.recent_frames = recent_frames
        self.whole_chunk = whole_chunk
        self.scale = scale
        self.impl = impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def mix(self, x: Tensor) -> Tensor:
        query, key, value = self._project(x)  # (B, heads, frames, *space, D)
        chunks = [
            (query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], sparsity)
            for start, stop, sparsity in self.schedule(x.shape[1])
        ]
        patterns = [self.pattern(q, k, sparsity) for q, k, _, sparsity in chunks]
        taps.record(
            self,
            "attention",
            lambda: torch.cat([self._attention(q, k, each, key) for (q, k, _, _), each in zip(chunks, patterns)], 2),
        )
        outs = [self._attend(q, k, v, each) for (q, k, v, _), each in zip(chunks, patterns)]
        return self._finish(torch.cat(outs, 2))

    def extend(self, x: Tensor, history: History | None = None, *, sparsity: float = 0.0) -> tuple[Tensor, History]:
        """Make one chunk (B, frames, *space, C) of a video in which nothing later is known yet.

        Args:
            x: the chunk.
            history: what the call for the chunk before returned; None for the first.
            sparsity: of this chunk, from `saccade.ops.grow_sparsity`.

        Returns: the chunk, mixed, and the history with its keys and values appended.
        """
        query, key, value = self._project(x)
        if history is not None:
            key, value = torch.cat([history[0], key], 2), torch.cat([history[1], value], 2)
        return self._finish(self._attend(query, key, value, self.pattern(query, key, sparsity))), (key, value)

    def schedule(self, frames: int) -> list[tuple[int, int, float]]:
        """First frame, end and sparsity of each chunk of a video."""
        frames = index(frames)  # a compiler's symbol would end up in floats, which cannot be traced
        size = even_size(frames, frames, fewest=CHUNKS) if self.chunk_frames is None else self.chunk_frames
        bounds = [(start, min(start + size, frames)) for start in range(0, frames, size)]
        costs = [(stop - start) * stop for start, stop in bounds[1:]]
        sparsities = grow_sparsity(len(bounds), self.sparsity, base=self.base, cost=costs)
        return [(*each, sparsity) for each, sparsity in zip(bounds, sparsities)]

    def pattern(self, query: Tensor, key: Tensor, sparsity: float) -> Pattern:
        """What a chunk (B, heads, f, *space, D) sees of the frames up to its own last."""
        if sparsity == 0 and query.shape[2] == key.shape[2]:
            return Global()
        return select_history(
            query,
            key,
            self._block(tuple(query.shape[3:-1])),
            density=1 - sparsity,
            frames=self.frames if sparsity else None,
            sink_frames=self.sink_frames,
            recent_frames=self.recent_frames,
            whole_chunk=self.whole_chunk,
        )

    def _block(self, space: tuple[int, ...]) -> tuple[int, ...]:
        sizes = per_axis("block_size", self.block_size, len(space))
        return tuple(
            even_size(length, LARGEST_SIDE, fewest=FEWEST_BLOCKS) if size is None else min(size, length)
            for length, size in zip(space, sizes)
        )

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, pattern: Pattern) -> Tensor:
        return sparse_attention(query, key, value, pattern, scale=self.scale, impl=self.impl)

    def _attention(self, query: Tensor, key: Tensor, pattern: Pattern, every_key: Tensor) -> Tensor:
        """(B, heads, queries, N), 0 for the frames that come later."""
        weights = sparse_attention_weights(query, key, pattern, scale=self.scale)
        return F.pad(weights, (0, every_key.shape[2:-1].numel() - weights.shape[-1]))

    def _project(self, x: Tensor) -> list[Tensor]:
        return [split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1)]

    def _finish(self, out: Tensor) -> Tensor:
        projected: Tensor = self.proj(merge_heads(out))
        return projected
