"""DynamicLRP: relevance rules attached to operations, so that no model needs rules of its own."""

from collections.abc import Callable
from functools import lru_cache
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
    equal,
    play,
    relative_difference,
    run_official,
)
from saccade.data import load_images
from saccade.errors import InputError
from saccade.explain import explain, faithfulness
from saccade.explain.relevance import Recipe, relevance
from saccade.explain.relevance.recipes import dynamic_lrp, official_dynamic_lrp

PAPER = Paper(
    title="Always Keep Your Promises: DynamicLRP, A Model-Agnostic Solution To Layer-Wise Relevance Propagation",
    arxiv="2512.07010",
    published="2025-12-07",
    summary="Rules of relevance propagation are attached to operations and not to modules, so any computation graph "
    "is explained as it is. Where a rule needs an activation that nobody saved, a promise postpones it until it is met "
    "from which it can be rebuilt.",
    home=(
        "saccade.explain.relevance.relevance",
        "saccade.explain.relevance.recipes.dynamic_lrp",
        "saccade.explain.relevance.recipes.official_dynamic_lrp",
    ),
    differences=(
        "We record aten operations while the model runs and keep what the rules read, so there are no promises, no "
        "autograd attributes, and frozen models and operations in place work.",
        "Official softmax reads the lower triangle of its logits in any model: dynamic_lrp reads all; replay asks "
        "for the official behaviour by the recipe official_dynamic_lrp.",
        "An official product of two operands gives all relevance to both; dynamic_lrp gives half to each.",
        "With the z+ option official convolutions divide by the result of unclamped weights, and matrix products by "
        "that of the clamped ones; our recipe z_plus splits the inputs by sign and recomputes both.",
        "Official strided convolutions crash on sizes that lose pixels at the border; ours take any.",
        "Official sub gives half to each side; dynamic_lrp shares by magnitude, as for add.",
        "The published ABPC divides by steps with x = 4 i and lies between 0 and 4; ours lies between -1 and 1.",
    ),
)
METHOD = "the method's definition"


@claim("property", "equal", at_most(1e-4, "published for an epsilon of 1e-11; here in float64"), source=METHOD)
def relevance_is_conserved() -> dict[str, float]:
    """On ReLU networks without biases the relevance of the input is that of the output, as a share of it: layers and
    convolutions, with the epsilon and the gamma rule."""
    nets = {"dense": _dense_net(), "conv": _conv_net(bias=False)}
    recipes = {"epsilon": dynamic_lrp(), "gamma": dynamic_lrp(100.0, 1.0)}
    return {
        f"{net}, {rule}": (found.error.abs().sum() / found.start.abs().sum()).item()
        for net, (model, x) in nets.items()
        for rule, recipe in recipes.items()
        for found in [relevance(model, x, recipe=recipe)]
    }


@claim("property", "equal", at_most(1e-6, "an epsilon of 1e-11; here in float64"), source=METHOD)
def biases_hold_what_is_missing() -> float:
    """With biases, what the map lacks is exactly what the ledger says that the biases absorbed, as a share of the
    explained logits."""
    model, x = _conv_net(bias=True)
    found = relevance(model, x, recipe="dynamic_lrp")
    taken = sum(each.amount for each in found.absorbed if each.kind == "bias")
    return abs(found.error.sum().item() + taken) / found.start.abs().sum().item()


@claim("equivalence", "equal", at_most(1e-6, "an epsilon of 1e-11; here in float64"), source=METHOD)
def without_biases_it_is_input_times_gradient() -> dict[str, float]:
    """On ReLU networks without biases, residuals and means the epsilon rule is input times gradient of the logit."""
    found = {}
    for name, (model, x) in {"dense": _dense_net(), "conv": _conv_net(bias=False, pool=False)}.items():
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(model(x).amax(1).sum(), x)
        found[name] = relative_difference(relevance(model, x, recipe="dynamic_lrp").map, x * slope)
    return found


