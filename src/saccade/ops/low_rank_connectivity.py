"""Predicted connectivity (Sparsifiner, Wei et al., 2023, arXiv:2303.13755): a low-rank guess of the attention map says
which keys each query should see."""

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.errors import InputError
from saccade.ops.check import check_attention, check_positive

__all__ = ["Connectivity", "predict_connectivity"]


class Connectivity(NamedTuple):
    """A guess of an attention map.

    Attributes:
        scores: (B, heads, N, M), the guess; only its order, or what exceeds a threshold, matters.
        coefficients: (B, heads, N, K), of each query in the basis, those that are left out 0.
        basis: (K, M), what the coefficients mix.
    """

    scores: Tensor
    coefficients: Tensor
    basis: Tensor


def predict_connectivity(
    query: Tensor,
    key: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    scale: float | None = None,
    topk: int | None = None,
    coefficient_threshold: float | None = None,
    basis_threshold: float = 0.0,
    signed: bool = False,
) -> Connectivity:
    """Guess an attention map as a few coefficients for each query, times a sparse basis that all queries share.

    Args:
        query: (B, heads, N, c), narrower than the queries of the attention.
        key: (B, heads, M, c).
        down: (M, K), which mixes the keys to K; the softmax of the query's products with these is its coefficients.
        up: (M, K), the basis.
        scale: factor of the products, c^-0.5 by default.
        topk: largest coefficients that a query keeps; they are not normalised again. All, where there are fewer.
        coefficient_threshold: keep the coefficients above it instead.
        basis_threshold: of the basis, absolute values above it are kept, and the others 0.
        signed: leave basis and coefficients as they are: the form in which they learn to rebuild an attention map.

    Returns: Connectivity, differentiable where coefficients and basis are kept.

    >>> ones, down = torch.ones(1, 1, 1, 1), torch.tensor([[9.0, 0.0], [0.0, 0.0]])
    >>> guess = predict_connectivity(ones, torch.ones(1, 1, 2, 1), down, down, topk=1, basis_threshold=0.5)
    >>> guess.coefficients.flatten()  # the second is left out
    tensor([0.9999, 0.0000])
    >>> guess.scores.flatten()
    tensor([8.9989, 0.0000])
    """
    check_attention(query, key, key, axes=1)
    if down.shape != up.shape or down.ndim != 2 or len(down) != key.shape[2] or key.shape[1] != query.shape[1]:
        raise InputError(
            f"key is {tuple(key.shape)}, down is {tuple(down.shape)} and up is {tuple(up.shape)}: keys have the heads "
            f"of the queries, and down and up take (keys, rank). Give ({key.shape[2]}, rank)"
        )
    if topk is not None and coefficient_threshold is not None:
        raise InputError("topk and coefficient_threshold both say which coefficients are kept: give one of them")
    check_positive(topk=1 if topk is None else topk)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    coefficients = torch.softmax((query @ (key.mT @ down)) * scale, -1)
    basis = up.T
    if not signed:
        basis = basis.abs()
        basis = basis.where(basis > basis_threshold, 0)
        if coefficient_threshold is not None:
            coefficients = coefficients.where(coefficients > coefficient_threshold, 0)
        elif topk is not None and topk < coefficients.shape[-1]:
            # topk and not a stable sort: rows of pruned tokens are all ties, and official code breaks them so
            kept = coefficients.detach().topk(topk, -1).indices
            coefficients = torch.zeros_like(coefficients).scatter(-1, kept, coefficients.gather(-1, kept))
    return Connectivity(coefficients @ basis, coefficients, basis)
