"""Run a `Course` on the devices that the settings ask for, in this process or in one process for each device."""

import logging
import os
import pickle
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import multiprocessing, nn

from saccade.data import ImageData
from saccade.errors import InputError, WorkError
from saccade.training.settings import TrainSettings, device_indices

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy

    from saccade.training.module import Report

__all__ = ["end_with", "is_first_process", "launch"]

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK")  # set by torchrun, srun and by ourselves
_NOISE = (  # warnings of Lightning and torch about what is meant to be so, or about their own code
    r".*does not have many workers which may be a bottleneck",
    r".*isinstance\(treespec, LeafSpec\)` is deprecated",
    r"(GPU|MPS) available but not used",
    r"Grad strides do not match bucket view strides",  # of depthwise filters; DDP copies them
)


def launch(model: nn.Module, data: ImageData, settings: TrainSettings, last: Path, report: "Report | None") -> None:
    """Train until `last` holds the final epoch.

    One device trains in this process. Several train in a process each: those which torchrun or srun started, or else
    processes that are started here and end with the run, so that the caller's program runs only once.
    """
    if settings.nodes > 1 and not _launched_outside() and "MASTER_ADDR" not in os.environ:
        raise InputError(
            f"nodes is {settings.nodes} and nothing says where the others are: start the program on each machine with "
            "torchrun or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK"
        )
    devices = len(_local_devices(settings))
    if (devices == 1 and settings.nodes == 1) or _launched_outside():
        run(model, data, settings, last, report)
    else:
        _run_in_processes(devices, (model, data, settings, last), report)


def is_first_process() -> bool:
    """Tell whether this process is the one, of all processes on all machines, that writes results."""
    return all(int(os.environ.get(name, 0)) == 0 for name in _RANKS)


def _launched_outside() -> bool:
    return "LOCAL_RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) > 1


def _on_cuda(settings: TrainSettings) -> bool:
    return settings.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def _local_devices(settings: TrainSettings) -> list[int]:
    return device_indices(settings.devices) or list(range(torch.cuda.device_count() if _on_cuda(settings) else 1))


def _precision(settings: TrainSettings) -> str:
    if settings.precision == "16-mixed" and not _on_cuda(settings):
        raise InputError("precision is '16-mixed', which needs a CUDA GPU: choose 'bf16-mixed' or '32'")
    if settings.precision != "auto":
        return settings.precision
    if not _on_cuda(settings):
        return "32"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def run(model: nn.Module, data: ImageData, settings: TrainSettings, last: Path, report: "Report | None") -> None:
    """Train in this process, which may be one of several."""
    with _quiet(), torch.random.fork_rng(range(torch.cuda.device_count())):
        from saccade.training.module import Course

        copy = deepcopy(model).train()  # FSDP would leave nothing but shards
        course = Course(copy, data, settings, last, report)
        trainer = _make_trainer(settings, last.parent)
        interrupt = signal.getsignal(signal.SIGINT)
        try:
            trainer.fit(course, ckpt_path=last if last.exists() else None)
        except torch.OutOfMemoryError as error:
            raise WorkError(
                f"out of GPU memory with batch_size={settings.batch_size}: start anew in another folder with a smaller "
                f"batch or smaller images, or share the batch out to more devices ({error})"
            ) from error
        except SystemExit as error:
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, interrupt)  # Lightning ends the program on Ctrl-C and ignores further ones
            raise KeyboardInterrupt from None


def _make_trainer(settings: TrainSettings, folder: Path) -> "Trainer":
    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from saccade.training.module import AverageWeights, WholeFiles

    devices = _local_devices(settings)
    try:
        return Trainer(
            accelerator="cuda" if _on_cuda(settings) else settings.accelerator,
            devices=devices if _on_cuda(settings) else len(devices),
            num_nodes=settings.nodes,
            strategy=_strategy(settings, len(devices) * settings.nodes),
            precision=_precision(settings),  # type: ignore[arg-type]
            max_epochs=settings.epochs,
            callbacks=[AverageWeights(settings.ema_decay)],
            plugins=[WholeFiles()],
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        names = ("accelerator", "devices", "nodes", "strategy", "precision")
        given = ", ".join(f"{name}={getattr(settings, name)!r}" for name in names)
        raise InputError(f"this machine cannot train with {given}: {error}") from error


def _strategy(settings: TrainSettings, world: int) -> "str | Strategy":
    from lightning.pytorch.strategies import ModelParallelStrategy

    if world == 1:
        return "auto"
    if settings.strategy == "fsdp":
        return ModelParallelStrategy(world, tensor_parallel_size=1, save_distributed_checkpoint=False)
    return "ddp"


def _run_in_processes(count: int, task: tuple, report: "Report | None") -> None:
    try:
        payload = pickle.dumps(task)  # a copy for each process: tensors sent as they are would share their memory
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"the model or the data cannot be sent to other processes ({error}). Define their classes and functions at "
            "the top of a module, or start the program with torchrun"
        ) from error
    reports = multiprocessing.get_context("spawn").SimpleQueue()
    arguments = (payload, os.environ.get("MASTER_PORT") or str(_free_port()), reports, os.getpid())
    processes = multiprocessing.start_processes(_work, arguments, nprocs=count, join=False, start_method="spawn")
    try:
        while not processes.join(timeout=0.1):
            _pass_on(reports, report)
        _pass_on(reports, report)
    except multiprocessing.ProcessRaisedException:
        _pass_on(reports, report)  # raises the error itself, where a process sent it
        raise
    except multiprocessing.ProcessExitedException as error:
        raise WorkError(f"{error}. If memory ran out, take a smaller batch_size or fewer devices") from error
    finally:
        for process in processes.processes:
            process.kill()


def _work(local_rank: int, payload: bytes, port: str, reports: Any, parent: int) -> None:
    end_with(parent)
    os.environ |= {"LOCAL_RANK": str(local_rank), "MASTER_PORT": port}
    os.environ.pop("SLURM_NTASKS", None)  # else Lightning takes all of us for one task of srun
    model, data, settings, last = pickle.loads(payload)
    try:
        run(model, data, settings, last, reports.put)
    except (InputError, WorkError) as error:
        reports.put(error)
        raise


def end_with(parent: int) -> None:
    """Have this process end when its parent is killed: nothing may write into the parent's folder after that."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _pass_on(reports: Any, report: "Report | None") -> None:
    while not reports.empty():
        message = reports.get()
        if isinstance(message, Exception):
            raise message
        if report:
            report(message)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's notes off the terminal, and its warnings about what is meant to be so."""
    logs = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [log.level for log in logs]
    with warnings.catch_warnings():
        for message in _NOISE:
            warnings.filterwarnings("ignore", message)
        import lightning.pytorch  # noqa: F401 (sets the levels of its logs)

        for log in logs:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for log, level in zip(logs, levels):
                log.setLevel(level)
