"""From a source's entries to `ImageData`: one pass reads every image, then the readable ones are split and counted."""

import os
import statistics
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from saccade.data.decode import Unreadable, decode, shorter_side
from saccade.data.images import Collection, Encoded, Entry, ImageData, Images, Skipped
from saccade.errors import InputError, nearest

__all__ = ["assemble"]

MEMORY_LIMIT = 2 * 2**30  # bytes of decoded images; beyond it they are read anew for every item
_SIZE_SAMPLE = 1000  # headers are enough to tell a median
_PROGRESS_AFTER = 2.0  # seconds

T = TypeVar("T")


def assemble(collection: Collection, image_size: int | None, val_fraction: float, seed: int) -> ImageData:
    """Read every image once, leave out the unreadable, split what the source has not, and sum up."""
    _check_classes(collection, collection.entries)  # a mistake shows before the long part
    with warnings.catch_warnings(action="ignore"):  # Pillow's, on oddities it can live with; once for all threads
        size = image_size or collection.image_size or _median_side(collection.entries)
        seen = _read(collection.entries, size)
    skipped = [Skipped(entry.name, reason) for entry, reason in zip(collection.entries, seen.reasons) if reason]
    kept = [row for row, reason in enumerate(seen.reasons) if not reason]
    if not kept:
        raise InputError(
            f"none of the {len(skipped)} files of {collection.name} can be read as an image. The first is "
            f"{skipped[0].path}: {skipped[0].reason}. Give images such as JPEG or PNG files"
        )
    readable = [collection.entries[row] for row in kept]
    _check_classes(collection, readable)

    entries = _split(readable, val_fraction, seed)
    parts = {
        part: [(row, entry) for row, entry in zip(kept, entries) if entry.part == part] for part in ("train", "val")
    }
    train, val = (
        Images([entry for _, entry in part], size, seen.pixels, [row for row, _ in part]) for part in parts.values()
    )
    mean, square = seen.moments[[row for row, _ in parts["train"]]].mean(0)
    std = (square - mean**2).clamp(min=1 / 255**2).sqrt()
    return ImageData(
        name=collection.name,
        classes=collection.classes,
        train=train,
        val=val,
        image_size=size,
        mean=_triple(mean),
        std=_triple(std),
        skipped=(*collection.skipped, *skipped),
        fingerprint=_fingerprint(collection.classes, size, entries, [seen.bytes[row] for row in kept]),
    )


@dataclass
class _Seen:
    """What one pass over all entries found; row i is entry i."""

    pixels: Tensor | None  # (N, 3, S, S) uint8, None if they would not fit
    moments: Tensor  # (N, 2, 3) float64: mean and mean square of an image's colours in [0, 1]
    bytes: list[int]
    reasons: list[str | None]  # why it cannot be read


def _read(entries: list[Entry], size: int) -> _Seen:
    def read_one(entry: Entry) -> tuple[Tensor, np.ndarray, int] | Unreadable:
        try:
            encoded = entry.fetch()
            image = decode(encoded, size)
        except Unreadable as error:
            return error
        colours = image.numpy().reshape(3, -1) / 255.0
        return image, np.stack([colours.mean(1), (colours**2).mean(1)]), _num_bytes(encoded)

    num = len(entries)
    fits = num * 3 * size * size < MEMORY_LIMIT
    pixels = torch.empty(num, 3, size, size, dtype=torch.uint8) if fits else None
    seen = _Seen(pixels, torch.zeros(num, 2, 3, dtype=torch.float64), [0] * num, [None] * num)
    for row, found in enumerate(_in_threads(read_one, entries, "Reading images")):
        if isinstance(found, Unreadable):
            seen.reasons[row] = str(found)
            continue
        image, moments, seen.bytes[row] = found
        seen.moments[row] = torch.from_numpy(moments)
        if pixels is not None:
            pixels[row] = image
    return seen


def _num_bytes(encoded: Encoded) -> int:
    if isinstance(encoded, Path):
        return encoded.stat().st_size
    return encoded.width * encoded.height if isinstance(encoded, Image.Image) else len(encoded)


