"""Image files that the tests of the data floor write."""

from pathlib import Path

import numpy as np
from PIL import Image


def noise(height: int = 9, width: int = 11, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path: Path, pixels: np.ndarray | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise() if pixels is None else pixels).save(path, **options)
    return path


def write_class(folder: Path, count: int, height: int = 9, width: int = 11) -> None:
    for index in range(count):
        write(folder / f"{index}.png", noise(height, width, seed=index))
