"""MOAT: its blocks from their parts, whole maps and windows, tables of another size, drop path, TensorFlow's names."""

import pytest
import torch
from torch.testing import assert_close

import saccade
from saccade.backbones import MOAT
from saccade.backbones.mbconv import MBConv
from saccade.backbones.moat import MOATStage
from saccade.backbones.residual import DropPath
from saccade.backbones.weights import fit_weights, load_weights
from saccade.errors import InputError
from saccade.mixers import MobileConvAttention, WindowAttention

STAGES = (MOATStage(1, 8), MOATStage(2, 16, True, 4), MOATStage(2, 24, True, 4, 2))


def make_net(stages=STAGES, **options):
    torch.manual_seed(0)
    model = MOAT(stages, **{"stem_dims": (4, 8), "dim_head": 8, "num_classes": 3, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def attentions(model):
    return [m for m in model.modules() if isinstance(m, WindowAttention)]


def test_a_block_that_keeps_map_and_width_is_the_mixer_and_its_residual():
    block = make_net().stages[1][1].double()
    mixer = MobileConvAttention(16, 2, num_windows=1, table_size=4).double().eval()
    names = {"attn.": "", "branch.": "conv."}
    state = {}
    for name, tensor in block.state_dict().items():
        for ours, its in names.items():
            name = its + name.removeprefix(ours) if name.startswith(ours) else name
        state[name] = tensor
    mixer.load_state_dict(state)
    x = torch.randn(2, 6, 5, 16, dtype=torch.float64)
    assert_close(block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), x + mixer(x))


def test_stages_convolve_or_attend_to_whole_maps_or_windows():
    model = make_net()
    assert type(model.stages[0][0]) is MBConv
    assert [m.window((6, 10)) for m in attentions(model)] == [(6, 10)] * 2 + [(2, 2)] * 2
    at_end = make_net(global_at_end=True)
    assert [m.window((6, 10)) for m in attentions(at_end)] == [(6, 10)] * 2 + [(2, 2), (6, 10)]
    gates = {type(block.branch.gate).__name__ for block in model.stages[1]}
    assert (type(model.stages[0][0].branch.gate).__name__, gates) == ("SqueezeExcite", {"Identity"})


def test_windows_need_a_map_of_their_size():
    model = make_net()
    assert model(torch.randn(1, 3, 50, 70)).shape == (1, 3)
    with pytest.raises(InputError, match=r"window_size is \(2, 2\) and the map is \(1, 1\)"):
        model(torch.randn(1, 3, 16, 16))


def test_tables_of_another_size_are_interpolated_on_loading_as_at_work():
    larger = (*STAGES[:1], STAGES[1]._replace(table_size=6))
    model, other, images = make_net(STAGES[:2]), make_net(larger), torch.randn(2, 3, 48, 48)
    load_weights(other, model.state_dict(), "smaller")
    assert other.stages[1][0].attn.position_bias_table.shape == (2, 11, 11)
    assert_close(other(images), model(images))  # maps of 6 x 6


def test_without_position_biases_nothing_is_learned_for_a_size():
    for model in (make_net(position_bias=False), make_net([stage._replace(table_size=None) for stage in STAGES])):
        assert not [name for name in model.state_dict() if "position" in name]


def test_the_last_block_stays_a_step_below_the_drop_path_rate():
    model = make_net(drop_path_rate=0.5)
    rates = [m.probability for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_the_shortcut_averages_as_many_pixels_as_asked():
    x = torch.randn(1, 8, 7, 6)
    for size in (2, 3):
        assert make_net(pool_size=size).stages[1][0].pool(x).shape == (1, 8, 4, 3)
    assert_close(make_net(pool_size=3).stages[1][0].pool(x)[0, :, 1, 1], x[0, :, 1:4, 2:5].mean((1, 2)))


def test_names_of_checkpoints_with_the_stem_inside():
    model = saccade.create_model("moat_test", num_classes=2)
    kernel = torch.randn(3, 3, 3, 16)
    for name in ("conv_0/kernel", "moat/stem/conv_0/kernel", "moat/stem/conv_0/kernel:0"):
        renamed = fit_weights(model, {name: kernel})
        assert list(renamed) == ["stem.conv1.weight"]
        assert torch.equal(renamed["stem.conv1.weight"], kernel.permute(3, 2, 0, 1))


def test_heads_that_do_not_share_the_channels():
    with pytest.raises(InputError, match=r"dim_head is 32 and dims are \(8, 16, 24\)"):
        make_net(dim_head=32)
