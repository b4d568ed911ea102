"""NormGrad: saliency as each place's share in the gradient of a virtual identity layer."""

import re
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.claims.framework import (
    Case,
    Paper,
    at_least,
    at_most,
    claim,
    play,
    relative_difference,
    rounding,
)
from saccade.claims.framework.convnet import BLOCKS, train_on_digit_pairs
from saccade.errors import InputError
from saccade.explain import class_sensitivity, explain
from saccade.explain.classifier import evaluating
from saccade.explain.methods.attribution import enlarge
from saccade.explain.methods.layers import activations_and_slopes, find_maps
from saccade.explain.methods.normgrad import combine_maps, form_shares, share_identity_gradient

PAPER = Paper(
    title="There and Back Again: Revisiting Backpropagation Saliency Methods",
    arxiv="2004.02866",
    published="2020-04-06",
    summary="Methods that read saliency from a backward pass split the gradient of a virtual identity layer over "
    "places, and sum each place's share up to a number. The best new pair is a 1 x 1 convolution with the norm, "
    "|activation| |gradient|; layers combine, and a step of learning before the map makes it depend more on the class.",
    home=("saccade.explain.methods.normgrad", "saccade.explain.class_sensitivity"),
    missing=("figures on ImageNet and VGG-16 with batch normalisation",),
    differences=(
        "The paper's script stretches every map to 0..1 before it returns it, and makes NaN of a constant map; ours "
        "returns a single layer's map as it is, stretches what it combines, and a map that is constant up to rounding "
        "becomes 0. Replay stretches rounding too, as the script does.",
        "The script serves batches of one image. Ours serves any, and in the meta-learned form each image makes its "
        "own step.",
        "The script weights layers equally, the authors' fork of TorchRay by numbers divided by their sum: weights "
        "takes both.",
        "The sensitivity to the class, the layers and the named methods are recalled from the paper's text.",
    ),
)

CELLS = {
    "bias": ("bias", 1),
    "scaling": ("scaling", 1),
    "conv1x1": ("conv", 1),
    "conv3x3": ("conv", 3),
    "conv3x3_depthwise": ("depthwise", 3),
}
AGGREGATES = ("norm", "filter_norm", "sum", "max")
TABLE = "table of virtual layers"
EXPERIMENT = "an experiment of ours: two digits on a canvas, three blocks of convolution"


@claim("equivalence", "equal", rounding, source=TABLE)
def a_norm_of_outer_products_is_a_product_of_norms() -> dict[str, float]:
    """The share of a 1 x 1 convolution has the norm |x| |g|, that of a 3 x 3 one |neighbours of x| |g|; the other
    aggregates of all virtual layers have closed forms too."""
    x, g = _random_maps()
    errors = {
        "conv1x1": relative_difference(form_shares(x, g, "conv").norm(dim=1), x.norm(dim=1) * g.norm(dim=1)),
        "conv3x3": relative_difference(
            form_shares(x, g, "conv", 3).norm(dim=1),
            F.unfold(x, 3, padding=1).norm(dim=1).view(2, 6, 7) * g.norm(dim=1),
        ),
    }
    for name, aggregate in product(CELLS, AGGREGATES):
        fast, formed = (
            share_identity_gradient(x, g, *CELLS[name], aggregate, impl=impl) for impl in ("fast", "reference")
        )
        errors[f"{name}, {aggregate}"] = relative_difference(fast, formed)
    return errors


@claim("equivalence", "equal", rounding, source=TABLE)
def shares_sum_to_the_gradient_of_a_real_identity_layer() -> dict[str, float]:
    """Put into the network for real, before a convolution, ReLU and a linear head, each identity layer has the sum of
    its places' shares as gradient."""
    x = torch.randn(1, 5, 6, 7, dtype=torch.float64)
    filters, head = torch.randn(4, 5, 3, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    centre = torch.zeros(3, 3, dtype=torch.float64)
    centre[1, 1] = 1
    eye = torch.eye(5, dtype=torch.float64)[:, :, None, None]
    layers: dict[str, tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]] = {
        "bias": (torch.zeros(5, 1, 1, dtype=torch.float64), lambda y, p: y + p),
        "scaling": (torch.ones(5, 1, 1, dtype=torch.float64), lambda y, p: y * p),
        "conv1x1": (eye.clone(), F.conv2d),
        "conv3x3": (eye * centre, lambda y, p: F.conv2d(y, p, padding=1)),
        "conv3x3_depthwise": (centre.expand(5, 1, 3, 3).clone(), lambda y, p: F.conv2d(y, p, padding=1, groups=5)),
    }
    errors = {}
    for name, (parameter, apply) in layers.items():
        parameter.requires_grad_()
        y = apply(x, parameter)
        logit = F.conv2d(y, filters).relu().mean((2, 3)) @ head
        slope, there = torch.autograd.grad(logit, (parameter, y))
        shares = form_shares(x, there, *CELLS[name])
        errors[name] = relative_difference(shares.sum((2, 3)).flatten(), slope.flatten())
    return errors


