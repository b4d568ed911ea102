"""Whole networks by name. Each family's file ends with a table of its variants; together they are the registry."""

import inspect
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from saccade.backbones import study
from saccade.backbones.backbone import Backbone, FeatureExtractor, FeatureInfo
from saccade.backbones.study import StudyNet
from saccade.backbones.weights import LoadedModel, load_model, load_weights, read_weights
from saccade.errors import InputError, check_choice, nearest

__all__ = [
    "Backbone",
    "FeatureExtractor",
    "FeatureInfo",
    "LoadedModel",
    "StudyNet",
    "create_model",
    "list_models",
    "load_model",
]

_FAMILIES = (study,)


def list_models(pattern: str = "*") -> list[str]:
    """List the networks that `create_model` builds, those that match a shell pattern.

    >>> list_models("study_x*")
    ['study_xs', 'study_xxs']
    """
    return sorted(name for name in _variants() if fnmatch(name, pattern))


def create_model(
    name: str,
    pretrained: bool | str | Path = False,
    num_classes: int | None = None,
    in_chans: int = 3,
    features_only: bool = False,
    **options: Any,
) -> Backbone | FeatureExtractor:
    """Build a network by name.

    Args:
        name: one of `list_models()`.
        pretrained: a path or hub id of weights; False starts from random ones. True asks for the default weights of
            a published network.
        num_classes: classes; None takes those of the weights, and 1000 without. Where it differs from the weights'
            the classifier starts from random numbers. 0 leaves it out.
        in_chans: channels of the images.
        features_only: return the maps of all stages, a list of (B, C, H, W); `out_indices` in options chooses.
        options: arguments of the network, such as drop_path_rate; weights that this library saved bring their own.

    Raises: InputError for unknown names and options, with the nearest ones, and for weights of another architecture.

    >>> model = create_model("study_xxs", num_classes=10, mixer="window")
    >>> model.num_features
    64
    """
    check_choice("model", name, _variants())
    weights = None
    if pretrained:
        if pretrained is True:
            raise InputError(f"pretrained is True: {name} has no published weights. Give a path or a hub id")
        weights = read_weights(pretrained)
        saved = weights.config.get("model", name)
        if saved != name:
            raise InputError(f"{pretrained} holds weights of {saved}, not of {name}. Call create_model({saved!r}, ...)")
        options = {**weights.config.get("options", {}), **options}
        if num_classes is None and "classes" in weights.config:
            num_classes = len(weights.config["classes"])
    build = _variants()[name]
    out_indices = options.pop("out_indices", None)
    known = set(inspect.signature(build).parameters) - {"num_classes", "in_chans"}
    for option in options:
        if option not in known:
            raise InputError(f"{name} has no option {option!r}: {nearest(option, known)}")
    model = build(num_classes=1000 if num_classes is None else num_classes, in_chans=in_chans, **options)
    if weights is not None:
        load_weights(model, weights.state, str(pretrained))
    return FeatureExtractor(model, out_indices) if features_only else model


def _variants() -> dict[str, Callable[..., Backbone]]:
    return {name: build for family in _FAMILIES for name, build in family.VARIANTS.items()}
