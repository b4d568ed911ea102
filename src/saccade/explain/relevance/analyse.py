"""`relevance`: a model's output traced back to its inputs, to inner features and to heads, with its account."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from saccade.errors import InputError, WorkError
from saccade.explain.relevance.modules import check_points, watching
from saccade.explain.relevance.recipes import On, Recipe, read_recipe
from saccade.explain.relevance.tape import Node, Recorder, Tape, Value, record
from saccade.explain.relevance.walk import Absorbed, Served, walk

__all__ = ["Relevance", "merge", "relevance"]


@dataclass(frozen=True)
class Relevance:
    """What `relevance` found.

    Attributes:
        map: relevance of each entry of the input, in its shape; (B, T, ...) for targets (B, T); a tuple for several
            inputs.
        target: (B,) or (B, T) long; None where the output was chosen by `output` alone.
        start: (B,) or (B, T), the explained numbers: logits, or differences of two.
        error: like `start`, the map's sum minus `start`: what biases, norms and rules took, with its sign turned.
        absorbed: the conservation ledger, summed over batch and targets; see Absorbed.
        served: coverage: how each operation was served; see Served.
        inner: message at the output of each module that was asked for: relevance, in its shape.
        heads: relevance of each head, (B, heads), by the name of the layer before its attention, in the order of the
            network. Absent under recipes that stop at attention.
        recipe: name.
        bytes: of activations that the tape kept.
    """

    map: Any
    target: Tensor | None
    start: Tensor
    error: Tensor
    absorbed: tuple[Absorbed, ...]
    served: tuple[Served, ...]
    inner: dict[str, Tensor]
    heads: dict[str, Tensor]
    recipe: str
    bytes: int

    @property
    def unknown(self) -> dict[str, float]:
        """Operations without a rule, with their share of the relevance at the start."""
        return {each.op: each.share or 0.0 for each in self.served if each.rule == "unknown"}

    @property
    def conservation_error(self) -> float:
        """What neither the map nor the ledger's constants hold, as a share of what was explained.

        Zero for rules that conserve; what an epsilon, a held scale or the expansion of softmax took is in it. Read it
        beside the size of the map: in deep networks with random weights a logit near 0 is the sum of shares that are
        millions of times larger and cancel. What rounding, and the 1e-11 that guards 0 / 0, take of those is then
        more than the logit. In float64, without that guard (`recipes.epsilon(0.0)`), it vanishes.
        """
        lost = sum(each.amount for each in self.absorbed if each.kind in ("rule", "unknown"))
        return abs(lost) / max(self.start.abs().sum().item(), 1e-30)

    def by_layer(self) -> dict[str, dict[str, float]]:
        """The ledger as layer -> kind -> amount."""
        table: dict[str, dict[str, float]] = {}
        for each in self.absorbed:
            row = table.setdefault(each.layer, {})
            row[each.kind] = row.get(each.kind, 0.0) + each.amount
        return table


def relevance(
    model: Callable[..., Any],
    *inputs: Tensor,
    target: int | Tensor | None = None,
    contrast: int | Tensor | None = None,
    recipe: str | Recipe = "epsilon",
    rules: Sequence[On] = (),
    inner: Sequence[str] = (),
    output: Callable[[Any], Tensor] | None = None,
    start: Tensor | None = None,
) -> Relevance:
    """Trace a model's output back, operation by operation.

    The model runs once, without autograd and as it is: nothing is patched, compiled graphs run eagerly, and it may work
    in place (it then starts twice). Modes are left alone: call `model.eval()`.

    Args:
        model: a module, or any function of tensors.
        inputs: the tensors to explain by. Floats, or token ids, whose relevance is that of their embeddings.
        target: class, (B,) classes or (B, T) for several maps of each sample; None takes the largest logit.
        contrast: class or (B,) whose logit is subtracted: why the target and not that one.
        recipe: name of a recipe, or one made by a function of `recipes`.
        rules: entries in front of the recipe's.
        inner: names of modules whose output's relevance is wanted, or "NAME:in" for that of their first input.
        output: takes what the model returns, and gives the tensor (B, classes) to explain; needed for models that
            return a tuple or a dict. A tensor (B,) is explained as it is, without a target.
        start: relevance of the output to begin with, in its shape, in place of the target's logits.

    Returns: Relevance.
    Raises: InputError for wrong inputs, targets and names, and for outputs that are no tensor; WorkError if relevance
        is NaN or infinite, naming the operation.

    >>> model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    >>> found = relevance(model, torch.randn(4, 2), target=1)
    >>> bool(found.error.abs().max() < 1e-6)
    True
    """
    chosen = read_recipe(recipe).with_rules(*rules)
    _check_inputs(inputs)
    named = named_tensors(model)
    check_points(model, inner)

    def run(recorder: Recorder, given: tuple[Tensor, ...]) -> Tensor:
        with watching(model, inner, recorder.mark):
            returned = model(*given)
        return recorder.mark("output", _read_output(returned, output, model, len(inputs[0])))

    tape, out = record(run, [each.detach() for each in inputs], named, chosen.needs)
    if "output" not in tape.marks:
        raise InputError("the output does not depend on the inputs by any number: nothing can be traced back")
    if not out.isfinite().all():
        raise WorkError(f"the model's output is NaN or infinite{_where_not_finite(tape)}: nothing can be explained")
    starts, target, amounts = _starts(out, target, contrast, start, chosen)
    return _collect(tape, chosen, starts, target, amounts, len(inputs), inner)


def merge(parts: Sequence[Relevance]) -> Relevance:
    """Relevance of a batch that was traced in parts."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def together(tensors: list[Any]) -> Any:
        if isinstance(tensors[0], tuple):
            return tuple(torch.cat(each) for each in zip(*tensors))
        return None if tensors[0] is None else torch.cat(tensors)

    absorbed: dict[tuple[str, str, str], float] = {}
    for each in (each for part in parts for each in part.absorbed):
        key = each.layer, each.kind, each.op
        absorbed[key] = absorbed.get(key, 0.0) + each.amount
    return replace(
        first,
        **{name: together([getattr(part, name) for part in parts]) for name in ("map", "target", "start", "error")},
        absorbed=tuple(Absorbed(*key, amount) for key, amount in absorbed.items()),
        served=_together(parts),
        inner={name: torch.cat([part.inner[name] for part in parts]) for name in first.inner},
        heads={name: torch.cat([part.heads[name] for part in parts]) for name in first.heads},
        bytes=max(part.bytes for part in parts),
    )


