"""Salient Relevance: layer-wise relevance, and what stands out of its map."""

import re
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.claims.framework import Case, Paper, at_least, at_most, claim, equal, play, relative_difference
from saccade.claims.framework.convnet import make_convnet, train_convnet
from saccade.claims.framework.experiment import load_digits
from saccade.errors import InputError
from saccade.explain import context_aware_saliency, explain
from saccade.explain.relevance import Relevance, relevance

PAPER = Paper(
    title="Beyond saliency: understanding convolutional neural networks from saliency prediction on layer-wise "
    "relevance propagation",
    arxiv="1712.08268",
    published="2017-12-22",
    summary="Relevance is propagated from a class to the pixels, and its map is given to a detector of context-aware "
    "saliency as if it were an image. Isolated relevant pixels then become areas of attention.",
    home=(
        "saccade.explain.context_aware_saliency",
        "saccade.explain.methods.salient_relevance",
        "saccade.explain.relevance.recipes.salient_relevance",
    ),
    missing=("figures on ImageNet with AlexNet, VGG-16 and VGG-Face",),
    differences=(
        "Official code adds 1e-9 to the results of convolutions and poolings whatever their sign, so that a result "
        "near -1e-9 explodes; ours adds it with their sign, and official_salient_relevance is as coded.",
        "Official code unpools, so that of several windows with the same winner one alone counts; ours adds them up.",
        "The z+ rule of dense layers is of inputs above 0 in official code; ours is of inputs of either sign.",
        "Official code links the authors' MATLAB tool for the second step. Ours is written from what is recalled of "
        "the cited paper: patches are compared in the map's own channels, since a colour space says nothing of "
        "relevance; differences are divided by the largest that the map's range allows, distances by its longer side.",
        "By default centres of patches lie half a patch apart; stride=1 looks at every pixel.",
        "Relevance below 0 becomes attention, as published; part='positive' leaves it out.",
    ),
)

CHAIN = "the rules, from the card of the notebooks"
DETECTOR = "the detector, recalled from the cited paper"
EXPERIMENT = "an experiment of ours: digits on brick and grass, two convolutions"
OPTIONS: dict[str, Any] = {"patch": 5, "neighbours": 16, "scales": (1.0, 0.5), "stride": 1}


@claim("property", 0.0, at_most(1e-6, "epsilon is 1e-9"), source=CHAIN)
def a_dense_layer_conserves() -> float:
    """Through dense layers, whose biases take nothing, the sum of relevance stays: the relative difference, where some
    weight of an active input is above 0."""
    found, _ = _trace(bias=True)
    sums = found.inner["f1:in"].flatten(1).sum(1)
    return relative_difference(sums, found.start)


@claim(
    "property",
    {"pooling": True, "convolution without bias": True, "convolution with bias": False},
    source=CHAIN,
)
def poolings_and_convolutions_without_bias_conserve() -> dict[str, bool]:
    """Whether the sum of relevance stays within 1e-6 through a pooling, and through all convolutions with and without
    biases."""
    biased, plain = (_trace(bias=bias)[0] for bias in (True, False))

    def sums(found: Relevance, name: str) -> Tensor:
        return found.inner[name].flatten(1).sum(1)

    return {
        "pooling": relative_difference(sums(biased, "pool:in"), sums(biased, "c2:in")) < 1e-6,
        "convolution without bias": relative_difference(plain.map.flatten(1).sum(1), plain.start) < 1e-6,
        "convolution with bias": relative_difference(biased.map.flatten(1).sum(1), biased.start) < 1e-6,
    }


@claim("property", {"a result of -1e-9": True}, source="the card's pitfall")
def epsilon_with_the_sign_of_the_result_cannot_explode() -> dict[str, bool]:
    """Whether a convolution whose result is -1e-9 gives the pixel at most what came in, where the published code gives
    it over 10000 times as much."""
    layer = nn.Conv2d(1, 1, 1, bias=False).double()
    nn.init.constant_(layer.weight, -1.0)
    x = torch.full((1, 1, 1, 1), 1e-9 * (1 + 1e-6), dtype=torch.float64)
    ours, coded = (
        relevance(layer, x, recipe=recipe, start=torch.ones_like(x)).map.abs().item()
        for recipe in ("salient_relevance", "official_salient_relevance")
    )
    return {"a result of -1e-9": ours <= 1 and coded > 1e4}


