"""VOLO: outlook attention makes the weights of a window from its centre alone."""

import re
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import tap
from saccade.backbones import VOLO
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
    replay_network,
    rounding,
    run_official,
)
from saccade.claims.framework.experiment import train_on_digits
from saccade.errors import InputError
from saccade.measure import count_flops, count_parameters
from saccade.mixers import Attention, DepthwiseConv, OutlookAttention
from saccade.ops import outlook_attention

PAPER = Paper(
    title="VOLO: Vision Outlooker for Visual Recognition",
    arxiv="2106.13112",
    published="2021-06-24",
    summary="Outlook attention gives each position a K^2 x K^2 matrix that a linear layer makes from its own "
    "feature, without products of queries and keys; it mixes the values of the window around, and overlapping windows "
    "are summed. It encodes fine detail at 28 x 28 tokens; a plain transformer at 14 x 14 follows.",
    home=(
        "saccade.backbones.VOLO",
        "saccade.mixers.OutlookAttention",
        "saccade.ops.outlook_attention",
        "saccade.training.token_label_loss",
    ),
    differences=(
        "Official code takes stride 1 by default and gives 2 to every published network; our default is 2.",
        "The paper prints H W K^2 C for the mixing (recalled); the steps take H W K^4 C multiply-adds.",
        "Official code mixes tokens in training unless told not to, and then returns three things; our networks return "
        "logits unless mix_tokens=True. Both leave out blocks of attention in training, but none of outlook attention.",
        "Official code refuses sizes whose windows are not ceil(H / stride) in number; ours pads at the end for them.",
    ),
)

LAYER = "the layer's definition"


@claim(
    "params",
    {"D1": 26_632_040, "D2": 58_678_336, "D3": 86_325_072, "D4": 192_961_520, "D5": 295_455_584},
    source="official code, at 224 x 224",
)
def networks_have_their_sizes() -> dict[str, int]:
    """The networks have so many parameters, the classifier of patches included."""
    return count_model_parameters({f"D{number}": f"volo_d{number}" for number in range(1, 6)})


FLOPS = {
    "volo_d1": 13_837_483_008,
    "volo_d1_384": 45_359_121_408,
    "volo_d2": 28_610_830_336,
    "volo_d3": 41_464_115_200,
    "volo_d4": 88_525_965_312,
    "volo_d5": 144_602_363_904,
}


@claim("flops", FLOPS, source="official code, a multiply-add as two, with the classifier of patches")
def networks_have_their_costs() -> dict[str, int]:
    """The networks take so many FLOPs for an image."""
    return measure_model_flops(FLOPS)


@claim("params", (0, 0, 0), source=LAYER)
def parameters_of_the_layer() -> tuple[int, ...]:
    """C^2 of values, C n K^4 + n K^4 of the matrices, C^2 + C of the output: what is left of three layers."""
    rest = []
    for dim, heads, kernel in [(192, 6, 3), (384, 12, 3), (64, 2, 5)]:
        layer = OutlookAttention(dim, heads, kernel_size=kernel)
        expected = 2 * dim**2 + dim + (dim + 1) * heads * kernel**4
        rest.append(count_parameters(layer) - expected)
    return tuple(rest)


@claim(
    "flops",
    {"stride 1": 2 * 28**2 * 192 * (2 * 192 + 486 + 81), "stride 2": 2 * 28**2 * 192 * (2 * 192 + (486 + 81) / 4)},
    source="direct count of the layer's steps",
)
def products_of_the_layer() -> dict[str, int]:
    """With stride 1 it takes H W C (2 C + n K^4) + H W K^4 C multiply-adds, with stride 2 a quarter of both terms with
    K^4: 28 x 28 tokens, C = 192, n = 6, K = 3, n K^4 = 486, counted while the layer runs."""
    return {f"stride {stride}": _count(OutlookAttention(192, 6, stride=stride), 28) for stride in (1, 2)}


