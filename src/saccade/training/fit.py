"""fit: train a network on images, and go on from where it was if it was stopped."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saccade.data import ImageData
from saccade.errors import InputError
from saccade.training.checkpoint import (
    load_pickled,
    make_folder,
    read_checkpoint,
    save_checkpoint,
    to_json,
    write_whole,
)
from saccade.training.launch import is_first_process, launch
from saccade.training.settings import TrainSettings

__all__ = ["FitResult", "fit"]

MACHINES = ("accelerator", "devices", "nodes", "strategy")  # a run may go on on others, though not to the same bits


@dataclass(frozen=True, eq=False)
class FitResult:
    """What came out of a training run.

    Args:
        accuracy: share of the validation images that the averaged weights get right after the last epoch.
        correct: (N_val,) bool, the same image by image, in the order of the dataset.
        predicted: (N_val,) the class that each was taken for.
        seconds: spent on training and validation, all parts of a run that was stopped in between added up.
        history: for each epoch (from 0) `epoch`, `train_loss`, `val_loss`, `val_accuracy` and `seconds` so far.
        checkpoint: the averaged weights, for `read_checkpoint`.
    """

    accuracy: float
    correct: Tensor
    predicted: Tensor
    seconds: float
    history: list[dict[str, Any]]
    checkpoint: Path


def fit(
    model: nn.Module,
    data: ImageData,
    settings: TrainSettings,
    folder: str | Path,
    *,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    config: Mapping[str, Any] | None = None,
) -> FitResult:
    """Train `model` and leave in `folder` its weights, Lightning's checkpoint and the result.

    Stopped at any moment and called again with the same arguments, it goes on after the last finished epoch; on a CPU
    with the same number of threads it then ends with the same bits. A finished run returns at once.

    Args:
        model: takes normalised images (B, 3, S, S), returns logits (B, classes). Afterwards it holds the averaged
            weights and is in evaluation mode.
        data: the images; training shuffles and augments them.
        settings: the recipe and the devices. Several devices get a process each; see `TrainSettings`.
        folder: made if missing. Holds `model.safetensors` and `model.json` (averaged weights, for `read_checkpoint`),
            `last.ckpt` (Lightning's, to go on from), `result.json`, and `run.json` (what the run is).
        on_epoch: called once an epoch is saved, in the first process, with the entries of `history` and `epochs`.
        config: what `save_checkpoint` keeps beside the weights: `model` and `options` to build it again. Classes,
            image size, mean and standard deviation are added from `data`.

    Raises: InputError if `folder` belongs to another run, cannot be written to, or the devices are not there; WorkError
        if the loss becomes NaN or the disk is full.
    """
    folder = Path(folder)
    config = {**_describe(data), **(config or {})}
    _claim(folder, _identify(model, data, settings, config))
    result = _read_result(folder, model)
    if result is None:
        last = folder / "last.ckpt"
        if not last.exists() or len(_read_last(last)["saccade"]["history"]) < settings.epochs:
            launch(model, data, settings, last, on_epoch)
        result = _finish(folder, model, config)
    model.eval()
    return result


def _describe(data: ImageData) -> dict[str, Any]:
    sizes = {"image_size": data.image_size, "mean": list(data.mean), "std": list(data.std)}
    return {"classes": list(data.classes), **sizes}


def _identify(model: nn.Module, data: ImageData, settings: TrainSettings, config: dict[str, Any]) -> dict[str, Any]:
    """Say what the run is, in plain values: two runs are the same if all of them are."""
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in model.state_dict().items()]
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
    recipe = {name: value for name, value in asdict(settings).items() if name not in MACHINES}
    run = {**recipe, "data": data.fingerprint, "weights": digest, "config": config}
    return json.loads(to_json("config", run))


def _claim(folder: Path, run: dict[str, Any]) -> None:
    """Mark `folder` as this run's, or raise if it is another's."""
    make_folder(folder)
    file = folder / "run.json"
    if not file.exists():
        if (folder / "last.ckpt").exists():
            raise InputError(f"{folder} holds a last.ckpt of something else: choose another folder")
        if is_first_process():
            write_whole(file, to_json("config", run))
        return
    try:
        before = json.loads(file.read_text())
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise InputError(f"{file} is damaged: choose another folder, or empty this one")
    names = sorted(name for name in {*before, *run} if before.get(name) != run.get(name))
    if names:
        changes = "; ".join(f"{name} was {before.get(name)!r} and is {run.get(name)!r}" for name in names)
        raise InputError(f"{folder} belongs to a run with other settings ({changes}): choose another folder")


def _read_last(path: Path) -> dict[str, Any]:
    try:
        return load_pickled(path)
    except InputError as error:
        raise InputError(f"{error}. To start this run anew, remove {path}") from None


def _finish(folder: Path, model: nn.Module, config: dict[str, Any]) -> FitResult:
    """Turn the last epoch's checkpoint, which all processes can read, into weights and result."""
    last = _read_last(folder / "last.ckpt")
    prefix = "model."
    state = {name.removeprefix(prefix): value for name, value in last["average"].items() if name.startswith(prefix)}
    model.load_state_dict(state)
    record = last["saccade"]
    if is_first_process():
        save_checkpoint(folder / "model", state, config)
        values = {name: record[name].tolist() for name in ("predicted", "correct")}
        write_whole(folder / "result.json", to_json("result", {"history": record["history"], **values}))
    return _make_result(folder, **record)


def _read_result(folder: Path, model: nn.Module) -> FitResult | None:
    """Read a finished run and put its weights into `model`; None if it is not finished."""
    file = folder / "result.json"
    if not file.exists() or not (folder / "model.safetensors").exists():
        return None
    model.load_state_dict(read_checkpoint(folder / "model.safetensors").state)
    record = json.loads(file.read_text())
    return _make_result(
        folder, record["history"], torch.tensor(record["predicted"]), torch.tensor(record["correct"], dtype=torch.bool)
    )


def _make_result(folder: Path, history: list[dict[str, Any]], predicted: Tensor, correct: Tensor) -> FitResult:
    last = history[-1]
    return FitResult(last["val_accuracy"], correct, predicted, last["seconds"], history, folder / "model.safetensors")
