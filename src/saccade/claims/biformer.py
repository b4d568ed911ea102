"""BiFormer: regions choose regions by content, then ordinary attention over the tokens of the chosen ones."""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.backbones import BiFormer
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
    replay_network,
    rounding,
    run_official,
)
from saccade.claims.framework.oracles import dense_attention
from saccade.errors import InputError
from saccade.measure import count_flops, fit_exponent
from saccade.mixers import BiLevelRoutingAttention
from saccade.mixers.mixer import split_heads
from saccade.ops import route_regions, sparse_attention

PAPER = Paper(
    title="BiFormer: Vision Transformer with Bi-Level Routing Attention",
    arxiv="2303.08810",
    published="2023-03-15",
    summary="The map is cut into S x S regions, and each region keeps the k regions whose mean key best matches its "
    "mean query; then ordinary token-to-token attention runs over the gathered tokens of those k regions. Only dense "
    "matrix products and one gather are needed.",
    home=("saccade.backbones.BiFormer", "saccade.mixers.BiLevelRoutingAttention", "saccade.ops.route_regions"),
    differences=(
        "Official code scales by the whole width, C^-0.5, and not by a head's, to keep old weights; so do we.",
        "Official code refuses a map that S does not divide, or appends zeros which are attended to: before the "
        "projection in the older layer (auto_pad), after it in the newer one. By default ours has smaller regions at "
        "the end; padding='input' and padding='projected' are the two official ways.",
        "The last stage's attention has 8 heads whatever the width, in STL too, where that is uncertain: dense_heads.",
        "Official code calls one projection qkv.qkv or qkv_linear, the other wo or output_linear.",
    ),
)

LAYER = "the layer's definition"
README = "README of the repository"
SPACE, REGION = (8, 12), (2, 3)  # 4 x 4 regions


@claim(
    "params",
    {"T": 13_142_760, "S": 25_536_232, "B": 56_804_968, "STL": 28_372_552},
    source="official code, counted",
)
def networks_have_their_sizes() -> dict[str, int]:
    """The networks have so many parameters, published as 13.1, 25.5, 56.8 and 28.4 million."""
    names = {"T": "biformer_tiny", "S": "biformer_small", "B": "biformer_base", "STL": "biformer_stl"}
    return count_model_parameters(names)


FLOPS = {
    "biformer_tiny": 4_431_803_136,
    "biformer_small": 8_927_259_136,
    "biformer_base": 19_517_980_416,
    "biformer_stl": 9_147_748_992,
}


@claim(
    "flops",
    FLOPS,
    source="official code, counted at 224 x 224, a multiply-add as two; published as 2.2, 4.5, 9.8 and 4.6 G "
    "multiply-adds",
)
def networks_have_their_costs() -> dict[str, int]:
    """The networks take so many FLOPs for an image."""
    return measure_model_flops(FLOPS)


