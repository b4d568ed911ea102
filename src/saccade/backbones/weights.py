"""Weights into networks: from a file or a hub, checked by name and shape before anything is copied."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

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


def load_weights(model: "Backbone", state: Mapping[str, Tensor], source: str, *, classes: bool = False) -> None:
    """Copy weights into a network, official ones too; a classifier for another number of classes is left as it is.

    The first convolution is adapted to other channels of the images, and positions to another image size.

    Args:
        model: the network.
        state: tensors by name, official or ours.
        source: where they come from, for errors.
        classes: take the number of classes from the weights.

    Raises: InputError that names the first tensors that are missing, unexpected or of another shape, and the network
        that they fit best.
    """
    given = fit_weights(model, state)
    own = model.state_dict()
    head = {name for name in own if _is_classifier(model, name)}
    if classes and head and head <= given.keys():
        rows = {len(given[name]) for name in head}
        if len(rows) == 1 and rows != {model.num_classes}:
            model.reset_classifier(rows.pop())
            own = model.state_dict()
    if not head <= given.keys() or any(given[name].shape != own[name].shape for name in head):
        given = {name: tensor for name, tensor in given.items() if not _is_classifier(model, name)}
        given |= {name: own[name] for name in head}
    given = {name: tensor for name, tensor in given.items() if name in own or not _is_classifier(model, name)}
    counters = {name: own[name] for name in own if name.endswith("num_batches_tracked") and name not in given}
    given |= counters  # older checkpoints have none
    problems = _differences(own, given)
    if problems:
        raise InputError(f"{source} holds weights of another architecture; {problems}. {_advise(model, state)}")
    with torch.no_grad():
        model.load_state_dict(given)


def fit_weights(model: "Backbone", state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the network's names; tensors that depend on channels or image size in its shapes.

    A state dict that has all the network's names is taken as it is, any other one goes through its `rename`.
    """
    own = model.state_dict()
    if all(name.startswith("module.") for name in state):  # as DistributedDataParallel saves it
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    missing = own.keys() - state.keys()
    official = any(not _is_classifier(model, name) and not name.endswith("num_batches_tracked") for name in missing)
    state = model.rename(state) if official else dict(state)
    for name in own.keys() & state.keys():
        if state[name].shape != own[name].shape:
            if name == f"{model.first_conv}.weight":
                state[name] = _adapt_channels(state[name], model.in_chans)
            else:
                state[name] = model.refit(name, state[name], tuple(own[name].shape))
    return state


def _adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """A first convolution (O, I, kh, kw) for other images: the sum over channels for one, otherwise repeated, scaled so
    that equal channels give what they gave."""
    before = weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)
    repeated = weight.repeat(1, -(-channels // before), 1, 1)[:, :channels]
    return repeated * (before / channels)


def _is_classifier(model: "Backbone", name: str) -> bool:
    return name.startswith(tuple(f"{layer}." for layer in model.classifiers))


def _differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """The first names that one side lacks, or whose shapes differ; "" if there are none."""
    misshapen = [name for name in own if name in given and given[name].shape != own[name].shape]
    shapes = [f"{name} is {tuple(given[name].shape)}, not {tuple(own[name].shape)}" for name in misshapen]
    missing = [name for name in own if name not in given]
    unexpected = [name for name in given if name not in own]
    return "; ".join(
        f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    )


def _advise(model: "Backbone", state: Mapping[str, Tensor]) -> str:
    """What to do with weights that do not fit: the network that they fit best, or the options of training."""
    from saccade.backbones import closest_model

    name = closest_model(state, like=model)
    if name is None or name == model.default_cfg.get("architecture"):
        return "Build the network with the options that it was trained with"
    return f"The closest network is {name}: saccade.create_model({name!r}, pretrained=...)"
