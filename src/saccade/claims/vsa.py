"""Varied-size window attention: each window predicts, head by head, the region from which its keys come."""

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
    rounding,
    run_official,
)
from saccade.claims.framework.oracles import cut_windows
from saccade.errors import InputError
from saccade.measure import count_flops, count_parameters
from saccade.mixers import VariedWindowAttention, WindowAttention
from saccade.mixers.mixer import split_heads
from saccade.ops import resample_windows

PAPER = Paper(
    title="VSA: Learning Varied-Size Window Attention in Vision Transformers",
    arxiv="2204.08446",
    published="2022-04-18",
    summary="Each window predicts from its mean, for every head, how far to move and stretch the region from which its "
    "keys and values are sampled, on a lattice of as many points as before. Windows so overlap and reach far for "
    "hardly more than the cost of window attention, and need no shift.",
    home=("saccade.mixers.VariedWindowAttention", "saccade.ops.resample_windows"),
    missing=("the networks ViTAEv2-VSA, and Swin with VSA",),
    differences=(
        "Official code scales q.k by the input's width of a head, although queries have the output's: replay asks for "
        "it with scale, and where the two widths are equal nothing changes.",
        "Official code is built for one size of image; ours serves any, and by default takes a smaller window where "
        "the map is smaller than 7.",
        "Our projections are linear layers where the official code has 1 x 1 convolutions of the same weights.",
    ),
)

LAYER = "the layer's definition"
NETWORKS = "the networks, which saccade does not have yet"


@claim("equivalence", "equal to 1e-10 in float64", rounding, source=LAYER)
def without_regression_it_is_window_attention() -> float:
    """With the regression's weights and the position table at 0 it is attention inside plain windows of 4, keys of 0
    in the padding of a 10 x 9 map included."""
    layer, x = _without_regression(16, 2), _random_map(10, 9)
    layer.proj, layer.position_bias_table = nn.Identity(), nn.Parameter(torch.zeros(2, 7, 7))  # type: ignore[assignment]
    padded = F.pad(layer.qkv(x), (0, 0, 0, 3, 0, 2))
    query, key, value = (cut_windows(split_heads(part, 2), 4) for part in padded.chunk(3, -1))
    out = F.pad(layer(x), (0, 0, 0, 3, 0, 2))
    inside = cut_windows(F.pad(torch.ones(1, 1, 10, 9, 1), (0, 0, 0, 3, 0, 2)), 4)
    return relative_difference(
        cut_windows(split_heads(out, 2), 4), F.scaled_dot_product_attention(query, key, value) * inside
    )


@claim("params", (0, 0, 0), source=LAYER)
def the_regression_is_the_only_addition() -> tuple[int, ...]:
    """Beside window attention a layer of n heads has 2 (C 2 n + 2 n) parameters: what is left of the difference for
    three sizes."""
    rest = []
    for dim, heads, size in [(64, 2, 7), (96, 3, 7), (512, 16, 4)]:
        varied, plain = (
            count_parameters(kind(dim, heads, window_size=size)) for kind in (VariedWindowAttention, WindowAttention)
        )
        rest.append(varied - plain - 2 * (dim * 2 * heads + 2 * heads))
    return tuple(rest)


@claim(
    "params",
    {"ViTAEv2_VSA_S": 19_773_300, "ViTAEv2_VSA_widePCM_S": 20_342_442, "ViTAEv2_VSA_widePCM_48M": 51_089_119},
    source="the repository's networks, built",
    needs=NETWORKS,
)
def networks_have_their_sizes() -> None:
    """The networks have so many parameters."""


