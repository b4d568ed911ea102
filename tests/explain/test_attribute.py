"""explain: what holds for every method, then errors."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from saccade.errors import InputError, WorkError
from saccade.explain import explain
from tests.explain.nets import ConvNet, Stages, images, linear, softmax_attention

METHODS = ["gradient", "grad_cam", "input_x_gradient", "integrated_gradients", "normgrad", "occlusion", "random"]


def state(model):
    hooks = sum(len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    modes = [m.training for m in model.modules()]
    grads = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return hooks, modes, grads, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_an_image_gets_the_same_map_in_any_batch(method):
    model, x = ConvNet(), images(5)
    whole = explain(model, x, method=method, target=1).map
    assert_close(explain(model, x, method=method, target=1, batch_size=2).map, whole)
    assert_close(explain(model, x[:1], method=method, target=1, batch_size=1).map, whole[:1])


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was_and_runs_in_eval_mode(method):
    model, x = ConvNet().train(), images()
    model.stem.eval()
    model.head.requires_grad_(False)
    before, given = state(model), x.clone()
    first, second = (explain(model, x, method=method) for _ in range(2))  # dropout would make them differ
    after = state(model)
    assert before[:3] == after[:3]
    assert_close(before[3], after[3])
    assert_close(first.map, second.map, rtol=0, atol=0)
    assert_close(x, given, rtol=0, atol=0)
    assert not first.map.requires_grad


def test_a_failing_model_is_put_back_too():
    model = ConvNet().train()
    with pytest.raises(RuntimeError):
        explain(model, images(channels=2))
    assert state(model)[:2] == (0, [True] * len(list(model.modules())))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_frozen_parameters_and_no_grad_contexts_change_nothing(method, context):
    model, x = ConvNet(), images()
    expected = explain(model, x, method=method).map
    model.requires_grad_(False)
    with context():
        found = explain(model, x + 0, method=method).map
    assert_close(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_odd_sizes_and_other_numbers_of_channels_pass(method):
    model = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert explain(model, images(2, 1, 9, 14), method=method).map.shape == (2, 9, 14)


@pytest.mark.parametrize("method", ["gradient", "input_x_gradient", "integrated_gradients"])
def test_a_model_that_changes_its_input_in_place_can_be_explained(method):
    model = nn.Sequential(nn.ReLU(inplace=True), linear())
    x = images()
    given = x.clone()
    expected = explain(nn.Sequential(nn.ReLU(), model[1]), x, method=method).map
    assert_close(explain(model, x, method=method).map, expected)
    assert_close(x, given)


def test_target_is_the_prediction_unless_given():
    model, x = ConvNet(), images(6)
    assert_close(explain(model, x, method="gradient").target, model.eval()(x).argmax(1))
    mixed = torch.tensor([0, 3, 1, 2, 0, 1])
    found = explain(model, x, target=mixed, method="input_x_gradient")
    assert_close(found.target, mixed)
    for i, target in enumerate(mixed.tolist()):
        assert_close(explain(model, x[i : i + 1], target=target, method="input_x_gradient").map[0], found.map[i])


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda y: (y, y), r"a tuple of 2, 2 of them tables \(B, classes\)"),
        (lambda y: {"a": y, "b": y}, r"a dict of 2, 2 of them tables \(B, classes\)"),
        (lambda y: {"logits": y[0]}, r"a tensor of shape \(3,\)"),
        (lambda y: y[:2], r"a tensor of shape \(2, 3\) for 3 images"),
        (lambda y: y[:, 0], r"a tensor of shape \(3,\)"),
        (lambda y: y[:, :, None], r"a tensor of shape \(3, 3, 1\)"),
        (lambda y: 1.0, "a float"),
    ],
)
def test_a_model_without_logits_is_refused(make, said):
    with pytest.raises(InputError, match=f"Returns returns {said}.*Say where they are with output="):
        explain(Returns(make), images())


def test_nan_is_failed_work():
    with pytest.raises(WorkError, match="NaN"):
        explain(Returns(lambda y: y * float("nan")), images())
    hidden = Returns(lambda y: (y - y).abs().sqrt())  # finite values, NaN gradient
    with pytest.raises(WorkError, match="map of gradient"):
        explain(hidden, images(), method="gradient")


def test_a_cut_graph_is_named():
    with pytest.raises(InputError, match="carry no gradient of the images"):
        explain(Returns(lambda y: y.detach()), images())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: explain(m, x[0]), r"shape \(3, 8, 8\).*batch axis with images\[None\]"),
        (lambda m, x: explain(m, x[:0]), "at least one image"),
        (lambda m, x: explain(m, x[..., 0, 0]), r"shape \(3, 3\)"),
        (lambda m, x: explain(m, (x * 99).byte()), "torch.uint8.*as floats"),
        (lambda m, x: explain(m, x.numpy()), "ndarray: give a tensor"),
        (lambda m, x: explain(m, x * float("inf")), "NaN or infinite"),
        (lambda m, x: explain(lambda y: y, x), "function: give a torch.nn.Module"),
        (lambda m, x: explain(m, x, target=4), "target is 4 but the model knows 4 classes: give 0 to 3"),
        (lambda m, x: explain(m, x, target=torch.tensor([0, -1, 2])), "target is -1"),
        (lambda m, x: explain(m, x, target=torch.tensor([0, 1])), r"shape \(2,\).*each of the 3 images"),
        (lambda m, x: explain(m, x, target=1.5), "float32"),
        (lambda m, x: explain(m, x, method="integrated_gradient"), "did you mean integrated_gradients"),
        (lambda m, x: explain(m, x, step=9), "'step' is no option of integrated_gradients: did you mean steps"),
        (lambda m, x: explain(m, x, layer="stem"), "'layer' is no option of integrated_gradients"),
        (lambda m, x: explain(m, x, method="gradient", steps=9), "it has no options"),
        (lambda m, x: explain(m, x, batch_size=0), "batch_size is 0"),
        (lambda m, x: explain(m, x, steps=0), "steps is 0"),
        (lambda m, x: explain(m, x, method="occlusion", window=9), "window is 9: give a whole number from 1 to 8"),
        (lambda m, x: explain(m, x, method="occlusion", window=2, stride=3), "stride is 3.*from 1 to 2"),
    ],
)
def test_wrong_calls_say_what_to_do(call, message):
    with pytest.raises(InputError, match=message):
        call(ConvNet(), images())


def test_no_forward_pass_is_larger_than_batch_size():
    sizes = []
    model = ConvNet()
    model.register_forward_hook(lambda _module, args, _out: sizes.append(len(args[0])))
    rollout = Stages((2, [softmax_attention(16)]))
    rollout.register_forward_hook(lambda _module, args, _out: sizes.append(len(args[0])))
    for method in [*METHODS, "attention_rollout"]:
        explain(rollout if method == "attention_rollout" else model, images(7), method=method, batch_size=3)
    assert max(sizes) == 3
