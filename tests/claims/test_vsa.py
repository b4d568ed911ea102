"""VSA's claims file: official outputs replayed, and what replay refuses."""

from dataclasses import replace
from pathlib import Path

import pytest

from saccade.claims import read_case, replay
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "vsa"


@pytest.mark.parametrize("name", ["open", "open_pad"])
def test_official_outputs_and_gradients_are_ours(name):
    matches = replay(read_case(RECORDED / f"{name}.safetensors"))
    assert len(matches) == 11
    assert all(match.holds for match in matches), matches


def test_whole_networks_are_refused():
    network = replace(read_case(RECORDED / "open.safetensors"), cls="ViTAEv2_VSA_S")
    with pytest.raises(InputError, match="whole networks come with the backbones"):
        replay(network)