def _median_side(entries: list[Entry]) -> int:
    """Median of the shorter sides, as a multiple of 32 within 32..224."""

    def side(entry: Entry) -> int | None:
        try:
            return shorter_side(entry.fetch())
        except Unreadable:
            return None

    sample = sorted(entries, key=lambda entry: entry.name)[:: -(-len(entries) // _SIZE_SAMPLE)]
    sides = [found for found in _in_threads(side, sample, "Reading image sizes") if found]
    return min(224, max(32, 32 * round(statistics.median(sides or [0]) / 32)))


def _in_threads(work: Callable[[Entry], T], entries: Sequence[Entry], title: str) -> Iterator[T]:
    """`map` over threads, in order; a bar on stderr once it has taken over two seconds."""
    workers = min(16, os.cpu_count() or 1)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        advance: Callable[[], None] | None = None
        start = time.monotonic()
        block = 16 * workers  # not all at once: results wait in memory until they are taken
        blocks = (pool.map(work, entries[first : first + block]) for first in range(0, len(entries), block))
        for done, result in enumerate(chain.from_iterable(blocks), start=1):
            yield result
            if advance:
                advance()
            elif time.monotonic() - start > _PROGRESS_AFTER:
                advance = _start_bar(stack, title, done, len(entries))


def _start_bar(stack: ExitStack, title: str, done: int, total: int) -> Callable[[], None]:
    from rich.console import Console
    from rich.progress import Progress

    bar = stack.enter_context(Progress(console=Console(file=sys.stderr), transient=True))
    task = bar.add_task(title, completed=done, total=total)
    return lambda: bar.advance(task)


def _split(entries: list[Entry], val_fraction: float, seed: int) -> list[Entry]:
    """Share out, class by class, the entries that no part claims.

    Each has its place by a hash of seed and name, so the order in which a file system lists them does not count, and
    an added file moves few others.
    """
    by_label = defaultdict(list)
    for entry in entries:
        if entry.part is None:
            by_label[entry.label].append(entry.name)
    held_out: set[str] = set()
    for names in by_label.values():
        names.sort(key=lambda name: blake2b(f"{seed}/{name}".encode()).digest())
        num_val = min(max(1, round(len(names) * val_fraction)), len(names) - 1)
        held_out.update(names[:num_val])

    def part(entry: Entry) -> str:
        return entry.part or ("val" if entry.name in held_out else "train")

    return [replace(entry, part=part(entry)) for entry in entries]


def _check_classes(collection: Collection, entries: list[Entry]) -> None:
    """Refuse what cannot be trained on: too few classes, or too few of these entries in one of them."""
    source, classes = collection.name, collection.classes
    if len(classes) < 2:
        raise InputError(
            f"{source} has {f'one class, {classes[0]!r}' if classes else 'no classes'}: there is nothing to tell "
            "apart. Give two or more classes, in a folder as one subfolder of images for each"
        )
    train = Counter(entry.label for entry in entries if entry.part != "val")
    val = Counter(entry.label for entry in entries if entry.part == "val")
    for label, name in enumerate(classes):
        if not train[label] and val[label]:
            known = [other for index, other in enumerate(classes) if train[index]]
            raise InputError(
                f"the validation part of {source} has the class {name!r}, of which the training part has no readable "
                f"image: {nearest(name, known)}. Give both parts the same classes"
            )
        if not train[label]:
            raise InputError(f"the class {name!r} of {source} has no readable image: add images or remove the class")
    for entry in entries:
        if entry.part is None and train[entry.label] < 2:
            raise InputError(
                f"the class {classes[entry.label]!r} of {source} has one readable image, too few for a split: "
                "add images (two or more a class), or give the parts yourself as train and val"
            )
    if not val and all(entry.part for entry in entries):
        raise InputError(
            f"the validation part of {source} has no readable image: add some, or remove it to get a split"
        )


def _fingerprint(classes: tuple[str, ...], size: int, entries: list[Entry], num_bytes: list[int]) -> str:
    lines = sorted(f"{each.part}\0{classes[each.label]}\0{each.name}\0{num}" for each, num in zip(entries, num_bytes))
    return blake2b("\n".join([str(size), *lines]).encode(), digest_size=8).hexdigest()


def _triple(values: Tensor) -> tuple[float, float, float]:
    red, green, blue = values.tolist()
    return red, green, blue
