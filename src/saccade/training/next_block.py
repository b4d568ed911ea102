"""What a model that predicts the next block of tokens is trained on (NBP, 2025, arXiv:2502.07737)."""

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.errors import InputError

__all__ = ["NextBlock", "next_block"]


class NextBlock(NamedTuple):
    """Inputs and targets, position by position.

    Attributes:
        inputs: (B, P + n) the condition, special tokens, and all tokens that some later one is predicted from.
        targets: (B, n) what the last n positions predict.
    """

    inputs: Tensor
    targets: Tensor


def next_block(tokens: Tensor, block_size: int, *, condition: Tensor | None = None, hybrid: bool = False) -> NextBlock:
    """Lay out sequences so that every token predicts the one at its own place in the next block.

    The first block has none before it. It is predicted from `block_size` begin tokens; or, if `hybrid`, token by token
    from a single one, and the second block then from the last token of the first and block_size - 1 special tokens.
    The mask that belongs to it is `saccade.ops.next_block_pattern`.

    Args:
        tokens: (B, n) numbers from 0; block_size divides n.
        block_size: b, tokens that are predicted at once.
        condition: (B, P) numbers from 0 of a label or text, which stands in front.
        hybrid: predict the first block token by token.

    Returns: NextBlock. Numbers 0 .. b - 1 are the special tokens, and those of tokens and condition, in inputs and
        targets, are moved up by b: add b to both sizes of a vocabulary.

    >>> next_block(torch.tensor([[5, 6, 7, 8]]), 2)
    NextBlock(inputs=tensor([[0, 1, 7, 8]]), targets=tensor([[ 7,  8,  9, 10]]))
    >>> next_block(torch.tensor([[5, 6, 7, 8]]), 2, hybrid=True).inputs  # the second block from 6 and a special token
    tensor([[0, 7, 8, 1]])
    """
    if tokens.ndim != 2 or block_size < 1 or tokens.shape[1] % block_size or not tokens.shape[1]:
        raise InputError(
            f"tokens is {tuple(tokens.shape)} and block_size is {block_size}: give (B, n) with a block that divides n"
        )
    if condition is not None and (condition.ndim != 2 or len(condition) != len(tokens)):
        raise InputError(f"condition is {tuple(condition.shape)}: give ({len(tokens)}, P), one row a sequence")
    special = torch.arange(block_size, device=tokens.device, dtype=tokens.dtype).expand(len(tokens), -1)
    targets = tokens + block_size
    first, rest = targets[:, :block_size], targets[:, block_size:]
    if hybrid:
        parts = [special[:, :1], first, special[:, 1:], rest]
    else:
        parts = [special, first, rest]
    inputs = torch.cat(parts, 1)[:, : tokens.shape[1]]
    if condition is not None:
        inputs = torch.cat([condition.to(tokens.dtype) + block_size, inputs], 1)
    return NextBlock(inputs, targets)
