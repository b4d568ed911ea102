"""Merging of channels: copies are found and leave no trace whatever the network, laws, errors."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from saccade.errors import InputError
from saccade.explain.merging import fold_batch_norms, merge_features, prune_features
from saccade.explain.merging.merge import _Work

IMAGE = torch.zeros(1, 3, 6, 7)


class Plain(nn.Module):
    """Convolutions with norms, a map that is flattened channel by channel, two linear layers."""

    def __init__(self, wide=1):
        super().__init__()
        n = 3 * wide
        self.features = nn.Sequential(
            nn.Conv2d(3, n, 3, padding=1), nn.BatchNorm2d(n), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(n, 2 * n, 2, bias=False), nn.BatchNorm2d(2 * n), nn.PReLU(2 * n), nn.Dropout(0.5),
        )  # fmt: skip
        self.hidden, self.head = nn.Linear(2 * n * 4, n), nn.Linear(n, 4)

    def forward(self, x):
        return self.head(self.hidden(self.features(x).flatten(1)).relu())


class Residual(nn.Module):
    """A stream that three layers write to; a norm before a layer, which cannot be folded; a transposed convolution."""

    def __init__(self, wide=1):
        super().__init__()
        n = 4 * wide
        self.stem, self.first, self.second = (
            nn.Conv2d(3, n, 1),
            nn.Conv2d(n, 3 * wide, 3, padding=1),
            nn.Conv2d(n, n, 1),
        )
        self.back, self.norm = nn.ConvTranspose2d(3 * wide, n, 3, padding=1), nn.BatchNorm2d(n, affine=False)
        self.head = nn.Linear(n, 4)

    def forward(self, x):
        x = self.stem(x).relu_()
        x = x + self.back(self.first(self.norm(x)).relu())
        x += nn.functional.leaky_relu(self.second(x))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Concatenation, padding, convolution channel by channel, a scale for each channel, average pooling."""

    def __init__(self, wide=1):
        super().__init__()
        n = 3 * wide
        self.one, self.two, self.gamma = nn.Conv2d(3, n, 1), nn.Conv2d(n, n, 1), nn.Parameter(torch.randn(n))
        self.deep = nn.Conv2d(n, n, 3, groups=n)
        self.last, self.head = nn.Conv2d(2 * n, 5 * wide, 1), nn.Conv2d(5 * wide, 4, 1)

    def forward(self, x):
        x = self.one(x).relu()
        y = nn.functional.pad(self.two(x) * self.gamma[:, None, None], (1, 1, 1, 1))
        x = torch.cat([x, self.deep(y).relu()], 1)
        return nn.functional.adaptive_avg_pool2d(self.head(self.last(x)), 1).flatten(1)


class Curved(nn.Module):
    """Tokens with channels last, GELU, gates that multiply channels with channels."""

    def __init__(self, wide=1):
        super().__init__()
        n = 3 * wide
        self.stem, self.position = nn.Conv2d(3, n, 1), nn.Parameter(torch.randn(1, 42, n))
        self.fc1, self.fc2, self.gate, self.head = (
            nn.Linear(n, 2 * n),
            nn.Linear(2 * n, n),
            nn.Linear(n, n),
            nn.Linear(n, 4),
        )

    def forward(self, x):
        x = self.stem(x).flatten(2).mT + self.position
        x = x + self.fc2(nn.functional.gelu(self.fc1(x)))
        x = x * self.gate(x.mean(1)).sigmoid()[:, None]
        return self.head(x.amax(1))


def settle(model, seed=0):
    torch.manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.randn_like(tensor)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.data = module.running_var.abs() + 0.5
    return model.double().eval()


READS = {"second.weight", "first.weight", "last.weight", "head.weight", "hidden.weight", "features.4.weight"} | {
    f"{name}.weight" for name in ("two", "fc1", "fc2", "gate")
}


