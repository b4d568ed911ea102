"""What is measured of an extraction: does it rebuild the activations, with few concepts, the same ones from other data?

The measures of 2023, arXiv:2306.07304, recalled; its score of how far rebuilt activations lie from real ones is left
out.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from saccade.errors import InputError
from saccade.explain.classifier import check_whole
from saccade.explain.concepts.bank import ConceptBank, extract_concepts
from saccade.explain.dictionaries import num_active

__all__ = ["Extraction", "atom_distance", "measure_extraction", "relative_error", "wasserstein"]


@dataclass(frozen=True)
class Extraction:
    """What `measure_extraction` found; small is good.

    Attributes:
        relative_error: |A - reconstruction| over |A|.
        num_active: L0, mean number of codes that differ from 0.
        instability: `atom_distance` of banks from different folds, mean over pairs.
        wasserstein: between activations and reconstructions, in their unit.
    """

    relative_error: float
    num_active: float
    instability: float
    wasserstein: float


def measure_extraction(
    rows: Tensor, num_concepts: int, *, method: str = "nmf", folds: int = 2, seed: int = 0, **options: Any
) -> Extraction:
    """Extract concepts from activations, and from folds of them, and measure what comes out.

    Args:
        rows, num_concepts, method, options: as in `extract_concepts`.
        folds: disjoint parts in which the rows are dealt out at random, each large enough for the extraction.
        seed: of extraction, folds and samples.

    Raises: InputError as `extract_concepts`.
    """
    check_whole("folds", folds, 2)
    bank = extract_concepts(rows, num_concepts, method=method, seed=seed, **options)
    codes = bank.encode(rows)
    rebuilt = bank.decode(codes)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(rows.device)
    banks = [
        extract_concepts(rows[part], num_concepts, method=method, seed=seed, **options) for part in order.chunk(folds)
    ]
    apart = [atom_distance(a, b) for a, b in combinations(banks, 2)]
    return Extraction(
        relative_error(rows, rebuilt), num_active(codes), sum(apart) / len(apart), wasserstein(rows, rebuilt, seed=seed)
    )


def relative_error(rows: Tensor, rebuilt: Tensor) -> float:
    """Frobenius norm of the difference over that of the activations.

    >>> relative_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]))
    0.8
    """
    return ((rows - rebuilt).double().norm() / rows.double().norm()).item()


def atom_distance(first: ConceptBank, second: ConceptBank) -> float:
    """Mean cosine distance of two banks' atoms, each matched with one of the other so that the sum is least (Hungarian
    method): 0 for the same atoms in any order and of any length.

    Where codes of both banks may have any sign, as in "pca", an atom is the same as its opposite.

    Raises: InputError if they have different numbers of atoms.
    """
    from scipy.optimize import linear_sum_assignment

    a, b = (torch.nn.functional.normalize(bank.atoms.detach().double(), dim=-1) for bank in (first, second))
    if a.shape != b.shape:
        raise InputError(f"atoms are {tuple(a.shape)} and {tuple(b.shape)}: give banks of the same size")
    cosines = a @ b.mT
    if all(getattr(bank, "method", "") == "pca" for bank in (first, second)):
        cosines = cosines.abs()
    chosen = linear_sum_assignment(-cosines.cpu().numpy())
    return 1 - cosines.cpu()[chosen].mean().item()


def wasserstein(first: Tensor, second: Tensor, *, most: int = 500, seed: int = 0) -> float:
    """1-Wasserstein distance of two samples of rows (N, dim), by the best assignment of one to the other.

    Args:
        most: rows of each that are drawn where there are more; time grows with its third power.
        seed: of the draw.

    >>> wasserstein(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.5], [0.0]]))
    0.25
    """
    from scipy.optimize import linear_sum_assignment

    rng = torch.Generator().manual_seed(seed)
    count = min(most, len(first), len(second))
    a, b = (each[torch.randperm(len(each), generator=rng)[:count].to(each.device)].double() for each in (first, second))
    costs = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").cpu()  # equal rows are at distance 0
    chosen = linear_sum_assignment(costs.numpy())
    return costs[chosen].mean().item()
