"""DFA3D: the recorded case, other arguments, what cannot be replayed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from saccade.claims import load_paper, read_case, replay
from saccade.errors import InputError
from saccade.ops import deformable_attention_3d

CASE = read_case(Path(__file__).parents[1] / "recorded" / "dfa3d" / "open.safetensors")


def test_the_recorded_case():
    matches = replay(CASE, tolerance=1e-5)
    assert {match.name for match in matches if not match.holds} == set()
    assert len(matches) == 6


def test_any_number_of_levels_heads_points_and_bins():
    tensors = {
        "in.value": torch.randn(1, 14, 3, 2),
        "in.value_dpt_dist": torch.rand(1, 14, 3, 7),
        "in.spatial_shapes_3D": torch.tensor([[2, 3, 7], [1, 4, 7], [4, 1, 7]]),
        "in.level_start_index": torch.tensor([0, 6, 10]),
        "in.sampling_locations": torch.rand(1, 5, 3, 3, 2, 3),
        "in.attention_weights": torch.rand(1, 5, 3, 3, 2),
        "out.y": torch.zeros(1, 5, 6),
    }
    case = replace(CASE, tensors=tensors)
    ours = load_paper("dfa3d").replay(case)
    value, depth, points, weights = (
        tensors[f"in.{name}"].transpose(1, 2)
        for name in ("value", "value_dpt_dist", "sampling_locations", "attention_weights")
    )
    shapes = [(2, 3), (1, 4), (4, 1)]
    expected = deformable_attention_3d(value, depth, shapes, points, weights, impl="reference")
    assert ours.keys() == {"out.y"}
    assert_close(ours["out.y"], expected.transpose(1, 2).flatten(2))
    with pytest.raises(InputError, match=r"start at \[0, 6, 11\] with 7 bins: .* one after the other, at \[0, 6, 10\]"):
        load_paper("dfa3d").replay(replace(case, tensors=tensors | {"in.level_start_index": torch.tensor([0, 6, 11])}))


def test_whole_modules_are_not_served():
    with pytest.raises(InputError, match="only the attention function can be replayed"):
        load_paper("dfa3d").replay(replace(CASE, cls="BEVFormer"))
