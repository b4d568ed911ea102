"""`saccade models`: the networks that can be built."""

import json
from typing import Any

from saccade.cli.shared import add_json, emit, emit_table

EXAMPLE = "saccade models 'study_*'"


def arguments(parser: Any) -> None:
    parser.add_argument("pattern", nargs="?", type=str, default="*", help="shell pattern of names")
    add_json(parser)


def run(args: Any) -> int:
    from saccade.backbones import create_model, list_models
    from saccade.errors import InputError, nearest
    from saccade.measure import count_parameters

    names = list_models(args.pattern)
    if not names:
        raise InputError(f"no network matches {args.pattern!r}: {nearest(args.pattern, list_models())}")
    rows = {}
    for name in names:
        model = create_model(name)
        rows[name] = {
            "params": count_parameters(model),
            "channels": model.feature_info.channels(),
            "reductions": model.feature_info.reduction(),
        }
    if args.json:
        emit(json.dumps(rows, indent=1))
        return 0
    columns = ("network", "parameters (1000 classes)", "channels", "input pixels a token")
    cells = [(name, f"{row['params']:,}", row["channels"], row["reductions"]) for name, row in rows.items()]
    emit_table("Networks", columns, cells)
    return 0
