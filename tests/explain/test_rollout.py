"""Attention rollout: whole matrix products, stages, prefix tokens, then errors and our own mixers."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.explain import explain
from saccade.explain.methods.rollout import _overlap, _roll_out
from tests.explain.nets import ShowsAttention, Stages, images, softmax_attention

EYE = torch.eye


def mixed(attention):
    """The paper's matrix: the mean over heads, half identity."""
    return 0.5 * attention.mean(1)[0] + 0.5 * EYE(attention.shape[-1]).double()


def test_two_layers_by_hand():
    first = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).double()[None, None]
    second = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).double()[None, None]
    # rows of 0.5 A + 0.5 I: first (1, 0), (1/4, 3/4); second (1/2, 1/2), (0, 1); the mean row of second @ first:
    expected = (torch.tensor([5 / 8, 3 / 8]) + torch.tensor([1 / 4, 3 / 4])) / 2
    assert_close(_roll_out([(first, (1, 2)), (second, (1, 2))]), expected.double().view(1, 1, 2))


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_one_stage_is_the_mean_row_of_the_product(layers):
    attention = [softmax_attention(12, heads=3, seed=i) for i in range(layers)]
    product = EYE(12).double()
    for each in attention:
        product = mixed(each) @ product
    assert_close(product.sum(-1), torch.ones(12).double())
    assert_close(_roll_out([(each, (3, 4)) for each in attention])[0], product.mean(0).view(3, 4))


def test_a_class_token_is_read_by_its_own_row():
    attention = [softmax_attention(2 + 6, seed=i) for i in range(3)]  # a class and a register token
    product = mixed(attention[2]) @ mixed(attention[1]) @ mixed(attention[0])
    assert_close(_roll_out([(each, (2, 3)) for each in attention])[0], product[0, 2:].view(2, 3))


def test_stages_multiply_through_the_areas_that_coarse_tokens_cover():
    fine, coarse = softmax_attention(16, seed=1), softmax_attention(4, seed=2)
    spread = torch.zeros(4, 4, 4, dtype=torch.double)  # (coarse token, fine row, fine column)
    for token in range(4):
        row, column = 2 * (token // 2), 2 * (token % 2)
        spread[token, row : row + 2, column : column + 2] = 0.25
    product = mixed(coarse) @ spread.flatten(1) @ mixed(fine)
    assert_close(_roll_out([(fine, (4, 4)), (coarse, (2, 2))])[0], product.mean(0).view(4, 4))


@pytest.mark.parametrize("grids", [[(8, 8), (4, 4), (2, 2)], [(7, 5), (4, 3)], [(3, 3), (5, 4)], [(5, 5), (1, 1)]])
def test_the_shares_of_all_tokens_sum_to_one_through_any_stages(grids):
    layers = [(softmax_attention(h * w, seed=i), (h, w)) for i, (h, w) in enumerate(grids)]
    found = _roll_out(layers)
    assert found.shape == (1, *grids[0])
    assert_close(found.sum(), torch.tensor(1.0).double())
    assert (found > 0).all()


def test_overlaps_of_uneven_grids():
    assert_close(_overlap(2, 3), torch.tensor([[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]))
    assert_close(_overlap(3, 2), torch.tensor([[1, 0], [0.5, 0.5], [0, 1]]))


def test_prefix_tokens_that_join_late_keep_only_the_share_of_the_grid():
    fine, late = softmax_attention(4, seed=1), softmax_attention(5, seed=2)
    expected = (mixed(late) @ torch.cat([torch.zeros(1, 4).double(), mixed(fine)]))[0]
    assert_close(_roll_out([(fine, (2, 2)), (late, (2, 2))]).flatten(), expected)


def test_attention_to_one_place_is_seen_there():
    attention = torch.zeros(1, 1, 16, 16)
    attention[..., 5] = 1.0  # all look at row 1, column 1
    found = explain(Stages((2, [attention])), images(2), method="attention_rollout")
    assert found.map.shape == (2, 8, 8)
    assert found.map[0].argmax() in (2 * 8 + 2, 2 * 8 + 3, 3 * 8 + 2, 3 * 8 + 3)
    assert (found.map >= 0).all()
    assert_close(found.map[0], found.map[1])


def test_effective_matrices_with_signs_count_with_their_skip():
    """Pooling mixers show P - I: with the skip, the layer is P."""
    pool = softmax_attention(4, heads=1)
    shown = _roll_out([(pool - EYE(4).double(), (2, 2))])
    assert_close(shown.flatten(), pool[0, 0].mean(0))
    none = _roll_out([(torch.zeros(1, 2, 4, 4), (2, 2))])  # a mixer that hands nothing on: the skip remains
    assert_close(none, torch.full((1, 2, 2), 0.25))
    assert_close(_roll_out([(-EYE(4)[None, None], (2, 2))]), torch.full((1, 2, 2), 0.25))  # and one that undoes it


class Plain(nn.Module):
    def __init__(self, mixer, stride=2):
        super().__init__()
        self.stem, self.mixer, self.stride = nn.Conv2d(3, 16, stride, stride), mixer, stride

    def forward(self, x):
        x = self.stem(x).movedim(1, -1)
        return (x + self.mixer(x)).mean((1, 2))


@pytest.mark.parametrize("name", saccade.list_mixers())
def test_every_mixer_of_ours_can_be_rolled_out(name):
    torch.manual_seed(0)
    model = Plain(saccade.create_mixer(name, 16))
    found = explain(model, images(2, 3, 16, 16), method="attention_rollout")
    assert found.map.shape == (2, 16, 16)
    assert_close(found.map.sum((1, 2)) / 4, torch.ones(2), rtol=0.05, atol=0)  # a token is 2 x 2 pixels


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()), "shows no attention.*integrated_gradients"),
        (Stages((2, [torch.rand(1, 1, 16, 9)])), r"'stages.0.0' maps 9 keys to 16 queries"),
        (Stages((2, [softmax_attention(15)])), r"15 tokens and features on a grid \(4, 4\)"),
        (Stages((4, [softmax_attention(16)])), r"16 tokens and features on a grid \(2, 2\)"),
    ],
)
def test_models_without_square_attention_on_a_grid_are_refused(model, message):
    with pytest.raises(InputError, match=message):
        explain(model, images(), method="attention_rollout", target=0)


def test_a_model_that_only_shows_features_is_refused():
    class FeaturesOnly(ShowsAttention):
        def forward(self, x):
            saccade.taps.record(self, "features", lambda: x)
            return x.mean((2, 3))

    with pytest.raises(InputError, match="shows no attention"):
        explain(FeaturesOnly(torch.zeros(0)), images(), method="attention_rollout")
