"""Attention rollout and attention flow (Abnar and Zuidema, 2020, arXiv:2005.00928), for any mixer and any model with
attention, and through stages of any resolution."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.errors import InputError, check_choice
from saccade.explain.attention import AttentionLayer, describe_layers, read_in_parts
from saccade.explain.classifier import Classifier
from saccade.explain.methods.attribution import Attribution, Detail, LayerMap, enlarge

__all__ = ["attention_flow", "attention_rollout"]

_UNIT = 2.0**-24  # of capacities, which are whole numbers in 32 bits; what leaves the source sums to 1


def attention_rollout(
    classify: Classifier,
    images: Tensor,
    target: Tensor,
    *,
    batch_size: int,
    head_fusion: str = "mean",
    discard: float = 0.0,
    residual: float = 0.5,
    source: str = "auto",
    num_prefix: int | None = None,
) -> Attribution:
    """Share of each token of the first layer in the output of the last, if only attention and skips mixed tokens.

    Each layer mixes tokens with the mean over heads of |0.5 A + 0.5 I|, rows scaled to 1. For softmax attention that is
    the paper's matrix; for mixers that show an effective token matrix A, whose entries have signs and whose rows any
    sum, it is the matrix of the layer with its skip connection. The product of the layers is read out as models read
    their last layer: the class token's row where there are prefix tokens (the first of them), else the mean of all
    rows. That needs one row-times-matrix product a layer, from the last to the first.

    Where the next lower layer has another grid, a token's share is spread evenly over the area it covers there. Prefix
    tokens carry over to a layer with as many of them, else their share ends, as they are no part of the image. A layer
    that shows no attention, or attends among channels, counts as the identity. The map is not negative and knows no
    class: `target` changes nothing. The result's `layer` names the layers, its `inferred` says where they were read and
    what their tokens are.

    Args:
        head_fusion: "mean", "max" or "min" over heads.
        discard: share of the fused matrix's entries, the smallest of each image, that are set to 0 before the skip.
        residual: share of the skip connection, below 1; 0.5 as in the paper.
        source, num_prefix: as in `saccade.explain.read_attention`.

    Raises: InputError as `read_attention`, and for options out of range.
    """
    fusion = _Fusion(head_fusion, discard, residual)
    return _map_parts(classify, images, batch_size, source, num_prefix, lambda layers: _roll_out(layers, fusion))


def attention_flow(
    classify: Classifier,
    images: Tensor,
    target: Tensor,
    *,
    batch_size: int,
    head_fusion: str = "mean",
    discard: float = 0.0,
    residual: float = 0.5,
    source: str = "auto",
    num_prefix: int | None = None,
) -> Attribution:
    """The most that can flow from the output to each token of the first layer, if attention is the capacity of an edge.

    The layers' matrices are those of `attention_rollout`, read out at the same place: a source feeds the class token,
    or every token of the last layer with its share of their mean. Each token of the first layer is the only sink in
    turn (the paper's maximum flow), so that values lie between the rollout and 1 and have no common sum.

    Capacities are whole multiples of 2^-24, so a flow is off by at most 2^-25 for each edge of a smallest cut. Every
    token is a problem of its own on all edges: an image takes about a second for 65 tokens and 6 layers, and a quarter
    of a minute for 197 tokens and 12 layers. `discard` takes edges away.

    Args:
        head_fusion, discard, residual, source, num_prefix: as in `attention_rollout`.

    Raises: InputError as `attention_rollout`.
    """
    fusion = _Fusion(head_fusion, discard, residual)
    return _map_parts(classify, images, batch_size, source, num_prefix, lambda layers: _flow(layers, fusion))


Layers = Sequence[tuple[Tensor, tuple[int, int]]]
"""(attention (B, heads, N, N), grid) of each layer, first to last."""


class _Fusion(NamedTuple):
    """How the heads of a layer and its skip connection become one matrix."""

    head_fusion: str = "mean"
    discard: float = 0.0
    residual: float = 0.5

    def check(self) -> None:
        check_choice("head_fusion", self.head_fusion, _FUSE)
        for name, value in (("discard", self.discard), ("residual", self.residual)):
            if not 0 <= value < 1:
                raise InputError(f"{name} is {value}: give a share from 0 to below 1")

    def matrix(self, attention: Tensor) -> Tensor:
        """(B, heads, N, N) to (B, N, N) whose rows sum to 1; a row of zeros counts as that of I."""
        fuse, skip = _FUSE[self.head_fusion], self.residual
        weights = (1 - skip) * fuse(attention.abs())
        own = fuse(((1 - skip) * attention.diagonal(dim1=-2, dim2=-1) + skip).abs())
        gone = int(self.discard * weights[0].numel())
        if gone:
            smallest = weights.flatten(1).topk(gone, largest=False).indices
            weights.view(len(weights), -1).scatter_(1, smallest, 0)
            own = own.where(weights.diagonal(dim1=-2, dim2=-1) > 0, skip)
        weights.diagonal(dim1=-2, dim2=-1).copy_(own)
        rows = weights.sum(-1, keepdim=True)
        eye = torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device)
        return torch.where(rows > 0, weights / rows, eye)


_FUSE: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda heads: heads.amax(1),
    "mean": lambda heads: heads.mean(1),
    "min": lambda heads: heads.amin(1),
}


def _map_parts(
    classify: Classifier,
    images: Tensor,
    batch_size: int,
    source: str,
    num_prefix: int | None,
    find: Callable[[Layers], Tensor],
) -> Attribution:
    maps: list[Tensor] = []
    layers: tuple[AttentionLayer, ...] = ()
    for layers in read_in_parts(classify.model, images, batch_size, source=source, num_prefix=num_prefix):
        found = find([(layer.attention, layer.grid) for layer in layers])
        maps.append(enlarge(found, images.shape[-2:]).to(images))
    names = ", ".join(dict.fromkeys(layer.name for layer in layers))
    return Attribution(torch.cat(maps), None, names, describe_layers(layers), Detail(tuple(map(_place, layers))))


def _place(layer: AttentionLayer) -> LayerMap:
    guessed = ("layer",) if layer.source == "taps" else ("layer", "grid", "prefix")
    return LayerMap(layer.name, "NLC", layer.grid, layer.num_prefix, guessed)


def _read_out(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N): the class token's row, or the mean of all rows."""
    prefix = attention.shape[-1] - grid[0] * grid[1]
    share = attention.new_zeros(attention.shape[0], attention.shape[-1])
    share[:, : 1 if prefix else None] = 1 if prefix else 1 / attention.shape[-1]
    return share


_PAPER = _Fusion()


def _roll_out(layers: Layers, fusion: _Fusion = _PAPER) -> Tensor:
    """(B, h, w) on the first layer's grid."""
    fusion.check()
    attention, grid = layers[-1]
    share = _read_out(attention, grid)
    for attention, finer in reversed(layers):
        share = _carry(share, grid, attention.shape[-1], finer)
        share = (share[:, None] @ fusion.matrix(attention))[:, 0]
        grid = finer
    return share[:, share.shape[-1] - grid[0] * grid[1] :].unflatten(1, grid)


def _flow(layers: Layers, fusion: _Fusion = _PAPER) -> Tensor:
    """(B, h, w) on the first layer's grid."""
    fusion.check()
    attention, grid = layers[0]
    matrices = list(_capacities(layers, fusion))
    flows = torch.stack([_flow_one([matrix[image] for matrix in matrices], grid) for image in range(len(attention))])
    return flows.to(attention).unflatten(1, grid)


def _capacities(layers: Layers, fusion: _Fusion) -> Iterator[Tensor]:
    """(B, tokens above, tokens below) of the read-out, and of each layer and each change of tokens, from the last."""
    attention, grid = layers[-1]
    yield _read_out(attention, grid)[:, None]
    tokens = attention.shape[-1]
    for attention, finer in reversed(layers):
        if (tokens, grid) != (attention.shape[-1], finer):
            eye = torch.eye(tokens, dtype=attention.dtype, device=attention.device)
            yield _carry(eye, grid, attention.shape[-1], finer).expand(len(attention), -1, -1)
        yield fusion.matrix(attention)
        tokens, grid = attention.shape[-1], finer


def _flow_one(matrices: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
    """Maximum flow through a chain of matrices from node 0 to each of the last tokens that lie on the grid."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import maximum_flow

    starts, ends, capacities, first = [], [], [], 0
    for matrix in matrices:
        whole = (matrix.double() / _UNIT).round().int().cpu()
        above, below = whole.nonzero(as_tuple=True)
        starts.append(above + first)
        first += len(matrix)
        ends.append(below + first)
        capacities.append(whole[above, below])
    nodes = first + matrices[-1].shape[-1]
    edges = (torch.cat(capacities).numpy(), (torch.cat(starts).numpy(), torch.cat(ends).numpy()))
    graph = coo_array(edges, shape=(nodes, nodes)).tocsr()
    sinks = range(nodes - grid[0] * grid[1], nodes)
    return torch.tensor([maximum_flow(graph, 0, sink).flow_value for sink in sinks]).double() * _UNIT


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