@claim("flops", {"28 x 28": 0, "56 x 56": 0}, source="cost of the layer")
def only_the_regression_adds_products() -> dict[str, int]:
    """Matrix products beyond those of window attention are the two regressions', 2 (2 C 2 n) FLOPs a window of s = 7:
    what is left of the difference (C = 64, n = 2)."""
    return {f"{side} x {side}": _extra_products(side) - side**2 // 49 * 2 * (2 * 64 * 2 * 2) for side in (28, 56)}


@claim("flops", "two poolings and one sampling", at_most(3, "that many are published"), source="cost of the layer")
def poolings_and_a_sampling_remain() -> int:
    """What is computed besides: the means of the windows, and one bilinear sampling of keys and values together, both
    linear in the map. Ours takes the means once for both regressions: the number of such operations."""
    layer = VariedWindowAttention(64, 2, window_size=7)
    return sum(count_flops(layer, torch.randn(1, 28, 28, 64)).uncounted.values())


@claim(
    "property",
    {"extent": 2.0, "centre": 0.0, "moved by": 2.5},
    equal("what float64 loses to rounding", within=1e-10),
    source=LAYER,
)
def scale_and_offset_stretch_and_move_the_window() -> dict[str, float]:
    """Scale a = 1 doubles a window's extent about its centre, and offset o moves it by o (size - 1) / 2 tokens:
    o = 1/3 on a side of 16, read off a sampled image of coordinates."""
    size, window = 16, 4
    layer = _without_regression(16, 2)
    with torch.no_grad():
        layer.sampling_scales.bias.fill_(1.0)
        layer.sampling_offsets.bias[0] = size // window / 3  # head 0, columns; shared by the windows of a row
    move, stretch = layer.regions(_random_map(size, size)[:1])
    column = torch.arange(size, dtype=torch.float64).view(1, 1, 1, size, 1).expand(1, 2, size, size, 1)
    lattice = resample_windows(column, window, move, stretch)[0, :, 5, 8:12, 0]  # of both heads, in an inner window
    plain = column[0, 1, 5, 8:12, 0]
    extent = (lattice[1, -1] - lattice[1, 0]) / (plain[-1] - plain[0])
    centre = lattice[1].mean() - plain.mean()
    return {"extent": extent.item(), "centre": centre.item(), "moved by": (lattice[0] - lattice[1]).mean().item()}


@claim("property", "equal", at_most(1e-6, "what central differences of 1e-6 leave"), source=LAYER)
def gradients_reach_the_regression_through_the_places() -> float:
    """The gradients of the four regression weights and biases are those of finite differences, without any trick."""
    layer, x = VariedWindowAttention(16, 2, window_size=4).double(), _random_map(8, 8)
    upstream = torch.randn_like(x)
    worst = 0.0
    for regression in (layer.sampling_offsets, layer.sampling_scales):
        for parameter in regression.parameters():
            (grad,) = torch.autograd.grad((layer(x) * upstream).sum(), parameter)
            direction = torch.randn_like(parameter)
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter.add_(direction, alpha=step)
                    ends.append((layer(x) * upstream).sum())
                    parameter.sub_(direction, alpha=step)
            worst = max(worst, relative_difference((ends[0] - ends[1]) / 2e-6, (grad * direction).sum()))
    return worst


@claim("property", {"plain": (0, 0), "moved": (4, 0), "stretched": (0, 6)}, source=LAYER)
def each_head_has_a_window_of_its_own() -> dict[str, tuple[int, ...]]:
    """How many tokens beyond its own window of 4 x 4 an output reaches, in each of two heads, by the gradient on a map
    of 16 x 16: not at all without regression, 4 when the first head moves by a window, 6 when the second stretches
    to five times the extent."""
    layers = {name: _without_regression(16, 2) for name in ("plain", "moved", "stretched")}
    with torch.no_grad():
        layers["moved"].sampling_offsets.bias[0] = 4 * 4 / 7.5  # columns of the first head; 1 is 7.5 / 4 tokens
        layers["stretched"].sampling_scales.bias[2:] = 4.0
    return {name: _reach(layer) for name, layer in layers.items()}


@claim(
    "accuracy",
    {"Swin-T + VSA": 82.24, "Swin-S + VSA": 83.6, "ViTAEv2*-S + VSA": 82.7},
    source="the repository's table; ImageNet top-1",
    needs="ImageNet, and " + NETWORKS,
)
def networks_are_more_accurate_than_with_fixed_windows() -> None:
    """On ImageNet Swin-T gains 1.1 points over its fixed and shifted windows (81.2), Swin-S 0.6 (83.0), and the gain
    grows with the size of the image."""


@claim(
    "accuracy",
    {"ViTAEv2*-S, COCO box AP": 45.9, "Swin-T, Cityscapes mIoU": 80.8},
    source="the repository's tables",
    needs="COCO and Cityscapes, and " + NETWORKS,
)
def dense_tasks_gain_more() -> None:
    """Detection gains 2.4 points of box AP (43.5 with fixed windows), segmentation 1.9 of mIoU (78.9)."""


@claim(
    "accuracy",
    "1.05 (the prior's variance) without regression",
    at_least(0.95, "the variance of the target is 1; single settings differ"),
    source="an experiment of ours with the official layer",
    slow=True,
)
def fixed_windows_never_see_their_neighbour() -> float:
    """Trained to give the colour of the window on the right, a layer of fixed windows stays at chance: the mean
    squared error where there is such a window."""
    return _train_to_look_right(regress=False)


@claim(
    "accuracy",
    "0.53 with regression",
    at_most(0.8, "a good part of the way from 1; how far 400 steps get depends on the seed"),
    source="an experiment of ours with the official layer",
    slow=True,
)
def varied_windows_learn_to_look_at_it() -> float:
    """With the regression, which starts from 0, the same layer moves a window to the right and learns the task."""
    return _train_to_look_right(regress=True)


def replay(case: Case) -> dict[str, Tensor]:
    """VSAWindowAttention: channels first, 1 x 1 convolutions, Swin's table."""
    if "VSAWindowAttention" not in case.cls:
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: whole networks come with the backbones")
    layer = case.build(_from_official)

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": run_official(layer, _rename(state), inputs["x"].movedim(1, -1)).movedim(-1, 1)}

    return play(case, forward)


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names and shapes to ours: their offsets are of query to key, ours of key to query."""
    renamed = {
        name.replace("sampling_offsets.2", "sampling_offsets").replace("sampling_scales.2", "sampling_scales"): (
            tensor.flatten(1) if tensor.ndim == 4 else tensor
        )
        for name, tensor in state.items()
        if name != "relative_position_index"
    }
    table = renamed.pop("relative_position_bias_table")
    side = round(len(table) ** 0.5)
    return renamed | {"position_bias_table": table.T.unflatten(1, (side, side)).flip(1, 2)}


def _from_official(
    dim: int,
    num_heads: int,
    out_dim: int | None = None,
    window_size: int = 1,
    qkv_bias: bool = True,
    qk_scale: float | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    img_size: object = None,
) -> VariedWindowAttention:
    """The layer with the arguments of VSAWindowAttention; dropout does nothing in eval mode, nor does the size."""
    return VariedWindowAttention(
        dim,
        num_heads,
        window_size=window_size,
        dim_out=out_dim,
        qkv_bias=qkv_bias,
        scale=qk_scale or (dim // num_heads) ** -0.5,
    )


def _random_map(height: int, width: int) -> Tensor:
    return torch.randn(2, height, width, 16, dtype=torch.float64)


def _without_regression(dim: int, heads: int) -> VariedWindowAttention:
    """A layer of windows of 4 that starts as plain window attention, in float64."""
    layer = VariedWindowAttention(dim, heads, window_size=4).double()
    for regression in (layer.sampling_offsets, layer.sampling_scales):
        nn.init.zeros_(regression.weight)
        nn.init.zeros_(regression.bias)
    return layer


def _extra_products(side: int) -> int:
    """FLOPs of products beyond those of window attention, with C = 64, two heads and windows of 7."""
    x = torch.randn(1, side, side, 64)
    varied, plain = (
        count_flops(kind(64, 2, window_size=7), x).total for kind in (VariedWindowAttention, WindowAttention)
    )
    return varied - plain


def _reach(layer: VariedWindowAttention) -> tuple[int, ...]:
    """How far beyond its window, rows and columns 8 to 11 of 16, the gradient of an output of each head goes."""
    layer.proj = nn.Identity()  # type: ignore[assignment]
    x = _random_map(16, 16).requires_grad_()
    by_head = layer(x)[0, 9, 9].unflatten(0, (2, -1)).sum(-1)
    reach = []
    for out in by_head:
        (grad,) = torch.autograd.grad(out, x, retain_graph=True)
        seen = (grad[0].abs().sum(-1) > 1e-9).nonzero()  # a place that is rounded leaves 1e-16 beside it
        reach.append(int(torch.maximum(8 - seen, seen - 11).max().clamp(min=0)))
    return tuple(reach)


def _train_to_look_right(regress: bool) -> float:
    """Train a layer on maps of 4 x 4 windows, each of one colour, to give the colour of the window on the right; the
    mean squared error of the last steps."""
    layer = _without_regression(8, 2).float()
    for regression in (layer.sampling_offsets, layer.sampling_scales):
        regression.requires_grad_(regress)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    errors = []
    for _ in range(400):
        colours = torch.randn(16, 4, 4, 8).repeat_interleave(4, 1).repeat_interleave(4, 2)
        out = layer(colours + 0.1 * torch.randn_like(colours))
        error = (out[:, :, :12] - colours[:, :, 4:]).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    return sum(errors[-20:]) / 20
