"""`saccade mixers`: the mixers that can be built and compared."""

import json
from typing import Any

from saccade.cli.shared import add_json, emit, emit_table

EXAMPLE = "saccade mixers --json"


def arguments(parser: Any) -> None:
    add_json(parser)


def run(args: Any) -> int:
    from saccade.mixers import describe_mixer, list_mixers

    mixers = {name: describe_mixer(name) for name in list_mixers()}
    if args.json:
        emit(json.dumps(mixers, indent=1))
        return 0
    emit_table("Mixers", ("mixer", "what it does"), mixers.items())
    return 0
