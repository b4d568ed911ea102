"""Attention rollout and flow: whole matrix products, linear programs, stages, prefix tokens, our mixers, errors."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.explain import explain
from saccade.explain.methods.rollout import _capacities, _flow, _Fusion, _overlap, _roll_out
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


# Heads, discarded entries, skips


def test_heads_are_fused_before_the_skip():
    attention = softmax_attention(12, heads=3)
    for name, fused in (("max", attention.amax(1)), ("min", attention.amin(1)), ("mean", attention.mean(1))):
        matrix = 0.3 * EYE(12).double() + 0.7 * fused
        found = _roll_out([(attention, (3, 4))], _Fusion(name, residual=0.3))
        assert_close(found.flatten(1), (matrix / matrix.sum(-1, keepdim=True)).mean(1))


def test_the_smallest_entries_are_discarded():
    attention = softmax_attention(5, heads=2)
    fused = attention.mean(1)[0]
    kept = fused.where(fused > fused.flatten().sort().values[9], 0)  # 0.4 of 25 are 10
    matrix = kept + EYE(5).double()
    found = _roll_out([(attention, (1, 5))], _Fusion(discard=0.4)).flatten()
    assert_close(found, (matrix / matrix.sum(-1, keepdim=True)).mean(0))


def test_without_heads_that_agree_the_skip_remains():
    attention = torch.stack([EYE(4), EYE(4).roll(1, 0)])[None].double()
    assert_close(_Fusion("min").matrix(attention), EYE(4).double()[None])
    assert_close(_Fusion("min", residual=0.0).matrix(attention), EYE(4).double()[None])  # rows of zeros


@pytest.mark.parametrize("method", ["attention_rollout", "attention_flow"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_fusion": "median"}, "head_fusion is 'median'.*mean"),
        ({"discard": 1.0}, "discard is 1.0: give a share"),
        ({"residual": -0.1}, "residual is -0.1: give a share"),
        ({"num_prefix": -1}, "num_prefix is -1"),
        ({"source": "hooks"}, "source is 'hooks'"),
    ],
)
def test_options_out_of_range_are_refused(method, options, message):
    with pytest.raises(InputError, match=message):
        explain(Stages((2, [softmax_attention(16)])), images(), method=method, target=0, **options)


# Flow


def flow_by_linear_program(matrices, sink):
    """The most that can leave node 0 for one sink: a variable an edge, conservation at every node between."""
    optimize = pytest.importorskip("scipy.optimize")
    edges, first = [], 0
    for matrix in matrices:
        for above, below in matrix.nonzero().tolist():
            edges.append((first + above, first + len(matrix) + below, matrix[above, below].item()))
        first += len(matrix)
    sink = first + sink
    balance = torch.zeros(first + matrices[-1].shape[1], len(edges))
    for place, (start, end, _) in enumerate(edges):
        balance[start, place] += 1
        balance[end, place] -= 1
    inner = [node for node in range(1, len(balance)) if node != sink]
    found = optimize.linprog(
        balance[sink].numpy(),
        A_eq=balance[inner].numpy(),
        b_eq=[0] * len(inner),
        bounds=[(0, capacity) for *_, capacity in edges],
    )
    return -found.fun


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("grids", [[(2, 2)], [(2, 3), (2, 3)], [(2, 3), (2, 2), (1, 2)]], ids=str)
def test_flow_is_the_largest_of_the_linear_program(grids, prefix):
    layers = [(softmax_attention(prefix + h * w, seed=i) ** 3, (h, w)) for i, (h, w) in enumerate(grids)]
    found = _flow(layers).flatten()
    matrices = [matrix[0] for matrix in _capacities(layers, _Fusion())]
    tokens = matrices[-1].shape[1] - prefix
    expected = [flow_by_linear_program(matrices, prefix + token) for token in range(tokens)]
    assert_close(found, torch.tensor(expected).double(), atol=1e-5, rtol=0)
    rollout = _roll_out(layers).flatten()
    assert_close(torch.linalg.multi_dot(matrices)[0, prefix:], rollout)  # of the same matrices
    assert (found >= rollout - 1e-6).all()  # the rollout is a flow, of all sinks at once


def test_flow_through_one_layer_is_its_capacity():
    attention = softmax_attention(1 + 6)
    assert_close(_flow([(attention, (2, 3))]).flatten(), mixed(attention)[0, 1:], atol=1e-6, rtol=0)


def test_a_narrow_layer_bounds_the_flow():
    """All of the last layer looks at token 0, whose edges to the others are narrow."""
    last = torch.zeros(1, 1, 4, 4).double()
    last[..., 0] = 1
    first = torch.full((1, 1, 4, 4), 0.25).double()
    found = _flow([(first, (1, 4)), (last, (1, 4))]).flatten()
    # the source feeds 1/4 to each, which may all stay or go to token 0; into a token lead 1/8 from each other one
    expected = [5 / 8 + 3 / 8, *[3 / 8 + 1 / 4] * 3]
    assert_close(found, torch.tensor(expected).double(), atol=1e-6, rtol=0)


# Our mixers


def study_net(name, **options):
    torch.manual_seed(0)
    return saccade.create_model(
        "study_xxs", num_classes=3, mixer=name, dims=(16, 16), depths=(1, 1), patch_size=4, **options
    )


@pytest.mark.parametrize("name", sorted({*saccade.list_mixers()} - {"channel"}))
def test_rollout_and_flow_of_every_mixer_of_ours_in_two_stages(name):
    model, x = study_net(name), images(2, 3, 24, 16)
    rollout, flow = (explain(model, x, method=f"attention_{kind}", target=0) for kind in ("rollout", "flow"))
    assert rollout.map.shape == flow.map.shape == (2, 24, 16)
    assert_close(rollout.map.sum((1, 2)) / 16, torch.ones(2), rtol=0.05, atol=0)  # a token is 4 x 4 pixels
    assert (flow.map >= rollout.map - 1e-5).all()
    assert (flow.map <= 1 + 1e-6).all()
    assert flow.layer == "stages.0.blocks.0.mixer, stages.1.blocks.0.mixer"
    assert flow.inferred == "2 layers read from taps: 6 x 4 tokens, then 3 x 2 tokens"


@pytest.mark.parametrize("method", ["attention_rollout", "attention_flow"])
def test_channel_attention_alone_is_refused(method):
    with pytest.raises(InputError, match=r"'stages.0.blocks.0.mixer' and all other layers weigh channels"):
        explain(study_net("channel"), images(1, 3, 16, 16), method=method)


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
