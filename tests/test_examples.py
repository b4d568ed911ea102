"""Every example of the gallery runs to its end, which asserts what it teaches."""

import runpy
from pathlib import Path

import matplotlib
import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("plot_*.py"))
TRAINS = {"plot_explain_and_faithfulness", "plot_tap_attention"}  # for half a minute on a busy machine


@pytest.fixture(autouse=True)
def quiet_figures():
    matplotlib.use("Agg")
    yield
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize(
    "example", [pytest.param(e, id=e.stem, marks=[pytest.mark.slow] * (e.stem in TRAINS)) for e in EXAMPLES]
)
def test_example_shows_what_it_teaches(example):
    runpy.run_path(str(example), run_name="__main__")


def test_the_gallery_is_not_empty():
    assert len(EXAMPLES) >= 4
    assert {example.stem for example in EXAMPLES} >= TRAINS
