"""Mixture of block attention: each query attends to its own block and to those that match it best, by the mean of
their keys (VMoBA, 2025, arXiv:2506.23858; MoBA is its causal ancestor)."""

import torch
from torch import Tensor

from saccade.errors import InputError
from saccade.ops.check import check_attention, check_positive
from saccade.ops.selection import (
    Selection,
    block_means,
    block_order,
    select_mask,
    select_similarity_mass,
    select_top_k,
    token_slots,
)
from saccade.ops.softmax_attention import merge_attention, softmax_attention
from saccade.ops.sparse_attention import sparse_attention
from saccade.ops.window import Window

__all__ = ["choose_blocks", "mixture_of_blocks"]

Block = int | tuple[int, ...]


def choose_blocks(
    query: Tensor,
    key: Tensor,
    block_size: Block,
    *,
    mass: float = 0.25,
    topk: int | None = None,
    scope: str = "head",
    causal: bool = False,
    all_if_none: bool = False,
) -> Selection:
    """Choose for each query its own block, and others by the product of the query and the mean of their keys.

    Args:
        query, key: (B, heads, *space, D).
        block_size: tokens of a block, one number or one for each axis; the last block along an axis may be smaller.
        mass: share of the similarities, scaled to 0 .. 1, that the chosen pairs reach, own blocks included; at least
            one pair beside them is taken. 0.25 is official code's.
        topk: blocks for a query on average, the own one included, instead of `mass`.
        scope: what competes: the blocks of a query ("query", where topk is exact), all pairs of a head ("head", as
            VMoBA does), of an image ("all"), or with `mass` the queries of each block ("block").
        causal: only blocks that end before the query, and its own, can be chosen (MoBA): it takes one axis of space,
            topk, and scope "query", since any other choice would depend on later tokens.
        all_if_none: choose all blocks in an image where no query chose one beside its own, as official VMoBA code
            does (topk = 1). It is not for `causal`.

    Returns: Selection of key blocks for single queries. Scores are taken in float32 at least; choosing is not
        differentiable.

    >>> x = torch.tensor([3.0, 3.0, 1.0, 1.0, 2.0, 2.0]).reshape(1, 1, 6, 1)
    >>> choose_blocks(x, x, 2, topk=2, scope="query").pairs((6,))[0, 0, -1]  # its own block, and the first
    tensor([ True, False,  True])
    """
    check_attention(query, key, key)
    check_positive(block_size=block_size, topk=1 if topk is None else topk)
    space = tuple(query.shape[2:-1])
    if query.shape != key.shape:
        raise InputError(f"query is {tuple(query.shape)} and key is {tuple(key.shape)}: blocks are of one map")
    if causal and (len(space) != 1 or topk is None or scope != "query" or all_if_none):
        raise InputError(
            f"causal is True with space {space}, topk {topk}, scope {scope!r} and all_if_none {all_if_none}: it takes "
            "one axis of space, a topk, scope 'query' and no all_if_none. Flatten the map to a sequence"
        )
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = query.detach().to(dtype), key.detach().to(dtype)
    scores = query.flatten(2, -2) @ block_means(key, block_size).mT  # (B, heads, N, blocks)
    number = _block_numbers(space, block_size, query.device).unsqueeze(-1)
    blocks = torch.arange(scores.shape[-1], device=query.device)
    own = number == blocks
    if causal:
        scores = scores.masked_fill(blocks > number, -torch.inf)
    if topk is None:
        chosen = select_similarity_mass(scores, mass, own=own, scope=scope, key_block=block_size, ragged=True)
    else:
        scores = scores.masked_fill(own, torch.inf)
        chosen = select_top_k(scores, topk, scope=scope, key_block=block_size, ragged=True)
    if not all_if_none:
        return chosen
    pairs = chosen.pairs(space)
    none = ~(pairs & ~own).any(-1).flatten(1).any(-1).view(-1, 1, 1, 1)
    return select_mask(pairs | none, key_block=block_size, ragged=True)


def mixture_of_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    *,
    causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of every query over its chosen blocks; causal queries see the past of their own block alone.

    Without `causal` it is `sparse_attention`. With it, the own block is a causal window, whose result is merged with
    that of the blocks before it through the log-sum-exp.

    Args:
        query, key: (B, heads, *space, D).
        value: (B, heads, *space, E).
        selection: from `choose_blocks`, with the same `causal`.
        causal: hide later tokens inside the own block; all chosen blocks end before the query or contain it.
        scale: factor of q.k, D^-0.5 by default.
        impl: "reference" forms all N x M weights and defines what is right; "auto" and "tiled" as in
            `sparse_attention`.

    Returns: (B, heads, *space, E) in the dtype of the inputs.

    >>> x = torch.arange(4.0).reshape(1, 1, 4, 1)
    >>> chosen = choose_blocks(x, x, 2, topk=2, scope="query", causal=True)
    >>> mixture_of_blocks(torch.zeros(1, 1, 4, 1), x, x, chosen, causal=True).flatten()  # means of all so far
    tensor([0.0000, 0.5000, 1.0000, 1.5000])
    """
    if not causal:
        return sparse_attention(query, key, value, selection, scale=scale, impl=impl)
    space = tuple(query.shape[2:-1])
    if impl == "reference":
        mask = selection.mask(space).tril()
        return softmax_attention(query, key, value, mask=mask, scale=scale, impl="reference")
    pairs = selection.pairs(space)
    number = _block_numbers(space, selection.key_block, query.device).unsqueeze(-1)
    past = select_mask(
        pairs & (torch.arange(pairs.shape[-1], device=query.device) < number),
        key_block=selection.key_block,
        ragged=True,
    )
    parts = [Window(selection.key_block, ragged=True, causal=True), past]
    return merge_attention(
        [sparse_attention(query, key, value, part, scale=scale, return_lse=True, impl=impl) for part in parts]
    ).out


def _block_numbers(space: tuple[int, ...], block_size: Block, device: torch.device) -> Tensor:
    """(N,) the block of every token."""
    order = block_order(space, block_size, device)
    return token_slots(order, space) // order.shape[1]
