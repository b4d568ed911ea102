"""Models as people have them: several outputs, tokens, compiled, frozen, in place; nothing of a call stays behind."""

import gc

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from saccade.errors import InputError, WorkError
from saccade.explain import explain, faithfulness, parameter_randomization
from saccade.explain.methods.layers import token_grid
from tests.explain.nets import ConvNet, images

METHODS = ("gradient", "grad_cam", "normgrad", "relevance", "input_x_gradient")
every_method = pytest.mark.parametrize("method", METHODS)


class Wrapped(nn.Module):
    """Returns what `make` builds from the logits of a network."""

    def __init__(self, make):
        super().__init__()
        self.net, self.make = ConvNet(), make

    def forward(self, x):
        return self.make(self.net(x))


class Output(dict):
    """As transformers' models return: entries that are attributes too."""

    __getattr__ = dict.__getitem__


class Named:
    def __init__(self, logits):
        self.logits = logits


@every_method
@pytest.mark.parametrize(
    ("make", "output"),
    [
        (lambda y: Output(loss=None, logits=y, hidden=2 * y), None),
        (lambda y: {"logits": y, "boxes": y[:, :, None]}, None),
        (Named, None),
        (lambda y: (y, y[:, :, None, None]), None),
        (lambda y: [None, y], None),
        (lambda y: (2 * y, y), lambda returned: returned[1]),
    ],
)
def test_logits_are_found_among_several_outputs(method, make, output):
    x = images()
    found = explain(Wrapped(make), x, method=method, target=2, output=output)
    assert_close(found.map, explain(ConvNet(), x, method=method, target=2).map)


def test_output_serves_every_test_of_a_map():
    model, pick = Wrapped(lambda y: (2 * y, y)), lambda returned: returned[1]
    x = images()
    found = explain(model, x, method="gradient", output=pick)
    plain = explain(ConvNet(), x, method="gradient")
    assert_close(found.target, plain.target)
    ours, theirs = faithfulness(model, x, found, output=pick), faithfulness(ConvNet(), x, plain)
    assert (ours.deletion, ours.abpc) == (theirs.deletion, theirs.abpc)
    first, second = (
        parameter_randomization(net, x, method="gradient", **options).similarity
        for net, options in ((model, {"output": pick}), (ConvNet(), {}))
    )
    assert first == second
    stepped = explain(model, x, method="normgrad", meta_rate=0.01, output=pick)
    assert_close(stepped.map, explain(ConvNet(), x, method="normgrad", meta_rate=0.01).map)


def test_two_tables_are_asked_about():
    with pytest.raises(InputError, match=r"a tuple of 2, 2 of them tables .*Say where they are with output="):
        explain(Wrapped(lambda y: (y, 2 * y)), images())
    with pytest.raises(InputError, match="output is 'logits': give a function"):
        explain(ConvNet(), images(), output="logits")


