"""Whole networks by name. Each family's file ends with a table of its variants; together they are the registry."""

import inspect
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from saccade.backbones import (
    agent,
    biformer,
    convit,
    davit,
    dhvt,
    focalnet,
    halonet,
    maxvit,
    moat,
    overlock,
    sparsifiner,
    study,
    transnext,
    volo,
)
from saccade.backbones.agent import AgentCSwin, AgentDeiT, AgentPVT, AgentPyramid, AgentSwin
from saccade.backbones.backbone import Backbone, FeatureExtractor, FeatureInfo
from saccade.backbones.biformer import BiFormer
from saccade.backbones.convit import ConViT
from saccade.backbones.davit import DaViT
from saccade.backbones.dhvt import DHVT
from saccade.backbones.dynamic_aggregation import (
    DualPathShuffle,
    DynamicAggregation,
    DynamicFusionBlock,
    FrequencyRefinement,
    SpatialGatedUnit,
)
from saccade.backbones.feed_forward import ConvolutionalGLU
from saccade.backbones.focalnet import FocalNet
from saccade.backbones.halonet import HaloNet
from saccade.backbones.hybrid_perception import HybridPerceptionBlock
from saccade.backbones.isotropic import Isotropic
from saccade.backbones.maxvit import MaxViT
from saccade.backbones.moat import MOAT
from saccade.backbones.overlock import OverLoCK, OverLoCKOutput, OverLoCKStages
from saccade.backbones.sparsifiner import Sparsifiner
from saccade.backbones.study import StudyNet
from saccade.backbones.transnext import TransNeXt
from saccade.backbones.variant import ModelSummary, Variant
from saccade.backbones.volo import VOLO, DenseLogits
from saccade.backbones.weights import LoadedModel, fit_weights, load_model, load_weights, read_weights
from saccade.errors import InputError, check_choice, nearest
from saccade.registry import describe

__all__ = [
    "DHVT",
    "MOAT",
    "VOLO",
    "AgentCSwin",
    "AgentDeiT",
    "AgentPVT",
    "AgentPyramid",
    "AgentSwin",
    "Backbone",
    "BiFormer",
    "ConViT",
    "ConvolutionalGLU",
    "DaViT",
    "DenseLogits",
    "DualPathShuffle",
    "DynamicAggregation",
    "DynamicFusionBlock",
    "FeatureExtractor",
    "FeatureInfo",
    "FocalNet",
    "FrequencyRefinement",
    "HaloNet",
    "HybridPerceptionBlock",
    "Isotropic",
    "LoadedModel",
    "MaxViT",
    "ModelSummary",
    "OverLoCK",
    "OverLoCKOutput",
    "OverLoCKStages",
    "Sparsifiner",
    "SpatialGatedUnit",
    "StudyNet",
    "TransNeXt",
    "Variant",
    "closest_model",
    "create_model",
    "describe_model",
    "list_models",
    "list_options",
    "load_model",
]

_FAMILIES = (
    agent,
    biformer,
    convit,
    davit,
    dhvt,
    focalnet,
    halonet,
    maxvit,
    moat,
    overlock,
    sparsifiner,
    study,
    transnext,
    volo,
)


def list_models(pattern: str = "*") -> list[str]:
    """List the networks that `create_model` builds, those that match a shell pattern.

    >>> list_models("study_x*")
    ['study_xs', 'study_xxs']
    """
    return sorted(name for name in _variants() if fnmatch(name, pattern))


def list_options(name: str) -> list[str]:
    """List the arguments that `create_model` passes on to a network, besides num_classes and in_chans.

    >>> "mixer" in list_options("study_xxs"), "mixer" in list_options("convit_tiny")
    (True, False)
    """
    check_choice("model", name, _variants())
    return sorted(set(inspect.signature(_variants()[name].build).parameters) - {"num_classes", "in_chans"})


