"""FaViT: every query attends to one window of keys that is fused from all windows, and to a coarse map."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from saccade.errors import InputError
from saccade.measure import count_flops, fit_exponent
from saccade.mixers import FactorizedAttention, WindowAttention
from saccade.taps import tap

PAPER = Paper(
    title="Factorization Vision Transformer: Modeling Long Range Dependency with Local Window Cost",
    arxiv="2312.08614",
    published="2023-12-14",
    summary="Channels are split into groups of different granularity: one attends to a map reduced by a strided "
    "convolution, the others to 49 keys that are fused from all 7 x 7 windows, plain or dilated. A query so reaches "
    "the whole map for the cost of a window, whatever the map's size.",
    home=("saccade.mixers.FactorizedAttention", "saccade.ops.dilated_windows"),
    missing=("the networks B0 to B3",),
    differences=(
        "Official code does not average windows: its pooling runs over successive channels of one window. Ours "
        "averages by default, replay asks for the official way with fusion='runs', and with one window they agree.",
        "Official code needs maps that reflection can pad in one go; ours reflects as often as it takes.",
        "Official code needs C divisible by 16 (by 8 where sr_ratio is 1); ours shares any C about evenly.",
    ),
)

LAYER = "the layer's definition"
NETWORKS = "the networks, which saccade does not have yet"


@claim(
    "params",
    {"B0": 3_427_704, "B1": 12_958_568, "B2": 24_919_896, "B3": 48_746_440},
    source="the repository's networks, built; 3.4, 13, 24 and 48 million in its table",
    needs=NETWORKS,
)
def networks_have_their_sizes() -> None:
    """The networks have so many parameters; B2 has 14 % fewer than Swin-T (29 million)."""


@claim(
    "complexity",
    {str(side): 2 * 2 * side**2 * (49 * 112 + (side // 8) ** 2 * 16) for side in (56, 112)},
    source="cost of the layer",
)
def products_of_a_query_do_not_depend_on_the_map() -> dict[str, int]:
    """The two products of the fine groups take 2 N 49 (C_1 + C_2) multiply-adds, as in a window of 49, those of the
    coarse one 2 N (N / sr^2) C_0: in FLOPs, counted while a layer of C = 128 with sr = 8 runs."""
    return {str(side): _count(side)[1] for side in (56, 112)}


@claim("complexity", 1.05, equal("1.0 to 1.1 is stated", within=0.05), source="cost of the layer")
def cost_is_nearly_linear_in_the_tokens() -> float:
    """All FLOPs of a layer grow with the tokens to a power of about 1.0 to 1.1, from 28 x 28 to 112 x 112 with
    sr = 8."""
    sides = [28, 56, 112]
    return fit_exponent(sides, [_count(side)[0] for side in sides]).value / 2


@claim("property", {"pairs without gradient": 0, "keys": (49, 49, 49)}, source=LAYER)
def every_output_depends_on_every_token_through_few_keys() -> dict[str, int | tuple[int, ...]]:
    """One layer reaches the whole map, through N / sr^2 coarse keys and 49 of each fine group (N = 14 x 14, sr = 2):
    pairs of output and input token without gradient, and the ranks of the heads' token matrices, which are
    their keys."""
    layer, x = FactorizedAttention(16, 1).double(), _random_map(14, 14).requires_grad_()
    with tap(layer) as seen:
        out = layer(x)
    missing = 0
    for token in out[0].flatten(0, 1).sum(-1):
        (grad,) = torch.autograd.grad(token, x, retain_graph=True)
        missing += int((grad[0].abs().sum(-1) == 0).sum())
    attention = seen[""].attention
    ranks = torch.linalg.matrix_rank(torch.eye(1) if attention is None else attention[0])
    return {"pairs without gradient": missing, "keys": tuple(ranks.tolist())}


@claim("equivalence", "equal", rounding, source="the last stage")
def one_window_is_ordinary_attention() -> float:
    """On a map of 7 x 7 with sr = 1 nothing is left to fuse: without the convolution of the values the fine group is
    attention over the 49 tokens, its keys and values from the two linear layers in a row."""
    layer, x = FactorizedAttention(16, 1, sr_ratio=1, coarse_dim=2).double(), _random_map(7, 7)
    for parameter in layer.local_convs.parameters():
        nn.init.zeros_(parameter)
    layer.proj = nn.Identity()  # type: ignore[assignment]
    source = layer.point_conv(layer.depth_conv(x[..., 2:].movedim(-1, 1)).movedim(1, -1))
    key, value = layer.single_heads[0](layer.fcs[0](source)).flatten(1, 2).chunk(2, -1)
    query = layer.q(x).flatten(1, 2)[..., 2:]
    attended = F.scaled_dot_product_attention(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1))
    return relative_difference(layer(x)[..., 2:].flatten(1, 2), attended.squeeze(1))


@claim(
    "equivalence",
    {"one window": 0.0, "equal channels": 0.0},
    equal("what float64 loses to rounding", within=1e-10),
    source="the official code",
)
def official_fusion_is_the_mean_where_there_is_nothing_to_mix() -> dict[str, float]:
    """The official fusion, a mean over runs of channels, is the mean of the windows where there is one window, or
    where all windows are equal and all channels of a token too."""
    windows = torch.randn(2, 3, 1, 49, 6, dtype=torch.float64)
    return {
        "one window": _fusion_error(windows),
        "equal channels": _fusion_error(windows[..., :1].expand(-1, -1, 4, -1, 6)),
    }


@claim("property", "different", at_least(0.1, "rounding is 1e-16"), source="the official code")
def official_fusion_is_another_mean_elsewhere() -> float:
    """Elsewhere it mixes neighbouring channels of a window, even where all windows are equal: its relative difference
    from their mean."""
    return _fusion_error(torch.randn(2, 3, 1, 49, 6, dtype=torch.float64).expand(-1, -1, 4, -1, -1))


@claim(
    "accuracy",
    {"B0": 71.5, "B1": 79.4, "B2": 82.3, "B3": 83.4},
    source="the repository's table; ImageNet top-1",
    needs="ImageNet and ImageNet-C, and " + NETWORKS,
)
def networks_are_more_accurate_and_more_robust() -> None:
    """On ImageNet B2 gains 1 point over Swin-T (81.3), and 7 % of robustness on ImageNet-C."""


@claim(
    "accuracy",
    {"window": 1.0, "mean": 0.0, "runs": 0.0},
    equal("chance is 1; how far a short run gets depends on the seed, and a half lies between", within=0.4),
    source="an experiment of ours",
    slow=True,
)
def far_tokens_are_copied() -> dict[str, float]:
    """Trained to give, in the right half of a 14 x 14 map, the content of a region that is marked in the left half:
    the mean squared error of window attention, and of this layer with both ways of fusion, over chance."""
    window = partial(WindowAttention, 32, 1, window_size=7)
    return {"window": _train_to_copy(window)} | {
        fusion: _train_to_copy(partial(FactorizedAttention, 32, 1, fusion=fusion)) for fusion in ("mean", "runs")
    }


def replay(case: Case) -> dict[str, Tensor]:
    """Attention (FaSA), and the Block around it."""
    if case.cls != "Block" and not case.cls.startswith("Attention (FaSA)"):
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: whole networks come with the backbones")
    layer = case.build(_block if case.cls == "Block" else _attention)

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {
            name.replace("kv_l.", "").replace("dwconv.dwconv", "dwconv"): (
                tensor.flatten(1) if name.endswith("point_conv.weight") else tensor
            )
            for name, tensor in state.items()
        }
        x = inputs["x"].unflatten(1, (case.args["H"], case.args["W"]))
        # in float64, since a norm over two channels leaves a gradient few digits in float32
        in_double = {name: tensor.double() for name, tensor in renamed.items()}
        return {"y": run_official(layer.double(), in_double, x.double()).flatten(1, 2)}

    return play(case, forward)


def _attention(
    dim: int,
    num_heads: int = 8,
    qkv_bias: bool = False,
    qk_scale: float | None = None,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    sr_ratio: int = 1,
    windowsize: int = 7,
    H: int = 0,  # of the call
    W: int = 0,
) -> FactorizedAttention:
    """The layer with the arguments of FaViT's Attention; dropout does nothing in eval mode."""
    parts = 8 if sr_ratio == 1 else 16
    if qk_scale is not None or dim % parts:
        raise InputError(
            f"dim is {dim} and qk_scale is {qk_scale}: the official layer divides dim into {parts} parts, and each of "
            "its groups has a scale of its own. Take a multiple, and no qk_scale"
        )
    return FactorizedAttention(
        dim,
        num_heads,
        sr_ratio=sr_ratio,
        window_size=windowsize,
        coarse_dim=dim // 8,
        fusion="runs",
        qkv_bias=qkv_bias,
    )


