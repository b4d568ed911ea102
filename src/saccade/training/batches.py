"""Batches: which images make up each step on each device, taken from the data a whole batch at a time."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sized
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from saccade.errors import InputError

__all__ = ["Batch", "Batches", "make_loader", "mix", "num_images"]

_IN_MEMORY = 256 * 2**20  # bytes


class Batch(NamedTuple):
    """Images (B, 3, H, W) uint8, their labels, their indices in the dataset, and this process's share (`Batches`)."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    share: float


class Batches(Sampler[tuple[Tensor, float]]):
    """Share out `count` images: each once an epoch, in batches whose sizes differ by at most one.

    Args:
        count: images.
        batch_size: most images of a batch, over all processes together.
        rank: this process.
        world: number of processes. The batches do not depend on it: of each, a process takes every world-th image.
        seed: shuffles, anew for each epoch; None keeps the order.

    Yields: the indices of this process, and its share: their number over the mean number of a process. A loss averaged
        over them, times the share, averaged over the processes, is the average over the batch.
    """

    def __init__(self, count: int, batch_size: int, *, rank: int = 0, world: int = 1, seed: int | None = None) -> None:
        if min(count, batch_size) < world:
            raise InputError(
                f"{count} images in batches of {batch_size} cannot be shared out to {world} devices: give each of them "
                "one or more, or take fewer devices"
            )
        self.count, self.rank, self.world, self.seed, self.epoch = count, rank, world, seed, 0
        self.steps = min(-(-count // batch_size), count // world)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; Lightning calls this at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, float]]:
        order = torch.arange(self.count)
        if self.seed is not None:
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(mix(self.seed, self.epoch)))
        for batch in order.tensor_split(self.steps):
            own = batch[self.rank :: self.world]
            yield own, len(own) * self.world / len(batch)


class _OneByOne(Dataset[Batch]):
    """A dataset that is indexed by what `Batches` yields."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, batch: tuple[Tensor, float]) -> Batch:
        indices, share = batch
        return Batch(*_stack(self.dataset, indices.tolist()), indices, share)


class _InMemory(Dataset[Batch]):
    """The same, for images that fit: no Python for each of them."""

    def __init__(self, dataset: Dataset) -> None:
        self.images, self.labels = _stack(dataset, range(num_images(dataset)))

    def __getitem__(self, batch: tuple[Tensor, float]) -> Batch:
        indices, share = batch
        return Batch(self.images[indices], self.labels[indices], indices, share)


def _stack(dataset: Dataset, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*(dataset[index] for index in indices))
    return torch.stack(images), torch.tensor([int(label) for label in labels])


def make_loader(dataset: Dataset, batches: Batches) -> DataLoader[Batch]:
    """Load the batches of `dataset`: from memory if its images take up to 256 MiB, else by worker processes."""
    if dataset[0][0].nbytes * batches.count <= _IN_MEMORY:
        return DataLoader(_InMemory(dataset), sampler=batches, batch_size=None)
    workers = min(4, max(1, (os.cpu_count() or 1) // batches.world))
    one_by_one = _OneByOne(dataset)
    return DataLoader(one_by_one, sampler=batches, batch_size=None, num_workers=workers, persistent_workers=True)


def num_images(dataset: Dataset) -> int:
    """Count the images; InputError for a dataset that holds none, or cannot tell."""
    if not isinstance(dataset, Sized) or not len(dataset):
        raise InputError(f"the dataset ({type(dataset).__name__}) has no images or no length: give one that has both")
    return len(dataset)


def mix(*numbers: int) -> int:
    """Make one seed out of several numbers; near numbers give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()) >> 1
