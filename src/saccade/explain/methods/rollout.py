"""Attention rollout (Abnar and Zuidema, 2020, arXiv:2005.00928), for any mixer and through stages of any resolution."""

import torch
from torch import Tensor

from saccade.errors import InputError
from saccade.explain.classifier import Classifier
from saccade.explain.methods.attribution import Attribution, enlarge
from saccade.taps import tap

__all__ = ["attention_rollout"]

_BUDGET = 2**28  # bytes of attention maps held at a time; one image may need more


def attention_rollout(classify: Classifier, images: Tensor, target: Tensor, *, batch_size: int) -> Attribution:
    """Share of each token of the first layer in the output of the last, if only attention and skips mixed tokens.

    Each layer mixes tokens with the mean over heads of |0.5 A + 0.5 I|, rows scaled to 1. For softmax attention that is
    the paper's matrix; for mixers that show an effective token matrix A, whose entries have signs and whose rows any
    sum, it is the matrix of the layer with its skip connection. The product of the layers is read out as models read
    their last layer: the class token's row where there are prefix tokens (the first of them), else the mean of all
    rows. That needs one row-times-matrix product a layer, from the last to the first.

    Where the next lower layer has another grid, a token's share is spread evenly over the area it covers there. Prefix
    tokens carry over to a layer with as many of them, else their share ends, as they are no part of the image. A layer
    that shows no attention counts as the identity. The map is not negative and knows no class: `target` changes
    nothing.

    Raises: InputError for a model whose modules show no attention, for attention that is not square, and for layers
        whose tokens lie on no 2-D grid.
    """
    maps: list[Tensor] = []
    done, size = 0, 1
    while done < len(images):
        part = images[done : done + size]
        layers = _attention_layers(classify, part)
        maps.append(enlarge(_roll_out(layers), images.shape[-2:]).to(images))
        image_bytes = sum(attention.nbytes for attention, _ in layers) // len(part)
        done, size = done + len(part), min(batch_size, max(1, _BUDGET // image_bytes))
    return Attribution(torch.cat(maps))


def _attention_layers(classify: Classifier, images: Tensor) -> list[tuple[Tensor, tuple[int, int]]]:
    """(attention (B, heads, N, N), grid) of each layer that shows attention, first to last."""
    with torch.no_grad(), tap(classify.model, kinds=("attention", "features")) as seen:
        classify(images)
        if not seen.attention:
            raise InputError(
                f"{type(classify.model).__name__} shows no attention: attention_rollout needs saccade mixers with "
                "attention. Use another method, such as integrated_gradients, or put such mixers in with saccade.swap"
            )
    return [
        (call.attention, _grid(name, call.attention, call.features))
        for name in seen
        for call in seen.calls(name)
        if call.attention is not None
    ]


def _grid(name: str, attention: Tensor, features: Tensor | None) -> tuple[int, int]:
    queries, keys = attention.shape[-2:]
    if queries != keys:
        raise InputError(
            f"{name!r} maps {keys} keys to {queries} queries: attention_rollout needs layers where both are the same"
        )
    space = () if features is None else tuple(features.shape[1:-1])
    if len(space) != 2 or not 0 <= queries - space[0] * space[1] <= space[0] * space[1]:
        raise InputError(
            f"{name!r} has attention over {queries} tokens and features on a grid {space}: attention_rollout needs "
            "features (B, h, w, C) of the same tokens, and at most as many prefix tokens"
        )
    return space


def _roll_out(layers: list[tuple[Tensor, tuple[int, int]]]) -> Tensor:
    """(B, h, w) on the first layer's grid."""
    attention, grid = layers[-1]
    prefix = attention.shape[-1] - grid[0] * grid[1]
    share = attention.new_zeros(attention.shape[0], attention.shape[-1])
    share[:, : 1 if prefix else None] = 1 if prefix else 1 / attention.shape[-1]
    for attention, finer in reversed(layers):
        share = _mix(_carry(share, grid, attention.shape[-1], finer), attention)
        grid = finer
    return share[:, share.shape[-1] - grid[0] * grid[1] :].unflatten(1, grid)


def _mix(share: Tensor, attention: Tensor) -> Tensor:
    """share (B, N) times the mean over heads of |A + I|, rows scaled to 1; a row of zeros counts as that of I."""
    weights = attention.abs().mean(1)
    own = (attention.diagonal(dim1=-2, dim2=-1) + 1).abs().mean(1)
    weights.diagonal(dim1=-2, dim2=-1).copy_(own)
    rows = weights.sum(-1)
    moved = torch.where(rows > 0, share / rows, 0)
    return moved[:, None].matmul(weights)[:, 0] + share.where(rows == 0, 0)


def _carry(share: Tensor, grid: tuple[int, int], tokens: int, finer: tuple[int, int]) -> Tensor:
    """share (B, prefix + grid) of one layer as (B, tokens) of the layer below it."""
    before, after = share.shape[-1] - grid[0] * grid[1], tokens - finer[0] * finer[1]
    head, body = share[:, :before], share[:, before:].unflatten(1, grid)
    if finer != grid:
        rows, columns = (_overlap(*sides).to(share) for sides in zip(grid, finer, strict=True))
        body = torch.einsum("bhw,hi,wj->bij", body, rows, columns)
    if before != after:
        head = share.new_zeros(len(share), after)
    return torch.cat([head, body.flatten(1)], 1)


def _overlap(coarse: int, fine: int) -> Tensor:
    """(coarse, fine): the part of each coarse cell that lies in each fine cell, on one axis; rows sum to 1."""
    edges, cuts = torch.linspace(0, fine, coarse + 1), torch.linspace(0, fine, fine + 1)
    shared = torch.minimum(edges[1:, None], cuts[1:]) - torch.maximum(edges[:-1, None], cuts[:-1])
    return shared.clamp(min=0) * (coarse / fine)
