"""Which parameters carry which channel: found by running the model once and following every channel by number.

Each entry of each activation carries the number of its channel, so that views, concatenations, residual adds and
poolings need no rule of their own for axes: what puts two numbers in one place ties the two channels.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.explain.relevance.families import FAMILIES
from saccade.explain.relevance.tape import Node, Value, record

__all__ = ["Axis", "ChannelGroup", "find_channels", "tensors_of", "trace"]

Axis = tuple[str, int]
"""Name of a parameter or buffer, and one of its axes."""

_NONE, _ZERO = 0.0, -1.0  # no channel; an entry that is 0 whatever the channels are
_HOMOGENEOUS = ("_prelu_kernel", "abs", "leaky_relu", "neg", "relu")  # f(2 x) = 2 f(x)
_SPATIAL = {  # operations on the last axes: how many
    name: int(found[1])
    for family in ("mix", "winner", "move")
    for name in FAMILIES[family]
    if (found := re.search(r"(?:pool|upsample).*([123])d", name))
}
_MOVES = (
    "_reshape_alias",
    "_to_copy",
    "_unsafe_view",
    "alias",
    "cat",
    "chunk",
    "clone",
    "constant_pad_nd",
    "contiguous",
    "detach",
    "expand",
    "flip",
    "lift_fresh",
    "movedim",
    "narrow",
    "numpy_T",
    "permute",
    "reflection_pad1d",
    "reflection_pad2d",
    "repeat",
    "replication_pad1d",
    "replication_pad2d",
    "reshape",
    "roll",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "stack",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
)
_REDUCTIONS = ("amax", "amin", "max", "mean", "min", "sum")


@dataclass
class ChannelGroup:
    """Channels that can be merged with one another, because the same tensors carry all of them.

    Attributes:
        name: the module that makes them, of several tied by residual adds the first; if it makes others too, the
            parameter.
        width: number of channels.
        start: the first of their numbers, which are consecutive, in the tables of `Channels`.
        kept: why they must stay as they are; None if they may be merged.
    """

    name: str
    width: int
    start: int
    kept: str | None = None


@dataclass
class Channels:
    """Groups, and for each axis that carries channels its part and the number of the channel at each place.

    Attributes:
        groups: in the order of the forward pass.
        roles: "write" for what makes a channel (filters, biases), "read" for what the next layer weighs it with,
            "scale" for factors.
        places: (length of the axis,) numbers; 0 where no group is that may be merged.
    """

    groups: list[ChannelGroup]
    roles: dict[Axis, str]
    places: dict[Axis, Tensor]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once."""
    return dict([*model.named_parameters(), *model.named_buffers()])


def trace(model: nn.Module, image: Tensor) -> tuple[list[Node], Value, Tensor]:
    """The operations of one run on an image (1, C, H, W), the value that the model returns, and its tensor."""
    made: list[Tensor] = []

    def run(recorder: Any, inputs: tuple[Tensor, ...]) -> None:
        made.append(recorder.mark("output", model(inputs[0])))

    tape, _ = record(run, [image], tensors_of(model), lambda node: (False, False))
    return tape.nodes, tape.marks["output"], made[0]


def find_channels(
    model: nn.Module, image: Tensor, *, homogeneous: bool, batch_norm: str, keep: Callable[[str], bool]
) -> Channels:
    """Follow the channels of a model in eval mode.

    Args:
        image: (1, C, H, W); its values do not matter.
        homogeneous: keep channels that pass what does not commute with positive factors, such as GELU.
        batch_norm: "scale", or "write" for norms whose four tensors all count as making the channel.
        keep: name of a group -> whether it must stay.
    """
    nodes, output, _ = trace(model, image)
    walk = _Walk(model, homogeneous, batch_norm)
    for node in nodes:
        walk.visit(node)
    walk.freeze(walk.labels(output), "they are the model's output")
    return walk.gather(keep)


