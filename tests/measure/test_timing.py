"""measure_time: order, grouping and waiting of the measurements; no absolute times."""

import itertools
import time

import pytest
import torch

from saccade.errors import InputError
from saccade.measure import Timing, measure_time


def test_quartiles_are_ordered_and_repeats_told():
    timing = measure_time(lambda: torch.ones(8).sin(), repeats=5, min_seconds=0.01)
    assert 0 < timing.low <= timing.median <= timing.high
    assert timing.repeats == 5


def test_a_sleep_takes_at_least_its_time_and_longer_than_nothing():
    slow = measure_time(lambda: time.sleep(0.01), warmup=0, repeats=3, min_seconds=0.0)
    quick = measure_time(lambda: None, repeats=3, min_seconds=0.01)
    assert slow.low >= 0.01 > 10 * quick.median


class Clock:
    """A clock that only the timed calls advance, by the given milliseconds in turn."""

    def __init__(self, *milliseconds):
        self.now, self.calls, self.steps = 0.0, 0, itertools.cycle(milliseconds)

    def work(self):
        self.calls += 1
        self.now += next(self.steps) / 1000


@pytest.fixture
def run_with(monkeypatch):
    def run(clock, **options):
        monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
        return measure_time(clock.work, **options)

    return run


def test_slow_calls_run_once_a_repeat(run_with):
    clock = Clock(20)
    assert run_with(clock, warmup=2, repeats=3, min_seconds=0.03).median == pytest.approx(0.02)
    assert clock.calls == 2 + 1 + 3  # one finds that a group of one is enough


def test_quick_calls_run_in_groups_and_are_averaged(run_with):
    clock = Clock(1)
    assert run_with(clock, warmup=0, repeats=3, min_seconds=0.024).median == pytest.approx(0.001)
    assert clock.calls == (1 + 2 + 4 + 8) + 3 * 8


def test_quartiles_are_those_of_the_repeats(run_with):
    timing = run_with(Clock(1, 2, 3, 4, 5), warmup=4, repeats=5, min_seconds=0.0)
    assert (timing.low, timing.median, timing.high) == pytest.approx((0.002, 0.003, 0.004))


def test_the_clock_waits_for_the_device(monkeypatch):
    events = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: events.append("wait"))
    measure_time(lambda: events.append("call"), warmup=1, repeats=2, min_seconds=0.0)
    assert events == ["call"] + 3 * ["wait", "call", "wait"]


def test_throughput_is_items_over_the_median():
    assert Timing(median=0.25, low=0.2, high=0.5, repeats=20).throughput(items=8) == 32


@pytest.mark.parametrize("options", [{"warmup": -1}, {"repeats": 0}, {"min_seconds": -1.0}], ids=str)
def test_impossible_settings_are_refused(options):
    with pytest.raises(InputError, match="give warmup >= 0, repeats >= 1 and min_seconds >= 0"):
        measure_time(lambda: None, **options)
