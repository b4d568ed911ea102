"""Multifaceted feature visualization: its fast claims, and what its schedules are."""

from saccade.claims import verify
from saccade.explain.visualization import CENTRE_BIAS, MEAN_IMAGE


def test_fast_claims_hold():
    assert [o.claim.name for o in verify("multifaceted", fast=True) if o.verdict == "fails"] == []


def test_published_schedules():
    rows = [(o.reading, o.scale, o.iterations, o.step, o.weight, o.window, round(o.margin * 227)) for o in MEAN_IMAGE]
    assert rows == [
        ("logit", 1.0, 190, (1, 2), (0.4, 0.4), 0.3, 0),
        ("logit", 1.2, 150, (1, 1), (0.01, 2), 0.3, 0),
        ("logit", 1.0, 20, (2, 2), (0.1, 2), 0.2, 50),
        ("logit", 1.0, 10, (2, 2), (0.4, 2), 0.3, 0),
    ]
    rows = [(o.reading, o.scale, o.iterations, o.step, o.weight, o.window, round(o.margin * 227)) for o in CENTRE_BIAS]
    assert rows == [
        ("probability", 1.0, 190, (11, 11), (0.001, 0.05), 0.3, 0),
        ("probability", 1.2, 150, (6, 6), (0.01, 0.08), 0.3, 0),
        ("logit", 1.2, 150, (1, 1), (0.01, 2), 0.3, 0),
        ("logit", 1.0, 30, (3, 3), (0.1, 2), 0.1, 50),
        ("logit", 1.0, 10, (6, 3), (0.01, 2), 0.3, 0),
    ]
