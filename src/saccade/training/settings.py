"""TrainSettings: everything that decides how a network is trained, checked when it is made."""

import math
import re
from dataclasses import dataclass

from saccade.data.augment import LEVELS
from saccade.errors import InputError, check_choice

__all__ = ["TrainSettings"]

_CHOICES = {
    "augment": LEVELS,
    "precision": ("auto", "32", "bf16-mixed", "16-mixed"),
    "accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
    "strategy": ("auto", "ddp", "fsdp"),
}
_WHOLE = {"epochs": 1, "batch_size": 1, "nodes": 1, "seed": 0}  # name: least value
_REAL = {  # name: all are from 0 up and below this
    "learning_rate": math.inf,
    "weight_decay": math.inf,
    "warmup_epochs": math.inf,
    "label_smoothing": 1.0,
    "clip_norm": math.inf,
    "ema_decay": 1.0,
}


@dataclass(frozen=True)
class TrainSettings:
    """How to train: the recipe (AdamW, cosine schedule, averaged weights) and the machines that run it.

    Args:
        epochs: passes over the training images.
        batch_size: images a step, over all devices together, so that the result does not depend on their number.
        learning_rate: the peak, reached after the warm-up; half a cosine then takes it down to zero.
        weight_decay: of matrices and filters; norms, biases, one-dimensional parameters and those which the model
            names in `no_weight_decay()` have none.
        warmup_epochs: of linear warm-up, at most half of the training; may be a fraction.
        label_smoothing: share of the target that is spread over all classes.
        clip_norm: largest norm of the gradient; 0 leaves it as it is.
        ema_decay: of the exponential moving average of the weights, which is what gets validated and saved. After n
            steps the decay is at most (1 + n) / (10 + n), so that a short run is not held at its first weights.
            0 takes the weights as they are.
        augment: level of `saccade.data.Augment`: "light" suits letters and signs, "standard" photos.
        precision: "auto" is bfloat16 mixed on a GPU that has it, float16 mixed on other GPUs, float32 elsewhere.
        seed: of the order of the images, the augmentation and dropout.
        accelerator: "auto" takes a GPU where there is one.
        devices: on each machine: a number, "auto" (all GPUs, or one CPU process), or GPU indices such as "0,2".
        nodes: machines. Start the program on each with torchrun or srun, or by hand with the variables MASTER_ADDR,
            MASTER_PORT and NODE_RANK; all must see the same folder.
        strategy: how several devices share the work: "ddp", or "fsdp", which also shares out weights and optimizer.
            "auto" is ddp.

    Raises: InputError, which names the setting.
    """

    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 2
    label_smoothing: float = 0.1
    clip_norm: float = 1.0
    ema_decay: float = 0.99
    augment: str = "light"
    precision: str = "auto"
    seed: int = 0
    accelerator: str = "auto"
    devices: int | str = "auto"
    nodes: int = 1
    strategy: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"{name} is {value!r}: give a whole number, {least} or more")
        for name, limit in _REAL.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < limit:
                below = "" if limit == math.inf else f" and below {limit:g}"
                raise InputError(f"{name} is {value!r}: give a number, 0 or more{below}")
        if self.learning_rate == 0:
            raise InputError("learning_rate is 0, so nothing would be learnt: give a number above 0, such as 0.001")
        device_indices(self.devices)


def device_indices(devices: int | str) -> list[int] | None:
    """Read the setting `devices`: its indices, or None for "auto".

    >>> device_indices(2), device_indices("2"), device_indices("0,2"), device_indices("auto")
    ([0, 1], [0, 1], [0, 2], None)
    """
    if devices == "auto":
        return None
    text = str(devices).replace(" ", "")
    if not re.fullmatch(r"[1-9]\d*|\d+(,\d+)+|\d+,", text):
        raise InputError(f"devices is {devices!r}: give a number from 1 up, 'auto', or GPU indices such as '0,2'")
    return [int(index) for index in text.split(",") if index] if "," in text else list(range(int(text)))