def describe_model(name: str) -> ModelSummary:
    """Say how large a network is and what it was made for; nothing is allocated.

    >>> describe_model("halonet_h1").params
    8100056
    """
    check_choice("model", name, _variants())
    variant = _variants()[name]
    with torch.device("meta"):
        model = variant.build(num_classes=1000, in_chans=3)
    return ModelSummary(
        family=_family(name).__name__.rpartition(".")[2],
        summary=describe(type(model)),
        params=sum(parameter.numel() for parameter in model.parameters()),
        image_size=variant.image_size,
        channels=model.feature_info.channels(),
        reductions=model.feature_info.reduction(),
        weights=variant.weights,
        default_cfg=variant.default_cfg(name, model),
        refuses=model.refuses,
    )


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
        pretrained: a path or hub id of weights, ours or official ones; False starts from random ones. True asks for
            the published weights of the network.
        num_classes: classes; None takes those of the weights, and 1000 without. Where it differs from the weights'
            the classifier starts from random numbers. 0 leaves it out.
        in_chans: channels of the images. The first convolution of weights for other channels is adapted: summed for
            one, repeated and scaled for more.
        features_only: return the maps of all stages, a list of (B, C, H, W); `out_indices` in options chooses.
        options: arguments of the network, such as drop_path_rate, and for every network `global_pool` and `drop_rate`
            (dropout before the classifier). Weights that this library saved bring their own.

    Raises: InputError for unknown names and options, with the nearest ones, and for weights of another architecture.

    >>> model = create_model("study_xxs", num_classes=10, mixer="window")
    >>> model.num_features
    64
    """
    check_choice("model", name, _variants())
    variant, weights = _variants()[name], None
    if pretrained:
        if pretrained is True:
            if variant.weights is None:
                raise InputError(f"pretrained is True: {name} has no published weights. Give a path or a hub id")
            pretrained = variant.weights
        weights = read_weights(pretrained)
        saved = weights.config.get("model", name)
        if saved != name:
            raise InputError(f"{pretrained} holds weights of {saved}, not of {name}. Call create_model({saved!r}, ...)")
        options = {**weights.config.get("options", {}), **options}
        if num_classes is None and "classes" in weights.config:
            num_classes = len(weights.config["classes"])
    out_indices = options.pop("out_indices", None)
    drop_rate, global_pool = options.pop("drop_rate", 0.0), options.pop("global_pool", None)
    known = list_options(name)
    for option in options:
        if option not in known:
            raise InputError(f"{name} has no option {option!r}: {nearest(option, known)}")
    model = variant.build(num_classes=1000 if num_classes is None else num_classes, in_chans=in_chans, **options)
    model.drop_rate, model.default_cfg = drop_rate, variant.default_cfg(name, model)
    if global_pool is not None:
        model.reset_classifier(model.num_classes, global_pool)
    if weights is not None:
        load_weights(model, weights.state, str(pretrained), classes=num_classes is None)
    return FeatureExtractor(model, out_indices) if features_only else model


def closest_model(state: Mapping[str, Tensor], like: Backbone | None = None) -> str | None:
    """Name the network whose parameters have the most names and shapes of a state dict; None if few agree.

    Args:
        state: tensors by name, ours or official ones.
        like: networks of its family are asked first; one that agrees in all ends the search.
    """
    families = sorted(_FAMILIES, key=lambda family: like is not None and family.__name__ != type(like).__module__)
    best, name = 0.5, None
    for family in families:
        for candidate, variant in family.VARIANTS.items():
            with torch.device("meta"):
                model = variant.build(num_classes=1000, in_chans=3)
                given = {key: tensor.shape for key, tensor in fit_weights(model, _on_meta(state)).items()}
            own = {key: tensor.shape for key, tensor in model.state_dict().items()}
            agreement = len(own.items() & given.items()) / len(own | given)
            if agreement > best:
                best, name = agreement, candidate
        if name is not None and like is not None:
            break
    return name


def _on_meta(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in state.items()}


def _variants() -> dict[str, Variant]:
    return {name: variant for family in _FAMILIES for name, variant in family.VARIANTS.items()}


def _family(name: str) -> ModuleType:
    return next(family for family in _FAMILIES if name in family.VARIANTS)
