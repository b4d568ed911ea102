"""A tape of the aten operations that a function runs, with the values that relevance rules will ask for.

A `TorchDispatchMode` sees every operation below modules, hooks and autograd, so functional calls, residual adds,
control flow and shared modules are recorded as they happen. The function runs once, without autograd. An operation in
place makes a new version of its tensor, and of every living tensor that shares memory with it: values that rules
asked for are copied before they change, and an "overlay" on the tape says which entries of an alias are new.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef

from saccade.explain.relevance.families import MAPS, SHAPES_ONLY, family_of, trait_of

__all__ = ["Node", "Recorder", "Tape", "Value", "record"]

Needs = Callable[["Node"], tuple[bool, bool]]


class Value:
    """One version of a tensor.

    Attributes:
        shape, dtype, device: the tensor's.
        active: whether it depends on the inputs that are explained.
        names: of the parameters and buffers that a constant was made from.
        trait: its part in a softmax or norm; see `families.trait_of`.
        data: the tensor; None where no rule asked for it.
    """

    __slots__ = ("active", "data", "device", "dtype", "names", "shape", "trait")

    def __init__(self, tensor: Tensor, active: bool, names: tuple[str, ...] = (), trait: str | None = None) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.active, self.names, self.trait = active, names, trait
        self.data: Tensor | None = None if active else tensor

    @property
    def tensor(self) -> Tensor:
        """The data; a slip of ours if a rule reads what it did not ask for."""
        assert self.data is not None, f"a value of shape {tuple(self.shape)} was not kept"
        return self.data


@dataclass(eq=False, slots=True)
class Node:
    """One recorded operation.

    Attributes:
        op: its name without namespace and overload: "addmm".
        func: what was called.
        args, kwargs: as called, with a Value in place of each tensor.
        inputs: the values among them, in order.
        outputs: what it returned; None for results that are no tensors.
        family: which operations share its rules; see `families`.
        layer: name of the module whose parameters it reads, or of the last that did.
        index: number of the weighted map (convolution, matrix product with a parameter) that it is; None for others.
    """

    op: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value | None, ...]
    family: str = ""
    layer: str = ""
    index: int | None = None

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument given by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    @property
    def output(self) -> Value:
        """The first result, which carries the relevance of nearly all operations."""
        assert self.outputs[0] is not None
        return self.outputs[0]


@dataclass(eq=False)
class Tape:
    """Operations in the order in which they ran.

    Attributes:
        nodes: those whose result depends on the inputs.
        marks: values that were named with `mark`, and "input.0", "input.1", ... .
        count: number of weighted maps.
    """

    nodes: list[Node] = field(default_factory=list)
    marks: dict[str, Value] = field(default_factory=dict)
    count: int = 0

    @property
    def bytes(self) -> int:
        """Of the values kept, each storage once; constants left out."""
        kept = {}
        for node in self.nodes:
            for value in (*node.inputs, *node.outputs):
                if value is not None and value.active and value.data is not None:
                    storage = value.data.untyped_storage()
                    kept[storage.data_ptr()] = storage.nbytes()
        return sum(kept.values())


class Recorder(TorchDispatchMode):
    """What sees the operations; `mark` is for those who run the function."""

    def __init__(self, named: Mapping[str, Tensor], needs: Needs) -> None:
        super().__init__()
        self.tape = Tape()
        self._needs = needs
        self._known: dict[int, tuple[TensorWeakRef, Value]] = {}  # by identity, while the tensor lives
        self._sharing: dict[int, list[TensorWeakRef]] = {}  # by storage
        self._held: dict[int, list[Value]] = {}  # values whose data is read later, by storage
        self._pending: str | None = None
        self._layer = ""
        for name, tensor in named.items():
            value = self._value(tensor)
            value.names = (*value.names, name)

    def mark(self, name: str, tensor: Tensor) -> Tensor:
        """Name a value, or start the tape at it ("input.*"); the function goes on with the tensor returned here."""
        self._pending = name
        copy = torch.ops.aten.clone if name.startswith("input.") else torch.ops.aten.alias
        marked: Tensor = copy(tensor)
        self._pending = None
        return marked

    def _value(self, tensor: Tensor) -> Value:
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        return self._follow(tensor, Value(tensor, active=False))

    def _follow(self, tensor: Tensor, value: Value) -> Value:
        known = self._known.get(id(tensor))
        if known is None or known[0]() is not tensor:
            reference = TensorWeakRef(tensor)
            self._sharing.setdefault(_storage(tensor), []).append(reference)
        else:
            reference = known[0]
        self._known[id(tensor)] = reference, value
        return value

    def _hold(self, value: Value, tensor: Tensor) -> None:
        if value.data is None or not value.active:
            value.data = tensor
            self._held.setdefault(_storage(tensor), []).append(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = _written(func, args, kwargs) if func._schema.is_mutable else []
        pure, pure_kwargs = _functional(func, kwargs) if written else (func, kwargs)
        tensors = list(_tensors((args, pure_kwargs)))
        values = [self._value(tensor) for tensor in tensors]
        before = self._save(written, pure, args, pure_kwargs, tensors, values)
        out = func(*args, **kwargs)
        if self._pending is not None and self._pending.startswith("input."):
            root = self._follow(out, Value(out, active=True))
            self._hold(root, out)
            self.tape.marks[self._pending] = root
            return out
        outs = tuple(out) if isinstance(out, tuple | list) else (out,)
        changed = [tensor for tensor in written if any(tensor is each for each in outs)]
        if any(value.active for value in values):
            self._record(pure, args, pure_kwargs, tensors, values, outs, before)
        else:
            names = tuple(dict.fromkeys(name for value in values for name in value.names))
            for each in outs:
                if isinstance(each, Tensor) and (changed or not any(each is tensor for tensor in tensors)):
                    self._follow(each, Value(each, active=False, names=names))
        if not _changes_shape_only(func):
            for tensor in changed:
                self._overlay(tensor)
        return out

    def _node(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], values: list[Value]) -> Node:
        lookup = {id(tensor): value for tensor, value in zip(tensors, values)}
        op = func._schema.name.split("::")[1]
        return Node(op, func, _replaced(args, lookup), _replaced(kwargs, lookup), tuple(values), ())

    def _record(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        tensors: list[Tensor],
        values: list[Value],
        outs: tuple[Any, ...],
        before: Mapping[int, Tensor],
    ) -> None:
        op = func._schema.name.split("::")[1]
        whole = all(not v.dtype.is_floating_point and not v.dtype.is_complex for v in values if v.active)
        active = [op not in SHAPES_ONLY and isinstance(each, Tensor) and _carries(each, whole) for each in outs]
        results = tuple(
            self._follow(each, Value(each, active=carries)) if isinstance(each, Tensor) else None
            for each, carries in zip(outs, active)
        )
        if not any(active):
            return
        node = self._node(func, args, kwargs, tensors, values)
        node.outputs = results
        node.family = family_of(node)
        names = [name for value in values if not value.active for name in value.names]
        if names:
            self._layer = names[0].rpartition(".")[0]
        node.layer = self._layer
        if names and node.family in MAPS:
            node.index, self.tape.count = self.tape.count, self.tape.count + 1
        trait = trait_of(node)
        for result in results:
            if result is not None:
                result.trait = trait
        inputs, output = self._needs(node)
        for tensor, value in zip(tensors, values):
            if inputs or not value.active:
                self._hold(value, before.get(id(tensor), tensor))
        if output or self._pending is not None:
            for each, result in zip(outs, results):
                if result is not None:
                    self._hold(result, each)
        else:  # indices and the like need not outlive the operation
            node.outputs = tuple(None if result is None or not result.active else result for result in results)
        if self._pending is not None:
            assert results[0] is not None
            self.tape.marks[self._pending] = results[0]
        self.tape.nodes.append(node)

    def _save(
        self,
        written: list[Tensor],
        func: Any,
        args: Any,
        kwargs: Any,
        tensors: list[Tensor],
        values: list[Value],
    ) -> dict[int, Tensor]:
        """Copy what is about to change: values that are held, and operands that the operation's own rule will read."""
        for tensor in written:
            for value in self._held.pop(_storage(tensor), ()):
                if value.data is not None and _storage(value.data) == _storage(tensor):
                    value.data = value.data.clone()
        if not written or not any(value.active for value in values):
            return {}
        node = self._node(func, args, kwargs, tensors, values)
        node.outputs = (values[0],)  # stands for the result, which has its shape
        node.family = family_of(node)
        read = self._needs(node)[0]
        storages = {_storage(tensor) for tensor in written}
        return {
            id(tensor): tensor.clone()
            for tensor, value in zip(tensors, values)
            if _storage(tensor) in storages and (read or not value.active)
        }

    def _overlay(self, tensor: Tensor) -> None:
        """Give a new version to every living tensor that shares entries with one that changed."""
        new = self._value(tensor)
        references = self._sharing[_storage(tensor)]
        references[:] = [reference for reference in references if reference() is not None]
        for reference in references:
            alias = reference()
            if alias is None or alias is tensor or _storage(alias) != _storage(tensor):
                continue
            old = self._value(alias)
            if not (new.active or old.active) or not _overlap(tensor, alias):
                continue
            made = Value(alias, active=True)
            geometry = (_geometry(tensor), _geometry(alias), tensor.untyped_storage().nbytes() // tensor.itemsize)
            node = Node("overlay", None, geometry, {}, (old, new), (made,), family="move", layer=self._layer)
            self._follow(alias, made)
            self.tape.nodes.append(node)


Geometry = tuple[tuple[int, ...], tuple[int, ...], int]
"""Size, stride and offset in a storage."""


def _geometry(tensor: Tensor) -> Geometry:
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one storage share entries."""
    entries = torch.zeros(first.untyped_storage().nbytes() // first.itemsize, dtype=torch.bool)
    entries.as_strided(*_geometry(first)).fill_(True)
    return bool(entries.as_strided(*_geometry(second)).any())


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation changes."""
    found: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[place] if place < len(args) else kwargs.get(argument.name))
    return found


