"""`load_images`: from the name of a source to images ready for training."""

import re
from pathlib import Path

from saccade.data.assemble import assemble
from saccade.data.bundled import BUNDLED
from saccade.data.folder import collect_folder
from saccade.data.hub import collect_hub, is_dataset_folder
from saccade.data.images import Collection, ImageData
from saccade.errors import InputError, nearest

__all__ = ["load_images"]


def load_images(
    source: str | Path, *, image_size: int | None = None, val_fraction: float = 0.2, seed: int = 0
) -> ImageData:
    """Read all images of a source, split them into training and validation, and sum up what they are.

    Every image is read once before this returns, so that an unreadable one is found before training, not in it: it is
    left out and named in `skipped`. Decoded images stay in memory if they take less than 2 GiB; beyond that they are
    read again for every item. A bar on stderr shows the progress of what takes over two seconds.

    Args:
        source: one of
            - "digits": scikit-learn's 1797 handwritten digits, 8 x 8 pixels, enlarged (bicubic);
            - "textures": patches of 32 x 32 pixels of scikit-image's photos of brick, grass and gravel, enlarged; the
              left of each photo trains and the right validates, so no pixel is in both;
            - a folder with one subfolder a class, or with "train" and "val" ("valid", "validation", "test") above the
              classes. Hidden files are ignored, deeper subfolders belong to their class;
            - a Hugging Face dataset: "owner/name", "hf:name", a folder written by `save_to_disk`, or one of parquet
              files. "hf:" before a folder leaves it to `datasets.load_dataset`.
            A folder that is called like a bundled set is reached as "./digits".
        image_size: side of the square images; the shorter side is resized to it and the centre kept. Default: 32 for
            digits, 64 for textures, and else the median of the images' shorter sides, rounded to a multiple of 32
            within 32 and 224, which keeps most of the detail at a cost that a CPU can bear.
        val_fraction: share of each class that validates, at least one image; unused where the source has its own
            validation part.
        seed: chooses them. The split depends on the seed and the names of the files, not on their order.

    Returns: ImageData.
    Raises: InputError if there is no such source, if it has fewer than two classes, if a class has no readable image or
        too few to be split, if validation has a class that training has not, or if an argument is out of range.

    >>> data = load_images("digits")
    >>> len(data.train), len(data.val), data.train[0][0].shape
    (1438, 359, torch.Size([3, 32, 32]))
    """
    if image_size is not None and image_size < 1:
        raise InputError(
            f"image_size is {image_size}: give a number of pixels from 1, or None to choose it from the images"
        )
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction is {val_fraction}: give a share between 0 and 1, such as 0.2")
    return assemble(_collect(str(source), val_fraction), image_size, val_fraction, seed)


def _collect(source: str, val_fraction: float) -> Collection:
    if source in BUNDLED:
        return BUNDLED[source](val_fraction)
    if source.startswith("hf:"):
        return collect_hub(source.removeprefix("hf:"))
    path = Path(source).expanduser()
    if path.is_dir():
        return collect_hub(str(path)) if is_dataset_folder(path) else collect_folder(path)
    if path.exists():
        raise InputError(f"{source} is a file: give a folder that has one subfolder of images for each class")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).parent.exists():
        return collect_hub(source)
    raise InputError(
        f"there is no folder {source!r} and no bundled set of that name: {nearest(source, BUNDLED)}, "
        "or give a folder with one subfolder of images for each class, or a Hugging Face name as hf:owner/name"
    )
