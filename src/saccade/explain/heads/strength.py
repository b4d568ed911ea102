"""How far a head looks: its attention by rings of equal distance around each token."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from saccade.explain.attention import AttentionLayer, read_in_parts
from saccade.explain.classifier import check_whole

__all__ = ["HeadStrength", "head_strength", "ring_masses", "ring_numbers"]


@dataclass(frozen=True)
class HeadStrength:
    """Attention of L layers' H heads by distance, means over the image's tokens and the images.

    Distances are Chebyshev's, in tokens: ring 0 is the token itself, ring 1 its 8 neighbours. Prefix tokens lie on no
    ring. All is float64, NaN where a layer has fewer heads or rings.

    Attributes:
        layers: names, in the order of the network.
        grids: (h, w) of their tokens.
        rings: (L, H, R), a token's attention to all of a ring. The sum is 1 minus `to_prefix` for softmax attention.
        per_token: (L, H, R), the same for one token of the ring: the mean over those that have the ring.
        distance: (L, H), the sum of attention times distance.
        entropy: (L, H), of the rows, prefix tokens included unless `patches_only`, in nats.
        to_prefix: (L, H), attention of the image's tokens to prefix tokens.
        from_prefix: (L, H), attention of prefix tokens to the image; NaN without any.
        value_rings: (L, H, R), like `rings` for attention times the length of the value that it weighs, which is what
            arrives; NaN where values were not seen.
        value_to_prefix: (L, H), like `to_prefix`.
        value_distance: (L, H), mean distance of what arrives from the image's tokens.
        patches_only: whether rows were scaled to sum to 1 on the image's tokens.
    """

    layers: tuple[str, ...]
    grids: tuple[tuple[int, int], ...]
    rings: Tensor
    per_token: Tensor
    distance: Tensor
    entropy: Tensor
    to_prefix: Tensor
    from_prefix: Tensor
    value_rings: Tensor
    value_to_prefix: Tensor
    value_distance: Tensor
    patches_only: bool


def head_strength(
    model: nn.Module,
    images: Tensor,
    *,
    patches_only: bool = False,
    source: str = "auto",
    num_prefix: int | None = None,
    batch_size: int = 32,
) -> HeadStrength:
    """Measure how far each head looks (2023, arXiv:2303.13731, by our own definitions).

    Effective token matrices whose entries have signs count by absolute value.

    Args:
        model, images: as in `saccade.explain.read_attention`.
        patches_only: scale each row to sum to 1 on the image's tokens first, so that what goes to a class token does
            not look like less attention nearby; `to_prefix` stays as it was.
        source, num_prefix: as in `read_attention`.
        batch_size: the most images in one forward pass.

    Raises: InputError as `read_attention`.
    """
    check_whole("batch_size", batch_size)
    sums: list[dict[str, Tensor]] = []
    layers: tuple[AttentionLayer, ...] = ()
    for layers in read_in_parts(model, images, batch_size, source=source, num_prefix=num_prefix):
        found = [_measure(layer, patches_only) for layer in layers]
        sums = [{key: old[key] + new[key] for key in new} for old, new in zip(sums, found)] if sums else found
    shape = [max(each["rings"].shape[axis] for each in sums) for axis in (0, 1)]
    table = {key: torch.stack([_fill(each[key], shape) for each in sums]) / len(images) for key in sums[0]}
    return HeadStrength(
        tuple(layer.name for layer in layers),
        tuple(layer.grid for layer in layers),
        **table,
        patches_only=patches_only,
    )


def ring_numbers(grid: tuple[int, int]) -> Tensor:
    """(N, N) Chebyshev distances, in tokens, of a grid's tokens.

    >>> ring_numbers((1, 3))
    tensor([[0, 1, 2],
            [1, 0, 1],
            [2, 1, 0]])
    """
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid)).view(-1, 2)
    return (places[:, None] - places).abs().amax(-1)


def ring_masses(weights: Tensor, grid: tuple[int, int], *, per_token: bool = False) -> Tensor:
    """What tokens give to each ring around them, a mean over the tokens: weights (..., N, N) to (..., max(grid)).

    Args:
        per_token: to one token of the ring, a mean over the tokens whose ring lies in the grid at least in part.
    """
    numbers = ring_numbers(grid).to(weights.device)
    members = torch.stack([numbers == ring for ring in range(max(grid))]).to(weights)  # (R, N, N)
    if not per_token:
        return torch.einsum("...nm,rnm->...r", weights, members) / len(numbers)
    sizes = members.sum(-1, keepdim=True)
    share = members / sizes.clamp(min=1)
    return torch.einsum("...nm,rnm->...r", weights, share) / (sizes > 0).sum((1, 2))


def _measure(layer: AttentionLayer, patches_only: bool) -> dict[str, Tensor]:
    """Each quantity summed over images, (heads,) or (heads, R), float64."""
    prefix, grid = layer.num_prefix, layer.grid
    weights = layer.attention.double().abs()
    rows, first = weights[:, :, prefix:], weights[:, :, :prefix]
    inner = rows[..., prefix:]
    to_prefix = rows[..., :prefix].sum(-1)
    scale = inner.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.double).tiny)
    inner = inner / scale if patches_only else inner
    shares = inner if patches_only else rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.double).tiny)
    numbers = ring_numbers(grid).to(weights)
    none = weights.new_full((len(weights), weights.shape[1]), torch.nan)
    found = {
        "rings": ring_masses(inner, grid),
        "per_token": ring_masses(inner, grid, per_token=True),
        "distance": (inner * numbers).sum(-1).mean(-1),
        "entropy": torch.special.entr(shares).sum(-1).mean(-1),
        "to_prefix": to_prefix.mean(-1),
        "from_prefix": first[..., prefix:].sum(-1).mean(-1) if prefix else none,
    }
    if layer.value is None:
        found |= {"value_rings": none[..., None].expand_as(found["rings"])}
        found |= {"value_to_prefix": none, "value_distance": none}
    else:
        arriving = rows * layer.value.double().norm(dim=-1)[:, :, None]
        inner = arriving[..., prefix:]
        rings = ring_masses(inner, grid)
        found |= {
            "value_rings": rings,
            "value_to_prefix": arriving[..., :prefix].sum(-1).mean(-1),
            "value_distance": (inner * numbers).sum((-1, -2)) / inner.sum((-1, -2)),
        }
    return {key: value.sum(0).cpu() for key, value in found.items()}


def _fill(value: Tensor, shape: list[int]) -> Tensor:
    """NaN for heads and rings that a layer does not have."""
    missing = [n - m for n, m in zip(shape, value.shape)]
    return pad(value, [each for m in reversed(missing) for each in (0, m)], value=torch.nan)
