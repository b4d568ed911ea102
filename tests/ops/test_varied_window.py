"""resample_windows: interpolation of moved and stretched windows against the definition, special regions, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import resample_windows, resampling_weights


def make_inputs(windows=(2, 3), size=(4, 2), dim=3, seed=0):
    """A map, and moves and stretches that reach beyond it, in float64 and part of gradients."""
    rng = torch.Generator().manual_seed(seed)
    shapes = [(2, 2, windows[0] * size[0], windows[1] * size[1], dim), (2, 2, *windows, 2), (2, 2, *windows, 2)]
    return [(2 * torch.randn(shape, generator=rng, dtype=torch.float64)).requires_grad_() for shape in shapes]


def make_regions(windows, move=0.0, stretch=1.0):
    return [torch.full((2, 2, *windows, 2), value, dtype=torch.float64) for value in (move, stretch)]


sizes = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(windows=sizes, size=sizes, seed=st.integers(0, 2**32 - 1))
def test_sampled_equals_reference_in_value_and_gradient(windows, size, seed):
    inputs = make_inputs(windows, size, seed=seed)
    sampled, reference = (
        resample_windows(inputs[0], size, *inputs[1:], impl=impl) for impl in ("sampled", "reference")
    )
    assert_close(sampled, reference)
    upstream = torch.randn_like(reference)
    assert_close(*(torch.autograd.grad(out, inputs, upstream) for out in (sampled, reference)))


def test_a_point_is_interpolated_between_its_four_neighbours():
    x, move, stretch = make_inputs((2, 2), (4, 4))
    out = resample_windows(x, 4, move, stretch)
    image, head, row, column = 1, 0, 4 + 2, 1  # in window (1, 0), half a token below and left of its centre
    down, right = (move + stretch * torch.tensor([0.5, -0.5]))[image, head, 1, 0] + torch.tensor([5.5, 1.5])
    expected = torch.zeros(3, dtype=torch.float64)
    for i in range(8):
        for j in range(8):
            near = (1 - (down - i).abs()).clamp(min=0) * (1 - (right - j).abs()).clamp(min=0)
            expected = expected + near * x[image, head, i, j]
    assert_close(out[image, head, row, column], expected)


@pytest.mark.parametrize("impl", ["sampled", "reference"])
def test_a_window_that_stays_is_the_map_itself(impl):
    x = make_inputs((2, 3), (4, 2))[0]
    assert_close(resample_windows(x, (4, 2), *make_regions((2, 3)), impl=impl), x)


def test_a_whole_move_is_a_shift_with_zeros():
    x = make_inputs((2, 3), (4, 2))[0]
    move, stretch = make_regions((2, 3))
    move[..., 1] = 2.0
    shifted = torch.nn.functional.pad(x[:, :, :, 2:], (0, 0, 0, 2))
    assert_close(resample_windows(x, (4, 2), move, stretch), shifted)


def test_a_stretch_of_minus_one_mirrors_each_window_and_zero_takes_its_centre():
    x = make_inputs((1, 2), (3, 3))[0]
    by_window = x.unflatten(3, (2, 3))
    mirrored = resample_windows(x, 3, *make_regions((1, 2), stretch=-1.0))
    assert_close(mirrored.unflatten(3, (2, 3)), by_window.flip(2, 4))
    centre = resample_windows(x, 3, *make_regions((1, 2), stretch=0.0)).unflatten(3, (2, 3))
    assert_close(centre, by_window[:, :, 1:2, :, 1:2].expand_as(by_window))


@given(seed=st.integers(0, 2**32 - 1))
def test_weights_are_those_of_the_output_and_sum_to_one_inside_the_map(seed):
    x, move, stretch = make_inputs(seed=seed)
    weights = resampling_weights((8, 6), (4, 2), move, stretch)
    assert_close((weights @ x.flatten(2, 3)).view_as(x), resample_windows(x, (4, 2), move, stretch))
    sums = weights.sum(-1)
    assert (weights >= 0).all()
    assert (sums < 1 + 1e-9).all()
    inside = resampling_weights((8, 6), (4, 2), *make_regions((2, 3), stretch=0.3)).sum(-1)
    assert_close(inside, torch.ones_like(inside))


def test_half_precision_keeps_places_exact():
    x, move, stretch = (each.detach() for each in make_inputs((8, 8), (4, 4)))
    low = x.bfloat16()
    out = resample_windows(low, 4, move, stretch)
    assert out.dtype == torch.bfloat16
    full = resample_windows(low.double(), 4, move, stretch)
    assert (out - full).abs().max() < torch.finfo(torch.bfloat16).eps * full.abs().max()


def test_windows_that_do_not_divide_the_map():
    x, move, stretch = make_inputs()
    with pytest.raises(InputError, match=r"window_size is 5 and the map is \(8, 6\): windows must divide it. Pad"):
        resample_windows(x, 5, move, stretch)


@pytest.mark.parametrize("impl", ["sampled", "reference"])
def test_inputs_of_another_shape(impl):
    x, move, stretch = make_inputs()
    with pytest.raises(InputError, match=r"move is \(2, 2, 2, 2, 2\): give \(B, heads, 2, 3, 2\)"):
        resample_windows(x, (4, 2), move[:, :, :, :2], stretch, impl=impl)
    with pytest.raises(InputError, match=r"stretch is \(2, 2, 2, 3\): give"):
        resample_windows(x, (4, 2), move, stretch[..., 0], impl=impl)
    with pytest.raises(InputError, match=r"x is \(2, 2, 8, 6\): give \(B, heads, H, W, D\)"):
        resample_windows(x[..., 0], (4, 2), move, stretch, impl=impl)


def test_an_implementation_that_does_not_exist():
    with pytest.raises(InputError, match="impl is 'sample': did you mean sampled"):
        resample_windows(make_inputs()[0], (4, 2), *make_inputs()[1:], impl="sample")
