"""OverLoCK: a coarse look over the image guides a second, closer one, through filters made of context."""

import time
from copy import deepcopy
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.backbones import OverLoCK, OverLoCKStages, create_model
from saccade.backbones.overlock import ChannelAffine
from saccade.backbones.weights import fit_weights
from saccade.claims.framework import (
    Case,
    Paper,
    at_least,
    claim,
    count_model_parameters,
    equal,
    measure_model_flops,
    play,
    relative_difference,
    rounding,
    run_official,
)
from saccade.errors import InputError
from saccade.measure import count_flops
from saccade.mixers import ContMix
from saccade.mixers.mixer import split_heads
from saccade.ops import Neighborhood, dynamic_filter

PAPER = Paper(
    title="OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels",
    arxiv="2502.20087",
    published="2025-02-27",
    summary="A short network looks over the image, and its coarse map guides a second one that looks closely: beside "
    "the features, and as the regions to which each pixel's affinities make its own kernels (ContMix), so that a local "
    "filter knows of the whole map.",
    home=("saccade.mixers.ContMix", "saccade.ops.dynamic_filter", "saccade.backbones.OverLoCK"),
    differences=(
        "Official code needs NATTEN's kernels; ours run on any device, and make kernels from a head's few keys first, "
        "which is the same product with fewer multiplications. impl='reference' keeps the paper's order.",
        "The classifier of the overview is left out unless aux_head=True asks for it; the published counts leave it "
        "out too.",
        "The authors' separate module for other networks projects values and results by other layers than ContMix "
        "here, which has linear ones; the block in their network has neither, nor has ours there.",
    ),
)

SIZES = {"XT": "overlock_xt", "T": "overlock_t", "S": "overlock_s", "B": "overlock_b"}
TABLE = "table of the networks"
CODE = "counted on the official code"
LAYER = "the layer's definition"


@claim(
    "params",
    {"XT": 16.0, "T": 33.0, "S": 56.0, "B": 95.0},
    equal("whole millions are published", within=0.5),
    source=TABLE,
)
def networks_have_their_sizes() -> dict[str, float]:
    """Re-parameterised and without the classifier of the overview, the networks have so many million parameters."""
    found = count_model_parameters(SIZES, reparameterized=True)
    return {name: count / 1e6 for name, count in found.items()}


@claim("params", {"XT": 17_307_272, "T": 34_990_472, "S": 58_309_772, "B": 98_012_968}, source=CODE)
def networks_have_exact_sizes_in_training() -> dict[str, int]:
    """In the form of training, with that classifier, they have so many parameters."""
    return count_model_parameters(SIZES, aux_head=True)


@claim("params", {"XT": 16_791_384, "T": 33_981_064, "S": 56_670_476, "B": 95_520_680}, source=CODE)
def networks_have_exact_sizes_in_use() -> dict[str, int]:
    """Re-parameterised, with that classifier, they have so many parameters."""
    return count_model_parameters(SIZES, aux_head=True, reparameterized=True)


@claim(
    "flops",
    {"XT": 2.6, "T": 5.5, "S": 9.7, "B": 16.7},
    equal("the authors' counter is unknown; official code, counted by torch's, is up to 4 % above", relative=0.04),
    source=TABLE,
)
def networks_have_their_cost() -> dict[str, float]:
    """Re-parameterised they take so many billion multiply-adds for an image of 224 x 224."""
    found = measure_model_flops(SIZES.values(), reparameterized=True)
    return {name: found[model] / 2e9 for name, model in SIZES.items()}


@claim(
    "flops",
    {"XT": 5_725_270_416, "T": 11_985_271_424, "S": 20_874_223_232, "B": 35_925_275_168},
    source=CODE + ", where learned scales are convolutions",
)
def networks_have_exact_cost_in_training() -> dict[str, int]:
    """FLOPs of the form of training, in the paper's order of products, counted as the official code was."""
    return {name: _count_as_official(model) for name, model in SIZES.items()}


@claim(
    "flops",
    {"XT": 5_402_412_944, "T": 11_291_236_992, "S": 19_788_013_184, "B": 34_192_798_240},
    source=CODE + ", where learned scales are convolutions",
)
def networks_have_exact_cost_in_use() -> dict[str, int]:
    """FLOPs of the re-parameterised form, counted so."""
    return {name: _count_as_official(model, reparameterized=True) for name, model in SIZES.items()}


