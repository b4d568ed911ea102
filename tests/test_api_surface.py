"""The public names are those of api_surface.json: to change them is a decision, with a note for whoever upgrades."""

import json
from importlib import import_module
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("api_surface.json")
FLOORS = (
    "saccade",
    "saccade.errors",
    "saccade.registry",
    "saccade.ops",
    "saccade.taps",
    "saccade.gates",
    "saccade.mixers",
    "saccade.data",
    "saccade.measure",
    "saccade.training",
    "saccade.explain",
    "saccade.explain.concepts",
    "saccade.explain.dictionaries",
    "saccade.explain.heads",
    "saccade.explain.merging",
    "saccade.explain.pages",
    "saccade.explain.relevance",
    "saccade.explain.testing",
    "saccade.explain.visualization",
    "saccade.backbones",
    "saccade.claims",
    "saccade.study",
)
WHAT_TO_DO = """the public names of {floor} changed: new {new}, gone {gone}.
If that is meant: `python tests/test_api_surface.py` rewrites api_surface.json, and CHANGELOG.md tells whoever upgrades;
a name that is gone needs its successor named there. If not: keep the name out of `__all__`, or put it back."""


def public_names(floor):
    return sorted(import_module(floor).__all__)


@pytest.mark.parametrize("floor", FLOORS)
def test_public_names_are_the_recorded_ones(floor):
    recorded, current = json.loads(FILE.read_text())[floor], public_names(floor)
    new, gone = (sorted(set(a) - set(b)) for a, b in ((current, recorded), (recorded, current)))
    assert not new, WHAT_TO_DO.format(floor=floor, new=new, gone=gone)
    assert not gone, WHAT_TO_DO.format(floor=floor, new=new, gone=gone)


@pytest.mark.parametrize("floor", FLOORS)
def test_public_names_can_be_imported_and_say_what_they_are(floor):
    module = import_module(floor)
    assert module.__doc__
    for name in public_names(floor):
        value = getattr(module, name)
        assert isinstance(value, str) or value.__doc__, f"{floor}.{name} has no docstring"


if __name__ == "__main__":
    FILE.write_text(json.dumps({floor: public_names(floor) for floor in FLOORS}, indent=2) + "\n")