class _Walk:
    def __init__(self, model: nn.Module, homogeneous: bool, batch_norm: str) -> None:
        self.tensors = tensors_of(model)
        self.homogeneous, self.batch_norm = homogeneous, batch_norm
        self.seen: dict[int, Tensor] = {}  # labels by identity of the value, which the tape keeps alive
        self.parent = [0]  # of each number: channels in one place have one root
        self.frozen: dict[int, str] = {}
        self.axes: dict[Axis, tuple[str, Tensor]] = {}
        self.blocked: dict[str, str] = {}  # tensors that are read in a way that is not followed

    # Labels

    def labels(self, value: Value) -> Tensor:
        known = self.seen.get(id(value))
        return torch.tensor(_NONE, dtype=torch.float64).expand(value.shape) if known is None else known

    def root(self, number: int) -> int:
        while self.parent[number] != number:
            self.parent[number] = self.parent[self.parent[number]]
            number = self.parent[number]
        return number

    def fresh(self, size: int) -> Tensor:
        start = len(self.parent)
        self.parent += range(start, start + size)
        return torch.arange(start, start + size, dtype=torch.float64)

    def tie(self, first: Tensor, second: Tensor) -> Tensor:
        """One label an entry, where the two stand in one place; what meets no channel can no more be merged."""
        shape = first.shape
        first, second = _short(first, second)
        both = (first > 0) & (second > 0)
        for a, b in torch.stack([first[both], second[both]]).unique(dim=1).T.tolist():
            self.parent[self.root(int(a))] = self.root(int(b))
        for one, other in ((first, second), (second, first)):
            self.freeze(one[(one > 0) & (other == _NONE)], "what is added to them has no channels")
        return torch.maximum(first, second).where((first != _NONE) & (second != _NONE), _NONE).expand(shape)

    def freeze(self, labels: Tensor, reason: str) -> None:
        for number in _channels(labels).tolist():
            self.frozen.setdefault(int(number), reason)

    def read_axis(self, value: Value, axis: int, reason: str) -> Tensor:
        """(size,) labels along an axis, if they differ along no other; otherwise none, and all are frozen."""
        (labels,) = _short(self.labels(value).movedim(axis, 0), keep=1)
        labels = labels.flatten(1)
        ids = labels.amax(1)
        if not ((labels == ids[:, None]) | (labels == _ZERO)).all():
            self.freeze(labels, reason)
            return torch.full_like(ids, _NONE)
        return ids

    # Parameters

    def source(self, value: Value) -> tuple[str, tuple[int | None, ...]] | None:
        """The tensor of which a constant is a view, and which of its axes each axis of the constant is."""
        if len(value.names) != 1 or value.data is None:
            return None
        whole, view = self.tensors[value.names[0]], value.data
        if view.numel() != whole.numel() or view.data_ptr() != whole.data_ptr():
            return None
        axes = {
            (size, stride): axis for axis, (size, stride) in enumerate(zip(whole.shape, whole.stride())) if size > 1
        }
        found = tuple(axes.get((size, stride)) for size, stride in zip(view.shape, view.stride()))
        known = sum(axis is not None for axis in found)
        return (value.names[0], found) if known == len(axes) else None

    def carry(self, value: object, axis: int, role: str, ids: Tensor) -> None:
        """An axis of a constant carries these channels."""
        if not isinstance(value, Value):
            return
        found = self.source(value)
        if found is None or found[1][axis] is None:
            if value.shape[axis] == 1:  # nothing to merge
                self.freeze(ids, "there is one channel")
            else:
                self.block(value, "the tensor is not a parameter as it is")
                self.freeze(ids, "a weight of theirs is computed from parameters")
            return
        key = (found[0], found[1][axis])
        before = self.axes.get(key)  # type: ignore[arg-type]
        if before is not None:
            ids = self.tie(before[1], ids)
            if before[0] != role:
                self.freeze(ids, f"{key[0]} is used in two ways")
        self.axes[key] = (role, ids)  # type: ignore[index]

    def block(self, value: Value, reason: str) -> None:
        for name in value.names:
            self.blocked.setdefault(name, reason)

    # Operations

    def visit(self, node: Node) -> None:
        outputs = [value for value in node.outputs if value is not None and value.active]
        handle = self.handler(node)
        found = handle(node) if handle is not None else None
        if found is None:
            self.refuse(node, f"{node.op} in {node.layer or 'the model'} is not followed")
            return
        for value, labels in zip(outputs, found):
            if _spread(labels) > 1:
                self.freeze(labels, f"{node.op} in {node.layer or 'the model'} splits them over several axes")
            self.seen[id(value)] = labels

    def refuse(self, node: Node, reason: str) -> None:
        for value in node.inputs:
            if value.active:
                self.freeze(self.labels(value), reason)
            else:
                self.block(value, reason)

    def handler(self, node: Node) -> Callable[[Node], list[Tensor] | None] | None:
        if node.op in _SPATIAL:
            return self.spatial
        if node.op in _REDUCTIONS and sum(value.active for value in node.inputs) == 1 and len(node.args) > 1:
            return self.reduce
        return {
            "convolution": self.convolve,
            "dense": self.multiply,
            "add": self.combine,
            "scale": self.combine,
            "gate": self.combine,
            "winner": self.combine,
            "move": self.move,
            "activation": self.activate,
            "norm": self.normalise,
        }.get(node.family)

    def convolve(self, node: Node) -> list[Tensor] | None:
        x, weight, bias = node.args[:3]
        transposed, groups = node.args[6], node.args[8]
        if weight.active or not x.active:
            return None
        axis = -len(node.args[3]) - 1
        ids = self.read_axis(x, axis, f"{node.layer} reads them together with other axes")
        inner, outer = (0, 1) if transposed else (1, 0)
        if groups == 1:
            made = self.fresh(weight.shape[outer])
            self.carry(weight, inner, "read", ids)
            self.carry(weight, outer, "write", made)
        elif groups == len(ids) == weight.shape[0] and weight.shape[1] == 1:
            made = ids
            self.carry(weight, 0, "scale", ids)
        else:
            self.freeze(ids, f"{node.layer} is a convolution in {groups} groups")
            made = torch.full((node.output.shape[axis],), _NONE, dtype=torch.float64)
        if groups == 1 or (made > 0).any():
            self.carry(bias, 0, "write", made)
        return [_along(made, axis, node.output)]

    def multiply(self, node: Node) -> list[Tensor] | None:
        """x @ weight, plus a bias or not."""
        if node.op not in ("addmm", "mm"):
            return None
        bias, x, weight = (None, *node.args[:2]) if node.op == "mm" else node.args[:3]
        if weight.active or not x.active or node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
            return None
        if isinstance(bias, Value) and bias.active:
            return None
        made = self.fresh(weight.shape[1])
        self.carry(weight, 0, "read", self.read_axis(x, 1, f"{node.layer} reads them together with other axes"))
        self.carry(weight, 1, "write", made)
        self.carry(bias, -1, "write", made)
        return [_along(made, 1, node.output)]

    def combine(self, node: Node) -> list[Tensor] | None:
        """Two operands entry by entry: activations, a parameter, a number."""
        first, second = (*node.args[:2], None)[:2]
        if node.op not in ("add", "sub", "rsub", "mul", "div", "maximum", "minimum"):
            return None
        curved = node.op == "div" and not _is_active(first)
        if _is_active(first) and _is_active(second):
            a, b = (self.labels(value).expand(node.output.shape) for value in (first, second))
            if node.family == "gate":
                curved = True
            made = self.tie(a, b)
        else:
            value, other = (first, second) if _is_active(first) else (second, first)
            made = self.labels(value).expand(node.output.shape)
            plain = not isinstance(other, Value) or not other.names
            if not plain:
                made = self.with_parameter(made, other, "scale" if node.op in ("mul", "div") else "write")
            elif isinstance(other, Value) and other.data is not None and other.data.numel() > 1:
                return None  # a table of constants may differ from channel to channel
            elif node.op in ("add", "sub", "rsub"):
                curved = curved or bool(other.tensor.any() if isinstance(other, Value) else other != 0)
        return self.bent(node, [made], curved)

    def with_parameter(self, labels: Tensor, value: Value, role: str) -> Tensor:
        """Labels beside a parameter: the one axis along which each channel has a value of its own carries them."""
        if role == "scale" and value.shape.numel() == 1:  # one factor for all
            return labels
        found = self.source(value)
        lead = labels.ndim - len(value.shape)
        if found is not None:
            for axis, (size, own) in enumerate(zip(value.shape, found[1])):
                if own is None:
                    continue
                (rows,) = _short(labels.movedim(axis + lead, 0), keep=1)
                rows = rows.flatten(1)
                ids = rows.amax(1)
                if size == len(ids) and (rows == ids[:, None]).all():
                    self.carry(value, axis, role, ids)
                    return labels
        self.freeze(labels, "a parameter beside them has no value for each channel")
        self.block(value, "it is not followed")
        return labels

    def activate(self, node: Node) -> list[Tensor] | None:
        value, *others = node.inputs
        if any(each.active for each in others) or not value.active:
            return None
        labels = self.labels(value)
        for each in others:
            if each.names:
                labels = self.with_parameter(labels, each, "scale") if each.data is not None else labels
        return self.bent(node, [labels], node.op not in _HOMOGENEOUS)

    def bent(self, node: Node, labels: list[Tensor], curved: bool) -> list[Tensor]:
        if curved and self.homogeneous:
            for each in labels:
                self.freeze(each, f"{node.op} does not commute with factors: rule='mean' merges what passes it")
        return labels

    def normalise(self, node: Node) -> list[Tensor] | None:
        x, weight, bias, mean, variance = (*node.args, *[None] * 5)[:5]
        if "batch_norm" not in node.op or not isinstance(mean, Value) or not mean.names:
            return None
        ids = self.read_axis(x, 1, f"{node.layer} normalises them together with other axes")
        for value, role in ((weight, "scale"), (bias, "write"), (mean, "write"), (variance, "scale")):
            self.carry(value, 0, "write" if self.batch_norm == "write" else role, ids)
        return [_along(ids, 1, node.output)]

    def spatial(self, node: Node) -> list[Tensor] | None:
        axis = -_SPATIAL[node.op] - 1
        ids = self.read_axis(node.inputs[0], axis, f"{node.op} mixes them")
        return [_along(ids, axis, node.output)]

    def reduce(self, node: Node) -> list[Tensor] | None:
        dims, keepdim = node.args[1], node.arg(2, "keepdim", False)
        dims = dims if isinstance(dims, list | tuple) else [dims]
        if not dims or isinstance(dims[0], Value | None):
            return None
        labels = self.labels(node.inputs[0])
        (short,) = _short(labels)
        high = short.amax(dims, True)
        if not ((short == high) | (short == _ZERO)).all():
            return None
        return [(high if keepdim else short.amax(dims)).expand(node.output.shape)]

    def move(self, node: Node) -> list[Tensor] | None:
        """The labels move as the values do, unless a channel gets lost."""
        if node.op not in _MOVES or not all(value.active for value in node.inputs):
            return None
        if node.op == "constant_pad_nd":
            if node.arg(2, "value", 0) != 0:
                return None
            return [torch.constant_pad_nd(self.labels(node.inputs[0]), node.args[1], _ZERO)]
        if node.op in ("_reshape_alias", "_unsafe_view", "reshape", "view"):  # ours may have other strides
            return [self.labels(node.inputs[0]).reshape(node.output.shape)]
        found = node.func(*self.filled(node.args), **self.filled({k: v for k, v in node.kwargs.items() if k in _KEPT}))
        outs = list(found) if isinstance(found, tuple | list) else [found]
        before = torch.cat([_channels(self.labels(value)) for value in node.inputs]).unique()
        if any(len(_channels(each)) < len(before) for each in outs):
            return None
        return outs

    def filled(self, tree: Any) -> Any:
        if isinstance(tree, Value):
            return self.labels(tree)
        if isinstance(tree, tuple | list):
            return type(tree)(self.filled(each) for each in tree)
        return {name: self.filled(each) for name, each in tree.items()} if isinstance(tree, dict) else tree

    # Groups

    def gather(self, keep: Callable[[str], bool]) -> Channels:
        for (name, _), (_, ids) in self.axes.items():
            if name in self.blocked:
                self.freeze(ids, f"{name}: {self.blocked[name]}")
        frozen: dict[int, str] = {}
        for number, reason in self.frozen.items():
            frozen.setdefault(self.root(number), reason)
        roots = {key: self.roots(ids) for key, (_, ids) in self.axes.items()}
        groups: dict[tuple[int, ...], ChannelGroup] = {}
        owner: dict[int, tuple[int, ...]] = {}
        for key, (role, ids) in self.axes.items():
            if role != "write" or not (ids > 0).all():
                continue
            row = tuple(roots[key].tolist())
            if row in groups:
                continue
            name = key[0].rpartition(".")[0]
            taken = not name or any(name == each.name for each in groups.values())
            groups[row] = ChannelGroup(key[0] if taken else name, len(row), 0)
            for number in row:
                if number in owner or row.count(number) > 1:
                    frozen.setdefault(number, "part of them is tied to other channels")
                owner[number] = row
        for row, group in groups.items():
            self.judge(row, group, roots, frozen)
            if group.kept is None and keep(group.name):
                group.kept = "asked for"
        for row, group in groups.items():  # what shares channels with a group that stays, stays too
            tied = [groups[owner[number]].kept for number in row if owner[number] != row]
            group.kept = group.kept or next((reason for reason in tied if reason), None)
        new, start = torch.zeros(len(self.parent), dtype=torch.long), 1
        for row, group in groups.items():
            if group.kept is None:
                group.start = start
                new[list(row)] = torch.arange(start, start := start + group.width)
        roles = {key: role for key, (role, _) in self.axes.items()}
        return Channels(list(groups.values()), roles, {key: new[found] for key, found in roots.items()})

    def judge(
        self, row: tuple[int, ...], group: ChannelGroup, roots: dict[Axis, Tensor], frozen: dict[int, str]
    ) -> None:
        group.kept = next((frozen[number] for number in row if number in frozen), None)
        for key, found in roots.items():
            inside = torch.isin(found, torch.tensor(row))
            if group.kept is None and inside.any():
                counts = found[inside].unique(return_counts=True)[1]
                if len(counts) < len(row) or (counts != counts[0]).any():
                    group.kept = f"{key[0]} carries some of them alone"

    def roots(self, ids: Tensor) -> Tensor:
        return torch.tensor([self.root(int(number)) if number > 0 else 0 for number in ids.tolist()])


