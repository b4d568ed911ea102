"""Feature complexity: V-information of ridge probes, layers that are found, checkpoints, residual flow."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.explain import complexity_over_checkpoints, explain_concepts, feature_complexity, residual_flow
from saccade.explain.complexity import find_blocks, v_information
from tests.explain.nets import ConvNet, images


def table(count=80, dim=5, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chain(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), *layers).double()


class Residual(nn.Module):
    """x + branch(x), whose branch reads the first half of the channels and writes to the second."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Linear(8, 8, bias=False)
        with torch.no_grad():
            self.branch.weight.zero_()
            self.branch.weight[4:, :4] = torch.eye(4)

    def forward(self, x):
        return x + self.branch(x.abs())


# V-information


def test_a_probe_is_ridge_regression_in_closed_form():
    x, z = table(), table(dim=3, seed=1)
    x, z = (x - x.mean(0)) / x.std(0, correction=0), (z - z.mean(0)) / z.std(0, correction=0)
    weight = torch.linalg.solve(x.T @ x / 80 + 0.2 * torch.eye(5).double(), x.T @ z / 80)
    expected = 1 - (z - x @ weight).square().mean(0)
    assert_close(v_information(x, z, ridge=0.2, held_out=0.0), expected)
    assert_close(v_information(50 * x + 3, 7 - 9 * z, ridge=0.2, held_out=0.0), expected)


def test_more_dimensions_than_rows_are_served():
    x, z = table(20, 50), table(20, 2, seed=1)
    assert (v_information(x, z, ridge=0.0, held_out=0.0) > 1 - 1e-9).all()
    assert (v_information(x, z) < 0.9).all()  # on rows that were not fitted


def test_held_out_rows_judge_and_the_seed_draws_them():
    x = table()
    z = x[:, :1] * 2 - x[:, 1:2]
    assert_close(v_information(x, z, ridge=0.0), torch.ones(1).double())
    noise = table(80, 1, seed=5)
    assert v_information(x, noise) < v_information(x, noise, held_out=0.0)
    assert v_information(x, noise, seed=1) != v_information(x, noise, seed=2)


def test_squares_are_read_by_the_richer_family_alone():
    x = table(400)
    z = torch.stack([x[:, 0] ** 2, x[:, 1]], 1)
    linear, quadratic = (v_information(x, z, family=family) for family in ("linear", "quadratic"))
    assert linear[0] < 0.3
    assert quadratic[0] > 0.99
    assert min(linear[1], quadratic[1]) > 0.99


def test_a_feature_that_does_not_vary_is_nan():
    found = v_information(table(), torch.cat([torch.ones(80, 1).double(), table(dim=1)], 1))
    assert found.isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("x", "z", "options", "words"),
    [
        (table(), table(79), {}, r"rows are \(80, 5\) and features \(79, 5\)"),
        (table(), table(), {"held_out": 1.0}, "held_out is 1.0"),
        (table(), table(), {"ridge": -1.0}, "ridge -1.0"),
        (table(), table(), {"family": "cubic"}, "family is 'cubic'"),
        (table(3), table(3), {}, "less than two"),
        (table() * float("nan"), table(), {}, "NaN"),
    ],
)
def test_information_errors(x, z, options, words):
    with pytest.raises(InputError, match=words):
        v_information(x, z, **options)


# Complexity


def test_complexity_counts_the_layers_that_hide_a_feature():
    """|x| is not linear in x: the first two layers keep x, the third has ReLUs of x and -x, whose sum is |x|."""
    both = nn.Linear(8, 16)
    model = chain(nn.Linear(8, 8), nn.Linear(8, 8), both, nn.ReLU(), nn.Linear(16, 2))
    with torch.no_grad():
        for layer in (model[1], model[2]):
            layer.weight.copy_(torch.eye(8))
            layer.bias.zero_()
        both.weight.copy_(torch.cat([torch.eye(8), -torch.eye(8)]))
        both.bias.zero_()
    x = images(900, 2, 2, 2).double()
    features = torch.stack([x[:, 0, 0, 0], x[:, 1, 0, 1].abs()], 1)
    found = feature_complexity(model, x, features, ridge=0.0)
    assert found.layers == ("1", "2", "4")
    assert found.held_out == 270
    assert found.importance is None
    assert_close(found.complexity[0], torch.zeros(()).double(), atol=1e-9, rtol=0)
    assert found.complexity[1] == pytest.approx(2 / 3, abs=0.03)
    assert_close(found.complexity, 1 - found.information.mean(0))
    first = feature_complexity(model, x, features, ridge=0.0, layers=["2"])
    assert_close(first.information[0], found.information[1])


