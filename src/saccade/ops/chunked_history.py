"""Attention of a video that is made chunk by chunk, to the frames made so far: early chunks see more of them than late
ones, and blocks of queries choose frames first, then blocks inside these (Light Forcing, 2026, arXiv:2602.04789)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.errors import InputError
from saccade.ops.check import check_attention, check_positive, per_axis
from saccade.ops.selection import Selection, block_means, select_top_k

__all__ = ["grow_sparsity", "select_history"]


def grow_sparsity(
    num_chunks: int,
    target: float,
    *,
    base: float | None = None,
    trust: Sequence[float] | None = None,
    cost: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """Share out a mean sparsity over the chunks of a video, less of it to the early ones, whose errors are inherited.

    The first chunk is dense. Chunk i after it gets base - trust_i * beta, at least 0, with the one beta for which the
    mean over these chunks, weighted by their cost, is the target.

    Args:
        num_chunks: chunks of the video.
        target: mean sparsity of all chunks but the first: the share of the pairs of blocks that is left out.
        base: sparsity that a chunk without trust gets, `target` to below 1. The paper's is not known: None takes the
            middle between target and 1.
        trust: how far each chunk after the first stays below `base`, 0 or more. The paper takes it from the noise
            level that a chunk reaches, a definition that is not known: None falls evenly from 1, and would be 0 after
            the last chunk.
        cost: of each chunk after the first when dense; None takes the keys that it sees, with chunks of equal length.

    Returns: a sparsity for each chunk, 0 for the first.

    >>> [round(sparsity, 2) for sparsity in grow_sparsity(4, 0.5, base=0.7)]  # mean 0.5
    [0.0, 0.36, 0.47, 0.59]
    """
    check_positive(num_chunks=num_chunks)
    later = num_chunks - 1
    base = (1 + target) / 2 if base is None else base
    if not 0 <= target <= base < 1:
        raise InputError(f"target is {target} and base is {base}: give 0 <= target <= base < 1")
    trusts = [1 - i / later for i in range(later)] if trust is None else list(trust)
    costs = [float(i + 2) for i in range(later)] if cost is None else list(cost)
    for name, given in (("trust", trusts), ("cost", costs)):
        if len(given) != later or any(not math.isfinite(each) or each < 0 for each in given):
            raise InputError(
                f"{name} is {tuple(given)}: give {later} numbers of 0 or more, one for each chunk after the first"
            )
    sparse = list(range(later))
    while True:  # a chunk that would be denser than dense is dense, and the others make up for it
        wanted = base * sum(costs[i] for i in sparse) - target * sum(costs)
        weight = sum(costs[i] * trusts[i] for i in sparse)
        if weight == 0 and not math.isclose(wanted, 0, abs_tol=1e-12 * max(1.0, sum(costs))):
            raise InputError(
                f"trust is {tuple(trusts)} and cost is {tuple(costs)}: with base {base} no chunk is left to bring the "
                f"mean to {target}. Give trust to a chunk that has a cost, or take base = target"
            )
        beta = wanted / weight if weight else 0.0
        below = [i for i in sparse if base - trusts[i] * beta < 0]
        if not below:
            break
        sparse = [i for i in sparse if i not in below]
    return (0.0, *(base - trusts[i] * beta if i in sparse else 0.0 for i in range(later)))[:num_chunks]


def select_history(
    query: Tensor,
    key: Tensor,
    block_size: int | tuple[int, ...],
    *,
    density: float,
    frames: int | None = 6,
    sink_frames: int = 1,
    recent_frames: int = 1,
    whole_chunk: bool = False,
) -> Selection:
    """Choose for each block of a chunk's queries some frames, then the best blocks in these.

    Frames are scored by the product of the block's mean query and the frame's mean key, blocks by that with their own
    mean key: F + frames * blocks scores a query block instead of F * blocks, of F frames.

    Args:
        query: (B, heads, f, *space, D), the frames of the chunk, with any further axes of space.
        key: (B, kv_heads, F, *space, D), all frames so far; the last f are the chunk itself.
        block_size: tokens of a block along each axis of a frame, one number or one for each; a block lies in one
            frame, and the last along an axis may be smaller. Of a sequence, whose frames are tokens, it is not used.
        density: share of all F * blocks blocks that each query block keeps, at least one; as many as the chosen
            frames have, where these have fewer.
        frames: history frames that each query block chooses besides those below; None for all.
        sink_frames, recent_frames: history frames, the first and the last, that are chosen in any case, as the chunk's
            own frames are. How many the paper takes is not known.
        whole_chunk: keep every block of the chunk itself, and give the history what the density leaves. Otherwise all
            blocks compete.

    Returns: Selection of key blocks for query blocks; choosing is not differentiable.

    >>> key = torch.tensor([3.0, 1.0, 2.0, 1.0]).view(1, 1, 4, 1)  # three frames of history and the chunk's own
    >>> select_history(key[:, :, 3:], key, 1, density=0.5, frames=1, sink_frames=0, recent_frames=0).blocks.flatten()
    tensor([0, 3])
    """
    check_attention(query, key, key)
    check_positive(frames=1 if frames is None else frames)
    own, total = query.shape[2], key.shape[2]
    space = tuple(query.shape[3:-1])
    if space != tuple(key.shape[3:-1]) or own > total:
        raise InputError(
            f"query is {tuple(query.shape)} and key is {tuple(key.shape)}: the keys are those of all frames so far, "
            "the chunk's own last, of one size"
        )
    if not 0 < density <= 1:
        raise InputError(f"density is {density}: give a share above 0 and at most 1")
    if sink_frames < 0 or recent_frames < 0:
        raise InputError(f"sink_frames is {sink_frames} and recent_frames is {recent_frames}: give 0 or more frames")
    block = (1, *per_axis("block_size", block_size, len(space)))
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = query.detach().to(dtype), key.detach().to(dtype)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    queries = block_means(query, block)  # (B, heads, T, D)
    keys = block_means(key, block).unflatten(2, (total, -1))  # (B, heads, F, blocks, D)
    visible = _choose_frames(queries, block_means(key, (1, *space)), own, frames, sink_frames, recent_frames)
    blocks = keys.shape[3]
    count = max(1, round(density * total * blocks))
    first = torch.arange(keys.shape[:2].numel(), device=key.device).view(*keys.shape[:2], 1, 1) * total
    found = keys.flatten(0, 2).index_select(0, (visible + first).flatten()).view(*visible.shape, blocks, key.shape[-1])
    scores = (found.flatten(3, 4) @ queries.unsqueeze(-1)).squeeze(-1)  # (B, heads, T, chosen frames * blocks)
    number = (visible.unsqueeze(-1) * blocks + torch.arange(blocks, device=key.device)).flatten(3)
    if whole_chunk:
        count = max(count, own * blocks)
        scores = scores.masked_fill(number >= (total - own) * blocks, torch.inf)
    best = select_top_k(scores, count)
    return Selection(number.gather(-1, best.blocks), best.used, block, block, (total, *space), ragged=True)


def _choose_frames(
    queries: Tensor, frame_keys: Tensor, own: int, frames: int | None, sink_frames: int, recent_frames: int
) -> Tensor:
    """(B, heads, T, chosen) numbers of frames, ascending."""
    total = frame_keys.shape[2]
    history = total - own
    last = max(min(sink_frames, history), history - recent_frames)
    always = torch.arange(total, device=queries.device)
    open_frames = always[min(sink_frames, history) : last]
    if frames is None or frames >= len(open_frames):
        return always.expand(*queries.shape[:3], -1)
    always = torch.cat([always[: min(sink_frames, history)], always[last:]])
    best = select_top_k(queries @ frame_keys[:, :, open_frames].mT, frames).blocks
    return torch.cat([always.expand(*queries.shape[:3], -1), open_frames[best]], -1).sort(-1).values
