"""A tape walked backwards: relevance of every value, and an account of where it went."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saccade.explain.relevance.adjoints import Shares
from saccade.explain.relevance.families import DROPS
from saccade.explain.relevance.recipes import Recipe
from saccade.explain.relevance.rules import Rule
from saccade.explain.relevance.tape import Node, Tape, Value

__all__ = ["Absorbed", "Served", "Walk", "walk"]


@dataclass(frozen=True)
class Absorbed:
    """Relevance that ended before the input.

    Attributes:
        layer: module whose parameters took it, or after which it was lost.
        kind: "bias", "weight", "norm" (parameters of norms), "buffer", "constant" (tensors without a name), "unknown"
            (an operation without a rule), or "rule" (what the rule itself does not hand on: an epsilon, a term that
            is a number, something held fixed).
        op: aten name of the operation.
        amount: in the unit of the explained output, summed over batch and targets.
    """

    layer: str
    kind: str
    op: str
    amount: float


@dataclass(frozen=True)
class Served:
    """How the operations of one name were served.

    Attributes:
        op, rule: names.
        count: operations that carried relevance.
        share: for rule "unknown", sum |R| that went through over sum |R| at the start; else None.
    """

    op: str
    rule: str
    count: int
    share: float | None


@dataclass
class Walk:
    """What a walk found.

    Attributes:
        values: message at each value that was asked for.
        absorbed: see Absorbed.
        served: see Served.
    """

    values: dict[Value, Tensor] = field(default_factory=dict)
    absorbed: list[Absorbed] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)


def walk(
    tape: Tape, recipe: Recipe, start: Mapping[Value, Tensor], wanted: Iterable[Value], *, last: bool = True
) -> Walk:
    """Send messages from the values in `start` to all that they were made from.

    Args:
        tape: recorded with this recipe's needs.
        recipe: rules.
        start: value -> its relevance, or its coefficient.
        wanted: values whose messages are kept.
        last: the tape is used up on the way, which frees its memory.
    """
    found, wanted = Walk(), set(wanted)
    pending = dict(start)
    ledger: dict[tuple[str, str, str], Tensor] = {}
    served: dict[tuple[str, str], tuple[int, Tensor | None]] = {}
    total = sum(each.abs().sum() for each in start.values())
    with torch.no_grad():
        for place in range(len(tape.nodes) - 1, -1, -1):
            node = tape.nodes[place]
            messages = [None if each is None else pending.pop(each, None) for each in node.outputs]
            for value, message in zip(node.outputs, messages):
                if value in wanted and message is not None:
                    found.values[value] = message
            if any(message is not None for message in messages):
                rule = recipe.rule(node, tape.count)
                shares = _share(node, rule, messages)
                _book(ledger, node, rule, messages, shares, recipe.message)
                _count(served, node, rule, messages)
                for value, part in zip(node.inputs, shares):
                    if part is not None and value.active:
                        before = pending.get(value)
                        pending[value] = part if before is None else before + part
                del shares
            del messages
            if last:
                tape.nodes.pop()
    for value in wanted & pending.keys():
        found.values[value] = pending[value]
    found.absorbed = [Absorbed(*key, amount.item()) for key, amount in ledger.items() if amount.item()]
    found.served = [
        Served(op, rule, count, None if passed is None else (passed / total).item())
        for (op, rule), (count, passed) in sorted(served.items())
    ]
    return found


def _share(node: Node, rule: Rule, messages: list[Tensor | None]) -> Shares:
    if rule.many is not None and any(message is not None for message in messages[1:]):
        return rule.many(node, messages)
    return [None] * len(node.inputs) if messages[0] is None else rule.share(node, messages[0])


_Key = tuple[str, str, str]


def _book(
    ledger: dict[_Key, Tensor], node: Node, rule: Rule, messages: list[Tensor | None], shares: Shares, kind: str
) -> None:
    """Enter what constants took, and what the rule did not hand on."""
    for value, part in zip(node.inputs, shares):
        if part is not None and not value.active:
            taken = part.sum() if kind == "relevance" else (part * value.tensor).sum()
            _enter(ledger, (_owner(node, value), _kind(node, value), node.op), taken)
    spectral = any(v.dtype.is_complex for v in (*node.inputs, *node.outputs) if v)
    if kind == "coefficient" or rule.exact or spectral or _only_moves(node):
        return
    came = sum(message.sum() for message in messages if message is not None)
    went = sum(part.sum() for part in shares if part is not None)
    _enter(ledger, (node.layer, "unknown" if rule.name == "unknown" else "rule", node.op), torch.as_tensor(came - went))


def _only_moves(node: Node) -> bool:
    """Whether all that a move gets goes on to an operand, so that nothing needs adding up."""
    constants = any(value.dtype.is_floating_point and not value.active for value in node.inputs)
    return node.family == "move" and node.op not in DROPS and not constants


def _enter(ledger: dict[_Key, Tensor], key: _Key, amount: Tensor) -> None:
    ledger[key] = ledger[key] + amount if key in ledger else amount


def _owner(node: Node, value: Value) -> str:
    return value.names[0].rpartition(".")[0] if value.names else node.layer


def _kind(node: Node, value: Value) -> str:
    if not value.names:
        return "constant"
    if node.family == "norm":
        return "norm"
    return "bias" if value.names[0].rpartition(".")[2].endswith("bias") else "weight"


def _count(
    served: dict[tuple[str, str], tuple[int, Tensor | None]], node: Node, rule: Rule, messages: list[Tensor | None]
) -> None:
    count, passed = served.get((node.op, rule.name), (0, None))
    if rule.name == "unknown":
        came = sum(message.abs().sum() for message in messages if message is not None)
        passed = torch.as_tensor(came) + (0 if passed is None else passed)
    served[node.op, rule.name] = count + 1, passed
