"""Options that several commands take, written once."""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saccade.errors import InputError

DATA_HELP = "a folder with a subfolder for each class, a Hugging Face dataset, digits or textures"

__all__ = [
    "DATA_HELP",
    "ProgressLine",
    "add_json",
    "add_training",
    "emit",
    "emit_table",
    "name_skipped",
    "output_folder",
]

_EVERY = 10.0  # seconds between lines of progress where there is no terminal
_NAMED = 10  # of the images that were left out


def add_json(parser: Any) -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs instead of a table")


def add_training(parser: Any, *, learning_rate: float) -> None:
    """How to train, and on what."""
    parser.add_argument(
        "--epochs", type=int | None, default=None, help="passes over the images; by default about 240 steps"
    )
    parser.add_argument(
        "--image-size", type=int | None, default=None, help="pixels a side; by default chosen from the images"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images in a step, over all devices")
    parser.add_argument("--learning-rate", type=float, default=learning_rate, help="peak learning rate of AdamW")
    parser.add_argument(
        "--augment", type=str, default="light", help="none, light (small shifts) or standard (crops, flips, colours)"
    )
    parser.add_argument("--accelerator", type=str, default="auto", help="auto, cpu, gpu")
    parser.add_argument("--devices", type=str, default="auto", help="a number of devices, or auto")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument(
        "--strategy", type=str, default="auto", help="auto, ddp, fsdp: how several devices share the work"
    )


def output_folder(asked: str | None, data: str, name: str) -> Path:
    """The folder for results: as asked, or NAME with the data's own name in place of {}.

    Raises: InputError for a folder inside the images' own, where the next run would take it for a class.
    """
    source = Path(data.removeprefix("hf:")).resolve()
    folder = Path(asked or name.format(source.name))
    if source.is_dir() and source in (folder.resolve(), *folder.resolve().parents):
        raise InputError(f"{folder} lies inside the folder of the images: give one outside it with --out")
    return folder


def name_skipped(skipped: Sequence[Mapping[str, str]]) -> None:
    """Name and count on stderr the images that were left out, each with `path` and `reason`."""
    if skipped:
        print(f"{len(skipped)} image{'s' * (len(skipped) > 1)} could not be used:", file=sys.stderr)
    for each in skipped[:_NAMED]:
        print(f"  {each['path']}: {each['reason']}", file=sys.stderr)
    if skipped[_NAMED:]:
        print(f"  and {len(skipped) - _NAMED} more", file=sys.stderr)


def emit(text: str) -> None:
    """Print a result to stdout."""
    print(text)


def emit_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table to stdout, as wide as the terminal; 120 characters where there is none."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(*(Column(name, overflow="fold") for name in columns), title=title)
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


class ProgressLine:
    """Progress of a long command on stderr: a live line on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._live = console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[best]}"),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("starting", total=None, best="")
        self._told = -math.inf

    @contextmanager
    def shown(self) -> Iterator["ProgressLine"]:
        """Show the line while a command runs."""
        with self._bar:
            yield self

    def start(self, units: float) -> None:
        """The command has so many units of work."""
        self._bar.update(self._task, total=units)

    def show(self, doing: str, best: str) -> None:
        """What runs now, and the best so far."""
        best = f"best so far: {best}" if best else ""
        self._bar.update(self._task, description=doing, best=best)
        now = time.monotonic()
        if not self._live and now - self._told >= _EVERY:
            self._told = now
            task = self._bar.tasks[0]
            left = "" if task.time_remaining is None else f", about {task.time_remaining:.0f} s left"
            print(f"{task.percentage:3.0f} %  {doing}{left}{'; ' if best else ''}{best}", file=sys.stderr, flush=True)

    def advance(self, units: float) -> None:
        """So many units are done."""
        self._bar.advance(self._task, units)
