"""Errors that every floor raises, and the checks of arguments that all of them share."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["DivergedError", "InputError", "WorkError", "check_choice", "nearest"]


class InputError(ValueError):
    """The call was wrong: a value, a file or a name that cannot be served. The command line exits with 2."""


class WorkError(RuntimeError):
    """The call was right and the work failed: a diverged loss, a full disk. The command line exits with 1."""


class DivergedError(WorkError):
    """Training met a loss that is NaN or infinite."""


def nearest(given: str, choices: Iterable[str]) -> str:
    """End an error about an unknown name: the nearest choices first, or all of them.

    >>> nearest("windov", ["window", "grid"])
    'did you mean window?'
    >>> nearest("xyz", ["window", "grid"])
    'choose one of grid, window'
    """
    choices = sorted(choices)
    close = get_close_matches(str(given), choices, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(choices)}"


def check_choice(what: str, given: str, choices: Iterable[str]) -> None:
    """Raise InputError unless `given` is one of `choices`.

    >>> check_choice("impl", "tilde", ["reference", "tiled"])
    Traceback (most recent call last):
    saccade.errors.InputError: impl is 'tilde': did you mean tiled?
    """
    choices = list(choices)
    if given not in choices:
        raise InputError(f"{what} is {given!r}: {nearest(given, choices)}")
