"""The main job: train a network once for each mixer and seed, or several networks, measure each, show where it looks,
and report.

A study is a folder. Every part (a training run, a network's costs, its explanations) leaves a file when it is finished,
written whole or not at all, so that a study killed at any moment goes on where it was.
"""

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import saccade
from saccade.backbones import create_model
from saccade.data import ImageData, load_images
from saccade.errors import DivergedError, InputError
from saccade.explain.pages.progress import Progress, Silent
from saccade.study.parts import explain_part, measure_part
from saccade.study.report import write_csv, write_report
from saccade.study.runs import Epoch, Run, train_runs
from saccade.study.settings import NetworkChoice, StudySettings, default_epochs
from saccade.study.verdict import accuracy_interval, recommend
from saccade.training import FitResult, TrainSettings
from saccade.training.checkpoint import make_folder, saving_failed, write_whole
from saccade.training.fit import MACHINES
from saccade.training.launch import is_first_process

__all__ = ["Study", "run_study"]


def run_study(
    settings: StudySettings, folder: str | Path, *, command: str = "", progress: Progress | None = None
) -> dict[str, Any]:
    """Run a study, or go on with it, and write results.json, results.csv, report.html and checkpoints.

    Args:
        settings: what to study.
        folder: made if missing; a folder that holds a study with other settings or data is refused.
        command: how it was called, for the report.
        progress: told what runs.

    Returns: what results.json holds.
    Raises: InputError for data, mixers, networks or options that cannot be served, before anything is trained;
        WorkError for a full disk. What diverges is reported as failed, and the study goes on.
    """
    told = progress if progress and is_first_process() else Silent()
    return Study(settings, Path(folder), command, told).run()


