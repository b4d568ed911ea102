"""digits and textures: the real images that need no download."""

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from saccade.data import load_images
from saccade.errors import InputError


def boxes(part):
    """Photo, top, bottom, left, right of each patch, as its name says."""
    parsed = [re.fullmatch(r"(\w+)\[(\d+):(\d+), (\d+):(\d+)\]", name).groups() for name in part.names]
    return [(photo, *map(int, sides)) for photo, *sides in parsed]


@pytest.fixture(scope="module")
def digits():
    return load_images("digits")


@pytest.fixture(scope="module")
def textures():
    return load_images("textures")


def test_digits_are_scikit_learns_split_class_by_class():
    from sklearn.datasets import load_digits

    raw = load_digits()
    data = load_images("digits", image_size=8)
    assert data.classes == tuple("0123456789")
    counts = [torch.bincount(part.labels, minlength=10) for part in (data.train, data.val)]
    assert sum(counts).tolist() == np.bincount(raw.target).tolist()
    assert ((counts[1] / sum(counts) - 0.2).abs() < 0.005).all()
    for index in (0, 100, 1000):
        image, label = data.train[index]
        source = int(data.train.names[index].removeprefix("digits[").removesuffix("]"))
        assert label == raw.target[source]
        assert np.abs(image.numpy() - raw.images[source] * 255 / 16).max() <= 0.5


def test_bundled_sets_have_default_sizes_and_repeat(digits, textures):
    assert digits.train[0][0].shape == (3, 32, 32)
    assert textures.train[0][0].shape == (3, 64, 64)
    assert (len(textures.train), len(textures.val)) == (2232, 144)
    assert load_images("digits").fingerprint == digits.fingerprint
    assert load_images("digits", seed=1).fingerprint != digits.fingerprint


@pytest.mark.parametrize("val_fraction", [0.2, 0.37])
def test_textures_share_no_pixel_between_training_and_validation(val_fraction):
    data = load_images("textures", image_size=32, val_fraction=val_fraction)
    used = {photo: np.zeros((2, 512, 512), int) for photo in data.classes}
    for index, part in enumerate((data.train, data.val)):
        for photo, top, bottom, left, right in boxes(part):
            used[photo][index, top:bottom, left:right] += 1
    for times in used.values():
        assert not ((times[0] > 0) & (times[1] > 0)).any()
        assert times[1].max() == 1
        assert abs((times[1] > 0).mean() - val_fraction) < 0.07


def test_texture_patches_are_cut_from_the_photo_and_enlarged_bicubically(textures):
    from skimage import data as photos

    for part in (textures.train, textures.val):
        for index in range(0, len(part), 100):
            photo, top, bottom, left, right = boxes(part)[index]
            image, label = part[index]
            patch = Image.fromarray(getattr(photos, photo)()[top:bottom, left:right])
            assert textures.classes[label] == photo
            assert (image.numpy() == np.asarray(patch.resize((64, 64), Image.Resampling.BICUBIC))).all()


def test_textures_without_scikit_image_say_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(InputError, match=r"pip install 'saccade\[demo\]'"):
        load_images("textures")


@pytest.mark.parametrize("val_fraction", [0.01, 0.99])
def test_textures_refuse_parts_narrower_than_a_patch(val_fraction):
    with pytest.raises(InputError, match=r"Give a fraction from 0\.062 to 0\.938"):
        load_images("textures", val_fraction=val_fraction)
