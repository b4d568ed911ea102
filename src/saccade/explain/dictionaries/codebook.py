"""Codebooks: an activation replaced by the mean of its k best codes, so that it becomes k whole numbers.

Codebook Features (2023, arXiv:2310.17230; official code takes the mean, the paper says sum).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from saccade.errors import InputError, check_choice
from saccade.explain.classifier import check_whole

__all__ = ["Codebook", "forbid_codes", "force_codes"]

Edit = Callable[[Tensor], Tensor]

_SIMILARITIES = ("euclidean", "inner")
_GRADIENTS = ("aeloss", "base", "fullaeloss", "vqvae")


class Codebook(nn.Module):
    """Activations (..., dim) to the mean of their k best codes, in `groups` parts of the channels with own codes.

    A part is brought to mean 0 and variance 1 (layer norm with weight and bias), and its k most similar codes are
    found; their mean y stands in its place, so that the length of the activation is gone. On the way back the gradient
    goes straight through to the normalised part n, as if y were n. What codes learn from is the `gradient`:

    - "aeloss": the task through y, and the mean over tokens of |y - n|^2
    - "base": the task alone
    - "fullaeloss": as "aeloss"; and n is drawn to y by beta |y - n|^2
    - "vqvae": the mean over tokens of |y - n|^2 alone; and n is drawn to y

    The draw of n to y is a sum over tokens and not a mean, as in the official code.

    Args:
        dim: of the activations.
        num_codes: of each group.
        k: codes of an activation and group.
        groups: parts of the channels, such as heads; dim is a multiple.
        similarity: "inner", n . code / |code|, or "euclidean", -|n - code|.
        gradient, beta: as above.
        eps: beside the variance.

    Codes start as N(0, 1); `initialise` sets them from activations.
    """

    uses: Tensor

    def __init__(
        self,
        dim: int,
        num_codes: int,
        *,
        k: int = 1,
        groups: int = 1,
        similarity: str = "inner",
        gradient: str = "aeloss",
        beta: float = 0.25,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        for name, value in {"dim": dim, "num_codes": num_codes, "groups": groups}.items():
            check_whole(name, value)
        check_whole("k", k, 1, num_codes)
        check_choice("similarity", similarity, _SIMILARITIES)
        check_choice("gradient", gradient, _GRADIENTS)
        if dim % groups:
            raise InputError(f"dim is {dim} and groups are {groups}: give a number of groups that divides dim")
        self.dim, self.num_codes, self.k, self.groups = dim, num_codes, k, groups
        self.similarity, self.gradient, self.beta, self.eps = similarity, gradient, beta, eps
        self.norm_weight = nn.Parameter(torch.ones(groups, dim // groups))
        self.norm_bias = nn.Parameter(torch.zeros(groups, dim // groups))
        self.codes = nn.Parameter(torch.randn(groups, num_codes, dim // groups))
        self.register_buffer("uses", torch.zeros(groups, num_codes, dtype=torch.long), persistent=False)

    def forward(self, x: Tensor, edit: Edit | None = None) -> Tensor:
        """(..., dim), or (..., groups, dim / groups) -> the same shape.

        Args:
            x: activations.
            edit: from the chosen ids (..., groups, k) to the ids that are used, where -1 adds nothing; `force_codes`
                and `forbid_codes` make one.
        """
        parts = self.normalise(x)
        ids = self._choose(parts)
        if edit is not None:
            ids = self._check_ids(edit(ids), ids.shape)
        if self.training:
            self.uses += self._count(ids)
        flat = parts.flatten(0, -3)
        y: Tensor = _Snap.apply(flat, self.codes, ids.flatten(0, -3), self.gradient, self.beta)
        return y.view(x.shape).to(x.dtype)

    def encode(self, x: Tensor) -> Tensor:
        """(..., dim) -> ids (..., groups, k), the best first."""
        return self._choose(self.normalise(x))

    def decode(self, ids: Tensor) -> Tensor:
        """ids (..., groups, k) -> (..., dim), the mean of the codes; -1 adds nothing and is counted."""
        ids = self._check_ids(ids, ids.shape)
        return _mean(self.codes, ids.flatten(0, -3)).reshape(*ids.shape[:-2], self.dim)

    def normalise(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., groups, dim / groups), what codes are compared with."""
        width = self.dim // self.groups
        whole = isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1
        if not whole or (x.shape[-1] != self.dim and (x.ndim < 3 or x.shape[-2:] != (self.groups, width))):
            given = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            also = f" or (..., {self.groups}, {width})" if self.groups > 1 else ""
            raise InputError(f"activations are {given}: this codebook reads floats (..., {self.dim}){also}")
        parts = x.reshape(*(x.shape[:-1] if x.shape[-1] == self.dim else x.shape[:-2]), self.groups, width)
        return F.layer_norm(parts, (width,), eps=self.eps) * self.norm_weight + self.norm_bias

    @torch.no_grad()
    def initialise(self, x: Tensor, *, seed: int = 0) -> None:
        """Set the codes to the centres that k-means finds among activations (..., dim), normalised."""
        from sklearn.cluster import KMeans

        parts = self.normalise(x).flatten(0, -3)
        distinct = min(len(parts[:, group].unique(dim=0)) for group in range(self.groups))
        if distinct < self.num_codes:
            raise InputError(
                f"{len(parts)} activations, {distinct} of them distinct, are too few for {self.num_codes} centres: "
                "give more, or have fewer codes"
            )
        for group in range(self.groups):
            found = KMeans(self.num_codes, n_init=1, random_state=seed).fit(parts[:, group].double().cpu().numpy())
            self.codes[group].copy_(torch.from_numpy(found.cluster_centers_))

    @property
    def active(self) -> float:
        """Share of the codes that were used in training since the last `replace_dead`."""
        return (self.uses > 0).double().mean().item()

    @torch.no_grad()
    def replace_dead(self, x: Tensor, *, noise: float = 0.0, generator: torch.Generator | None = None) -> int:
        """Set codes that no training pass used since the last call to random activations, and count anew.

        Args:
            x: activations (..., dim) of now.
            noise: standard normal numbers are added, times this and the length of the normalised activation.
            generator: of both; None takes torch's own.

        Returns: how many were replaced. Raises: InputError if there was no training pass.
        """
        if not self.uses.any():
            raise InputError("no code was used since the last call: run the codebook in training mode first")
        parts = self.normalise(x).flatten(0, -3)
        group, code = (self.uses == 0).nonzero(as_tuple=True)
        drawn = torch.randint(len(parts), group.shape, generator=generator).to(parts.device)
        new = parts[drawn, group]
        shift = torch.randn(new.shape, generator=generator, dtype=new.dtype).to(new.device)
        self.codes[group, code] = new + noise * new.norm(dim=-1, keepdim=True) * shift
        self.uses.zero_()
        return len(group)

    def penalty(self, ids: Tensor, *, order: float = 1.0) -> Tensor:
        """Sum of the norms of the codes that ids (..., groups, k) name, each once: a regulariser, times 0.01 or so."""
        ids = self._check_ids(ids, ids.shape)
        return (self.codes.norm(order, dim=-1) * (self._count(ids) > 0)).sum()

    @torch.no_grad()
    def _choose(self, parts: Tensor) -> Tensor:
        flat = parts.flatten(0, -3).transpose(0, 1)  # (groups, tokens, width)
        if self.similarity == "inner":
            near = flat @ F.normalize(self.codes, dim=-1).mT
        else:
            near = -torch.cdist(flat, self.codes)
        return near.topk(self.k, -1).indices.transpose(0, 1).reshape(*parts.shape[:-1], self.k)

    def _check_ids(self, ids: Any, shape: torch.Size) -> Tensor:
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.shape != shape or ids.ndim < 3:
            given = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"a {type(ids).__name__}"
            raise InputError(f"ids are {given}: give whole numbers (..., groups, k), as `encode` does")
        if ids.shape[-2] != self.groups or (ids.numel() and not -1 <= ids.min() <= ids.max() < self.num_codes):
            raise InputError(
                f"ids of shape {tuple(ids.shape)} lie in {ids.min().item()}..{ids.max().item()}: this codebook has "
                f"{self.groups} group(s) with codes 0 to {self.num_codes - 1}, and -1 for none"
            )
        return ids

    def _count(self, ids: Tensor) -> Tensor:
        """How often each code occurs: (groups, codes)."""
        flat = ids.flatten(0, -3).transpose(0, 1).flatten(1)  # (groups, tokens * k)
        return torch.zeros_like(self.uses).scatter_add(1, flat.clamp_min(0), (flat >= 0).long())

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_codes={self.num_codes}, k={self.k}, groups={self.groups}, {self.similarity}"