_KEPT = ("dim", "dims", "size", "start", "end", "step")


def _is_active(value: object) -> bool:
    return isinstance(value, Value) and value.active


def _short(*labels: Tensor, keep: int = 0) -> tuple[Tensor, ...]:
    """Labels of one shape without the axes along which all were expanded, which get a length of 1."""
    for axis in range(keep, labels[0].ndim):
        if labels[0].shape[axis] > 1 and all(each.stride(axis) == 0 for each in labels):
            labels = tuple(each.narrow(axis, 0, 1) for each in labels)
    return labels


def _channels(labels: Tensor) -> Tensor:
    (labels,) = _short(labels)
    return labels[labels > 0].unique()


def _along(ids: Tensor, axis: int, value: Value) -> Tensor:
    """Labels of a value from those along one of its axes."""
    shape = [1] * len(value.shape)
    shape[axis] = len(ids)
    return ids.view(shape).expand(value.shape)


def _spread(labels: Tensor) -> int:
    """Along how many axes the labels differ; zeros of a padding are no labels."""
    (labels,) = _short(labels)
    low, high = labels.masked_fill(labels == _ZERO, float("inf")), labels
    axes = [axis for axis in range(labels.ndim) if labels.shape[axis] > 1]
    return sum(bool((low.amin(axis) < high.amax(axis)).any()) for axis in axes)
