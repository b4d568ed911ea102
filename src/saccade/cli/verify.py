"""`saccade verify`: the claims of papers, published beside measured."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from saccade.cli.shared import add_json, emit

EXAMPLE = "saccade verify halonet --fast"


def arguments(parser: Any) -> None:
    parser.add_argument("papers", nargs="*", default=[], metavar="KEY", help="papers, by the keys of `saccade papers`")
    parser.add_argument("--all", action="store_true", help="every paper that has a claims file")
    parser.add_argument("--fast", action="store_true", help="leave out claims that take more than a few seconds")
    add_json(parser)


def run(args: Any) -> int:
    from rich.console import Console

    from saccade.claims import check, claimed_keys, load_paper
    from saccade.errors import InputError

    keys = claimed_keys() if args.all else args.papers
    if not keys:
        raise InputError("no paper is named: give keys of papers (`saccade papers` lists them), or --all")
    results = []
    progress = Console(stderr=True)
    for paper in [load_paper(key) for key in keys]:  # a wrong key is told before the work
        outcomes = []
        for claim in paper.claims:
            with progress.status(f"{paper.key}: {claim.name}"):
                outcomes.append(check(claim, fast=args.fast))
        results.append((paper, outcomes))
        if not args.json:
            _print(paper, outcomes)
    if args.json:
        emit(json.dumps([_as_dict(paper, outcomes) for paper, outcomes in results], indent=1, ensure_ascii=False))
    return int(any(outcome.verdict == "fails" for _, outcomes in results for outcome in outcomes))


def _as_dict(paper: Any, outcomes: Sequence[Any]) -> dict[str, Any]:
    about = ("key", "title", "arxiv", "published", "summary", "home", "missing", "differences")
    return {name: getattr(paper, name) for name in about} | {"claims": [outcome.as_dict() for outcome in outcomes]}


def _print(paper: Any, outcomes: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from saccade.claims import show_value

    colours = {"holds": "green", "fails": "bold red", "needs": "yellow"}
    table = Table(title=f"{paper.key}: {paper.title} ({paper.published})", show_lines=True, expand=True)
    for name, ratio in (("claim", 2), ("published", 1), ("measured", 1)):
        table.add_column(name, ratio=ratio, overflow="fold")
    table.add_column("verdict", no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    for outcome in outcomes:
        claim, verdict = outcome.claim, outcome.verdict
        measured = [] if outcome.measured is None else [show_value(outcome.measured)]
        if measured and claim.holds.words != "equal":
            measured.append(f"({claim.holds.words})")
        table.add_row(
            Text(claim.statement),
            Text(show_value(claim.published)),
            Text("\n".join([*measured, outcome.note]).strip()),
            Text(verdict, colours[verdict]),
            f"{outcome.seconds:.1f}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    hold, fail, need = (sum(outcome.verdict == verdict for outcome in outcomes) for verdict in colours)
    emit(f"{paper.key}: {hold} hold, {fail} fail, {need} need what is not here")
    for line in (*(f"without {part}" for part in paper.missing), *paper.differences):
        emit(f"- {line}")