@claim("flops", {"matrices": 486, "queries and keys": 768}, source="direct count of the layer's steps")
def matrices_cost_less_than_queries_and_keys() -> dict[str, int]:
    """To make the matrices takes n K^4 multiply-adds for each token and channel, where projections to queries and keys
    take 2 C: 486 < 768 with C = 384, n = 6, K = 3."""
    outlook, attention = OutlookAttention(384, 6, stride=1), Attention(384, 6)
    counted = (count_flops(layer, torch.zeros(1, 384)).total for layer in (outlook.attn, attention.qkv))
    matrices, projections = (flops // (2 * 384) for flops in counted)
    return {"matrices": matrices, "queries and keys": projections * 2 // 3}


@claim(
    "complexity",
    {"outlook": 4.0, "attention": 16.0},
    equal("border windows count in full, so both ratios are exact", within=1e-9),
    source=LAYER,
)
def cost_is_linear_in_the_tokens() -> dict[str, float]:
    """With 56 x 56 tokens in place of 28 x 28 outlook attention costs 4 times as much, and the products of
    self-attention 16 times."""
    outlook, attention = OutlookAttention(64, 2), Attention(64, 2)
    projections = count_flops(nn.Linear(64, 4 * 64), torch.zeros(28**2, 64)).total
    products = _count(attention, 56) - 4 * projections, _count(attention, 28) - projections
    return {"outlook": _count(outlook, 56) / _count(outlook, 28), "attention": products[0] / products[1]}


@claim("property", {"others": 0.0, "its own": True, "output": True}, source=LAYER)
def a_matrix_depends_on_its_centre_alone() -> dict[str, float | bool]:
    """With stride 1, another value of one token leaves the matrices of all other centres as they were, changes its own,
    and changes its neighbours' output: the largest difference of the others, and whether the rest changed."""
    layer, x = _layer(), _random_map(7, 6)
    other = x.clone()
    other[:, 3, 2] += 1
    change = (layer.logits(other) - layer.logits(x)).abs().amax((0, 1, 4, 5))  # (H, W)
    moved = (layer(other) - layer(x))[:, 2, 2].abs().max().item()
    own = change[3, 2].item()
    change[3, 2] = 0
    return {"others": change.max().item(), "its own": own > 0.01, "output": moved > 0.01}


@claim("equivalence", "equal to 1e-6", rounding, source=LAYER)
def equal_logits_average_twice() -> float:
    """With attn at zero every matrix is uniform, and the output before the projection is K^2 box(box(v)), where box is
    the mean of K x K tokens, zeros outside the map counted."""
    layer, x = _layer(), _random_map(7, 6)
    for parameter in layer.attn.parameters():
        nn.init.zeros_(parameter)
    mixed = layer.v(x).movedim(-1, 1)
    for _ in range(2):
        mixed = F.avg_pool2d(mixed, 3, 1, 1, count_include_pad=True)
    return relative_difference(layer(x), layer.proj(9 * mixed.movedim(1, -1)))


@claim("equivalence", "equal", rounding, source=LAYER)
def without_overlap_each_window_is_a_product() -> float:
    """With stride K and no padding each window is its own matrix times its values."""
    value, logits = torch.randn(2, 3, 6, 9, 8, dtype=torch.float64), torch.randn(2, 3, 2, 3, 9, 9, dtype=torch.float64)
    windows = value.unflatten(3, (3, 3)).unflatten(2, (2, 3)).transpose(3, 4).flatten(4, 5)  # (2, 3, 2, 3, 9, 8)
    mixed = (logits * 8**-0.5).softmax(-1) @ windows
    expected = mixed.unflatten(4, (3, 3)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return relative_difference(outlook_attention(value, logits, stride=3, padding=0), expected)


@claim("property", {"values": (5, 5), "matrices": (3, 3)}, source=LAYER)
def receptive_field() -> dict[str, tuple[int, int]]:
    """With K = 3 and stride 1 an output depends on 5 x 5 tokens through the values and on 3 x 3 through the matrices:
    rows and columns that the gradient reaches when the other projection returns what it would of another map."""
    reached = {}
    for path, cut in [("values", "attn"), ("matrices", "v")]:
        layer, x = _layer(), _random_map(9, 9).requires_grad_()
        other = getattr(layer, cut)(_random_map(9, 9)).detach()
        getattr(layer, cut).register_forward_hook(lambda *_, other=other: other)
        (grad,) = torch.autograd.grad(layer(x)[0, 4, 4].sum(), x)
        seen = grad[0].abs().amax(-1) > 0
        rows, columns = (int(seen.any(axis).sum()) for axis in (1, 0))
        reached[path] = rows, columns if rows * columns == int(seen.sum()) else 0
    return reached


@claim("property", "different", at_least(0.01, "equal features would give 0"), source="an experiment of ours")
def an_edge_and_a_flat_place_have_other_kernels() -> float:
    """The weights are made of the content: on a map with one edge, the largest difference between what a token at the
    edge and one in the flat part take from their surroundings."""
    layer, x = _layer(), torch.zeros(1, 9, 12, 16, dtype=torch.float64)
    x[:, :, 8:] = 1
    with tap(layer) as seen:
        layer(x)
    weights = seen.attention[""].unflatten(-1, (9, 12)).unflatten(2, (9, 12))
    edge, flat = (weights[0, :, 4, column, 2:7, column - 2 : column + 3] for column in (7, 3))
    return (edge - flat).abs().max().item()


@claim(
    "accuracy",
    87.1,
    source="abstract and table; D5 at 512 x 512, ImageNet top-1",
    needs="ImageNet, and published weights",
)
def first_above_87_percent() -> None:
    """D5 is the first network above 87 % on ImageNet without extra data."""


@claim(
    "accuracy",
    "outlook attention at least as accurate as a depthwise convolution, and that more than no mixing",
    at_least(-0.01, "four of 359 digits, within what the seed changes"),
    source="an experiment of ours",
    slow=True,
    guess="12 epochs on 8 x 8 digits suit fixed kernels, and the network's first convolution already mixes neighbours",
)
def digits_from_windows() -> dict[str, float]:
    """On digits of 8 x 8 pixels a block of outlook attention (K = 3, stride 1) is as accurate as one of a depthwise
    3 x 3 convolution, and that is more accurate than one without mixing: differences of accuracy."""
    mixers: list[Callable[[int], nn.Module]] = [
        lambda dim: OutlookAttention(dim, 2, stride=1),
        lambda dim: DepthwiseConv(dim, kernel_size=3),
        lambda dim: nn.Linear(dim, dim),
    ]
    outlook, depthwise, alone = (_train(mixer) for mixer in mixers)
    return {"outlook - depthwise": outlook - depthwise, "depthwise - none": depthwise - alone}


def replay(case: Case) -> dict[str, Tensor]:
    """The OutlookAttention of models/volo.py, and VOLO."""
    if "OutlookAttention" not in case.cls:
        return replay_network(case, _network(case))
    layer = case.build(_official)
    return play(case, lambda state, inputs: {"y": run_official(layer, state, inputs["x"])})


_WORDS = {
    "img": "img_size",
    "patch": "patch_size",
    "heads": "num_heads",
    "outlook": "outlook_attention",
    "mlp": "mlp_ratios",
}  # of recorded arguments


def _network(case: Case) -> VOLO:
    """The network of the official state; what its shapes do not show stands in the arguments of the official VOLO."""
    shapes, args = case.shapes, {_WORDS.get(name, name): value for name, value in case.args.items()}
    case = replace(case, args=args)
    numbers = sorted({int(name.split(".")[1]) for name in shapes if name.startswith("network.")})
    if not numbers:
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: replay serves VOLO and OutlookAttention")
    steps = [number for number in numbers if f"network.{number}.proj.weight" in shapes]
    places = [number for number in numbers if number not in steps]  # of the stages
    firsts = [f"network.{place}.0" for place in places]
    hidden = [shapes[f"{first}.mlp.fc1.weight"] for first in firsts]
    outlook = [f"{first}.attn.v.weight" in shapes for first in firsts]
    count, stem = len(places), "patch_embed.conv.0.weight"
    bias = (".attn.v.bias", ".attn.qkv.bias")
    ratios = case.per_stage("mlp_ratios", count, tuple(width / dim for width, dim in hidden))
    down = tuple(place + 1 in steps for place in places)
    patch = 2 * shapes["patch_embed.proj.weight"][-1]
    model = VOLO(
        tuple(sum(bool(re.fullmatch(rf"network\.{n}\.\d+\.norm1\.weight", name)) for name in shapes) for n in places),
        tuple(dim for _, dim in hidden),
        case.per_stage("num_heads", count, (6, 12, 12, 12)),
        outlook=tuple(outlook),
        down=down,
        mlp_ratio=tuple(map(float, ratios)),
        stem_dim=shapes[stem][0],
        patch_size=patch,
        image_size=shapes["pos_embed"][1] * patch * 2 ** sum(down[: 1 if down[0] else 2]),
        kernel_size=args.get("out_kernel", 3),
        stride=args.get("out_stride", 2),
        padding=args.get("out_padding", 1),
        qkv_bias=any(f"{first}{name}" in shapes for first in firsts for name in bias),
        scale=args.get("qk_scale") or None,
        class_layers=sum(bool(re.fullmatch(r"post_network\.\d+\.norm1\.weight", name)) for name in shapes),
        dense="aux_head.weight" in shapes,
        num_classes=shapes.get("head.weight", (0,))[0],
        in_chans=shapes[stem][1],
    )
    if args.get("return_mean"):
        model.global_pool = model.pools[-1] if model.num_prefix_tokens else "avg"
    return model


def _official(
    dim: int,
    num_heads: int,
    kernel_size: int = 3,
    padding: int = 1,
    stride: int = 1,
    qkv_bias: bool = False,
    qk_scale: float | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
) -> OutlookAttention:
    """The layer with the arguments of the official one. Dropout of the matrices is for training alone."""
    return OutlookAttention(
        dim,
        num_heads,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        qkv_bias=qkv_bias,
        scale=qk_scale or None,
        proj_drop=proj_drop,
    )


def _layer() -> OutlookAttention:
    """A layer of 16 channels, 2 heads and stride 1, with biases, and weights large enough for matrices to matter."""
    layer = OutlookAttention(16, 2, stride=1, qkv_bias=True).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def _random_map(height: int, width: int) -> Tensor:
    return torch.randn(2, height, width, 16, dtype=torch.float64)


def _train(mixer: Callable[[int], nn.Module]) -> float:
    """Accuracy on digits, from the same random state for every mixer."""
    torch.manual_seed(0)
    return train_on_digits(mixer)


def _count(layer: nn.Module, side: int) -> int:
    """FLOPs of a layer on a square map of one image."""
    channels: int = layer.dim  # type: ignore[assignment]
    return count_flops(layer, torch.zeros(1, side, side, channels)).total