@claim("equivalence", "1.7e-7 in float32", rounding, source="measured on the official code")
def reparameterization_changes_nothing() -> float:
    """Kernels of 17, 15, 13 and 7 folded with their branches and norms of random statistics: the relative difference
    of logits, in float64."""
    model = _randomise(_small(kernel_sizes=(17, 15, 13, 7))).double()
    images = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        return relative_difference(deepcopy(model).reparameterize()(images), model(images))


@claim(
    "speed",
    "faster",
    at_least(1.25, "what we ask of it; nothing is published"),
    source="a goal of ours",
    slow=True,
)
def reparameterization_makes_it_faster() -> float:
    """T, four images of 224 x 224 on the CPU: time of the form of training over that of the re-parameterised one, both
    in evaluation, in turns, medians of 5."""
    model = create_model("overlock_t")
    assert isinstance(model, OverLoCK)
    forms = {"training": model.eval(), "folded": deepcopy(model).eval().reparameterize()}
    images = torch.randn(4, 3, 224, 224)
    took: dict[str, list[float]] = {name: [] for name in forms}
    with torch.no_grad():
        for turn in range(6):
            for name, form in forms.items():
                start = time.perf_counter()
                form(images)
                if turn:  # the first one allocates
                    took[name].append(time.perf_counter() - start)
    return median(took["training"]) / median(took["folded"])


@claim(
    "property",
    {"ContMix": 0, "static": 12 * 12 - 7 * 7},
    source="ContMix mixes context into its kernels",
)
def kernels_depend_on_the_whole_map() -> dict[str, int]:
    """Pixels of a 12 x 12 map that a pixel's output does not depend on, though the window has 7 x 7: none with
    ContMix, all outside the window with a static depthwise convolution. No norms and gates beside them."""
    x = _random_map(12, 12).requires_grad_()
    layers = {"ContMix": _layer(kernel_size=7), "static": _Depthwise(7)}
    unseen = {}
    for name, layer in layers.items():
        (grad,) = torch.autograd.grad(layer(x)[0, 6, 6].square().sum(), x)
        unseen[name] = int((grad[0].abs().sum(-1) == 0).sum())
    return unseen


