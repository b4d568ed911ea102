"""DaViT: attention among positions in windows, then attention among channels over the whole map."""

import re
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.backbones import DaViT
from saccade.backbones.davit import DaViTBlock
from saccade.claims.framework import (
    Case,
    Paper,
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
from saccade.errors import InputError
from saccade.measure import count_flops, count_parameters
from saccade.mixers import ChannelAttention, Mixer, WindowAttention
from saccade.ops import Window, channel_attention, channel_attention_weights, sparse_attention

PAPER = Paper(
    title="DaViT: Dual Attention Vision Transformers",
    arxiv="2204.03645",
    published="2022-04-07",
    summary="Two kinds of self-attention alternate: window attention, whose tokens are positions, and channel-group "
    "attention, whose tokens are channels and whose features are all positions. The second sees the whole image at a "
    "cost linear in its area.",
    home=(
        "saccade.backbones.DaViT",
        "saccade.mixers.ChannelAttention",
        "saccade.mixers.WindowAttention",
        "saccade.ops.channel_attention",
    ),
    differences=(
        "In published weights the three blocks of qkv are value, query and key of the paper's equation, in this order.",
        "Official code pads a map that the window does not divide with zeros, which take part as keys, and so do our "
        "networks; WindowAttention by itself has smaller windows at the end unless padded=True.",
        "Official code has Large for 384 x 384 pixels with windows of 12; Huge and Giant are as timm defines them.",
    ),
)

LAYER = "the layer's definition"
WEIGHTS = "published weights"


@claim(
    "params",
    {
        "Tiny": 28_360_168,
        "Small": 49_745_896,
        "Base": 87_954_408,
        "Large": 196_811_752,
        "Huge": 348_922_856,
        "Giant": 1_406_470_120,
    },
    source="official code; for Huge and Giant timm 1.0.31",
)
def networks_have_their_sizes() -> dict[str, int]:
    """The networks have so many parameters."""
    found = {name: f"davit_{name.lower()}" for name in ("Tiny", "Small", "Base", "Large", "Huge", "Giant")}
    return count_model_parameters(found)


FLOPS = {
    "davit_tiny": 9_043_602_432,
    "davit_small": 17_546_025_984,
    "davit_base": 30_947_594_240,
    "davit_large_w12_384": 205_610_409_984,
}


@claim("flops", FLOPS, source="official code, a multiply-add as two, at 224 x 224, Large at 384 x 384")
def networks_have_their_costs() -> dict[str, int]:
    """The networks take so many FLOPs for an image."""
    return measure_model_flops(FLOPS)


@claim("params", (0, 0), source=LAYER)
def both_kinds_have_the_same_parameters() -> tuple[int, ...]:
    """Channel attention has the 4 C^2 + 4 C parameters of attention without position bias, and so has window attention:
    what is left of both with C = 96."""
    layers = ChannelAttention(96, 3), WindowAttention(96, 3, position_bias=False)
    return tuple(count_parameters(layer) - 4 * 96**2 - 4 * 96 for layer in layers)


@claim(
    "complexity",
    {"channel": tuple(4 * side**2 * 96 * 32 for side in (14, 28, 56))}
    | {"window": tuple(4 * side**2 * 49 * 96 for side in (14, 28, 56))},
    source=LAYER,
)
def both_kinds_are_linear_in_the_tokens() -> dict[str, tuple[int, ...]]:
    """The products of channel attention take 2 N C c multiply-adds, those of window attention 2 N P^2 C: N = 196, 784
    and 3136, C = 96 in groups of c = 32, P = 7, counted while they run."""
    maps = [torch.zeros(1, 3, side, side, 32) for side in (14, 28, 56)]
    channel = (count_flops(channel_attention, *[x.flatten(2, 3)] * 3).total for x in maps)
    window = (count_flops(sparse_attention, x, x, x, Window(7)).total for x in maps)
    return {"channel": tuple(channel), "window": tuple(window)}


@claim("property", {"outputs": "equal", "weights": "equal"}, rounding, source=LAYER)
def shuffled_positions_shuffle_the_output() -> dict[str, float]:
    """Channel attention is equivariant to permutations of the positions, and its weights do not change: differences of
    both."""
    query, key, value = _inputs()
    order = torch.randperm(49)
    shuffled = query[:, :, order], key[:, :, order], value[:, :, order]
    out, weights = channel_attention(query, key, value), channel_attention_weights(query, key)
    return {
        "outputs": relative_difference(channel_attention(*shuffled), out[:, :, order]),
        "weights": relative_difference(channel_attention_weights(*shuffled[:2]), weights),
    }


@claim("property", {"channel": 64 * 64, "window": 64 * 16}, source=LAYER)
def channels_see_the_whole_map() -> dict[str, int]:
    """Through channel attention every output position depends on every input position, through window attention on
    those of its window: pairs with a gradient on a map of 8 x 8, P = 4."""
    layers = {"channel": ChannelAttention(16, 2), "window": WindowAttention(16, 2, window_size=4, position_bias=False)}
    return {name: _count_pairs(layer.double()) for name, layer in layers.items()}


@claim("equivalence", "equal", rounding, source=LAYER)
def one_group_is_attention_of_all_channels() -> float:
    """With g = 1 it is torch's attention with the transposed map, a C x C matrix."""
    query, key, value = _inputs(groups=1)
    transposed = F.scaled_dot_product_attention(query.mT, key.mT, value.mT, scale=query.shape[-1] ** -0.5)
    return relative_difference(channel_attention(query, key, value), transposed.mT)


@claim("equivalence", "equal", rounding, source=LAYER)
def groups_of_one_channel_give_the_values() -> float:
    """With g = C the only weight is 1, and the layer is its first projection followed by the last."""
    layer, x = ChannelAttention(16, 16).double(), torch.randn(2, 5, 6, 16, dtype=torch.float64)
    return relative_difference(layer(x), layer.proj(layer.qkv(x).chunk(3, -1)[0]))


@claim(
    "property",
    {"row sums": 1.0, "outside": 0},
    equal("what float64 loses to rounding", within=1e-12),
    source=LAYER,
)
def outputs_are_averages_of_the_values() -> dict[str, float]:
    """Rows of the weights sum to 1, so that every output lies between the least and the largest of its position's
    values in the group: the sum that differs most, and outputs that do not."""
    query, key, value = _inputs()
    sums = channel_attention_weights(query, key).sum(-1)
    out = channel_attention(query, key, value)
    outside = (out > value.amax(-1, True) + 1e-12) | (out < value.amin(-1, True) - 1e-12)
    return {"row sums": sums.flatten()[(sums - 1).abs().argmax()].item(), "outside": int(outside.sum())}


@claim(
    "property",
    {"channel": 16.0, "window": 1.0},
    equal("repeating a map exactly repeats its sums", within=1e-9),
    source=LAYER,
)
def logits_grow_with_the_map() -> dict[str, float]:
    """Nothing divides k^T v by the number of positions: a map repeated 4 x 4 times has 16 times the logits, where
    those of window attention stay."""
    query, key, _ = _inputs()
    repeated = [x.repeat(1, 1, 16, 1) for x in (query, key)]
    channel = (repeated[0].mT @ repeated[1]).abs().max() / (query.mT @ key).abs().max()
    window = (repeated[0][:, :, :49] @ repeated[1][:, :, :49].mT).abs().max() / (query @ key.mT).abs().max()
    return {"channel": channel.item(), "window": window.item()}


@claim(
    "accuracy",
    {"Tiny": 82.8, "Small": 84.2, "Base": 84.6, "Giant": 90.4},
    source="the repository's table, and the abstract; ImageNet top-1",
    needs="ImageNet, " + WEIGHTS + ", and for Giant 1.5 billion images with text",
)
def networks_are_accurate() -> None:
    """The networks have these accuracies."""


@claim(
    "accuracy",
    "each kind alone is less accurate than both",
    source="ablation",
    needs="ImageNet, and networks trained without either kind",
)
def both_kinds_are_needed() -> None:
    """Leaving out either kind of attention costs accuracy on ImageNet."""


def replay(case: Case) -> dict[str, Tensor]:
    """A DaViT, a SpatialBlock, a ChannelBlock, or the two one after the other, on tokens (B, H W, C)."""
    named = {_WORDS.get(name, name): value for name, value in case.args.items() if name != "to"}  # "padded to 8"
    case = replace(case, args=named)
    if "Block" not in case.cls:
        return replay_network(case, _network(case))
    kinds = [name for name in _BLOCKS if name in case.cls]
    size = named.pop("size", None)
    if size is None:
        raise InputError(f"{case.key}/{case.name} does not say the size of the map: add size (H, W) to its arguments")
    build: Callable[..., nn.Module] = _dual if len(kinds) == 2 else _BLOCKS[kinds[0]]
    block = case.build(build)

    def forward(state: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {re.sub(r"\bcpe\.([01])\.", _position, name): tensor for name, tensor in state.items()}
        return {"y": run_official(block, renamed, inputs["x"].unflatten(1, size)).flatten(1, 2)}

    return play(case, forward)


def _position(found: re.Match[str]) -> str:
    return f"cpe{int(found[1]) + 1}."


def _network(case: Case) -> DaViT:
    """The network of the official state; what its shapes do not show stands in the arguments of the official DaViT."""
    shapes, args = case.shapes, case.args
    blocks = [re.match(r"main_blocks\.(\d+)\.(\d+)\.(\d+)\.norm1\.weight", name) for name in shapes]
    if not any(blocks):
        raise InputError(f"{case.key}/{case.name} is a case of {case.cls}: replay serves DaViT and its blocks")
    places = [tuple(map(int, found.groups())) for found in blocks if found]
    stages = range(1 + max(stage for stage, *_ in places))
    first = "main_blocks.0.0.0"
    hidden, dim = shapes.get(f"{first}.mlp.fc1.weight", (0, 1))
    return DaViT(
        tuple(shapes[f"patch_embeds.{stage}.proj.weight"][0] for stage in stages),
        tuple(1 + max(dual for number, dual, _ in places if number == stage) for stage in stages),
        case.per_stage("num_heads", len(stages), (3, 6, 12, 24)),
        window_size=args.get("window_size", 7),
        mlp_ratio=args.get("mlp_ratio", hidden / dim),
        qkv_bias=f"{first}.attn.qkv.bias" in shapes,
        kinds=args.get("attention_types", ("spatial", "channel"))[: 1 + max(kind for *_, kind in places)],
        ffn=bool(hidden),
        overlap=any(shapes[f"patch_embeds.{stage}.proj.weight"][-1] == 3 for stage in stages),
        position_act=args.get("cpe_act", False),
        num_classes=shapes.get("head.weight", (0,))[0],
        in_chans=shapes["patch_embeds.0.proj.weight"][1],
    )


def _spatial(
    dim: int,
    num_heads: int,
    window_size: int = 7,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    drop_path: float = 0.0,
    ffn: bool = True,
    cpe_act: bool = False,
    kind: str = "spatial",
) -> DaViTBlock:
    return DaViTBlock(
        dim,
        num_heads,
        kind,
        window_size=window_size,
        mlp_ratio=mlp_ratio if ffn else None,
        qkv_bias=qkv_bias,
        position_act=cpe_act,
    )


def _channel(
    dim: int,
    num_heads: int,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = False,
    drop_path: float = 0.0,
    ffn: bool = True,
    cpe_act: bool = False,
) -> DaViTBlock:
    return _spatial(dim, num_heads, 7, mlp_ratio, qkv_bias, drop_path, ffn, cpe_act, "channel")


def _dual(
    dim: int,
    num_heads: int,
    window_size: int = 7,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    drop_path: float = 0.0,
    ffn: bool = True,
    cpe_act: bool = False,
) -> nn.Sequential:
    kinds = ("spatial", "channel")
    same = (dim, num_heads, window_size, mlp_ratio, qkv_bias, drop_path, ffn, cpe_act)
    return nn.Sequential(*(_spatial(*same, kind) for kind in kinds))


_BLOCKS: dict[str, Callable[..., nn.Module]] = {"SpatialBlock": _spatial, "ChannelBlock": _channel}
_WORDS = {"heads": "num_heads", "groups": "num_heads", "window": "window_size"}  # of recorded arguments


def _inputs(groups: int = 3) -> list[Tensor]:
    """Query, key and value: 2 images of 49 tokens, 24 channels."""
    return [torch.randn(2, groups, 49, 24 // groups, dtype=torch.float64) for _ in range(3)]


def _count_pairs(layer: Mixer) -> int:
    """Pairs of output and input position with a gradient on a map of 8 x 8."""
    x = torch.randn(1, 8, 8, 16, dtype=torch.float64, requires_grad=True)
    outputs = layer(x).square().sum(-1).flatten()
    grads = [torch.autograd.grad(out, x, retain_graph=True)[0].abs().sum(-1) for out in outputs]
    return int((torch.stack(grads) > 0).sum())
