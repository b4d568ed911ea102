"""MOAT: a mobile convolution in place of the MLP, in front of attention."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.backbones import MOAT, create_model
from saccade.backbones.mbconv import MBConv
from saccade.backbones.mlp import Mlp
from saccade.backbones.moat import MOATStage
from saccade.backbones.patches import channels_last
from saccade.backbones.residual import Block
from saccade.backbones.weights import fit_weights
from saccade.claims.framework import (
    Case,
    Paper,
    at_least,
    at_most,
    claim,
    count_model_parameters,
    equal,
    measure_model_flops,
    play,
    relative_difference,
    rounding,
    run_official,
)
from saccade.errors import InputError, check_choice
from saccade.measure import count_flops
from saccade.mixers import MobileConvAttention, WindowAttention
from saccade.ops import Window, sparse_attention

PAPER = Paper(
    title="MOAT: Alternating Mobile Convolution and Attention Brings Strong Vision Models",
    arxiv="2210.01820",
    published="2022-10-04",
    summary="A block starts as a transformer's, has a mobile convolution in place of the MLP, and that in front of the "
    "attention, where its stride also halves the map. On large maps attention becomes windows without shift, since "
    "the convolution looks beyond them.",
    home=("saccade.mixers.MobileConvAttention", "saccade.backbones.MOAT"),
    differences=(
        "The authors' code is in TensorFlow: replay reads its variables, kernels transposed and query, key and value "
        "joined.",
        "The authors' attention refuses a map that the window does not divide; ours has smaller windows at its end.",
        "Features are the maps of the stages; the authors' dense heads take them behind a GELU.",
        "As a mixer, a block's convolution and attention are one module, which returns what the block adds to its map.",
    ),
)

LAYER = "the layer's definition"
NETWORKS = {f"MOAT-{n}": f"moat_{n}" for n in range(5)} | {f"tiny-{n}": f"moat_tiny_{n}" for n in range(4)}


@claim(
    "params",
    {
        "MOAT-0": 27_846_892,
        "MOAT-1": 41_598_448,
        "MOAT-2": 73_422_408,
        "MOAT-3": 189_958_040,
        "MOAT-4": 483_214_184,
        "tiny-0": 3_355_348,
        "tiny-1": 5_122_895,
        "tiny-2": 9_772_741,
        "tiny-3": 19_534_390,
    },
    source="the authors' unit test",
)
def networks_have_their_sizes() -> dict[str, int]:
    """The networks have so many parameters."""
    return count_model_parameters(NETWORKS)


@claim(
    "params",
    {
        "MOAT-0": 27_777_544,
        "MOAT-1": 41_467_864,
        "MOAT-2": 73_248_296,
        "MOAT-3": 189_536_280,
        "MOAT-4": 482_539_368,
        "tiny-0": 3_332_232,
        "tiny-1": 5_094_000,
        "tiny-2": 9_732_288,
        "tiny-3": 19_476_600,
    },
    source="the authors' unit test",
)
def networks_without_position_biases_have_their_sizes() -> dict[str, int]:
    """Without position biases they have so many."""
    return count_model_parameters(NETWORKS, position_bias=False)


@claim(
    "flops",
    {
        "MOAT-0": 5.7,
        "MOAT-1": 9.1,
        "MOAT-2": 53.8,
        "MOAT-3": 266.1,
        "MOAT-4": 640.6,
        "tiny-0": 1.1,
        "tiny-1": 1.6,
        "tiny-2": 3.0,
        "tiny-3": 6.0,
    },
    equal("one decimal is published; products alone are counted, 1 to 2 % less", within=0.06, relative=0.02),
    source="table of the networks without position biases, at 224 (0 and 1), 384 (2), 512 (3 and 4) and 256 (tiny)",
)
def networks_have_their_cost() -> dict[str, float]:
    """The networks take so many billion multiply-adds for an image."""
    costs = measure_model_flops(NETWORKS.values(), position_bias=False)
    return {name: costs[model] / 2e9 for name, model in NETWORKS.items()}


@claim("property", {"MOAT": 16, "MLP": 0}, source="windows need no shift")
def windows_see_their_neighbours() -> dict[str, int]:
    """Behind two MOAT blocks in windows of 4 x 4 an output at the border of its window depends on all 16 pixels of the
    next one; behind two transformer blocks with MLPs on none."""
    reached = {"MOAT": _reached(_stack(2), 8), "MLP": _reached(_stack(2, convolve=False), 8)}
    return {name: int(seen[:, 4:].sum()) for name, seen in reached.items()}


@claim("property", {"1": 4 + 2, "2": 12 + 2, "3": 20 + 2}, source="windows need no shift")
def every_block_adds_a_window() -> dict[str, int]:
    """Each block adds a window of 4 on either side to the columns on which an output depends, and the convolution a
    column: on a map of 4 x 32, in the middle."""
    return {str(depth): int(_reached(_stack(depth), 32, at=14).any(0).sum()) for depth in (1, 2, 3)}


@claim("equivalence", {"window": "the whole map", "table": "not resized"}, rounding, source=LAYER)
def a_window_of_the_map_is_global() -> dict[str, float]:
    """With a window of the map's size the block is the global one, and a table of the window's size is read as it is:
    outputs of a map of 6 x 6, with a table of 6 and with one that is never resized."""
    x = torch.randn(2, 6, 6, 16, dtype=torch.float64)
    whole, window, plain = (
        _randomise(MobileConvAttention(16, 2, **options).double().eval())
        for options in ({"num_windows": 1, "table_size": 6}, {"window_size": 6, "table_size": 6}, {"window_size": 6})
    )
    for other in (window, plain):
        other.load_state_dict(whole.state_dict())
    return {
        "window": relative_difference(window(x), whole(x)),
        "table": relative_difference(plain(x), whole(x)),
    }


@claim("property", {"convolution": 9, "pooling": 4, "other shapes": 0}, source="the step down inside a block")
def the_step_down_mixes_a_neighbourhood() -> dict[str, int]:
    """With stride 2 the branch of the convolution mixes 3 x 3 pixels in front of the attention, where average pooling
    takes 2 x 2; the stride changes the shape of no parameter."""
    strided, plain = (MBConv(4, 4, 16, stride=stride).double().eval() for stride in (2, 1))
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    seen = {
        name: int((torch.autograd.grad(layer(x)[0, :, 1, 1].sum(), x)[0].abs().sum(1) > 0).sum())
        for name, layer in {"convolution": strided.branch, "pooling": strided.pool}.items()
    }
    shapes = [{name: tuple(p.shape) for name, p in each.named_parameters()} for each in (strided, plain)]
    return seen | {"other shapes": len(shapes[0].items() ^ shapes[1].items())}


@claim("complexity", {"global": 16.0, "windows": 4.0}, source="cost of the layer")
def cost_of_attention() -> dict[str, float]:
    """For four times the pixels, products of attention over the whole map take 16 times the FLOPs, in windows of 7 x 7
    four times."""

    def products(side: int, window: int) -> int:
        x = torch.zeros(1, 2, side, side, 32)
        return count_flops(sparse_attention, x, x, x, Window(window)).total

    return {
        "global": products(28, 28) / products(14, 14),
        "windows": products(28, 7) / products(14, 7),
    }


@claim("property", {"with biases": 3, "without": 3}, source="networks without position biases")
def any_resolution_is_served() -> dict[str, int]:
    """The same network, with position biases or without, serves images of 64 x 64, 96 x 160 and 33 x 47: how many of
    them it does."""

    def served(position_bias: bool) -> int:
        model = create_model("moat_test", num_classes=4, position_bias=position_bias).eval()
        return sum(bool(model(torch.randn(1, 3, *size)).isfinite().all()) for size in [(64, 64), (96, 160), (33, 47)])

    return {"with biases": served(True), "without": served(False)}


@claim(
    "accuracy",
    {"MOAT-0": 83.3, "MOAT-1": 84.2, "MOAT-2": 87.5, "MOAT-3": 88.4, "MOAT-4": 89.1, "tiny-0": 76.6, "tiny-3": 83.3},
    source="table of the networks; ImageNet top-1, MOAT-2 to 4 after training on ImageNet-22K",
    needs="ImageNet, and the authors' weights",
)
def networks_are_accurate() -> None:
    """The networks have these accuracies."""


@claim(
    "accuracy",
    {"COCO box AP": 59.2, "ADE20K mIoU": 57.6, "ImageNet-V2 top-1": 81.5},
    source="abstract",
    needs="COCO, ADE20K and ImageNet-V2, and the authors' weights",
)
def networks_are_accurate_elsewhere() -> None:
    """Detection with 227 M parameters, segmentation with 496 M, MOAT-4 on ImageNet-V2."""


@claim(
    "accuracy",
    "chance (50 %) with MLPs",
    at_most(0.56, "chance is 0.5 on 3200 maps, 7 standard deviations of 0.009 below 0.56"),
    source="an experiment of ours",
    slow=True,
)
def with_mlps_no_window_knows_its_neighbour() -> float:
    """Two marks in neighbouring windows have equal colours or not: read from the tokens of one window alone, trained
    transformer blocks with MLPs tell as often as chance."""
    return _train_to_compare(convolve=False)


@claim(
    "accuracy",
    "above chance with MOAT blocks",
    at_least(0.9, "how far 300 steps get depends on the seed"),
    source="an experiment of ours",
    slow=True,
)
def with_convolutions_it_does() -> float:
    """MOAT blocks in the same windows, without shift, learn it: accuracy."""
    return _train_to_compare(convolve=True)


def replay(case: Case) -> dict[str, Tensor]:
    """The network of DeepLab2: maps channels last, behind the stem (stage1) and the stages (stage2 and on), logits, and
    the gradient of the logits' sum."""
    if not case.cls.split(" ")[0].endswith("MOAT"):
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: replay serves the network MOAT")
    model = case.build(_from_deeplab)
    tensors = dict(case.tensors)
    if "out.logits" in tensors and not any(name.startswith("in.cotangent") for name in tensors):
        tensors["in.cotangent.logits"] = torch.ones_like(tensors["out.logits"])
    shown = _Shown(model)

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        state = {f"model.{name}": tensor for name, tensor in fit_weights(model, state).items()}
        outputs = run_official(shown, state, inputs["x"])
        return {name: output for name, output in outputs.items() if f"out.{name}" in tensors}

    return play(replace(case, tensors=tensors), forward)


