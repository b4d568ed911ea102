"""Dictionaries held against known attributes: supervised ones, matches, writing back, sparse edits."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.explain.dictionaries import (
    AttributionAutoencoder,
    GatedAutoencoder,
    MatchingPursuit,
    ReluAutoencoder,
    Site,
    TopKAutoencoder,
    approximation,
    control,
    edit_sparsely,
    feature_weights,
    fit_supervised,
    match_features,
    train_dictionary,
)
from saccade.explain.relevance import coefficients


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labelled(count=60):
    """Additive activations of two attributes that are not balanced, with gaps in their values."""
    rng = torch.Generator().manual_seed(0)
    first = torch.tensor([2, 5, 9])[torch.randint(3, (count,), generator=rng)]
    second = torch.where(torch.rand(count, generator=rng) < 0.8, first % 2, 1 - first % 2)  # depends on the first
    vectors = {2: rows(7, seed=1), 5: rows(7, seed=2), 9: rows(7, seed=3)}
    x = torch.stack([vectors[int(a)] + int(b) * rows(7, seed=4) for a, b in zip(first, second)])
    return x, {"first": first, "second": second}, vectors


# Supervised dictionaries


def test_least_squares_is_exact_for_an_additive_model_and_means_are_not():
    x, labels, vectors = labelled()
    found = fit_supervised(x, labels)
    assert_close(found.reconstruct(labels), x)
    assert_close(found.vectors["first"][1] - found.vectors["first"][0], vectors[5] - vectors[2])
    for name, each in labels.items():
        assert_close(found.part(name, each).mean(0), torch.zeros(7).double())
    means = fit_supervised(x, labels, method="mean")
    assert_close(means.vectors["first"][2], x[labels["first"] == 9].mean(0) - x.mean(0))
    assert not torch.allclose(means.reconstruct(labels), x, atol=0.1)


def test_a_supervised_edit_exchanges_one_value():
    x, labels, vectors = labelled()
    found = fit_supervised(x, labels)
    edited = found.edit(x, "first", labels["first"], torch.full_like(labels["first"], 9))
    expected = torch.stack([vectors[9] + int(b) * rows(7, seed=4) for b in labels["second"]])
    assert_close(edited, expected)


def test_errors_of_supervised_dictionaries():
    x, labels, _ = labelled()
    found = fit_supervised(x, labels)
    for make, words in {
        lambda: found.part("first", torch.tensor([2, 3])): "label 3 was not there before: known are 2, 5, 9",
        lambda: found.part("frist", labels["first"]): "did you mean first",
        lambda: found.reconstruct({"first": labels["first"]}): "give first, second",
        lambda: fit_supervised(x, {}): "with 0 attributes",
        lambda: fit_supervised(x, {"a": labels["first"][:3]}): r"whole numbers \(60,\)",
        lambda: fit_supervised(x, labels, method="median"): "method is 'median'",
    }.items():
        with pytest.raises(InputError, match=words):
            make()


# Matches


def test_matches_are_counted_by_hand():
    codes = rows(50, 4).relu()
    codes[:, 3] = 0
    labels = torch.randint(3, (50,), generator=torch.Generator().manual_seed(0)) * 10
    found = match_features(codes, labels)
    assert found.values.tolist() == [0, 10, 20]
    for feature in range(3):
        for place, value in enumerate((0, 10, 20)):
            fired, member = codes[:, feature] > 0, labels == value
            precision, recall = ((fired & member).sum() / each.sum() for each in (fired, member))
            ours = [each[feature, place].item() for each in (found.precision, found.recall, found.f1)]
            expected = [precision.item(), recall.item(), (2 / (1 / precision + 1 / recall)).item()]
            assert ours == pytest.approx(expected)
    assert found.precision[3].isnan().all()
    assert found.f1[3].isnan().all()
    assert (found.recall[3] == 0).all()
    f1, feature = found.best()
    assert (feature < 3).all()  # NaN is lowest
    assert_close(f1, found.f1[:3].amax(0))
    scores = found.scores(labels)
    assert_close(scores[:, :3], found.f1[:3].mT[labels // 10])
    assert (scores[:, 3] == -torch.inf).all()
    with pytest.raises(InputError, match=r"give \(N, features\)"):
        match_features(codes, labels[:3])


# Writing back


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.node = nn.Linear(5, 6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.drop(self.node(x)).tanh())[:, -1]


def make_net():
    torch.manual_seed(0)
    return Net().double(), rows(8, 4, 5)


def test_a_site_reads_and_writes_its_own_part():
    net, x = make_net()
    site = Site(net, "node", position=-1, channels=slice(2, 5))
    assert_close(site.read(x), net.node(x)[:, -1, 2:5])
    values = rows(8, 3, seed=1)
    changed = net.node(x).clone()
    changed[:, -1, 2:5] = values
    assert_close(site.write(x, values), net.head(changed.tanh())[:, -1].detach())
    assert_close(site.write(x, site.read(x)), net.eval()(x).detach())
    before = Site(net.train(), "head:in")
    assert before.read(x).shape == (8, 4, 6)
    assert net.training
    conv = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten()).double()
    map = Site(conv, "0", axis=1)
    assert map.read(rows(2, 2, 3, 4)).shape == (2, 3, 4, 3)
    assert_close(map.write(rows(2, 2, 3, 4), torch.zeros(2, 3, 4, 3).double()), torch.zeros(2, 36).double())


def test_approximation_runs_from_the_mean_to_the_activation():
    net, x = make_net()
    site = Site(net, "node", position=-1)

    def metric(logits):
        return logits[:, 0] - logits[:, 1]

    a = site.read(x)
    perfect, nothing = (approximation(site, x, each, metric) for each in (a, a.mean(0).expand_as(a)))
    assert perfect[:2] == pytest.approx((1, 1))
    assert nothing[:2] == pytest.approx((0, 0))
    half = approximation(site, x, (a + a.mean(0)) / 2, metric)
    assert half.clean == pytest.approx(metric(net.eval()(x).detach()).mean().item())
    by_hand = metric(net.head(((a + a.mean(0)) / 2).tanh())).mean().item()
    assert half.sufficient == pytest.approx(by_hand)
    assert half.sufficiency == pytest.approx((by_hand - half.ablated) / (half.clean - half.ablated))
    assert half.necessity == pytest.approx((half.clean - half.necessary) / (half.clean - half.ablated))


def test_control_is_judged_by_patching():
    net, x = make_net()
    site = Site(net, "node", position=-1)
    patched = 5 * rows(8, 6, seed=1)
    assert control(site, x, patched, patched) == 1
    found = control(site, x, 5 * rows(8, 6, seed=2), patched)
    expected = (net.head((5 * rows(8, 6, seed=2)).tanh()).argmax(-1) == net.head(patched.tanh()).argmax(-1)).double()
    assert found == expected.mean().item() < 1


def test_errors_of_sites():
    net, x = make_net()
    site = Site(net, "node", position=-1)
    twice = nn.Sequential(net.node, nn.Linear(6, 5).double(), net.node)
    for make, words in {
        lambda: Site(net, "nod"): "did you mean node",
        lambda: site.write(x, rows(8, 4, 6)): r"values are \(8, 4, 6\), but 'node' has \(8, 6\)",
        lambda: Site(twice, "0").read(x): "runs more than once",
        lambda: approximation(site, x, site.read(x), lambda _: torch.ones(8)): "does not depend on this site",
        lambda: control(site, x, site.read(x), site.read(x), lambda out: out): "give `predict`",
    }.items():
        with pytest.raises(InputError, match=words):
            make()


# Sparse edits

KINDS = {
    "relu": lambda: ReluAutoencoder(7, 20),
    "gated": lambda: GatedAutoencoder(7, 20),
    "attribution": lambda: AttributionAutoencoder(7, 20),
    "top-k": lambda: TopKAutoencoder(7, 20, k=4),
    "pursuit": lambda: MatchingPursuit(7, 20, k=4),
}


def make_dictionary(kind):
    torch.manual_seed(0)
    model = KINDS[kind]().double().eval()
    model.calibrate(3 * rows(50, 7) + 1)
    if isinstance(model, ReluAutoencoder):
        nn.init.normal_(model.bias)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_weights_sum_to_one(kind):
    model = make_dictionary(kind)
    assert_close(feature_weights(model, rows(9, 7)).sum(-1), torch.ones(9).double())


def test_weights_of_nothing_are_nothing():
    model = ReluAutoencoder(7, 20)
    model.encoder_bias.data.fill_(-1e3)
    assert not feature_weights(model, torch.randn(3, 7)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_all_features_exchanged_is_the_counterfactual_but_for_the_error(kind):
    model, x, other = make_dictionary(kind), rows(9, 7), rows(9, 7, seed=1)
    scores = torch.ones(9, 20).double()
    found = edit_sparsely(model, x, other, m=20, scores=(scores, scores))
    assert_close(found.activation - x, model(other).reconstruction - model(x).reconstruction)
    assert_close(found.removed_weight, torch.ones(9).double())
    assert_close(found.added_weight, torch.ones(9).double())


def test_features_of_highest_score_are_exchanged():
    model, x, other = make_dictionary("relu"), rows(9, 7), rows(9, 7, seed=1)
    old, new = model.encode(x), model.encode(other)
    scores = rows(9, 20, seed=2), rows(9, 20, seed=3)
    scores[0][:, :5] = -torch.inf
    found = edit_sparsely(model, x, other, m=2, scores=scores)
    for row in range(9):
        for codes, score, chosen in ((old, scores[0], found.removed), (new, scores[1], found.added)):
            able = [f for f in range(20) if codes[row, f] > 0 and score[row, f] > -torch.inf]
            best = sorted(able, key=lambda f: -score[row, f].item())[:2]
            assert chosen[row].nonzero().flatten().tolist() == sorted(best)
    change = (new * found.added - old * found.removed) @ model.atoms * model.scale
    assert_close(found.activation, x + change)


def test_greedy_steps_are_the_best_of_their_turn():
    model, x, other = make_dictionary("relu"), rows(9, 7), rows(9, 7, seed=1)
    target = rows(9, 7, seed=5)
    old, new = model.encode(x), model.encode(other)
    found = edit_sparsely(model, x, other, m=2, target=target)
    for row in range(9):
        current, sides = x[row], {"out": set(), "in": set()}
        while True:
            steps = {}
            for side, codes, sign in (("out", old, -1), ("in", new, 1)):
                for f in range(20):
                    if codes[row, f] > 0 and f not in sides[side] and len(sides[side]) < 2:
                        moved = current + sign * codes[row, f] * model.atoms[f] * model.scale
                        steps[side, f] = (moved - target[row]).norm().item(), moved
            best = min(steps, key=lambda step: steps[step][0], default=None)
            if best is None or steps[best][0] >= (current - target[row]).norm().item():
                break
            sides[best[0]].add(best[1])
            current = steps[best][1]
        assert_close(found.activation[row], current)
        assert set(found.removed[row].nonzero().flatten().tolist()) == sides["out"]
        assert set(found.added[row].nonzero().flatten().tolist()) == sides["in"]


def test_errors_of_edits():
    model, x = make_dictionary("relu"), rows(9, 7)
    scores = torch.ones(9, 20), torch.ones(9, 20)
    for make, words in {
        lambda: edit_sparsely(model, x, x, m=21): "m is 21",
        lambda: edit_sparsely(model, x, x[:3], m=2): r"counterfactual \(3, 7\)",
        lambda: edit_sparsely(model, x, x, m=2, scores=scores, target=x): "chosen by one of them",
        lambda: edit_sparsely(model, x, x, m=2, scores=(scores[0][:3], scores[1])): r"scores are \(3, 20\)",
    }.items():
        with pytest.raises(InputError, match=words):
            make()


# The autoencoders


def test_gates_decide_and_sizes_are_another_line():
    model, x = make_dictionary("gated"), rows(9, 7)
    for parameter in (model.stretch, model.size_bias, model.encoder_bias):
        nn.init.normal_(parameter)
    inner = (x - model.centre) / model.scale - model.bias
    common = inner @ model.encoder.mT
    size = (common * model.stretch.exp() + model.size_bias).clamp_min(0)
    assert_close(model.encode(x), torch.where(common + model.encoder_bias > 0, size, 0))
    gate = (common + model.encoder_bias).clamp_min(0)
    errors = (model(x).reconstruction - x) / model.scale, gate @ model.atoms - inner
    loss = sum(each.square().sum(-1).mean() for each in errors) + 0.1 * gate.sum(-1).mean()
    assert_close(model.loss(x), loss)
    slopes = torch.autograd.grad(model.loss(x), [p for p in model.parameters() if p.requires_grad])
    assert all(slope.any() for slope in slopes)


def test_attribution_prices_what_the_metric_sees():
    model, x, slope = make_dictionary("attribution"), rows(9, 7), rows(9, 7, seed=1)
    relu = ReluAutoencoder(7, 20).double()
    relu.load_state_dict(model.state_dict())
    reading = model(x)
    seen = reading.codes * model.scale * (slope @ model.atoms.mT)
    paid = 0.1 * seen.abs().sum(-1) + 0.1 * ((x - reading.reconstruction) * slope).sum(-1).abs()
    assert_close(model.loss(torch.cat([x, slope], 1)), relu.loss(x) + paid.mean())
    with pytest.raises(InputError, match=r"give \(N, 14\)"):
        model.loss(x)


def test_both_train_on_rows():
    x, slopes = rows(200, 7).float(), rows(200, 7, seed=1).float()
    for model, table in ((GatedAutoencoder(7, 12), x), (AttributionAutoencoder(7, 12), torch.cat([x, slopes], 1))):
        found = train_dictionary(model, table, steps=60, batch_size=50, rate=1e-2)
        assert found.losses[-5:].mean() < 0.9 * found.losses[:5].mean()
        assert model.centre.any()
    net, inputs = make_net()
    activation, gradient = coefficients(net.eval(), inputs, lambda out: out[:, 0].sum(), ["node"], recipe="gradient")[
        "node"
    ]
    leaf = activation.detach().requires_grad_()
    (slope,) = torch.autograd.grad(net.head(leaf.tanh())[:, -1, 0].sum(), leaf)
    assert_close(gradient, slope)
    table = torch.cat([activation, gradient], -1)[:, -1].detach()
    train_dictionary(AttributionAutoencoder(6, 12).double(), table, steps=3)
    with pytest.raises(InputError, match=r"of shape \(200, 14\)"):
        train_dictionary(ReluAutoencoder(7, 12), torch.cat([x, slopes], 1), steps=5, batch_size=200)
