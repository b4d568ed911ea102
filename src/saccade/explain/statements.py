"""Percentages that a text states about scores, read back and held against them (arXiv:2210.07222)."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from saccade.errors import InputError

__all__ = ["Group", "Statement", "check_sentences", "percent", "read_names", "read_scores"]

Group = tuple[int, ...]


@dataclass(frozen=True)
class Statement:
    """A percentage that a text states.

    Attributes:
        quote: what it is said of; "" where the text does not say.
        stated: the percentage, as written.
        actual: what the scores give, in percent; where the same words stand in several places, of the place that comes
            nearest. None where no part is named.
        holds: whether they agree to the last digit that is written.
    """

    quote: str
    stated: float
    actual: float | None
    holds: bool


def check_sentences(
    text: str, scores: Tensor | Sequence[float], names: Sequence[str], *, ordered: bool = True
) -> tuple[Statement, ...]:
    """Hold every percentage that a text states against the scores: the share of the positive scores that a quote has.

    The text may come from anywhere, a language model say. A percentage belongs to what is named between it and the one
    before; where nothing is, to what is named between it and the next one.

    Args:
        text: with numbers such as "19.02 %", "19%" or "19 percent".
        scores: (N,), of the parts; of an image, `score_regions` makes them.
        names: of the parts.
        ordered: the parts are the tokens of a text, and are named in quotes, alone or in their order: "a fine film",
            'film', » film «. False: they have no order, and their names are found with or without quotes.

    >>> found = check_sentences("'film' has 25 % and 'fine' has 60%.", [1.0, 3.0], ["film", "fine"])
    >>> [(each.quote, each.actual, each.holds) for each in found]
    [('film', 25.0, True), ('fine', 75.0, False)]
    """
    found = read_scores(scores)
    names = read_names(names, len(found), unique=not ordered)
    total = found.clamp(min=0).sum().item()
    quotes = [(*match.span(), next(filter(None, match.groups())).strip()) for match in _QUOTE.finditer(text)]
    places = _find_quotes(quotes, names) if ordered else _find_names(text, names)
    numbers = [
        match
        for match in _PERCENT.finditer(text)
        if not ordered or not any(start < match.start() < stop for start, stop, _ in quotes)
    ]
    borders = [0, *(match.end() for match in numbers), len(text)]
    statements = []
    for match, start, stop in zip(numbers, borders, [*(each.start() for each in numbers[1:]), len(text)]):
        named = [place for place in places if start <= place[0] < match.start()]
        named = named or [place for place in places if match.end() <= place[0] < stop]
        stated, decimals = float(match[1]), len(match[1].partition(".")[2])
        actual = _nearest(stated, [groups for _, groups, _ in named], found, total)
        within = 0.5 * 10**-decimals + 1e-9  # rounding to the last digit written
        holds = actual is not None and abs(stated - actual) <= within
        statements.append(Statement(", ".join(name for _, _, name in named), stated, actual, holds))
    return tuple(statements)


_PERCENT = re.compile(r"(?<![\w.])(-?\d+(?:\.\d+)?)\s*(?:%|per ?cent\b)")
_QUOTE = re.compile(r"»(.+?)«|“(.+?)”|\"(.+?)\"|(?<!\w)'(.+?)'(?!\w)", re.DOTALL)
_MOST = 10_000  # combinations of places that the same words may stand for

Place = tuple[int, list[Group], str]  # where in the text, what it may stand for, the words


def _find_quotes(quotes: list[tuple[int, int, str]], names: tuple[str, ...]) -> list[Place]:
    return [(start, _find_runs(quote, names), quote) for start, _, quote in quotes]


def _find_runs(quote: str, names: tuple[str, ...]) -> list[Group]:
    """All runs of names that, with blanks between them, are the quote."""
    runs = []
    for first in range(len(names)):
        read = ""
        for last in range(first, len(names)):
            read = f"{read} {names[last]}" if last > first else names[first]
            if read == quote:
                runs.append(tuple(range(first, last + 1)))
            if not quote.startswith(read):
                break
    return runs


def _find_names(text: str, names: tuple[str, ...]) -> list[Place]:
    longest = sorted(names, key=len, reverse=True)
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in longest), re.IGNORECASE)
    index = {name.lower(): part for part, name in enumerate(names)}
    return [(match.start(), [(index[match[0].lower()],)], match[0]) for match in pattern.finditer(text)]


def _nearest(stated: float, named: list[list[Group]], scores: Tensor, total: float) -> float | None:
    """The percentage of the named parts that comes nearest to what is stated."""
    if not named or total <= 0 or not all(named) or math.prod(map(len, named)) > _MOST:
        return None
    choices = ({part for group in groups for part in group} for groups in product(*named))
    return min((percent(scores, sorted(each), total) for each in choices), key=lambda actual: abs(stated - actual))


def percent(scores: Tensor, parts: Sequence[int], total: float) -> float:
    """What parts hold of `total`, the sum of positive scores (N,), in percent."""
    return 100 * (scores[list(parts)].sum().item() / total)


def read_scores(scores: Tensor | Sequence[float]) -> Tensor:
    """Scores (N,) as float64 on the CPU. Raises: InputError unless they are finite numbers, one at least."""
    found = torch.as_tensor(scores).detach().cpu()
    if found.ndim != 1 or not len(found) or found.is_complex() or not found.isfinite().all():
        raise InputError(f"scores are of shape {tuple(found.shape)}: give one finite number a part, (N,), at least one")
    return found.double()


def read_names(names: Sequence[str], count: int, unique: bool = False) -> tuple[str, ...]:
    """Names of `count` parts. Raises: InputError for other numbers, empty names, and doubles if `unique`."""
    if isinstance(names, str) or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(f"names are {names!r}: give a list of words, one a part, none of them empty")
    if len(names) != count or not count:
        raise InputError(f"there are {len(names)} names for {count} parts: give one a part, at least one")
    if unique and len({name.lower() for name in names}) < count:
        twice = next(name for place, name in enumerate(names) if name.lower() in map(str.lower, names[:place]))
        raise InputError(f"two parts are called {twice!r}: give each a name of its own, or nobody knows which is meant")
    return tuple(names)
