"""Weights into networks: from a file or a hub, checked by name and shape before anything is copied."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from saccade.errors import InputError
from saccade.training.checkpoint import SUFFIXES, Checkpoint, read_checkpoint

if TYPE_CHECKING:
    from saccade.backbones.backbone import Backbone

__all__ = ["LoadedModel", "load_model", "load_weights", "read_weights"]

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


class LoadedModel(NamedTuple):
    """A network built from a checkpoint of this library.

    Attributes:
        model: in eval mode.
        config: what was saved with it: model, options, classes, image_size, mean, std.
    """

    model: "Backbone"
    config: dict[str, Any]


def load_model(path: str | Path) -> LoadedModel:
    """Build the network that a checkpoint of `saccade study` or `saccade train` holds, ready to run.

    Args:
        path: the .safetensors file, with its .json beside it.

    Raises: InputError if the file cannot be read or does not say which network it holds.
    """
    from saccade.backbones import Backbone, create_model

    config = read_checkpoint(path).config
    if "model" not in config:
        raise InputError(
            f"{path} does not say which network it holds: its .json is missing or was not written by saccade. "
            "Build the network with saccade.create_model(name, pretrained=path)"
        )
    model = create_model(config["model"], pretrained=str(path))
    assert isinstance(model, Backbone)
    return LoadedModel(model.eval(), config)


def read_weights(source: str | Path) -> Checkpoint:
    """Read a checkpoint from a path, or from a hub id such as "owner/name" where no such path exists."""
    path, source = Path(source).expanduser(), str(source)
    if path.exists() or path.suffix in SUFFIXES or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        return read_checkpoint(path)
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise InputError(
            f"{source} is no file here. To look for it on the hub, install the extra: pip install 'saccade[hub]'"
        ) from None
    for name in _HUB_FILES:
        try:
            return read_checkpoint(hf_hub_download(source, name))
        except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                continue  # the repository is there, without this file
            raise InputError(f"{source} is no file here, and the hub did not answer: {error}. Give a path") from None
    raise InputError(f"{source} is no file here, and on the hub it has none of {', '.join(_HUB_FILES)}")


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a network; a classifier for another number of classes is left as it is.

    Raises: InputError that names the first tensors that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    head = {name for name in own if name.startswith("head.")}
    resized = {name for name in head if name in state and state[name].shape != own[name].shape}
    wanted = set(own) - (head if resized or not head <= set(state) else set())
    given = set(state) - {name for name in state if name.startswith("head.") and (name in resized or name not in own)}
    given -= head - wanted
    misshapen = {name for name in wanted & given if state[name].shape != own[name].shape}
    problems = [
        f"{what}: {', '.join(sorted(names)[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (
            ("missing", wanted - given),
            ("unexpected", given - wanted),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise InputError(
            f"{source} holds weights of another architecture; {'; '.join(problems)}. "
            "Build the network with the options that it was trained with"
        )
    with torch.no_grad():
        model.load_state_dict({name: state[name] if name in wanted else own[name] for name in own})
