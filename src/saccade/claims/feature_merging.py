"""Feature complexity: how many channels are left when similar ones are merged, without data."""

import re
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from saccade.claims.framework import (
    Case,
    Paper,
    at_least,
    at_most,
    claim,
    equal,
    parse_args,
    play,
    relative_difference,
    rounding,
)
from saccade.claims.framework.convnet import train_convnet
from saccade.claims.framework.experiment import load_digits
from saccade.errors import InputError
from saccade.explain.merging import Narrowed, merge_features, prune_features

PAPER = Paper(
    title="Going Beyond Neural Network Feature Similarity: The Network Feature Complexity and Its Interpretation Using "
    "Category Theory",
    arxiv="2310.06756",
    published="2023-10-10",
    summary="Channels that an invertible linear map turns into one another, the next layer's weights with them, are "
    "equivalent; a layer's complexity is the number of channels left when equivalent ones are merged. The two most "
    "similar ones are merged again and again, by their weights alone.",
    home=("saccade.explain.merging.merge_features", "saccade.explain.merging.prune_features"),
    missing=(
        "figures on CIFAR-10 and ImageNet",
        "identity transforms on skip paths, with which each block of a ResNet gets a width of its own",
        "the category theory",
    ),
    differences=(
        "Official code adds up a norm's weights, biases, means and variances, so that even a merge of copies changes "
        "the output. Ours folds norms into the layer before; batch_norm='sum' is the official way.",
        "Official code finds the nearest pair by leaving out as many of the smallest distances as there are channels, "
        "and stops with an error where copies tie with the diagonal; ours leaves the diagonal out and merges copies.",
        "Official code is told the layers of VGG and ResNet, and leaves a ResNet's first convolution and layer1 as "
        "they are; ours follows channels through any model, ties those that residual adds tie, and takes keep.",
        "Activations that do not commute with factors, such as GELU, keep their channels under the paper's rule; "
        "rule='mean' is ours.",
    ),
)

RULE = "the merge rule"
EXPERIMENT = "an experiment of ours: digits, three convolutions of 32, 64 and 64 channels without norms"
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)


@claim("property", {"read alike": 0.0, "made alike": 0.0}, rounding, source=RULE)
def merging_is_exact_in_linear_pairs() -> dict[str, float]:
    """Between two linear layers the sum of what makes two channels with the mean of what reads them changes nothing, if
    they are read alike whatever makes them, or made alike whatever reads them: relative differences of the output."""
    errors = {}
    for name, layer, axis in (("read alike", 3, 1), ("made alike", 1, 0)):
        net = _pair(nn.Identity())
        weight = net[layer].weight.data.movedim(axis, 0)
        weight[1] = weight[0]
        if layer == 1:
            net[1].bias.data[1] = net[1].bias.data[0]
        errors[name] = _change_by_merging_first_two(net)
    return errors


@claim("property", 0.0, rounding, source=RULE)
def merging_is_exact_with_relu_where_channels_are_proportional() -> float:
    """With ReLU between the layers and one channel made by 3 times the weights and bias of the other, both read alike,
    the output stays the same."""
    net = _pair(nn.ReLU())
    net[1].weight.data[1], net[1].bias.data[1] = 3 * net[1].weight.data[0], 3 * net[1].bias.data[0]
    net[3].weight.data[:, 1] = net[3].weight.data[:, 0]
    return _change_by_merging_first_two(net)


@claim("property", "not exact", at_least(1e-3, "a difference that is no rounding"), source=RULE)
def merging_is_not_exact_with_relu_otherwise() -> float:
    """Where two channels before ReLU are read alike, but differ in sign, merging changes the output."""
    net = _pair(nn.ReLU())
    net[1].weight.data[1] = -0.9 * net[1].weight.data[0]
    net[3].weight.data[:, 1] = net[3].weight.data[:, 0]
    return _change_by_merging_first_two(net)


@claim(
    "property",
    {"factor beside the right one, tensors added up": 2**0.5, "change of the logits, folded": 0.0},
    equal("the norm's eps beside a variance of about 1", within=1e-4),
    source="official code",
)
def added_variances_scale_a_merged_channel() -> dict[str, float]:
    """Two copies with batch norm whose tensors are all added up give sqrt(2) times the activation that their sum has;
    folded into the layer first, the merge changes nothing."""
    net = _copies_with_norm()
    images = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    summed: Any = merge_features(net, images, beta=0, batch_norm="sum").model
    folded = merge_features(net, images, beta=0).model
    whole, narrow = (each[:2](images) for each in (net, summed))
    right = 2 * whole[:, 0] - 2 * net[1].bias[0]  # the shift is added up rightly
    factor = ((narrow[:, -1] - 2 * net[1].bias[0]) / right).mean().item()
    return {
        "factor beside the right one, tensors added up": factor,
        "change of the logits, folded": relative_difference(folded(images), net(images)),
    }