@dataclass
class Study:
    """One study and its folder."""

    settings: StudySettings
    folder: Path
    command: str
    progress: Progress
    fits: dict[str, list[FitResult]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    accuracies: dict[tuple[str, int], float] = field(default_factory=dict)  # latest by label and seed

    def run(self) -> dict[str, Any]:
        """Do every part that is not done, and write the results."""
        self._try_models()  # first: a call that cannot work leaves no folder behind
        make_folder(self.folder)
        with _alone_in(self.folder):
            if is_first_process():
                self._claim_folder()
            choices = self.settings.choices
            self.progress.start(len(choices) * (self.settings.seeds * self.epochs + 2 * _OTHER_PARTS))
            self._train()
            if not is_first_process():
                return {}
            results = self._collect([self._finish(choice) for choice in choices])
            write_whole(self.folder / "results.json", json.dumps(results, indent=1).encode())
            write_csv(results, self.folder / "results.csv")
            write_report(results, self.folder)
        return results

    @cached_property
    def data(self) -> ImageData:
        """The images."""
        return load_images(self.settings.data, image_size=self.settings.image_size)

    @cached_property
    def epochs(self) -> int:
        """Passes over the training images."""
        if self.settings.epochs is not None:
            return self.settings.epochs
        return default_epochs(len(self.data.train), self.settings.batch_size)

    def _claim_folder(self) -> None:
        """Note what the study is, or compare with what the folder holds. Mixers, networks that have their own, and
        seeds may be added."""
        free = {"data", "mixers", "seeds", *MACHINES}
        asked = {name: value for name, value in asdict(self.settings).items() if name not in free}
        asked["backbone"] = self.settings.free_backbone
        asked["fingerprint of the data"] = self.data.fingerprint
        file = self.folder / "study.json"
        if not file.exists():
            # not foreign: hidden files, such as our lock, and runs that another process of this study has just begun
            if any(path.name != "runs" and not path.name.startswith(".") for path in self.folder.iterdir()):
                raise InputError(f"{self.folder} is not empty and holds no study: give a new folder with --out")
            write_whole(file, json.dumps(asked, indent=1).encode())
            return
        try:
            before = dict(json.loads(file.read_text()))
        except (ValueError, TypeError):
            raise InputError(f"{file} is damaged: give another folder with --out") from None
        changes = [
            f"{name} was {before.get(name)!r} and is {value!r}"
            for name, value in asked.items()
            if before.get(name) != value
        ]
        if changes:
            raise InputError(f"{self.folder} holds another study: {'; '.join(changes)}. Give another folder with --out")

    def _try_models(self) -> None:
        """Build every network and show it an image, so that what cannot work fails before anything is trained."""
        for choice in self.settings.choices:
            run = self._run(choice, seed=0)
            try:
                model = run.build(len(self.data.classes)).eval()
                with torch.no_grad():
                    model(torch.zeros(1, 3, self.data.image_size, self.data.image_size))
            except InputError as error:
                raise InputError(f"{choice.label} at {self.data.image_size} pixels: {error}") from None

    def _run(self, choice: NetworkChoice, seed: int) -> Run:
        settings = self.settings
        recipe = TrainSettings(
            epochs=self.epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            warmup_epochs=max(1, self.epochs // 10),
            augment=settings.augment,
            seed=seed,
            accelerator=settings.accelerator,
            devices=settings.devices,
            nodes=settings.nodes,
            strategy=settings.strategy,
        )
        folder = self.folder / "runs" / choice.folder / f"seed{seed}"
        return Run(choice.label, choice.backbone, choice.options(self.data.image_size), recipe, folder)

    def _train(self) -> None:
        """Train what is not trained, and read all results."""
        seeds = range(self.settings.seeds)
        runs = [self._run(choice, seed) for seed in seeds for choice in self.settings.choices]
        done = {run: self.epochs if run.finished else 0 for run in runs}
        self.progress.advance(sum(done.values()))

        def on_epoch(run: Run, epoch: Epoch) -> None:
            epochs = epoch["epoch"] + 1
            self.progress.advance(epochs - done[run])
            done[run] = epochs
            self.accuracies[run.label, run.settings.seed] = epoch["val_accuracy"]
            self._show(f"{run.label}, seed {run.settings.seed}, epoch {epochs} of {self.epochs}")

        waiting = sum(not run.finished for run in runs)
        if waiting:
            self._show(f"training {waiting} network{'s' * (waiting > 1)}, {self.epochs} epochs each")
        for run, result in train_runs(runs, self.data, on_epoch).items():
            self.progress.advance(self.epochs - done[run])
            if isinstance(result, DivergedError):
                self.failures[run.label] = f"seed {run.settings.seed}: {result}"
            else:
                self.fits.setdefault(run.label, []).append(result)
                self.accuracies[run.label, run.settings.seed] = result.accuracy

    def _show(self, doing: str) -> None:
        """Tell what runs, with the best so far."""
        best = max(self.accuracies, key=lambda run: self.accuracies[run], default=None)
        self.progress.show(doing, "" if best is None else f"{best[0]} {100 * self.accuracies[best]:.1f} %")

    def _finish(self, choice: NetworkChoice) -> dict[str, Any]:
        """A row of the results: costs and explanations of the network of seed 0."""
        row: dict[str, Any] = {"name": choice.label, "backbone": choice.backbone, "summary": choice.summary}
        if choice.label in self.failures:
            self.progress.advance(2 * _OTHER_PARTS)
            return {**row, "status": "failed", "error": self.failures[choice.label]}
        fits = self.fits[choice.label]
        weights = f"checkpoints/{choice.folder}.safetensors"
        _copy_checkpoint(fits[0].checkpoint, self.folder / weights)
        model = create_model(choice.backbone, pretrained=str(self.folder / weights)).eval()
        data, settings = self.data, self.settings

        def measure() -> dict[str, Any]:
            self._show(f"{choice.label}, measuring what it costs")
            return measure_part(model, data.image_size, settings.batch_size)

        def look() -> dict[str, Any]:
            self._show(f"{choice.label}, looking where it looks")
            return explain_part(model, data, self.folder, choice.folder, settings)

        costs, looks = self._once(choice, "costs", measure), self._once(choice, "looks", look)
        interval = accuracy_interval([fit.correct.numpy() for fit in fits])
        seeds = [
            {"seed": seed, "accuracy": fit.accuracy, "train_seconds": fit.seconds, "history": fit.history}
            for seed, fit in enumerate(fits)
        ]
        return {
            **row,
            "status": "done",
            "error": None,
            "accuracy": asdict(interval),
            "seeds": seeds,
            "train_seconds": sum(fit.seconds for fit in fits) / len(fits),
            **costs,
            **looks,
            "checkpoint": weights,
        }

    def _once(self, choice: NetworkChoice, part: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The part's file, made first if it is missing."""
        file = self.folder / "runs" / choice.folder / f"{part}.json"
        if not file.exists():
            write_whole(file, json.dumps(make(), indent=1).encode())
        self.progress.advance(_OTHER_PARTS)
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def _collect(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        data = self.data
        labels = data.val.labels
        results = {
            "schema": 1,
            "saccade": saccade.__version__,
            "command": self.command,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "compares": "network" if any(choice.mixer is None for choice in self.settings.choices) else "mixer",
            "settings": {
                **asdict(self.settings),
                "mixers": [choice.label for choice in self.settings.choices if choice.mixer is not None],
                "epochs": self.epochs,
                "image_size": data.image_size,
            },
            "versions": _versions(),
            "data": {
                "name": data.name,
                "classes": list(data.classes),
                "train": len(data.train),
                "val": len(data.val),
                "majority": labels.bincount().max().item() / len(labels),
                "skipped": [asdict(skipped) for skipped in data.skipped],
                "fingerprint": data.fingerprint,
            },
            "mixers": rows,
        }
        correct = {label: [fit.correct.numpy() for fit in fits] for label, fits in self.fits.items()}
        results["recommendation"] = recommend(results, correct)
        return results


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system lets go of however this process ends. Only the first process of several
    takes it: the others work for the same study."""
    if not is_first_process():
        yield
        return
    file = folder / ".study.lock"
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another study is running in {folder}: wait for it, or give another folder with --out"
        ) from None
    except OSError as error:
        raise saving_failed(file, error) from error
    try:
        yield
    finally:
        lock.release()


_OTHER_PARTS = 2.0  # epochs that measuring, or explaining, takes about as long as


def _copy_checkpoint(source: Path, target: Path) -> None:
    if not target.exists():
        make_folder(target.parent)
        for suffix in (".json", ".safetensors"):
            write_whole(target.with_suffix(suffix), source.with_suffix(suffix).read_bytes())


def _versions() -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    return {
        "saccade": saccade.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }
