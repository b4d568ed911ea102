"""Batches: laws of sharing out images, for any counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.errors import InputError
from saccade.training import batches as batches_module
from saccade.training.batches import Batches, make_loader, mix
from tests.training.nets import make_data


def share_out(count, size, world, **options):
    """For each step, what each process gets."""
    return list(zip(*(Batches(count, size, rank=rank, world=world, **options) for rank in range(world)), strict=True))


@given(count=st.integers(1, 200), size=st.integers(1, 70), world=st.integers(1, 5), seed=st.none() | st.integers(0, 9))
def test_each_image_once_in_even_batches_that_do_not_depend_on_the_number_of_processes(count, size, world, seed):
    if min(count, size) < world:
        return
    steps = share_out(count, size, world, seed=seed)
    whole = [torch.cat([own for own, _ in parts]) for parts in steps]
    assert sorted(torch.cat(whole).tolist()) == list(range(count))
    sizes = [len(batch) for batch in whole]
    assert max(sizes) - min(sizes) <= 1
    assert min(len(own) for parts in steps for own, _ in parts) >= 1
    if min(sizes) >= world and len(steps) == -(-count // size):
        assert max(sizes) <= size
        alone = share_out(count, size, 1, seed=seed)
        assert [sorted(batch.tolist()) for batch in whole] == [sorted(batch.tolist()) for ((batch, _),) in alone]


@given(count=st.integers(4, 50), size=st.integers(4, 20), world=st.integers(1, 4))
def test_mean_over_own_images_times_share_averages_to_the_mean_over_the_batch(count, size, world):
    values = torch.arange(count, dtype=torch.float64) ** 2
    for parts in share_out(count, size, world, seed=0):
        mean = sum(values[own].mean() * share for own, share in parts) / world
        torch.testing.assert_close(mean, values[torch.cat([own for own, _ in parts])].mean())


def test_order_follows_seed_and_epoch():
    def order(seed, epoch):
        batches = Batches(50, 16, seed=seed)
        batches.set_epoch(epoch)
        return torch.cat([own for own, _ in batches]).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert torch.cat([own for own, _ in Batches(50, 16)]).tolist() == list(range(50))


def test_near_seeds_are_unrelated_and_fit_a_generator():
    seeds = [mix(seed, epoch, step) for seed in range(3) for epoch in range(3) for step in range(3)]
    assert len(set(seeds)) == 27
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_images_from_memory_and_one_by_one_are_the_same(monkeypatch):
    train = make_data().train
    fast = list(make_loader(train, Batches(50, 16, seed=0)))
    monkeypatch.setattr(batches_module, "_IN_MEMORY", 0)
    monkeypatch.setattr(batches_module.os, "cpu_count", lambda: 1)
    loader = make_loader(train, Batches(50, 16, seed=0))
    assert loader.num_workers == 1
    for one, other in zip(fast, (loader.dataset[place] for place in loader.sampler), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, train.tensors[0][one.indices])


@pytest.mark.parametrize(("count", "size", "world"), [(2, 16, 3), (50, 2, 3)])
def test_too_few_images_for_the_devices_are_refused(count, size, world):
    with pytest.raises(InputError, match=f"{count} images in batches of {size} cannot be shared.* to {world} devices"):
        Batches(count, size, world=world)
