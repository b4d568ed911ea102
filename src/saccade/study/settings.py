"""What a study is asked to do, and how a mixer with options is written on a command line."""

import ast
import re
from dataclasses import dataclass
from typing import Any

from saccade.errors import InputError, check_choice
from saccade.mixers import list_mixers

__all__ = ["MixerChoice", "StudySettings", "default_epochs", "parse_mixer", "parse_mixers"]


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
class StudySettings:
    """What decides the figures of a study; a folder holds one study.

    Args:
        data: as in `saccade.data.load_images`.
        mixers: names of mixers, with options where wanted: "window", "neighborhood(window_size=5)".
        backbone: a network of `list_models()` that takes a mixer.
        epochs: passes over the training images; None takes as many as make about 240 steps, from 5 to 30.
        image_size: pixels a side; None takes the data's own default.
        seeds: how many times each mixer is trained, with seeds 0, 1, ...
        batch_size, learning_rate, augment, accelerator, devices, nodes, strategy: as in TrainSettings.
        explained: held-out images on which faithfulness is measured.
        pictured: held-out images in the gallery, spread over the classes.
    """

    data: str
    mixers: tuple[str, ...]
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
        if not self.mixers:
            raise InputError(f"no mixer is named: give one or more of {', '.join(list_mixers())}")
        folders = [choice.folder for choice in self.choices]
        if len(set(folders)) < len(folders):
            raise InputError(f"mixers are {', '.join(self.mixers)}: one is named twice. Name each once")

    @property
    def choices(self) -> list[MixerChoice]:
        """The mixers, read."""
        return [parse_mixer(text) for text in self.mixers]


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
