"""The index of all papers, and which of them have a claims file: found by looking into the folder, listed nowhere."""

import json
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.resources import files
from pkgutil import iter_modules
from typing import Any

from saccade.claims.framework.claim import Claim, Outcome, Paper, check
from saccade.claims.framework.recorded import Case, Match, compare
from saccade.errors import InputError, nearest

__all__ = ["Listing", "claimed_keys", "list_papers", "load_paper", "replay", "verify"]

_PACKAGE = "saccade.claims"


@dataclass(frozen=True)
class Listing:
    """A paper in the list of all.

    Attributes:
        key, title, arxiv, published, kind: of the paper; its arXiv number may be unknown.
        uncertain: which of these nobody has looked up.
        status: "works", "partly" (the claims file names what is missing), or "not yet" (there is no claims file).
        missing: what does not work yet.
    """

    key: str
    title: str
    arxiv: str | None
    published: str
    kind: str
    uncertain: tuple[str, ...] = ()
    status: str = "not yet"
    missing: tuple[str, ...] = ()


def list_papers() -> list[Listing]:
    """List all papers by their keys, with what works of them."""
    claimed = claimed_keys()
    listings = []
    for row in _rows():
        listing = Listing(**row | {"uncertain": tuple(row.get("uncertain", ()))})
        if listing.key in claimed:
            missing = load_paper(listing.key).missing
            listing = replace(listing, status="partly" if missing else "works", missing=missing)
        listings.append(listing)
    return listings


def claimed_keys() -> list[str]:
    """Keys of the papers that have a claims file: the modules of the folder, without the framework's own folder."""
    return sorted(module.name for module in iter_modules(import_module(_PACKAGE).__path__) if not module.ispkg)


def load_paper(key: str) -> Paper:
    """Read the claims file of a paper.

    Raises: InputError if there is none yet, or no such paper.

    >>> load_paper("halonet").published
    '2021-03-23'
    """
    keys = claimed_keys()
    if key not in keys:
        known = [row["key"] for row in _rows()]
        if key in known:
            raise InputError(f"{key} has no claims file yet. Those that have: {', '.join(keys)}")
        raise InputError(f"there is no paper {key!r}: {nearest(key, known)}")
    module = import_module(f"{_PACKAGE}.{key}")
    claims = tuple(each for each in vars(module).values() if isinstance(each, Claim))
    paper: Paper = module.PAPER
    return replace(paper, key=key, claims=claims, replay=getattr(module, "replay", None))


def verify(key: str, *, fast: bool = False) -> list[Outcome]:
    """Check all claims of a paper, in the order of its file; with `fast`, without the slow ones."""
    return [check(claim, fast=fast) for claim in load_paper(key).claims]


def replay(case: Case, tolerance: float = 1e-4) -> list[Match]:
    """Run our module on a recorded case of official code, and compare every result.

    Args:
        case: from `read_case`.
        tolerance: largest relative difference that holds.

    Raises: InputError if the paper has no claims file or no replay, or the case needs what does not work yet.
    """
    paper = load_paper(case.key)
    if paper.replay is None:
        raise InputError(f"{case.key} has no replay: its mechanism has no official code. See `saccade verify`")
    return compare(case, paper.replay(case), tolerance)


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(files(_PACKAGE).joinpath("papers.json").read_text(encoding="utf-8"))
    return rows
