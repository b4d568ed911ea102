"""Masked diffusion of sequences in blocks: which tokens to hide in training, the loss, and which to fill in decoding.

Efficient-DLM (2025, arXiv:2512.14067) hides later tokens of a block more often, as they are hidden for longer when a
block is decoded. A model sees the noised sequence with the clean one behind it, under `saccade.ops.BlockDiffusion`.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.errors import InputError, check_choice

__all__ = ["NoisedTokens", "choose_filled", "hide_tokens", "masked_token_loss", "noise_tokens"]


class NoisedTokens(NamedTuple):
    """A sequence in which some tokens are hidden.

    Attributes:
        both: (B, 2 L) the noised tokens, then the clean ones. Both halves have the positions 0 .. L - 1.
        hidden: (B, L) booleans, which tokens are hidden.
        level: (B, L) the noise level t under which each was drawn.
    """

    both: Tensor
    hidden: Tensor
    level: Tensor


def hide_tokens(
    level: Tensor, length: int, *, last_to_first: float = 0.1, generator: torch.Generator | None = None
) -> Tensor:
    """Choose the hidden tokens of blocks: round(t * length) of each, at least one, the later the more often.

    Position i of a block of L tokens is drawn with weight exp(beta * (1 - t) * i), without replacement, where beta =
    -ln(last_to_first) / L: with little noise the last token is hidden about 1 / last_to_first times as often as the
    first, with much of it all are hidden alike.

    Args:
        level: (...) noise levels t in 0 .. 1, one for each block.
        length: L, tokens of a block.
        last_to_first: lambda = exp(-beta L), above 0 and at most 1, where all positions are alike. It stays the same
            for blocks of any length, as beta would not; 0.1 is the paper's.
        generator: of the random numbers, on the device of `level`.

    Returns: (..., L) booleans, True = hidden.

    >>> hide_tokens(torch.tensor([0.0, 0.5, 1.0]), 4).sum(-1)
    tensor([1, 2, 4])
    """
    if length < 1:
        raise InputError(f"length is {length}: a block has at least one token")
    if not 0 < last_to_first <= 1:
        raise InputError(f"last_to_first is {last_to_first}: give a ratio above 0 and at most 1")
    _check_level(level)
    beta = -math.log(last_to_first) / length
    place = torch.arange(length, device=level.device)
    weight = beta * (1 - level.unsqueeze(-1)) * place  # its logarithm
    # the largest of log weight - log(-log u) are a draw without replacement
    noise = torch.rand(weight.shape, device=level.device, dtype=weight.dtype, generator=generator)
    order = (weight - noise.clamp(min=torch.finfo(weight.dtype).tiny).log().neg().log()).argsort(-1, descending=True)
    count = (level * length).round().clamp(min=1).unsqueeze(-1)
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, place < count)


def noise_tokens(
    tokens: Tensor,
    mask_token: int,
    block_size: int,
    *,
    level: Tensor | None = None,
    per: str = "block",
    last_to_first: float = 0.1,
    generator: torch.Generator | None = None,
) -> NoisedTokens:
    """Hide tokens of a batch of sequences for one training pass over all blocks.

    Args:
        tokens: (B, L) numbers of tokens; block_size divides L.
        mask_token: the number that stands for a hidden token.
        block_size: tokens of a block.
        level: (B, blocks) or (B, 1) noise levels; None draws them uniformly from 0 .. 1.
        per: "block" or "sample": what a drawn level is for.
        last_to_first, generator: as in `hide_tokens`.

    >>> noised = noise_tokens(torch.tensor([[5, 6, 7, 8]]), 0, 2, level=torch.ones(1, 2))
    >>> noised.both
    tensor([[0, 0, 0, 0, 5, 6, 7, 8]])
    """
    check_choice("per", per, ("block", "sample"))
    if tokens.ndim != 2 or block_size < 1 or tokens.shape[1] % block_size:
        raise InputError(
            f"tokens is {tuple(tokens.shape)} and block_size is {block_size}: give (B, L) with a block that divides L"
        )
    batch, blocks = len(tokens), tokens.shape[1] // block_size
    if level is None:
        drawn = (batch, blocks if per == "block" else 1)
        level = torch.rand(drawn, device=tokens.device, generator=generator)
    if level.shape not in ((batch, blocks), (batch, 1)):
        raise InputError(f"level is {tuple(level.shape)}: give {(batch, blocks)}, or {(batch, 1)}")
    level = level.expand(batch, blocks)
    hidden = hide_tokens(level, block_size, last_to_first=last_to_first, generator=generator).flatten(1)
    both = torch.cat([tokens.masked_fill(hidden, mask_token), tokens], 1)
    return NoisedTokens(both, hidden, level.repeat_interleave(block_size, 1))


def masked_token_loss(
    logits: Tensor, tokens: Tensor, hidden: Tensor, level: Tensor, *, smallest_level: float = 1e-3
) -> Tensor:
    """Cross-entropy of the hidden tokens, each weighted 1 / t: the bound of masked diffusion, a token.

    Args:
        logits: (B, L, V), of the noised half: a token is predicted at its own position.
        tokens: (B, L) the clean tokens.
        hidden, level: (B, L), from `noise_tokens`.
        smallest_level: levels below it count as it, since a block hides one token however small t is.

    Returns: the mean over all L tokens and sequences.

    >>> tokens, hidden = torch.zeros(1, 2, dtype=torch.long), torch.tensor([[True, False]])
    >>> masked_token_loss(torch.zeros(1, 2, 4), tokens, hidden, torch.ones(1, 2))
    tensor(0.6931)
    """
    _check_level(level)
    if logits.ndim != 3 or not logits.shape[:2] == tokens.shape == hidden.shape == level.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (logits, tokens, hidden, level))
        raise InputError(f"logits, tokens, hidden and level are {shapes}: give (B, L, V), and (B, L) for the others")
    losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(level)
    return (losses * hidden / level.clamp(min=smallest_level)).mean()


def choose_filled(confidence: Tensor, hidden: Tensor, *, threshold: float = 0.9) -> Tensor:
    """Choose the hidden tokens that a step of decoding fills: those confident enough, and the most confident one.

    Args:
        confidence: (B, L) probability of the best guess for each token of a block.
        hidden: (B, L) booleans, which are hidden still.
        threshold: of confidence; above 1, one token a step is filled.

    Returns: (B, L) booleans. Sequences where nothing is hidden fill nothing.

    >>> choose_filled(torch.tensor([[0.95, 0.5, 0.99]]), torch.tensor([[True, True, False]]))
    tensor([[ True, False, False]])
    """
    if confidence.shape != hidden.shape or hidden.dtype != torch.bool:
        raise InputError(
            f"confidence is {tuple(confidence.shape)} and hidden is {hidden.dtype} {tuple(hidden.shape)}: "
            "give a number and a boolean for each token"
        )
    best = confidence.masked_fill(~hidden, -torch.inf).argmax(-1, keepdim=True)
    first = torch.zeros_like(hidden).scatter(-1, best, True)
    return hidden & ((confidence >= threshold) | first)


def _check_level(level: Tensor) -> None:
    if not level.is_floating_point() or not bool(((level >= 0) & (level <= 1)).all()):
        raise InputError("a noise level is no number of 0 .. 1: it is the share of tokens that are hidden")
