"""What the data floor passes on: a source's entries before they are read, and images with classes after."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from saccade.data.decode import Unreadable, decode
from saccade.errors import WorkError

__all__ = ["Collection", "Entry", "ImageData", "Images", "Skipped"]

Encoded = Path | bytes | Image.Image


@dataclass(frozen=True)
class Skipped:
    """An image that was left out: its path within the source, and the reason."""

    path: str
    reason: str


@dataclass(frozen=True)
class Entry:
    """One image of a source, not yet read.

    Attributes:
        name: unique within the source; a folder's entries have their relative path.
        label: index into the classes.
        image: where it is; a function is called whenever the image is read, and must pickle.
        part: "train" or "val" where the source says so, None if a split shall.
    """

    name: str
    label: int
    image: Path | Image.Image | Callable[[], Encoded]
    part: str | None = None

    def fetch(self) -> Encoded:
        return self.image() if callable(self.image) else self.image


@dataclass(frozen=True)
class Collection:
    """All that a source offers, not yet read. `image_size` None: to be chosen from the images."""

    name: str
    classes: tuple[str, ...]
    entries: list[Entry]
    image_size: int | None = None
    skipped: tuple[Skipped, ...] = ()


class Images(Dataset[tuple[Tensor, int]]):
    """Square images with labels: item i is ((3, S, S) uint8, int).

    Attributes:
        names: of each image, its path or place within the source.
        labels: (N,) long, indices into `ImageData.classes`.
    """

    def __init__(self, entries: list[Entry], image_size: int, pixels: Tensor | None, rows: list[int]) -> None:
        self.names = tuple(entry.name for entry in entries)
        self.labels = torch.tensor([entry.label for entry in entries], dtype=torch.long)
        self._entries = entries if pixels is None else None
        self._image_size = image_size
        self._pixels = pixels
        self._rows = rows

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._decode(index) if self._pixels is None else self._pixels[self._rows[index]]
        return image, int(self.labels[index])

    def _decode(self, index: int) -> Tensor:
        assert self._entries is not None
        entry = self._entries[index]
        try:
            return decode(entry.fetch(), self._image_size)
        except Unreadable as error:
            raise WorkError(f"{entry.name} could be read before and cannot now: {error}. Restore the file") from error


@dataclass(frozen=True)
class ImageData:
    """Images of two or more classes in two parts, all of one size.

    Attributes:
        name: the bundled set, the folder's name or the Hugging Face name.
        classes: names; a label is an index into them.
        train, val: items are ((3, S, S) uint8, int label). Images in memory are views: change a copy.
        image_size: S, in pixels.
        mean, std: of each colour over the training images, as shares of 255; std is at least 1/255, so that one may
            divide by it.
        skipped: what could not be used, each with the reason.
        fingerprint: hex digest of what is in which part (names, classes, file sizes, image size). It does not depend
            on where the source lies; an image exchanged for another of the same file size is not noticed.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    val: Images
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    skipped: tuple[Skipped, ...]
    fingerprint: str
