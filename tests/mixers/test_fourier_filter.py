"""FourierFilter: gains by frequency, steps, shifts and turns, maps of odd size."""

import pytest
import torch
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.mixers import FourierFilter


def make_filter(**options):
    layer = FourierFilter(3, out_proj=False, **options).double()
    torch.nn.init.normal_(layer.weight)
    return layer


@pytest.mark.parametrize("space", [(8, 6), (7, 9), (5, 1), (10,), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("bands", [1, 2, 5])
def test_waves_are_multiplied_by_the_gain_of_their_frequency(space, bands):
    layer = make_filter(num_bands=bands)
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in space), indexing="ij")
    for cycles in [(0,) * len(space), (1,) * len(space), tuple(n // 2 for n in space)]:
        frequency = [min(c, n - c) / n for c, n in zip(cycles, space)]
        radius = (sum(f**2 for f in frequency) / len(space)) ** 0.5 * 2 * (bands - 1)  # in bands
        low = min(int(radius), max(bands - 2, 0))
        weight = layer.weight[0, low] * (1 - radius + low)
        weight = weight + (layer.weight[0, low + 1] * (radius - low) if bands > 1 else 0)
        wave = torch.cos(2 * torch.pi * sum(c * p / n for c, p, n in zip(cycles, places, space)) + 0.3)
        x = wave[None, ..., None].expand(1, *space, 3)
        nyquist = all(2 * c % n == 0 for c, n in zip(cycles, space))
        assert nyquist or wave.abs().max() > 0.5
        assert_close(layer(x), x * (1 + weight))


def test_steps_follow_one_another():
    layer, x = make_filter(steps=3), torch.randn(2, 7, 6, 3, dtype=torch.float64)
    expected = x
    for weight in layer.weight:
        one = make_filter()
        one.weight.data = weight.unsqueeze(0)
        expected = one(expected)
    assert_close(layer(x), expected)


def test_it_commutes_with_shifts_and_quarter_turns():
    layer, x = make_filter(), torch.randn(2, 6, 6, 3, dtype=torch.float64)
    assert_close(layer(x.roll((1, 2), (1, 2))), layer(x).roll((1, 2), (1, 2)))
    assert_close(layer(x.rot90(1, (1, 2))), layer(x).rot90(1, (1, 2)))


def test_it_starts_as_the_identity():
    x = torch.randn(2, 5, 4, 3)
    assert_close(FourierFilter(3, steps=2, out_proj=False)(x), x)


def test_errors_say_what_to_do():
    for options in ({"steps": 0}, {"num_bands": 0}):
        with pytest.raises(InputError, match="give an integer of at least 1"):
            make_filter(**options)
