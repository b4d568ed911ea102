"""Dictionaries of concepts: an activation as a sum of few atoms, found by ReLU, gates, top-k or matching pursuit.

Matching pursuit is that of MP-SAE (2025, arXiv:2506.03093; its z is `codes`, its W `atoms`, its r `residual`). The
gated and the attribution autoencoder are those that Makelov et al. (2024, arXiv:2405.08366) compare.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.errors import InputError
from saccade.explain.classifier import check_whole

__all__ = [
    "AttributionAutoencoder",
    "ConceptDictionary",
    "GatedAutoencoder",
    "MatchingPursuit",
    "Reading",
    "ReluAutoencoder",
    "TopKAutoencoder",
    "scaled_input",
]


class Reading(NamedTuple):
    """What a dictionary says of activations.

    Attributes:
        codes: (..., concepts), how much of each atom; most are 0.
        reconstruction: (..., dim), in the scale of the activations.
    """

    codes: Tensor
    reconstruction: Tensor


class ConceptDictionary(nn.Module, ABC):
    """Activations (..., dim) as `codes @ atoms`, after `centre` is subtracted and `scale` divided out.

    Centre 0 and scale 1 until `calibrate`; decoding undoes both, so that a reconstruction can be written back.

    Args:
        dim: of the activations.
        num_concepts: of atoms.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, dim: int, num_concepts: int) -> None:
        super().__init__()
        check_whole("dim", dim)
        check_whole("num_concepts", num_concepts)
        self.dim, self.num_concepts = dim, num_concepts
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(num_concepts, dim)))
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))
        self.renormalise()

    @property
    def atoms(self) -> Tensor:
        """(concepts, dim), rows of unit length; only the part of a gradient that turns a row reaches `weight`."""
        return F.normalize(self.weight, dim=-1)

    @abstractmethod
    def _encode(self, x: Tensor) -> Tensor:
        """Codes of activations that are centred and scaled."""

    def _decode(self, codes: Tensor) -> Tensor:
        return codes @ self.atoms

    def encode(self, x: Tensor) -> Tensor:
        """(..., dim) -> codes (..., concepts)."""
        return self._encode(scaled_input(self, x))

    def decode(self, codes: Tensor) -> Tensor:
        """(..., concepts) -> (..., dim), in the scale of the activations."""
        return self._decode(codes) * self.scale + self.centre

    def forward(self, x: Tensor) -> Reading:
        codes = self.encode(x)
        return Reading(codes, self.decode(codes))

    def loss(self, x: Tensor) -> Tensor:
        """Squared error in the scale of `calibrate`, summed over dim, a mean over activations."""
        x = scaled_input(self, x)
        return (self._decode(self._encode(x)) - x).square().sum(-1).mean()

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Set centre and scale from a sample (..., dim): its mean, and the mean norm over sqrt(dim) around it."""
        x = _check(self, x).flatten(0, -2)
        self.centre.copy_(x.mean(0))
        scale = (x - self.centre).norm(dim=-1).mean() / self.dim**0.5
        self.scale.copy_(scale.where(scale > 0, 1.0))

    @torch.no_grad()
    def renormalise(self) -> None:
        """Bring the rows of `weight` to unit length: atoms stay, and steps of an optimizer do not shrink with time."""
        self.weight.copy_(F.normalize(self.weight, dim=-1))


class ReluAutoencoder(ConceptDictionary):
    """Codes are relu((x - b) V + c), with a bias b that the decoder adds again; the loss adds `l1` times their sum.

    Args:
        dim, num_concepts: as in `ConceptDictionary`.
        l1: price of a unit of code. Codes that cost shrink, and small ones vanish.
    """

    def __init__(self, dim: int, num_concepts: int, *, l1: float = 0.1) -> None:
        super().__init__(dim, num_concepts)
        self.l1 = l1
        self.encoder = nn.Parameter(self.weight.detach().clone())  # starts as the decoder
        self.encoder_bias = nn.Parameter(torch.zeros(num_concepts))
        self.bias = nn.Parameter(torch.zeros(dim))

    def _encode(self, x: Tensor) -> Tensor:
        return F.linear(x - self.bias, self.encoder, self.encoder_bias).relu()

    def _decode(self, codes: Tensor) -> Tensor:
        return super()._decode(codes) + self.bias

    def loss(self, x: Tensor) -> Tensor:
        """The squared error, and the mean sum of codes times `l1`."""
        x = scaled_input(self, x)
        codes = self._encode(x)
        return ((self._decode(codes) - x).square().sum(-1) + self.l1 * codes.sum(-1)).mean()


class GatedAutoencoder(ReluAutoencoder):
    """One linear layer says which codes are on, and the same one, each row stretched, how large they are.

    The price falls on the gates alone, so that codes that stay need not shrink; a second squared error, of the gates'
    positive parts through a decoder that it does not train, teaches the gates.

    Args:
        dim, num_concepts: as in `ConceptDictionary`.
        l1: price of a unit of gate.
    """

    def __init__(self, dim: int, num_concepts: int, *, l1: float = 0.1) -> None:
        super().__init__(dim, num_concepts, l1=l1)
        self.stretch = nn.Parameter(torch.zeros(num_concepts))  # logarithm
        self.size_bias = nn.Parameter(torch.zeros(num_concepts))

    def _encode(self, x: Tensor) -> Tensor:
        return self._gate(x)[1]

    def _gate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gates before the step, and codes."""
        common = F.linear(x - self.bias, self.encoder)
        gate = common + self.encoder_bias
        return gate, (common * self.stretch.exp() + self.size_bias).relu() * (gate > 0)

    def loss(self, x: Tensor) -> Tensor:
        """Both squared errors, and the mean sum of positive gates times `l1`."""
        x = scaled_input(self, x)
        gate, codes = self._gate(x)
        through = gate.relu() @ self.atoms.detach() + self.bias.detach()
        errors = (self._decode(codes) - x).square() + (through - x).square()
        return (errors.sum(-1) + self.l1 * gate.relu().sum(-1)).mean()


