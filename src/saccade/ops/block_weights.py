"""Blocks of keys chosen by the softmax weights that they really get (SparseD, 2025, arXiv:2509.24014)."""

import torch
from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.ops.check import check_attention, check_positive
from saccade.ops.selection import Selection, block_order, num_blocks, select_top_k
from saccade.ops.softmax_attention import attention_weights

__all__ = ["block_weights", "kept_blocks", "pool_attention", "select_block_share", "select_blocks_by_weight"]

Block = int | tuple[int, ...]
ROWS = 512  # queries whose weights are formed at a time: enough to fill a matrix product


def block_weights(
    query: Tensor, key: Tensor, block_size: Block, *, scale: float | None = None, impl: str = "auto"
) -> Tensor:
    """Average the softmax weights of dense attention over every pair of a query block and a key block.

    A block that is smaller, at the end of an axis, counts as if zeros filled it up: it is the mean over a whole block.

    Args:
        query: (B, heads, *space, D).
        key: (B, kv_heads, *key_space, D).
        block_size: tokens of a block, one number or one for each axis.
        scale: factor of q.k, D^-0.5 by default.
        impl: "reference" forms all N x M weights and defines what is right; "rows", which "auto" takes, those of a few
            blocks of queries at a time, so that memory is linear in M.

    Returns: (B, heads, T, S) of query block and key block, in float32 at least and without gradient.

    >>> block_weights(torch.zeros(1, 1, 4, 1), torch.zeros(1, 1, 3, 1), 2)  # three equal keys
    tensor([[[[0.3333, 0.1667],
              [0.3333, 0.1667]]]])
    """
    check_attention(query, key, key)
    check_choice("impl", impl, ("auto", "reference", "rows"))
    check_positive(block_size=block_size)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key = query.detach(), key.detach()
    space, key_space = tuple(query.shape[2:-1]), tuple(key.shape[2:-1])
    if impl == "reference":
        weights = attention_weights(query.flatten(2, -2), key.flatten(2, -2), None, scale)
        return pool_attention(weights, block_size, space=space, key_space=key_space)
    rows, columns = (block_order(axes, block_size, query.device) for axes in (space, key_space))
    # tokens in the order of their blocks; -1, past the end of the map, takes any token, which is then hidden
    queries, keys = (x.flatten(2, -2)[:, :, i.flatten()] for x, i in ((query, rows), (key, columns)))
    hidden = torch.zeros(columns.numel(), dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    hidden = hidden.masked_fill(columns.flatten() < 0, -torch.inf)
    at_once = rows.shape[1] * max(1, ROWS // rows.shape[1])  # whole blocks
    means = []
    for tokens, inside in zip(queries.split(at_once, 2), (rows.flatten() >= 0).split(at_once)):
        weights = attention_weights(tokens, keys, hidden, scale) * inside.unsqueeze(-1)
        means.append(weights.unflatten(3, tuple(columns.shape)).mean(4).unflatten(2, (-1, rows.shape[1])).mean(3))
    return torch.cat(means, 2)


def pool_attention(
    attention: Tensor,
    block_size: Block,
    *,
    space: tuple[int, ...] | None = None,
    key_space: tuple[int, ...] | None = None,
) -> Tensor:
    """Average the magnitudes of an attention map over every pair of blocks, as `block_weights` does of its own.

    Args:
        attention: (B, heads, N, M).
        block_size: tokens of a block, one number or one for each axis.
        space, key_space: the axes of queries and keys; None where they are a sequence.

    Returns: (B, heads, T, S).
    """
    spaces = [(n,) if axes is None else axes for n, axes in zip(attention.shape[2:], (space, key_space))]
    for name, axes, tokens in zip(("space", "key_space"), spaces, attention.shape[2:]):
        if torch.Size(axes).numel() != tokens:
            raise InputError(
                f"attention is {tuple(attention.shape)} and {name} is {axes}: it has {tokens} tokens there"
            )
    rows, columns = (block_order(axes, block_size, attention.device) for axes in spaces)
    magnitudes = attention.abs()[:, :, rows.flatten()][..., columns.flatten()]
    magnitudes = magnitudes * (rows.flatten() >= 0).unsqueeze(-1) * (columns.flatten() >= 0)
    return magnitudes.unflatten(3, tuple(columns.shape)).mean(4).unflatten(2, tuple(rows.shape)).mean(3)


def kept_blocks(blocks: int, keep: float) -> int:
    """Key blocks that a row keeps of `blocks`: the share `keep`, rounded down, and one more; all at most.

    >>> kept_blocks(16, 0.3), kept_blocks(4, 1.0)
    (5, 4)
    """
    if not 0 <= keep <= 1:
        raise InputError(f"keep is {keep}: give a share of 0 to 1")
    return min(blocks, int(blocks * keep) + 1)


def select_block_share(scores: Tensor, keep: float, **blocks: int | tuple[int, ...]) -> Selection:
    """Select for each row of scores (B, heads, T, S) the highest `kept_blocks(S, keep)`.

    Args:
        scores: from `block_weights` or `pool_attention`.
        keep: share of the key blocks.
        blocks: query_block, key_block, key_size and ragged of the `Selection`.
    """
    return select_top_k(scores, kept_blocks(scores.shape[-1], keep), scope="query", **blocks)


def select_blocks_by_weight(
    query: Tensor,
    key: Tensor,
    block_size: Block,
    *,
    keep: float = 0.3,
    generated: int | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Selection:
    """Choose for every head and query block the key blocks with the largest mean softmax weight.

    Args:
        query, key: (B, heads, *space, D), of one map.
        block_size: tokens of a block, one number or one for each axis; the last block along an axis may be smaller.
        keep: share of the key blocks that a row keeps (`kept_blocks`); 0.3 is SparseD's for long contexts.
        generated: tokens at the end of a sequence that are being generated. They and the prompt before them are then
            chosen apart: generated keys compete by the softmax over themselves alone, for a share of their own blocks.
            The blocks of the generated part begin at the first block that has no more tokens left than this, or at the
            last block. None: all keys compete.
        scale: factor of q.k, D^-0.5 by default.
        impl: as in `block_weights`.

    Returns: Selection. Choosing is not differentiable.

    >>> x = torch.tensor([0.0, 0.0, 9.0, 9.0, 1.0, 1.0]).reshape(1, 1, 6, 1)
    >>> select_blocks_by_weight(x, x, 2, keep=0.0).pairs((6,))[0, 0].int().tolist()
    [[1, 0, 0], [0, 1, 0], [0, 1, 0]]
    """
    space = tuple(query.shape[2:-1])
    if query.shape[2:] != key.shape[2:]:
        raise InputError(f"query is {tuple(query.shape)} and key is {tuple(key.shape)}: blocks are of one map")
    scores = block_weights(query, key, block_size, scale=scale, impl=impl)
    blocks = {"query_block": block_size, "key_block": block_size, "ragged": True}
    chosen = select_block_share(scores, keep, **blocks)
    if generated is None:
        return chosen
    if len(space) != 1 or not isinstance(block_size, int) or not 0 <= generated <= space[0]:
        raise InputError(
            f"generated is {generated} and the map is {space}: it counts tokens at the end of one sequence. "
            f"Give 0 to {torch.Size(space).numel()} on one axis of space, or None"
        )
    first = min(-(-(space[0] - generated) // block_size), num_blocks(space, block_size) - 1)
    tail = block_weights(query, key[:, :, first * block_size :], block_size, scale=scale, impl=impl)
    among = select_block_share(tail, keep)
    return Selection(
        torch.cat([chosen.blocks, among.blocks + first], -1),
        torch.cat([chosen.used & (chosen.blocks < first), among.used], -1),
        **blocks,  # type: ignore[arg-type]
    )