@claim("equivalence", "equal", rounding, source="the named methods as pairs, recalled")
def known_methods_are_pairs() -> dict[str, float]:
    """Scaling with the sum is activation times gradient, whose sum over places is their scalar product; with each
    channel's mean gradient it is Grad-CAM."""
    model, images = _random_network()
    options: dict[str, Any] = {"layer": "features.4", "target": 1}
    maps = explain(model, images, method="normgrad", virtual="scaling", aggregate="sum", **options).map
    activation, slope = _read(model, images, "features.4")
    scalar = enlarge((activation * slope).sum(1), images.shape[-2:])
    mean = slope.mean((2, 3), keepdim=True).expand_as(slope)
    cam = enlarge(share_identity_gradient(activation, mean, "scaling", 1, "sum"), images.shape[-2:])
    return {
        "activation x gradient": relative_difference(maps, scalar),
        "Grad-CAM": relative_difference(cam, explain(model, images, method="grad_cam", **options).map),
    }


@claim(
    "equivalence",
    {"before pooling": True, "earlier": False},
    source="the named methods as pairs, recalled",
)
def grad_cam_is_activation_times_gradient_before_pooling_alone() -> dict[str, bool]:
    """At the last layer before average pooling and a linear head the gradient is the same everywhere, so that Grad-CAM
    is activation times gradient; at an earlier layer it is not."""
    model, images = _random_network()
    equal = {}
    for where, layer in (("before pooling", "features.7"), ("earlier", "features.4")):
        options: dict[str, Any] = {"layer": layer, "target": 1}
        cam = explain(model, images, method="grad_cam", **options).map
        pair = explain(model, images, method="normgrad", virtual="scaling", aggregate="sum", **options).map
        equal[where] = relative_difference(pair, cam) < 1e-10
    return equal


@claim("property", {"scaling": 0.0, "conv1x1": 0.0, "bias": 1.0}, source="discussion of the virtual layers")
def silent_places_count_for_the_bias_alone() -> dict[str, float]:
    """Where a layer's activation is 0, so are the shares of scaling and of a 1 x 1 convolution, and not that of a bias:
    the part of silent places whose share is not 0, after ReLU."""
    x, g = _random_maps()
    x = x.relu() * (torch.rand(2, 1, 6, 7) < 0.5)
    silent = (x == 0).all(1)
    return {
        name: (share_identity_gradient(x, g, *CELLS[name], "norm")[silent] != 0).double().mean().item()
        for name in ("scaling", "conv1x1", "bias")
    }


@claim(
    "property",
    "more sensitive with depth",
    at_least(0, "the order is claimed"),
    source="layers compared, recalled; " + EXPERIMENT,
    slow=True,
    guess="each channel of our small network is read at its largest value, so the gradient of its last layer already "
    "comes from a few places, and those of two classes are often the same",
)
def early_layers_depend_less_on_the_class() -> float:
    """NormGrad's maps for the most and the least likely class correlate more at the first block than at the last: by
    how much."""
    first, last = (_sensitivity(layer=layer) for layer in (BLOCKS[0], BLOCKS[-1]))
    return first - last


@claim(
    "property",
    "at least the best single layer",
    at_least(0, "the order is claimed"),
    source="combination of layers, recalled; " + EXPERIMENT,
    slow=True,
)
def a_combination_keeps_what_its_layers_have() -> dict[str, float]:
    """Three blocks combined, NormGrad depends more on the class than at any one of them, and its selective form points
    to the digit that it explains at least as often: by how much."""
    selective: dict[str, Any] = {"virtual": "scaling", "aggregate": "filter_norm"}
    return {
        "sensitivity": min(_sensitivity(layer=layer) for layer in BLOCKS) - _sensitivity(layer=BLOCKS),
        "pointing": _pointing(layer=BLOCKS, **selective) - max(_pointing(layer=layer, **selective) for layer in BLOCKS),
    }


@claim(
    "property",
    "norms cannot cancel",
    at_least(0, "the order is claimed"),
    source="selective NormGrad; " + EXPERIMENT,
    slow=True,
)
def selective_forms_depend_more_on_the_class() -> dict[str, float]:
    """At every block, maps of what is above 0 correlate less between the most and the least likely class than maps of
    norms, and point to the right digit at least as often: by how much."""
    gains = {}
    for layer in BLOCKS:
        options: dict[str, Any] = {"layer": layer, "virtual": "scaling"}
        norm, selective = (options | {"aggregate": each} for each in ("norm", "filter_norm"))
        gains[f"{layer}, sensitivity"] = _sensitivity(**norm) - _sensitivity(**selective)
        gains[f"{layer}, pointing"] = _pointing(**selective) - _pointing(**norm)
    return gains


@claim(
    "property",
    "lower after the step",
    at_least(0, "the order is claimed"),
    source="meta-saliency, recalled; " + EXPERIMENT,
    slow=True,
)
def a_step_of_learning_makes_maps_depend_on_the_class() -> dict[str, float]:
    """After a step down the class's cross-entropy NormGrad's maps for the most and the least likely class correlate
    less, at each block and for two learning rates: by how much."""
    return {
        f"{layer}, rate {rate:g}": _sensitivity(layer=layer) - _sensitivity(layer=layer, meta_rate=rate)
        for layer in BLOCKS
        for rate in (1e-3, 1e-2)
    }