@claim("property", "changes the logits", at_least(1e-3, "a difference that is no rounding"), source="official code")
def added_variances_change_what_a_network_says() -> float:
    """With all tensors of the norm added up, a merge of copies changes the logits: their relative difference."""
    net = _copies_with_norm()
    images = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    return relative_difference(merge_features(net, images, beta=0, batch_norm="sum").model(images), net(images))


@claim("property", True, source="definition")
def merging_looks_at_no_data() -> bool:
    """The merged weights are the same bit for bit, whatever image shows the channels' way."""
    net = _copies_with_norm()
    states = [
        merge_features(net, image, beta=0.5).model.state_dict()
        for image in (torch.zeros(1, 3, 6, 6).double(), 9 * torch.randn(2, 3, 6, 6).double())
    ]
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@claim("property", {"no merge": True, "not wider": True}, source="definition; " + EXPERIMENT, slow=True)
def widths_fall_with_beta() -> dict[str, bool]:
    """A beta of 0 merges nothing in a trained network, and the number of channels does not rise with beta from 0 to
    0.5."""
    net = _trained(32, 0)
    totals = [_channels(merge_features(net, _IMAGE, beta=beta)) for beta in (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)]
    return {"no merge": totals[0] == 160, "not wider": all(a >= b for a, b in pairwise(totals))}


@claim(
    "accuracy",
    "almost none",
    at_most(0.01, "the bound set for 20 % fewer channels"),
    source="parameters fall with almost no loss of accuracy; " + EXPERIMENT,
    slow=True,
)
def accuracy_hardly_falls_with_a_fifth_of_the_channels() -> float:
    """Accuracy lost on digits with a fifth fewer channels in each layer, mean of three networks."""
    return sum(_accuracy(_trained(32, seed)) - _accuracy(_narrow(seed, 0.2)[0].model) for seed in range(3)) / 3


@claim(
    "accuracy",
    "no worse",
    at_least(0, "the better one of two"),
    source="pruning by magnitude to the same widths; " + EXPERIMENT,
    slow=True,
)
def merging_keeps_more_than_pruning() -> dict[str, float]:
    """Accuracy on digits with 10 to 50 % fewer channels in each layer, merged less pruned, mean of three networks."""
    gains = {}
    for share in SHARES:
        pairs = [[_accuracy(each.model) for each in _narrow(seed, share)] for seed in range(3)]
        gains[f"{share:.0%} fewer"] = sum(merged - pruned for merged, pruned in pairs) / 3
    return gains


@claim("accuracy", "falls", at_least(0, "the order is claimed"), source="wider is more redundant; digits", slow=True)
def wider_networks_are_more_redundant() -> dict[str, float]:
    """Share of channels that is left at a beta of 0.2: by how much it is smaller in networks twice as wide."""
    left = {
        width: _channels(merge_features(_trained(width, 0), _IMAGE, beta=0.2)) / (5 * width) for width in (8, 16, 32)
    }
    return {"8 to 16": left[8] - left[16], "16 to 32": left[16] - left[32]}


@claim("property", True, source="copies; " + EXPERIMENT, slow=True)
def copies_read_by_halves_are_all_found() -> bool:
    """Each channel there twice and read with half the weight, a beta of 0 finds the original widths."""
    doubled = _double(_trained(32, 0), halves=True)
    return [layer.after for layer in merge_features(doubled, _IMAGE, beta=0).layers] == [32, 64, 64, 10]


@claim(
    "property",
    True,
    source="copies; " + EXPERIMENT,
    slow=True,
    guess="what reads a channel has most of the weights and counts most in its distance, so that copies which are read "
    "differently are no nearer than others",
)
def copies_read_by_random_parts_are_found() -> bool:
    """Each channel there twice, its weight in the next layer split at random between the two, as many merges as there
    are copies find the original widths and leave the predictions as they were."""
    net = _trained(32, 0)
    found = merge_features(_double(net, halves=False), _IMAGE, beta=0.99, max_ratio=0.5)
    same = (found.model(_digits()[2]).argmax(1) == net(_digits()[2]).argmax(1)).all().item()
    return [layer.after for layer in found.layers] == [32, 64, 64, 10] and same


@claim(
    "accuracy",
    "widths and accuracy over beta",
    source="tables of VGG and ResNet",
    needs="CIFAR-10 and ImageNet with trained networks",
)
def published_networks_lose_channels() -> None:
    """VGG-11 to 19 and ResNet-18, 34 and 50 lose parameters with almost no loss of accuracy."""