@claim("equivalence", {"interior": 0.0, "border": 0.0}, rounding, source=LAYER)
def without_weights_kernels_are_box_means() -> dict[str, float]:
    """With the layer that makes kernels and its biases at 0, filters are means of K x K: exactly so inside, and at the
    border the mean of the nearest full window is repeated."""
    layer, value = _layer(kernel_size=7, static=True, zero=True), _random_map(11, 13)
    out = layer.filter(value, _random_map(11, 13), _random_map(11, 13))
    found = {"interior": 0.0, "border": 0.0}
    for half, size in ((slice(0, 8), 5), (slice(8, 16), 7)):
        means = F.avg_pool2d(value[..., half].movedim(-1, 1), size, 1)
        repeated = F.pad(means, [size // 2] * 4, mode="replicate").movedim(1, -1)
        inside = (slice(None), *[slice(size // 2, -(size // 2))] * 2)
        pairs = {"interior": (out[..., half][inside], repeated[inside]), "border": (out[..., half], repeated)}
        found = {name: max(found[name], relative_difference(*pair)) for name, pair in pairs.items()}
    return found


@claim("equivalence", "equal", rounding, source=LAYER)
def without_weights_alone_filters_are_static() -> float:
    """With the weights of that layer at 0 and biases left, each head has one softmax-normalised filter, whatever the
    query and the context are: compared with a masked matrix from NATTEN's pattern."""
    layer, value = _layer(kernel_size=7, static=True), _random_map(9, 8)
    out = layer.filter(value, _random_map(9, 8), _random_map(9, 8))
    halves = []
    counts = [size**2 for size in layer.kernel_sizes]
    tables, biases = (layer.small_bias, layer.large_bias), layer.kernels.bias.split(counts)
    for size, table, bias, half in zip(layer.kernel_sizes, tables, biases, value.chunk(2, -1)):
        seen = Neighborhood(size).mask((9, 8))
        matrix = torch.zeros(layer.num_heads, 72, 72, dtype=value.dtype)
        for token in range(72):
            places = seen[token].nonzero().squeeze(1)
            down, across = places // 8 - token // 8 + size - 1, places % 8 - token % 8 + size - 1
            matrix[:, token, places] = (bias + table[:, down, across]).softmax(-1)
        mixed = matrix @ split_heads(half, layer.num_heads).flatten(2, 3)
        halves.append(mixed.transpose(1, 2).flatten(2).unflatten(1, (9, 8)))
    return relative_difference(out, torch.cat(halves, -1))


@claim(
    "property",
    {"negative": 0, "sum": 1.0, "constant": 3.0},
    equal("what float64 loses to rounding", within=1e-10),
    source=LAYER,
)
def kernels_are_shares() -> dict[str, float]:
    """Weights are positive and sum to 1 for each head and pixel, so that a constant map stays as it is."""
    layer, x = _layer(kernel_size=7), _random_map(9, 10)
    kernels = torch.cat(layer.make_kernels(x, x), -1)
    sums = torch.stack([kernels[..., :25].sum(-1), kernels[..., 25:].sum(-1)])
    out = layer.filter(torch.full_like(x, 3.0), x, x)
    return {
        "negative": int((kernels <= 0).sum()),
        "sum": sums.flatten()[(sums - 1).abs().argmax()].item(),
        "constant": out.flatten()[(out - 3).abs().argmax()].item(),
    }


@claim(
    "complexity",
    {
        f"{side} x {side}, {what}": 2 * side**2 * macs
        for side in (14, 28)
        for what, macs in (("kernels", 49 * 32 + 4 * 49 * (25 + 49)), ("filters", 32 * (25 + 49)))
    },
    source="cost of the layer",
)
def cost_is_linear_in_the_map() -> dict[str, int]:
    """To make kernels takes H W (49 C / 2 + 49 g (S^2 + K^2)) multiply-adds and to apply them H W C (S^2 + K^2) / 2:
    FLOPs of the paper's order with C = 64, g = 4 heads, S = 5 and K = 7, counted while they run."""
    layer = ContMix(64, 4, kernel_size=7, impl="reference", projections=False, project=lambda *_: _Half())
    counts = {}
    for side in (14, 28):
        x = torch.randn(1, side, side, 64)
        kernels = layer.make_kernels(x, x)
        halves = [split_heads(half, 4) for half in x.chunk(2, -1)]
        counts[f"{side} x {side}, kernels"] = count_flops(layer.make_kernels, x, x).total
        counts[f"{side} x {side}, filters"] = sum(
            count_flops(lambda v, k: dynamic_filter(v, k, impl="reference"), *each).total
            for each in zip(halves, kernels)
        )
    return counts


@claim("property", "different", at_least(0.01, "rounding is 1e-15"), source="ablation of the top-down path")
def the_context_matters() -> float:
    """The last map without the context that comes back, relative to the last map with it."""
    model = _randomise(_small()).double()
    images = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        guided = model.look(images).focus[1]
        for parameter in model.stages[3].get_submodule("context").parameters():
            nn.init.zeros_(parameter)
        return relative_difference(model.look(images).focus[1], guided)


@claim("property", 0, source="the networks are trained as one")
def the_main_loss_teaches_the_overview() -> int:
    """Parameters of the overview's stage that get no gradient from the logits of the closer look."""
    model = _randomise(_small(aux_head=True)).double()
    model.eval()(torch.randn(1, 3, 96, 96, dtype=torch.float64)).square().sum().backward()
    return sum(parameter.grad is None or not parameter.grad.any() for parameter in model.stages[3].parameters())


@claim(
    "accuracy",
    {"XT": 82.7, "T": 84.2, "S": 84.8, "B": 85.1},
    source=TABLE + "; ImageNet top-1 at 224 x 224",
    needs="ImageNet, and the weights of the authors",
)
def accuracy_on_imagenet() -> None:
    """T reaches 84.2 %, where ConvNeXt-B has 83.8 % (recalled) at three times the cost."""


@claim(
    "accuracy",
    {"T": (48.3, 43.3), "S": (49.4, 44.0), "B": (49.9, 44.4)},
    source="table of detection; Mask R-CNN, box and mask AP, one schedule",
    needs="COCO, and the weights of the authors",
)
def accuracy_on_coco() -> None:
    """Three schedules give T 49.6 and 43.9, S 51.0 and 45.0, B 51.4 and 45.3."""


@claim(
    "accuracy",
    {"T": 50.3, "S": 51.3, "B": 51.7},
    source="table of segmentation; UperNet, mIoU",
    needs="ADE20K, and the weights of the authors",
)
def accuracy_on_ade20k() -> None:
    """Semantic segmentation with the networks in UperNet."""


def replay(case: Case) -> dict[str, Tensor]:
    """The authors' network: the maps of its three parts, and its logits, for each recorded batch of images."""
    if case.cls != "OverLoCK":
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: replay serves OverLoCK")
    shown = _Shown(case.build(_official))

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        state = {f"model.{name}": tensor for name, tensor in fit_weights(shown.model, state).items()}
        outputs: dict[str, Tensor] = {}
        for name, images in inputs.items():
            if not name.startswith("cotangent"):
                outputs |= {f"{name}.{part}": x for part, x in run_official(shown, state, images).items()}
        return {name: output for name, output in outputs.items() if f"out.{name}" in case.expected}

    return play(case, forward)


class _Shown(nn.Module):
    """All that is recorded of the authors' network."""

    def __init__(self, model: OverLoCK) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        seen: OverLoCKStages = self.model.look(images)
        logits = self.model.forward_head(self.model.final_conv(seen.focus[1]))
        return {"base": seen.base[2], "overview": seen.overview, "focus": seen.focus[1], "logits": logits}


def _official(
    depth: tuple[int, ...],
    sub_depth: tuple[int, int],
    embed_dim: tuple[int, ...],
    kernel_size: tuple[int, ...] = (7, 7, 7, 7),
    mlp_ratio: tuple[float, ...] = (4, 4, 4, 4),
    sub_mlp_ratio: tuple[float, float] = (4, 4),
    sub_num_heads: tuple[int, int] = (4, 8),
    ls_init_value: tuple[float | None, ...] = (None, None, 1, 1),
    res_scale: bool = True,
    smk_size: int = 5,
    deploy: bool = False,
    use_ds: bool = True,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    projection: int = 1024,
    num_classes: int = 1000,
    **unused: Any,
) -> OverLoCK:
    """The network with the arguments of the official one; its defaults are recalled, and recorded cases name theirs.

    What has no part in evaluation is passed over: dropout, checkpointing, and how convolutions are computed.
    """
    unknown = unused.keys() - {"use_gemm", "drop_rate", "norm_layer", "use_checkpoint"}
    if unknown:
        raise InputError(f"OverLoCK has no argument {', '.join(sorted(unknown))} that replay knows")
    return OverLoCK(
        depth,
        sub_depth,
        embed_dim,
        sub_num_heads,
        kernel_sizes=kernel_size,
        small_kernel=smk_size,
        mlp_ratio=mlp_ratio,
        focus_mlp_ratio=sub_mlp_ratio,
        projection=projection,
        scale_shortcut=res_scale,
        layer_scale=ls_init_value,
        reparameterized=deploy,
        aux_head=use_ds,
        drop_path_rate=drop_path_rate,
        num_classes=num_classes,
        in_chans=in_chans,
    )


class _Depthwise(nn.Module):
    """A static depthwise convolution, channels last."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, size, padding=size // 2, groups=16).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.movedim(-1, 1)).movedim(1, -1)
        return out


class _Half(nn.Module):
    """The first half of the channels, in place of a projection whose cost is not asked for."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : x.shape[-1] // 2]


def _layer(kernel_size: int, *, static: bool = False, zero: bool = False) -> ContMix:
    """A layer of 16 channels and 2 heads with nothing near 0, unless kernels are to be static or uniform."""
    layer = ContMix(16, 2, kernel_size=kernel_size, projections=not static).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    if static:
        nn.init.zeros_(layer.kernels.weight)
    for parameter in (layer.kernels.bias, layer.small_bias, layer.large_bias) if zero else ():
        nn.init.zeros_(parameter)
    return layer


def _random_map(height: int, width: int) -> Tensor:
    return torch.randn(1, height, width, 16, dtype=torch.float64)


def _small(**options: Any) -> OverLoCK:
    model = create_model("overlock_test", num_classes=5, **options)
    assert isinstance(model, OverLoCK)
    return model


def _randomise(model: OverLoCK) -> OverLoCK:
    """In evaluation, with parameters and statistics away from 0 and 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    return model.eval()


def _count_as_official(name: str, **options: Any) -> int:
    """FLOPs with those of learned scales, which are depthwise 1 x 1 convolutions there."""
    scales: list[int] = []
    with torch.device("meta"), torch.no_grad():
        model = create_model(name, impl="reference", **options).eval()
        for module in model.modules():
            if isinstance(module, ChannelAffine):
                module.register_forward_hook(lambda *call: scales.append(2 * call[2].numel()))
        return count_flops(model, torch.zeros(1, 3, 224, 224)).total + sum(scales)
