"""Augment and normalize: randomness that repeats, changes that stay within their bounds."""

import pytest
import torch
from torch.testing import assert_close

from saccade.data import Augment, normalize
from saccade.data.augment import LEVELS
from saccade.errors import InputError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def make_images(batch=6, size=17, seed=0):
    """Smooth, so that interpolation costs little."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (batch, 3, 4, 4), generator=rng).float()
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear").to(torch.uint8)


def test_normalize_gives_zero_mean_and_unit_variance():
    images = make_images(50)
    floats = images.double() / 255
    mean, std = floats.mean((0, 2, 3)), floats.std((0, 2, 3))
    out = normalize(images, mean.tolist(), std.tolist())
    assert out.dtype == torch.float32
    assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert_close(out.std((0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)
    assert_close(normalize(images[0], mean.tolist(), std.tolist()), out[0])


def test_normalize_refuses_floats():
    with pytest.raises(InputError, match=r"images are torch.float32: give uint8"):
        normalize(torch.zeros(1, 3, 4, 4), MEAN, STD)


@pytest.mark.parametrize("level", LEVELS)
def test_the_global_seed_repeats_it_and_nothing_else_counts(level):
    images = make_images() / 255
    augment = Augment(level, 17)
    outs = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        outs.append((augment(images), augment(images)))
    torch.manual_seed(0)
    outs.append((Augment(level, 17)(images), None))
    assert outs[0][0].shape == images.shape
    assert torch.equal(outs[0][0], outs[2][0])
    assert torch.equal(outs[0][1], outs[2][1])
    assert torch.equal(outs[0][0], outs[3][0])
    if level != "none":
        assert not torch.equal(outs[0][0], outs[1][0])
        assert not torch.equal(outs[0][0], outs[0][1])


@pytest.mark.parametrize("level", LEVELS)
def test_images_stay_as_they_are_in_evaluation_and_the_input_always(level):
    images = make_images() / 255
    before = images.clone()
    augment = Augment(level, 17)
    augment(images)
    assert torch.equal(images, before)
    assert augment.eval()(images) is images
    assert not augment.state_dict()  # it travels with a model without leaving a trace in its checkpoint


@pytest.mark.parametrize("level", ["light", "standard"])
def test_images_of_a_batch_change_each_their_own_way(level):
    images = (make_images(1) / 255).expand(8, -1, -1, -1)
    outs = Augment(level, 17)(images)
    assert not any(torch.equal(outs[0], other) for other in outs[1:])


@pytest.mark.parametrize("level", ["light", "standard"])
def test_normalised_batches_get_what_plain_ones_get(level):
    images = make_images()
    outs = []
    for mean, std in (((0.0,) * 3, (1.0,) * 3), (MEAN, STD)):
        augment = Augment(level, 17, mean=mean, std=std)
        torch.manual_seed(3)
        augment.erase.p = 0.0
        outs.append(augment(normalize(images, mean, std)) * augment.std + augment.mean)
    assert_close(outs[0], outs[1], atol=1e-5, rtol=0)
    assert outs[0].min() >= -1e-6
    assert outs[0].max() <= 1 + 1e-6


def test_light_moves_and_turns_a_little_and_never_mirrors():
    size = 33
    images = torch.zeros(200, 3, size, size)
    images[:, :, 8:11, 8:11] = 1.0  # a dot in the upper left
    torch.manual_seed(0)
    outs = Augment("light", size)(images)[:, 0]
    where = torch.stack([(outs.sum(axis) * torch.arange(size)).sum(-1) / outs.sum((1, 2)) for axis in (2, 1)], -1)
    assert where.shape == (200, 2)
    moved = (where - 9).abs()
    assert moved.max() < 0.08 * size + 0.1 * 10 + 10 * 0.15 + 0.5  # shift, scale, turn, interpolation
    assert moved.mean() > 1


def test_standard_mirrors_half_of_the_images_and_erases_some_to_zero():
    size = 32
    images = torch.linspace(0.25, 0.75, size).expand(400, 3, size, size)  # brighter to the right
    torch.manual_seed(0)
    outs = Augment("standard", size)(images)
    erased = (outs == 0).all(1).flatten(1).any(1)
    assert 0.15 < erased.float().mean() < 0.35
    mirrored = (outs[~erased, 0, :, 0] > outs[~erased, 0, :, -1]).all(-1)
    assert 0.4 < mirrored.float().mean() < 0.6


def test_unknown_levels_are_answered_with_the_nearest():
    with pytest.raises(InputError, match="level is 'lite': did you mean light"):
        Augment("lite", 32)