def double(make):
    """A network, and one of twice its widths in which each channel is there twice and read with half the weight."""
    small, large = settle(make()), settle(make(2))
    wide = dict([*large.named_parameters(), *large.named_buffers()])
    for name, tensor in (*small.named_parameters(), *small.named_buffers()):
        reads = 0 if name == "back.weight" else 1
        value = tensor.detach().clone()
        for axis, (few, many) in enumerate(zip(tensor.shape, wide[name].shape)):
            if many != few:
                assert many == 2 * few
                parts = value.chunk(2, axis) if name == "last.weight" and axis == 1 else [value]  # behind a cat
                value = torch.cat([part for each in parts for part in (each, each)], axis)
                if axis == reads and (name in READS or name == "back.weight"):
                    value = value / 2
        wide[name].data = value
    return small, large


CASES = {"plain": (Plain, "sum"), "residual": (Residual, "sum"), "dense": (Dense, "sum"), "curved": (Curved, "mean")}
every_net = pytest.mark.parametrize(("make", "rule"), CASES.values(), ids=CASES)


@every_net
def test_copies_are_merged_and_the_output_stays(make, rule):
    small, large = double(make)
    images = torch.randn(5, 3, 6, 7).double()
    assert_close(large(images), small(images))
    found = merge_features(large, IMAGE.double(), beta=0, rule=rule)
    assert all(layer.kept is None or layer.kept == "they are the model's output" for layer in found.layers)
    assert all(layer.after == layer.before // 2 for layer in found.layers if layer.kept is None)
    assert_close(found.model(images), small(images))
    assert sum(each.numel() for each in found.model.parameters()) == found.parameters[1] < found.parameters[0]


@every_net
def test_products_of_rows_stay_up_to_date(make, rule):
    work = _Work(settle(make(2)), IMAGE.double(), rule, "fold", ())
    for _ in range(2):
        for group in work.open:
            work.merge(group, *work.nearest_pair(group, 0.99, True))
    kept = [work.distances(group, False) for group in work.open]
    work.grams.clear()
    assert_close(kept, [work.distances(group, False) for group in work.open], atol=1e-9, rtol=1e-9)


def test_two_layers_by_hand():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    net[1].weight.data = torch.tensor([[1.0, 0.0], [1.1, 0.0], [0.0, 9.0]]).double()
    net[1].bias.data = torch.tensor([1.0, 2.0, 3.0]).double()
    net[3].weight.data = torch.tensor([[5.0, 5.2, 7.0]]).double()
    found = merge_features(net, torch.zeros(1, 1, 1, 2).double(), beta=0.1)
    assert found.layers[0].members == ((2,), (0, 1))
    assert_close(found.model[1].weight.data, torch.tensor([[0.0, 9.0], [2.1, 0.0]]).double())
    assert_close(found.model[1].bias.data, torch.tensor([3.0, 3.0]).double())
    assert_close(found.model[3].weight.data, torch.tensor([[7.0, 5.1]]).double())
    assert found.model[1].out_features == found.model[3].in_features == 2


def test_third_channel_counts_once_in_the_mean():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    net[1].weight.data = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.2, 0.0], [0.0, 90.0]]).double()
    net[3].weight.data = torch.tensor([[3.0, 3.0, 6.0, 0.0]]).double()
    found = merge_features(net, torch.zeros(1, 1, 1, 2).double(), beta=0.1)
    assert found.layers[0].members == ((3,), (2, 0, 1))
    assert_close(found.model[3].weight.data, torch.tensor([[0.0, 4.0]]).double())


def test_a_bias_tells_channels_apart_if_it_counts():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    net[1].weight.data[1], net[3].weight.data[:, 1] = net[1].weight.data[0], net[3].weight.data[:, 0]
    image = torch.zeros(1, 1, 1, 2).double()
    assert merge_features(net, image, beta=0).widths["1"] == 2
    assert merge_features(net, image, beta=0, biases=True).widths["1"] == 3


def test_the_model_given_stays_as_it_is():
    net = Plain().train()
    before = {name: each.clone() for name, each in net.state_dict().items()}
    merge_features(net, IMAGE, beta=0.9)
    assert net.training
    assert all((before[name] == each).all() for name, each in net.state_dict().items())


