"""`saccade models`: the networks that can be built, by family."""

import json
from typing import Any

from saccade.cli.shared import add_json, emit, emit_table

EXAMPLE = "saccade models 'halonet*'"


def arguments(parser: Any) -> None:
    parser.add_argument("pattern", nargs="?", type=str, default="*", help="shell pattern of names")
    add_json(parser)


def run(args: Any) -> int:
    from dataclasses import asdict

    from saccade.backbones import describe_model, list_models
    from saccade.errors import InputError, nearest

    names = list_models(args.pattern)
    if not names:
        raise InputError(f"no network matches {args.pattern!r}: {nearest(args.pattern, list_models())}")
    found = {name: describe_model(name) for name in names}
    found = dict(sorted(found.items(), key=lambda item: (item[1].family, item[1].params)))
    if args.json:
        rows = {name: asdict(summary) for name, summary in found.items()}
        for row in rows.values():
            del row["default_cfg"], row["refuses"]
        emit(json.dumps(rows, indent=1))
        return 0
    columns = ("family", "network", "parameters (1000 classes)", "image size", "channels", "input pixels a token")
    cells = [
        (each.family, name, f"{each.params:,}", each.image_size, _runs(each.channels), _runs(each.reductions))
        for name, each in found.items()
    ]
    emit_table("Networks", columns, cells)
    return 0


def _runs(values: list[int]) -> str:
    """Stages of a kind are counted: "192 x 12"."""
    return f"{values[0]} x {len(values)}" if len(values) > 4 and len(set(values)) == 1 else ", ".join(map(str, values))
