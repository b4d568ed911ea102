"""OutlookAttention: the steps of the published module, windows that fit maps of any size, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.mixers import OutlookAttention


def make_mixer(**options):
    return OutlookAttention(12, 3, **options).double()


def make_input(*space):
    return torch.randn(2, *space, 12, dtype=torch.float64)


@pytest.mark.parametrize("stride", [1, 2])
def test_it_follows_the_published_steps(stride):
    mixer, x = make_mixer(stride=stride, qkv_bias=True), make_input(7, 8)
    height, width = -(-7 // stride), -(-8 // stride)
    value = F.unfold(mixer.v(x).permute(0, 3, 1, 2), 3, padding=1, stride=stride)
    value = value.view(2, 3, 4, 9, height * width).permute(0, 1, 4, 3, 2)  # (B, heads, windows, K^2, E)
    pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), stride, stride, ceil_mode=True).permute(0, 2, 3, 1)
    weights = mixer.attn(pooled).view(2, height * width, 3, 9, 9).transpose(1, 2)
    mixed = (weights * 4**-0.5).softmax(-1) @ value
    columns = mixed.permute(0, 1, 4, 3, 2).reshape(2, 12 * 9, height * width)
    folded = F.fold(columns, (7, 8), 3, padding=1, stride=stride)
    assert_close(mixer(x), mixer.proj(folded.permute(0, 2, 3, 1)))


def test_a_matrix_depends_on_its_centre_alone():
    mixer, x = make_mixer(stride=1), make_input(5, 6)
    other = x.clone()
    other[:, 2, 3] += 1
    changed = (mixer.logits(other) != mixer.logits(x)).flatten(-2).any(-1).any(1)
    assert changed[:, 2, 3].all()
    assert changed.sum() == 2


def test_dropout_acts_in_training_alone():
    mixer, x = make_mixer(proj_drop=0.5), make_input(3, 5)
    assert (mixer(x) == 0).any()
    assert not (mixer.eval()(x) == 0).any()


@pytest.mark.parametrize("options", [{"kernel_size": 0}, {"stride": 0}, {"stride": 1.5}])
def test_sizes_that_are_not_positive_integers(options):
    (name,) = options
    with pytest.raises(InputError, match=f"{name} is .*: give an integer of at least 1"):
        make_mixer(**options)
