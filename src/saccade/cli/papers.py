"""`saccade papers`: the papers whose systems belong here, and what works of each."""

import json
from typing import Any

from saccade.cli.shared import add_json, emit, emit_table

EXAMPLE = "saccade papers --status partly"


def arguments(parser: Any) -> None:
    parser.add_argument("--status", choices=("works", "partly", "not-yet"), help="only the papers with this status")
    add_json(parser)


def run(args: Any) -> int:
    from dataclasses import asdict

    from saccade.claims import list_papers

    every = list_papers()
    papers = [paper for paper in every if args.status in (None, paper.status.replace(" ", "-"))]
    if args.json:
        emit(json.dumps([asdict(paper) for paper in papers], indent=1, ensure_ascii=False))
        return 0
    columns = ("key", "paper", "arXiv", "published", "kind", "status")
    emit_table(f"{len(papers)} of {len(every)} papers", columns, map(_row, papers))
    for paper in papers:
        for part in paper.missing:
            emit(f"{paper.key} is still without {part}")
    if any(paper.uncertain for paper in papers):
        emit("? recalled, not looked up")
    return 0


def _row(paper: Any) -> tuple[str, ...]:
    arxiv, published = (
        f"{getattr(paper, name) or '-'}{'?' if name in paper.uncertain else ''}" for name in ("arxiv", "published")
    )
    return paper.key, paper.title, arxiv, published, paper.kind, paper.status