@claim("property", 0.0, at_most(1e-12, "the same operations in float64"), source="small experiment of the card")
def functional_calls_change_nothing() -> float:
    """The same network as modules and as plain functions, residual add and concatenation included, has the same map."""
    torch.manual_seed(0)
    first, second, head = (nn.Linear(*size).double() for size in ((6, 8), (8, 8), (16, 3)))

    class Modules(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head, self.act = first, second, head, nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.first(x))
            y = x + self.act(self.second(x))
            out: Tensor = self.head(torch.cat([x, y], 1))
            return out

    def functions(x: Tensor) -> Tensor:
        x = (x @ first.weight.T + first.bias).relu()
        y = x + torch.clamp_min(F.linear(x, second.weight, second.bias), 0)
        return torch.hstack((x, y)) @ head.weight.T + head.bias

    x = torch.randn(5, 6, dtype=torch.double)
    maps = [relevance(model, x, recipe="dynamic_lrp").map for model in (Modules(), functions)]
    return relative_difference(maps[1], maps[0])


@claim("property", 0.0, at_most(0.0, "the same numbers in the same order"), source=METHOD)
def a_second_run_equals_the_first() -> float:
    """A second run equals the first; official code replays a recorded plan there, and differs by 3e-8."""
    model, x = _conv_net(bias=True)
    return relative_difference(*(relevance(model, x, recipe="dynamic_lrp").map for _ in range(2)))


@claim("property", 0, source="coverage of 99.92 % of 31,465 nodes in 15 models, which are not here")
def operations_without_a_rule() -> int:
    """Operations without a rule in a network that runs the 47 of the paper (but for those that torch rewrites)."""
    return len(relevance(_all_operations, torch.rand(2, 4, 4, 4) + 0.5, recipe="dynamic_lrp").unknown)


@claim("complexity", {"each operation": 1}, source=METHOD)
def no_operation_is_visited_twice() -> dict[str, int]:
    """Each operation on the way to the output is served once: the most visits of one in a network with a residual
    diamond, which the paper's promises need a cure for."""

    def diamond(x: Tensor) -> Tensor:
        y = x + x.relu()
        z = y.sin() + y.cos()
        return z + y

    found = relevance(diamond, torch.rand(2, 3), recipe="dynamic_lrp")
    counts = {each.op: each.count for each in found.served if each.op in ("sin", "cos", "relu")}
    return {"each operation": max(counts.values())}


@claim(
    "accuracy",
    "LRP above saliency above random, near 0",
    equal("the order", within=0.0),
    source="ABPC 1.77 of LRP, 0.73 of saliency and -0.002 of random maps on VGG-16, on a scale of 0 to 4",
    slow=True,
)
def ranks_pixels_better_than_saliency() -> str:
    """Area between perturbation curves on digits, after training a small network: DynamicLRP, |gradient|, random."""
    areas = _areas()
    ordered = areas["relevance"] > areas["gradient"] > areas["random"] and abs(areas["random"]) < 0.05
    told = ", ".join(f"{name} {area:.3f}" for name, area in areas.items())
    return "LRP above saliency above random, near 0" if ordered else told


@claim(
    "accuracy",
    "ABPC 1.77, 1.69 (zennit), -0.003 to 0.1 (input times gradient, integrated gradients; ViT)",
    at_least(0.0, "the published order"),
    source="ABPC on VGG-16 and ViT-B/16",
    slow=True,
    guess="input times gradient is noisy in deep networks; on two convolutions it is the epsilon rule, and shares of "
    "biases by magnitude only take from it",
)
def ranks_pixels_no_worse_than_input_times_gradient() -> float:
    """ABPC of DynamicLRP minus that of input times gradient in the same experiment."""
    areas = _areas()
    return areas["relevance"] - areas["input_x_gradient"]


@claim(
    "property",
    {"VGG-16": 90, "ResNet-50": 339},
    source="table of graphs",
    needs="autograd graphs, which our tape does not read: it counts aten operations",
)
def graphs_have_their_sizes() -> None:
    """Nodes of the autograd graphs after fused ones are split; ViT-B/16 has 779, GPT-2 885."""


@claim(
    "accuracy",
    {"RoBERTa-L": 93.70, "Flan-T5-L": 95.06},
    source="SQuADv2, top-1 token inside the answer",
    needs="SQuADv2, and RoBERTa-L and Flan-T5-L",
)
def finds_answers_in_text() -> None:
    """The most relevant token lies inside the labelled answer in so many percent of questions."""