@claim(
    "property",
    {"maps": 0.0, "weights": 0.0},
    at_most(1e-6, "a rate of 1e-8 is not 0"),
    source="meta-saliency",
)
def the_step_vanishes_with_its_rate() -> dict[str, float]:
    """The maps tend to the plain ones as the learning rate goes to 0: their relative difference at a rate of 1e-8. The
    weights are afterwards bit for bit those of before: the largest difference."""
    model, images = _random_network()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    options: dict[str, Any] = {"method": "normgrad", "layer": "features.4", "target": 1}
    stepped, plain = (explain(model, images, meta_rate=rate, **options).map for rate in (1e-8, 0.0))
    changed = max((new - old).abs().max().item() for new, old in zip(model.parameters(), before))
    return {"maps": relative_difference(stepped, plain), "weights": changed}


@claim("accuracy", "recalled", source="figures on ImageNet", needs="ImageNet, and VGG-16 with its weights")
def weakly_supervised_localisation() -> None:
    """NormGrad points to the object on ImageNet, PASCAL VOC and COCO more often than other cells of the table."""


def replay(case: Case) -> dict[str, Tensor]:
    """Maps of vgg16_grid_saliency's cells for a small network, stretched to 0..1; combi multiplies all its layers."""
    words = f"{case.record.get('model', '')} {case.record.get('configuration', '')}"
    asked = re.search(r"target class (\d+)", words)
    if asked is None:
        raise InputError(f"{case.key}/{case.name} names no target class: its configuration has to say 'target class 1'")

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        model, images = _official_network(state), inputs["x"]
        outputs = {"logits": model(images)}
        for name in case.expected:
            where, *cell = name.removeprefix("out.").split(".")
            if cell:
                layers = model.read if where == "combi" else [f"features.{where.removeprefix('l')}"]
                size = case.expected[name].shape
                read = [_read(model, images, layer, int(asked[1])) for layer in layers]
                maps = [enlarge(share_identity_gradient(*each, *CELLS[cell[0]], cell[1]), size) for each in read]
                outputs[f"{where}.{'.'.join(cell)}"] = combine_maps(torch.stack(maps), flat=0)[0]
        return outputs

    return play(case, forward)


class _Official(nn.Module):
    """The network of the recorded case: convolution, ReLU and pooling in turn, a head on the mean."""

    def __init__(self, filters: list[Tensor], head: Tensor) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for weight in filters:
            layers += [nn.MaxPool2d(2)] if layers else []
            layers += [nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2)]
            layers += [nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(head.shape[1], head.shape[0])
        self.read = [f"features.{i}" for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        self.read.append(f"features.{len(layers) - 1}")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).mean((2, 3)))
        return logits


def _official_network(state: dict[str, Tensor]) -> _Official:
    filters = sorted((int(name.split(".")[1]), name) for name in state if re.fullmatch(r"features\.\d+\.weight", name))
    model = _Official([state[name] for _, name in filters], state["head.weight"])
    model.load_state_dict(state)
    return model


def _read(model: nn.Module, images: Tensor, layer: str, target: int = 1) -> tuple[Tensor, Tensor]:
    """A layer's activation, and the gradient of the target's logit by it."""
    with evaluating(model, grad=True) as classify:
        found = find_maps(classify, images[:1], [layer], None)
        classes = torch.full((len(images),), target)
        return activations_and_slopes(classify, images.clone(), classes, found)[0]


def _random_maps() -> tuple[Tensor, Tensor]:
    """An activation and a gradient, (2, 5, 6, 7)."""
    x, g = torch.randn(2, 2, 5, 6, 7, dtype=torch.float64)
    return x, g


def _random_network() -> tuple[nn.Module, Tensor]:
    """A network with mean pooling and random weights, and four images."""
    model = _Official([torch.empty(8, 3, 3, 3), torch.empty(8, 8, 3, 3), torch.empty(8, 8, 3, 3)], torch.empty(4, 8))
    return model.double(), torch.randn(4, 3, 16, 16, dtype=torch.float64)


def _sensitivity(**options: Any) -> float:
    model, images, _, _ = train_on_digit_pairs()
    return class_sensitivity(model, images[:64], method="normgrad", **options).value


def _pointing(**options: Any) -> float:
    """How often the largest value lies on the digit whose class is explained, over both digits of 128 canvases."""
    model, images, classes, corners = train_on_digit_pairs()
    hits = []
    for which in (0, 1):
        map = explain(model, images, method="normgrad", target=classes[:, which], **options).map
        place = torch.stack(torch.unravel_index(map.flatten(1).argmax(1), map.shape[1:]), -1)
        inside = (place >= corners[:, which]) & (place < corners[:, which] + 8)
        hits.append(inside.all(1).double())
    return torch.stack(hits).mean().item()
