"""The real images that come with scikit-learn and scikit-image, so that nothing needs a download."""

from itertools import product

import numpy as np
from PIL import Image

from saccade.data.images import Collection, Entry
from saccade.errors import InputError

__all__ = ["BUNDLED"]

_PHOTOS = ("brick", "grass", "gravel")
_PATCH = 32  # pixels of the photo: of larger ones validation would have too few, and every network gets them right
_TRAIN_STRIDE = 16


def _collect_digits(val_fraction: float) -> Collection:
    """scikit-learn's 1797 handwritten digits: 8 x 8 grey from 0 to 16, enlarged like any image (bicubic)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    entries = [
        Entry(f"digits[{index}]", int(label), Image.fromarray(image))
        for index, (image, label) in enumerate(zip(pixels, digits.target))
    ]
    return Collection("digits", tuple(str(name) for name in digits.target_names), entries, image_size=32)


def _collect_textures(val_fraction: float) -> Collection:
    """Patches of three 512 x 512 photos: the left of each trains, the right validates, and no patch crosses between.

    An entry's name is its box, "brick[top:bottom, left:right]". Training patches overlap, which costs nothing and
    shows more shifts; validation patches do not, so that each is evidence of its own.
    """
    try:
        from skimage import data
    except ImportError as error:
        raise InputError(
            "the textures are photos of scikit-image, which is not installed: pip install 'saccade[demo]', "
            "or use 'digits', which needs nothing more"
        ) from error

    entries = []
    for label, name in enumerate(_PHOTOS):
        photo = Image.fromarray(getattr(data, name)())
        border = round(photo.width * (1 - val_fraction))
        if not _PATCH <= border <= photo.width - _PATCH:
            raise InputError(
                f"val_fraction is {val_fraction}: each part needs {_PATCH} or more of a photo's {photo.width} columns. "
                f"Give a fraction from {_PATCH / photo.width:.3f} to {1 - _PATCH / photo.width:.3f}"
            )
        for part, first, last, stride in (
            ("train", 0, border, _TRAIN_STRIDE),
            ("val", border, photo.width, _PATCH),
        ):
            tops, lefts = range(0, photo.height - _PATCH + 1, stride), range(first, last - _PATCH + 1, stride)
            for top, left in product(tops, lefts):
                box = (left, top, left + _PATCH, top + _PATCH)
                place = f"{name}[{top}:{top + _PATCH}, {left}:{left + _PATCH}]"
                entries.append(Entry(place, label, photo.crop(box), part))
    return Collection("textures", _PHOTOS, entries, image_size=64)


BUNDLED = {"digits": _collect_digits, "textures": _collect_textures}