@claim("property", {"factor": 0.0, "uniform": 0.0}, at_most(1e-6, "patches are compared by products"), source=DETECTOR)
def a_factor_changes_nothing_and_a_uniform_map_is_0() -> dict[str, float]:
    """The relative difference after a factor of 1000, and the largest value for a map that is 0.1 everywhere."""
    map = torch.rand(1, 24, 20, dtype=torch.float64)
    found, scaled = (context_aware_saliency(factor * map) for factor in (1.0, 1000.0))
    uniform = context_aware_saliency(torch.full_like(map, 0.1))
    return {"factor": relative_difference(scaled, found), "uniform": uniform.max().item()}


@claim(
    "property",
    {"without nearness": 0.0, "with it": 0.0},
    equal("far patches count less, and how far they can be depends on the border", within=0.1),
    source=DETECTOR,
)
def a_pattern_that_moves_moves_its_saliency() -> dict[str, float]:
    """The largest difference after a pattern on an empty map moved by 8 and 4 pixels, where the distance of patches
    counts and where it does not: border effects are allowed."""
    map = torch.zeros(1, 40, 40, dtype=torch.float64)
    map[:, 12:16, 14:17] = torch.rand(4, 3, dtype=torch.float64)
    apart = {}
    for name, nearness in (("without nearness", 0.0), ("with it", 3.0)):
        options = {**OPTIONS, "scales": (1.0,), "nearness": nearness}
        found, moved = (context_aware_saliency(each, **options) for each in (map, map.roll((8, 4), (1, 2))))
        apart[name] = (moved.roll((-8, -4), (1, 2)) - found).abs().max().item()
    return apart


@claim("property", {"cluster": True, "foci": True}, source="areas of attention")
def a_cluster_draws_more_attention_than_a_lonely_pixel() -> dict[str, bool]:
    """Whether the 9 x 9 pixels around a cluster of nine relevant pixels hold more saliency than those around one pixel
    with the same sum; and whether every focus, above 0.8 at a scale, keeps its value."""
    map = torch.zeros(1, 48, 48, dtype=torch.float64)
    map[:, 11:14, 11:14], map[:, 35, 35] = 1.0, 9.0
    alone, grouped = map.clone(), map.clone()
    alone[:, 11:14, 11:14], grouped[:, 35, 35] = 0.0, 0.0
    lonely = context_aware_saliency(alone, **OPTIONS)[:, 31:40, 31:40].sum()
    cluster = context_aware_saliency(grouped, **OPTIONS)[:, 8:17, 8:17].sum()
    options = {**OPTIONS, "scales": (1.0,)}
    plain, focused = (context_aware_saliency(map, **options, focus=focus) for focus in (None, 0.8))
    foci = plain > 0.8
    return {"cluster": bool(cluster > lonely), "foci": bool(foci.any()) and torch.equal(plain[foci], focused[foci])}


@claim(
    "property",
    "a larger share in the box",
    at_least(0, "the order is claimed"),
    source="attention areas where relevance shows dots, qualitative; " + EXPERIMENT,
    slow=True,
)
def areas_of_attention_lie_on_the_object() -> float:
    """Over 40 images, the share of the largest fifth of salient relevance that lies in the digit's box, minus that of
    the largest values of relevance, grown to the same area."""
    _, lrp, salient, boxes = _digits()
    inside = [(area & boxes).flatten(1).sum(1) / area.flatten(1).sum(1) for area in (_largest(salient), _grow(lrp))]
    return (inside[0] - inside[1]).mean().item()


@claim(
    "property",
    "more in the box",
    at_least(0, "the order is claimed"),
    source=EXPERIMENT,
    slow=True,
    guess="relevance of so small a network lies on the digit already, 99 % of its largest tenth: what saliency adds "
    "around the dots can only be outside",
)
def the_largest_tenth_lies_on_the_object() -> float:
    """Over 40 images, the share of the sum of the largest tenth of values that lies in the digit's box, of salient
    relevance minus that of relevance without sign."""
    _, lrp, salient, boxes = _digits()
    inside = []
    for map in (salient, lrp):
        top = map * _largest(map, 0.1)
        inside.append((top * boxes).flatten(1).sum(1) / top.flatten(1).sum(1))
    return (inside[0] - inside[1]).mean().item()


