"""Edits of an activation by a few features of a dictionary, and the weight that they take.

The second axis of Makelov et al. (2024, arXiv:2405.08366).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.errors import InputError
from saccade.explain.classifier import check_whole
from saccade.explain.dictionaries.dictionary import ConceptDictionary

__all__ = ["SparseEdit", "edit_sparsely", "feature_weights"]


class SparseEdit(NamedTuple):
    """What became of activations.

    Attributes:
        activation: (N, dim), edited; the error of the reconstruction is still in it.
        removed: (N, features), those of the activation that were taken out.
        added: (N, features), those of the counterfactual that were put in.
        removed_weight: (N,), sum of the `feature_weights` that were taken out: the size of the edit.
        added_weight: (N,), of those put in, among the counterfactual's.
    """

    activation: Tensor
    removed: Tensor
    added: Tensor
    removed_weight: Tensor
    added_weight: Tensor


@torch.no_grad()
def feature_weights(dictionary: ConceptDictionary, x: Tensor) -> Tensor:
    """Shares of a reconstruction s without its bias, f_j d_j . s / |s|^2: (N, features), which sum to 1.

    Rows without an active feature are 0. A weight is negative where a feature points away from the whole.
    """
    codes, atoms = dictionary.encode(x), dictionary.atoms
    whole = codes @ atoms
    size = whole.square().sum(-1, keepdim=True)
    return codes * (whole @ atoms.mT) / size.where(size > 0, 1.0)


@torch.no_grad()
def edit_sparsely(
    dictionary: ConceptDictionary,
    x: Tensor,
    counterfactual: Tensor,
    *,
    m: int,
    scores: tuple[Tensor, Tensor] | None = None,
    target: Tensor | None = None,
) -> SparseEdit:
    """Take at most m active features out of activations, and put at most m of their counterfactuals' in.

    Args:
        dictionary: in eval mode.
        x: (N, dim).
        counterfactual: (N, dim), the activations of inputs that differ in what the edit should change.
        m: features each way.
        scores: take out those with the highest of the first (N, features), put in those with the highest of the second;
            -infinity is never chosen. `Matches.scores` gives F1 with the old and the new value of an attribute.
        target: without scores, each step takes the feature that brings the activation nearest to this (N, dim), as long
            as one does; None is the counterfactual. A supervised edit is another target.
    """
    check_whole("m", m, 1, dictionary.num_concepts)
    if scores is not None and target is not None:
        raise InputError("scores and target are both given: features are chosen by one of them")
    if x.ndim != 2 or x.shape != counterfactual.shape:
        raise InputError(f"x is {tuple(x.shape)} and counterfactual {tuple(counterfactual.shape)}: give two (N, dim)")
    old, new = dictionary.encode(x), dictionary.encode(counterfactual)
    if scores is not None:
        removed, added = (_highest(score, codes, m) for score, codes in zip(scores, (old, new)))
    else:
        goal = counterfactual if target is None else target
        removed, added = _greedy((goal - x) / dictionary.scale, old, new, dictionary.atoms, m)
    change = (new * added - old * removed) @ dictionary.atoms * dictionary.scale
    weights = [
        (feature_weights(dictionary, each) * chosen).sum(-1) for each, chosen in ((x, removed), (counterfactual, added))
    ]
    return SparseEdit(x + change, removed, added, *weights)


def _highest(scores: Tensor, codes: Tensor, m: int) -> Tensor:
    """(N, features), whether a feature is active and among the m of highest score."""
    if scores.shape != codes.shape:
        raise InputError(f"scores are {tuple(scores.shape)}: give two {tuple(codes.shape)}, a row an activation")
    top = scores.masked_fill(codes == 0, -torch.inf).topk(m, -1)
    return torch.zeros_like(codes, dtype=torch.bool).scatter(-1, top.indices, top.values > -torch.inf)


def _greedy(rest: Tensor, old: Tensor, new: Tensor, atoms: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Features to take out and put in so that `rest` (N, dim), the way to the goal, gets short."""
    steps = torch.cat([-old, new], 1)  # how far along its atom each candidate moves
    atoms = torch.cat([atoms, atoms])
    chosen = torch.zeros_like(steps, dtype=torch.bool)
    for _ in range(2 * m):
        full = torch.cat([each.sum(-1, keepdim=True).expand_as(each) >= m for each in chosen.chunk(2, 1)], 1)
        gain = 2 * steps * (rest @ atoms.mT) - (steps * atoms.norm(dim=-1)).square()
        best = gain.masked_fill(full | chosen | (steps == 0), 0).max(-1)
        move = best.values > 0
        if not move.any():
            break
        chosen = chosen | (torch.nn.functional.one_hot(best.indices, steps.shape[1]).bool() & move[:, None])
        length = steps.gather(1, best.indices[:, None]) * move[:, None]
        rest = rest - length * atoms[best.indices]
    removed, added = chosen.chunk(2, 1)
    return removed, added