def test_pooled_layers_hide_places_and_flat_ones_show_them():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 24, 3)).double()
    x = images(600, 3, 6, 4).double()
    corner = x[:, :1, 0, 0]
    mean, flat = (feature_complexity(model, x, corner, reading=reading) for reading in ("mean", "flatten"))
    assert mean.complexity > 0.8
    assert flat.complexity < 0.05


def test_concepts_bring_their_codes_and_importance():
    model, x = ConvNet().double(), images(60).double()
    found = explain_concepts(model, x, method="pca", num_concepts=3, importance="input_x_gradient")
    complexity = feature_complexity(model, x, found, layers=["stem", "body", "norm"], ridge=1e-6)
    assert_close(complexity.importance, found.per_image.abs().mean(0))
    assert_close(complexity.information[1], torch.ones(3).double(), atol=1e-3, rtol=0)  # where they come from
    assert complexity.layers == ("stem", "body", "norm")


def test_the_model_is_left_as_it_was():
    model, x = ConvNet().train(), images(30)
    feature_complexity(model, x, torch.randn(30, 2), layers=["stem"])
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_blocks_are_found():
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5), nn.ReLU()
    )
    plain = nn.Sequential(plain, nn.Linear(5, 4))
    assert find_blocks(plain, images(1)) == ["0.1", "0.3", "0.6"]
    stages = nn.Sequential(nn.Sequential(Residual(), Residual()), nn.Sequential(Residual()))
    whole = nn.Sequential(nn.Flatten(), stages, nn.Linear(8, 3))
    assert find_blocks(whole, images(1, 2, 2, 2)) == ["1.0.0", "1.0.1", "1.1.0"]
    with pytest.raises(InputError, match="ConvNet has no layers with parameters in a Sequential"):
        find_blocks(ConvNet(), images(1))


def test_checkpoints_are_read_with_the_features_of_now():
    model = chain(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    x = images(200, 2, 2, 2).double()
    final = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        features = model[:-1](x)
    broken = {name: torch.zeros_like(value) for name, value in final.items()}
    found = complexity_over_checkpoints(model, x, features, {"final": final, "broken": broken})
    assert list(found) == ["final", "broken"]
    assert_close(found["final"].complexity, feature_complexity(model, x, features).complexity, equal_nan=True)
    assert (found["broken"].complexity.nan_to_num(1) == 1).all()
    assert all(torch.equal(value, final[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match="checkpoint 'other' does not fit"):
        complexity_over_checkpoints(model, x, features, {"other": {}})
    with pytest.raises(InputError, match="checkpoints is empty"):
        complexity_over_checkpoints(model, x, features, {})


def test_what_goes_around_a_block_and_what_through_it():
    model = chain(Residual(), nn.Linear(8, 3))
    x = images(600, 2, 2, 2).double()
    features = torch.stack([x[:, 0, 0, 1], x[:, 0, 0, 1].abs()], 1)
    found = residual_flow(model, x, features, ridge=0.0)
    assert found.blocks == ("1",)
    assert found.left_out == ()
    assert_close(found.skip[0, 0], torch.ones(()).double())
    assert_close(found.main[0, 1], torch.ones(()).double())
    assert found.skip[0, 1] < 0.1
    assert found.main[0, 0] < 0.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blocks": ["2"]}, r"block '2' makes \(1, 3\) of \(1, 8\)"),
        ({"blocks": ["7"]}, "block is '7'"),
        ({"reading": "max"}, "reading is 'max'"),
    ],
)
def test_flow_errors(options, words):
    with pytest.raises(InputError, match=words):
        residual_flow(chain(Residual(), nn.Linear(8, 3)), images(30, 2, 2, 2).double(), torch.randn(30, 2), **options)
    with pytest.raises(InputError, match="no block keeps the shape"):
        residual_flow(chain(nn.Linear(8, 8), nn.Linear(8, 3)), images(30, 2, 2, 2).double(), torch.randn(30, 2))


@pytest.mark.parametrize(
    ("features", "options", "words"),
    [
        (torch.randn(29, 2), {}, r"features are \(29, 2\) for 30 images"),
        (torch.randn(30, 2), {"layers": []}, "name at least one"),
        (torch.randn(30, 2), {"layers": ["stem", "stem"]}, "each once"),
        (torch.randn(30, 2), {"layers": ["stam"]}, "did you mean stem"),
        (torch.randn(30, 2), {"reading": "max"}, "reading is 'max'"),
    ],
)
def test_complexity_errors(features, options, words):
    with pytest.raises(InputError, match=words):
        feature_complexity(ConvNet(), images(30), features, **options)