def replay(case: Case) -> dict[str, Tensor]:
    """The three small models of the recorded cases, of any width, under every recorded option of the official engine.

    Options are read from their names: eps, z_plus, bilinear, filterF, gamma_convG_mmG, gamma_conv_onlyG, gamma_mmG.
    """
    names = sorted({name.split(".")[1] for name in case.expected})
    if set(names) - set(_MODELS):
        raise InputError(f"{case.key}/{case.name} is a case of {', '.join(names)}: replay serves {', '.join(_MODELS)}")

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in names:
            own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            model = _Written(own, _MODELS[name], case.record)
            x, target = inputs[f"{name}.x"], inputs[f"{name}.target"]
            found[f"{name}.logits"] = run_official(model, own, x)
            prefix = f"out.{name}.relevance."
            for key in (key for key in case.expected if key.startswith(prefix)):
                option = key.removeprefix(prefix)
                recipe = _official_option(option)
                found[f"{name}.relevance.{option}"] = relevance(model, x, target=target, recipe=recipe).map
        return found

    return play(case, forward)


def _official_option(name: str) -> Recipe:
    kind, _, rest = name.partition("_")
    if name == "eps":
        return official_dynamic_lrp()
    if name in ("z_plus", "bilinear"):
        return official_dynamic_lrp(z_plus=name == "z_plus", bilinear=name == "bilinear")
    if name.startswith("filter"):
        return official_dynamic_lrp(keep=float(name.removeprefix("filter")))
    if kind == "gamma":
        parts: dict[str, float | None] = {"conv": None, "mm": None}
        for word in rest.replace("conv_only", "conv").split("_"):
            side = "conv" if word.startswith("conv") else "mm"
            parts[side] = float(word.removeprefix(side))
        return official_dynamic_lrp(gamma=(parts["conv"], parts["mm"]))
    raise InputError(f"option {name!r}: replay serves eps, z_plus, bilinear, filterF and gamma_convG_mmG")