@every_method
def test_frozen_parameters_and_the_callers_context_change_nothing(method):
    x, model = images(), ConvNet()
    expected = explain(model, x, method=method).map
    model.requires_grad_(False)
    with torch.inference_mode():
        inside = x.clone()
    with torch.no_grad():
        assert_close(explain(model, inside, method=method).map, expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


class Compiled(nn.Module):
    """As torch.compile leaves a module, without its minute of work; its graph would fail."""

    def __init__(self, net):
        super().__init__()
        self._orig_mod = net

    def forward(self, x):
        raise AssertionError("the graph ran")


@every_method
def test_of_a_compiled_model_the_original_is_explained(method):
    found, plain = (explain(net, images(), method=method) for net in (Compiled(ConvNet()), ConvNet()))
    assert_close(found.map, plain.map)
    assert found.layer == plain.layer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_of_models_that_torch_compiled_too():
    plain = explain(ConvNet(), images(), method="grad_cam")
    inside, part = ConvNet(), nn.Sequential(ConvNet(), nn.Identity())
    inside.compile(backend="eager")
    part[0] = torch.compile(part[0], backend="eager")
    for net in (torch.compile(ConvNet(), backend="eager"), inside, part):
        net.eval()(images())
        assert_close(explain(net, images(), method="grad_cam").map, plain.map)


class Twice(nn.Module):
    """One convolution and one activation in place, each used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.act(self.conv(self.act(self.conv(x)))).mean((2, 3)))


class Unrolled(Twice):
    """The same with a module for each use, and nothing in place."""

    def __init__(self):
        super().__init__()
        self.second, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
        self.second.load_state_dict(self.conv.state_dict())
        self.last = nn.ReLU()

    def forward(self, x):
        return self.head(self.last(self.second(self.act(self.conv(x)))).mean((2, 3)))


@every_method
def test_a_module_used_twice_counts_where_it_ran_last(method):
    x = images()
    before = x.clone()
    assert_close(explain(Twice(), x, method=method).map, explain(Unrolled(), x, method=method).map)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (images().mul(255).to(torch.uint8), r"images are torch.uint8: give what the model takes, \(x / 255 - mean\)"),
        (images()[0], r"images have shape \(3, 8, 8\).*images\[None\]"),
        (images() * float("nan"), "images hold NaN or infinite values"),
    ],
)
def test_images_that_are_none(given, said):
    with pytest.raises(InputError, match=said):
        explain(ConvNet(), given)


def test_a_target_out_of_range_is_named():
    with pytest.raises(InputError, match="target is 4 but the model knows 4 classes: give 0 to 3"):
        explain(ConvNet(), images(), target=4)
    with pytest.raises(InputError, match="against is -1 but the model knows 4 classes"):
        explain(ConvNet(), images(), target=1, against=-1)


@every_method
def test_nan_activations_are_named_with_the_layer_that_made_them(method):
    model = ConvNet()
    with torch.no_grad():
        model.body.weight[0, 0] = float("inf")
    with pytest.raises(WorkError, match="NaN or infinite from layer 'body' on"):
        explain(model, images(), method=method)


# Tokens


class Tokens(nn.Module):
    """A small transformer of patches, read at its class token or at the mean of all patches."""

    def __init__(self, prefix=1, *, told=False, mean=False):
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.extra = nn.Parameter(torch.randn(1, prefix, 8))
        self.norm1, self.norm2, self.norm = (nn.LayerNorm(8) for _ in range(3))
        self.attn, self.mlp = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)
        self.head, self.mean, self.prefix = nn.Linear(8, 4), mean, prefix
        if told:
            self.num_prefix_tokens = prefix

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.extra.expand(len(x), -1, -1), x], 1)
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        x = self.norm(x + self.mlp(self.norm2(x)))
        return self.head(x[:, self.prefix :].mean(1) if self.mean else x[:, 0])


@pytest.mark.parametrize("method", ["grad_cam", "normgrad"])
@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize("told", [False, True])
def test_tokens_are_laid_out_and_what_nobody_reads_is_passed_over(method, prefix, told):
    found = explain(Tokens(prefix, told=told), images(), method=method)
    (layer,) = found.detail.layers
    assert (layer.name, layer.layout, layer.grid, layer.prefix) == ("norm1", "NLC", (4, 4), prefix)
    assert ("prefix" in layer.inferred) is not told
    assert found.layer == "norm1"
    assert found.map.abs().amax((1, 2)).gt(0).all()
    assert explain(Tokens(prefix, mean=True), images(), method=method).layer == "norm"


def test_cam_of_tokens_is_that_of_the_map_they_are():
    model, x = Tokens(mean=True), images()
    found = explain(model, x, method="grad_cam", layer="norm", target=1).map
    seen = []
    model.norm.register_forward_hook(lambda _module, _args, out: seen.append(out))
    model.eval()(x)
    tokens = seen[0].detach()[:, 1:]  # the mean's gradient is the head's row, shared out
    rows = (tokens * model.head.weight[1] / 16).sum(-1).view(3, 4, 4)
    grown = nn.functional.interpolate(rows[:, None], size=(8, 8), mode="bilinear", align_corners=False)[:, 0]
    assert_close(found, grown.detach())


@pytest.mark.parametrize(
    ("tokens", "sides", "told", "grid"),
    [
        (196, (224, 224), None, (14, 14, 0)),
        (197, (224, 224), None, (14, 14, 1)),
        (201, (224, 224), None, (14, 14, 5)),
        (201, (224, 224), 5, (14, 14, 5)),
        (196, (224, 224), 1, (14, 14, 0)),
        (33, (32, 64), None, (4, 8, 1)),
        (197, (224, 224), 3, None),
        (1, (224, 224), None, None),
        (1000, (224, 224), None, None),
    ],
)
def test_token_grids(tokens, sides, told, grid):
    assert token_grid(tokens, (3, *sides), told) == grid


# Nothing stays


def count_tensors():
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def hooks_of(model):
    return [
        (name, kind)
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if getattr(module, kind)
    ]


@pytest.mark.parametrize("make", [ConvNet, Tokens])
def test_no_hook_tensor_or_patched_class_survives_fifty_calls(make):
    model, x = make().train(), images()
    classes = {type(module): dict(vars(type(module))) for module in model.modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def call(method):
        explain(model, x, method=method)
        with pytest.raises(InputError):
            explain(model, x, method=method, target=99)

    for method in METHODS:  # caches of torch and captum fill once
        call(method)
    before = count_tensors()
    for number in range(50):
        call(METHODS[number % len(METHODS)])
    assert count_tensors() <= before
    assert not hooks_of(model)
    assert all(dict(vars(kind)) == attributes for kind, attributes in classes.items())
    assert all(module.training for module in model.modules())
    assert not x.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
