"""Circuits: integer codes, scores of heads and pairs, heads of a model, the whole search."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import saccade
from saccade.errors import InputError
from saccade.explain.dictionaries import (
    Heads,
    ReluAutoencoder,
    circuit_auc,
    edge_scores,
    find_circuit,
    integer_codes,
    mean_difference,
    node_scores,
)


def draw(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Scores


def test_a_code_without_an_active_unit_is_one_of_its_own():
    model = ReluAutoencoder(3, 4).double()
    model.encoder.data = torch.cat([torch.eye(3), -torch.ones(1, 3)]).double()
    x = torch.tensor([[1, 2, 0], [3, 2, 0], [-1, 0, -1], [0, 0, 0]]).double()
    assert integer_codes(model, x).tolist() == [1, 0, 3, 4]


def test_node_scores_are_sets():
    positive, negative = draw(6, 9, 5), draw(6, 7, 5, seed=1)
    unique = [set(a.tolist()) - set(b.tolist()) for a, b in zip(positive.mT, negative.mT)]
    counts = torch.tensor([float(len(each)) for each in unique])
    sizes = torch.tensor([len(set(each.tolist())) for each in positive.mT])
    assert counts.any()
    assert_close(node_scores(positive, negative), counts)
    assert_close(node_scores(positive, negative, normalise="share"), counts / sizes)
    assert_close(node_scores(positive, negative, normalise="softmax"), counts.exp() / counts.exp().sum())


def test_edge_scores_are_sets_of_pairs():
    positive, negative = draw(3, 9, 4), draw(4, 7, 4, seed=1)
    found = edge_scores(positive, negative)
    for a in range(4):
        for b in range(4):
            ours, theirs = ({(int(row[a]), int(row[b])) for row in side} for side in (positive, negative))
            assert found[a, b] == (len(ours - theirs) if a != b else 0)
    assert found.any()


def test_area_and_baseline():
    scores, members = torch.tensor([3.0, 1.0, 1.0, 2.0]), torch.tensor([True, True, False, False])
    assert circuit_auc(scores, members) == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    positive, negative = rows(9, 4, 3), rows(9, 4, 3, seed=1)
    expected = (positive.mean(0) - negative.mean(0)).square().sum(-1).sqrt()
    assert_close(mean_difference(positive, negative), expected)


# Heads of a model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = (saccade.create_mixer("attention", 6, num_heads=3) for _ in range(2))

    def forward(self, x):
        x = x + self.one(x)
        return x + self.two(x)


def make_net():
    torch.manual_seed(0)
    net = Net().double().eval()
    return net, Heads(net, ["one.proj", "two.proj"], 3), rows(5, 4, 6)


def test_heads_add_up_to_the_layers_output():
    net, heads, x = make_net()
    outputs = heads.outputs(x, position=2)
    assert outputs.shape == (5, 6, 6)
    one = net.one(x)
    for layer, given, own in ((net.one, one, outputs[:, :3]), (net.two, net.two(x + one), outputs[:, 3:])):
        assert_close(own.sum(1) + layer.proj.bias, given[:, 2])


def test_heads_outside_are_at_their_mean():
    net, heads, x = make_net()
    assert_close(heads.keep(x, torch.ones(6, dtype=torch.bool)), net(x))
    members = torch.tensor([True, False, True, True, True, True])
    mixed = []
    net.one.proj.register_forward_pre_hook(lambda _, args: mixed.append(args[0].clone()))
    net(x)
    (parts,) = mixed
    parts[..., 2:4] = parts[..., 2:4].mean(0)
    y = x + nn.functional.linear(parts, net.one.proj.weight, net.one.proj.bias)
    net.one.proj._forward_pre_hooks.clear()
    assert_close(heads.keep(x, members), y + net.two(y))


# The whole search


def planted(count=40):
    """Eight heads; the third and sixth give something on positives alone, and less than the others."""
    maps, members = rows(8, 4, 5), torch.zeros(8, dtype=torch.bool)
    members[[2, 5]] = True
    sides = []
    for seed, on in ((1, 1.0), (2, 0.0)):
        given = torch.einsum("nl,hld->nhd", rows(count, 4, seed=seed), maps)
        given[:, members] *= 0.2 * on
        sides.append((given + 0.02 * rows(count, 8, 5, seed=3)).float())
    return *sides, members


def test_a_planted_circuit_is_found():
    positive, negative, members = planted()
    torch.manual_seed(0)
    found = find_circuit(positive, negative, num_codes=40, l1=0.1, steps=200)
    assert circuit_auc(found.nodes, members) == 1
    assert circuit_auc(mean_difference(positive, negative), members) < 1
    threshold = found.nodes[members].min().item()
    assert_close(found.members(threshold), members)
    assert_close(found.nodes, node_scores(found.positive, found.negative))
    assert_close(found.edges, found.edges.mT)
    strongest = found.edges.flatten().argmax().item()
    assert members[strongest // 8] or members[strongest % 8]


def test_a_heads_length_does_not_matter():
    positive, negative, _ = planted(10)
    length = 2.0 ** torch.arange(8)[:, None]  # powers of two: nothing is rounded
    found = []
    for factor in (torch.ones(8, 1), length):
        torch.manual_seed(0)
        found.append(find_circuit(positive * factor, negative * factor, num_codes=20, steps=20))
    assert_close(found[0].positive, found[1].positive)


def test_errors():
    net, heads, x = make_net()
    positive, negative = draw(3, 9, 4), draw(3, 9, 4)
    for make, words in {
        lambda: node_scores(positive.float(), negative): "positive codes are torch.float32",
        lambda: node_scores(positive, negative[:, :2]): r"negative codes are torch.int64 of shape \(9, 2\)",
        lambda: node_scores(positive, negative, normalise="max"): "normalise is 'max'",
        lambda: circuit_auc(torch.ones(3), torch.ones(3, dtype=torch.bool)): "heads inside and outside",
        lambda: find_circuit(torch.ones(3, 2, 4), torch.ones(4, 2, 4)): r"negative \(4, 2, 4\)",
        lambda: Heads(net, ["one"], 3): "'one' is a ",
        lambda: Heads(net, ["one.proj"], 4): "'one.proj' is 6 wide: .* 4 heads",
        lambda: Heads(net, [], 3): "no projections",
        lambda: heads.keep(x, torch.ones(3, dtype=torch.bool)): r"booleans \(6,\)",
        lambda: Heads(nn.Sequential(net.one, net.one), ["0.proj"], 3).outputs(x): "'0.proj:in' runs more than once",
    }.items():
        with pytest.raises(InputError, match=words):
            make()
    net.spare = nn.Linear(6, 6)
    with pytest.raises(InputError, match="'spare:in' did not run"):
        Heads(net, ["spare"], 3).outputs(x)