class _Block(nn.Module):
    """FaViT's block: attention, and a perceptron with a depthwise convolution between its layers."""

    def __init__(self, dim: int, attn: nn.Module, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = _Perceptron(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class _Perceptron(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dwconv(self.fc1(x).movedim(-1, 1)).movedim(1, -1)
        out: Tensor = self.fc2(F.gelu(hidden))
        return out


def _block(
    dim: int,
    num_heads: int = 1,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = False,
    qk_scale: float | None = None,
    drop: float = 0.0,
    attn_drop: float = 0.0,
    drop_path: float = 0.0,
    sr_ratio: int = 1,
    heads: int | None = None,  # as the record calls num_heads
    H: int = 0,
    W: int = 0,
) -> _Block:
    attn = _attention(dim, heads or num_heads, qkv_bias, qk_scale, sr_ratio=sr_ratio)
    return _Block(dim, attn, int(dim * mlp_ratio))


def _count(side: int) -> tuple[int, int]:
    """FLOPs of a layer of 128 channels with sr = 8, and those of its attention alone."""
    flops = count_flops(FactorizedAttention(128, 1, sr_ratio=8), torch.randn(1, side, side, 128))
    attention = sum(count for op, count in flops.by_op.items() if "scaled_dot_product" in op)
    return flops.total, attention


def _random_map(height: int, width: int) -> Tensor:
    return torch.randn(1, height, width, 16, dtype=torch.float64)


def _fusion_error(windows: Tensor) -> float:
    """How much the official fusion of windows (B, heads, windows, s * s, D) differs from their mean."""
    runs = windows.transpose(2, 3).flatten(3).unflatten(3, (windows.shape[-1], -1)).mean(-1)
    return relative_difference(runs, windows.mean(2))


def _train_to_copy(make_layer: Callable[[], nn.Module]) -> float:
    """Train a layer to spread the content of a marked 3 x 3 region in the left half over the right half; the error
    of the last steps over the content's variance."""
    layer = nn.Sequential(nn.Linear(9, 32), make_layer(), nn.Linear(32, 8))
    optimizer = torch.optim.Adam(layer.parameters(), lr=5e-3)
    errors = []
    for _ in range(300):
        content, noise = torch.randn(16, 1, 1, 8), 0.1 * torch.randn(16, 14, 14, 9)
        rows, columns = torch.randint(12, (16, 1, 1)), torch.randint(5, (16, 1, 1))
        down, right = torch.arange(14).view(1, 14, 1) - rows, torch.arange(14).view(1, 1, 14) - columns
        marked = ((down >= 0) & (down < 3) & (right >= 0) & (right < 3)).unsqueeze(-1).float()
        x = noise + marked * torch.cat([content, torch.ones(16, 1, 1, 1)], -1)
        error = (layer(x)[:, :, 7:] - content).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    return sum(errors[-20:]) / 20
