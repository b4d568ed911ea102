"""Checkpoints: weights as safetensors with JSON beside them, written whole or not at all, read without running code."""

import argparse
import errno
import hashlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from saccade.errors import InputError, WorkError

__all__ = ["Checkpoint", "read_checkpoint", "save_checkpoint"]

_FORMAT = 1
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *_PICKLED)
_KINDS = " or ".join((", ".join(SUFFIXES[:-1]), SUFFIXES[-1]))
_REFUSED = {  # by the place; other errors are the disk's
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
_WRAPPERS = ("model_ema", "state_dict_ema", "state_dict", "model")  # averaged weights are the ones that were evaluated


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Weights read from a file.

    Args:
        state: the tensors by name, on the CPU.
        config: what `save_checkpoint` was given; empty for weights that somebody else saved.
    """

    state: dict[str, Tensor]
    config: dict[str, Any]


def save_checkpoint(path: str | Path, model: nn.Module | Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """Write the weights of `model` to PATH.safetensors and `config` to PATH.json.

    Each file replaces the one before in one step, and the JSON holds the digest of its weights: whatever interrupts
    the writing, a file that stands there is whole, and two files that do not belong together are noticed on reading.

    Args:
        path: PATH or PATH.safetensors; missing folders are made.
        model: a module, or its tensors by name. Tensors that share memory are each written in full.
        config: plain values for JSON, with which the model can be built again.

    Returns: PATH.safetensors.
    Raises: InputError if `config` is no JSON or the place cannot be written to; WorkError if the disk is full.
    """
    weights = Path(f"{str(path).removesuffix('.safetensors')}.safetensors")
    state = model.state_dict() if isinstance(model, nn.Module) else model
    data = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}, {"format": "pt"})
    about = {"format": _FORMAT, "sha256": hashlib.sha256(data).hexdigest(), "config": dict(config)}
    text = to_json("config", about)
    make_folder(weights.parent)
    write_whole(weights, data)
    write_whole(weights.with_suffix(".json"), text)
    return weights


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read weights without running any code that the file may hold.

    Args:
        path: a `.safetensors` file, with the JSON of `save_checkpoint` beside it or without; or a `.pt`, `.pth`,
            `.bin` or `.ckpt` file that `torch.load(weights_only=True)` accepts. Weights that lie inside
            "model_ema", "state_dict_ema", "state_dict" or "model" are taken out, in this order.

    Raises: InputError for a file that is missing, damaged, of another kind, or pickled with code in it.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path} is {'a folder' if path.is_dir() else 'not there'}: give a {_KINDS} file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _PICKLED:
        return Checkpoint(_unwrap(path, load_pickled(path)), {})
    raise InputError(f"checkpoint {path} has the suffix {path.suffix!r}: expected {_KINDS}")


def load_pickled(path: Path) -> Any:
    """Read what `torch.save` wrote, tensors and plain values only."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # training arguments lie in many official files
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise _damaged(path, "torch.save did not write it") from None
        raise InputError(
            f"checkpoint {path} is refused: it is pickled with code in it ({code[1]}), which loading would run. If you "
            f"trust where it comes from, convert it once: torch.save(torch.load({path.name!r}, weights_only=False)"
            "['state_dict'], 'weights.pth'), with the key under which its weights lie"
        ) from None
    except Exception as error:  # torch meets garbage with errors of many kinds
        raise _damaged(path, str(error).partition("\n")[0]) from None


def _read_safetensors(path: Path) -> Checkpoint:
    data = path.read_bytes()
    beside = path.with_suffix(".json")
    config = _read_config(path, beside, data) if beside.is_file() else {}
    try:
        return Checkpoint(dict(sorted(load(data).items())), config)  # the file keeps no order
    except SafetensorError as error:
        raise _damaged(path, str(error)) from None


def _read_config(path: Path, beside: Path, data: bytes) -> dict[str, Any]:
    try:
        about = json.loads(beside.read_text())
        version, digest, config = about["format"], about["sha256"], dict(about["config"])
    except (ValueError, KeyError, TypeError):
        raise _damaged(beside, "it is not the JSON that save_checkpoint writes") from None
    if version != _FORMAT:
        raise InputError(f"{beside} has format {version}, this saccade reads {_FORMAT}: update saccade")
    if hashlib.sha256(data).hexdigest() != digest:
        raise InputError(
            f"{path} and {beside.name} do not belong together: the digest differs, so one of them was cut short or "
            "replaced. Copy both again from where they were saved"
        )
    return config


def _unwrap(path: Path, content: Any) -> dict[str, Tensor]:
    outer = content if isinstance(content, dict) else {}
    state = next((outer[key] for key in _WRAPPERS if isinstance(outer.get(key), dict)), outer)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"the keys {', '.join(map(str, list(outer)[:8]))}" if outer else f"a {type(content).__name__}"
        raise InputError(
            f"checkpoint {path} holds {found}, but no tensors by name, neither outside nor in {', '.join(_WRAPPERS)}: "
            "save model.state_dict()"
        )
    return dict(state)


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"{path} is damaged or not a checkpoint ({why}): copy or save it again")


def to_json(what: str, values: Mapping[str, Any]) -> bytes:
    """Encode plain values; InputError if they are not plain."""
    try:
        return json.dumps(values, indent=1).encode()
    except TypeError as error:
        raise InputError(f"{what} cannot be written as JSON: {error}. Give numbers, strings, lists and dicts") from None


def make_folder(folder: Path) -> None:
    """Make `folder` and those above it; InputError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise saving_failed(folder, error) from error


def write_whole(path: Path, data: bytes) -> None:
    """Replace the content of `path`: it holds the old or the new one whole, even after a crash."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise saving_failed(path, error) from error


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and the rename is as durable as it gets
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def saving_failed(path: Path, error: OSError) -> InputError | WorkError:
    """Tell a place that cannot be written to (the call was wrong) from a full or broken disk (the work failed)."""
    if error.errno in _REFUSED:
        return InputError(f"{path} cannot be written: {error.strerror}. Choose a folder in which you may write")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        why, remedy = "the disk is full", "Make room"
    else:
        why, remedy = str(error), "Check the disk"
    return WorkError(
        f"{path} could not be written: {why}. What was saved before is intact. {remedy} and start again with the same "
        "command, or choose a folder on another disk"
    )