def _together(parts: Sequence[Relevance]) -> tuple[Served, ...]:
    """Coverage of all parts: counts are those of one, and shares are weighted by what was explained."""
    weights = [part.start.abs().sum().item() for part in parts]
    total = max(sum(weights), 1e-30)
    rows: dict[tuple[str, str], Served] = {}
    shares: dict[tuple[str, str], float] = {}
    for part, weight in zip(parts, weights):
        for row in part.served:
            key = row.op, row.rule
            rows.setdefault(key, row)
            shares[key] = shares.get(key, 0.0) + (row.share or 0.0) * weight / total
    return tuple(replace(row, share=None if row.share is None else shares[key]) for key, row in rows.items())


def _collect(
    tape: Tape,
    recipe: Recipe,
    starts: list[Tensor],
    target: Tensor | None,
    amounts: Tensor,
    num_inputs: int,
    inner: Sequence[str],
) -> Relevance:
    roots = [tape.marks[f"input.{i}"] for i in range(num_inputs)]
    marked = {name: value for name, value in tape.marks.items() if name.partition("#")[0] in inner}
    heads = _heads(tape) if recipe.message == "relevance" else {}
    size = tape.bytes
    wanted = {*roots, *marked.values(), *(value for value, _ in heads.values())}
    maps: list[list[Tensor]] = []
    inners: dict[str, list[Tensor]] = {name: [] for name in marked}
    of_heads: dict[str, list[Tensor]] = {}
    absorbed: dict[tuple[str, str, str], float] = {}
    served: dict[tuple[str, str], Served] = {}
    for number, begin in enumerate(starts):
        found = walk(tape, recipe, {tape.marks["output"]: begin}, wanted, last=number == len(starts) - 1)
        maps.append([_at_input(root, found.values.get(root), recipe) for root in roots])
        for name, value in marked.items():
            message = found.values.get(value)
            inners[name].append(begin.new_zeros(value.shape) if message is None else message)
        for name, (value, shape) in heads.items():
            if value in found.values:
                of_heads.setdefault(name, []).append(found.values[value].reshape(*shape, -1).sum(-1))
        for each in found.absorbed:
            key = each.layer, each.kind, each.op
            absorbed[key] = absorbed.get(key, 0.0) + each.amount
        for row in found.served:
            served.setdefault((row.op, row.rule), row)
    _check_finite(maps, starts, recipe)
    several = amounts.ndim == 2
    stacked = tuple(_stack([each[i] for each in maps], several) for i in range(num_inputs))
    sums = sum(each.flatten(2 if several else 1).sum(-1) for each in stacked)
    return Relevance(
        map=stacked[0] if num_inputs == 1 else stacked,
        target=target,
        start=amounts,
        error=sums - amounts,
        absorbed=tuple(Absorbed(*key, amount) for key, amount in absorbed.items()),
        served=tuple(served.values()),
        inner={name: _stack(each, several) for name, each in inners.items()},
        heads={name: _stack(each, several) for name, each in of_heads.items()},
        recipe=recipe.name,
        bytes=size,
    )