@claim(
    "property",
    "fewer pieces",
    at_least(1, "the order is claimed"),
    source="areas where relevance shows dots; " + EXPERIMENT,
    slow=True,
)
def salient_relevance_shows_areas() -> float:
    """By how many pieces the largest tenth of relevance falls apart into more than that of salient relevance, on
    average over 40 images."""
    _, lrp, salient, _ = _digits()
    pieces = [[_count_pieces(mask) for mask in _largest(map, 0.1)] for map in (lrp, salient)]
    return sum(dots - areas for dots, areas in zip(*pieces)) / len(lrp)


@claim(
    "accuracy",
    "AlexNet and VGG-16 attend to different areas",
    source="pictures of ImageNet, qualitative",
    needs="ImageNet, VGG-Face, and the networks with their weights",
)
def networks_attend_to_different_areas() -> None:
    """Salient relevance of two networks, which name the same object, marks different areas of it."""


def replay(case: Case) -> dict[str, Tensor]:
    """Relevance of the published chain before each layer, for a network as the case describes it in words."""
    layers = _read_layers(str(case.record.get("model", "")), case)

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        model = _Chain(layers, state)
        x = inputs["x"]
        logits = model(x)
        recorded = {name: re.fullmatch(r"out\.R_after_layer(\d+)", name) for name in case.expected}
        places = {int(match[1]) for match in recorded.values() if match and int(match[1]) < len(layers)}
        names = {place: f"layers.{place}:in" for place in places if place}
        found = relevance(model, x, recipe="official_salient_relevance", inner=list(names.values()))
        assert found.target is not None
        start = logits * F.one_hot(found.target, logits.shape[1])
        inner = {f"R_after_layer{place}": found.inner[name] for place, name in names.items()}
        whole = {"logits": logits, "target": found.target, "R_start": start, "relevance": found.map}
        return whole | inner | ({"R_after_layer0": found.map} if 0 in places else {})

    with torch.no_grad():
        return play(case, forward)


def _read_layers(words: str, case: Case) -> list[tuple[str, str, dict[str, int]]]:
    """Kind, official name and options of each layer of "c1 3x3 pad1 -> ReLU -> MaxPool 2 -> flatten -> f1"."""
    layers: list[tuple[str, str, dict[str, int]]] = []
    for each in words.split(";")[0].split("->"):
        name, *options = each.split()[:4] or [""]
        known = {key: int(value) for key, value in re.findall(r"(stride|pad) ?(\d+)", each)}
        kind = {"relu": "relu", "flatten": "flatten", "maxpool": "pool"}.get(name.lower())
        if kind == "pool":
            known["size"] = int(re.findall(r"\d+", options[0])[0]) if options else 2
        weight = case.tensors.get(f"state.{name}.weight")
        if kind is None and weight is not None:
            kind = "convolution" if weight.ndim == 4 else "dense"
        if kind is None:
            raise InputError(
                f"{case.key}/{case.name} has a layer {each.strip()!r}: known are ReLU, MaxPool, flatten, and names of "
                "recorded weights"
            )
        layers.append((kind, name, known))
    return layers


class _Chain(nn.Module):
    """The recorded network, one module a layer."""

    def __init__(self, layers: list[tuple[str, str, dict[str, int]]], state: dict[str, Tensor]) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        for kind, name, options in layers:
            layer: nn.Module
            if kind in ("convolution", "dense"):
                weight, bias = state[f"{name}.weight"], state.get(f"{name}.bias")
                out, into, *sides = weight.shape
                if kind == "dense":
                    layer = nn.Linear(into, out, bias is not None)
                else:
                    stride, padding = options.get("stride", 1), options.get("pad", 0)
                    layer = nn.Conv2d(into, out, tuple(sides), stride, padding, bias=bias is not None)  # type: ignore[arg-type]
                layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
            elif kind == "pool":
                layer = nn.MaxPool2d(options["size"], options.get("stride"), options.get("pad", 0))
            else:
                layer = nn.ReLU() if kind == "relu" else nn.Flatten()
            self.layers.append(layer.to(next(iter(state.values())).dtype))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


