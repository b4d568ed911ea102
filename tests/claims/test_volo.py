"""VOLO's claims file: official outputs replayed, other configurations, and what replay refuses."""

from dataclasses import replace
from pathlib import Path

import pytest

from saccade.claims import parse_args, read_case, replay
from saccade.claims.volo import _official
from saccade.errors import InputError

CASE = Path(__file__).parents[1] / "recorded" / "volo" / "open.safetensors"


def test_official_outputs_and_gradients_are_ours():
    matches = replay(read_case(CASE))
    assert len(matches) == 8
    assert all(match.holds for match in matches), matches


def test_every_argument_of_the_official_layer_reaches_ours():
    args = parse_args("dim 12, num_heads 2, kernel_size 5, padding 2, stride 3, qk_scale 0.3, proj_drop 0.1")
    layer = _official(**args)
    assert (layer.num_heads, layer.kernel_size, layer.padding, layer.stride, layer.scale) == (2, 5, 2, 3, 0.3)
    assert layer.v.bias is None
    assert layer.proj_drop.p == 0.1


def test_whole_networks_are_refused():
    network = replace(read_case(CASE), cls="VOLO")
    with pytest.raises(InputError, match="whole networks come with the backbones"):
        replay(network)
