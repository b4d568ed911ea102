"""Attention over predicted connections (Sparsifiner, Wei et al., 2023, arXiv:2303.13755)."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import taps
from saccade.errors import InputError
from saccade.mixers.mixer import Mixer, choose_heads, merge_heads, split_heads
from saccade.ops import (
    Connectivity,
    Selection,
    predict_connectivity,
    select_mask,
    select_top_k,
    softmax_attention,
    sparse_attention,
    sparse_attention_weights,
)
from saccade.ops.check import check_positive, per_axis
from saccade.ops.softmax_attention import attention_weights

__all__ = ["Connected", "LowRankConnectivityAttention"]

RESIZE = ("linear", "bilinear", "trilinear")


class Connected(NamedTuple):
    """What a layer computed.

    Attributes:
        out: (B, P + N, C), prefix tokens first.
        guess: of the attention map, for the N tokens of the map over all P + N.
        selection: which of the P + N tokens each token of the map sees; prefix tokens see all.
        prefix_attention: (B, heads, P, P + N).
    """

    out: Tensor
    guess: Connectivity
    selection: Selection
    prefix_attention: Tensor


class LowRankConnectivityAttention(Mixer):
    """Softmax attention of each token over the keys that a cheap guess of the attention map picks (Sparsifiner, Wei et
    al., 2023, arXiv:2303.13755).

    The guess passes no gradient: `reconstruct` makes it differentiable, for a loss on what it should look like.

    Args:
        dim: C, channels of a token.
        num_heads: attention heads; None takes one for each 32 channels. All share the predictor, and choose for
            themselves.
        size: tokens along each axis of the map for which the bases of the predictor are learned, one number or one
            for each axis; on another map they are resized linearly.
        num_prefix: class or register tokens that stand beside the map, and see all.
        keep_rate: share of all tokens that a token sees.
        threshold: see the tokens whose guess exceeds it instead.
        keep_prefix: let every token see the prefix, as all mixers here do. False lets prefix tokens compete with the
            others for a place, as Sparsifiner does.
        reduce_n: tokens of the map and prefix, over the rank of the guess.
        reduce_c: channels of a head, over those of the predictor.
        topk: coefficients of the guess that a token keeps; None keeps all.
        coefficient_threshold: keep the coefficients above it instead.
        basis_threshold: absolute values of the basis up to it count as 0.
        share_basis: one basis to mix the keys and to rebuild the map.
        reconstruct: train the guess: it is dense and signed, and attention is ordinary attention meanwhile.
        qkv_bias: give the projection to query, key and value a bias.
        proj_drop: dropout after the output projection.
        axes: axes of space, which the bases need to know; 2 for images.
        impl: as in `sparse_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        size: int | tuple[int, ...] = 14,
        num_prefix: int = 0,
        keep_rate: float = 0.25,
        threshold: float | None = None,
        keep_prefix: bool = True,
        reduce_n: int = 6,
        reduce_c: int = 2,
        topk: int | None = 8,
        coefficient_threshold: float | None = None,
        basis_threshold: float = 0.02,
        share_basis: bool = False,
        reconstruct: bool = False,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        axes: int = 2,
        impl: str = "auto",
    ) -> None:
        super().__init__(dim)
        check_positive(size=size, reduce_n=reduce_n, reduce_c=reduce_c)
        if axes not in (1, 2, 3):
            raise InputError(f"axes is {axes}: give 1, 2 or 3 axes of space")
        if not 0 < keep_rate <= 1:
            raise InputError(f"keep_rate is {keep_rate}: give a share above 0 and at most 1")
        self.num_heads = choose_heads(dim, num_heads)
        self.size = per_axis("size", size, axes)
        self.num_prefix = num_prefix
        self.keep_rate = keep_rate
        self.threshold = threshold
        self.keep_prefix = keep_prefix
        self.topk = topk if coefficient_threshold is None else None
        self.coefficient_threshold = coefficient_threshold
        self.basis_threshold = basis_threshold
        self.reconstruct = reconstruct
        self.impl = impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        tokens, width = num_prefix + math.prod(self.size), dim // self.num_heads
        self.mask_predictor = _Predictor(tokens, tokens // reduce_n, width, width // reduce_c, share_basis)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor) -> Tensor:
        return self._mix(x, x.new_empty(len(x), 0, self.dim))[0]

    def mix_with_prefix(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        return self._mix(x, prefix)

    def connect(self, tokens: Tensor, space: tuple[int, ...], alive: Tensor | None = None) -> Connected:
        """Mix tokens (B, P + N, C), prefix first, and return all that led there.

        Args:
            tokens: of the prefix and of a map with axes `space`, in row-major order.
            alive: (B, N) booleans, which tokens of the map are there; the others have neither query, key nor value,
                and no token of the map chooses them. None: all.
        """
        if len(space) != len(self.size):
            raise InputError(f"the map is {space}: the bases are for {len(self.size)} axes. Set axes={len(space)}")
        first = self.num_prefix
        there = None if alive is None else F.pad(alive, (first, 0), value=True)[:, None, :, None]  # (B, 1, P + N, 1)
        parts = self.qkv(tokens).chunk(3, -1)
        query, key, value = (_keep(split_heads(part, self.num_heads), there) for part in parts)
        guess = self._guess(query, key, space, there)
        selection = self._select(guess.scores.detach(), alive)
        taps.record(self, "attention", lambda: self._attention(query, key, selection))
        rows = query[:, :, first:]
        if self.reconstruct:
            mixed = softmax_attention(rows, key, value)
        else:
            mixed = sparse_attention(rows, key, value, selection, impl=self.impl)
        prefix_attention = attention_weights(query[:, :, :first], key, None, query.shape[-1] ** -0.5).to(value.dtype)
        out = self.proj_drop(self.proj(merge_heads(torch.cat([prefix_attention @ value, mixed], 2))))
        return Connected(out, guess, selection, prefix_attention)

    def _mix(self, x: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        if prefix.shape[1] != self.num_prefix:
            raise InputError(f"prefix has {prefix.shape[1]} tokens: num_prefix is {self.num_prefix}")
        space = tuple(x.shape[1:-1])
        out = self.connect(torch.cat([prefix, x.flatten(1, -2)], 1), space).out
        return out[:, self.num_prefix :].unflatten(1, space), out[:, : self.num_prefix]

    def _guess(self, query: Tensor, key: Tensor, space: tuple[int, ...], there: Tensor | None) -> Connectivity:
        """For the tokens of the map, over all."""
        predictor = self.mask_predictor
        narrow_query, narrow_key = _keep(predictor.proj_c_q(query), there), _keep(predictor.proj_c_k(key), there)
        down, up = (self._resize(basis, space) for basis in (predictor.proj_n, predictor.proj_back_n))
        return predict_connectivity(
            narrow_query[:, :, self.num_prefix :],
            narrow_key,
            down * (math.prod(self.size) / math.prod(space)),  # it sums over the map
            up,
            scale=self.num_heads**-0.5,
            topk=self.topk,
            coefficient_threshold=self.coefficient_threshold,
            basis_threshold=self.basis_threshold,
            signed=self.reconstruct,
        )

    def _select(self, scores: Tensor, alive: Tensor | None) -> Selection:
        first, tokens = self.num_prefix, scores.shape[-1]
        if alive is not None:
            scores = scores.masked_fill(~F.pad(alive, (first, 0), value=True)[:, None, None], -torch.inf)
        if self.keep_prefix and first:
            scores = torch.cat([torch.full_like(scores[..., :first], torch.inf), scores[..., first:]], -1)
        if self.threshold is not None:
            return select_mask(scores > self.threshold, key_size=(tokens,))
        budget = max(math.ceil(self.keep_rate * tokens), first if self.keep_prefix else 1)
        chosen = select_top_k(scores, budget, key_size=(tokens,))
        if alive is None:
            return chosen
        fewer = torch.arange(chosen.used.shape[-1], device=scores.device) < alive.sum(-1).view(-1, 1, 1, 1)
        return replace(chosen, used=chosen.used & fewer)

    def _resize(self, basis: Tensor, space: tuple[int, ...]) -> Tensor:
        """(P + N, K) for another map."""
        if space == self.size:
            return basis
        prefix, rows = basis[: self.num_prefix], basis[self.num_prefix :]
        grid = rows.T.unflatten(-1, self.size).unsqueeze(0)  # (1, K, *size)
        resized = F.interpolate(grid, space, mode=RESIZE[len(space) - 1])
        return torch.cat([prefix, resized[0].flatten(1).T])

    def _attention(self, query: Tensor, key: Tensor, selection: Selection) -> Tensor:
        """(B, heads, P + N, P + N)."""
        rows = query[:, :, self.num_prefix :]
        dense = attention_weights(query, key, None, query.shape[-1] ** -0.5)
        if self.reconstruct:
            return dense
        return torch.cat([dense[:, :, : self.num_prefix], sparse_attention_weights(rows, key, selection)], 2)


class _Predictor(nn.Module):
    """Parameters of the guess."""

    def __init__(self, tokens: int, rank: int, width: int, narrow: int, share_basis: bool) -> None:
        super().__init__()
        rank, narrow = max(1, rank), max(1, narrow)
        self.proj_n = nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, rank), std=0.02))
        self.proj_back_n = self.proj_n if share_basis else nn.Parameter(torch.empty_like(self.proj_n))
        nn.init.trunc_normal_(self.proj_back_n, std=0.02)
        self.proj_c_q = nn.Linear(width, narrow)
        self.proj_c_k = nn.Linear(width, narrow)


def _keep(x: Tensor, there: Tensor | None) -> Tensor:
    return x if there is None else x * there
