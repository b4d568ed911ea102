"""`saccade replay`: our modules beside recorded outputs of the papers' official code."""

import json
from typing import Any

from saccade.cli.shared import add_json, emit, emit_table

EXAMPLE = "saccade replay tests/recorded/halonet/open.safetensors"


def arguments(parser: Any) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE.safetensors", help="recorded cases, each with its .json beside it"
    )
    parser.add_argument("--key", type=str, default=None, help="the paper; by default the name of the file's folder")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest relative difference that holds")
    add_json(parser)


def run(args: Any) -> int:
    from dataclasses import asdict

    from saccade.claims import describe_error, load_paper, read_case, replay
    from saccade.errors import InputError, WorkError

    if not args.tolerance >= 0:
        raise InputError(f"--tolerance is {args.tolerance}: give a relative difference of 0 or more, such as 1e-4")
    cases = {file: read_case(file, args.key) for file in args.files}
    for case in cases.values():
        load_paper(case.key)  # a wrong call is told before the work
    results: dict[str, dict[str, Any]] = {}
    for file, case in cases.items():
        try:
            matches, error = replay(case, args.tolerance), None
        except (InputError, WorkError) as refusal:
            matches, error = [], str(refusal)
        except Exception as failure:  # of one case: the others are still replayed
            matches, error = [], describe_error(failure)
        holds = error is None and all(match.holds for match in matches)
        results[file] = {"key": case.key, "holds": holds, "error": error, "results": [asdict(each) for each in matches]}
    if args.json:
        emit(json.dumps(results, indent=1, ensure_ascii=False))
    else:
        _print(results)
    return int(not all(result["holds"] for result in results.values()))


def _print(results: dict[str, dict[str, Any]]) -> None:
    columns = ("result", "largest relative difference", "holds")
    for file, result in results.items():
        rows = [
            (match["name"], match["note"] or f"{match['difference']:.2e}", "yes" if match["holds"] else "NO")
            for match in result["results"]
        ]
        if rows:
            emit_table(file, columns, rows)
        bad = sum(not match["holds"] for match in result["results"])
        emit(f"{file}: {result['error'] or (f'{bad} of {len(rows)} differ' if bad else 'all agree')}")
