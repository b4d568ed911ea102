"""Attention on a tape: what a model's softmax weighs, whatever module wrote it, and the layer that joins its heads."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saccade.explain.relevance.analyse import named_tensors
from saccade.explain.relevance.families import MAPS
from saccade.explain.relevance.rules import attention_parts
from saccade.explain.relevance.tape import Node, Tape, Value, record

__all__ = ["RecordedAttention", "record_attention"]

_ORDERS = {
    "dense": [("tokens", (0, 2, 1, 3)), ("tokens", (2, 0, 1, 3)), ("channels", (0, 3, 1, 2))],
    "convolution": [("tokens", (0, 1, 3, 2)), ("channels", (0, 1, 2, 3))],
}
"""By the kind of the joining layer: what rows of weights are if its input has the axes batch, head, row, D so."""
_STEPS = 32  # operations between the heads and the layer that joins them; more is another part of the network


class RecordedAttention(NamedTuple):
    """One softmax-weighted sum.

    Attributes:
        name: of the module that holds its projections; "#2" marks the second of that name.
        attention: (B, heads, N, M), the weights that were used; B is a multiple of the batch for windows.
        value: (B, heads, M, D).
        projection: name of the layer that joins the heads, whose input has the channels of head after head; None where
            no such layer was found.
        over: "tokens", or "channels" where the rows turned out to be channels of a token; None where unknown.
        maps: (height, width) of the maps that convolutions and poolings had made before, last to first.
    """

    name: str
    attention: Tensor
    value: Tensor
    projection: str | None
    over: str | None
    maps: tuple[tuple[int, int], ...]


def record_attention(model: nn.Module, images: Tensor) -> list[RecordedAttention]:
    """Run a model on images (B, C, H, W) and find its attention among the operations: fused ones, whose weights are
    formed from query, key and mask, and products with a softmax, whose weights are an operand."""
    tape, _ = record(lambda _recorder, given: model(*given), [images], named_tensors(model), _needs)
    readers: dict[Value, list[Node]] = {}
    for node in tape.nodes:
        for read in node.inputs:
            readers.setdefault(read, []).append(node)
    found: list[RecordedAttention] = []
    for node, shape, maps in _weighted_sums(tape):
        weights, value = _operands(node)
        joined = _follow(node, readers)
        heads = _count_heads(len(weights), len(images), shape, joined, value.shape[-1])
        if weights.ndim == 3:
            weights, value = weights.unflatten(0, (-1, heads)), value.unflatten(0, (-1, heads))
        projection, over = _read_order(joined, (*weights.shape[:3], value.shape[-1]))
        name = _common(node.layer, projection)
        count = sum(each.name.partition("#")[0] == name for each in found)
        name = f"{name}#{count + 1}" if count else name
        found.append(RecordedAttention(name, weights, value, projection, over, maps))
    return found


class _Joined(NamedTuple):
    """The layer that reads the heads, and for each entry of its input, the entry of the heads' output it is."""

    layer: str
    family: str
    order: Tensor


def _needs(node: Node) -> tuple[bool, bool]:
    return _is_attention(node), False


def _is_attention(node: Node) -> bool:
    return node.family == "attention" or _softmax_operand(node) is not None


def _softmax_operand(node: Node) -> int | None:
    """Which factor of a batched product are weights: -2 or -1; None if none or both are."""
    places = [place for place in (-2, -1) if node.family == "product" and node.inputs[place].trait == "softmax"]
    return places[0] if len(places) == 1 and len(node.inputs[-1].shape) == 3 else None


def _weighted_sums(tape: Tape) -> Iterator[tuple[Node, tuple[int, ...], tuple[tuple[int, int], ...]]]:
    """Each node that is one, the (batch, heads) of the last softmax that shows both, and the maps seen so far."""
    shape: tuple[int, ...] = ()
    maps: tuple[tuple[int, int], ...] = ()
    for node in tape.nodes:
        made = node.outputs[0]
        if made is not None and len(made.shape) == 4 and (node.family == "convolution" or "pool" in node.op):
            maps = ((made.shape[2], made.shape[3]), *maps)
        if node.family == "softmax" and made is not None:
            shape = tuple(made.shape[:2]) if len(made.shape) == 4 else ()
        if _is_attention(node):
            yield node, shape, maps


def _operands(node: Node) -> tuple[Tensor, Tensor]:
    """Weights (..., N, M) and values (..., M, D)."""
    if node.family == "attention":
        _, _, value, _, weights, _ = attention_parts(node)
        return weights, value
    first, second = (value.tensor for value in node.inputs[-2:])
    return (first, second) if _softmax_operand(node) == -2 else (second.mT, first.mT)


def _count_heads(rows: int, batch: int, shape: tuple[int, ...], joined: _Joined | None, dim: int) -> int:
    """Heads among the rows of a product (batch * heads, N, M): as the softmax shows them, or as the channels say."""
    if len(shape) == 2 and shape[0] * shape[1] == rows:
        return shape[1]
    channels = 0 if joined is None else joined.order.shape[1 if joined.family == "convolution" else -1]
    heads = channels // dim if channels else rows // batch
    return heads if heads and rows % heads == 0 else 1


def _follow(start: Node, readers: dict[Value, list[Node]]) -> _Joined | None:
    """Follow the heads' output, through operations that move its entries or keep its shape, to a layer with weights."""
    output = start.output
    waiting = [(output, torch.arange(output.shape.numel(), device=output.device).view(output.shape))]
    for _ in range(_STEPS):
        if not waiting:
            break
        value, order = waiting.pop(0)
        for node in readers.get(value, ()):
            if node.family in MAPS and node.index is not None:
                return _Joined(node.layer, node.family, order.cpu())
            alone = sum(each.active for each in node.inputs) == 1
            if node.family == "move" and alone and node.func is not None:
                waiting.append((node.output, _move(node, value, order)))
            elif node.output.shape == value.shape and (node.family == "gate" or alone):
                waiting.append((node.output, order))
    return None


def _move(node: Node, value: Value, order: Tensor) -> Tensor:
    def put(each: object) -> object:
        return order if each is value else each.tensor if isinstance(each, Value) else each

    func = torch.ops.aten.reshape.default if "view" in node.op else node.func  # strides are not those of the model
    outs = func(*map(put, node.args), **{name: put(each) for name, each in node.kwargs.items() if name != "dtype"})
    moved: Tensor = outs if isinstance(outs, Tensor) else outs[0]
    return moved


def _read_order(joined: _Joined | None, shape: tuple[int, ...]) -> tuple[str | None, str | None]:
    """Whether a layer's input is head after head of each token's channels, or what are rows of weights are channels."""
    if joined is None:
        return None, None
    entries = torch.arange(torch.Size(shape).numel()).view(shape)
    for over, axes in _ORDERS[joined.family]:
        if torch.equal(joined.order.flatten(), entries.permute(axes).flatten()):
            return (joined.layer if over == "tokens" else None), over
    return None, None


def _common(layer: str, projection: str | None) -> str:
    """The innermost module that holds both layers."""
    if projection is None:
        return layer
    shared = []
    for one, other in zip(layer.split("."), projection.split(".")):
        if one != other:
            break
        shared.append(one)
    return ".".join(shared) or projection.rpartition(".")[0] or projection
