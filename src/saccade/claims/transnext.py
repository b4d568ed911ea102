"""TransNeXt: every token attends in one softmax to its neighbours and to a pooled map of the whole image."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import isqrt, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.backbones import ConvolutionalGLU, TransNeXt, create_model, describe_model
from saccade.backbones.residual import Stage
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
from saccade.claims.framework.experiment import load_digits
from saccade.claims.framework.oracles import dense_attention, random_inputs
from saccade.errors import InputError
from saccade.measure import count_flops, count_parameters, fit_exponent
from saccade.mixers import AggregatedAttention, LengthScaledAttention
from saccade.mixers.aggregated import rename
from saccade.ops import (
    SlidingWindow,
    aggregated_attention,
    aggregated_attention_weights,
    pooled_coordinates,
    sparse_attention,
)

PAPER = Paper(
    title="TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
    arxiv="2311.17132",
    published="2023-11-28",
    summary="Aggregated attention lets every token attend in one softmax to its 3 x 3 neighbours and to a pooled map "
    "of the whole image, by cosines that grow with the log of the number of keys. The feed-forward network is a gate "
    "that looks at its neighbours.",
    home=(
        "saccade.mixers.AggregatedAttention",
        "saccade.mixers.LengthScaledAttention",
        "saccade.backbones.ConvolutionalGLU",
        "saccade.ops.aggregated_attention",
        "saccade.backbones.TransNeXt",
    ),
    differences=(
        "Official code is built for one resolution, which fixes positions, lengths and pooled cells; ours makes them "
        "for the map at hand, with one cell at least along each axis.",
        "Official code divides by pretrain_size - 1, by 0 where that is one token; ours counts it as two.",
        "The norm of the pooled map has eps 1e-5 and those of the blocks 1e-6: 1e-6 there moves the recorded outputs "
        "by 3e-4.",
    ),
)

LAYER = "the layer's definition"
README = "README of the repository"
WEIGHTS = "ImageNet, and the weights of the authors"
MODELS = {
    "Micro": "transnext_micro",
    "Tiny": "transnext_tiny",
    "Small": "transnext_small",
    "Base": "transnext_base",
    "Micro AAAA": "transnext_micro_aaaa",
}


@claim(
    "params",
    {"Micro": 12_809_304, "Tiny": 28_258_960, "Small": 49_741_564, "Base": 89_721_496, "Micro AAAA": 13_114_008},
    source="official code, counted",
)
def networks_have_their_sizes() -> dict[str, int]:
    """The networks have so many parameters, 12.8, 28.2, 49.7 and 89.7 million, and 13.1 with aggregated attention in
    all stages."""
    return count_model_parameters(MODELS)


@claim("params", 0.69, equal("both sizes are rounded", within=0.01), source="abstract")
def tiny_is_smaller_than_convnext_base() -> float:
    """Tiny has 69 % fewer parameters than ConvNeXt-B, which has 88.6 million."""
    return 1 - describe_model("transnext_tiny").params / 88.6e6


FLOPS = {
    "transnext_micro": 5_297_102_336,
    "transnext_tiny": 11_422_139_136,
    "transnext_small": 20_581_125_632,
    "transnext_base": 36_599_762_944,
    "transnext_micro_aaaa": 6_651_508_736,
}


@claim(
    "flops", FLOPS, source="official code, counted: products and convolutions of an image of 224 x 224, AAAA 256 x 256"
)
def networks_have_their_cost() -> dict[str, int]:
    """The networks take so many FLOPs for an image, published as 2.7, 5.7, 10.3, 18.4 and 3.3 G multiply-adds: those of
    our networks, with nine keys for the window of each token, as official code counts, in place of the tiles in which
    windows are computed here."""
    return {name: count - _count_windows(name) for name, count in measure_model_flops(FLOPS).items()}


@claim(
    "flops",
    1.0,
    equal("a tile multiplies pairs that are in no window as well", within=0.08),
    source="official code, counted",
)
def tiles_cost_little_more() -> float:
    """All that runs in Micro, tiles included, over what official code takes."""
    return measure_model_flops(["transnext_micro"])["transnext_micro"] / FLOPS["transnext_micro"]


@claim(
    "flops",
    {"projections": 2 * (5 * 784 * 96**2 + 2 * 49 * 96**2), "pairs": (3 * 28 - 2) ** 2 + 784 * 49},
    source=LAYER,
)
def cost_of_the_layer() -> dict[str, int]:
    """Projections and reduction take 5 N C^2 + 2 P C^2 multiply-adds, and N (w^2 + P) pairs of query and key meet, less
    those at the border: 28 x 28 tokens of C = 96 channels with sr = 4; FLOPs counted while the layer runs."""
    layer = AggregatedAttention(96, 4, sr_ratio=4)
    by_module = count_flops(layer, torch.zeros(1, 28, 28, 96)).by_module
    pairs = SlidingWindow(1, 1).num_visible((28, 28)) + 784 * prod(layer.cells((28, 28)))
    return {"projections": sum(by_module[name] for name in ("q", "kv", "sr", "proj")), "pairs": pairs}


@claim("complexity", 1.0, equal("borders, and the table of positions", within=0.05), source=LAYER)
def cost_is_linear_with_a_fixed_pool() -> float:
    """With a pooled map of 7 x 7 cells, whatever the image, the cost grows linearly with the tokens: exponent fitted
    from 28 x 28 to 112 x 112."""
    layer, sides = AggregatedAttention(48, 2, pool_size=7), [28, 56, 112]
    costs = [count_flops(layer, torch.zeros(1, side, side, 48)).total for side in sides]
    return fit_exponent(sides, costs).value / 2


@claim("property", {"sums": 0.0, "outside": 0.0}, rounding, source=LAYER)
def one_softmax_over_both_paths() -> dict[str, float]:
    """The weights of window and pooled map sum to 1 for every token, and none falls outside the map: the largest
    difference from 1, and from the numbers of tokens in a window of 4, 6 and 9 that lie inside."""
    query, key, _ = random_inputs(5, 6)
    window, pooled = aggregated_attention_weights(query, key, torch.randn(2, 3, 4, 8, dtype=torch.float64), 3)
    inside = SlidingWindow(1, 1).mask((5, 6)).sum(-1)
    return {
        "sums": (window.sum(-1) + pooled.sum(-1) - 1).abs().max().item(),
        "outside": float(((window > 0).sum(-1) - inside).abs().max()),
    }


@claim("equivalence", {"window alone": 0.0, "pooled map alone": 0.0}, rounding, source=LAYER)
def each_path_alone_is_a_known_attention() -> dict[str, float]:
    """Without the learnable tokens, and with the logits of the pooled map at -inf, it is attention in a sliding window;
    with those of the window at -inf, attention to a reduced map."""
    query, key, value = random_inputs(5, 6)
    pooled_key, pooled_value = torch.randn(2, 2, 3, 4, 8, dtype=torch.float64)
    never = torch.full((3, 3, 3), -torch.inf, dtype=torch.float64)
    inputs = query, key, value, pooled_key, pooled_value, 3
    near = aggregated_attention(*inputs, pooled_bias=never[:1, :1, :1])
    far = aggregated_attention(*inputs, window_bias=never)
    sliding = dense_attention(query, key, value, SlidingWindow(1, 1).mask((5, 6)))
    reduced = F.scaled_dot_product_attention(query.flatten(2, 3), pooled_key, pooled_value).view_as(query)
    return {
        "window alone": relative_difference(near, sliding),
        "pooled map alone": relative_difference(far, reduced),
    }


@claim(
    "property",
    {"49": 1.58, "196": 1.82, "784": 1.89, "3136": 1.93},
    equal("stated for one random set of keys; means of such sets spread by 0.11", within=0.2),
    source="an experiment with random vectors",
)
def length_scaling_keeps_the_entropy() -> dict[str, float]:
    """With logits that grow with the log of the number of keys, the entropy of attention over 49 to 3136 random unit
    vectors of 24 channels stays nearly the same, in nats: means over 16 sets of keys."""
    return {str(keys): _entropy(keys, keys) for keys in (49, 196, 784, 3136)}


@claim(
    "property",
    {"49": 1.58, "196": 2.5, "784": 3.48, "3136": 4.59},
    equal("stated for one random set of keys; means of such sets spread by 0.11", within=0.2),
    source="an experiment with random vectors",
)
def without_length_scaling_attention_dissolves() -> dict[str, float]:
    """With the factor of 49 keys for all numbers of keys it grows."""
    return {str(keys): _entropy(keys, 49) for keys in (49, 196, 784, 3136)}


@claim("property", 0, source="receptive field")
def every_output_depends_on_every_input() -> int:
    """One layer reaches the whole map, through the pooled cells: pairs of tokens without gradient."""
    return int((_reach() == 0).sum())


@claim("property", "larger", at_least(1, "equal shares would give 1"), source="receptive field")
def the_window_counts_more_than_the_rest() -> float:
    """The gradient of an output by a token is larger inside its 3 x 3 window: mean inside over mean outside, of a layer
    at its start."""
    reached, window = _reach(), SlidingWindow(1, 1).mask((6, 8))
    return (reached[window].mean() / reached[~window].mean()).item()


@claim(
    "params",
    {"C = 96, ratio 8": 1.0, "C = 384, ratio 4": 1.0},
    equal("the convolution is on two thirds of the channels", within=0.02),
    source="the feed-forward network's definition",
)
def the_gate_costs_no_parameters() -> dict[str, float]:
    """Two thirds of the hidden channels make up for the second branch: parameters of convolutional GLU over those of a
    network of two linear layers with a depthwise convolution between them."""
    ratios = {}
    for dim, ratio in [(96, 8), (384, 4)]:
        hidden = ratio * dim
        plain = nn.Sequential(
            nn.Linear(dim, hidden), nn.Conv2d(hidden, hidden, 3, groups=hidden), nn.Linear(hidden, dim)
        )
        ratios[f"C = {dim}, ratio {ratio}"] = count_parameters(ConvolutionalGLU(dim, hidden)) / count_parameters(plain)
    return ratios


@claim("equivalence", "equal", rounding, source="the feed-forward network's definition")
def a_convolution_that_does_nothing_leaves_a_plain_gate() -> float:
    """With a depthwise kernel that is 1 in its middle and 0 elsewhere, and no bias, it is a linear unit gated by
    GELU."""
    block, x = ConvolutionalGLU(12, 20).double(), torch.randn(2, 5, 6, 12, dtype=torch.float64)
    nn.init.dirac_(block.dwconv.weight, groups=block.dwconv.groups)
    nn.init.zeros_(block.dwconv.bias)  # type: ignore[arg-type]
    gate, value = block.fc1(x).chunk(2, -1)
    return relative_difference(block(x), block.fc2(F.gelu(gate) * value))


@claim(
    "accuracy",
    {"Micro": 82.5, "Tiny": 84.0, "Small": 84.7, "Base": 84.8, "Base at 384": 86.2},
    source=README + "; ImageNet top-1",
    needs=WEIGHTS,
)
def networks_are_accurate() -> None:
    """Top-1 accuracy of the networks on ImageNet."""


@claim(
    "accuracy",
    {"Micro": 29.9, "Tiny": 39.9, "Small": 47.1, "Base": 50.6, "Base at 384": 61.6},
    source=README + "; ImageNet-A top-1",
    needs=WEIGHTS.replace("ImageNet", "ImageNet-A"),
)
def networks_are_robust() -> None:
    """Top-1 accuracy of the networks on ImageNet-A."""


@claim(
    "accuracy",
    "both paths at least as accurate as the pooled map, and that more than the window",
    at_least(0, "an order is expected, without figures"),
    source="an experiment of ours",
    slow=True,
)
def the_cued_digit() -> dict[str, float]:
    """Two digits lie in two quarters of a map of 16 x 16 pixels, and a bright pixel marks the one to name: one block of
    aggregated attention is at least as accurate as one that sees itself and the pooled map alone, and that is more
    accurate than one that sees its window alone: differences of accuracy."""
    both, pooled, window = (
        _train_on_cues(mixer)
        for mixer in (
            AggregatedAttention(32, 2, sr_ratio=2),
            AggregatedAttention(32, 2, sr_ratio=2, window_size=1),
            _WindowAlone(32, 2, sr_ratio=2),
        )
    )
    return {"both - pooled": both - pooled, "pooled - window": pooled - window}


def replay(case: Case) -> dict[str, Tensor]:
    """AggregatedAttention, Attention and ConvolutionalGLU of attention_native and transnext, and their TransNeXt."""
    layers: dict[str, Callable[[Case], nn.Module]] = {
        "AggregatedAttention": _aggregated,
        "Attention": _length_scaled,
        "ConvolutionalGLU": _feed_forward,
    }
    found = re.match(r"\w+", case.cls.rsplit(".", 1)[-1])
    cls = found[0] if found else case.cls
    if "state.patch_embed1.proj.weight" in case.tensors:
        return replay_network(case, _network(case))
    if cls not in layers:
        raise InputError(
            f"{case.key}/{case.name} is a case of {case.cls}: replay serves TransNeXt, {', '.join(layers)}"
        )
    named = {_NAMES.get(name, name): value for name, value in case.args.items()}
    case = replace(case, args=named)
    space = _space(case)
    layer = _Flat(layers[cls](replace(case, args={k: v for k, v in named.items() if k not in ("H", "W")})), space)

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {f"layer.{name}": tensor for name, tensor in rename(state).items()}
        return {"y": run_official(layer, renamed, inputs["x"])}

    return play(case, forward)


_NAMES = {"heads": "num_heads", "window": "window_size", "in": "in_features"}


def _network(case: Case) -> TransNeXt:
    """The network of the official state; what its shapes do not show stands in the arguments."""
    shapes, args = case.shapes, case.args
    dims, depths, heads, ratios, reduced, windows = [], [], [], [], [], []
    for stage in range(1, 1 + sum(name.startswith("norm") and name.endswith(".weight") for name in shapes)):
        first, dim = f"block{stage}.0", shapes[f"norm{stage}.weight"][0]
        hidden = shapes[f"{first}.mlp.fc2.weight"][1]
        dims.append(dim)
        depths.append(sum(re.fullmatch(rf"block{stage}\.\d+\.norm1\.weight", name) is not None for name in shapes))
        heads.append(shapes[f"{first}.attn.temperature"][0])
        ratios.append((-(-3 * hidden // 2) + 0.5) / dim)  # the half is for rounding: official code cuts
        reduced.append(f"{first}.attn.sr.weight" in shapes)
        windows.append(isqrt(shapes[f"{first}.attn.relative_pos_bias_local"][1]) if reduced[-1] else None)
    side = case.tensors["in.x"].shape[-1]
    sr_ratios = _argument(case, "sr_ratios", "sr") or (8, 4, 2, 1)
    sr_ratios = case.per_stage("sr_ratios", len(dims), sr_ratios)
    if [ratio > 1 for ratio in sr_ratios] != reduced:
        raise InputError(f"{case.key}/{case.name} has sr_ratios {sr_ratios}, and its weights are for others")
    return TransNeXt(
        dims,
        depths,
        num_heads=heads,
        mlp_ratios=ratios,
        sr_ratios=sr_ratios,
        window_sizes=windows,
        pool_size=_argument(case, "fixed_pool_size"),
        qkv_bias="block1.0.attn.q.bias" in shapes or "block1.0.attn.qkv.bias" in shapes,
        norm_eps=args.get("eps", 1e-6),
        image_size=_argument(case, "pretrain_size", "img_size", "img") or side,
        num_classes=shapes.get("head.weight", (0,))[0],
        in_chans=shapes["patch_embed1.proj.weight"][1],
    )


def _argument(case: Case, *names: str) -> Any:
    """The first of these arguments that is there and not None."""
    return next((case.args[name] for name in names if case.args.get(name) is not None), None)


class _Flat(nn.Module):
    """A layer on maps, called with (B, H W, C) as official code does."""

    def __init__(self, layer: nn.Module, space: tuple[int, int]) -> None:
        super().__init__()
        self.layer = layer
        self.space = space

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.unflatten(1, self.space))
        return out.flatten(1, 2)


def _space(case: Case) -> tuple[int, int]:
    """Height and width of the map, with which official code is called."""
    if "H" in case.args and "W" in case.args:
        return case.args["H"], case.args["W"]
    if "input_resolution" not in case.args:
        raise InputError(f"{case.key}/{case.name} does not say H and W, nor input_resolution: the map has no shape")
    size = case.args["input_resolution"]
    return (size, size) if isinstance(size, int) else tuple(size)


def _aggregated(case: Case) -> AggregatedAttention:
    def make(
        dim: int,
        input_resolution: tuple[int, int],
        num_heads: int = 8,
        window_size: int = 3,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        sr_ratio: int = 1,
        fixed_pool_size: int | None = None,
    ) -> AggregatedAttention:
        layer = AggregatedAttention(
            dim,
            num_heads,
            window_size=window_size,
            sr_ratio=sr_ratio,
            pool_size=fixed_pool_size or None,
            qkv_bias=qkv_bias,
            proj_drop=proj_drop,
        )
        space = _space(case)
        layer.pretrain_size = _pretrain_size(case, space, layer.cells(space))
        return layer

    return case.build(make)


def _length_scaled(case: Case) -> LengthScaledAttention:
    def make(
        dim: int,
        input_resolution: tuple[int, int],
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> LengthScaledAttention:
        layer = LengthScaledAttention(dim, num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop)
        space = _space(case)
        layer.pretrain_size = _pretrain_size(case, space, space)
        return layer

    return case.build(make)


def _feed_forward(case: Case) -> ConvolutionalGLU:
    def make(
        in_features: int, hidden_features: int | None = None, out_features: int | None = None, drop: float = 0.0
    ) -> ConvolutionalGLU:
        return ConvolutionalGLU(in_features, hidden_features or None, out_features or None, drop=drop)

    return case.build(make)


def _pretrain_size(case: Case, space: tuple[int, ...], cells: tuple[int, ...]) -> tuple[int, ...] | None:
    """The map for which the recorded table of positions was made: our table for it must be the recorded one."""
    if "in.relative_coords_table" not in case.tensors:
        return None
    recorded = case.tensors["in.relative_coords_table"].double()
    size = []
    for axis in range(2):
        furthest = pooled_coordinates(space, cells, (9, 9))[0][..., axis].abs().max().item()  # 9 leaves d as it is
        tokens = 2 ** (3 * furthest) - 1
        scaled = 2 ** (3 * recorded[:, axis].abs().max().item()) - 1
        size.append(1 + round(8 * tokens / scaled) if scaled else space[axis])
    table, rows = pooled_coordinates(space, cells, tuple(size))
    index = case.tensors["in.relative_pos_index"].long()
    ours = table[rows[0][:, None, :, None], rows[1][None, :, None, :]].flatten(0, 3)
    if ours.shape != recorded[index].shape or (ours - recorded[index]).abs().max() > 1e-5:
        raise InputError(
            f"{case.key}/{case.name} has other relative positions than tokens on {space} and cells on {cells}"
        )
    return tuple(size)


def _count_windows(name: str) -> int:
    """FLOPs of the tiles in which a network computes its windows, less those of nine keys for each token."""
    size, more = describe_model(name).image_size, 0
    with torch.device("meta"):
        model = create_model(name)
    assert isinstance(model, TransNeXt)
    for reduction, stage in zip(model.feature_info.reduction(), model.stages):
        assert isinstance(stage, Stage)
        layer, side = stage.blocks[0].attn, size // reduction
        if isinstance(layer, AggregatedAttention):
            x = torch.zeros(1, layer.num_heads, side, side, layer.dim // layer.num_heads, device="meta")
            tiles = count_flops(partial(sparse_attention, pattern=SlidingWindow(1, 1)), x, x, x).total
            more += len(stage.blocks) * (tiles - 2 * 2 * 9 * side**2 * layer.dim)
    return more


def _reach() -> Tensor:
    """(N, N) norms of the gradient of every output of a layer by every input, on a map of 6 x 8 tokens."""
    layer, x = AggregatedAttention(16, 2, sr_ratio=2).double(), torch.randn(1, 6, 8, 16, dtype=torch.float64)
    x.requires_grad_()
    outputs = layer(x).sum(-1).flatten()
    grads = [torch.autograd.grad(out, x, retain_graph=True)[0] for out in outputs]
    return torch.stack([grad.norm(dim=-1).flatten() for grad in grads])


def _entropy(keys: int, counted: int) -> float:
    """Mean entropy of attention over random unit vectors of 24 channels, with the factor for `counted` keys."""
    layer = LengthScaledAttention(24, 1).requires_grad_(False)
    nn.init.zeros_(layer.query_embedding)
    query, key = (F.normalize(torch.randn(16, 1, count, 24), dim=-1) for count in (64, keys))
    log_weights = (layer.scale_query(query, counted) @ key.mT).log_softmax(-1)
    return -(log_weights.exp() * log_weights).sum(-1).mean().item()


class _WindowAlone(AggregatedAttention):
    """The pooled map is there, and never seen."""

    def position_bias(self, space: tuple[int, ...], cells: tuple[int, ...]) -> Tensor:
        return torch.full_like(super().position_bias(space, cells), -torch.inf)


class _Patches(nn.Module):
    """Tokens of 2 x 2 pixels with a learned position, a block, mean over the map, ten classes."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 32, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(8, 8, 32))
        self.mixer = nn.Sequential(nn.LayerNorm(32), mixer)
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 10))

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).movedim(1, -1) + self.position
        x = x + self.mixer(x)
        x = x + self.mlp(x)
        logits: Tensor = self.head(x.mean((1, 2)))
        return logits


def _draw_cues(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Two digits in two quarters, (count, 1, 16, 16), the first one marked in its corner; and its label."""
    first, second = torch.randint(len(images), (2, count))
    place, image = torch.rand(count, 4).argsort(-1), torch.arange(count)
    quarters = -torch.ones(count, 4, 8, 8)
    quarters[image, place[:, 0]] = images[first, 0]
    quarters[image, place[:, 1]] = images[second, 0]
    quarters[image, place[:, 0], 0, 0] = 1.0
    return quarters.view(count, 2, 2, 8, 8).transpose(2, 3).reshape(count, 1, 16, 16), labels[first]


def _train_on_cues(mixer: nn.Module) -> float:
    """Train 600 steps of 32 maps, all but the mixer from one random state; accuracy on 2000 maps of unseen digits."""
    torch.manual_seed(0)
    train, unseen = load_digits(8)
    model = _Patches(mixer)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        images, labels = _draw_cues(*train, 32)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        images, labels = _draw_cues(*unseen, 2000)
        return (model.eval()(images).argmax(-1) == labels).double().mean().item()
