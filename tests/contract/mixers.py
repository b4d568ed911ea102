"""The mixers that the contract runs over, and how its tests make them and their inputs."""

import pytest
import torch

from saccade.mixers import create_mixer, list_mixers
from tests.contract.exceptions import TAUGHT_APART, VARIANTS

DIM = 8
NAMES = list_mixers()
CASES = [(name, options) for name in NAMES for options in ({}, *VARIANTS.get(name, []))]


def show(case):
    name, options = case
    return f"{name} {options or ''}".strip()


every_name = pytest.mark.parametrize("name", NAMES)
every_mixer = pytest.mark.parametrize(("name", "options"), CASES, ids=[*map(show, CASES)])


def make_mixer(name, options=None, dtype=torch.float64):
    """A mixer whose biases and tables are not near 0, so that none of them can be forgotten unseen."""
    mixer = create_mixer(name, DIM, **options or {}).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return mixer.eval()


def make_input(*space, batch=2, dtype=torch.float64):
    return torch.randn(batch, *space, DIM, dtype=dtype)


def reached(name, mixer):
    """The parameters by name that a gradient of the output reaches."""
    apart = TAUGHT_APART[name][0] if name in TAUGHT_APART else ()
    return {key: parameter for key, parameter in mixer.named_parameters() if not key.startswith(apart)}
