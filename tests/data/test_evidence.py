"""known_evidence: the class changes the masked pixels and no others, signs lie where masks say, then errors."""

import pytest
import torch
from torch.testing import assert_close

from saccade.data import evidence, known_evidence
from saccade.errors import InputError


@pytest.mark.parametrize("image_size", [18, 32, 51])
def test_shapes_kinds_and_turns(image_size):
    found = known_evidence(9, image_size=image_size)
    assert found.images.shape == (9, 3, image_size, image_size)
    assert found.images.dtype == torch.uint8
    assert found.masks.shape == (9, image_size, image_size)
    assert found.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]


@pytest.mark.parametrize("image_size", [18, 32, 48])  # at 48 the signs have pixels in common
def test_another_class_changes_the_masked_pixels_and_no_others(image_size, monkeypatch):
    first = known_evidence(12, image_size=image_size, seed=3)
    changed = torch.zeros_like(first.masks)
    names = list(evidence._SIGNS)
    for turn in range(1, 4):
        turned = {name: evidence._SIGNS[name] for name in names[turn:] + names[:turn]}
        monkeypatch.setattr(evidence, "_SIGNS", turned)
        other = known_evidence(12, image_size=image_size, seed=3)
        changed |= (other.images != first.images).any(1)
        monkeypatch.undo()
        assert_close(other.masks, first.masks)
    assert not (changed & ~first.masks).any()
    assert (changed & first.masks).sum() > 0.99 * first.masks.sum()  # a colour may equal the ground by chance


def test_the_seed_decides():
    first, again, other = (known_evidence(5, seed=seed).images for seed in (1, 1, 2))
    assert_close(first, again, rtol=0, atol=0)
    assert (first != other).any()


def test_classes_differ_and_none_is_brighter_by_design():
    found = known_evidence(4)
    signs = evidence._draw_signs(8)
    assert len({tuple(sign.flatten().tolist()) for sign in signs}) == 4
    assert (found.masks.double().mean((1, 2)) > 0.02).all()
    assert (found.masks.double().mean((1, 2)) < 0.07).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"count": 0}, "count is 0"), ({"count": 2.0}, "count is 2.0"), ({"count": 1, "image_size": 17}, "18 or more")],
)
def test_wrong_calls_say_what_to_do(options, message):
    with pytest.raises(InputError, match=message):
        known_evidence(**options)
