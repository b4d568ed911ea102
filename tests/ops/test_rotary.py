"""Rotary embedding: what it promises, errors."""

import pytest
import torch
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import rotary_angles, rotate


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_products_depend_on_relative_places_alone(axes):
    query, key = torch.randn(2, 1, 12, dtype=torch.float64)
    places = torch.randint(20, (axes, 2)).double()
    shift = torch.randint(20, (axes, 1))

    def product(places):
        turned = [rotary_angles(places[:, n : n + 1], 12, base=50.0) for n in range(2)]
        return (rotate(query, turned[0].cos(), turned[0].sin()) * rotate(key, turned[1].cos(), turned[1].sin())).sum()

    assert_close(product(places + shift), product(places))
    if (places[:, 0] != places[:, 1]).any():
        assert (product(places) - (query * key).sum()).abs() > 1e-6


def test_lengths_stay_and_the_first_pair_turns_by_a_radian_a_step():
    x = torch.randn(5, 8, dtype=torch.float64)
    angles = rotary_angles(torch.arange(5.0, dtype=torch.float64)[None], 8)
    turned = rotate(x, angles.cos(), angles.sin())
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    first = torch.complex(turned[:, 0], turned[:, 4]) / torch.complex(x[:, 0], x[:, 4])
    assert_close(first.angle(), torch.tensor([0, 1, 2, 3, 4 - 2 * torch.pi], dtype=torch.float64))


def test_error_says_what_to_do():
    with pytest.raises(InputError, match=r"dim is 6 and places has 2 axes: .* Give a multiple of 4"):
        rotary_angles(torch.zeros(2, 5), 6)
