"""TrainSettings: what is refused, and how devices are read."""

import pytest

from saccade.errors import InputError
from saccade.training import TrainSettings
from saccade.training.settings import device_indices


def test_defaults_and_zeros_that_switch_a_part_off_are_accepted():
    TrainSettings()
    TrainSettings(weight_decay=0, warmup_epochs=0, label_smoothing=0, clip_norm=0, ema_decay=0)


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("epochs", 0, "1 or more"),
        ("epochs", 2.5, "whole number"),
        ("batch_size", "64", "whole number"),
        ("seed", -1, "0 or more"),
        ("nodes", 0, "1 or more"),
        ("learning_rate", 0, "above 0"),
        ("learning_rate", float("nan"), "a number"),
        ("learning_rate", "0.1", "a number"),
        ("weight_decay", float("inf"), "a number"),
        ("label_smoothing", 1.0, "below 1"),
        ("ema_decay", 1.0, "below 1"),
        ("clip_norm", -1.0, "0 or more"),
        ("precision", "bf16_mixed", "did you mean bf16-mixed"),
        ("accelerator", "gpus", "did you mean gpu"),
        ("strategy", "dpp", "did you mean ddp"),
        ("augment", "lihgt", "did you mean light"),
        ("devices", 0, "from 1 up"),
        ("devices", "all", "'auto'"),
        ("devices", -1, "from 1 up"),
    ],
)
def test_error_names_the_setting_its_value_and_what_to_give(name, value, advice):
    with pytest.raises(InputError) as error:
        TrainSettings(**{name: value})
    assert name in str(error.value)
    assert str(value) in str(error.value)
    assert advice in str(error.value)


@pytest.mark.parametrize(
    ("devices", "indices"),
    [("auto", None), (1, [0]), (3, [0, 1, 2]), ("12", list(range(12))), ("0,2", [0, 2]), ("0, 2", [0, 2]), ("3,", [3])],
)
def test_devices_are_a_number_or_indices(devices, indices):
    assert device_indices(devices) == indices
