"""localization: counts by hand, chance is the mask's area, the oracle is perfect, then errors."""

import pytest
import torch

from saccade.errors import InputError
from saccade.explain import explain, localization
from tests.explain.nets import Linear, images


def masks(batch=3, height=8, width=6):
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    mask[:, 2:5, 1:4] = True  # 9 of 48
    return mask


def test_counts_by_hand():
    map = torch.full((1, 8, 6), -1.0)
    map[0, 2, 1], map[0, 4, 3], map[0, 0, 0], map[0, 7, 5] = 3.0, 1.0, 5.0, 0.5
    found = localization(map, masks(1))
    assert found.mass.value == pytest.approx(4 / 9.5)
    assert found.pointing.value == 0
    assert found.area == pytest.approx(9 / 48)
    map[0, 0, 0] = 3.0
    assert localization(map, masks(1)).pointing.value == 0.5  # two share the place
    ordered = torch.arange(48.0).view(1, 8, 6)  # the last 9 pixels: the mask has none of them
    assert localization(ordered, masks(1)).top.value == 0
    assert localization(-(ordered - 21).abs(), masks(1)).top.value == pytest.approx(4 / 9)  # 19, 20, 21 and 25


def test_chance_is_the_area_and_the_oracle_is_perfect():
    found = localization(images(16, 1, 8, 6)[:, 0], masks(16), repeats=200)
    for score in (found.mass, found.pointing, found.top):
        assert score.random == pytest.approx(found.area, abs=0.02)
        assert score.oracle == 1
        assert score.low <= score.value <= score.high
    constant = localization(torch.ones(16, 8, 6), masks(16))
    assert constant.mass.value == constant.pointing.value == pytest.approx(found.area)
    assert localization(-torch.ones(1, 8, 6), masks(1)).mass.value == pytest.approx(found.area)


def test_the_evidence_of_a_linear_model_is_found():
    weight = torch.zeros(2, 3, 8, 6)
    weight[0] = masks(1).float()
    found = localization(explain(Linear(weight), images(3, 3, 8, 6), method="gradient", target=0), masks())
    assert found.mass.value == found.top.value == found.pointing.value == 1
    assert found.mass.difference_low > 0


@pytest.mark.parametrize(
    ("map", "mask", "message"),
    [
        (torch.zeros(3, 8, 6), masks().float(), r"torch.float32 of shape \(3, 8, 6\): give booleans"),
        (torch.zeros(3, 8, 7), masks(), r"the map is \(3, 8, 7\) but the masks are \(3, 8, 6\)"),
        (torch.full((3, 8, 6), float("nan")), masks(), "one finite value"),
        (torch.zeros(3, 8, 6), torch.ones(3, 8, 6).bool(), "covers nothing, or the whole image"),
    ],
)
def test_wrong_calls_say_what_to_do(map, mask, message):
    with pytest.raises(InputError, match=message):
        localization(map, mask)
