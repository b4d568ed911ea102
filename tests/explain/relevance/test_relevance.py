"""relevance: targets, contrast, inner features and heads, inputs of any kind; then errors; then explain."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import saccade
from saccade.errors import InputError, WorkError
from saccade.explain import explain
from saccade.explain.relevance import merge, recipes, relevance, rules
from saccade.explain.relevance.recipes import On
from tests.explain.nets import ConvNet, images


class TwoHeads(nn.Module):
    """Tokens (B, N) of ten to two tables of logits, in a dict; the layer `mix` runs twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = self.mix(F.gelu(self.mix(x)))
        return {"logits": self.head(x.mean(1)), "hidden": x}


class Attends(nn.Module):
    """Two heads over a map of 4 x 4 pixels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.proj, self.head = nn.Linear(3, 24), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        query, key, value = self.qkv(x.flatten(2).mT).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.head(self.proj(mixed.transpose(1, 2).flatten(2)).mean(1))


def test_several_targets_in_one_pass_are_each_alone():
    model, x = ConvNet().eval(), images(3)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    targets = torch.tensor([[0, 2], [1, 1], [3, 0]])
    found = relevance(model, x, target=targets)
    assert len(calls) == 1
    assert found.map.shape == (3, 2, 3, 8, 8)
    for column in (0, 1):
        alone = relevance(model, x, target=targets[:, column])
        assert_close(found.map[:, column], alone.map)
        assert_close(found.error[:, column], alone.error)


def test_contrast_is_the_difference_of_two_targets():
    model, x = ConvNet().eval(), images(3)
    one, other = (relevance(model, x, target=target).map for target in (1, 2))
    found = relevance(model, x, target=1, contrast=2)
    assert_close(found.map, one - other)
    logits = model(x).detach()
    assert_close(found.start, logits[:, 1] - logits[:, 2])


def test_a_batch_is_its_samples():
    model, x = Attends().eval(), images(3, 3, 4, 4)
    whole = relevance(model, x, target=1).map
    for i in range(3):
        assert_close(relevance(model, x[i : i + 1], target=1).map[0], whole[i])


def test_token_ids_carry_the_relevance_of_their_rows():
    model, tokens = TwoHeads().eval(), torch.tensor([[1, 2, 2], [5, 0, 9]])
    found = relevance(model, tokens, output=lambda out: out["logits"], target=1, inner=["embed", "mix", "mix:in"])
    assert found.map.shape == (2, 3)
    assert_close(found.map, found.inner["embed"].sum(-1))
    assert set(found.inner) == {"embed", "mix", "mix#2", "mix:in", "mix:in#2"}
    taken = sum(each.amount for each in found.absorbed)
    assert_close(found.error.sum().item(), -taken, rtol=1e-4, atol=1e-6)
    by_gradient = relevance(
        model, tokens, output=lambda out: out["logits"], target=1, recipe="gradient", inner=["embed"]
    )
    rows = model.embed(tokens).detach()
    assert_close(by_gradient.map, (rows * by_gradient.inner["embed"]).sum(-1))


@pytest.mark.parametrize("name", ["haloregnetz_b", "overlock_test"])
def test_what_a_deep_network_with_random_weights_loses_is_rounding(name):
    torch.manual_seed(0)
    model = saccade.create_model(name, num_classes=10).double().eval()
    found = relevance(model, images(1, height=64, width=64).double(), recipe=recipes.epsilon(0.0))
    size = found.map.abs().sum().item()
    assert size > 100 * found.start.abs().item()  # shares that cancel
    softmax = [each.amount for each in found.absorbed if "attention" in each.op or "softmax" in each.op]
    lost = found.error.sum().item() + sum(each.amount for each in found.absorbed)
    assert abs(lost) < 1e-12 * size  # the ledger closes
    others = sum(each.amount for each in found.absorbed if each.kind == "rule") - sum(softmax)
    assert abs(others) < 1e-12 * size
    assert found.unknown == {}


def test_heads_hold_what_the_projection_hands_on():
    model, x = Attends().eval(), images(2, 3, 4, 4)
    found = relevance(model, x, target=0, inner=["proj:in"])
    assert_close(found.heads["qkv"], found.inner["proj:in"].unflatten(-1, (2, 4)).sum((1, 3)))


def test_several_inputs_and_outputs_of_one_number():
    x, y = images(3, seed=1), images(3, seed=2)
    found = relevance(lambda a, b: (a + 2 * b).sum((1, 2, 3)), x, y)
    assert found.target is None
    assert_close(found.map, (x, 2 * y), rtol=1e-4, atol=1e-5)


def test_compiled_and_frozen_models_and_double_use_have_the_same_map():
    model, x = ConvNet().eval(), images()
    expected = relevance(model, x, target=1)
    compiled = relevance(torch.compile(model, backend="eager"), x, target=1)
    assert_close(compiled.map, expected.map)
    assert compiled.by_layer().keys() == expected.by_layer().keys()
    assert_close(relevance(model.requires_grad_(False), x, target=1).map, expected.map)
    act = nn.ReLU(inplace=True)
    shared = nn.Sequential(model.stem, act, model.body, act, nn.Flatten())
    apart = nn.Sequential(model.stem, nn.ReLU(), model.body, nn.ReLU(), nn.Flatten())
    assert_close(relevance(shared, x, target=1).map, relevance(apart, x, target=1).map)


@pytest.mark.parametrize("name", saccade.list_mixers())
def test_every_mixer_is_traced_without_an_unknown_operation(name):
    torch.manual_seed(0)
    mixer, x = saccade.create_mixer(name, 8).eval().double(), torch.randn(2, 8, 8, 8).double()
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(mixer(leaf).flatten(1)[:, 9].sum(), leaf)
    traced = partial(relevance, lambda given: mixer(given).flatten(1), x, target=9)
    assert_close(traced(recipe="gradient").map, x * slope)
    found = traced()
    assert found.unknown == {}
    assert found.map.isfinite().all()
    assert_close(found.error.sum().item(), -sum(each.amount for each in found.absorbed), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: relevance(m, x, target=4), "target is 4 but the model knows 4 classes: give 0 to 3"),
        (lambda m, x: relevance(m, x, contrast=-1), "contrast is -1"),
        (lambda m, x: relevance(m, x, target=torch.tensor([0, 1])), r"int64 of shape \(2,\).*each of the 3 samples"),
        (lambda m, x: relevance(m, x, target=0.5), "float32"),
        (lambda m, x: relevance(m, x, contrast=torch.zeros(3, 2, dtype=torch.long)), "give one class, or one for each"),
        (lambda m, x: relevance(m), "there is no input"),
        (lambda m, x: relevance(m, x.numpy()), "an input is a ndarray"),
        (lambda m, x: relevance(m, x * torch.nan), "NaN or infinite"),
        (lambda m, x: relevance(m, x[:0]), "at least one sample"),
        (
            lambda m, x: relevance(lambda y: (m(y), m(y)), x),
            "the function returns a tuple of 2.*Say which with output=",
        ),
        (lambda m, x: relevance(lambda y: {"a": m(y)}, x), "returns a dict of 1"),
        (lambda m, x: relevance(lambda y: m(y).sum(), x), r"shape \(\) for a batch of 3.*batch axis"),
        (lambda m, x: relevance(lambda y: m(y[None])[0], x[0]), r"shape \(4,\) for a batch of 3.*batch axis"),
        (lambda m, x: relevance(m.stem, x), r"shape \(3, 5, 4, 4\): give output="),
        (lambda m, x: relevance(m, x, start=torch.ones(2, 4)), r"start is \(2, 4\) but the output is \(3, 4\)"),
        (lambda m, x: relevance(lambda y: m(y)[:, 0], x, target=1), "one number a sample"),
        (lambda m, x: relevance(lambda y: torch.ones(3, 2), x), "does not depend on the inputs"),
        (lambda m, x: relevance(m, x, inner=["stemm"]), "did you mean stem"),
        (lambda m, x: relevance(lambda y: m(y), x, inner=["stem"]), "the model is a function"),
        (lambda m, x: relevance(m, x, recipe="lrp"), "recipe is 'lrp'"),
        (lambda m, x: relevance(TwoHeads(), (x[:, 0, :, 0] > 0).long(), inner=[""]), "name a module whose value"),
    ],
)
def test_wrong_calls_say_what_to_do(call, message):
    with pytest.raises(InputError, match=message):
        call(ConvNet().eval(), images())


def test_nan_activations_are_failed_work_and_the_operation_is_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    with pytest.raises(WorkError, match="NaN or infinite from addmm of layer '1' on"):
        relevance(model, images())
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    stop = On("dense", rules.Rule("nan", lambda node, r: [None, r @ node.inputs[2].tensor.mT * torch.nan, None]))
    with pytest.raises(WorkError, match="under recipe 'epsilon' is NaN"):
        relevance(hidden, images(), rules=[stop])


def test_hooks_are_gone_after_an_error():
    model = ConvNet()
    with pytest.raises(RuntimeError):
        relevance(model, images(channels=2), inner=["stem", "head:in"])
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_explain_gives_the_same_maps():
    model, x = ConvNet().eval(), images(5)
    direct = relevance(model, x, target=2)
    found = explain(model, x, method="relevance", target=2, batch_size=2)
    assert_close(found.map, direct.map.sum(1))
    assert_close(found.error, direct.error)
    with_recipe = explain(model, x, method="relevance", target=2, recipe="z_plus", batch_size=2)
    assert_close(with_recipe.map, relevance(model, x, target=2, recipe="z_plus").map.sum(1))
    minus = explain(model, x, method="relevance", target=2, against=1, batch_size=2)
    assert_close(minus.map, relevance(model, x, target=2, contrast=1).map.sum(1))


def test_parts_merge_to_the_whole():
    model, x = ConvNet().eval(), images(5)
    whole = relevance(model, x, target=2, inner=["stem"])
    merged = merge([relevance(model, part, target=2, inner=["stem"]) for part in x.split(2)])
    for name in ("map", "target", "start", "error"):
        assert_close(getattr(merged, name), getattr(whole, name))
    assert_close(merged.inner["stem"], whole.inner["stem"])
    assert merged.served == whole.served
    for layer, row in whole.by_layer().items():
        for kind, amount in row.items():
            assert abs(merged.by_layer()[layer][kind] - amount) < 1e-4