class _Snap(torch.autograd.Function):
    """(tokens, groups, width), codes, ids -> means of codes; what goes back is said in `Codebook`."""

    @staticmethod
    def forward(x: Tensor, codes: Tensor, ids: Tensor, gradient: str, beta: float) -> Tensor:
        return _mean(codes, ids).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, codes, ids, ctx.gradient, ctx.beta = inputs
        ctx.save_for_backward(x, codes, ids, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, codes, ids, y = ctx.saved_tensors
        to_x, to_y = upstream, upstream
        if ctx.gradient in ("fullaeloss", "vqvae"):
            to_x = to_x + 2 * ctx.beta * (x - y)
        if ctx.gradient == "vqvae":
            to_y = torch.zeros_like(upstream)
        if ctx.gradient != "base":
            to_y = to_y + 2 * (y - x) / len(x)
        share = (to_y / ids.shape[-1])[..., None, :] * (ids >= 0)[..., None]  # of each of the k codes
        rows = ids.clamp_min(0) + codes.shape[1] * torch.arange(codes.shape[0], device=ids.device)[:, None]
        to_codes = torch.zeros_like(codes).flatten(0, 1).index_add(0, rows.flatten(), share.flatten(0, -2).to(codes))
        return to_x, to_codes.view_as(codes), None, None, None


def _mean(codes: Tensor, ids: Tensor) -> Tensor:
    picked = codes[torch.arange(len(codes), device=ids.device)[:, None], ids.clamp_min(0)]  # (tokens, groups, k, width)
    return (picked * (ids >= 0)[..., None]).sum(-2) / ids.shape[-1]


def force_codes(codes: int | Sequence[int], *, position: int | slice | Tensor = slice(None), group: int = 0) -> Edit:
    """An edit of ids that puts codes in place of the chosen ones.

    Args:
        codes: one, which then is the activation by itself, or k of them.
        position: along the axis of tokens, the one before groups: an index, a slice or several indices.
        group: whose codes.

    >>> force_codes(5, position=-1)(torch.zeros(1, 3, 1, 1, dtype=torch.long)).flatten()
    tensor([0, 0, 5])
    """
    given = [codes] if isinstance(codes, int) else list(codes)

    def edit(ids: Tensor) -> Tensor:
        if len(given) not in (1, ids.shape[-1]):
            raise InputError(f"{len(given)} codes are forced where {ids.shape[-1]} are chosen: give one, or as many")
        _check_place(ids, group)
        ids = ids.clone()
        ids[..., position, group, :] = torch.tensor(given, device=ids.device)
        return ids

    return edit


def forbid_codes(codes: int | Sequence[int], *, group: int = 0) -> Edit:
    """An edit of ids after which these codes add nothing; the mean is still over k.

    >>> forbid_codes([3])(torch.tensor([[[[3, 4]]]])).flatten()
    tensor([-1,  4])
    """
    given = [codes] if isinstance(codes, int) else list(codes)

    def edit(ids: Tensor) -> Tensor:
        _check_place(ids, group)
        ids = ids.clone()
        own = ids[..., group, :]
        ids[..., group, :] = own.masked_fill(torch.isin(own, torch.tensor(given, device=ids.device)), -1)
        return ids

    return edit


def _check_place(ids: Tensor, group: int) -> None:
    if not 0 <= group < ids.shape[-2]:
        raise InputError(f"group is {group}, but the ids {tuple(ids.shape)} have {ids.shape[-2]} group(s)")
