"""Rules: laws of conservation, then each against its equation written out, then unknown operations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from saccade.backbones.recalibration import ResponseNorm
from saccade.errors import InputError
from saccade.explain.relevance import On, recipes, relevance, rules

RECIPES = [
    "epsilon",
    "gamma",
    "z_plus",
    "alpha_beta",
    "z_box",
    "flat",
    "epsilon_plus",
    "attn_lrp",
    "cp_lrp",
    "dynamic_lrp",
    "salient_relevance",
]


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def relu_net(*, bias):
    torch.manual_seed(0)
    convs = nn.Conv2d(3, 6, 3, padding=1, bias=bias), nn.Conv2d(6, 5, 3, stride=2, padding=1, bias=bias)
    body = convs[0], nn.ReLU(inplace=True), nn.MaxPool2d(2), convs[1], nn.ReLU()
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(45, 8, bias), nn.ReLU(), nn.Linear(8, 4, bias)).double()


def test_epsilon_on_a_relu_network_without_biases_is_input_times_gradient():
    model, x = relu_net(bias=False), inputs(3, 3, 11, 11).requires_grad_()
    (slope,) = torch.autograd.grad(model(x * 1)[:, 2].sum(), x)
    found = relevance(model, x, target=2)
    assert_close(found.map, (x * slope).detach(), rtol=1e-6, atol=1e-6 * (x * slope).abs().max().item())
    assert found.conservation_error < 1e-5
    assert found.error.abs().max() < 1e-5 * found.start.abs().max()
    assert found.absorbed == () or max(abs(each.amount) for each in found.absorbed) < 1e-6


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_conserves_without_biases(recipe):
    found = relevance(relu_net(bias=False), inputs(3, 3, 11, 11), recipe=recipe)
    assert found.error.abs().max() < 1e-4 * found.start.abs().max()
    assert found.unknown == {}


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_the_map_lacks_stands_in_the_ledger(recipe):
    found = relevance(relu_net(bias=True), inputs(3, 3, 11, 11), recipe=recipe)
    taken = sum(each.amount for each in found.absorbed)
    assert_close(found.error.sum().item(), -taken, rtol=1e-6, atol=1e-9)
    assert found.absorbed
    if recipe not in ("z_box", "flat"):  # their rule of the first layer knows no bias
        assert {each.kind for each in found.absorbed if abs(each.amount) > 1e-4 * found.start.abs().sum()} == {"bias"}
        assert set(found.by_layer()) >= {"0", "3", "6", "8"}


def hand(rule, x, w, b, r):
    """R of the input of x @ w.T + b, entry by entry."""
    up, down, more, less = x.clamp(min=0), x.clamp(max=0), w.clamp(min=0), w.clamp(max=0)
    pairs = x[:, None] * w  # (B, out, in)
    raises, lowers = up[:, None] * more + down[:, None] * less, up[:, None] * less + down[:, None] * more

    def shared(parts, bias):
        return (parts * (r / (parts.sum(2) + bias))[:, :, None]).sum(1)

    if rule == "epsilon":
        return shared(pairs, b)
    if rule == "z_plus":
        return shared(raises, b.clamp(min=0))
    if rule == "alpha_beta":
        return 2 * shared(raises, b.clamp(min=0)) - shared(lowers, b.clamp(max=0))
    if rule == "flat":
        return (r[:, :, None] / x.shape[1]).expand(-1, -1, x.shape[1]).sum(1)
    if rule == "squared_weights":
        return shared((w**2).expand_as(pairs), 0)
    if rule == "z_box":
        return shared(pairs + 3 * more - 3 * less, 0)
    assert rule == "gamma"
    z = pairs.sum(2) + b
    g_up = (up[:, None] * (w + 0.25 * more)) + (down[:, None] * (w + 0.25 * less))
    g_down = (up[:, None] * (w + 0.25 * less)) + (down[:, None] * (w + 0.25 * more))
    s_up = (r * (z > 0)) / (g_up.sum(2) + b + 0.25 * b.clamp(min=0))
    s_down = (r * (z <= 0)) / (g_down.sum(2) + b + 0.25 * b.clamp(max=0))
    return (g_up * s_up[:, :, None] + g_down * s_down[:, :, None]).sum(1)


MAP_RULES = {
    "alpha_beta": rules.alpha_beta(),
    "epsilon": rules.epsilon_map(),
    "flat": rules.flat(),
    "gamma": rules.gamma(0.25),
    "squared_weights": rules.squared_weights(),
    "z_box": rules.z_box(-3.0, 3.0),
    "z_plus": rules.z_plus(),
}


@pytest.mark.parametrize("name", MAP_RULES)
@pytest.mark.parametrize("form", ["dense", "convolution"])
def test_rules_of_maps_are_their_equations(name, form):
    x, w, b, r = inputs(4, 6), inputs(5, 6, seed=1), inputs(5, seed=2), inputs(4, 5, seed=3)
    model = nn.Linear(6, 5).double() if form == "dense" else nn.Conv2d(6, 5, 1).double()
    with torch.no_grad():
        model.weight.copy_(w.view_as(model.weight))
        model.bias.copy_(b)
    shaped, start = (x, r) if form == "dense" else (x[:, :, None, None], r[:, :, None, None])
    found = relevance(model, shaped, recipe="epsilon", rules=[On(form, MAP_RULES[name])], start=start)
    assert_close(found.map.view_as(x), hand(name, x, w, b, r))


def test_positions_and_weight_names_choose_rules():
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4))).double()
    x = inputs(2, 4)
    entries = [
        On("dense", rules.flat(), position="first"),
        On("dense", rules.z_plus(), weight="1.*"),
        On("dense", rules.gamma(), position=(0.6, 0.7)),
        On("dense", rules.absorb("stop"), position="middle"),
    ]
    found = relevance(model, x, rules=entries)
    assert {(row.rule, row.count) for row in found.served if row.op == "mm"} == {
        ("epsilon", 1),
        ("flat", 1),
        ("gamma", 1),
        ("z_plus", 1),
    }
    with pytest.raises(InputError, match="did you mean dense"):
        relevance(model, x, rules=[On("densee", rules.flat())])
    with pytest.raises(InputError, match="position"):
        relevance(model, x, rules=[On("dense", rules.flat(), position="third")])
    with pytest.raises(InputError, match="did you mean epsilon"):
        relevance(model, x, recipe="epsilo")


def test_attention_is_the_same_fused_and_written_out():
    query, key, value = inputs(2, 2, 5, 3), inputs(2, 2, 5, 3, seed=1), inputs(2, 2, 5, 3, seed=2)
    mask = torch.randn(5, 5).double().masked_fill(torch.eye(5) > 0, -torch.inf)

    def fused(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def written(q, k, v):
        return (q @ k.mT * 3**-0.5 + mask).softmax(-1) @ v

    start = inputs(2, 2, 5, 3, seed=3)
    for recipe in ("epsilon", "cp_lrp", "gradient", recipes.relp(["AH-rule"])):
        one, two = (relevance(f, query, key, value, recipe=recipe, start=start) for f in (fused, written))
        for ours, theirs in zip(one.map, two.map):
            assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
        if isinstance(recipe, str) and recipe == "cp_lrp":
            assert one.map[0].abs().max() == 0
            assert_close(one.map[2].sum(), start.sum())
            assert next(iter(one.heads.values())).shape == (2, 2)
            assert_close(next(iter(one.heads.values())), start.sum((2, 3)))


def test_heads_that_share_keys_are_heads_with_copies_of_them():
    query, key, value, start = (
        inputs(2, 4, 5, 3),
        *(inputs(2, 2, 5, 3, seed=seed) for seed in (1, 2)),
        inputs(2, 4, 5, 3),
    )

    def shared(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def copied(q, k, v):
        return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))

    for recipe in ("epsilon", "cp_lrp", "gradient", recipes.relp(["AH-rule"])):
        one, two = (relevance(f, query, key, value, recipe=recipe, start=start) for f in (shared, copied))
        for ours, theirs in zip(one.map, two.map):
            assert_close(ours, theirs)


def test_softmax_rule_is_its_expansion():
    x, r = inputs(3, 5), inputs(3, 5, seed=1)
    p = x.softmax(1)
    assert_close(relevance(lambda y: y.softmax(1), x, start=r).map, x * (r - p * r.sum(1, keepdim=True)))


def test_norms_composed_and_fused_agree():
    x, r = inputs(3, 6), inputs(3, 6, seed=1)
    w, b = inputs(6, seed=2), inputs(6, seed=3)

    def composed(y):
        y = y - y.mean(1, keepdim=True)
        return y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt() * w + b

    def by_rsqrt(y):
        y = y - y.mean(1, keepdim=True)
        return y * torch.rsqrt(y.pow(2).mean(1, keepdim=True) + 1e-5) * w + b

    expected = relevance(lambda y: F.layer_norm(y, (6,), w, b), x, start=r).map
    for program in (composed, by_rsqrt):
        assert_close(relevance(program, x, start=r).map, expected)


def test_channels_relative_to_their_mean_norm_are_held_as_other_norms_are():
    x, r = inputs(2, 6, 3, 4), inputs(2, 6, 3, 4, seed=1)
    norm = ResponseNorm(6).double()
    nn.init.normal_(norm.gamma)
    nn.init.normal_(norm.beta)

    def composed(y):
        size = y.square().sum((2, 3), keepdim=True).sqrt()
        return y * (1 + norm.gamma * size / (size.mean(1, keepdim=True) + norm.eps)) + norm.beta

    expected = (norm(x) - norm.beta) / norm(x) * r  # what beta does not add comes from x
    for program in (norm, composed):
        assert_close(relevance(program, x, start=r).map, expected.detach())


def test_a_softmax_that_is_composed_holds_its_maximum_and_its_sum():
    x = inputs(3, 5)

    def stable(y):
        e = (y - y.amax(1, keepdim=True)).exp()
        return e / e.sum(1, keepdim=True)

    r = inputs(3, 5, seed=1)
    assert_close(relevance(stable, x, start=r).map, r)


def test_gates_and_magnitudes():
    a, b, r = inputs(3, 4), inputs(3, 4, seed=1), inputs(3, 4, seed=2)
    for found, shares in (
        (relevance(torch.mul, a, b, start=r), (r / 2, r / 2)),
        (relevance(torch.add, a, b, start=r), (a / (a + b) * r, b / (a + b) * r)),
        (
            relevance(torch.add, a, b, start=r, recipe="dynamic_lrp"),
            [z.abs() / (a.abs() + b.abs()) * r for z in (a, b)],
        ),
        (
            relevance(torch.mul, a, b, start=r, recipe="dynamic_lrp"),
            [z.abs() / (a.abs() + b.abs()) * r for z in (a, b)],
        ),
        (relevance(torch.sub, a, b, start=r, recipe="official_dynamic_lrp"), (r / 2, r / 2)),
    ):
        for ours, theirs in zip(found.map, shares):
            assert_close(ours, theirs)
    mean = relevance(lambda y: y.mean(1), a, recipe="dynamic_lrp", start=r[:, 0])
    assert_close(mean.map, a.abs() / a.abs().sum(1, keepdim=True) * r[:, :1])


def test_an_operation_without_a_rule_is_named_with_its_share():
    x = inputs(3, 4).abs() + 1
    found = relevance(lambda y: torch.special.bessel_j0(y) + y, x, start=torch.ones(3, 4).double())
    assert list(found.unknown) == ["special_bessel_j0"]
    j = torch.special.bessel_j0(x)
    assert_close(found.unknown["special_bessel_j0"], ((j / (j + x)).abs().sum() / 12).item())
    assert "special_bessel_j0" not in {each.op for each in found.absorbed}
    assert relevance(lambda y: y.sin(), x, start=x).unknown == {}


def test_a_number_takes_nothing_under_any_recipe():
    x, r = inputs(3, 4), inputs(3, 4, seed=1)
    for program in (lambda y: y * 0.5, lambda y: 3 * y, lambda y: y / 2):
        assert_close(relevance(program, x, start=r).map, r)
        ours, theirs = (relevance(program, x, start=r, recipe=recipe).map for recipe in ("relp", "gradient"))
        assert_close(ours, theirs)


def test_what_a_mask_drops_stands_in_the_ledger():
    x, r = inputs(3, 4), inputs(3, 4, seed=1)
    found = relevance(lambda y: y.masked_fill(torch.eye(3, 4) > 0, 7.0), x, start=r)
    assert_close(sum(each.amount for each in found.absorbed), r.diagonal().sum().item())
    assert_close(found.error.sum().item(), -r.diagonal().sum().item())


def test_blends_are_sums():
    a, b, c, r = (inputs(3, 4, seed=seed) for seed in range(4))
    for found, terms in (
        (relevance(lambda x, y: torch.lerp(x, y, 0.3), a, b, start=r), (0.7 * a, 0.3 * b)),
        (relevance(lambda x, y, z: torch.addcmul(x, y, z), a, b, c, start=r), (a, b * c / 2, b * c / 2)),
    ):
        for ours, term in zip(found.map, terms):
            assert_close(ours, term / sum(terms) * r)
