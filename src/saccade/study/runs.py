"""The training runs of a study, one after the other or several at once.

On a CPU each run gets one thread, and as many run at once as there are cores: small networks gain far more from that
than from threads, and one thread always ends with the same bits. Elsewhere runs follow one another on all devices.
"""

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import Any

import torch
from torch import nn

from saccade.backbones import create_model
from saccade.data import ImageData
from saccade.errors import DivergedError, WorkError
from saccade.training import FitResult, TrainSettings, fit
from saccade.training.launch import end_with

__all__ = ["Epoch", "Run", "train_runs"]

Epoch = dict[str, Any]  # a row of the history, as `fit` tells it
OnEpoch = Callable[["Run", Epoch], None]


@dataclass(frozen=True)
class Run:
    """One network to train.

    Attributes:
        label: its name in the study.
        backbone, options: for `create_model`.
        settings: the recipe, with the seed.
        folder: where `fit` leaves everything.
    """

    label: str
    backbone: str
    options: dict[str, Any] = field(hash=False)
    settings: TrainSettings
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether `fit` has left its result, which it writes last."""
        return (self.folder / "result.json").exists()

    def build(self, num_classes: int) -> nn.Module:
        """The network with its first weights."""
        torch.manual_seed(self.settings.seed)
        return create_model(self.backbone, num_classes=num_classes, **self.options)

    def train(self, data: ImageData, on_epoch: Callable[[Epoch], None]) -> FitResult:
        """Train, or go on, or read what is finished."""
        config = {"model": self.backbone, "options": self.options}
        return fit(self.build(len(data.classes)), data, self.settings, self.folder, on_epoch=on_epoch, config=config)


def train_runs(runs: list[Run], data: ImageData, on_epoch: OnEpoch) -> dict[Run, FitResult | DivergedError]:
    """Train every run, and call `on_epoch` after each epoch.

    Returns: each run's result, or the error of one whose loss diverged.
    """
    waiting = [run for run in runs if not run.finished]
    processes = min(len(waiting), _processes(runs[0].settings))
    if processes > 1:
        try:
            _train_at_once(waiting, data, on_epoch, processes)
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            warnings.warn(
                "the images do not fit into shared memory (docker run --shm-size=2g gives more), so the networks are "
                "trained one after the other",
                stacklevel=2,
            )
    found: dict[Run, FitResult | DivergedError] = {}
    with _threads(1) if _on_cpu(runs[0].settings) else _threads(torch.get_num_threads()):
        for run in runs:  # those that are finished are only read
            try:
                found[run] = run.train(data, partial(on_epoch, run))
            except DivergedError as error:
                found[run] = error
    return found


def _on_cpu(settings: TrainSettings) -> bool:
    return settings.accelerator == "cpu" or (settings.accelerator == "auto" and not torch.cuda.is_available())


def _processes(settings: TrainSettings) -> int:
    """How many runs to train at once."""
    single = str(settings.devices) in ("auto", "1") and settings.nodes == 1 and "LOCAL_RANK" not in os.environ
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") and single and _on_cpu(settings) else 1


def _train_at_once(runs: list[Run], data: ImageData, on_epoch: OnEpoch, processes: int) -> None:
    context = torch.multiprocessing.get_context("spawn")  # its queues pass the images on as shared memory
    told: Queue[tuple[int, Epoch]] = context.Queue()
    with ProcessPoolExecutor(processes, context, _prepare, (data, told, os.getpid())) as pool:
        waiting = {pool.submit(_train_here, number, run) for number, run in enumerate(runs)}
        try:
            while waiting:
                done, waiting = wait_for(waiting, timeout=0.2)
                for number, epoch in _drain(told):
                    on_epoch(runs[number], epoch)
                for future in done:
                    future.result()  # raises what the run raised
        except BrokenProcessPool:
            raise WorkError(
                "a training process ended before its work did: memory ran out, or a script calls run_study without "
                "`if __name__ == '__main__':`. What was saved before is intact: make room, or take smaller batches or "
                "images, and start again"
            ) from None
        except BaseException:
            workers = list(pool._processes.values())  # which shutdown forgets
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.kill()
            raise


def _drain(told: "Queue[tuple[int, Epoch]]") -> Iterator[tuple[int, Epoch]]:
    while True:
        try:
            yield told.get_nowait()
        except Empty:
            return


_HERE: dict[str, Any] = {}  # of a worker process


def _prepare(data: ImageData, told: "Queue[tuple[int, Epoch]]", parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the study ends its own
    torch.set_num_threads(1)
    _HERE.update(data=data, told=told)
    end_with(parent)


def _train_here(number: int, run: Run) -> None:
    with suppress(DivergedError):  # met again, and reported, when the results are read
        run.train(_HERE["data"], lambda epoch: _HERE["told"].put((number, epoch)))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
