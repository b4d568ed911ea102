"""Attention maps of blocks: how much the tokens of one block look at those of another, without N x N memory.

They say which blocks are worth computing (pyramid sparse attention, 2025, arXiv:2512.04025) and what a gate that
predicts it should learn (SeerAttention, Gao et al., 2024, arXiv:2410.13276).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.ops.check import check_attention, check_positive
from saccade.ops.selection import Selection, block_means, block_order, select_mask, select_top_k

__all__ = ["block_map", "block_map_divergence", "pool_blocks", "select_gated"]

Block = int | tuple[int, ...]
POOLS = ("max", "mean", "min")
ROWS = 1024  # queries whose logits are held at a time


def block_map(
    query: Tensor,
    key: Tensor,
    query_block: Block,
    key_block: Block,
    *,
    causal: bool = False,
    divisor: str = "sum",
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Take the largest attention weight of each pair of blocks, and divide each row by its sum.

    Args:
        query: (B, heads, *space, D).
        key: (B, kv_heads, *key_space, D).
        query_block, key_block: tokens of a block, one number or one for each axis; the last may be smaller.
        causal: query n sees keys 0..n, on one axis of space.
        divisor: what makes weights of exp(logit), for each query: their "sum" over the keys, which is softmax, or
            their "max".
        scale: factor of q.k, D^-0.5 by default.
        impl: "reference" forms all N x M weights and defines what is right; "auto" holds those of a few blocks of
            queries at a time.

    Returns: (B, heads, T, M) of query block and key block, in float32 at least and without gradient.

    >>> query, key = torch.tensor([[[[0.0], [3.0]]]]), torch.tensor([[[[0.0], [1.0], [0.0], [0.0]]]])
    >>> block_map(query, key, 2, 2)  # the key that stands out is in the first block
    tensor([[[[0.7768, 0.2232]]]])
    """
    check_attention(query, key, key)
    check_positive(query_block=query_block, key_block=key_block)
    check_choice("divisor", divisor, ("max", "sum"))
    check_choice("impl", impl, ("auto", "reference"))
    space, key_space = tuple(query.shape[2:-1]), tuple(key.shape[2:-1])
    if causal and (len(space) > 1 or space != key_space):
        raise InputError(f"causal is True with queries on {space} and keys on {key_space}: give one sequence")
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows, columns = block_order(space, query_block, query.device), block_order(key_space, key_block, key.device)
    query, key = (x.detach().to(dtype).flatten(2, -2) for x in (query * scale, key))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    largest = (_reference if impl == "reference" else _by_rows)(query, key, rows, columns, causal, divisor)
    return largest / largest.sum(-1, keepdim=True)