def test_max_ratio_bounds_the_rounds():
    net = settle(Plain(4))
    widths = merge_features(net, IMAGE.double(), beta=0.99, max_ratio=0.25).widths
    assert widths == {"features.0": 9, "features.4": 18, "hidden": 9, "head": 4}
    assert merge_features(net, IMAGE.double(), beta=0.99, max_ratio=0).parameters[1] == 12 * 28 + 24 * (49 + 1) + (
        96 * 12 + 12 + 13 * 4
    )


def test_folded_norms_change_nothing():
    net = settle(Plain(2))
    folded = fold_batch_norms(net, IMAGE.double())
    images = torch.randn(5, 3, 6, 7).double()
    assert_close(folded(images), net(images))
    assert not any(isinstance(each, nn.BatchNorm2d) for each in folded.modules())


def test_pruning_leaves_the_largest_filters():
    net = settle(Plain(2))
    found = prune_features(net, IMAGE.double(), {"features.0": 2, "hidden": 3})
    folded = fold_batch_norms(net, IMAGE.double())
    sizes = folded.features[0].weight.flatten(1).norm(dim=1)
    assert found.layers[0].members == tuple((i,) for i in sorted(sizes.topk(2).indices.tolist()))
    left = [i for (i,) in found.layers[0].members]
    assert_close(found.model.features[0].weight, folded.features[0].weight[left])
    assert_close(found.model.features[4].weight, folded.features[4].weight[:, left])
    assert found.widths == {"features.0": 2, "features.4": 12, "hidden": 3, "head": 4}


def test_what_cannot_be_followed_keeps_its_channels():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.GELU(), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8),
        nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    kept = {layer.name: layer.kept for layer in merge_features(net, IMAGE, beta=0.99).layers}
    assert kept["0"] == "gelu does not commute with factors: rule='mean' merges what passes it"
    assert kept["4"] == "native_group_norm in 5 is not followed"
    assert kept["6"] is None
    assert kept["8"] == "they are the model's output"
    kept = {layer.name: layer.kept for layer in merge_features(net, IMAGE, beta=0.99, rule="mean").layers}
    assert kept["0"] == "2 is a convolution in 2 groups"


def test_heads_and_computed_weights_keep_their_channels():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.scaled, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.qkv(x).unflatten(1, (2, 4)).flip(1).flatten(1, 2)
            x = nn.functional.conv2d(self.proj(x), self.scaled.weight / self.scaled.weight.norm())
            return self.head(x).mean((2, 3))

    with pytest.raises(InputError, match=r"Heads can be merged\. qkv: view in qkv splits .*; proj: a weight of theirs"):
        merge_features(Heads(), IMAGE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 1.0}, "beta is 1.0"),
        ({"max_ratio": -1}, "max_ratio is -1"),
        ({"rule": "add"}, "rule is 'add'"),
        ({"batch_norm": "keep"}, "batch_norm is 'keep'"),
        ({"batch_norm": "sum", "rule": "mean"}, "batch_norm is 'sum' with rule 'mean'"),
        ({"keep": ["feature"]}, "keep names 'feature'"),
        ({"keep": ["features", "hidden"]}, "nothing in Plain can be merged. features.0: asked for"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(InputError, match=words):
        merge_features(Plain(), IMAGE, **options)


def test_wrong_widths():
    for widths, words in (
        ({"head": 2}, "cannot be pruned: they are"),
        ({"hidden": 0}, "is 0"),
        ({"x": 1}, "group is 'x'"),
    ):
        with pytest.raises(InputError, match=words):
            prune_features(Plain(), IMAGE, widths)


def test_code_that_counts_on_a_width_is_named():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8 * 42, 4)

        def forward(self, x):
            return self.head(self.one(x).relu().view(1, 8 * 42))

    with pytest.raises(InputError, match="counts on a width"):
        merge_features(Fixed(), IMAGE, beta=0.99)