def _functional(func: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The operation that changes nothing, and its arguments by name; the given one if there is none."""
    name = func._schema.name.split("::")[1].removesuffix("_")
    packet = getattr(getattr(torch.ops, func.namespace), name, None)
    wanted = [(each.name, str(each.type)) for each in func._schema.arguments if not each.is_out]
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        if not found._schema.is_mutable and [(a.name, str(a.type)) for a in found._schema.arguments] == wanted:
            known = {each for each, _ in wanted}
            return found, {key: value for key, value in kwargs.items() if key in known}
    return func, kwargs


def _changes_shape_only(func: Any) -> bool:
    return func._schema.name.split("::")[1] in ("squeeze_", "unsqueeze_", "t_", "transpose_", "detach_", "swapaxes_")


def record(
    run: Callable[[Recorder, tuple[Tensor, ...]], Any],
    inputs: Sequence[Tensor],
    named: Mapping[str, Tensor],
    needs: Needs,
) -> tuple[Tape, Any]:
    """Run a function of tensors and record its operations.

    Args:
        run: called with the recorder, whose `mark` names values, and the inputs, which are copies.
        inputs: what everything is explained by.
        named: parameters and buffers, for layer names and the ledger.
        needs: node -> whether its rule will read the inputs and the output.

    Returns: the tape, and what `run` returned.
    """
    with _plain_kernels(), torch.no_grad():
        recorder = Recorder(named, needs)
        with recorder:
            copies = tuple(recorder.mark(f"input.{i}", x) for i, x in enumerate(inputs))
            return recorder.tape, run(recorder, copies)


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Operations as they are written: no compiled graphs, no fused transformer layers."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _carries(tensor: Tensor, whole: bool) -> bool:
    """Whether a result can carry relevance: numbers, and whole numbers that were made of whole numbers (token ids)."""
    return tensor.is_floating_point() or tensor.is_complex() or (whole and tensor.dtype != torch.bool)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for each in tree:
            yield from _tensors(each)
    elif isinstance(tree, dict):
        for each in tree.values():
            yield from _tensors(each)


def _replaced(tree: Any, lookup: Mapping[int, Value]) -> Any:
    if isinstance(tree, Tensor):
        return lookup[id(tree)]
    if isinstance(tree, tuple | list):
        return type(tree)(_replaced(each, lookup) for each in tree)
    if isinstance(tree, dict):
        return {name: _replaced(each, lookup) for name, each in tree.items()}
    return tree