class AttributionAutoencoder(ReluAutoencoder):
    """A ReLU autoencoder whose loss also pays for what a metric would see of its codes, and of what they leave.

    Train it on rows (N, 2 dim): each activation, then the metric's gradient at it, such as
    `saccade.explain.relevance.coefficients` with recipe "gradient" gives. It reads activations (..., dim) alone.

    Args:
        dim, num_concepts: as in `ConceptDictionary`.
        l1: price of a unit of code.
        attribution: price of |code x gradient along its atom|, summed over codes.
        unexplained: price of |error . gradient|.
    """

    def __init__(
        self, dim: int, num_concepts: int, *, l1: float = 0.1, attribution: float = 0.1, unexplained: float = 0.1
    ) -> None:
        super().__init__(dim, num_concepts, l1=l1)
        self.attribution, self.unexplained = attribution, unexplained

    def loss(self, x: Tensor) -> Tensor:
        """The loss of `ReluAutoencoder`, and both prices."""
        if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[-1] != 2 * self.dim:
            given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"rows are {given}: give (N, {2 * self.dim}), an activation and the gradient at it")
        x, slope = x.split(self.dim, -1)
        x, slope = scaled_input(self, x), slope * self.scale
        codes = self._encode(x)
        error = x - self._decode(codes)
        paid = self.l1 * codes.sum(-1) + self.attribution * (codes * (slope @ self.atoms.mT)).abs().sum(-1)
        return (error.square().sum(-1) + paid + self.unexplained * (error * slope).sum(-1).abs()).mean()


class TopKAutoencoder(ReluAutoencoder):
    """Codes are the k largest of a linear layer, where positive; nothing is paid for them.

    Args:
        dim, num_concepts: as in `ConceptDictionary`.
        k: codes that may differ from 0; can be set anew at any time.
    """

    def __init__(self, dim: int, num_concepts: int, *, k: int) -> None:
        super().__init__(dim, num_concepts, l1=0.0)
        check_whole("k", k, 1, num_concepts)
        self.k = k

    def _encode(self, x: Tensor) -> Tensor:
        codes = super()._encode(x)
        top = codes.topk(self.k, -1)
        return torch.zeros_like(codes).scatter(-1, top.indices, top.values)


