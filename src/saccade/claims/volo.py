"""VOLO: outlook attention makes the weights of a window from its centre alone."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import tap
from saccade.claims.framework import (
    Case,
    Paper,
    at_least,
    claim,
    equal,
    play,
    relative_difference,
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
    home=("saccade.mixers.OutlookAttention", "saccade.ops.outlook_attention"),
    missing=("the networks D1 to D5, with their class attention and token labelling",),
    differences=(
        "Official code takes stride 1 by default and gives 2 to every published network; our default is 2.",
        "The paper prints H W K^2 C for the mixing (recalled); the steps take H W K^4 C multiply-adds.",
        "Official code refuses sizes whose windows are not ceil(H / stride) in number; ours pads at the end for them.",
    ),
)

LAYER = "the layer's definition"
NETWORKS = "the networks D1 to D5, which saccade does not have yet"


@claim(
    "params",
    {"D1": 26_632_040, "D2": 58_678_336, "D3": 86_325_072, "D4": 192_961_520, "D5": 295_455_584},
    source="official code, at 224 x 224",
    needs=NETWORKS,
)
def networks_have_their_sizes() -> None:
    """The networks have so many parameters."""


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
    needs="ImageNet, and " + NETWORKS,
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
    """The OutlookAttention of models/volo.py."""
    if "OutlookAttention" not in case.cls:
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: whole networks come with the backbones")
    layer = case.build(_official)
    return play(case, lambda state, inputs: {"y": run_official(layer, state, inputs["x"])})


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
