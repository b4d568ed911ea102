"""gumbel and straight_through: the distribution, values and gradients."""

import math

import pytest
import torch
from torch.testing import assert_close

from saccade.ops import gumbel, straight_through


def test_the_largest_of_noisy_logits_is_drawn_from_their_softmax():
    logits = torch.tensor([0.5, -1.0, 1.2], dtype=torch.float64)
    noise = gumbel(torch.rand(200_000, 3, dtype=torch.float64))
    drawn = torch.bincount((logits + noise).argmax(-1), minlength=3) / 200_000
    assert_close(drawn, logits.softmax(-1).float(), atol=5e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_finite_at_both_ends(dtype):
    low, high = gumbel(torch.tensor([0.0, 1.0], dtype=dtype)).tolist()
    assert low == pytest.approx(-math.log(-math.log(1e-8)), abs=1e-5)
    assert 15 < high < 50


def test_the_value_is_hard_and_the_gradient_soft():
    score = torch.randn(50, dtype=torch.float64, requires_grad=True)
    soft = score.sigmoid()
    hard = (soft > 0.5).double().requires_grad_()
    gate = straight_through(hard, soft)
    assert_close(gate, hard)
    upstream = torch.randn(50, dtype=torch.float64)
    assert torch.autograd.grad(gate, hard, upstream, allow_unused=True, retain_graph=True) == (None,)
    assert_close(
        torch.autograd.grad(gate, score, upstream, retain_graph=True), torch.autograd.grad(soft, score, upstream)
    )
