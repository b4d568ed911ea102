"""What long work tells while it runs."""

from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """Who is told."""

    def start(self, units: float) -> None:
        """There are so many units of work; in a study, an epoch is one."""

    def show(self, doing: str, best: str) -> None:
        """What runs now, and the best so far, where there is such a thing."""

    def advance(self, units: float) -> None:
        """So many units are done."""


class Silent:
    """Nobody is told."""

    def start(self, units: float) -> None:
        pass

    def show(self, doing: str, best: str) -> None:
        pass

    def advance(self, units: float) -> None:
        pass
