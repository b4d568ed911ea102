"""COMET: its fast claims, and canvases that hold what they say."""

import torch

from saccade.claims import verify
from saccade.claims.comet_attribution import _paste_twice


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("comet_attribution", fast=True) if o.verdict == "fails"] == []


def test_canvases_hold_a_digit_twice():
    torch.manual_seed(0)
    digits = torch.full((2, 1, 8, 8), -1.0)
    digits[0, 0, 2:5, 3] = 0.9
    digits[1, 0, 1, 1:7] = 0.7
    images, labels, pixels = _paste_twice(digits, torch.tensor([4, 7]), 40)
    assert set(labels.tolist()) == {4, 7}
    assert pixels.sum((2, 3)).tolist() == [[3, 3] if label == 4 else [6, 6] for label in labels]
    assert not pixels.all(1).any()
    assert torch.equal(images[:, 0] > 0.15, pixels.any(1))