class _Shown(nn.Module):
    """All that the authors' network returns, channels last."""

    def __init__(self, model: MOAT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        images = images.permute(0, 3, 1, 2)
        maps = [self.model.stem(images), *self.model.forward_stages(images)]
        shown = {f"stage{number}": channels_last(each) for number, each in enumerate(maps, 1)}
        shown |= {f"res{number}": F.gelu(shown[f"stage{number}"]) for number in range(1, len(maps) + 1)}
        return shown | {"logits": self.model.forward_head(maps[-1])}


def _from_deeplab(
    block_type: Sequence[str] = ("mbconv", "mbconv", "moat", "moat"),
    stem_size: tuple[int, int] = (64, 64),
    num_blocks: Sequence[int] = (2, 3, 7, 2),
    hidden_size: Sequence[int] = (96, 192, 384, 768),
    head_size: int = 32,
    window_size: Sequence[Any] = (None,) * 4,
    position_embedding_size: Sequence[Any] = (None,) * 4,
    expansion_rate: float = 4,
    se_ratio: float = 0.25,
    pool_size: int = 2,
    stage_stride: Sequence[int] = (2,) * 4,
    survival_rate: float | None = None,
    global_attention_at_end_of_moat_stage: bool = False,
    build_classification_head_with_class_num: int | None = None,
) -> MOAT:
    """The network with the arguments of DeepLab2's."""
    for kind in block_type:
        check_choice("block_type", kind, ("mbconv", "moat"))
    if set(stage_stride) != {2}:
        raise InputError(f"stage_stride is {stage_stride}: replay serves stages that each halve the map")
    stages = tuple(
        MOATStage(depth, dim, kind == "moat", table if kind == "moat" else None, window if kind == "moat" else None)
        for kind, depth, dim, window, table in zip(
            block_type, num_blocks, hidden_size, window_size, position_embedding_size
        )
    )
    model = MOAT(
        stages,
        stem_dims=stem_size,
        dim_head=head_size,
        global_at_end=global_attention_at_end_of_moat_stage,
        expansion=expansion_rate,
        gate_ratio=se_ratio,
        pool_size=pool_size,
        num_classes=build_classification_head_with_class_num or 0,
    )
    if not build_classification_head_with_class_num:
        model.pre_logits = nn.Identity()  # type: ignore[assignment]
    return model


class _Residual(nn.Module):
    """x + layer(x)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.layer(x)
        return out


def _stack(depth: int, *, convolve: bool = True, dim: int = 8) -> nn.Sequential:
    """Blocks in windows of 4 x 4: MOAT's, or a transformer's with MLPs."""
    return nn.Sequential(
        *(
            _Residual(MobileConvAttention(dim, 2, window_size=4))
            if convolve
            else Block(dim, WindowAttention(dim, 2, window_size=4), Mlp(dim, 4 * dim))
            for _ in range(depth)
        )
    )


def _randomise(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


def _reached(layers: nn.Sequential, width: int, at: int = 3) -> Tensor:
    """(4, width) pixels with a gradient from the output in row 1 and column `at`."""
    x = torch.randn(1, 4, width, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layers.double().eval()(x)[0, 1, at].sum(), x)
    return grad[0].abs().sum(-1) > 0


def _train_to_compare(convolve: bool) -> float:
    """Train two blocks on maps of 4 x 8 (two windows, each with a mark of colour +-1) to tell from the left window's
    tokens whether the colours are equal: accuracy over the last 50 of 300 steps of 64 maps."""
    model = nn.Sequential(nn.Linear(2, 32), *_stack(2, convolve=convolve, dim=32))
    head = nn.Linear(32, 2)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=2e-3)
    right = []
    for _ in range(300):
        places = torch.randint(16, (2, 64))
        colours = torch.randint(2, (2, 64)) * 2.0 - 1
        maps = torch.zeros(64, 4, 8, 2)
        for window in (0, 1):
            row, column = places[window] // 4, places[window] % 4 + 4 * window
            maps[torch.arange(64), row, column] = torch.stack([torch.ones(64), colours[window]], -1)
        logits = head(model(maps)[:, :, :4].mean((1, 2)))
        labels = (colours[0] == colours[1]).long()
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        right.append((logits.argmax(-1) == labels).float().mean().item())
    return sum(right[-50:]) / 50
