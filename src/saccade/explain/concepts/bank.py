"""Banks of concepts: activations as codes times atoms, by four families of dictionary learning.

All of them minimise |A - U V| over codes U and atoms V (2023, arXiv:2306.07304; its rows of V^T are our `atoms`) and
differ in what they allow: one atom a row in K-means (ACE), orthogonal atoms in PCA (ICE), nothing negative in NMF
(CRAFT), few codes in sparse autoencoders and matching pursuit.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from saccade.errors import InputError, check_choice, nearest
from saccade.explain.classifier import check_whole
from saccade.explain.dictionaries import MatchingPursuit, ReluAutoencoder, TopKAutoencoder, train_dictionary

__all__ = ["ConceptBank", "LinearBank", "extract_concepts"]


class ConceptBank(Protocol):
    """What concepts need: a `LinearBank`, a `ConceptDictionary` from `saccade.explain.dictionaries`, or your own."""

    @property
    def atoms(self) -> Tensor:
        """(concepts, dim)."""

    def encode(self, x: Tensor) -> Tensor:
        """Activations (..., dim) -> codes (..., concepts)."""

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (..., concepts) -> activations (..., dim), differentiable."""


@dataclass(frozen=True)
class LinearBank:
    """Atoms whose codes are found by projection.

    Attributes:
        method: "nmf", codes by least squares without negative ones; "pca", by products with orthonormal atoms;
            "kmeans", 1 for the nearest atom and 0 for others.
        atoms: (concepts, dim).
        centre: (dim,), added to every decoded row; the mean for "pca", else 0.
    """

    method: str
    atoms: Tensor
    centre: Tensor

    def __post_init__(self) -> None:
        check_choice("method", self.method, _PROJECTIONS)

    def encode(self, x: Tensor) -> Tensor:
        """Activations (..., dim) -> codes (..., concepts).

        Raises: InputError for another dim, and in "nmf" for activations below 0.
        """
        if x.shape[-1] != self.atoms.shape[1]:
            raise InputError(f"activations are {tuple(x.shape)}: this bank reads (..., {self.atoms.shape[1]})")
        return _PROJECTIONS[self.method](self, x.detach().flatten(0, -2)).view(*x.shape[:-1], -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (..., concepts) -> activations (..., dim)."""
        return codes @ self.atoms.to(codes) + self.centre.to(codes)


def extract_concepts(
    rows: Tensor, num_concepts: int, *, method: str = "nmf", seed: int = 0, **options: Any
) -> "ConceptBank":
    """Learn atoms whose combinations are the activations.

    Args:
        rows: (N, dim), such as the activations at all positions of a layer, or means over the positions of crops.
        num_concepts: of atoms; for "pca" at most N and dim, for "kmeans" at most N.
        method: "nmf", "pca" or "kmeans" of scikit-learn, or "relu", "top_k" or "matching_pursuit", the dictionaries of
            `saccade.explain.dictionaries`, which may have more atoms than dimensions.
        seed: of the start and of the order of training.
        options: of scikit-learn's class (NMF has `max_iter`, 2000 here, and `tol`), or of the dictionary and
            `train_dictionary` (`k`, by default 4; `steps`, by default 500).

    Raises: InputError for wrong arguments, for rows that are not finite, and in "nmf" for negative ones.

    >>> rows = torch.tensor([[2.0, 0.0], [0.0, 1.0], [4.0, 3.0]])
    >>> bank = extract_concepts(rows, 2)
    >>> bool(torch.allclose(bank.decode(bank.encode(rows)), rows, atol=1e-3))
    True
    """
    check_choice("method", method, _EXTRACTORS)
    check_whole("num_concepts", num_concepts)
    if not isinstance(rows, Tensor) or rows.ndim != 2 or not len(rows) or not rows.is_floating_point():
        given = f"{rows.dtype} of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise InputError(f"rows are {given}: give floats (N, dim). Flatten maps with their channels last")
    if not rows.isfinite().all():
        raise InputError("rows hold NaN or infinite values: look for them in the model's activations")
    most = {"pca": min(rows.shape), "kmeans": len(rows)}.get(method)
    if most is not None and num_concepts > most:
        raise InputError(f"num_concepts is {num_concepts}, but {method} finds at most {most} in {tuple(rows.shape)}")
    return _EXTRACTORS[method](rows.detach(), num_concepts, seed, options)


def _nmf(rows: Tensor, num_concepts: int, seed: int, options: Mapping[str, Any]) -> LinearBank:
    from sklearn.decomposition import NMF

    _check_positive(rows)
    found = _make(NMF, num_concepts, {"max_iter": 2000, "random_state": seed, **options}).fit(_to_numpy(rows))
    return _linear("nmf", found.components_, rows)


def _pca(rows: Tensor, num_concepts: int, seed: int, options: Mapping[str, Any]) -> LinearBank:
    from sklearn.decomposition import PCA

    found = _make(PCA, num_concepts, {"random_state": seed, **options}).fit(_to_numpy(rows))
    return _linear("pca", found.components_, rows, found.mean_)


def _kmeans(rows: Tensor, num_concepts: int, seed: int, options: Mapping[str, Any]) -> LinearBank:
    from sklearn.cluster import KMeans

    found = _make(KMeans, num_concepts, {"n_init": 4, "random_state": seed, **options}).fit(_to_numpy(rows))
    return _linear("kmeans", found.cluster_centers_, rows)


def _dictionary(make: Callable[..., Any], **defaults: Any) -> Callable[..., ConceptBank]:
    def extract(rows: Tensor, num_concepts: int, seed: int, options: Mapping[str, Any]) -> ConceptBank:
        own = [name for name in inspect.signature(make).parameters if name not in ("dim", "num_concepts")]
        training = [name for name in inspect.signature(train_dictionary).parameters if name not in _GIVEN]
        _check_options(options, [*own, *training])
        given = {"steps": 500, **defaults, **options}
        if make is TopKAutoencoder and "k" not in options:
            given["k"] = min(given["k"], num_concepts)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            model = make(rows.shape[1], num_concepts, **{name: given[name] for name in own if name in given})
            train_dictionary(model.to(rows), rows, **{name: given[name] for name in training if name in given})
        return model.requires_grad_(False)

    return extract


_GIVEN = ("dictionary", "rows", "generator")
_EXTRACTORS: dict[str, Callable[..., Any]] = {
    "kmeans": _kmeans,
    "matching_pursuit": _dictionary(MatchingPursuit, k=4, rectify=True),
    "nmf": _nmf,
    "pca": _pca,
    "relu": _dictionary(ReluAutoencoder),
    "top_k": _dictionary(TopKAutoencoder, k=4),
}


def _solve_nonnegative(bank: LinearBank, x: Tensor) -> Tensor:
    from scipy.optimize import nnls

    _check_positive(x)
    left, right = torch.linalg.qr(bank.atoms.detach().cpu().double().mT)  # the same problem in fewer dimensions
    wanted, small = (x.cpu().double() @ left).numpy(), right.numpy()
    return torch.stack([torch.from_numpy(nnls(small, row, maxiter=30 * len(bank.atoms))[0]) for row in wanted]).to(x)


def _project(bank: LinearBank, x: Tensor) -> Tensor:
    return (x - bank.centre.to(x)) @ bank.atoms.to(x).mT


def _choose_nearest(bank: LinearBank, x: Tensor) -> Tensor:
    return one_hot(torch.cdist(x, bank.atoms.to(x)).argmin(-1), len(bank.atoms)).to(x)


_PROJECTIONS = {"kmeans": _choose_nearest, "nmf": _solve_nonnegative, "pca": _project}


def _make(make: Callable[..., Any], num_concepts: int, options: Mapping[str, Any]) -> Any:
    _check_options(options, inspect.signature(make).parameters)
    return make(num_concepts, **options)


def _check_options(options: Mapping[str, Any], known: Any) -> None:
    for name in options:
        if name not in known:
            raise InputError(f"{name!r} is no option of this extraction: {nearest(name, known)}")


def _check_positive(rows: Tensor) -> None:
    if rows.min() < 0:
        raise InputError(
            f"activations go down to {rows.min().item():.3g}: nmf needs a layer without negative ones, such as after "
            "ReLU. Name one, or take pca, kmeans or a dictionary"
        )


def _to_numpy(rows: Tensor) -> Any:
    return rows.detach().cpu().double().numpy()


def _linear(method: str, atoms: Any, rows: Tensor, centre: Any = None) -> LinearBank:
    found = torch.from_numpy(atoms).to(rows)
    return LinearBank(
        method, found, torch.zeros_like(found[0]) if centre is None else torch.from_numpy(centre).to(rows)
    )
