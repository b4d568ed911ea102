"""Recorded cases: their arguments, what is played, what agrees; then files that cannot be read."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from saccade.claims.framework import (
    Case,
    compare,
    parse_args,
    play,
    read_case,
    relative_difference,
    replay_parts,
    run_official,
)
from saccade.errors import InputError, WorkError


def make_case(tensors, **fields):
    return Case(**{"key": "toy", "name": "open", "cls": "Toy", "args": {}, "record": {}, "tensors": tensors} | fields)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("dim 32, num_heads 4, qkv_bias False", {"dim": 32, "num_heads": 4, "qkv_bias": False}),
        ("stride 2 (strided query blocks, no pool)", {"stride": 2}),
        ("kernel_size (5,3), is_causal (False,True)", {"kernel_size": (5, 3), "is_causal": (False, True)}),
        ("size ((6,5),(3,2)), depths [1, 2]", {"size": ((6, 5), (3, 2)), "depths": (1, 2)}),
        ("agent_num 4; called with H=W=8", {"agent_num": 4, "H": 8, "W": 8}),
        ("qk_scale None, eps 1e-6, ratio 0.33, low -1", {"qk_scale": None, "eps": 1e-6, "ratio": 0.33, "low": -1}),
        ("mode 'bilinear', path \"a b\"", {"mode": "bilinear", "path": "a b"}),
        ("dim=8, heads = 2", {"dim": 8, "heads": 2}),
        ("hidden 20 (internally int(2*20/3) = 13), x called with H=6", {"hidden": 20, "H": 6}),
        ("see cases", {}),
        ("dim 8, class token first, dims 12 18 24, x 2x9x8", {"dim": 8, "dims": (12, 18, 24)}),
        ({"dim": 8, "kernel_size": [3, 5], "nested": [[1, 2], [3]]}, {"dim": 8, "kernel_size": (3, 5)}),
    ],
)
def test_arguments_from_words_and_mappings(words, expected):
    assert {name: value for name, value in parse_args(words).items() if name != "nested"} == expected


def test_build_binds_the_official_signature():
    case = make_case({}, args={"dim": 3})
    assert case.build(lambda dim, heads=2: (dim, heads)) == (3, 2)
    with pytest.raises(InputError, match=r"toy/open does not fit the signature of Toy: .*argument: 'width'"):
        case.build(lambda width: width)


def test_play_gives_outputs_and_gradients_under_recorded_names():
    weight, x, cotangent = torch.tensor([[2.0], [3.0]]), torch.tensor([5.0, 7.0]), torch.tensor([1.0, 10.0])
    tensors = {"state.w": weight, "in.x": x, "in.cotangent.y": cotangent, "out.y": x, "grad.in.x": x}
    tensors["grad.state.w"] = weight
    results = play(make_case(tensors), lambda state, inputs: {"y": inputs["x"] * state["w"].flatten(), "z": x})
    assert results.keys() == {"out.y", "out.z", "grad.in.x", "grad.state.w"}  # z has no cotangent
    assert_close(results["out.y"], torch.tensor([10.0, 21.0]))
    assert_close(results["grad.in.x"], torch.tensor([2.0, 30.0]))
    assert_close(results["grad.state.w"], torch.tensor([[5.0], [70.0]]))  # in the official shape
    assert not results["out.y"].requires_grad


def test_play_needs_no_gradient_where_none_is_recorded():
    results = play(make_case({"in.x": torch.ones(2), "out.y": torch.ones(2)}), lambda _, inputs: {"y": inputs["x"]})
    assert list(results) == ["out.y"]


def test_parts_are_cases_of_their_own():
    tensors = {
        f"{group}.case{part}.{name}": torch.full((2,), float(part + 1))
        for part in (0, 1)
        for group, name in (("in", "x"), ("in", "cotangent"), ("out", "y"), ("grad.in", "x"))
    }

    def replay(part):
        assert part.args["factor"] == (3, 4)[int(part.name[-1])]
        return play(part, lambda _, inputs: {"y": part.args["factor"] * inputs["x"]})

    results = replay_parts(make_case(tensors), {"case0": {"factor": 3}, "case1": {"factor": 4}}, replay)
    assert {name: value[0].item() for name, value in results.items()} == {
        "out.case0.y": 3.0,
        "grad.in.case0.x": 3.0,
        "out.case1.y": 8.0,
        "grad.in.case1.x": 8.0,
    }


def test_official_state_must_fit_in_name_and_shape():
    layer = nn.Linear(2, 3)
    state = {name: torch.ones_like(value) for name, value in layer.state_dict().items()}
    assert_close(run_official(layer.train(), state, torch.ones(1, 2)), torch.full((1, 3), 3.0))
    with pytest.raises(WorkError, match=r"weight \(3, 2\) / \(2, 3\)"):
        run_official(layer, state | {"weight": torch.ones(2, 3)}, torch.ones(1, 2))
    with pytest.raises(WorkError, match=r"extra None / \(1,\)"):
        run_official(layer, state | {"extra": torch.ones(1)}, torch.ones(1, 2))


def test_difference_is_relative_to_the_largest_recorded_entry():
    assert relative_difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, -4.0])) == 7 / 4
    assert relative_difference(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5
    assert relative_difference(torch.tensor([1.0]), torch.tensor([0.5]), floor=10.0) == 0.05
    assert relative_difference(torch.tensor([-torch.inf, 1.0]), torch.tensor([-torch.inf, 2.0])) == 0.5
    assert relative_difference(torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([1, 0], dtype=torch.uint8)) == 1


@pytest.mark.parametrize(
    ("ours", "note"),
    [
        ({}, "missing in ours"),
        ({"out.y": torch.ones(3), "out.z": torch.ones(1)}, "not recorded"),
        ({"out.y": torch.ones(2)}, "ours is (2,), recorded is (3,)"),
        ({"out.y": torch.tensor([1.0, 1.0, torch.nan])}, "not finite"),
        ({"out.y": torch.tensor([1.0, 1.0, torch.inf])}, "not finite"),
    ],
)
def test_what_cannot_be_compared_does_not_hold(ours, note):
    bad = [match for match in compare(make_case({"out.y": torch.ones(3)}), ours) if not match.holds]
    assert [match.note for match in bad] == [note]


def test_tolerance_decides():
    case, ours = make_case({"out.y": torch.tensor([2.0])}), {"out.y": torch.tensor([2.002])}
    assert [compare(case, ours, tolerance)[0].holds for tolerance in (1e-4, 1e-2)] == [False, True]


def test_a_gradient_that_is_noise_is_held_to_the_largest():
    case = make_case({"grad.in.x": torch.tensor([10.0]), "grad.state.bias": torch.tensor([1e-7])})
    assert all(match.holds for match in compare(case, {k: v + 1e-7 for k, v in case.tensors.items()}))
    assert not all(match.holds for match in compare(case, {k: v + 1e-5 for k, v in case.tensors.items()}))


def test_a_case_is_two_files_and_takes_its_key_from_the_folder(tmp_path):
    folder = tmp_path / "toy"
    folder.mkdir()
    save_file({"in.x": torch.ones(1), "out.y": torch.ones(1)}, folder / "a.safetensors")
    (folder / "a.json").write_text(json.dumps({"cls": "Toy", "arguments": {"size": [1, 2]}}))
    case = read_case(folder / "a.safetensors")
    assert (case.key, case.name, case.cls, case.args) == ("toy", "a", "Toy", {"size": (1, 2)})
    assert list(case.expected) == ["out.y"]
    assert read_case(folder / "a.safetensors", key="other").key == "other"


def test_files_that_are_no_case(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match=r"there is no file .*a\.safetensors"):
        read_case(path)
    path.write_bytes(b"not tensors")
    with pytest.raises(InputError, match=r"there is no file .*a\.json"):
        read_case(path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read as a recorded case"):
        read_case(path)
    save_file({"out.y": torch.ones(1)}, path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as a recorded case"):
        read_case(path)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(InputError, match="holds no JSON object"):
        read_case(path)
