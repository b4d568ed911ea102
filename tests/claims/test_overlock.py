"""OverLoCK's claims file: official outputs and gradients replayed, other arguments, what replay refuses."""

from dataclasses import replace
from pathlib import Path

import pytest

from saccade.claims import read_case, replay
from saccade.claims.overlock import _official
from saccade.errors import InputError, WorkError

CASE = Path(__file__).parents[1] / "recorded" / "overlock" / "open.safetensors"


def test_official_outputs_and_gradients_are_ours():
    matches = replay(read_case(CASE), 1e-5)
    assert {match.name for match in matches} == {
        f"{kind}.{images}{part}"
        for images in ("x", "small")
        for kind, part in (("grad", ""), *(("out", f".{p}") for p in ("base", "overview", "focus", "logits")))
    }
    assert all(match.holds for match in matches), matches


def test_shortcuts_without_scales_give_other_outputs():
    case = read_case(CASE)
    matches = replay(replace(case, args=case.args | {"res_scale": False}), 1e-5)
    assert not any(match.holds for match in matches if match.name.endswith(("logits", "grad.x", "focus")))


@pytest.mark.parametrize(
    "wrong",
    [{"use_ds": False}, {"smk_size": 3}, {"deploy": True}, {"ls_init_value": [None] * 4}, {"kernel_size": [7] * 4}],
    ids=str,
)
def test_arguments_that_do_not_fit_the_state(wrong):
    case = read_case(CASE)
    if "use_ds" in wrong:  # its classifier is left out of what is loaded
        assert all(match.holds for match in replay(replace(case, args=case.args | wrong)))
        return
    with pytest.raises(WorkError, match="cannot take the official state"):
        replay(replace(case, args=case.args | wrong))


def test_arguments_reach_the_network():
    model = _official(
        (1, 1, 1, 1), (1, 1), (8, 8, 16, 16), (5, 5, 5, 5), sub_num_heads=(2, 4), smk_size=3, in_chans=1, use_gemm=True
    )
    mixers = [stage.blocks[0].mix for stage in model.stages[4:]]
    assert [(mixer.num_heads, mixer.kernel_sizes) for mixer in mixers] == [(4, (3, 5)), (8, (3, 5))]
    assert model.in_chans == 1
    assert model.classifiers == ("head", "aux_head")
    with pytest.raises(InputError, match="no argument widths that replay knows"):
        _official((1,), (1, 1), (8,), widths=3)


def test_other_classes_are_refused():
    with pytest.raises(InputError, match="replay serves OverLoCK"):
        replay(replace(read_case(CASE), cls="ContMixBlock"))
