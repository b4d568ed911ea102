"""`saccade mixers`: the mixers that can be built and compared."""

import json
from typing import Any

EXAMPLE = "saccade mixers --json"


def arguments(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def run(args: Any) -> int:
    from saccade.mixers import describe_mixer, list_mixers

    mixers = {name: describe_mixer(name) for name in list_mixers()}
    if args.json:
        print(json.dumps(mixers, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("mixer", "what it does", title="Mixers")
    for name, summary in mixers.items():
        table.add_row(name, summary)
    Console().print(table)
    return 0
