"""draw_pattern: the picture shows the mask, and what the chosen queries see."""

import numpy as np
import pytest
import torch

from saccade.errors import InputError
from saccade.ops import Causal, Neighborhood, PerHead, Sinks, SlidingWindow, Window, draw_pattern, select_top_k
from tests.ops.cases import CASES, IDS


def panels(figure):
    """What each panel shows, as it is drawn."""
    return [np.asarray(axis.images[0].get_array()) for axis in figure.axes]


@pytest.mark.parametrize(("pattern", "space"), CASES[::4], ids=IDS[::4])
def test_the_first_panel_is_the_mask(pattern, space):
    assert np.array_equal(panels(pattern.draw(space))[0], pattern.mask(space).numpy())


def test_queries_stand_where_they_are_and_show_what_they_see():
    figure = Neighborhood(3).draw((5, 6), queries=[(1, 2), 29])
    mask = Neighborhood(3).mask((5, 6)).view(30, 5, 6).numpy()
    assert all(np.array_equal(a, b) for a, b in zip(panels(figure)[1:], mask[[8, 29]]))
    frames = [axis.patches[0].get_xy() for axis in figure.axes[1:]]
    assert frames == [(1.5, 0.5), (4.5, 3.5)]
    assert "9 keys" in figure.axes[1].get_title()


def test_a_video_has_a_panel_a_frame():
    figure = Neighborhood((3, 3, 3)).draw((4, 3, 5))
    assert len(panels(figure)) == 1 + 4


def test_heads_and_selections_have_rows_of_their_own():
    per_head = PerHead([Window(2), Causal(), Window(2)])
    figure = per_head.draw((4,))
    assert [axis.get_title().splitlines()[0] for axis in figure.axes] == ["heads 0, 2: Window(2)", "heads 1: Causal()"]
    chosen = select_top_k(torch.randn(2, 3, 2, 2), 1, query_block=2, key_block=2)
    shown = panels(draw_pattern(chosen, (4,), image=1))
    assert all(np.array_equal(a, b) for a, b in zip(shown, chosen.mask((4,))[1].numpy()))


def test_titles_are_the_calls_that_make_the_patterns():
    pattern = (SlidingWindow(2, 2) | Sinks(1)) & Causal() & ~Window(2, ragged=True)
    assert str(pattern) == "(SlidingWindow(2, 2) | Sinks(1)) & Causal() & ~Window(2, ragged=True)"


def test_errors():
    with pytest.raises(InputError, match="8100 tokens: a picture shows up to 4096"):
        Causal().draw((90, 90))
    for query in (20, -1, (5, 0), (1,)):
        with pytest.raises(InputError, match=r"is not on the map \(4, 5\)"):
            Causal().draw((4, 5), queries=[query])
