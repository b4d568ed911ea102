"""dilated_windows against torch's unfold, on maps that windows cover and on those they do not; errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.ops import dilated_windows

counts = st.tuples(st.integers(1, 3), st.integers(1, 3))


def unfold(x, size, dilation):
    """(B, heads, windows, s * s, D) of a map that the windows cover."""
    extent = (size - 1) * dilation + 1
    maps = x.flatten(0, 1).permute(0, 3, 1, 2)
    columns = F.unfold(maps, size, dilation=dilation, stride=extent)
    return columns.unflatten(1, (x.shape[-1], -1)).permute(0, 3, 2, 1).unflatten(0, x.shape[:2])


@given(windows=counts, size=st.integers(1, 4), dilation=st.integers(1, 3))
def test_on_a_map_that_they_cover_they_are_unfolded(windows, size, dilation):
    extent = (size - 1) * dilation + 1
    x = torch.randn(2, 3, windows[0] * extent, windows[1] * extent, 2)
    assert torch.equal(dilated_windows(x, size, dilation), unfold(x, size, dilation))


@given(height=st.integers(5, 12), width=st.integers(5, 12), dilation=st.integers(1, 2))
def test_elsewhere_the_map_is_reflected_at_its_end(height, width, dilation):
    x = torch.randn(2, 3, height, width, 2)
    extent = 2 * dilation + 1
    pad = (0, -width % extent, 0, -height % extent)
    padded = F.pad(x.flatten(0, 1).permute(0, 3, 1, 2), pad, mode="reflect").permute(0, 2, 3, 1).unflatten(0, (2, 3))
    assert torch.equal(dilated_windows(x, 3, dilation), unfold(padded, 3, dilation))


def test_a_small_map_is_reflected_as_often_as_it_takes():
    rows = torch.arange(3.0).view(1, 1, 3, 1, 1)
    seen = dilated_windows(rows, 7)[0, 0, 0, ::7, 0]
    assert seen.tolist() == [0, 1, 2, 1, 0, 1, 2]


def test_gradients_go_back_to_the_tokens_as_often_as_they_are_seen():
    x = torch.zeros(1, 1, 3, 1, 1, requires_grad=True)
    (grad,) = torch.autograd.grad(dilated_windows(x, 7).sum(), x)
    assert_close(grad.flatten(), 7 * torch.tensor([2.0, 3.0, 2.0]))


def test_arguments_that_make_no_window():
    with pytest.raises(InputError, match="dilation is 0: give an integer of at least 1"):
        dilated_windows(torch.zeros(1, 1, 3, 3, 1), 2, 0)
    with pytest.raises(InputError, match=r"x is \(1, 3, 3, 1\): give \(B, heads, H, W, D\)"):
        dilated_windows(torch.zeros(1, 3, 3, 1), 2)
