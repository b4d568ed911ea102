"""Docstrings of this project as reStructuredText: plain words, `names`, sections, lists and tables as we write them."""

import inspect
import re
from typing import Any

__all__ = ["add_private_bases", "restructure", "skip_tuple_fields"]


def restructure(app: Any, what: str, name: str, member: Any, options: Any, lines: list[str]) -> None:
    """Rewrite `lines`: one-line sections become fields, lists get their empty lines, Markdown tables list-tables."""
    out: list[str] = []
    state, bullet = "", -1  # "table" or "example" while inside one; indentation of the list that we are in, or -1
    for line in lines:
        indent = len(line) - len(line.lstrip())
        section = re.match(r"(Returns|Yields|Raises): (.+)", line)
        is_bullet = line.lstrip().startswith("- ")
        if not line.strip():
            state, bullet = "", -1
        elif line.lstrip().startswith(">>>") or state == "example":
            state = "example"
        elif line.startswith("|"):
            out += _table_row(line, first=state != "table")
            state = "table"
            continue
        else:
            line = _escape(f":{section[1].lower()}: {section[2]}" if section else line)
            if section or (is_bullet and bullet < 0) or (not is_bullet and indent <= bullet):
                out.append("")
                bullet = -1
            bullet = indent if is_bullet else bullet
        out.append(line)
    lines[:] = out


def add_private_bases(app: Any, what: str, name: str, member: Any, options: Any, lines: list[str]) -> None:
    """Options that a class takes from a private base have no page of their own: describe them with the class."""
    for base in member.__mro__[1:] if what == "class" else ():
        if base.__module__.startswith("saccade.") and base.__name__.startswith("_") and base.__doc__:
            lines += ["", *inspect.cleandoc(base.__doc__).splitlines(), ""]


def skip_tuple_fields(app: Any, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """A NamedTuple's fields are described in its docstring."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


def _escape(text: str) -> str:
    """Words outside of backticks, in which no character means anything to reStructuredText; `.grad` keeps its dot."""
    text = re.sub(r"(`+[^`]*`+)|([*|])|(?<=\w)_(?!\w)", lambda found: found[1] or f"\\{found[0]}", text)
    # span by span: what closes one must not open the next
    return re.sub(r"(`+)([^`]+)\1", lambda span: f"``{span[2]}``" if span[2][0] in ".~!" else span[0], text)


def _table_row(line: str, first: bool) -> list[str]:
    """A row of a Markdown table as one of a list-table."""
    head = ["", ".. list-table::", "   :header-rows: 1", ""] if first else []
    cells = [each.strip() for each in line.strip()[1:-1].split("|")]
    if all(set(each) <= {"-", ":"} for each in cells):
        return []
    return head + [f"   {' ' if i else '*'} - {each}" for i, each in enumerate(cells)]
