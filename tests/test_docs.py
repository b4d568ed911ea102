"""The documentation says what is there: a page for each name, command and paper; its code and its commands run."""

import pkgutil
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import saccade
from docs import docstrings, pages
from saccade.claims import list_papers, load_paper
from saccade.cli import COMMANDS, build_parser

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXTS = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "howto").glob("*.md"))]
every_text = pytest.mark.parametrize("text", TEXTS, ids=[str(text.relative_to(ROOT)) for text in TEXTS])


def blocks(text, language):
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


# The reference


def test_every_module_of_the_package_is_on_a_floor():
    modules = {module.name for module in pkgutil.iter_modules(saccade.__path__, "saccade.")}
    assert set(pages.floors()) == modules - {"saccade.timm"}  # a door for users of timm, imported where timm is


@pytest.mark.parametrize("floor", pages.floors())
def test_every_public_name_is_described_under_its_own_name(floor):
    page, home, described = pages.reference_pages()[f"reference/{floor}.rst"], "", set()
    for line in page.splitlines():
        if line.startswith(".. currentmodule:: "):
            home = line.split(":: ")[1]
        elif found := re.match(r"\.\. (autoclass|autofunction|py:data):: (\w+)", line):
            described.add(f"{home}.{found[2]}")
    assert {f"{floor}.{name}" for name in import_module(floor).__all__} <= described


def test_every_name_on_the_front_door_leads_to_a_description():
    table = pages.reference_pages()["parts/front_door.md"]
    links = dict(re.findall(r"^\| `saccade\.(\w+)` .* \{py:obj\}`([\w.]+)` \|$", table, re.MULTILINE))
    assert set(links) == set(saccade.__all__) - {"__version__"}
    for name, target in links.items():
        floor = target.rsplit(".", 1)[0]
        assert floor in pages.floors()
        assert name in import_module(floor).__all__


def test_docstrings_become_restructured_text():
    lines = """Average (B, *space, C) over `keys | values`, not `.grad`.

    | `impl` | cost |
    |--------|------|
    | `auto` |      |

    Args:
        source: one of
            - "a":
              first;
            - "b".
            And more.

    Returns: floats
        and more.

    >>> 2 * 3 | 0
    6""".splitlines()
    lines = [lines[0], *(line.removeprefix("    ") for line in lines[1:])]
    docstrings.restructure(None, "function", "average", None, None, lines)
    assert lines == [
        r"Average (B, \*space, C) over `keys | values`, not ``.grad``.",
        "",
        "",
        ".. list-table::",
        "   :header-rows: 1",
        "",
        "   * - `impl`",
        "     - cost",
        "   * - `auto`",
        "     - ",
        "",
        "Args:",
        "    source: one of",
        "",
        '        - "a":',
        "          first;",
        '        - "b".',
        "",
        "        And more.",
        "",
        "",
        ":returns: floats",
        "    and more.",
        "",
        ">>> 2 * 3 | 0",
        "6",
    ]


# Commands and papers


def test_every_command_has_its_help_on_the_page():
    page = pages.command_page()
    for name in COMMANDS:
        assert f"(command-{name})=\n## saccade {name}\n" in page
        assert f"usage: saccade {name} " in page
    assert "\b" not in page


def test_every_paper_is_listed_and_those_with_claims_have_a_page_with_all_of_them():
    made, listings = pages.paper_pages(), list_papers()
    for listing in listings:
        assert f"abs/{listing.arxiv})" in made["parts/papers.md"] or listing.arxiv is None
        if listing.status == "not yet":
            assert f"papers/{listing.key}.md" not in made
            continue
        assert f"/generated/papers/{listing.key}.md" in made["parts/papers.md"]
        for claim in load_paper(listing.key).claims:
            assert f"| **{claim.name}** (" in made[f"papers/{listing.key}.md"]
    assert made["parts/papers.md"].count("<br>") == len(listings)


def test_timed_networks_stand_with_their_machine_and_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert "No table" in pages.timed_networks()
    row = {
        "network": "davit_tiny",
        "pixels": 448,
        "batch": 1,
        "threads": 2,
        "torch": "2.13",
        "machine": "Xeon_X, 2 cores",
    }
    ratios = {"speed-up": "1.052", "speed-up, both": "1.153", "memory": "0.857", "memory, both": "0.974"}
    row |= {"clock": "processor"} | ratios
    file = tmp_path / "benchmarks" / "results" / "backbones_cpu.csv"
    file.parent.mkdir(parents=True)
    file.write_text(
        ",".join(f'"{name}"' for name in row) + "\n" + ",".join(f'"{value}"' for value in row.values()) + "\n"
    )
    table = pages.timed_networks()
    assert table.startswith("Xeon\\_X, 2 cores; threads: 2; torch 2.13; fp32.")
    assert "| `davit_tiny` | 1 x 448 px | processor | 1.05 / 1.15 | 0.86 / 0.97 |" in table


def test_text_in_a_table_keeps_its_characters():
    assert pages._plain("a|b *c* `d|e*`\nf_g") == r"a\|b \*c\* `d|e*`<br>f\_g"


def test_pages_that_are_no_longer_made_go_away_and_others_are_left_alone(tmp_path):
    pages.write_pages(tmp_path)
    old, same = tmp_path / "papers" / "old.md", tmp_path / "parts" / "commands.md"
    old.write_text("# old")
    before = same.stat().st_mtime_ns
    pages.write_pages(tmp_path)
    assert not old.exists()
    assert same.stat().st_mtime_ns == before


# Code and commands in texts

SLOW = {"study.md"}  # its code runs a study


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, id=text.name, marks=[pytest.mark.slow] * (text.name in SLOW))
        for text in TEXTS
        if blocks(text, "python")
    ],
)
def test_python_in_texts_runs(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks(text, "python")), str(text), "exec"), {"__name__": "example"})


@every_text
def test_commands_in_texts_can_be_called(text):
    for line in "".join(blocks(text, "bash")).splitlines():
        program, *words = shlex.split(line, comments=True) or [""]
        if program == "saccade":
            build_parser(words[0]).parse_args(words[1:])
        elif program == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(words) <= set(targets)


@every_text
def test_commands_named_in_words_exist(text):
    named = re.findall(r"`saccade ([a-z]+)", text.read_text(encoding="utf-8"))
    assert set(named) <= set(COMMANDS)


def test_the_readme_has_the_table_of_papers_as_it_is():
    text = README.read_text(encoding="utf-8")
    assert "<!-- papers: " in text
    assert pages.fill_readme(text) == text, "run: python docs/pages.py"
