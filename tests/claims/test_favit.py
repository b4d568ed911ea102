"""FaViT's claims file: official outputs replayed, and what replay refuses."""

from dataclasses import replace
from pathlib import Path

import pytest

from saccade.claims import read_case, replay
from saccade.errors import InputError

RECORDED = Path(__file__).parents[1] / "recorded" / "favit"


@pytest.mark.parametrize(("name", "results"), [("open", 30), ("open_sr1", 24), ("open_block", 40)])
def test_official_outputs_and_gradients_are_ours(name, results):
    matches = replay(read_case(RECORDED / f"{name}.safetensors"))
    assert len(matches) == results
    assert all(match.holds for match in matches), matches


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cls": "FaViT"}, "whole networks come with the backbones"),
        ({"args": {"dim": 24, "sr_ratio": 2}}, "dim is 24 .* divides dim into 16 parts"),
        ({"args": {"dim": 32, "qk_scale": 1.0}}, "qk_scale is 1.0: .* Take a multiple, and no qk_scale"),
    ],
)
def test_what_replay_refuses(changes, message):
    with pytest.raises(InputError, match=message):
        replay(replace(read_case(RECORDED / "open.safetensors"), **changes))