def _stack(tensors: list[Tensor], several: bool) -> Tensor:
    return torch.stack(tensors, 1) if several else tensors[0]


def _at_input(root: Value, message: Tensor | None, recipe: Recipe) -> Tensor:
    """Relevance of an input, 0 where nothing arrived; token ids carry relevance under every recipe."""
    if message is None:
        return torch.zeros(root.shape, device=root.device)
    return root.tensor * message if recipe.message == "coefficient" and root.dtype.is_floating_point else message


def _heads(tape: Tape) -> dict[str, tuple[Value, tuple[int, ...]]]:
    """Layer -> the output of its heads, whose first axes hold batch and heads, and the shape of these two."""
    found: dict[str, tuple[Value, tuple[int, ...]]] = {}
    shape: tuple[int, ...] = ()

    def add(node: Node, shape: tuple[int, ...]) -> None:
        name, number = node.layer, 2
        while name in found:
            name, number = f"{node.layer}#{number}", number + 1
        found[name] = node.output, shape

    for node in tape.nodes:
        if node.family == "softmax" and len(node.output.shape) == 4:
            shape = tuple(node.output.shape[:2])
        elif node.family == "attention":
            add(node, tuple(node.output.shape[:2]))
        elif node.family == "product" and any(value.trait == "softmax" for value in node.inputs):
            rows = node.output.shape[0]
            if len(shape) == 2 and rows == shape[0] * shape[1]:
                add(node, shape)
    return found