def _reference(query: Tensor, key: Tensor, rows: Tensor, columns: Tensor, causal: bool, divisor: str) -> Tensor:
    logits = query @ key.mT
    if causal:
        logits = logits.masked_fill(logits.new_ones(logits.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    weights = logits.softmax(-1) if divisor == "sum" else (logits - logits.amax(-1, keepdim=True)).exp()
    for axis, blocks in ((2, rows), (3, columns)):
        weights = F.pad(weights, (0, 1, 0, 1))  # -1 finds a weight of 0
        weights = weights.index_select(axis, blocks.flatten() % weights.shape[axis])
        weights = weights.unflatten(axis, tuple(blocks.shape)).amax(axis + 1)
    return weights[..., : len(rows), :]


def _by_rows(query: Tensor, key: Tensor, rows: Tensor, columns: Tensor, causal: bool, divisor: str) -> Tensor:
    """The largest logit of each query and key block first: the largest weight has it."""
    key = key[:, :, columns.flatten()]
    largest = []
    for blocks in rows.split(max(1, ROWS // rows.shape[1])):
        logits = query[:, :, blocks.flatten()] @ key.mT
        logits = logits.unflatten(2, tuple(blocks.shape)).unflatten(-1, tuple(columns.shape))  # (B, heads, t, Q, M, K)
        hidden = columns < 0
        if causal:
            hidden = hidden | (columns > blocks[..., None, None])
        logits = logits.masked_fill(hidden, -torch.inf)
        best = logits.amax(-1)
        total = logits.flatten(-2).logsumexp(-1) if divisor == "sum" else best.amax(-1)
        weights = (best - total.unsqueeze(-1)).exp()
        largest.append(weights.masked_fill((blocks < 0).unsqueeze(-1), 0).amax(3))
    return torch.cat(largest, 2)


def pool_blocks(x: Tensor, block: Block, pool: str = "mean") -> Tensor:
    """Pool the tokens of each block: (B, heads, *space, D) to (B, heads, T, D), by "max", "mean" or "min".

    Along an axis that the block does not divide, the last block is smaller.

    >>> pool_blocks(torch.tensor([1.0, 3.0, -2.0]).reshape(1, 1, 3, 1), 2, "min").flatten()
    tensor([ 1., -2.])
    """
    check_choice("pool", pool, POOLS)
    check_positive(block=block)
    if pool == "mean":
        return block_means(x, block)
    rows = block_order(tuple(x.shape[2:-1]), block, x.device)
    first = rows.where(rows >= 0, rows[:, :1])  # what is past the end repeats a token of its block
    tokens = x.flatten(2, -2)[:, :, first.flatten()].unflatten(2, tuple(rows.shape))
    return tokens.amax(3) if pool == "max" else tokens.amin(3)


def block_map_divergence(scores: Tensor, target: Tensor, *, skip: float = 0.0) -> Tensor:
    """Divergence KL(target || softmax(scores)) of block maps, averaged over all their entries.

    It is what a gate is trained with. The mean over entries, not rows, is SeerAttention's, which scales it by 10.

    Args:
        scores: (..., T, M), -inf where a block is never visible.
        target: (..., T, M), rows that sum to 1, such as a `block_map`; 0 where a score is -inf.
        skip: share of the query blocks that is left out at the beginning: in causal maps they see little.
            SeerAttention takes a quarter.

    >>> block_map_divergence(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))  # log(2) in a row of two
    tensor(0.3466)
    """
    if scores.shape != target.shape or not 0 <= skip < 1:
        raise InputError(
            f"scores is {tuple(scores.shape)}, target is {tuple(target.shape)} and skip is {skip}: give two maps of "
            "one shape, and a share from 0 to below 1"
        )
    first = int(skip * scores.shape[-2])
    scores, target = scores[..., first:, :], target[..., first:, :]
    # 0 log 0 is 0, also where the score is -inf
    predicted = scores.to(target.dtype).log_softmax(-1).masked_fill(target == 0, 0)
    return (torch.xlogy(target, target) - target * predicted).mean()


def select_gated(
    scores: Tensor,
    *,
    share: float | None = None,
    threshold: float | None = None,
    causal: bool = False,
    dense_rows: int = 0,
    at_least_one: bool = True,
    **blocks: Block | bool,
) -> Selection:
    """Select the key blocks that a gate predicts to matter.

    Args:
        scores: (B, heads | 1, T, M), before the softmax.
        share: of the visible pairs, about: each query block takes as many blocks, share * M, and with `causal`
            (1 - sqrt(1 - share)) * M or all it sees, which covers that share of the triangle.
        threshold: take every block whose softmax weight is above it, instead of `share`; it depends on M.
        causal: key blocks after the query block are hidden.
        dense_rows: the last query blocks see all that is visible, as in SeerAttention (2).
        at_least_one: where no weight is above the threshold, take the largest.
        blocks: query_block, key_block, key_size and ragged of the `Selection`.

    >>> select_gated(torch.tensor([[[[0.0, 2.0, 1.0]]]]), threshold=0.3).blocks.flatten()
    tensor([1])
    """
    if (share is None) == (threshold is None) or not 0 < (1 if share is None else share) <= 1:
        raise InputError(f"share is {share} and threshold is {threshold}: give one of them, a share up to 1")
    if scores.ndim != 4:
        raise InputError(f"scores is {tuple(scores.shape)}: give (B, heads or 1, query blocks, key blocks)")
    rows, columns = scores.shape[-2:]
    scores, visible = scores.detach(), torch.ones(rows, columns, dtype=torch.bool, device=scores.device)
    if causal:
        visible = visible.tril()
        scores = scores.masked_fill(~visible, -torch.inf)
    if share is not None:
        count = max(1, int((1 - (1 - share) ** 0.5 if causal else share) * columns))
        if not dense_rows:
            return select_top_k(scores, count, **blocks)  # type: ignore[arg-type]
        chosen = select_top_k(scores, count, key_size=(columns,)).pairs((rows,))
    else:
        weights = scores.softmax(-1)
        chosen = weights > (threshold or 0.0)
        if at_least_one:
            chosen = chosen.scatter(-1, weights.argmax(-1, keepdim=True), True)
    dense = (torch.arange(rows, device=scores.device) >= rows - dense_rows).unsqueeze(-1)
    return select_mask((chosen | dense) & visible, **blocks)