def replay(case: Case) -> dict[str, Tensor]:
    """VGG networks of any widths and depth, with and without norms, merged at any threshold and ratio."""
    parts = case.record.get("cases")
    if not isinstance(parts, dict):
        raise InputError(f"{case.key}/{case.name} has no cases: each says its threshold and max_ratio")

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        net = _Vgg(state, inputs["x"])
        net.load_state_dict(state)
        outputs = {"logits": net.eval()(inputs["x"])}
        for name, own in parts.items():
            args = parse_args(own)
            found = merge_features(
                net, inputs["x"], beta=args["threshold"], max_ratio=args["max_ratio"], batch_norm="sum"
            ).model
            outputs[f"{name}.logits"] = found(inputs["x"])
            outputs |= {f"{name}.state.{key}": tensor for key, tensor in found.state_dict().items()}
        return outputs

    return play(case, forward)


class _Vgg(nn.Module):
    """The official network: convolutions of 3 x 3, poolings where the numbers of its modules have gaps."""

    def __init__(self, state: dict[str, Tensor], x: Tensor) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        convolutions = [int(found[1]) for name in state if (found := re.fullmatch(r"features\.(\d+)\.weight", name))]
        for index in sorted(i for i in convolutions if state[f"features.{i}.weight"].ndim == 4):
            layers += [nn.MaxPool2d(2) for _ in range(index - len(layers))]
            out, channels = state[f"features.{index}.weight"].shape[:2]
            layers.append(nn.Conv2d(channels, out, 3, padding=1))
            layers += [nn.BatchNorm2d(out)] if f"features.{index + 1}.running_mean" in state else []
            layers.append(nn.ReLU(inplace=True))
        self.features = nn.Sequential(*layers)
        classes, wanted = state["classifier.weight"].shape
        with torch.no_grad():
            while self.features.eval()(x).flatten(1).shape[1] > wanted:  # poolings at the end have no parameters
                self.features.append(nn.MaxPool2d(2))
        self.classifier = nn.Linear(wanted, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


_IMAGE = torch.zeros(1, 1, 8, 8)


def _pair(between: nn.Module) -> Any:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 5), between, nn.Linear(5, 3)).double()


def _change_by_merging_first_two(net: Any) -> float:
    """By how much the output changes when the first two channels, brought near by small weights, are merged."""
    x = torch.randn(50, 1, 1, 4, dtype=torch.float64)
    for layer, axis in ((1, 0), (3, 1)):
        net[layer].weight.data.movedim(axis, 0)[:2] *= 0.05
    net[1].bias.data[:2] *= 0.05
    with torch.no_grad():
        before = net(x)
        found = merge_features(net, x, beta=0.1, max_ratio=0.2)
        assert found.layers[0].members[-1] == (0, 1), "other channels are nearer"
        rest = nn.functional.linear(net[2](net[1](x.flatten(1)))[:, 2:], net[3].weight[:, 2:], net[3].bias)
        return relative_difference(found.model(x) - rest, before - rest)


def _copies_with_norm() -> Any:
    """Convolution, norm, ReLU and a head; the first two of five channels are copies."""
    net: Any = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)
    )
    norm = net[1]
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data = torch.rand_like(tensor) + 0.5
    for tensor in (net[0].weight, net[0].bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data[1] = tensor.data[0]
    net[5].weight.data[:, 1] = net[5].weight.data[:, 0]
    return net.double().eval()


@cache
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (train, labels), (held, truth) = load_digits(8)
    return train, labels, held, truth


@cache
def _trained(width: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 10),
        )
        train_convnet(net, *_digits()[:2], epochs=6)
    return net.requires_grad_(False)


@cache
def _narrow(seed: int, share: float) -> tuple[Narrowed, Narrowed]:
    """Merged and pruned, a share of the channels of each layer fewer."""
    net = _trained(32, seed)
    merged = merge_features(net, _IMAGE, beta=0.99, max_ratio=share)
    return merged, prune_features(net, _IMAGE, merged.widths)


def _channels(found: Narrowed) -> int:
    return sum(layer.after for layer in found.layers[:-1])  # without the classes


def _accuracy(net: nn.Module) -> float:
    *_, held, truth = _digits()
    return (net(held).argmax(1) == truth).double().mean().item()


def _double(net: nn.Sequential, *, halves: bool) -> nn.Sequential:
    """The same function with each channel there twice; of what reads it each copy gets a half, or a random part."""
    wide = []
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight, bias = layer.weight, layer.bias
            assert bias is not None
            if weight.shape[1] > 1:
                part = torch.full((weight.shape[1],), 0.5) if halves else torch.rand(weight.shape[1])
                part = part.view(-1, *[1] * (weight.ndim - 2))
                weight = torch.cat([weight * part, weight * (1 - part)], 1)
            if isinstance(layer, nn.Conv2d):
                weight, bias = torch.cat([weight, weight]), torch.cat([bias, bias])
                made: nn.Module = nn.Conv2d(weight.shape[1], len(weight), 3, padding=1)
            else:
                made = nn.Linear(weight.shape[1], len(weight))
            made.weight.data, made.bias.data = weight, bias
            layer = made
        wide.append(layer)
    return nn.Sequential(*wide).eval()
