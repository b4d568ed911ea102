"""What a study is asked to compare and how, and how a mixer with options is written on a command line."""

import ast
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from saccade.backbones import describe_model, list_models, list_options
from saccade.errors import InputError, check_choice
from saccade.mixers import describe_mixer, list_mixers

__all__ = ["MixerChoice", "NetworkChoice", "StudySettings", "default_epochs", "parse_mixer", "parse_mixers"]


DEFAULT_MIXERS = ("attention", "window", "grid", "halo", "neighborhood", "agent", "depthwise_conv", "pooling")
STEPS = 240  # of a training run whose number of epochs was left open


@dataclass(frozen=True)
class MixerChoice:
    """A mixer and its options, as `neighborhood(window_size=5)` is read.

    Attributes:
        label: how it was written; the name in tables and pictures.
        name: what `create_mixer` takes.
        options: its options.
    """

    label: str
    name: str
    options: dict[str, Any]

    @property
    def folder(self) -> str:
        """The label as the name of a file."""
        return re.sub(r"[^\w.-]+", "_", self.label).strip("_")


@dataclass(frozen=True)
class NetworkChoice:
    """A network that is trained: one into which a mixer is put, or one whose mixers are its own.

    Attributes:
        backbone: one of `list_models()`.
        mixer: what is put into it; None where its mixers are its own.
    """

    backbone: str
    mixer: MixerChoice | None

    @classmethod
    def of(cls, backbone: str, mixer: str | None) -> "NetworkChoice":
        """Read the names.

        Raises: InputError for an unknown one, and for a mixer that the network does not take.
        """
        if mixer is not None and not takes_mixer(backbone):
            raise InputError(
                f"mixer is {mixer!r}, but {backbone} has mixers of its own: leave the mixer out, or take a network "
                f"into which one is put: {', '.join(filter(takes_mixer, list_models()))}"
            )
        if mixer is None and takes_mixer(backbone):
            mixer = "attention"
        return cls(backbone, None if mixer is None else parse_mixer(mixer))

    @property
    def label(self) -> str:
        """The name in tables and pictures: the mixer's where there is a choice of it, else the network's."""
        return self.backbone if self.mixer is None else self.mixer.label

    @property
    def folder(self) -> str:
        """The label as the name of a file."""
        return self.backbone if self.mixer is None else self.mixer.folder

    @property
    def summary(self) -> str:
        """What is compared, in a sentence."""
        return describe_model(self.backbone).summary if self.mixer is None else describe_mixer(self.mixer.name)

    def options(self, image_size: int) -> dict[str, Any]:
        """For `create_model`: the mixer, and the size of the images where the network is built for one."""
        if self.mixer is not None:
            return {"mixer": self.mixer.name, "mixer_options": self.mixer.options}
        return {"image_size": image_size} if "image_size" in list_options(self.backbone) else {}


def takes_mixer(backbone: str) -> bool:
    """Whether a mixer is put into a network, rather than its own."""
    return "mixer" in list_options(backbone)


@dataclass(frozen=True)
class StudySettings:
    """What decides the figures of a study; a folder holds one study.

    Args:
        data: as in `saccade.data.load_images`.
        mixers: names of mixers, with options where wanted: "window", "neighborhood(window_size=5)". None takes
            `DEFAULT_MIXERS` where a network takes a mixer.
        backbone: networks of `list_models()`, with commas between: one that takes each mixer in turn, such as
            study_xxs, any number of those whose mixers are their own, or both.
        epochs: passes over the training images; None takes as many as make about 240 steps, from 5 to 30.
        image_size: pixels a side; None takes the data's own default.
        seeds: how many times each mixer is trained, with seeds 0, 1, ...
        batch_size, learning_rate, augment, accelerator, devices, nodes, strategy: as in TrainSettings.
        explained: held-out images on which faithfulness is measured.
        pictured: held-out images in the gallery, spread over the classes.
    """

    data: str
    mixers: tuple[str, ...] | None = None
    backbone: str = "study_xxs"
    epochs: int | None = None
    image_size: int | None = None
    seeds: int = 2
    batch_size: int = 64
    learning_rate: float = 3e-3
    augment: str = "light"
    accelerator: str = "auto"
    devices: int | str = "auto"
    nodes: int = 1
    strategy: str = "auto"
    explained: int = 24
    pictured: int = 10

    def __post_init__(self) -> None:
        for name in ("seeds", "batch_size", "explained", "pictured"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give a whole number of at least 1")
        if self.epochs is not None and self.epochs < 1:
            raise InputError(f"epochs is {self.epochs}: give a whole number of at least 1")
        if self.mixers is not None and not self.mixers:
            raise InputError(f"no mixer is named: give one or more of {', '.join(list_mixers())}")
        folders = [choice.folder for choice in self.choices]
        if len(set(folders)) < len(folders):
            given = f"mixers are {', '.join(self.mixers)}" if self.mixers else f"backbone is {self.backbone}"
            raise InputError(f"{given}: one is named twice. Name each once")

    @cached_property
    def choices(self) -> list[NetworkChoice]:
        """What is compared, read, in the order in which it was named."""
        names = [name.strip() for name in self.backbone.split(",") if name.strip()]
        for name in names or [self.backbone]:
            check_choice("backbone", name, list_models())
        free = [name for name in names if takes_mixer(name)]
        if len(set(free)) > 1:
            raise InputError(
                f"backbone is {self.backbone}: {' and '.join(free)} take a mixer each, and mixers are compared in one "
                "network. Name one of them"
            )
        if self.mixers is not None and not free:
            return [NetworkChoice.of(names[0], self.mixers[0])]  # says what is wrong
        mixers = DEFAULT_MIXERS if self.mixers is None else self.mixers
        return [NetworkChoice.of(name, mixer) for name in names for mixer in (mixers if takes_mixer(name) else (None,))]

    @property
    def free_backbone(self) -> str | None:
        """The network into which each mixer is put in turn, if there is one."""
        return next((choice.backbone for choice in self.choices if choice.mixer is not None), None)


def default_epochs(images: int, batch_size: int) -> int:
    """Passes over the images that make about 240 steps, from 5 to 30.

    >>> default_epochs(1438, 64)
    10
    """
    return max(5, min(30, round(STEPS / -(-images // batch_size))))


def parse_mixers(text: str | None) -> tuple[str, ...]:
    """Split a comma-separated list of mixers, where options in brackets may have commas of their own.

    None takes the eight that a first look needs: `DEFAULT_MIXERS`; "all" takes every mixer there is.

    >>> parse_mixers("window, neighborhood(window_size=(3, 5), dilation=2)")
    ('window', 'neighborhood(window_size=(3, 5), dilation=2)')
    """
    if text is None:
        return DEFAULT_MIXERS
    if text.strip() == "all":
        return tuple(list_mixers())
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return tuple(part.strip() for part in parts if part.strip())


def parse_mixer(text: str) -> MixerChoice:
    """Read a mixer with its options.

    >>> parse_mixer("neighborhood(window_size=5)").options
    {'window_size': 5}
    """
    name, bracket, _ = text.partition("(")
    check_choice("mixer", name.strip(), list_mixers())
    return MixerChoice(text, name.strip(), _parse_options(text) if bracket else {})


def _parse_options(text: str) -> dict[str, Any]:
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        raise InputError(
            f"mixer is {text!r}: write a name, or name(option=value), such as neighborhood(window_size=5)"
        ) from None