@claim("complexity", (0, 0, 0), source="complexity of the layer")
def cost_of_routing_and_attention() -> tuple[float, ...]:
    """Projections apart, C (S^4 + 2 k (HW)^2 / S^2) multiply-adds: what counting adds to that for three choices of S
    and k on 28 x 28 tokens of C = 64 channels."""
    query = torch.randn(1, 2, 28, 28, 32)
    extra = []
    for regions, count in [(7, 1), (7, 4), (4, 3)]:

        def attend(size: int, count: int) -> Tensor:
            return sparse_attention(query, query, query, route_regions(query, query, size, count))

        extra.append(count_flops(attend, 28 // regions, count).total - 2 * _multiply_adds(28**2, regions, count))
    return tuple(extra)


@claim(
    "complexity",
    {"best S": 4 / 3, "S = 7": 2.0},
    equal("S is a whole number, and S^4 is a small part at S = 7", within=0.01),
    source="complexity of the layer",
)
def exponent_of_the_cost() -> dict[str, float]:
    """With the S that costs least, near (k (HW)^2)^(1/6), the cost grows as (HW)^(4/3), and with S = 7 as (HW)^2:
    exponents fitted over maps of 28 x 28 to 224 x 224 with k = 4."""
    tokens = [side**2 for side in (28, 56, 112, 224)]
    best = [min(_multiply_adds(n, regions, 4) for regions in range(1, 100)) for n in tokens]
    fixed = [_multiply_adds(n, 7, 4) for n in tokens]
    return {"best S": fit_exponent(tokens, best).value, "S = 7": fit_exponent(tokens, fixed).value}


@claim("complexity", 4 / 49, equal("S^4 is a small part", relative=0.01), source="complexity of the layer")
def share_of_dense_attention() -> float:
    """With S = 7 the cost is k / 49 of that of dense attention: k = 4, 224 x 224 tokens."""
    return _multiply_adds(224**2, 7, 4) / (2 * 64 * 224**4)


@claim("equivalence", "equal to 1e-5", rounding, source=LAYER)
def all_regions_are_dense_attention() -> dict[str, float]:
    """With k = S^2, and with S = 1, it is dense attention over all tokens, plus the convolution of the values."""
    errors = {}
    for name, options in {"k = S^2": {"num_regions": 4, "topk": 16}, "S = 1": {"num_regions": 1, "topk": 1}}.items():
        layer, x = _layer(**options), _random_map()
        assert layer.lepe is not None
        query, key, value = layer.project(x)
        full = 24**-0.5 * 8**0.5  # the whole width's scale instead of a head's
        q, k, v = (split_heads(part, 3) for part in (query * full, key, value))
        mixed = dense_attention(q, k, v).movedim(1, -2).flatten(-2)
        errors[name] = relative_difference(
            layer(x), layer.proj(mixed + layer.lepe(value.movedim(-1, 1)).movedim(1, -1))
        )
    return errors


@claim("property", {"regions seen": 1, "all see themselves": False}, source="first stage of the networks")
def one_region_need_not_be_its_own() -> dict[str, Any]:
    """With k = 1 every region attends to exactly one region, and not necessarily to itself."""
    query, key, _ = _random_heads()
    chosen = route_regions(query, key, REGION, 1)
    own = torch.arange(16).view(1, 1, 16, 1)
    return {"regions seen": int(chosen.used.sum(-1).max()), "all see themselves": bool((chosen.blocks == own).all())}


@claim("property", {"routes": 0.0, "output": 0.0}, rounding, source="routing by content")
def routing_follows_the_content() -> dict[str, float]:
    """Where whole regions of the input change places, so do the routes, and without the convolution the output: the
    largest relative differences."""
    layer, x, order = _layer(num_regions=4, lepe_size=0), _random_map(), torch.randperm(16)
    back = order.argsort()
    moved = _move_regions(x, order)
    routes = [layer.route(*layer.project(each)[:2]).blocks[:, 0] for each in (x, moved)]
    expected = back[routes[0][:, order]]
    return {
        "routes": relative_difference(routes[1], expected),
        "output": relative_difference(layer(moved), _move_regions(layer(x), order)),
    }


@claim("property", "identical", at_most(0, "the same products in the same order"), source="routing without gradient")
def the_choice_has_no_gradient() -> float:
    """The gradients of query, key and value are those with the routes given as constants: the largest difference."""
    inputs = _random_heads(grad=True)
    query, key, value = inputs
    constant = route_regions(query.detach().clone(), key.detach().clone(), REGION, 3)
    upstream = torch.randn_like(value)
    routed, given = (
        torch.autograd.grad(sparse_attention(query, key, value, routes), inputs, upstream)
        for routes in (route_regions(query, key, REGION, 3), constant)
    )
    return max((ours - theirs).abs().max().item() for ours, theirs in zip(routed, given))


@claim("property", 0, source=LAYER)
def an_output_depends_on_its_routed_regions_alone() -> int:
    """Without the convolution the gradient of an output by the input is non-zero exactly on the output's token and on
    the k regions of its own: the number of pairs of tokens where it is not so."""
    layer, x = _layer(num_regions=4, topk=3, lepe_size=0), _random_map()[:1].requires_grad_()
    visible = layer.route(*layer.project(x)[:2]).mask(SPACE)[0, 0] | torch.eye(96, dtype=torch.bool)
    outputs = layer(x).sum(-1).flatten()
    reached = [torch.autograd.grad(out, x, retain_graph=True)[0].abs().sum(-1).flatten() > 0 for out in outputs]
    return int((torch.stack(reached) != visible).sum())


@claim(
    "accuracy",
    {"T": 81.4, "S": 83.8, "B": 84.3, "STL": 82.7},
    source=README + "; ImageNet top-1",
    needs="ImageNet, and published weights",
)
def networks_are_accurate() -> None:
    """Top-1 accuracy of the networks on ImageNet."""


@claim(
    "accuracy",
    {"k = 1": 0.53, "k = 2": 0.51},
    at_most(0.65, "chance is 0.5; the official layer's figures are single runs"),
    source="an experiment of ours with the official layer",
    slow=True,
)
def few_routes_do_not_find_the_twin() -> dict[str, float]:
    """Regions must output the value of the one other region that carries the same code: trained for 500 steps, one
    layer with 16 regions stays near chance with k = 1 and k = 2."""
    return {f"k = {count}": _train_on_twins(count) for count in (1, 2)}


@claim(
    "accuracy",
    {"k = 4": 0.87, "k = 16": 0.95},
    at_least(0.7, "well above chance, 0.5; the official layer's figures are single runs"),
    source="an experiment of ours with the official layer",
    slow=True,
)
def more_routes_find_the_twin() -> dict[str, float]:
    """With k = 4 of 16 regions the same layer finds the twin, and with all of them, dense attention."""
    return {f"k = {count}": _train_on_twins(count) for count in (4, 16)}


def replay(case: Case) -> dict[str, Tensor]:
    """BiLevelRoutingAttention of bra_legacy (channels last), nchwBRA of bra_nchw (channels first), and networks."""
    if "BiLevelRoutingAttention" not in case.cls and "nchwBRA" not in case.cls:
        return replay_network(case, _network(case))
    channels = 1 if "nchw" in case.cls else -1
    layer = _Watched(case.build(_from_nchw if channels == 1 else _from_legacy), channels)

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = run_official(layer, _rename(state), inputs["x"])
        return {name: output for name, output in outputs.items() if f"out.{name}" in case.expected}

    return play(case, forward)


def _network(case: Case) -> BiFormer:
    """The network of the official state; what its shapes do not show stands in the arguments of the official one."""
    shapes, args = case.shapes, case.args
    case = replace(case, args=args)
    blocks = [re.match(r"stages\.(\d+)\.(?:blocks\.)?\d+\.norm1\.weight", name) for name in shapes]
    depths = Counter(int(found[1]) for found in blocks if found)
    if not depths:
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: replay serves BiFormer and its attention")
    for name in ("mlp_dwconv", "pe", "representation_size"):
        if args.get(name):
            raise InputError(f"{name} is {args[name]}: no published network has it, and neither has ours")
    if not args.get("pre_norm", True):
        raise InputError("pre_norm is False: our blocks have norms before their branches, as all published networks")
    count = len(depths)
    within = "blocks." if any(re.match(r"stages\.0\.blocks\.", name) for name in shapes) else ""

    def shape(stage: int, layer: str) -> torch.Size | None:
        return shapes.get(f"stages.{stage}.{within}0.{layer}")

    dims = tuple(shapes[f"stages.{stage}.{within}0.norm1.weight"][0] for stage in range(count))
    hidden = [shapes[f"stages.{stage}.{within}0.mlp.0.weight"][0] for stage in range(count)]
    qkv = [shape(n, "attn.qkv.qkv.weight") or shape(n, "attn.qkv_linear.weight") for n in range(count)]
    first = shapes["downsample_layers.0.0.weight"]
    lepe = [kernel[-1] for n in range(count) if (kernel := shape(n, "attn.lepe.weight"))]
    position = shape(0, "pos_embed.weight")
    scale = shape(0, "gamma1")
    newer = any("qkv_linear" in name for name in shapes)
    per_stage = {
        name: case.per_stage(plural, count, args.get(name, default))
        for name, plural, default in (
            ("kv_per_win", "kv_per_wins", (2, 2, -1, -1)),
            ("kv_downsample_ratio", "kv_downsample_ratios", (4, 2, 1, 1)),
        )
    }
    shared = {name: args.get(name, False) for name in ("param_routing", "diff_routing", "soft_routing")}
    mode = "identity" if newer else args.get("kv_downsample_mode", "identity")
    own = [{name: values[stage] for name, values in per_stage.items()} for stage in range(count)]
    return BiFormer(
        dims,
        tuple(depths[stage] for stage in range(count)),
        topks=case.per_stage("topks", count, (1, 4, 16, -2)),
        num_regions=args.get("n_win", 7),
        head_dim=args.get("head_dim", 32),
        dense_heads=args.get("num_heads", 8),
        qk_dims=tuple((each[0] - dim) // 2 if each else dim for each, dim in zip(qkv, dims)),
        scale=args.get("qk_scale") or None,
        mlp_ratio=tuple(width / dim for width, dim in zip(hidden, dims)),
        lepe_size=lepe[0] if lepe else 0,
        position_size=position[-1] if position else 0,
        stem="patch" if first[-1] == 4 else "conv",
        padding="projected" if newer else "input" if args.get("auto_pad") else "none",
        route_options=tuple(
            _options(mode, **each, **shared) | {"out_proj": args.get("param_attention", "qkvo") == "qkvo"}
            for each in own
        ),
        layer_scale=1.0 if scale else None,
        num_classes=shapes.get("head.weight", (0,))[0],
        in_chans=first[1],
    )


def _options(
    kv_downsample_mode: str,
    kv_per_win: int | None,
    kv_downsample_ratio: int,
    param_routing: bool,
    diff_routing: bool,
    soft_routing: bool,
) -> dict[str, Any]:
    """Our options for pooled keys and routing with weights."""
    if kv_downsample_mode not in _POOLS:
        raise InputError(f"kv_downsample_mode is {kv_downsample_mode!r}: official code has {', '.join(_POOLS)}")
    if diff_routing and not soft_routing:
        raise InputError("diff_routing is set without soft_routing: official code does not implement it")
    pool = _POOLS[kv_downsample_mode]
    if kv_downsample_mode in ("avgpool", "maxpool") and kv_downsample_ratio <= 1:
        pool = None
    return {
        "pool": pool,
        "pool_size": kv_per_win if kv_downsample_mode.startswith("ada") else None,
        "pool_ratio": max(1, kv_downsample_ratio),
        "learned": param_routing,
        "differentiable": diff_routing,
        "soft": soft_routing,
    }


_POOLS = {"identity": None, "ada_avgpool": "avg", "ada_maxpool": "max", "avgpool": "avg", "maxpool": "max"}


class _Watched(nn.Module):
    """A layer with its channels where official code has them, which returns its routes too."""

    def __init__(self, layer: BiLevelRoutingAttention, channels: int) -> None:
        super().__init__()
        self.layer = layer
        self.channels = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.movedim(self.channels, -1)
        query, key, _ = self.layer.project(self.layer.pad_input(x))
        routes = self.layer.route(query, key).blocks
        weights = self.layer.scores(query, key).gather(-1, routes).softmax(-1)[:, 0]
        return {"y": self.layer(x).movedim(-1, self.channels), "r_weight": weights, "r_idx": routes[:, 0].int()}


_NAMES = {"router.emb": "match", "qkv.qkv": "qkv", "qkv_linear": "qkv", "wo": "proj", "output_linear": "proj"}


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours; the newer layer has 1 x 1 convolutions for linear layers."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith(("qkv_linear.", "output_linear.")):
            tensor = tensor.flatten(1) if name.endswith("weight") else tensor
        layer, kind = name.rsplit(".", 1)
        renamed[f"layer.{_NAMES.get(layer, layer)}.{kind}"] = tensor
    return renamed


def _from_legacy(
    dim: int,
    num_heads: int = 8,
    n_win: int = 7,
    qk_dim: int | None = None,
    qk_scale: float | None = None,
    kv_per_win: int | None = 4,
    kv_downsample_ratio: int = 4,
    kv_downsample_kernel: int | None = None,
    kv_downsample_mode: str = "identity",
    topk: int = 4,
    param_attention: str = "qkvo",
    param_routing: bool = False,
    diff_routing: bool = False,
    soft_routing: bool = False,
    side_dwconv: int = 3,
    auto_pad: bool = False,
) -> BiLevelRoutingAttention:
    """The layer with the arguments of bra_legacy's BiLevelRoutingAttention."""
    options = _options(kv_downsample_mode, kv_per_win, kv_downsample_ratio, param_routing, diff_routing, soft_routing)
    return BiLevelRoutingAttention(
        dim,
        num_heads,
        num_regions=n_win,
        topk=topk,
        qk_dim=qk_dim or dim,
        scale=qk_scale or None,
        lepe_size=side_dwconv,
        padding="input" if auto_pad else "none",
        out_proj=param_attention == "qkvo",
        **options,
    )


def _from_nchw(
    dim: int,
    num_heads: int = 8,
    n_win: int = 7,
    qk_scale: float | None = None,
    topk: int = 4,
    side_dwconv: int = 3,
    auto_pad: bool = False,
    attn_backend: str = "torch",
) -> BiLevelRoutingAttention:
    """The layer with the arguments of nchwBRA, which pads whether it is asked to or not."""
    return BiLevelRoutingAttention(
        dim,
        num_heads,
        num_regions=n_win,
        topk=topk,
        scale=qk_scale or None,
        lepe_size=side_dwconv,
        padding="projected",
    )


def _multiply_adds(tokens: int, regions: int, count: int) -> float:
    """C (S^4 + 2 k (HW)^2 / S^2) with C = 64."""
    return 64 * (regions**4 + 2 * count * tokens**2 / regions**2)


def _layer(**options: Any) -> BiLevelRoutingAttention:
    """A layer of 24 channels and 3 heads."""
    return BiLevelRoutingAttention(24, 3, **options).double()


def _random_map() -> Tensor:
    return torch.randn(2, *SPACE, 24, dtype=torch.float64)


def _random_heads(grad: bool = False) -> list[Tensor]:
    """Query, key and value, (2, 3, 8, 12, 8)."""
    return [x.requires_grad_(grad) for x in torch.randn(3, 2, 3, *SPACE, 8, dtype=torch.float64)]


def _move_regions(x: Tensor, order: Tensor) -> Tensor:
    """Put region order[n] of (B, 8, 12, C) in the place of region n."""
    regions = x.unflatten(2, (4, -1)).unflatten(1, (4, -1)).transpose(2, 3).flatten(1, 2)
    return regions[:, order].unflatten(1, (4, 4)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _draw_twins(maps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maps of 4 x 4 regions of 4 x 4 tokens: (B, 16, 16, 24), the region with the value of its twin, and the value.

    Every region has a code of its own in channels 0 to 15 and a value of +-1 in channel 16; two share a code, and the
    second of them has no value."""
    codes, values = torch.randn(maps, 16, 16), torch.randint(2, (maps, 16)) * 2.0 - 1
    first, second = torch.rand(maps, 16).argsort(-1)[:, :2].T
    image = torch.arange(maps)
    codes[image, second] = codes[image, first]
    target = values[image, first]
    values[image, second] = 0
    tokens = F.pad(torch.cat([codes, values.unsqueeze(-1)], -1), (0, 7))
    regions = tokens.view(maps, 4, 1, 4, 1, 24).expand(-1, -1, 4, -1, 4, -1).reshape(maps, 16, 16, 24)
    return regions + 0.3 * torch.randn(maps, 16, 16, 24), second, target


def _train_on_twins(count: int) -> float:
    """Train a layer to output the value of the twin, 500 steps of 8 maps; accuracy over the tokens of 64 maps more."""
    layer = BiLevelRoutingAttention(24, 2, num_regions=4, topk=count, lepe_size=0)
    model = nn.Sequential(layer, nn.Linear(24, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def predict(maps: int) -> tuple[Tensor, Tensor]:
        x, second, target = _draw_twins(maps)
        by_region = model(x).view(maps, 4, 4, 4, 4).transpose(2, 3).reshape(maps, 16, 16)
        return by_region[torch.arange(maps), second], target.unsqueeze(-1).expand(-1, 16)

    for _ in range(500):
        predicted, target = predict(8)
        optimizer.zero_grad()
        F.soft_margin_loss(predicted, target).backward()
        optimizer.step()
    with torch.no_grad():
        predicted, target = predict(64)
    return (predicted.sign() == target).double().mean().item()
