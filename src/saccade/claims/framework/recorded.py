"""Recorded cases of official code: reading one, running our module on it, comparing the results.

A case is NAME.safetensors with NAME.json beside it. Tensors are called `state.*` (official parameters and buffers),
`in.*`, `out.*`, and `grad.in.*` and `grad.state.*` (or `grad.*`): gradients of the sum of out * in.cotangent over the
outputs that have a cotangent, or of the plain sum of all outputs where none is recorded. The JSON file says which class
ran, and with which arguments. Results that are words or lists stand in it too: `encode_result` makes tensors of them.
"""

import ast
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from saccade.errors import InputError, WorkError

__all__ = [
    "Case",
    "Match",
    "compare",
    "encode_result",
    "parse_args",
    "play",
    "read_case",
    "relative_difference",
    "replay_parts",
    "run_official",
]

Tensors = dict[str, Tensor]
T = TypeVar("T")

_GROUP = r"^((?:grad\.)?(?:in|out|state)\.|grad\.)"
_NOISE = 1e-3  # of the largest gradient: what float32 leaves of a gradient that is 0 in theory is far below


@dataclass(frozen=True)
class Case:
    """One recorded run of official code.

    Attributes:
        key: the paper's.
        name: the file's, without its ending.
        cls: the official class or function.
        args: its arguments by name; lists are tuples. Empty where the file says them otherwise: see `record`.
        record: the whole JSON file.
        tensors: all recorded ones under their full names.
    """

    key: str
    name: str
    cls: str
    args: dict[str, Any]
    record: dict[str, Any]
    tensors: Tensors

    @property
    def expected(self) -> Tensors:
        """The results, under their full names: "out.y", "grad.in.x"."""
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith(("out.", "grad."))}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the official parameters and buffers, without "state." before their names."""
        tensors = {name: tensor for name, tensor in self.tensors.items() if name.startswith("state.")}
        return {name.removeprefix("state."): tensor.shape for name, tensor in tensors.items()}

    def per_stage(self, name: str, stages: int, default: Any) -> tuple[Any, ...]:
        """An argument with a value for each stage of a network; one value stands for all."""
        value = self.args.get(name, default)
        return tuple(value[:stages]) if isinstance(value, tuple) else (value,) * stages

    def build(self, make: Callable[..., T]) -> T:
        """Call `make`, which has the signature of the official class or function, with the recorded arguments."""
        try:
            inspect.signature(make).bind(**self.args)
        except TypeError as error:
            raise InputError(f"{self.key}/{self.name} does not fit the signature of {self.cls}: {error}") from error
        return make(**self.args)


def read_case(path: str | Path, key: str | None = None) -> Case:
    """Read a recorded case from its safetensors file and the JSON file beside it.

    Args:
        path: NAME.safetensors.
        key: the paper's; None takes the name of the file's folder.

    Raises: InputError if one of the two files is missing or cannot be read.
    """
    path = Path(path)
    beside = path.with_suffix(".json")
    for each in (path, beside):
        if not each.is_file():
            raise InputError(f"there is no file {each}: a recorded case is NAME.safetensors with NAME.json beside it")
    try:
        tensors, record = load_file(path), json.loads(beside.read_text(encoding="utf-8"))
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{path} and {beside.name} cannot be read as a recorded case: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{beside} holds no JSON object: give the class and its arguments by name")
    cls = record.get("class") or record.get("cls") or ""
    args = record.get("args") or record.get("arguments")
    known = parse_args(args) if isinstance(args, str | dict) else {}
    tensors |= _read_results(record.get("cases"))
    return Case(key or path.resolve().parent.name, path.stem, cls, known, record, tensors)


def encode_result(value: Any) -> Tensor:
    """A recorded result that is no tensor as one, (...) float64, to be compared with another.

    Words are the numbers of their characters, several of them a line each; rows of unequal length end in -1.

    >>> encode_result([[1, 2], [3]]).tolist(), encode_result("ab").tolist()
    ([[1.0, 2.0], [3.0, -1.0]], [97.0, 98.0])
    """
    if isinstance(value, list | tuple) and value and all(isinstance(each, str) for each in value):
        value = "\n".join(value)
    if isinstance(value, str):
        value = [ord(character) for character in value]
    if isinstance(value, list | tuple) and value and all(isinstance(each, list | tuple) for each in value):
        length = max(map(len, value))
        value = [[*each, *[-1] * (length - len(each))] for each in value]
    return torch.tensor(value, dtype=torch.float64)


def _read_results(cases: Any) -> Tensors:
    """Results in the JSON file, where each of its cases has them under "out": "out.0.summary"."""
    found: Tensors = {}

    def read(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                read(f"{name}.{key}", each)
        else:
            found[name] = encode_result(value)

    for number, each in enumerate(cases if isinstance(cases, list) else ()):
        if isinstance(each, dict):
            read(f"out.{number}", each.get("out", {}))
    return found


def parse_args(args: str | Mapping[str, Any]) -> dict[str, Any]:
    """Read recorded arguments: a mapping, or words in which "name value" pairs stand between commas or semicolons.

    Values are Python's numbers, booleans, None, quoted strings and tuples, numbers one after the other, a tuple too,
    and "N each", which is N; other words are remarks, and left out.

    >>> parse_args("dim 32, kernel_size (5,3), stride 2 (strided query blocks), qkv_bias True; called with H=W=8")
    {'dim': 32, 'kernel_size': (5, 3), 'stride': 2, 'qkv_bias': True, 'H': 8, 'W': 8}
    >>> parse_args("depths 1 each, heads 2 2 3 3")
    {'depths': 1, 'heads': (2, 2, 3, 3)}
    """
    if isinstance(args, Mapping):
        return {name: _as_tuple(value) for name, value in args.items()}
    found: dict[str, Any] = {}
    without_remarks, before = args, ""
    while without_remarks != before:  # remarks inside remarks
        before = without_remarks
        without_remarks = re.sub(r"\([^()]*\)", lambda group: group[0] if _is_literal(group[0]) else "", before)
    for names, value in _PAIR.findall(without_remarks):
        value = value.replace(" ", ", ") if _NUMBERS.fullmatch(value) else value
        if _is_literal(value):
            found |= dict.fromkeys(re.findall(r"\w+", names), _as_tuple(ast.literal_eval(value)))
    return found


_NUMBERS = re.compile(r"[-\d.]+(?: [-\d.]+)+")
_PAIR = re.compile(
    r"""
    ((?:[^\W\d]\w*\s*=\s*)+|[^\W\d]\w*\s+)  # name, or several: H=W=8
    (\((?:[^()]|\([^()]*\))*\)|\[[^\]]*\]|'[^']*'|"[^"]*"|[-\d.]+(?:[ ][-\d.]+)+|[-+.\w]+)  # value
    (?=(?:\s+each)?\s*(?:[,;]|$))
    """,
    re.VERBOSE,
)


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return False
    return True


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


def play(
    case: Case,
    forward: Callable[[Tensors, Tensors], Tensors],
    loss: Callable[[Tensors, Tensors], Tensor] | None = None,
) -> Tensors:
    """Run `forward(state, inputs)` on a case; return its outputs and the recorded gradients under the recorded names.

    Args:
        case: its `state.*` and `in.*` go to `forward` without these words, under their official names. Renaming and
            reshaping the state inside `forward` is differentiated too, so that gradients come out in official shapes.
        forward: returns outputs by name, without "out.". Where one `cotangent` is recorded and not one an output, it
            belongs to the first; where none is, gradients are of the plain sum of all outputs.
        loss: (outputs, inputs) -> what was differentiated, where it is neither.
    """
    wanted = {name: _source(name, case.tensors) for name in case.expected if name.startswith("grad.")}
    leaves = {  # running means and the like must not ask for a gradient
        name: tensor.clone().requires_grad_(name in wanted.values())
        for name, tensor in case.tensors.items()
        if name.startswith(("state.", "in."))
    }
    state, inputs = (
        {name.removeprefix(group): leaf for name, leaf in leaves.items() if name.startswith(group)}
        for group in ("state.", "in.")
    )
    with torch.set_grad_enabled(bool(wanted)):
        outputs = forward(state, inputs)
    results = {f"out.{name}": output.detach() for name, output in outputs.items()}
    if wanted:
        cotangents = {name: inputs.get(f"cotangent.{name}") for name in outputs}
        if "cotangent" in inputs:
            cotangents[next(iter(outputs))] = inputs["cotangent"]
        if not any(name.startswith("cotangent") for name in inputs):
            cotangents = {name: torch.ones_like(output) for name, output in outputs.items()}
        total: Any = sum((outputs[name] * given).sum() for name, given in cotangents.items() if given is not None)
        total = total if loss is None else loss(outputs, inputs)
        sources = [leaves[name] for name in wanted.values()]
        grads = torch.autograd.grad(total, sources, allow_unused=True, materialize_grads=True)
        results |= dict(zip(wanted, grads))
    return results


def _source(grad: str, tensors: Tensors) -> str:
    """The tensor of a recorded gradient: of "grad.in.x" "in.x"; of "grad.x" "state.x", or "in.x" without one."""
    name = grad.removeprefix("grad.")
    if name.startswith(("in.", "state.")):
        return name
    return f"state.{name}" if f"state.{name}" in tensors else f"in.{name}"


def replay_parts(case: Case, args: Mapping[str, Mapping[str, Any]], replay: Callable[[Case], Tensors]) -> Tensors:
    """Replay a file of several small cases, whose tensors are called "in.case0.q" and the like, one by one.

    Args:
        case: the whole file.
        args: the arguments of each part by its name, "case0".
        replay: as in a claims file; it sees the part as a case of its own, with "in.q".
    """
    results: Tensors = {}
    for name, own in args.items():
        mine = re.compile(rf"{_GROUP}{name}\.")
        tensors = {mine.sub(r"\1", key): tensor for key, tensor in case.tensors.items() if mine.match(key)}
        part = replace(case, name=f"{case.name}/{name}", args=parse_args(own), tensors=tensors)
        results |= {re.sub(_GROUP, rf"\1{name}.", key): tensor for key, tensor in replay(part).items()}
    return results


def run_official(module: nn.Module, state: Tensors, *inputs: Tensor) -> Any:
    """Call a module, in eval mode, with renamed official tensors in place of its parameters and buffers.

    Raises: WorkError unless names and shapes are the module's own.
    """
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if ours != given:
        names = [name for name in ours | given if ours.get(name) != given.get(name)]
        odd = ", ".join(f"{name} {ours.get(name)} / {given.get(name)}" for name in names)
        raise WorkError(f"{type(module).__name__} cannot take the official state (ours / official): {odd}")
    return functional_call(module.eval(), state, inputs)


@dataclass(frozen=True)
class Match:
    """One result beside the recorded one.

    Attributes:
        name: its full name.
        difference: max|ours - recorded| / max|recorded|; None if there is nothing to compare.
        holds: whether that is within the tolerance.
        note: what is wrong, where nothing was compared.
    """

    name: str
    difference: float | None
    holds: bool
    note: str = ""


def compare(case: Case, ours: Tensors, tolerance: float = 1e-4) -> list[Match]:
    """Compare results with the recorded ones, name by name; a name that one side lacks does not hold.

    Gradients that are 0 in theory are noise on both sides: one is taken relative to no less than a thousandth of the
    case's largest.
    """
    expected = case.expected
    grads = [tensor.abs().max().item() for name, tensor in expected.items() if name.startswith("grad.")]
    floor = _NOISE * max(grads, default=0.0)
    return [
        _match(name, ours.get(name), expected.get(name), tolerance, floor if name.startswith("grad.") else 0.0)
        for name in expected | ours
    ]


def _match(name: str, ours: Tensor | None, theirs: Tensor | None, tolerance: float, floor: float) -> Match:
    if ours is None or theirs is None:
        return Match(name, None, False, "missing in ours" if ours is None else "not recorded")
    if ours.shape != theirs.shape:
        return Match(name, None, False, f"ours is {tuple(ours.shape)}, recorded is {tuple(theirs.shape)}")
    difference = relative_difference(ours, theirs, floor)
    if not math.isfinite(difference):
        return Match(name, None, False, "not finite")
    return Match(name, difference, difference <= tolerance)


def relative_difference(ours: Tensor, theirs: Tensor, floor: float = 0.0) -> float:
    """max|ours - theirs| / max|theirs|, with at least `floor` below; the plain difference if all of theirs is 0.

    >>> relative_difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    0.5
    """
    ours, theirs = ours.detach().double(), theirs.detach().double()
    if not theirs.numel():
        return 0.0
    apart = (ours - theirs).abs().masked_fill(ours == theirs, 0)  # the same infinity on both sides is no difference
    scale = max(theirs.nan_to_num(0, 0, 0).abs().max().item(), floor)
    return apart.max().item() / (scale or 1.0)