class _Written(nn.Module):
    """A model that the recorded cases describe in words: parameters under official names, and a function of them."""

    def __init__(
        self, state: dict[str, Tensor], run: Callable[["_Written", Tensor], Tensor], record: dict[str, Any]
    ) -> None:
        super().__init__()
        for name, tensor in state.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, nn.Parameter(tensor.clone()))
        self.run = run
        self.record = record

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A dense layer by name."""
        layer = getattr(self, name)
        return F.linear(x, layer.weight, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def _mlp(model: Any, x: Tensor) -> Tensor:
    x = F.relu(model.linear("fc1", x))
    x = x + F.relu(model.linear("fc2", x))
    return model.linear("fc3", x)


def _conv(model: Any, x: Tensor) -> Tensor:
    x = F.max_pool2d(F.relu(F.conv2d(x, model.c1.weight, model.c1.bias, padding=1)), 2)
    x = F.relu(F.conv2d(x, model.c2.weight, model.c2.bias, stride=2, padding=1))
    side = round((model.fc.weight.shape[1] / x.shape[1]) ** 0.5)
    return model.linear("fc", F.adaptive_avg_pool2d(x, side).flatten(1))


def _block(model: Any, x: Tensor) -> Tensor:
    x = model.linear("emb", x) + model.pos
    batch, tokens, dim = x.shape
    heads = int(model.record.get("heads", 2))  # recorded cases do not say; 2 reproduces theirs
    y = F.layer_norm(x, (dim,), model.n1.weight, model.n1.bias)
    query, key, value = (model.linear(name, y).view(batch, tokens, heads, -1).transpose(1, 2) for name in "qkv")
    weights = (query @ key.mT * (dim // heads) ** -0.5).softmax(-1)
    x = x + model.linear("o", (weights @ value).transpose(1, 2).reshape(batch, tokens, dim))
    y = F.layer_norm(x, (dim,), model.n2.weight, model.n2.bias)
    x = x + model.linear("m2", F.gelu(model.linear("m1", y)))
    return model.linear("head", x.mean(1))


_MODELS = {"block": _block, "conv": _conv, "mlp": _mlp}


def _dense_net() -> tuple[nn.Module, Tensor]:
    sizes = (6, 16), (16, 16), (16, 3)
    layers = [layer for size in sizes for layer in (nn.Linear(*size, bias=False), nn.ReLU())][:-1]
    return nn.Sequential(*layers).double(), torch.randn(4, 6, dtype=torch.double)


def _conv_net(*, bias: bool, pool: bool = True) -> tuple[nn.Module, Tensor]:
    convs = nn.Conv2d(3, 8, 3, padding=1, bias=bias), nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=bias)
    head: tuple[nn.Module, ...] = nn.Flatten(), nn.Linear(32 if pool else 72, 4, bias=bias)
    head = (nn.AdaptiveAvgPool2d(2), *head) if pool else head
    model = nn.Sequential(convs[0], nn.ReLU(), nn.MaxPool2d(2), convs[1], nn.ReLU(), *head)
    return model.double(), torch.randn(2, 3, 12, 12, dtype=torch.double)


def _all_operations(x: Tensor) -> Tensor:
    """The paper's 47 operations, in a chain that keeps numbers moderate."""
    weight = torch.full((4, 4, 3, 3), 0.05)
    x = F.conv2d(x, weight, torch.ones(4), padding=1)
    x = x + 1 - x * 0.5 - (-x) / 4
    x = x.sqrt() + x.rsqrt() + x.pow(2) + (x / 9).exp() + x.log()
    y = x.flatten(2)
    y = y @ torch.full((16, 16), 0.1) + torch.bmm(y, y.mT.softmax(-1) @ y / 1e3)
    y = y.flatten(0, 1).mm(torch.full((16, 16), 0.1)).view(2, 4, 16).reshape(2, 4, 4, 4)
    x = torch.cat([x, y], 1).split(4, 1)[0] + torch.stack([x, y]).unbind(0)[1] + x.amax((2, 3), keepdim=True)
    x = x + x.max(1, keepdim=True)[0] + x.gather(1, torch.zeros(2, 4, 4, 4, dtype=torch.long))
    x = x.transpose(1, 2).permute(0, 2, 1, 3).expand(2, 4, 4, 4).repeat(1, 1, 1, 2)
    x = x.unsqueeze(1).squeeze(1)[:, :, :, 1:5].index_select(1, torch.tensor([3, 1, 0, 2]))
    x = x + x.select(1, 0)[:, None]
    x = F.adaptive_avg_pool2d(F.max_pool2d(x, 2, 1), 2)
    x = F.max_pool3d(x[:, None], (1, 2, 2), 1)[:, 0]
    x = F.layer_norm(x, (1, 1)) + F.batch_norm(x, torch.zeros(4), torch.ones(4))
    x = F.gelu(x) + F.silu(x) + F.relu(x)
    x = F.dropout(x.clone().double(), 0.1, training=False).masked_fill(x > 1e9, 0)
    q = x.flatten(2)[:, None]
    x = F.scaled_dot_product_attention(q, q, q)[:, 0]
    return x.sum(-1) + x.mean(-1)


@lru_cache(maxsize=1)
def _areas() -> dict[str, float]:
    """ABPC of each method on 300 digits that a trained network has not seen, pixel by pixel."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        data = load_images("digits", image_size=8)
        (train, labels), (val, _) = (_as_tensors(part) for part in (data.train, data.val))
        layers = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(20):
            for chosen in torch.randperm(len(train)).split(64):
                loss = F.cross_entropy(model(train[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    model, images = model.eval(), val[:300]
    found = {}
    for name in ("relevance", "input_x_gradient", "gradient", "random"):
        options: dict[str, Any] = {"recipe": "dynamic_lrp"} if name == "relevance" else {}
        explanation = explain(model, images, method=name, **options)
        found[name] = faithfulness(model, images, explanation, steps=16, filler="mean", patch=1, repeats=1).abpc.value
    return found


def _as_tensors(part: torch.utils.data.Dataset) -> tuple[Tensor, Tensor]:
    """Grey images (N, 1, H, W) in [-1, 1], and labels (N,)."""
    images, labels = zip(*(part[index] for index in range(len(part))))  # type: ignore[arg-type]
    return torch.stack(images)[:, :1] / 127.5 - 1, torch.tensor(labels)