class MatchingPursuit(ConceptDictionary):
    """Codes by matching pursuit: k times, the atom that best fits the residual takes its share of it.

    The residual shrinks with each step and is orthogonal to the atom of that step, so k can be changed after training
    and more steps never do worse. An atom may be chosen twice; its shares add up.

    Args:
        dim, num_concepts: as in `ConceptDictionary`.
        k: steps; None goes on until nothing new is found, and needs `rectify`. Can be set anew at any time.
        rectify: a step whose best fit is negative takes nothing. Otherwise it turns that atom around.
        absolute: the best fit is that of largest absolute value.
        threshold: an activation whose residual is shorter is done.
        dropout: probability that an atom is left out of a training step, for all activations of the batch.
        learn_scale: atoms get one learned common length, exp(`multiplier`), instead of 1. Longer atoms overshoot.
        project: a gradient reaches `weight` without its part along the row. False hands it on whole, as where rows are
            brought to unit length in place before the pass.
    """

    def __init__(
        self,
        dim: int,
        num_concepts: int,
        *,
        k: int | None,
        rectify: bool = False,
        absolute: bool = False,
        threshold: float = 0.0,
        dropout: float = 0.0,
        learn_scale: bool = False,
        project: bool = True,
    ) -> None:
        super().__init__(dim, num_concepts)
        if k is not None:
            check_whole("k", k)
        elif not rectify:
            raise InputError("k is None without rectify=True: the pursuit would not end. Give a number of steps")
        if rectify and absolute:
            raise InputError("rectify and absolute are both set: one drops negative fits, the other wants them")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout is {dropout}: give a probability below 1")
        self.k, self.rectify, self.absolute, self.threshold = k, rectify, absolute, threshold
        self.dropout, self.project = dropout, project
        self.multiplier = nn.Parameter(torch.zeros(()), requires_grad=learn_scale)

    @property
    def atoms(self) -> Tensor:
        """(concepts, dim), rows of length exp(`multiplier`)."""
        unit = super().atoms
        unit = unit if self.project else self.weight + (unit - self.weight).detach()
        return unit * self.multiplier.exp()

    def _encode(self, x: Tensor) -> Tensor:
        return self.pursue(x)[0]

    def _decode(self, codes: Tensor) -> Tensor:
        return codes.to(self.weight.dtype) @ self.atoms

    def pursue(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (..., concepts) and residual (..., dim) of centred and scaled x, which is codes @ atoms + residual.

        The choice of an atom has no gradient, its share and the atom have. Sums are float32 at least.
        """
        residual = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, self.dim)
        atoms = self.atoms.to(residual.dtype)
        if self.training and self.dropout:
            atoms = atoms * (torch.rand(self.num_concepts, 1, device=atoms.device) >= self.dropout)
        codes = residual.new_zeros(len(residual), self.num_concepts)
        active = torch.ones_like(codes[:, 0], dtype=torch.bool)
        for _ in range(self.num_concepts if self.k is None else self.k):
            with torch.no_grad():
                fits = residual @ atoms.mT
                chosen = (fits.abs() if self.absolute else fits).argmax(-1)
                active = active & (residual.norm(dim=-1) >= self.threshold)
            atom = atoms[chosen]
            share = (residual * atom).sum(-1)
            share = (share.relu() if self.rectify else share) * active
            codes = codes.scatter_add(-1, chosen[:, None], share[:, None])
            residual = residual - share[:, None] * atom
            if self.k is None:
                active = (
                    active & (codes.detach().gather(-1, chosen[:, None])[:, 0] == share) & (share > 0)
                )  # new support
                if not active.any():
                    break
        return codes.view(*x.shape[:-1], -1), residual.view(x.shape)


def scaled_input(dictionary: ConceptDictionary, x: Tensor) -> Tensor:
    """Activations as a dictionary's atoms see them: checked, centred, scaled."""
    return (_check(dictionary, x) - dictionary.centre) / dictionary.scale


def _check(dictionary: ConceptDictionary, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[-1] != dictionary.dim or not x.is_floating_point():
        given = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise InputError(f"activations are {given}: this dictionary reads floats (..., {dictionary.dim})")
    return x
