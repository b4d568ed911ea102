"""Pages made from the code: reference from `__all__`, commands from their parsers, papers from their claims.

`write_pages` runs at the start of every build, so that no list of names is kept by hand. Run as a program, this file
writes the table of papers into the README.
"""

import csv
import inspect
import os
import pkgutil
import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import saccade
from saccade.backbones import describe_model, list_models
from saccade.claims import Claim, Listing, Paper, list_papers, load_paper, show_value
from saccade.cli import COMMANDS, build_parser

__all__ = [
    "command_page",
    "fill_readme",
    "floors",
    "kernel_table",
    "network_table",
    "paper_pages",
    "reference_pages",
    "timed_networks",
    "write_pages",
]

ROOT = Path(__file__).parent.parent


def write_pages(folder: Path) -> None:
    """Write all generated pages into `folder`; those that have not changed stay as they are, so Sphinx skips them."""
    tables = {
        "parts/kernels.md": kernel_table(),
        "parts/networks.md": network_table(),
        "parts/networks_timed.md": timed_networks(),
    }
    wanted = {"parts/commands.md": command_page(), **tables, **reference_pages(), **paper_pages()}
    for old in folder.rglob("*.*"):
        if old.relative_to(folder).as_posix() not in wanted:
            old.unlink()
    for name, text in wanted.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def command_page() -> str:
    """Each command with its own help text."""
    os.environ["COLUMNS"] = "90"  # what fits the page
    parts = []
    for name, what in COMMANDS.items():
        text = re.sub(".\b", "", build_parser(name).format_help().strip())  # a letter and the backspace that hides it
        parts.append(f"(command-{name})=\n## saccade {name}\n\n{what}.\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


# The kernels


def kernel_table() -> str:
    """What `benchmarks/kernels.py` wrote on a GPU: for each pattern the speed-ups over dense attention."""
    parts = []
    for file in sorted((ROOT / "benchmarks" / "results").glob("kernels_*.csv")):
        with open(file, newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        names = [name for name in rows[0] if f"{name}, both" in rows[0] and not name.startswith("SDPA")]
        found = (
            (
                f"`{_bars(row['pattern'])}` on {row['map']}",
                f"{float(row['bound']):.2f}",
                *(_both(row, name) for name in names),
            )
            for row in rows
        )
        said = "speed-ups over torch's dense attention without a mask, forward / forward + backward"
        parts.append(f"{rows[0]['device']}, {rows[0]['dtype']}, {said}:\n\n")
        parts.append(_table(("pattern", "bound", *names), found))
    return "\n".join(parts) or "No table has been written yet.\n"


def _bars(text: str) -> str:
    """As code in a table, where a bar would end the cell."""
    return text.replace("|", "\\|")


def _both(row: Mapping[str, str], name: str) -> str:
    return f"{float(row[name]):.2f} / {float(row[f'{name}, both']):.2f}" if row[f"{name}, both"] else _plain(row[name])


# The networks


def network_table() -> str:
    """A row for each network: its size, and whether it compiles and exports, or why not."""
    rows = []
    found = {name: describe_model(name) for name in list_models()}
    for name, each in sorted(found.items(), key=lambda item: (item[1].family, item[1].params)):
        can = [_plain(each.refuses.get(what, "yes")) for what in ("compile", "export", "onnx")]
        rows.append((each.family, f"`{name}`", f"{each.params / 1e6:.2f} M", str(each.image_size), *can))
    head = ("family", "network", "parameters", "image size", "`torch.compile`", "`torch.export`", "ONNX")
    return _table(head, rows)


def timed_networks() -> str:
    """What `benchmarks/backbones.py` wrote: for each network how it compares with timm's."""
    file = ROOT / "benchmarks" / "results" / "backbones_cpu.csv"
    if not file.exists():
        return "No table has been written yet.\n"
    with open(file, newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    found = (
        (
            f"`{row['network']}`",
            f"{row['batch']} x {row['pixels']} px",
            row["clock"],
            *(_both(row, name) for name in ("speed-up", "memory")),
        )
        for row in rows
    )
    machine, threads, torches = (
        " or ".join(sorted({_plain(row[name]) for row in rows})) for name in ("machine", "threads", "torch")
    )
    said = f"{machine}; threads: {threads}; torch {torches}; fp32.\n\n"
    return said + _table(("network", "images", "clock", "times faster", "peak memory"), found)


# The reference


def floors() -> list[str]:
    """The floors of the package that exist, top first, as import-linter holds them."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        layers = tomllib.load(file)["tool"]["importlinter"]["contracts"][0]["layers"]
    names = [name for layer in layers for name in re.findall(r"[\w.]+", layer)]
    existing = {module.name for module in pkgutil.iter_modules(saccade.__path__, "saccade.")}
    return [name for name in names if name in existing]


def reference_pages() -> dict[str, str]:
    """A page a floor, and the tables of the floors and of the names on the front door."""
    pages = {f"reference/{floor}.rst": _floor_page(floor) for floor in floors()}
    rows = [(f"[{floor}](/generated/reference/{floor}.rst)", _summary(import_module(floor))) for floor in floors()]
    side_bar = _toctree({floor: f"/generated/reference/{floor}" for floor in floors()})
    pages["parts/floors.md"] = _table(("floor", "what it is"), rows) + side_bar
    pages["parts/front_door.md"] = _table(("name", "what it does", "where it is described"), _front_door())
    return pages


def _front_door() -> Iterable[tuple[str, ...]]:
    for name in saccade.__all__:
        found = getattr(saccade, name)
        if isinstance(found, ModuleType):  # saccade.explain is a package that can be called
            found = getattr(found, name)
        if callable(found):
            home = next(floor for floor in floors() if f"{found.__module__}.".startswith(f"{floor}."))
            yield f"`saccade.{name}`", _summary(found), f"{{py:obj}}`{home}.{name}`"


def _floor_page(floor: str) -> str:
    """All that `__all__` of a floor and of its packages names, with a section for each file."""
    module = import_module(floor)
    lines = [_title(floor, "="), f".. automodule:: {floor}", ""]
    described = {id(getattr(module, name)) for name in module.__all__}
    for package in [module, *_packages(module)]:
        files: dict[str, list[str]] = {}
        for name in package.__all__:
            if package is module or id(getattr(package, name)) not in described:
                files.setdefault(_file(package, name), []).append(name)
        if package is not module and files:
            lines += _section(package.__name__, floor)
        for file, names in sorted(files.items()):
            if file != package.__name__:
                lines += [*_section(file, floor)[:-1], "   :no-index:", ""]
            lines += [f".. currentmodule:: {package.__name__}", ""]
            lines += [line for name in names for line in _directive(name, getattr(package, name))]
    return "\n".join(lines)


def _section(module: str, floor: str) -> list[str]:
    return [_title(module.removeprefix(f"{floor}."), "-"), f".. automodule:: {module}", ""]


def _packages(module: ModuleType) -> list[ModuleType]:
    """The packages inside a floor that say what is public in them."""
    inside = pkgutil.iter_modules(getattr(module, "__path__", ()), f"{module.__name__}.")
    packages = [import_module(each.name) for each in inside if each.ispkg]
    return [package for package in packages if hasattr(package, "__all__")]


def _file(package: ModuleType, name: str) -> str:
    """The module in which a public name is defined; a constant does not know it, so the files are asked."""
    where = getattr(getattr(package, name), "__module__", None)
    if isinstance(where, str) and where.startswith("saccade"):
        return where
    for module in pkgutil.iter_modules(getattr(package, "__path__", ()), f"{package.__name__}."):
        private = module.ispkg or module.name.rsplit(".", 1)[1].startswith("_")
        if not private and name in getattr(import_module(module.name), "__all__", ()):
            return module.name
    return package.__name__


def _directive(name: str, member: Any) -> list[str]:
    """What has autodoc describe a public name."""
    if inspect.isclass(member):
        public = [base for base in member.__bases__ if not base.__name__.startswith("_")]
        telling = any(base.__module__.startswith(("saccade.", "torch.")) for base in public)
        return [f".. autoclass:: {name}", "   :members:", *["   :show-inheritance:"] * telling, ""]
    if callable(member):
        return [f".. autofunction:: {name}", ""]
    entries = f"   Has {', '.join(f'``{key}``' for key in member)}." if isinstance(member, Mapping) else ""
    return [f".. py:data:: {name}", "", entries, ""]


def _summary(member: Any) -> str:
    """The first paragraph of a docstring."""
    return _plain(" ".join(inspect.cleandoc(member.__doc__ or "").split("\n\n")[0].split()))


# The papers


def paper_pages() -> dict[str, str]:
    """A page for each paper that has a claims file, and the table of all papers."""
    claimed = _claimed()
    pages = {f"papers/{listing.key}.md": _paper_page(listing, paper) for listing, paper in claimed}
    linked = {listing.key: f"/generated/papers/{listing.key}" for listing, _ in claimed}
    rows = []
    for listing in sorted(list_papers(), key=lambda each: (each.key not in linked, each.key)):
        key = f"[{listing.key}]({linked[listing.key]}.md)" if listing.key in linked else _plain(listing.key)
        paper = f"{key}<br>{_plain(listing.title)} {_arxiv(listing)}"
        rows.append((paper, listing.published + _doubt(listing, "published"), listing.kind, listing.status))
    table = _table(("paper", "published", "kind", "state"), rows)
    pages["parts/papers.md"] = f"::::{{container}} papers\n{table}::::\n{_toctree(linked)}"
    return pages


def fill_readme(text: str) -> str:
    """The README with the papers that have claims between its markers, and the command that checks each."""
    rows = [
        (
            f"{_plain(paper.title)} ({_arxiv(listing)})",
            ", ".join(f"`{name}`" for name in paper.home),
            f"`saccade verify {listing.key}`",
            listing.status,
        )
        for listing, paper in _claimed()
    ]
    table = _table(("paper", "in saccade", "its claims", "state"), rows)
    between = r"(<!-- papers: [^>]*-->\n).*(<!-- /papers -->)"
    return re.sub(between, lambda found: f"{found[1]}\n{table}\n{found[2]}", text, flags=re.DOTALL)


def _claimed() -> list[tuple[Listing, Paper]]:
    return [(listing, load_paper(listing.key)) for listing in list_papers() if listing.status != "not yet"]


def _paper_page(listing: Listing, paper: Paper) -> str:
    """All about one paper: what it is, where it lives here, what it claims and how that is checked."""
    lists = {"What does not work yet": paper.missing, "What differs from the paper or its code": paper.differences}
    replay = " `saccade replay FILE.safetensors` compares with recorded outputs of its official code."
    parts = [
        f"# {listing.key}: {_plain(paper.title)}",
        f"{_arxiv(listing)}, {paper.published}. {_plain(paper.summary)}",
        f"In saccade: {', '.join(f'{{py:obj}}`{name}`' for name in paper.home)}.",
    ]
    for heading, items in lists.items():
        if items:
            parts += [f"## {heading}", "\n".join(f"- {_plain(item)}" for item in items)]
    parts += [
        "## What it claims",
        f"`saccade verify {listing.key}` measures each claim, prints the figure beside the published one, and exits "
        f"with 1 if one fails.{replay if paper.replay else ''}",
        _table(("claim", "published", "holds if", "source"), map(_claim_row, paper.claims)),
    ]
    return "\n\n".join(parts)


def _claim_row(claim: Claim) -> tuple[str, ...]:
    """What is said, the published figure, when ours agrees and why only then, where it is published."""
    said = f"**{_plain(claim.name)}** ({claim.kind}{', slow' if claim.slow else ''})<br>{_plain(claim.statement)}"
    holds = f"not measured here: needs {claim.needs}" if claim.needs else f"{claim.holds.words}: {claim.holds.reason}"
    return said, _plain(show_value(claim.published)), _plain(holds), _plain(claim.source)


def _arxiv(listing: Listing) -> str:
    if listing.arxiv is None:
        return "not on arXiv"
    return f"[arXiv:{listing.arxiv}](https://arxiv.org/abs/{listing.arxiv}){_doubt(listing, 'arxiv')}"


def _doubt(listing: Listing, field: str) -> str:
    return " (recalled)" if field in listing.uncertain else ""


# Markdown and reStructuredText


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _toctree(entries: Mapping[str, str]) -> str:
    """Pages for the side bar, under the names that stand there."""
    lines = "\n".join(f"{name} <{page}>" for name, page in entries.items())
    return f"\n:::{{toctree}}\n:hidden:\n\n{lines}\n:::\n"


def _plain(text: str) -> str:
    """Text in which no character means anything to a Markdown table, but for `code`; lines end as they do."""
    return re.sub(r"(`[^`]*`)|([|*_<\[\]])", lambda found: found[1] or f"\\{found[2]}", text).replace("\n", "<br>")


def _title(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n"


if __name__ == "__main__":
    README = ROOT / "README.md"
    README.write_text(fill_readme(README.read_text(encoding="utf-8")), encoding="utf-8")
