"""Occlusion against a loop by hand."""

import pytest
import torch
from torch.testing import assert_close

from saccade.explain import explain
from tests.explain.nets import ConvNet, images, linear


@pytest.mark.parametrize(("window", "stride", "batch_size"), [(3, 2, 32), (2, 2, 5), (8, 1, 1), (3, 3, 4)])
def test_each_pixel_gets_the_mean_fall_of_the_windows_on_it(window, stride, batch_size):
    model, x = ConvNet().eval(), images(2)
    found = explain(
        model, x, method="occlusion", target=1, window=window, stride=stride, filler=0.3, batch_size=batch_size
    ).map
    fall, times = torch.zeros(2, 8, 8), torch.zeros(8, 8)
    starts = [start for start in range(0, 8, stride) if start < 8 - window + stride]  # the last window may be cut
    for top in starts:
        for left in starts:
            hidden = x.clone()
            hidden[..., top : top + window, left : left + window] = 0.3
            drop = (model(x) - model(hidden))[:, 1].detach()
            fall[:, top : top + window, left : left + window] += drop[:, None, None]
            times[top : top + window, left : left + window] += 1
    assert_close(found, fall / times, rtol=1e-4, atol=1e-5)


def test_one_pixel_windows_on_a_linear_model_are_exact():
    model, x = linear(), images(2)
    found = explain(model, x, method="occlusion", target=0, window=1, stride=1).map
    assert_close(found, (model.weight[0] * x).sum(1).detach(), rtol=1e-4, atol=1e-4)
    assert_close(explain(model, x, method="occlusion", target=0).map, found)  # an eighth of 8 pixels is one