def named_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers of a module by name, shared ones under each; of a function none."""
    if not isinstance(model, nn.Module):
        return {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors}


def _check_inputs(inputs: tuple[Any, ...]) -> None:
    if not inputs:
        raise InputError("there is no input: give the tensors that the model is called with")
    for each in inputs:
        if not isinstance(each, Tensor):
            raise InputError(
                f"an input is a {type(each).__name__}: give tensors, and bind the rest with functools.partial"
            )
        if each.ndim == 0 or not each.numel():
            raise InputError(f"an input has shape {tuple(each.shape)}: give a batch with at least one sample")
        if each.is_floating_point() and not each.isfinite().all():
            raise InputError("the input holds NaN or infinite values: give finite floats")


def _read_output(returned: Any, output: Callable[[Any], Tensor] | None, model: Any, batch: int) -> Tensor:
    chosen = returned if output is None else output(returned)
    kind = type(model).__name__ if isinstance(model, nn.Module) else "the function"
    if not isinstance(chosen, Tensor):
        size = f" of {len(chosen)}" if isinstance(chosen, tuple | list | dict) else ""
        raise InputError(
            f"{kind} returns a {type(chosen).__name__}{size}: relevance starts at one tensor. Say which with output=, "
            "such as output=lambda returned: returned[0]"
        )
    if chosen.ndim == 0 or len(chosen) != batch:
        raise InputError(
            f"{kind} returns a tensor of shape {tuple(chosen.shape)} for a batch of {batch}: give inputs with a batch "
            "axis, and an output with one row a sample"
        )
    return chosen


def _starts(
    out: Tensor, target: int | Tensor | None, contrast: int | Tensor | None, start: Tensor | None, recipe: Recipe
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Messages to begin with (one a target), targets, and the explained numbers."""
    if start is not None:
        if start.shape != out.shape:
            raise InputError(f"start is {tuple(start.shape)} but the output is {tuple(out.shape)}: give the same shape")
        amount = start if recipe.message == "relevance" else start * out
        return [start], None, amount.flatten(1).sum(1) if out.ndim > 1 else amount
    if out.ndim == 1:
        if target is not None or contrast is not None:
            raise InputError("the output is one number a sample: leave target and contrast out")
        return [out if recipe.message == "relevance" else torch.ones_like(out)], None, out
    if out.ndim != 2:
        raise InputError(
            f"the output has shape {tuple(out.shape)}: give output= that makes it (B, classes) or (B,), or the "
            "relevance to begin with as start="
        )
    target = out.argmax(1) if target is None else _read_target("target", target, out)
    columns = [target] if target.ndim == 1 else list(target.unbind(1))
    minus = None if contrast is None else _read_target("contrast", contrast, out)
    if minus is not None and minus.ndim == 2:
        raise InputError(f"contrast has shape {tuple(minus.shape)}: give one class, or one for each sample")
    starts: list[Tensor] = []
    amounts: list[Tensor] = []
    for column in columns:
        weight = torch.zeros_like(out).scatter_(1, column[:, None], 1)
        if minus is not None:
            weight.scatter_add_(1, minus[:, None], -torch.ones_like(out[:, :1]))
        starts.append(weight * out if recipe.message == "relevance" else weight)
        amounts.append((weight * out).sum(1))
    return starts, target, amounts[0] if target.ndim == 1 else torch.stack(amounts, 1)


def _read_target(name: str, target: int | Tensor, out: Tensor) -> Tensor:
    given = torch.as_tensor(target, device=out.device)
    fits = given.shape in ((), (len(out),)) or (given.ndim == 2 and len(given) == len(out))
    if given.is_floating_point() or given.dtype == torch.bool or not fits or not given.numel():
        raise InputError(
            f"{name} is {given.dtype} of shape {tuple(given.shape)}: give a class, (B,) of them, or (B, T) for T maps "
            f"of each of the {len(out)} samples"
        )
    wrong = given[(given < 0) | (given >= out.shape[1])].flatten()
    if wrong.numel():
        raise InputError(
            f"{name} is {wrong[0].item()} but the model knows {out.shape[1]} classes: give 0 to {out.shape[1] - 1}"
        )
    given = given.long()
    return given.expand(len(out)).clone() if given.ndim == 0 else given


def _check_finite(maps: list[list[Tensor]], starts: list[Tensor], recipe: Recipe) -> None:
    if not all(each.isfinite().all() for row in maps for each in row):
        raise WorkError(
            f"relevance under recipe {recipe.name!r} is NaN or infinite: look for activations that are, or for values "
            "that cancel where a larger epsilon would help"
        )


def _where_not_finite(tape: Tape) -> str:
    """After which operation the first NaN or infinite value that was kept appeared."""
    for node in tape.nodes:
        data = [value.data for value in node.outputs if value is not None and value.data is not None]
        if not all(each.isfinite().all() for each in data):
            return f" from {node.op} of layer {node.layer!r} on"
    return ""
