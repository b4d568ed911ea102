"""What a paper and its claims are, and how a claim is checked."""

import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from saccade.claims.framework.recorded import Case
from saccade.errors import check_choice

__all__ = [
    "Claim",
    "Compare",
    "Outcome",
    "Paper",
    "at_least",
    "at_most",
    "check",
    "claim",
    "describe_error",
    "equal",
    "exact",
    "rounding",
    "show_value",
]

Value = (
    bool | int | float | str | tuple["Value", ...] | Mapping[str, "Value"]
)  # what is published, and what is measured

KINDS = ("accuracy", "complexity", "equivalence", "flops", "params", "property", "speed", "theory")


@dataclass(frozen=True)
class Compare:
    """When a measured value holds; made by `equal`, `at_most` and `at_least`.

    Attributes:
        words: what is asked of it: "at most 1e-10".
        reason: why this bound or tolerance.
        test: (measured, published) -> whether it holds.
    """

    words: str
    reason: str
    test: Callable[[Any, Any], bool]


def equal(reason: str, *, within: float = 0.0, relative: float = 0.0) -> Compare:
    """Measured equals published, up to `within`, or up to the share `relative` of the published value.

    Tuples and mappings are compared entry by entry.

    >>> equal("two decimals are published", within=0.005).test({"a": 1.504}, {"a": 1.5})
    True
    """

    def test(measured: Any, published: Any) -> bool:
        if isinstance(published, Mapping):
            return measured.keys() == published.keys() and all(test(measured[k], published[k]) for k in published)
        if isinstance(published, tuple):
            return len(measured) == len(published) and all(map(test, measured, published))
        if measured == published or isinstance(published, bool | str):
            return bool(measured == published)
        return bool(abs(measured - published) <= max(within, relative * abs(published)))

    tolerance = f" within {within:g}" if within else f" within {100 * relative:g} %" if relative else ""
    return Compare(f"equal{tolerance}", reason, test)


def at_most(bound: float, reason: str) -> Compare:
    """Every measured number is at most `bound`."""
    return Compare(f"at most {bound:g}", reason, lambda measured, _: all(x <= bound for x in _numbers(measured)))


def at_least(bound: float, reason: str) -> Compare:
    """Every measured number is at least `bound`."""
    return Compare(f"at least {bound:g}", reason, lambda measured, _: all(x >= bound for x in _numbers(measured)))


exact = equal("counts and properties are exact")
rounding = at_most(1e-10, "what float64 loses to rounding")


@dataclass(frozen=True)
class Claim:
    """One thing that a paper says, and how it is measured here. The decorator `claim` makes it, and explains it."""

    name: str
    kind: str
    statement: str
    published: Value
    holds: Compare
    source: str
    measure: Callable[[], Value]
    needs: str | None
    slow: bool
    guess: str | None


def claim(
    kind: str,
    published: Value,
    holds: Compare = exact,
    *,
    source: str,
    needs: str | None = None,
    slow: bool = False,
    guess: str | None = None,
) -> Callable[[Callable[[], Any]], Claim]:
    """Make a claim of a function: its name names it, its docstring states it, its result is the measured value.

    Args:
        kind: one of accuracy, complexity, equivalence, flops, params, property, speed and theory.
        published: the figure as published, or what is said in words; a mapping where there are several.
        holds: when the measured value agrees, with the reason of the tolerance.
        source: where it is published; "recalled" where nobody looked it up.
        needs: data, hardware or parts that are not here. The function is then not called, and has no body.
        slow: takes more than a few seconds; `saccade verify --fast` leaves it out.
        guess: why we think that it fails, if it does.
    """
    check_choice("kind", kind, KINDS)

    def make(measure: Callable[[], Any]) -> Claim:
        statement = " ".join((measure.__doc__ or "").split())
        name = measure.__name__.replace("_", " ")
        return Claim(name, kind, statement, published, holds, source, measure, needs, slow, guess)

    return make


@dataclass(frozen=True)
class Paper:
    """All about one paper. A claims file makes it as `PAPER`; `load_paper` adds the last three.

    Attributes:
        title, arxiv, published: as on arXiv, with the date of the first version.
        summary: what it is, in two sentences.
        home: where it lives in the library: dotted names.
        missing: what of it does not work yet; empty when all does.
        differences: where official code departs from the paper or from us, and what that changes.
        key: name of the claims file.
        claims: the file's claims, in its order.
        replay: the file's function of that name; None if the mechanism has no official code.
    """

    title: str
    arxiv: str | None
    published: str
    summary: str
    home: tuple[str, ...]
    missing: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    key: str = ""
    claims: tuple[Claim, ...] = field(default=(), repr=False)
    replay: Callable[[Case], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a claim.

    Attributes:
        claim: which.
        verdict: "holds", "fails" or "needs".
        measured: the value; None where nothing was measured.
        note: what is needed; of a failure, the error or our guess.
        seconds: how long it took.
    """

    claim: Claim
    verdict: str
    measured: Value | None = None
    note: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The outcome and its claim in plain values, for JSON."""
        claim = self.claim
        return {
            "name": claim.name,
            "kind": claim.kind,
            "statement": claim.statement,
            "source": claim.source,
            "published": _plain(claim.published),
            "measured": _plain(self.measured),
            "holds_if": claim.holds.words,
            "tolerance_reason": claim.holds.reason,
            "verdict": self.verdict,
            "note": self.note,
            "seconds": round(self.seconds, 3),
        }


def check(claim: Claim, *, fast: bool = False) -> Outcome:
    """Measure a claim and compare. An error inside the measurement is a failure, which shows the error.

    Torch's random numbers start from one seed for every claim, and go on afterwards as if nothing had been drawn.

    Args:
        claim: which.
        fast: leave it out if it is slow: it then needs time.
    """
    if claim.needs:
        return Outcome(claim, "needs", note=claim.needs)
    if fast and claim.slow:
        return Outcome(claim, "needs", note="time: run it without --fast")
    measured, start = None, perf_counter()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            measured = claim.measure()
        holds = claim.holds.test(measured, claim.published)
        note = "" if holds else claim.guess or ""
    except Exception as error:
        holds, note = False, describe_error(error)
    return Outcome(claim, "holds" if holds else "fails", measured, note, perf_counter() - start)


def describe_error(error: Exception) -> str:
    """What went wrong and where, in a line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"


def show_value(value: Value) -> str:
    """Write a published or measured value in few characters.

    >>> show_value({"mean": 7.5147, "tiles": (4, 5)})
    'mean: 7.515\\ntiles: 4, 5'
    """
    if isinstance(value, Mapping):
        return "\n".join(f"{name}: {show_value(each)}" for name, each in value.items())
    if isinstance(value, tuple):
        return ", ".join(map(show_value, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """Without what JSON has not: names are words, infinity and NaN too."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> list[float]:
    """All numbers of a measured value, one at least."""
    if isinstance(value, Mapping | tuple):
        entries = value.values() if isinstance(value, Mapping) else value
        numbers = [number for entry in entries for number in _numbers(entry)]
        if not numbers:
            raise ValueError("nothing was measured: the value is empty")
        return numbers
    return [float(value)]
