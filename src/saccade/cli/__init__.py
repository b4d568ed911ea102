"""The command line. A command is a file of this folder with `EXAMPLE`, `arguments(parser)` and `run(args) -> int`.

Results go to stdout, progress to stderr. The exit status is 0 when all holds, 1 when work failed or a claim does not
hold, 2 when the call was wrong. Command files import torch and everything heavy inside `run`, so that help is quick.
"""

import re
import sys
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from saccade import __version__
from saccade.errors import InputError, WorkError, nearest

__all__ = ["COMMANDS", "build_parser", "main"]

COMMANDS = {
    "study": "Train one network with each attention mechanism on your images, and report which to use",
    "train": "Train one network on your images",
    "explain": "Show where a trained network looks, and whether to believe it",
    "bench": "Time operators over map sizes",
    "models": "List the networks that can be built",
    "mixers": "List the mixers that can be built and compared",
    "papers": "List the papers: what works, what does not yet",
    "verify": "Check the claims of papers: published beside measured",
    "replay": "Compare with recorded outputs of a paper's official code",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"saccade {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        return _complain("saccade", f"there is no command {name!r}: {nearest(name, COMMANDS)}", 2)
    command = f"saccade {name}"
    parser = build_parser(name)
    try:
        args = parser.parse_args(rest)
    except ArgumentError as error:
        return _complain(command, f"{_wrong_call(str(error), parser)} See {command} --help", 2)
    except SystemExit:  # after --help or --print_config
        return 0
    try:
        args.command = " ".join(["saccade", *words])
        return int(_module(name).run(args))
    except InputError as error:
        return _complain(command, str(error), 2)
    except WorkError as error:
        return _complain(command, str(error), 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _complain(
            command, f"{where}{error.strerror or error}. Check the path, its permissions and free space", 1
        )
    except KeyboardInterrupt:
        return _complain(command, "stopped; the same command goes on where it was, where the command can", 130)


def build_parser(name: str) -> Any:
    """The parser of one command, whose help ends with an example."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Leaves the example on one line, to be copied."""

    module = _module(name)
    parser = ArgumentParser(
        prog=f"saccade {name}",
        description=COMMANDS[name] + ".",
        epilog=f"example: {module.EXAMPLE}",
        formatter_class=Formatter,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="take arguments from a YAML file (see --print_config)")
    module.arguments(parser)
    return parser


def _module(name: str) -> Any:
    return import_module(f"saccade.cli.{name}")


def _wrong_call(message: str, parser: Any) -> str:
    """The parser's words in a user's: options as they are written, kinds in words, the nearest option."""
    unknown = re.search(r"[Uu]nrecognized arguments: (\S+)", message)
    if unknown and unknown[1].startswith("-"):
        options = [option for option in parser._option_string_actions if option.startswith("--")]
        hint = nearest(unknown[1], options)
        return f"there is no option {unknown[1]}: {hint}{'' if hint.endswith('?') else '.'}"
    value = re.search(r'Parser key "(\w+)".*(?:Got|Given) value: (.*)', message, re.DOTALL)
    kinds = [words for kind, words in _KINDS.items() if f"class '{kind}'" in message]
    if value and kinds:
        return f"--{value[1].replace('_', '-')} is {value[2]!r}: give {' or '.join(kinds)}."
    return f"{' '.join(message.split())}."


_KINDS = {"int": "a whole number", "float": "a number"}


def _complain(command: str, message: str, status: int) -> int:
    print(f"{command}: {message}", file=sys.stderr)
    return status


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items())
    return (
        f"saccade {__version__}: which attention to use on your images, what it costs, where it looks\n\n"
        f"usage: saccade COMMAND ...      saccade COMMAND --help\n\n{rows}\n\n"
        "example: saccade study digits"
    )