class _Small(nn.Module):
    """The layers that the rules serve, with random weights."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.c1, self.pool = nn.Conv2d(3, 4, 3, padding=1, bias=bias), nn.MaxPool2d(2)
        self.c2 = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=bias)
        self.f1, self.f2 = nn.Linear(54, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c2(self.pool(self.c1(x).relu())).relu()
        logits: Tensor = self.f2(self.f1(x.flatten(1)).relu())
        return logits


def _trace(bias: bool) -> tuple[Relevance, nn.Module]:
    model = _Small(bias).double()
    x = torch.rand(4, 3, 12, 12, dtype=torch.float64)
    return relevance(model, x, recipe="salient_relevance", inner=["pool:in", "c2:in", "f1:in"]), model


@cache
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """40 images that a network of ours names right, their relevance without sign, salient relevance, digits' boxes."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        (train, labels), (held, truth) = load_digits(24)
        images, _ = _paste(train)
        model = train_convnet(make_convnet(3, 10), images, labels, epochs=5)
        tests, boxes = _paste(held)
        with torch.no_grad():
            right = (model(tests).argmax(1) == truth).nonzero()[:40, 0]
        images, target = tests[right], truth[right]
        lrp = relevance(model, images, target=target, recipe="salient_relevance").map.abs().sum(1)
        salient = explain(model, images, method="salient_relevance", target=target, **OPTIONS).map
        return images, lrp, salient, boxes[right]


def _paste(digits: Tensor) -> tuple[Tensor, Tensor]:
    """Digits (N, 1, 24, 24) at random places of 48 x 48 pixels of brick or grass, (N, 3, 48, 48), and their boxes."""
    rows, columns = torch.arange(48)[:, None], torch.arange(48)
    joints = (rows % 8 == 0) | ((columns + 8 * (rows // 8 % 2)) % 16 == 0)
    brick = torch.where(joints, 0.2, -0.2) * torch.tensor([1.0, 0.5, 0.4])[:, None, None]
    images, boxes = [], torch.zeros(len(digits), 48, 48, dtype=torch.bool)
    for digit, box in zip(digits, boxes):
        grass = (0.4 * torch.rand(1, 48, 12).repeat_interleave(4, 2) - 0.4) * torch.tensor([0.5, 1, 0.4])[:, None, None]
        image = (brick if torch.rand(()) < 0.5 else grass) + 0.1 * torch.randn(3, 48, 48)
        top, left = torch.randint(25, (2,)).tolist()
        image[:, top : top + 24, left : left + 24] += (digit + 1) / 2
        box[top : top + 24, left : left + 24] = True
        images.append(image)
    return torch.stack(images), boxes


def _largest(maps: Tensor, share: float = 0.2) -> Tensor:
    """(B, H, W) true at the share of largest values."""
    flat = maps.flatten(1)
    chosen = flat.topk(round(share * flat.shape[1])).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, chosen, True).view_as(maps)


def _grow(maps: Tensor, share: float = 0.2) -> Tensor:
    """The largest values, as few as grow over the share of the map with the 3 x 3 pixels around them."""
    low = torch.zeros(len(maps), dtype=torch.long)
    high = torch.full_like(low, maps[0].numel())
    order = maps.flatten(1).argsort(descending=True).argsort()
    while (high - low > 1).any():
        middle = (low + high) // 2
        chosen = F.max_pool2d((order < middle[:, None]).view_as(maps).float(), 3, 1, 1)
        enough = chosen.flatten(1).mean(1) >= share
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return F.max_pool2d((order < high[:, None]).view_as(maps).float(), 3, 1, 1) > 0


def _count_pieces(mask: Tensor) -> int:
    """Pieces of true pixels that share an edge."""
    from scipy.ndimage import label

    count: int = label(mask.numpy())[1]
    return count
